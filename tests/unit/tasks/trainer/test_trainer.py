"""The processes that train: as exact as training here, mortal, blind to secrets, and gone with whoever started them."""

import functools
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import optuna
import psutil
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

import tasks.search.worker
import tasks.trainer.processes
from models.fused.train import OnEpoch, Stopped
from models.training.checkpoints import Checkpoint
from models.training.terms import Diverged, Epoch, Training
from tasks.data.prepared import Prepared
from tasks.job import TuningJob
from tasks.search.tune import tune
from tasks.search.worker import processes_for, trainer_of
from tasks.study.studies import FAILURE, finished_trials, is_interrupted, open_study
from tasks.tracking.trials import CURVE
from tasks.trainer.local import Ended, Failed, LocalTrainer, Scored, TrainerDied
from tasks.trainer.processes import TrainerProcesses, started_ahead, worthwhile_processes
from tasks.trainer.serving import NICENESS
from tests.conftest import CPU, fill, make_job, small_disk
from tests.servers import wait_for
from tests.unit.models.test_families import write_net
from tests.unit.tasks.search.test_tune import NOW

ODD_NET = """
import os, time
from torch import nn

class Net(nn.Module):
    @staticmethod
    def suggest(trial):
        return {"kind": trial.suggest_categorical("kind", ["aborts", "learns"])}

    def __init__(self, hyperparameters, shape):
        super().__init__()
        for name in ("AWS_SECRET_ACCESS_KEY", "NIGHTLY_WEBHOOK", "PGPASSWORD"):
            assert name not in os.environ, name
        self.kind = hyperparameters["kind"]
        self.layer = nn.Linear(64, shape.outputs)
        assert self.kind != "is not built"

    def forward(self, rows):
        if self.kind == "raises":
            raise LookupError("no such kind")
        if self.kind == "hangs":
            time.sleep(600)
        if self.kind == "aborts":
            os.abort()
        return self.layer(rows.flatten(1))
"""


def training_of(job: TuningJob, kind: str = "", seed: int = 0, **values: object) -> Training:
    own = {"own": {"kind": kind}} if kind else {}
    chosen = job.family.hyperparameters.from_values({"epochs": 3, "batch_size": 64, **own, **values})
    return Training(hyperparameters=chosen, seed=seed)


@pytest.fixture(scope="module")
def odd_job(tmp_path_factory: pytest.TempPathFactory) -> TuningJob:
    return make_job(model=write_net(tmp_path_factory.mktemp("models"), ODD_NET), search={"space": {"epochs": 2}})


@pytest.fixture(scope="module")
def process(odd_job: TuningJob, prepared: Prepared) -> Iterator[TrainerProcesses]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_SECRET_ACCESS_KEY", "NIGHTLY_WEBHOOK", "PGPASSWORD"):
            patch.setenv(name, "secret")
        with TrainerProcesses(odd_job, prepared.snapshot, CPU) as started:
            yield started


def wait_until_dead(processes: Collection[int]) -> None:
    """A fork is reaped by whoever reaps orphans on this machine, when it comes to that."""

    def is_dead(process: int) -> bool:
        try:
            return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_for(lambda: all(map(is_dead, processes)), 60, "the trainers to end")


def begun_ahead(processes: TrainerProcesses) -> list[int]:
    """The processes of a group that was started ahead: no more than are wanted, each as nice as it should be."""
    begun = processes.process_ids
    assert {psutil.Process(pid).nice() for pid in begun} == {psutil.Process().nice() + NICENESS}
    first = psutil.Process(begun[0])
    assert [first, *first.children(recursive=True)] == [psutil.Process(pid) for pid in begun]
    return begun


