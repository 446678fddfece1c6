"""Versions and the promotion log: what was published is what is loaded, and two promoters cannot both win."""

import hashlib
import json
import os
import pickle
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save

from infra.store.opening import open_store
from infra.store.protocol import Store, StoreError
from models.families.family import FAMILIES
from models.rows.shapes import DataShape
from tasks.registry.champion import load_champion, read_champion
from tasks.registry.log import (
    DamagedLog,
    Promotion,
    StaleJudgement,
    append_promotion,
    history,
    latest_promotion,
    taken_back,
)
from tasks.registry.rollback import roll_back
from tasks.registry.versions import (
    DamagedVersion,
    FileName,
    Lineage,
    Manifest,
    choose_version,
    collect_garbage,
    describe_file,
    publish_version,
    pull_version,
    read_manifest,
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
        "mlflow/MLmodel": b"a file in a folder",
    }
    lineage = Lineage(
        snapshot="f", source="s", study="n", trial=seed, seed=seed, device="cpu", mlflow_run_id="r",
        prefect_flow_run_id=None, git_commit=None, python="3", packages={},
    )  # fmt: skip
    manifest = Manifest(
        job="job", model="mlp", hyperparameters=HYPERPARAMETERS, features=(4,), classes=("a", "b", "c"),
        metrics={"test": {"accuracy": 0.5}}, lineage=lineage, files={},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)
        described = {file: describe_file(folder / file) for file in files}
        return publish_version(store, manifest.model_copy(update={"files": described}), folder)


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
    assert len(store.created("models/job/promotions/")) == 1


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
    with pytest.raises(DamagedLog, match=r"000001\.json is no promotion"):
        read_champion(store, "job", CPU)


def test_an_entry_under_another_number_is_damage(store: Store) -> None:
    entry = promote(store, publish(store))
    store.create("models/job/promotions/000002.json", entry.model_dump_json().encode())
    with pytest.raises(DamagedLog, match="says that it is promotion 1"):
        read_champion(store, "job", CPU)


def test_a_file_that_was_added_is_damage(store: Store) -> None:
    version = publish(store)
    promote(store, version)
    file_of(store, version, "extra.safetensors").write_bytes(b"")
    with pytest.raises(DamagedVersion, match=r"extra\.safetensors was added to it"):
        read_champion(store, "job", CPU)


def test_a_manifest_of_a_newer_format_says_upgrade(store: Store) -> None:
    content = b'{"format": 6, "something": "new"}'
    version = hashlib.sha256(content).hexdigest()[:16]
    store.create(f"models/job/versions/{version}/manifest.json", content)
    with pytest.raises(StoreError, match=r"newer Nightly Tuner \(format 6, this one reads up to 5\); upgrade"):
        read_manifest(store, "job", version)


@pytest.mark.parametrize("content", [b"[]", b"null", b'{"format": "x"}', b"\xff", b'{"format": 5}'])
def test_a_manifest_that_is_none_is_damage(store: Store, content: bytes) -> None:
    version = hashlib.sha256(content).hexdigest()[:16]
    store.create(f"models/job/versions/{version}/manifest.json", content)
    with pytest.raises(DamagedVersion, match=r"manifest\.json is not of format 5"):
        read_manifest(store, "job", version)


@given(st.text(min_size=1, max_size=30) | st.from_regex(r"\A[a-z./\\]{1,20}(pkl|pt|so|safetensors)\Z"))
@settings(max_examples=300)
def test_a_file_name_stays_below_its_version_and_is_of_a_harmless_kind(name: str) -> None:
    try:
        TypeAdapter(FileName).validate_python(name)
    except ValidationError:
        return
    assert ".." not in name
    assert not name.startswith(("/", "."))
    assert "\\" not in name
    assert name.endswith(("MLmodel", ".safetensors", ".json", ".md", ".onnx", ".py", ".txt", ".yaml"))


