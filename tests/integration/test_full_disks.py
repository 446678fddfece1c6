"""A disk that fills up under the studies or under the artifact store: what is there stays whole, and a night goes on
when there is room again."""

import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial

from infra.store.opening import open_store
from infra.store.protocol import StoreUnavailable
from tasks.data.prepared import Prepared
from tasks.registry.champion import read_champion
from tasks.registry.log import history
from tasks.search.tune import tune
from tasks.study.storage import Studies, one_claims
from tasks.study.studies import finished_trials, load_study, open_study
from tasks.trainer.local import LocalTrainer
from tests.conftest import CPU, fill, make_job, require, small_disk
from tests.servers import PostgresServer, postgres_programs, wait_for
from tests.unit.tasks.registry.test_versions import promote, publish
from tests.unit.tasks.search.test_tune import NOW

TRIALS = 20


@contextmanager
def studies_on(kind: str, disk: Path) -> Iterator[Studies]:
    if kind == "journal":
        yield disk / "studies"
        return
    if postgres_programs() is None:
        require("PostgreSQL's server is not installed (Debian: postgresql)")
    server = PostgresServer(disk)
    try:
        server.start()
        yield server.url
    finally:
        server.stop()


@pytest.mark.parametrize(("kind", "size"), [("journal", "2m"), ("postgresql", "80m")])
def test_a_night_waits_for_room_for_its_studies_and_loses_no_trial(
    kind: str,
    size: str,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PGPASSWORD", PostgresServer.password)
    reachable = Path(tempfile.gettempdir()) / f"nightly-disk-{uuid.uuid4().hex}"  # by PostgreSQL's user
    space = {"epochs": 3, "batch_size": 256, "width": [16, 32], "depth": 1}
    job = make_job(search={"pruner": "none", "space": space}, budget={"trials": TRIALS})
    with small_disk(reachable, size) as disk, studies_on(kind, disk) as studies:
        told = 0

        def make_room(filler: Path) -> None:
            wait_for(lambda: "the studies cannot be used" in caplog.text, 120, "the night to find no room")
            filler.unlink()

        def on_trial(_: FrozenTrial) -> None:
            nonlocal told
            told += 1
            if told == 2:
                threading.Thread(target=make_room, args=(fill(disk),)).start()

        study = open_study(job, prepared.snapshot.fingerprint, studies, NOW)
        tuned = tune(
            study, job, LocalTrainer(job, prepared), tmp_path / "checkpoints", on_trial=on_trial,
            # Or who watches the workers takes a trial that waits for room as it is asked for to be nobody's.
            claims=lambda: one_claims(studies, job.name, study.study_name),
        )  # fmt: skip
        assert "No space left on device" in caplog.text
        assert (tuned.complete, tuned.failed, told) == (TRIALS, 0, TRIALS)
        read_again = finished_trials(load_study(study.study_name, job.name, studies))
        assert [trial.user_attrs["number"] for trial in read_again] == list(range(TRIALS))
        assert len(read_again) == len(study.trials)


def test_a_full_store_shows_no_part_of_a_version_and_keeps_its_champion(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        store = open_store((disk / "store").as_uri())
        first = promote(store, publish(store))
        before = files_below(disk)
        filler = fill(disk)
        with pytest.raises(StoreUnavailable, match="No space left on device"):
            publish(store, seed=1)
        assert files_below(disk) == before
        champion = read_champion(store, "job", CPU)
        assert champion is not None
        assert champion.promotion == first
        filler.unlink()
        second = promote(store, publish(store, seed=1), judged=1)
        assert history(store, "job") == [second, first]


def files_below(disk: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in disk.rglob("*") if file.is_file() and file.name != "filler"}