@pytest.mark.process
def test_it_trains_as_exactly_as_here(prepared: Prepared, caplog: pytest.LogCaptureFixture) -> None:
    job = make_job()
    rates = (0.001, 1e9, 0.01)
    trainings = [training_of(job, seed=seed, learning_rate=rate) for seed, rate in enumerate(rates)]
    stop_second = {2: 2}

    def followed(by: LocalTrainer | TrainerProcesses) -> tuple[list[object], dict[int, object]]:
        epochs: list[object] = []

        def on_epoch(some: Mapping[int, Epoch]) -> Collection[int]:
            epochs.extend(some.items())
            return [place for place, epoch in some.items() if stop_second.get(place) == epoch.number]

        ended = dict(by.train(trainings, on_epoch))
        return epochs, {place: one if isinstance(one, Scored) else str(one) for place, one in ended.items()}

    here = LocalTrainer(job, prepared)
    with (
        started_ahead(2) as started,  # of which one is wanted
        TrainerProcesses(job, prepared.snapshot, CPU, 1, started) as process,
    ):
        begun = begun_ahead(process)
        assert followed(process) == followed(here)
        assert process.process_ids == begun
        assert process.members(trainings[0]) > 8  # as many as memory is free for, which changes
        costs = process.costs(trainings[0].hyperparameters, ["parameters"])
        assert costs == here.costs(trainings[0].hyperparameters, ["parameters"])
        outcomes = {
            place: type(ended) for place, ended in process.train(trainings, lambda some: [2] if 2 in some else [])
        }
        assert outcomes[2] is Stopped
        assert outcomes[1] in (Diverged, Scored)
    assert caplog.records == []


