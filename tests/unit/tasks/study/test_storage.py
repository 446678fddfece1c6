"""Where studies lie: several writers, torn lines, killed holders, a database that is away."""

import fcntl
import inspect
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from tenacity import stop_after_delay

from tasks.study import storage
from tasks.study.storage import (
    CALLED_BY_THE_CACHE,
    STORAGE_IS_AWAY,
    ClaimLost,
    StudiesUnavailable,
    check_database,
    one_claims,
    storage_of,
    study_names,
)
from tests.servers import PostgresServer, wait_for

NAME = "small-20261123-020000"


def open_study(studies: Path | str, name: str = NAME) -> optuna.Study:
    return optuna.create_study(study_name=name, storage=storage_of(studies, "small", name), load_if_exists=True)


@contextmanager
def starts_when_missed(postgres: PostgresServer, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The database starts as soon as somebody says that it cannot be used."""

    def start() -> None:
        wait_for(lambda: "the studies cannot be used" in caplog.text, 60, "the database to be missed")
        postgres.start()

    caplog.clear()
    starting = threading.Thread(target=start)
    starting.start()
    try:
        yield
    finally:
        starting.join()


def ask_and_tell(studies: Path | str, count: int, start: Barrier) -> None:
    study = open_study(studies)
    for _ in range(count):
        start.wait(120)
        with one_claims(studies, "small", NAME):
            trial = study.ask()
            taken = {other.user_attrs.get("place") for other in study.get_trials(deepcopy=False)}
            time.sleep(0.02)  # in which the other looks too, unless it is kept from it
            trial.set_user_attr("place", next(place for place in range(1000) if place not in taken))
        study.tell(trial, trial.suggest_float("x", 0, 1))


@pytest.mark.process
@pytest.mark.parametrize("kind", ["journal", "database"])
def test_several_processes_ask_and_tell_and_none_takes_anothers_place(
    kind: str, tmp_path: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    studies = tmp_path if kind == "journal" else postgres.url
    study = open_study(studies)
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    other = context.Process(target=ask_and_tell, args=(studies, 10, start))
    other.start()
    ask_and_tell(studies, 10, start)
    other.join(120)
    assert other.exitcode == 0
    trials = study.get_trials()
    assert sorted(trial.user_attrs["place"] for trial in trials) == list(range(20))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert study_names(studies, "small") == [NAME]
    assert study_names(studies, "smal") == []


@pytest.mark.process
def test_a_killed_writer_keeps_nobody_waiting(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    journal = tmp_path / f"small/{NAME}.journal"
    ready = tmp_path / "ready"
    writer = multiprocessing.get_context("spawn").Process(target=hold_for_ever, args=(journal, ready))
    writer.start()
    wait_for(lambda: ready.exists() or not writer.is_alive(), 60, "the writer to hold the lock")
    assert ready.exists()
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(10)
    began = time.monotonic()
    study.ask()
    assert time.monotonic() - began < 25  # Optuna's own lock waits for 30 s


def hold_for_ever(journal: Path, ready: Path) -> None:
    file = journal.open("rb+")
    fcntl.flock(file, fcntl.LOCK_EX)
    ready.touch()
    time.sleep(60)


@pytest.mark.parametrize("whole", [0, 3])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, whole: int) -> None:
    study = open_study(tmp_path)
    for _ in range(whole):
        study.ask()
    journal = tmp_path / f"small/{NAME}.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker_')
    open_study(tmp_path).ask()
    assert len(open_study(tmp_path).trials) == whole + 1
    assert journal.read_bytes().endswith(b"}\n")


def test_a_result_is_on_the_disk_when_it_is_told_and_nothing_before_it_waits_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(tmp_path)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    trial = study.ask()
    trial.set_user_attr("place", 0)
    trial.report(trial.suggest_float("x", 0, 1), 1)
    assert synced == []
    study.tell(trial, 1.0)
    assert len(synced) == 1


@pytest.mark.process
def test_a_database_that_is_restarted_is_waited_for_but_by_a_report(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    study = open_study(postgres.url, "restarted-20261123-020000")
    trial = study.ask()
    postgres.stop()
    with pytest.raises(STORAGE_IS_AWAY):
        trial.report(0.5, 1)
    for waits in (lambda: study.tell(trial, 0.5), study.get_trials, study.ask):
        with starts_when_missed(postgres, caplog):
            waits()
        postgres.stop()
    postgres.start()
    assert [trial.values for trial in study.get_trials()] == [[0.5], None]


@pytest.mark.process
def test_a_database_that_starts_after_the_night_is_waited_for(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    late = f"{postgres.url}?application_name=late"
    check_database(late)
    postgres.stop()
    with pytest.raises(StudiesUnavailable, match="does not answer"):
        check_database(late)
    with starts_when_missed(postgres, caplog):
        study = open_study(late, "late-20261123-020000")
    assert study.trials == []


@pytest.mark.process
def test_a_lock_that_the_database_freed_is_noticed_and_whoever_waits_for_it_goes_on_waiting(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    open_study(postgres.url)
    entered = threading.Event()

    def claim() -> None:
        with one_claims(postgres.url, "small", NAME):
            entered.set()

    def restart() -> None:
        with one_claims(postgres.url, "small", NAME):
            waiting.start()
            assert not entered.wait(1)
            postgres.stop()
            postgres.start()

    waiting = threading.Thread(target=claim)
    with pytest.raises(ClaimLost):
        restart()
    waiting.join(60)
    assert entered.is_set()
    claim()


def test_what_the_cache_asks_of_a_database_is_waited_for_too() -> None:
    source = inspect.getsource(optuna.storages._cached_storage)
    asked = set(re.findall(r"self\._backend\.(\w+)\(", source))
    heartbeat = {
        "_get_stale_trial_ids",
        "get_heartbeat_interval",
        "get_heartbeat_stale_trial_callback",
        "record_heartbeat",
    }
    assert asked - heartbeat <= BaseStorage.__abstractmethods__ | CALLED_BY_THE_CACHE


def test_a_database_that_stays_away_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage._patiently, "stop", stop_after_delay(1))
    with pytest.raises(STORAGE_IS_AWAY) as away:
        storage_of("postgresql://nightly:secret@127.0.0.1:9/postgres", "small", NAME)
    sentence = str(StudiesUnavailable.after(away.value))
    assert "could not be used for 600 s" in sentence
    assert "secret" not in sentence