def test_a_manifest_of_the_first_format_is_still_read(store: Store) -> None:
    """As the first release wrote it: without members, intervals, gate, seeds and fractions."""
    with tempfile.TemporaryDirectory() as name:
        first = publish(store)
        manifest = read_manifest(store, "job", first)
        content = json.loads(manifest.to_bytes()) | {"format": 1}
        old = json.dumps(content, indent=2, sort_keys=True).encode()
        version = hashlib.sha256(old).hexdigest()[:16]
        for file in manifest.files:
            path = Path(name) / "file"
            path.write_bytes(store.read(f"models/job/versions/{first}/{file}"))
            store.upload(f"models/job/versions/{version}/{file}", path)
    store.create(f"models/job/versions/{version}/manifest.json", old)
    promote(store, version)
    champion = load_champion("job", store.url)
    assert champion.manifest.version == version
    assert champion.manifest.members == 1


def test_history_is_newest_first_and_misses_no_entry(store: Store) -> None:
    versions = [publish(store, seed) for seed in range(3)]
    for number, version in enumerate(versions):
        promote(store, version, judged=number, run=f"run {number}")
    assert [entry.number for entry in history(store, "job")] == [3, 2, 1]
    store.delete("models/job/promotions/000002.json")
    with pytest.raises(DamagedLog, match="must have every number from 1 to 3, found 2 entries"):
        history(store, "job")


def test_an_entry_that_was_rewritten_is_found_out(store: Store) -> None:
    versions = [publish(store, seed) for seed in range(2)]
    for number in range(3):
        promote(store, versions[number % 2], judged=number, run=f"run {number}")
    path = Path(store.url.removeprefix("file://")) / "models/job/promotions/000002.json"
    path.write_bytes(path.read_bytes().replace(b"better", b"bettor"))
    with pytest.raises(DamagedLog, match=r"promotion 2 of job in .* was altered after promotion 3 was made"):
        history(store, "job")


def test_a_pulled_version_is_whole(store: Store, tmp_path: Path) -> None:
    version = publish(store)
    promote(store, version)
    manifest = pull_version(store, "job", version, tmp_path / "pulled")
    pulled = tmp_path / "pulled"
    assert {path.relative_to(pulled).as_posix() for path in pulled.rglob("*") if path.is_file()} == {
        *manifest.files, "manifest.json",
    }  # fmt: skip
    assert all(describe_file(pulled / name) == file for name, file in manifest.files.items())
    with pytest.raises(StoreError, match="exists already; name a folder that does not"):
        pull_version(store, "job", version, pulled)


def test_a_damaged_version_is_not_pulled(store: Store, tmp_path: Path) -> None:
    version = publish(store)
    file_of(store, version, "model.safetensors").write_bytes(b"other")
    with pytest.raises(DamagedVersion, match=r"model\.safetensors was altered"):
        pull_version(store, "job", version, tmp_path / "pulled")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_an_unknown_version_lists_the_known_ones(store: Store) -> None:
    with pytest.raises(StoreError, match="job 'job' has no champion"):
        choose_version(store, "job", None)
    version = publish(store)
    promote(store, version)
    assert choose_version(store, "job", None) == version
    with pytest.raises(StoreError, match=f"never promoted a version 'nope'; known are {version}"):
        choose_version(store, "job", "nope")


def roll(store: Store, to: str | None = None, reason: str = "worse") -> Promotion:
    return roll_back(store, "job", to=to, reason=reason, now=NOW)[0]


def test_a_rollback_puts_back_what_the_champion_replaced(store: Store) -> None:
    versions = [publish(store, seed) for seed in range(3)]
    for number, version in enumerate(versions):
        promote(store, version, judged=number, run=f"run {number}")
    entry = roll(store)
    assert (entry.number, entry.version, entry.kind, entry.reason) == (4, versions[1], "rollback", "worse")
    champion = read_champion(store, "job", CPU)
    assert champion is not None
    assert [manifest.version for manifest in champion.taken_back] == [versions[2]]
    again = roll(store)
    assert again.version == versions[0]
    assert list(taken_back(store, "job", again)) == [versions[1], versions[2]]
    with pytest.raises(StoreError, match=f"has no champion before {versions[0]}"):
        roll(store)
    assert roll(store, to=versions[2]).number == 6
    promote(store, publish(store, 4), judged=6, run="later")
    after = read_champion(store, "job", CPU)
    assert after is not None
    assert after.taken_back == ()