@pytest.mark.process
def test_two_processes_keep_step_and_each_trains_its_part_as_exactly_as_here(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = make_job()
    trainings = [training_of(job, seed=seed) for seed in range(5)]
    stop_at = {1: 1, 4: 2}
    steps = []

    def on_epoch(epochs: Mapping[int, Epoch]) -> Collection[int]:
        steps.append({place: epoch.number for place, epoch in epochs.items()})
        return [place for place, epoch in epochs.items() if stop_at.get(place) == epoch.number]

    with (
        started_ahead(2) as started,
        TrainerProcesses(job, prepared.snapshot, CPU, 2, started) as processes,
    ):
        begun = begun_ahead(processes)
        ended = dict(processes.train(trainings, on_epoch))
        assert processes.process_ids == begun
    wait_until_dead(begun)
    assert steps == [dict.fromkeys(range(5), 1), dict.fromkeys((0, 2, 3, 4), 2), dict.fromkeys((0, 2, 3), 3)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for begin, end in ((0, 2), (2, 5)):

            def stopped(epochs: Mapping[int, Epoch], begin: int = begin) -> Collection[int]:
                return [place for place, epoch in epochs.items() if stop_at.get(begin + place) == epoch.number]

            for place, expected in LocalTrainer(job, prepared).train(trainings[begin:end], stopped):
                if isinstance(expected, Scored):
                    assert ended[begin + place] == expected
                else:
                    assert isinstance(ended[begin + place], Stopped)
    finally:
        torch.set_num_threads(threads)
    assert len(ended) == 5


@pytest.mark.process
def test_a_search_in_two_processes_goes_the_same_way_twice(prepared: Prepared, tmp_path: Path) -> None:
    """Also by a pruner that looks at what other trials under way have reported."""
    space = {"epochs": 4, "batch_size": [64, 256], "width": [16, 32], "depth": 1}
    job = make_job(search={"pruner": "halving", "space": space}, budget={"trials": 32})
    found = []
    with TrainerProcesses(job, prepared.snapshot, CPU, 2) as processes:
        for folder in (tmp_path / "first", tmp_path / "second"):
            study = open_study(job, prepared.snapshot.fingerprint, folder, NOW)
            tune(study, job, processes, folder)
            found.append([(trial.params, trial.values, trial.state, trial.user_attrs[CURVE]) for trial in study.trials])
    assert found[0] == found[1]
    assert {state for _, _, state, _ in found[0]} == {TrialState.COMPLETE, TrialState.PRUNED}


@pytest.mark.process
def test_of_two_processes_the_death_of_one_ends_both_and_the_next_training_starts_them_again(
    odd_job: TuningJob, prepared: Prepared
) -> None:
    learns, aborts = training_of(odd_job, "learns"), training_of(odd_job, "aborts")
    with TrainerProcesses(odd_job, prepared.snapshot, CPU, 2) as processes:
        started = processes.process_ids
        assert len(started) == 2
        with pytest.raises(TrainerDied, match="signal 6"):
            list(processes.train([learns, aborts], lambda _: ()))
        assert processes.process_ids == []
        wait_until_dead(started)
        for many in (3, 1, 0):
            ended = dict(processes.train([learns] * many, lambda _: ()))
            assert [type(ended[place]) for place in range(many)] == [Scored] * many


def test_many_rows_are_not_held_twice() -> None:
    assert worthwhile_processes(CPU, 2**28) == min(2, torch.get_num_threads())
    assert worthwhile_processes(CPU, 2**28 + 1) == 1


@pytest.mark.process
def test_processes_that_were_started_ahead_and_never_used_end(prepared: Prepared) -> None:
    before = set(psutil.Process().children())
    with started_ahead(2):
        (first,) = set(psutil.Process().children()) - before
    assert not first.is_running()


@pytest.mark.process
def test_what_a_model_raises_costs_its_training_and_names_itself(
    process: TrainerProcesses, odd_job: TuningJob, caplog: pytest.LogCaptureFixture
) -> None:
    trainings = [training_of(odd_job, "raises"), training_of(odd_job, "learns")]
    with caplog.at_level(logging.INFO, "models"):
        ended = dict(process.train(trainings, lambda _: ()))
    assert isinstance(ended[1], Scored)
    failed = ended[0]
    assert isinstance(failed, Failed)
    assert failed.sentence == "LookupError: no such kind"
    assert "net.py" in failed.trace
    with pytest.raises(Failed, match="AssertionError"):
        process.members(training_of(odd_job, "is not built"))


@pytest.mark.process
@pytest.mark.parametrize(("kind", "says"), [("hangs", "nothing was heard"), ("aborts", "ended by itself .signal 6.")])
def test_a_training_that_hangs_or_crashes_is_killed_and_the_next_one_trains(
    process: TrainerProcesses, odd_job: TuningJob, kind: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tasks.trainer.connection, "FIRST_EPOCH_SECONDS", 3.0 if kind == "hangs" else 60.0)
        with pytest.raises(TrainerDied, match=says):
            list(process.train([training_of(odd_job, kind)], lambda _: ()))
    ended = dict(process.train([training_of(odd_job, "learns")], lambda _: ()))
    assert isinstance(ended[0], Scored)


@pytest.mark.process
def test_a_night_goes_on_after_its_trainer_died(prepared: Prepared, tmp_path: Path, odd_job: TuningJob) -> None:
    """A configuration that kills its process is given up after three times, and the next one is trained."""
    space = {"epochs": 1, "batch_size": 64}
    search = {"space": space, "sampler": "random", "baseline": False}
    job = make_job(model=odd_job.model, search=search, budget={"trials": 2}, seed=2)  # the first one aborts
    study = open_study(job, prepared.snapshot.fingerprint, tmp_path, NOW)
    with trainer_of(job, prepared.snapshot, CPU) as process:
        assert len(process.process_ids) == processes_for(job, CPU)
        tuned = tune(study, job, process, tmp_path)
    assert (tuned.complete, tuned.failed) == (1, 1)
    assert sum(is_interrupted(trial) for trial in study.trials) == 3
    assert {trial.params["kind"] for trial in study.get_trials(states=(TrialState.COMPLETE,))} == {"learns"}
    assert all(FAILURE not in trial.user_attrs for trial in study.trials)


@pytest.mark.process
def test_it_ends_with_whoever_started_it_even_in_the_middle_of_a_training(
    odd_job: TuningJob, prepared: Prepared, tmp_path: Path
) -> None:
    script = f"""
import pickle, sys
from pathlib import Path
import torch
from tasks.job import TuningJob
from tasks.trainer.processes import TrainerProcesses
content, snapshot, training = pickle.loads(Path({str(tmp_path / "content")!r}).read_bytes())
with TrainerProcesses(TuningJob.model_validate(content), snapshot, torch.device("cpu")) as process:
    print(process.process_ids[0], flush=True)
    list(process.train([training], lambda _: ()))
"""
    hanging = training_of(odd_job, "hangs")
    (tmp_path / "content").write_bytes(pickle.dumps((odd_job.model_dump(mode="json"), prepared.snapshot, hanging)))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(1)
        assert child.is_running()
        parent.send_signal(signal.SIGKILL)
    wait_until_dead([child.pid])


@pytest.mark.process
def test_a_trial_whose_process_is_killed_at_a_random_moment_loses_an_epoch_at_most(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends as it would have; no other trial, and no process, is left of it. Four trials are killed, each soon after
    another one of its ten epochs."""
    monkeypatch.setattr(tasks.search.candidate, "CHECKPOINT_SECONDS", 0)
    space = {"epochs": 10, "batch_size": 16, "width": [16, 64], "learning_rate": {"low": 1e-3, "high": 0.03}}
    job = make_job(search={"sampler": "qmc", "pruner": "none", "baseline": False, "space": space}, budget={"trials": 4})
    moments = random.Random(0)
    epochs_of_death = [1, 8, 3, 6]
    killed_at: dict[int, int] = {}
    kept: dict[int, int] = {}
    processes: list[int] = []

    class Mortal(TrainerProcesses):
        def train(self, trainings: Sequence[Training], on_epoch: OnEpoch) -> Iterator[tuple[int, Ended]]:
            seed, resumable = trainings[0].seed, trainings[0].resumable
            assert resumable is not None
            if seed in killed_at:
                checkpoint = Checkpoint.read(resumable.path, resumable.key)
                kept[seed] = len(checkpoint.curve) if checkpoint else 0
                return super().train(trainings, on_epoch)
            killed_at[seed] = epochs_of_death[len(killed_at)]
            timers: list[threading.Timer] = []

            def then_kill(epochs: Mapping[int, Epoch]) -> Collection[int]:
                for timer in timers:
                    timer.join()  # however late a busy machine is with it, two epochs are left to be trained
                if epochs[0].number == killed_at[seed]:
                    processes.extend(self.process_ids)
                    kill = functools.partial(os.killpg, self.process_ids[0], signal.SIGKILL)
                    timers.append(threading.Timer(moments.uniform(0, 0.01), kill))
                    timers[0].start()
                return on_epoch(epochs)

            return super().train(trainings, then_kill)

    def results(trainer: LocalTrainer | TrainerProcesses, folder: Path) -> tuple[optuna.Study, list[object]]:
        study = open_study(job, prepared.snapshot.fingerprint, folder, NOW)
        tune(study, job, trainer, folder)
        return study, [(trial.params, trial.values, trial.user_attrs[CURVE]) for trial in finished_trials(study)]

    with Mortal(job, prepared.snapshot, CPU) as process:
        study, found = results(process, tmp_path / "killed")
    _, expected = results(LocalTrainer(job, prepared), tmp_path / "undisturbed")
    assert found == expected
    assert len(found) == len(set(processes)) == 4
    assert sum(is_interrupted(trial) for trial in study.trials) == 4
    assert all(kept[seed] >= epoch - 1 for seed, epoch in killed_at.items())
    assert not any(psutil.pid_exists(pid) for pid in processes)


@pytest.mark.process
def test_a_full_disk_costs_the_trials_that_meet_it_and_the_rest_are_trained_when_there_is_room(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fails at once, by name, and is not tried again."""
    monkeypatch.setattr(tasks.search.candidate, "CHECKPOINT_SECONDS", 0)
    space = {"epochs": 3, "batch_size": 256, "width": 64, "depth": 2}
    job = make_job(search={"sampler": "qmc", "pruner": "none", "space": space}, budget={"trials": 6})
    study = open_study(job, prepared.snapshot.fingerprint, tmp_path / "studies", NOW)
    with small_disk(tmp_path / "disk", "2m") as disk:
        told: list[object] = []

        def on_trial(trial: FrozenTrial) -> None:
            told.append(trial)
            if len(told) == 2:
                fill(disk)
            if len(told) == 4:
                assert not [file.name for file in disk.rglob("*") if file.is_file() and file.name != "filler"]
                (disk / "filler").unlink()

        tuned = tune(study, job, LocalTrainer(job, prepared), disk, on_trial=on_trial)
    assert (tuned.complete, tuned.failed) == (4, 2)
    failures = [trial.user_attrs.get(FAILURE, "") for trial in study.trials]
    assert ["No space left on device" in failure for failure in failures] == [False, False, True, True, False, False]


@pytest.mark.process
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(tmp_path: Path) -> None:
    def checkpoint(epochs: int, size: int) -> Checkpoint:
        weights = {"weight": torch.zeros(size)}
        return Checkpoint(key="k", curve=[[0]] * epochs, weights=weights, best={}, optimizer={}, generators={})

    with small_disk(tmp_path / "disk", "256k") as disk:
        path = disk / "trial.safetensors"
        checkpoint(1, 10_000).write(path)
        with pytest.raises(OSError, match="No space left"):
            checkpoint(2, 60_000).write(path)
        found = Checkpoint.read(path, "k")
        assert found is not None
        assert len(found.curve) == 1
        assert [file.name for file in disk.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("search", "trials", "processes"),
    [({}, 60, 2), ({}, 15, 1), ({"sampler": "grid", "space": {"width": [16, 32], "depth": [1, 2]}}, 60, 1)],
)
def test_there_are_no_more_processes_than_a_wave_has_trials(
    search: dict[str, object], trials: int, processes: int
) -> None:
    job = make_job(search=search, budget={"trials": trials})
    assert processes_for(job, CPU) == min(processes, torch.get_num_threads())
