"""The process that loads a version: it has never seen the model, has no credentials, survives what a model does to it
and those that train, and ends with the night."""

import os
from pathlib import Path

import psutil
import pytest

import tasks.trainer.fresh
from tasks.data.prepared import Prepared
from tasks.promotion.loaded_back import WouldNotShip, rehearse
from tasks.trainer.fresh import FreshProcess
from tasks.trainer.local import LocalTrainer
from tasks.trainer.processes import TrainerProcesses, started_ahead
from tests.conftest import CPU, make_job
from tests.unit.models.test_families import write_net
from tests.unit.tasks.promotion.test_loaded_back import net
from tests.unit.tasks.trainer.test_trainer import wait_until_dead

pytestmark = pytest.mark.process

FAULTS = {
    "os.abort()": r"the process that loaded it ended by itself \(signal 6\)",
    "os._exit(3)": r"the process that loaded it ended by itself \(exit code 3\)",
    "sys.exit('enough')": "SystemExit: enough",
    "raise LookupError('gone')": "LookupError: gone",
    "time.sleep(600)": "nothing was heard of it for 6 s, so its process was killed",
}


def elsewhere(fault: str) -> str:
    """A model that does something where it is built in another process than this one."""
    return net("return self.out(self.a(rows))", f"if os.getpid() != {os.getpid()}: {fault}", "import os, sys, time")


def test_a_model_that_ends_or_hangs_the_process_that_loads_it_costs_itself_only(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And has no credentials there."""
    names = ("AWS_SECRET_ACCESS_KEY", "NIGHTLY_WEBHOOK", "PGPASSWORD")
    for name in names:
        monkeypatch.setenv(name, "secret")
    with FreshProcess() as fresh:
        for number, (fault, says) in enumerate(FAULTS.items()):
            (folder := tmp_path / str(number)).mkdir()
            job = make_job(model=write_net(folder, elsewhere(fault)), search={"space": {"epochs": 1}})
            monkeypatch.setattr(tasks.trainer.fresh, "ANSWER_SECONDS", 6.0 if "sleep" in fault else 60.0)
            with pytest.raises(WouldNotShip, match=says):
                rehearse(job, prepared.snapshot, LocalTrainer(job, prepared), fresh)
        monkeypatch.setattr(tasks.trainer.fresh, "ANSWER_SECONDS", 60.0)
        model = write_net(tmp_path, elsewhere(f"assert not {set(names)} & set(os.environ)"))
        job = make_job(model=model, search={"space": {"epochs": 1}})
        rehearse(job, prepared.snapshot, LocalTrainer(job, prepared), fresh)


def test_it_is_begun_with_those_that_train_outlives_them_and_ends_with_its_owner(
    prepared: Prepared, tmp_path: Path
) -> None:
    job, snapshot = make_job(), prepared.snapshot
    with FreshProcess() as fresh, started_ahead(2, fresh) as started:
        with TrainerProcesses(job, snapshot, CPU, 2, started) as trainer:
            training = trainer.process_ids
            (waiting,) = (child for child in psutil.Process(training[0]).children() if child.pid not in training)
            rehearse(job, snapshot, trainer, fresh)
        wait_until_dead(training)
        local = LocalTrainer(job, prepared)
        rehearse(job, snapshot, local, fresh)
        assert waiting.is_running()
        ours = set(psutil.Process().children())
        waiting.kill()
        rehearse(job, snapshot, local, fresh)
        (instead,) = set(psutil.Process().children()) - ours
    assert not instead.is_running()
    with (
        FreshProcess() as fresh,
        started_ahead(1, fresh) as started,
        TrainerProcesses(job, snapshot, CPU, 1, started) as trainer,
    ):
        (training_alone,) = trainer.process_ids
        (waiting,) = psutil.Process(training_alone).children()
    wait_until_dead([waiting.pid])
