"""The process that trains: as exact as training here, mortal, blind to secrets, and gone with whoever started it."""

import logging
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from optuna.trial import TrialState

from models.fused import Stopped
from models.solo import Diverged, Epoch, Training
from tasks import trainer
from tasks.job import TuningJob
from tasks.prepared import Prepared
from tasks.study import FAILURE, is_interrupted, open_study
from tasks.trainer import Failed, LocalTrainer, Scored, TrainerDied, TrainerProcess
from tasks.tune import tune
from tests.conftest import CPU, make_job
from tests.servers import wait_for
from tests.unit.test_families import write_net
from tests.unit.test_tune import NOW

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
def process(odd_job: TuningJob, prepared: Prepared) -> Iterator[TrainerProcess]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_SECRET_ACCESS_KEY", "NIGHTLY_WEBHOOK", "PGPASSWORD"):
            patch.setenv(name, "secret")
        with TrainerProcess(odd_job, prepared.snapshot, CPU) as started:
            yield started


def test_it_trains_as_exactly_as_here(prepared: Prepared, caplog: pytest.LogCaptureFixture) -> None:
    job = make_job()
    rates = (0.001, 1e9, 0.01)
    trainings = [training_of(job, seed=seed, learning_rate=rate) for seed, rate in enumerate(rates)]
    stop_second = {2: 2}

    def followed(by: LocalTrainer | TrainerProcess) -> tuple[list[object], dict[int, object]]:
        epochs: list[object] = []

        def on_epoch(some: Mapping[int, Epoch]) -> Collection[int]:
            epochs.extend(some.items())
            return [place for place, epoch in some.items() if stop_second.get(place) == epoch.number]

        ended = dict(by.train(trainings, on_epoch))
        return epochs, {place: one if isinstance(one, Scored) else str(one) for place, one in ended.items()}

    here = LocalTrainer(job, prepared)
    with TrainerProcess(job, prepared.snapshot, CPU) as process:
        assert followed(process) == followed(here)
        assert process.members(trainings[0]) > 8  # as many as memory is free for, which changes
        costs = process.costs(trainings[0].hyperparameters, ["parameters"])
        assert costs == here.costs(trainings[0].hyperparameters, ["parameters"])
        outcomes = {
            place: type(ended) for place, ended in process.train(trainings, lambda some: [2] if 2 in some else [])
        }
        assert outcomes[2] is Stopped
        assert outcomes[1] in (Diverged, Scored)
    assert caplog.records == []


def test_what_a_model_raises_costs_its_training_and_names_itself(
    process: TrainerProcess, odd_job: TuningJob, caplog: pytest.LogCaptureFixture
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


@pytest.mark.parametrize(("kind", "says"), [("hangs", "nothing was heard"), ("aborts", "ended by itself .signal 6.")])
def test_a_training_that_hangs_or_crashes_is_killed_and_the_next_one_trains(
    process: TrainerProcess, odd_job: TuningJob, kind: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "FIRST_EPOCH_SECONDS", 5)
    with pytest.raises(TrainerDied, match=says):
        list(process.train([training_of(odd_job, kind)], lambda _: ()))
    ended = dict(process.train([training_of(odd_job, "learns")], lambda _: ()))
    assert isinstance(ended[0], Scored)


def test_a_night_goes_on_after_its_trainer_died(prepared: Prepared, tmp_path: Path, odd_job: TuningJob) -> None:
    """Each configuration that kills its process is given up after three times; all others are trained."""
    space = {"epochs": 1, "batch_size": 64}
    search = {"space": space, "sampler": "random", "baseline": False}
    job = make_job(model=odd_job.model, search=search, budget={"trials": 4})
    study = open_study(job, prepared.snapshot.fingerprint, tmp_path, NOW)
    with TrainerProcess(job, prepared.snapshot, CPU) as process:
        tuned = tune(study, job, process, tmp_path)
    assert tuned.complete + tuned.failed == 4
    assert tuned.failed > 0
    assert sum(is_interrupted(trial) for trial in study.trials) == 3 * tuned.failed
    assert {trial.params["kind"] for trial in study.get_trials(states=(TrialState.COMPLETE,))} == {"learns"}
    assert all(FAILURE not in trial.user_attrs for trial in study.trials)


def test_it_ends_with_whoever_started_it_even_in_the_middle_of_a_training(
    odd_job: TuningJob, prepared: Prepared, tmp_path: Path
) -> None:
    script = f"""
import pickle, sys
from pathlib import Path
import torch
from tasks.job import TuningJob
from tasks.trainer import TrainerProcess
content, snapshot, training = pickle.loads(Path({str(tmp_path / "content")!r}).read_bytes())
process = TrainerProcess(TuningJob.model_validate(content), snapshot, torch.device("cpu"))
process._start()
print(process._process.pid, flush=True)
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
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 10, "the trainer to end")
