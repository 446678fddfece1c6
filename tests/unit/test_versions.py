"""Versions and the promotion log: what was published is what is loaded, and two promoters cannot both win."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from infra.store import Store, StoreError, open_store
from models.families import FAMILIES, DataShape
from tasks.versions import (
    DamagedVersion,
    Lineage,
    Manifest,
    Promotion,
    StaleJudgement,
    append_promotion,
    describe_file,
    latest_promotion,
    load_champion,
    publish_version,
    read_champion,
)
from tests.conftest import CPU

NOW = datetime(2026, 11, 23, 2, 0, tzinfo=UTC)
HYPERPARAMETERS = {
    "learning_rate": 0.01, "batch_size": 64, "optimizer": "adam", "weight_decay": 0.0, "epochs": 1,
    "depth": 1, "width": 8, "dropout": 0.0,
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def publish(store: Store, seed: int = 0) -> str:
    torch.manual_seed(seed)
    shape = DataShape(features=(4,), outputs=3)
    model = FAMILIES["mlp"].build(FAMILIES["mlp"].hyperparameters.model_validate(HYPERPARAMETERS), shape)
    files = {
        "model.safetensors": save(model.state_dict()),
        "preprocessing.safetensors": save({"mean": torch.zeros(4), "scale": torch.ones(4)}),
    }
    lineage = Lineage(
        snapshot="f", source="s", study="n", trial=seed, seed=seed, device="cpu", mlflow_run_id="r",
        prefect_flow_run_id=None, git_commit=None, python="3", packages={},
    )  # fmt: skip
    manifest = Manifest(
        job="job", model="mlp", hyperparameters=HYPERPARAMETERS, features=(4,), classes=("a", "b", "c"),
        metrics={"test": {"accuracy": 0.5}}, lineage=lineage,
        files={name: describe_file(content) for name, content in files.items()},
    )  # fmt: skip
    return publish_version(store, manifest, files)


def promote(store: Store, version: str, judged: int = 0, run: str = "run") -> Promotion:
    return append_promotion(store, "job", version=version, judged=judged, run=run, reason="better", now=NOW)


def file_of(store: Store, version: str, name: str) -> Path:
    return Path(store.url.removeprefix("file://")) / "models/job/versions" / version / name


def test_what_was_published_is_what_is_loaded(store: Store) -> None:
    version = publish(store)
    promote(store, version)
    champion = load_champion("job", store.url)
    assert champion.manifest.version == champion.promotion.version == version
    assert set(champion.predict(torch.randn(20, 4))) <= {"a", "b", "c"}
    assert champion.outputs(torch.randn(5, 4)).shape == (5, 3)


def test_publishing_twice_is_harmless(store: Store) -> None:
    assert publish(store) == publish(store) != publish(store, seed=1)


def test_a_version_without_a_promotion_is_no_champion(store: Store) -> None:
    publish(store)
    assert read_champion(store, "job", CPU) is None
    with pytest.raises(StoreError, match="job 'job' has no champion in file://"):
        load_champion("job", store.url)


def test_the_highest_number_is_champion_beyond_nine(store: Store) -> None:
    versions = [publish(store, seed) for seed in range(2)]
    for number in range(11):
        promote(store, versions[number % 2], judged=number, run=f"run {number}")
    latest = latest_promotion(store, "job")
    assert latest is not None
    assert (latest.number, latest.version) == (11, versions[0])


def test_a_retry_finds_its_own_entry(store: Store) -> None:
    version = publish(store)
    first = promote(store, version)
    again = append_promotion(
        store, "job", version=version, judged=0, run="run", reason="better", now=NOW.replace(hour=3)
    )
    assert again == first
    assert len(store.keys("models/job/promotions/")) == 1


def test_a_stale_judgement_is_refused(store: Store) -> None:
    old, new = publish(store), publish(store, seed=1)
    promote(store, old, run="theirs")
    with pytest.raises(StaleJudgement, match="promotion 1 made"):
        promote(store, new, judged=0, run="ours")


def test_two_promoters_cannot_both_win(store: Store) -> None:
    version = publish(store)

    def try_to(run: int) -> bool:
        try:
            promote(store, version, run=f"run {run}")
        except StaleJudgement:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(try_to, range(8))) == 1


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "preprocessing.safetensors"])
def test_a_missing_or_altered_file_is_damage(store: Store, name: str) -> None:
    version = publish(store)
    promote(store, version)
    path = file_of(store, version, name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedVersion, match=f"version {version} of job job .* is damaged: {name} was altered"):
        read_champion(store, "job", CPU)
    path.unlink()
    with pytest.raises(DamagedVersion, match=f"{name} is missing"):
        read_champion(store, "job", CPU)


def test_a_pickle_is_never_loaded(store: Store, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (marker,))

    version = publish(store)
    promote(store, version)
    file_of(store, version, "model.safetensors").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(DamagedVersion):
        read_champion(store, "job", CPU)
    assert not marker.exists()


def test_an_entry_that_is_no_promotion_is_damage(store: Store) -> None:
    store.create("models/job/promotions/000001.json", b"{}")
    with pytest.raises(DamagedVersion, match=r"000001\.json is no promotion"):
        read_champion(store, "job", CPU)


def test_an_entry_under_another_number_is_damage(store: Store) -> None:
    entry = promote(store, publish(store))
    store.create("models/job/promotions/000002.json", entry.model_dump_json().encode())
    with pytest.raises(DamagedVersion, match="says that it is promotion 1"):
        read_champion(store, "job", CPU)