def test_a_rollback_that_cannot_be_changes_nothing(store: Store) -> None:
    old, new = publish(store), publish(store, seed=1)
    promote(store, old)
    promote(store, new, judged=1, run="run 2")
    for to, reason, says in (
        (None, " ", "a rollback needs a reason"),
        (new, "x", "is the champion of job already"),
        ("nope", "x", "never promoted a version 'nope'"),
    ):
        with pytest.raises(StoreError, match=says):
            roll(store, to=to, reason=reason)
    file_of(store, old, "model.safetensors").unlink()
    with pytest.raises(DamagedVersion, match=r"model\.safetensors is missing"):
        roll(store)
    assert len(history(store, "job")) == 2


def test_a_rollback_and_a_promotion_at_once_have_an_order(store: Store) -> None:
    versions = [publish(store, seed) for seed in range(3)]
    promote(store, versions[0])
    promote(store, versions[1], judged=1, run="run 2")

    def act(number: int) -> bool:
        try:
            if number % 2:
                roll(store)
            else:
                promote(store, versions[2], judged=2, run=f"run {number}")
        except (StaleJudgement, StoreError):
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(act, range(8)))
    entries = history(store, "job")
    assert sum(won) == len(entries) - 2 >= 1
    latest = latest_promotion(store, "job")
    assert latest == entries[0]


def age(store: Store, prefix: str, days: float) -> None:
    moment = (NOW - timedelta(days=days)).timestamp()
    for path in Path(store.url.removeprefix("file://")).rglob("*"):
        if path.is_file() and prefix in path.as_posix():
            os.utime(path, (moment, moment))


def test_garbage_is_what_no_entry_names_and_is_older_than_a_day(store: Store) -> None:
    named, old, young = (publish(store, seed) for seed in range(3))
    promote(store, named)
    for version, days in ((named, 9.0), (old, 1.1), (young, 0.9)):
        age(store, f"/{version}/", days)
    left = Path(store.url.removeprefix("file://")) / "models/job/versions/.killed.partial"
    left.write_bytes(b"half")
    age(store, "killed", 2)
    gone = collect_garbage(store, NOW)
    assert {key.split("/")[3] for key in gone} == {old}
    assert gone[0].endswith("manifest.json")
    assert not left.exists()
    assert read_manifest(store, "job", young).version == young
    assert read_champion(store, "job", CPU) is not None
    assert collect_garbage(store, NOW) == []


def test_garbage_collection_in_a_loop_never_harms_a_promotion(store: Store) -> None:
    """However often it runs beside promotions, with whatever old orphans around."""
    orphans = [publish(store, 100 + seed) for seed in range(3)]
    for orphan in orphans:
        age(store, f"/{orphan}/", 5)
    stop = threading.Event()

    def collect() -> int:
        runs = 0
        while not stop.is_set():
            collect_garbage(store, datetime.now(UTC))
            runs += 1
        return runs

    with ThreadPoolExecutor(1) as thread:
        runs = thread.submit(collect)
        for number in range(30):
            promote(store, publish(store, number), judged=number, run=f"run {number}")
            assert read_champion(store, "job", CPU) is not None
        stop.set()
        assert runs.result() > 1
    for entry in history(store, "job"):
        read_manifest(store, "job", entry.version)


def test_a_log_that_cannot_be_read_keeps_everything(store: Store) -> None:
    version = publish(store)
    age(store, version, 5)
    store.create("models/job/promotions/000001.json", b"{}")
    with pytest.raises(DamagedLog):
        collect_garbage(store, NOW)
    assert read_manifest(store, "job", version).version == version
