"""A small version and its promotion. Imports no torch: processes that kill themselves begin and end by the dozen."""

from datetime import UTC, datetime
from pathlib import Path

from infra.store import Store
from tasks.promotions import append_promotion
from tasks.versions import Lineage, Manifest, describe_file, publish_version

NOW = datetime(2026, 11, 23, 2, 0, tzinfo=UTC)


def write_version(folder: Path, number: int, large: bytes | None = None) -> Manifest:
    """A version of two files, small unless it is given large weights; quick, because nobody looks into them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "README.md"):
        (folder / name).write_bytes(f"{name} of version {number}".encode() * 50)
    if large is not None:
        (folder / "model.safetensors").write_bytes(large)
    lineage = Lineage(
        snapshot="f", source="s", study="n", trial=number, seed=number, device="cpu", mlflow_run_id="r",
        prefect_flow_run_id=None, git_commit=None, python="3", packages={},
    )  # fmt: skip
    return Manifest(
        job="job", model="mlp", hyperparameters={}, features=(4,), classes=("a", "b"), metrics={}, lineage=lineage,
        files={path.name: describe_file(path) for path in sorted(folder.iterdir())},
    )  # fmt: skip


def promote(store: Store, folder: Path, number: int, judged: int, run: str) -> str:
    manifest = write_version(folder, number)
    version = publish_version(store, manifest, folder)
    append_promotion(store, "job", version=version, judged=judged, run=run, reason="better", now=NOW)
    return version
