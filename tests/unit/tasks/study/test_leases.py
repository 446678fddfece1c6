"""Workers that die, are silent, come back, break, or are not wanted any more; and nights that take over from others."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from models.fused.train import OnEpoch
from models.training.terms import Epoch, Training
from tasks.data.prepared import Prepared
from tasks.data.snapshots import Snapshot
from tasks.job import TuningJob
from tasks.search.candidate import trained_seconds
from tasks.search.checkpoints import TrialCheckpoints
from tasks.search.tune import seconds_to_search, tune
from tasks.search.wave import run_wave
from tasks.search.worker import work
from tasks.study import leases
from tasks.study.leases import (
    BEAT_SECONDS,
    LEASE_SECONDS,
    NIGHT_PATIENCE_SECONDS,
    Lease,
    NightSign,
    NightSuperseded,
    Watch,
    check_still_ours,
    lost_flow_runs,
    mishaps_of,
    settle,
    workers_of,
)
from tasks.study.storage import ClaimLost, one_claims
from tasks.study.studies import (
    AFTER_SEARCH_SECONDS,
    FINISH_BY,
    FLOW_RUN,
    SEARCH_ENDED_BY,
    STOPPED,
    WORKER,
    Asking,
    finished_trials,
    is_interrupted,
    load_study,
    open_study,
)
from tasks.trainer.local import Ended, Failed, LocalTrainer
from tests.conftest import CPU, make_job
from tests.servers import wait_for

NOW = datetime(2026, 11, 23, 2, 0, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def job() -> TuningJob:
    return make_job(search={"pruner": "none", "space": {"epochs": 1, "batch_size": 256}}, budget={"trials": 6})


@pytest.fixture
def study(job: TuningJob, prepared: Prepared, tmp_path: Path) -> optuna.Study:
    return open_study(job, prepared.snapshot.fingerprint, tmp_path / "studies", NOW)


def elsewhere(study: optuna.Study, name: str, beats: int, **record: object) -> None:
    """What a worker of another machine says."""
    content = {"host": "another", "pid": 1, "process_began": 0.0, "device": "cuda:0", "flow_run": name, "night": False}
    study.set_user_attr(f"worker {name}", {**content, "beats": beats, **record})


def states(study: optuna.Study) -> list[TrialState]:
    return [trial.state for trial in study.trials]


def test_a_silent_worker_is_declared_dead_after_its_lease_and_its_trials_are_asked_for_again(
    job: TuningJob, study: optuna.Study
) -> None:
    clock = Clock()
    watch = Watch(study, nullcontext, clock)
    elsewhere(study, "silent", 3)
    elsewhere(study, "lively", 3)
    taken, kept = Asking(study, job).ask("silent"), Asking(study, job).ask("lively")
    for beats in range(4, 4 + int(LEASE_SECONDS / BEAT_SECONDS)):
        watch.look()
        assert states(study) == [TrialState.RUNNING] * 2
        clock.now += BEAT_SECONDS
        elsewhere(study, "lively", beats)
    clock.now += 1
    assert list(watch.look()) == ["lively"]
    assert states(study) == [TrialState.FAIL, TrialState.RUNNING]
    assert is_interrupted(study.trials[taken.number])
    again = Asking(study, job).ask("lively")
    assert again.user_attrs["number"] == taken.user_attrs["number"] != kept.user_attrs["number"]
    assert mishaps_of(study.user_attrs) == ("cuda:0 of another has not been heard of for 30 s",)
    assert lost_flow_runs(study.user_attrs) == {"silent"}
    before = study.trials
    assert list(watch.look()) == ["lively"]
    assert study.trials == before


def test_nobody_is_declared_dead_for_an_outage_of_the_storage(job: TuningJob, study: optuna.Study) -> None:
    clock = Clock()
    watch = Watch(study, nullcontext, clock)
    elsewhere(study, "worker", 3)
    Asking(study, job).ask("worker")
    watch.look()
    clock.now += 600  # in which nobody could look, nor beat
    assert list(watch.look()) == ["worker"]
    clock.now += BEAT_SECONDS
    elsewhere(study, "worker", 4)
    assert list(watch.look()) == ["worker"]
    assert states(study) == [TrialState.RUNNING]


def test_a_dead_process_of_this_machine_is_seen_at_once(job: TuningJob, study: optuna.Study) -> None:
    with Lease(study, "cpu", "run") as lease:
        alive = Asking(study, job).ask(lease.name)
        record = study.user_attrs[f"worker {lease.name}"]
        study.set_user_attr("worker dead", {**record, "process_began": record["process_began"] - 1})
        Asking(study, job).ask("dead")
        Asking(study, job).ask()  # whose worker died before it could say its name
        assert list(settle(study, nullcontext)) == [lease.name]
        assert states(study) == [TrialState.RUNNING, TrialState.FAIL, TrialState.FAIL]
    assert workers_of(study.user_attrs) == {}
    Watch(study, nullcontext).look()
    assert study.trials[alive.number].state == TrialState.FAIL


def test_a_worker_gives_signs_of_life_and_is_told_to_stop_or_to_cut_off(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.05)

    def until(condition: Callable[[], bool], tries: int = 1200) -> bool:
        for _ in range(tries):
            if condition():
                return True
            threading.Event().wait(0.05)
        return False

    with Lease(study, "cpu", "run") as lease:
        assert until(lambda: study.user_attrs[f"worker {lease.name}"]["beats"] > 1)
        assert not lease.must_stop
        study.set_user_attr(SEARCH_ENDED_BY, FINISH_BY)
        assert until(lambda: lease.must_cut_off)
        study.set_user_attr(SEARCH_ENDED_BY, STOPPED)
        assert until(lambda: lease.must_stop)
    study.set_user_attr(SEARCH_ENDED_BY, "")
    study.set_user_attr(FLOW_RUN, "first")
    with Lease(study, "cpu", "first", is_night=True) as lease:
        assert not until(lambda: lease.must_stop, 10)
        study.set_user_attr(FLOW_RUN, "second")
        assert until(lambda: lease.must_stop)


class Taken(LocalTrainer):
    """Is declared dead in the middle of its first wave."""

    study: optuna.Study
    waves = 0

    def train(self, trainings: Sequence[Training], on_epoch: OnEpoch) -> Iterator[tuple[int, Ended]]:
        self.waves += 1
        if self.waves == 1:
            for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
                self.study.tell(trial.number, state=TrialState.FAIL)
        yield from super().train(trainings, on_epoch)


def test_whoever_was_declared_dead_counts_for_nothing_and_begins_anew(
    job: TuningJob, study: optuna.Study, prepared: Prepared, tmp_path: Path
) -> None:
    trainer = Taken(job, prepared)
    trainer.study = study
    told: list[int] = []
    tuned = tune(study, job, trainer, tmp_path, on_trial=lambda trial: told.append(trial.number))
    assert tuned.complete == 6
    assert [trial.number for trial in finished_trials(study)] == told
    assert sum(is_interrupted(trial) for trial in study.trials) == 1
    assert len({trial.user_attrs[WORKER] for trial in study.trials}) == 2


def test_two_workers_share_a_budget_and_each_trial_counts_once(
    job: TuningJob, study: optuna.Study, prepared: Prepared, tmp_path: Path
) -> None:
    job = make_job(search={"pruner": "none", "space": {"epochs": 1, "batch_size": 256}}, budget={"trials": 24})
    helped: list[int] = []
    lock = threading.Lock()

    def help_out() -> None:
        other = optuna.load_study(study_name=study.study_name, storage=study._storage)
        with Lease(other, "cpu", "worker") as lease:
            trainer = LocalTrainer(job, prepared)
            helped.append(work(other, job, trainer, tmp_path, lease, lambda: lock, lambda _: None))

    study.set_user_attr(SEARCH_ENDED_BY, "")
    thread = threading.Thread(target=help_out)
    thread.start()
    tuned = tune(study, job, LocalTrainer(job, prepared), tmp_path, claims=lambda: lock)
    thread.join(60)
    assert tuned.complete == 24
    assert len(study.trials) == 24
    assert sorted(trial.user_attrs["number"] for trial in study.trials) == list(range(24))
    assert len(helped) == 1


class Slow(LocalTrainer):
    """Takes its time over each epoch, and says that it has begun."""

    begun: Path

    def train(self, trainings: Sequence[Training], on_epoch: OnEpoch) -> Iterator[tuple[int, Ended]]:
        def slowly(epochs: Mapping[int, Epoch]) -> Collection[int]:
            self.begun.touch()
            time.sleep(0.3)
            return on_epoch(epochs)

        return super().train(trainings, slowly)


def work_with_a_short_lease(studies: Path, name: str, job: TuningJob, snapshot: Snapshot, folder: Path) -> None:
    """A worker, in a process of its own."""
    leases.BEAT_SECONDS, leases.LEASE_SECONDS = 0.5, 5.0
    study = load_study(name, job.name, studies)
    trainer = Slow(job, Prepared.load(snapshot, CPU))
    trainer.begun = folder / "begun"
    with Lease(study, "stopped", "worker") as lease:
        work(study, job, trainer, folder, lease, lambda: one_claims(studies, job.name, name), lambda _: None)


@pytest.mark.process
def test_a_worker_that_stood_still_for_a_lease_counts_for_nothing_and_begins_anew(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(search={"pruner": "none", "space": {"epochs": 4, "batch_size": 256}}, budget={"trials": 120})
    studies = tmp_path / "studies"
    study = open_study(job, prepared.snapshot.fingerprint, studies, NOW)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.5)
    monkeypatch.setattr(leases, "LEASE_SECONDS", 5.0)
    study.set_user_attr(SEARCH_ENDED_BY, "")
    arguments = (studies, study.study_name, job, prepared.snapshot, tmp_path)
    other = multiprocessing.get_context("spawn").Process(target=work_with_a_short_lease, args=arguments)
    other.start()
    assert other.pid is not None
    begun = tmp_path / "begun"

    def go_on(stopped: int) -> None:
        seen_from_here = load_study(study.study_name, job.name, studies)
        wait_for(lambda: mishaps_of(seen_from_here.user_attrs), 120, "the worker to be declared dead")
        os.kill(stopped, signal.SIGCONT)

    try:
        wait_for(begun.exists, 60, "the worker to train")
        os.kill(other.pid, signal.SIGSTOP)
        threading.Thread(target=go_on, args=(other.pid,)).start()
        trainer = Slow(job, prepared)
        trainer.begun = tmp_path / "night"
        tuned = tune(study, job, trainer, tmp_path, claims=lambda: one_claims(studies, job.name, study.study_name))
        other.join(60)
    finally:
        other.kill()
    assert other.exitcode == 0
    assert tuned.complete == 120
    assert sorted(trial.user_attrs["number"] for trial in finished_trials(study)) == list(range(120))
    attributes = study.user_attrs
    names = [name.removeprefix("worker ") for name in attributes if name.startswith("worker ")]
    stood_still, *later = [name for name in names if attributes[f"worker {name}"]["pid"] == other.pid]
    of_it = [trial for trial in study.trials if trial.user_attrs.get(WORKER) == stood_still]
    assert of_it
    assert all(is_interrupted(trial) for trial in of_it)
    assert any("stopped of" in mishap for mishap in tuned.mishaps)
    assert any(trial.user_attrs[WORKER] in later for trial in finished_trials(study))


def test_what_was_asked_for_under_a_lost_claim_is_given_back_and_counts_once(
    study: optuna.Study, prepared: Prepared, tmp_path: Path
) -> None:
    space = {"epochs": 1, "batch_size": 256, "depth": [1, 2], "width": 16}
    limits = {"max_parameters": 1300}  # which two layers break
    job = make_job(search={"pruner": "none", "space": space, **limits}, budget={"trials": 24})
    claims_made = 0

    @contextmanager
    def claims() -> Iterator[None]:
        nonlocal claims_made
        claims_made += 1
        yield
        if claims_made in (1, 2, 5):  # of which the second is the one to free what the first asked for
            raise ClaimLost("the database was restarted")

    tuned = tune(study, job, LocalTrainer(job, prepared), tmp_path, claims=claims)
    finished = finished_trials(study)
    assert sorted(trial.user_attrs["number"] for trial in finished) == list(range(24))
    assert tuned.complete + tuned.pruned == 24
    assert tuned.pruned > 0
    interrupted = [trial for trial in study.trials if is_interrupted(trial)]
    assert len(interrupted) == len(study.trials) - 24 > 1
    assert all(trial.user_attrs["number"] is None for trial in interrupted)
    assert all(trial.user_attrs["curve"] == [] for trial in interrupted)


def test_a_trial_that_ends_while_another_is_asked_for_is_not_asked_for_again(
    job: TuningJob, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way = [Asking(study, job).ask("another") for _ in range(5)]
    look = study.get_trials

    def end_one_after_each_look(*arguments: Any, **options: Any) -> list[FrozenTrial]:
        found = look(*arguments, **options)
        if under_way:
            study.tell(under_way.pop(), 0.5)
        return found

    monkeypatch.setattr(study, "get_trials", end_one_after_each_look)
    assert not Asking(study, job).is_budget_claimed
    assert Asking(study, job).ask("worker").user_attrs["number"] == 5
    assert Asking(study, job).is_budget_claimed


class Broken(LocalTrainer):
    def train(self, trainings: Sequence[Training], on_epoch: OnEpoch) -> Iterator[tuple[int, Ended]]:
        del on_epoch
        yield from ((place, Failed("OSError: no space left on device", "")) for place in range(len(trainings)))


@pytest.mark.parametrize("others_train", [True, False])
def test_a_broken_device_is_taken_out_where_others_train(
    study: optuna.Study, prepared: Prepared, tmp_path: Path, others_train: bool
) -> None:
    space = {"epochs": 1, "batch_size": 256, "depth": 1, "width": 16}
    job = make_job(search={"pruner": "none", "space": space}, budget={"trials": 8})
    study.set_user_attr(SEARCH_ENDED_BY, "")

    def on_trial(_: object) -> None:
        if others_train:
            lease = Lease(study, "cuda:1", None)
            lease.renew()
            kept = TrialCheckpoints(tmp_path, study.study_name)
            run_wave(study, job, LocalTrainer(job, prepared), kept, lease, nullcontext, lambda _: None, lambda: False)
        if len(finished_trials(study)) == 8:
            study.set_user_attr(SEARCH_ENDED_BY, "trials")

    with Lease(study, "cuda:0", None) as lease:
        told = work(study, job, Broken(job, prepared), tmp_path, lease, nullcontext, on_trial)
    taken_out = [sentence for sentence in mishaps_of(study.user_attrs) if "was taken out: 3 waves" in sentence]
    assert (told, len(taken_out)) == ((3, 1) if others_train else (8, 0))


def test_a_worker_leaves_when_its_night_is_gone(study: optuna.Study) -> None:
    clock = Clock()
    night = NightSign(study, clock)
    elsewhere(study, "night", 1, night=True)
    assert not night.is_gone()
    clock.now += NIGHT_PATIENCE_SECONDS - 1
    elsewhere(study, "night", 2, night=True)
    assert not night.is_gone()
    clock.now += NIGHT_PATIENCE_SECONDS + 1
    assert night.is_gone()
    elsewhere(study, "night", 3, night=True)
    assert not night.is_gone()
    study.set_user_attr(SEARCH_ENDED_BY, "trials")
    assert night.is_gone()


def test_a_night_whose_study_was_taken_up_by_another_stops(
    job: TuningJob, study: optuna.Study, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.05)
    study.set_user_attr(FLOW_RUN, "first")
    job = make_job(search={"pruner": "none", "space": {"epochs": 2000, "batch_size": 64}}, budget={"trials": 6})

    def taken_up() -> None:
        study.set_user_attr(FLOW_RUN, "second")

    timer = threading.Timer(1, taken_up)
    timer.start()
    with pytest.raises(NightSuperseded, match="the night second has taken up small-20261123-020000"):
        tune(study, job, LocalTrainer(job, prepared), tmp_path, flow_run_id="first")
    with pytest.raises(NightSuperseded):
        check_still_ours(study, "first")
    check_still_ours(study, "second")
    assert study.user_attrs[SEARCH_ENDED_BY] == ""


def test_a_search_that_must_be_done_cuts_off_what_is_under_way(
    study: optuna.Study, prepared: Prepared, tmp_path: Path
) -> None:
    space = {"epochs": 5000, "batch_size": 64, "width": 16, "depth": 1, "early_stopping_patience": 0}
    job = make_job(search={"pruner": "none", "space": space}, budget={"trials": 9})
    first = make_job(search={"pruner": "none", "space": space | {"epochs": 1}}, budget={"trials": 1})
    trainer = LocalTrainer(job, prepared)
    tune(study, first, LocalTrainer(first, prepared), tmp_path)
    tuned = tune(study, job, trainer, tmp_path, seconds_left=1)
    assert tuned.ended_by == FINISH_BY
    assert tuned.pruned > 0
    assert trained_seconds(study) < 20


def test_what_is_left_until_a_time_of_day_is_right_across_a_change_of_clocks(tmp_path: Path) -> None:
    """Berlin puts clocks forward on 2027-03-28 at 02:00, and back on 2027-10-31 at 03:00."""

    def left(now: datetime, finish_by: str = "06:00") -> float:
        schedule = {"timezone": "Europe/Berlin"}
        job = make_job(budget={"finish_by": finish_by}, schedule=schedule)
        return seconds_to_search(job, tmp_path, now) / 3600

    assert left(datetime(2026, 11, 23, 2, 0, tzinfo=UTC)) == pytest.approx(3 * 0.85)
    assert left(datetime(2027, 3, 28, 0, 0, tzinfo=UTC)) == pytest.approx(4 * 0.85)
    assert left(datetime(2027, 10, 31, 0, 0, tzinfo=UTC)) == pytest.approx(5 * 0.85)
    assert left(datetime(2026, 11, 23, 5, 30, tzinfo=UTC)) == pytest.approx(23.5 * 0.85)
    assert left(datetime(2027, 3, 27, 23, 0, tzinfo=UTC), "02:30") == pytest.approx(2.5 * 0.85)


def test_the_time_after_the_search_is_learned_from_the_last_night(study: optuna.Study, tmp_path: Path) -> None:
    study.set_user_attr(AFTER_SEARCH_SECONDS, 600.0)
    job = make_job(budget={"finish_by": "06:00"})
    assert seconds_to_search(job, tmp_path / "studies", datetime(2026, 11, 24, 5, 0, tzinfo=UTC)) == 3600 - 900
    assert seconds_to_search(job, tmp_path / "studies", datetime(2026, 11, 24, 5, 50, tzinfo=UTC)) == 0
    assert seconds_to_search(make_job(), tmp_path / "studies", NOW) == float("inf")
