"""A small version and its promotion. Imports no torch: processes that kill themselves begin and end by the dozen."""

import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from infra.store.opening import open_store
from infra.store.protocol import Store
from tasks.registry.log import append_promotion, history, latest_promotion
from tasks.registry.versions import Lineage, Manifest, describe_file, publish_version, verify_version

NOW = datetime(2026, 11, 23, 2, 0, tzinfo=UTC)
WRITES = 4  # of a promotion: two files, the manifest, the entry


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


def champion_of(store: Store) -> str | None:
    """The champion, every file of it verified."""
    latest = latest_promotion(store, "job")
    return None if latest is None else verify_version(store, "job", latest.version).version


class _DeadlyStore:
    """A store whose n-th write kills the process before it begins, by SIGKILL, which no process can catch."""

    def __init__(self, store: Store, fatal: int) -> None:
        self._store = store
        self._left = fatal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def create(self, key: str, content: bytes) -> None:
        self._count()
        self._store.create(key, content)

    def upload(self, key: str, path: Path, on_bytes: Callable[[int], None]) -> None:
        self._count()
        self._store.upload(key, path, on_bytes)

    def _count(self) -> None:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1


def be_killed_at_each_write(url: str, folder: Path) -> None:
    """What a process does that has nothing else to do: its forks promote and are killed before their n-th write, or
    after the last, and it looks at what they left behind and goes on to the end."""
    store = open_store(url)
    old = promote(store, folder / "old", 0, judged=0, run="old")
    for judged, writes in enumerate(range(WRITES + 1), start=1):
        version, run = folder / f"new-{judged}", f"new {judged}"
        killed = os.fork()
        if killed == 0:
            try:
                promote(cast(Store, _DeadlyStore(open_store(url), writes)), version, judged, judged, run)
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        _, status = os.waitpid(killed, 0)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        new = write_version(version, judged).version
        assert champion_of(store) == (new if writes == WRITES else old)
        assert promote(store, version, judged, judged, run) == new
        assert champion_of(store) == new
        assert len(history(store, "job")) == judged + 1
        old = new
