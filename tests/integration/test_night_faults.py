"""Nights that are killed, cancelled or crowded, against real servers."""

import os
import signal
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState

from tasks.study.studies import finished_trials
from tasks.tracking.nights import night_ends_with_its_run
from tests.commands import nightly
from tests.conftest import Stack
from tests.held import write_held_job
from tests.nights import (
    assert_the_ledgers_agree,
    cancel,
    engine_of,
    finished_of,
    latest_run,
    night_under_way,
    run_directly,
    runs_of,
    service_of,
    study_of,
)
from tests.servers import wait_for

TRIALS = 24
# Waits in each step of a training, for twenty seconds in all.
SLOW_NET = """
import time
from torch import nn

class Net(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(64, shape.outputs))

    def forward(self, rows):
        if self.training:
            time.sleep(0.1)
        return self.layer(rows)
"""
SLOW_TO_CONFIRM = """
name: cancelled-confirm
data: {source: 'sklearn://digits'}
model: slow_net.py:Net
search: {pruner: none, space: {epochs: 12, batch_size: 64}}
budget: {trials: 1}
confirm: {candidates: 1, seeds: 20}
"""


@pytest.fixture
def stack(breakable_stack: Stack) -> Stack:
    return breakable_stack


def jobs(stack: Stack) -> Path:
    return Path(stack.environment["NIGHTLY_JOBS"])


def test_a_night_whose_process_then_stack_then_machine_died_is_continued_each_time(stack: Stack) -> None:
    """A lost machine as near as it gets: every process is killed at once, and all are started again."""
    job = "killed"
    gate = write_held_job(jobs(stack), job, trials=TRIALS)
    nightly(stack, "apply")

    study = night_under_way(stack, job, gate, trials=1)
    os.kill(engine_of(stack, job).pid, signal.SIGKILL)
    wait_for(lambda: latest_run(stack, job)["state_type"] == "CRASHED", 300, "the worker to notice")
    kept = finished_of(study)

    assert night_under_way(stack, job, gate, trials=len(kept) + 1).study_name == study.study_name
    assert kept.items() <= finished_of(study).items()
    engine = engine_of(stack, job)
    stack.nightly("down")
    assert not engine.is_running()
    kept = finished_of(study)
    stack.nightly("up")
    wait_for(lambda: latest_run(stack, job)["state_type"] != "RUNNING", 60, "no run to be left RUNNING")

    assert night_under_way(stack, job, gate, trials=len(kept) + 1).study_name == study.study_name
    assert kept.items() <= finished_of(study).items()
    everything = [service_of(stack, name) for name in ("prefect", "mlflow", "worker")]
    for process in [child for service in everything for child in service.children(recursive=True)] + everything:
        process.kill()
    kept = finished_of(study)
    stack.nightly("up")

    gate.open()
    stack.nightly("run", job)
    assert study_of(stack, job).study_name == study.study_name
    assert kept.items() <= finished_of(study).items()
    assert len(finished_trials(study)) == TRIALS
    assert_the_ledgers_agree(stack, job)


def test_a_cancelled_night_stops_and_promotes_nothing_and_its_lost_mlflow_run_is_written_anew(stack: Stack) -> None:
    """Somebody deletes the run of a night that was cancelled; the next night continues the study all the same."""
    job = "cancelled"
    gate = write_held_job(jobs(stack), job, trials=TRIALS)
    nightly(stack, "apply")
    study = night_under_way(stack, job, gate, trials=1)
    cancel(stack, latest_run(stack, job))
    wait_for(lambda: latest_run(stack, job)["state_type"] == "CANCELLED", 300, "the night to be cancelled")
    assert not (stack.home / "store/models" / job).exists()
    assert not study.get_trials(states=(TrialState.RUNNING,))
    parent, _ = runs_of(stack, study)
    assert parent.info.status == "KILLED"

    client = MlflowClient(stack.mlflow_url)
    client.delete_run(parent.info.run_id)
    gate.open()
    assert run_directly(stack, job)[0] == "COMPLETED"
    again, nested = runs_of(stack, study_of(stack, job))
    assert again.info.run_id != parent.info.run_id
    assert len(nested) == TRIALS
    assert_the_ledgers_agree(stack, job)


@pytest.mark.parametrize("step", ["prepare", "confirm"])
def test_a_night_cancelled_in_another_step_does_not_end_it_and_promotes_nothing(stack: Stack, step: str) -> None:
    job = f"cancelled-{step}"
    if step == "confirm":
        (jobs(stack) / "slow_net.py").write_text(SLOW_NET)
        (jobs(stack) / f"{job}.yaml").write_text(SLOW_TO_CONFIRM)
        nightly(stack, "apply")
    nightly(stack, "run", job, "--no-follow")

    def is_under_way() -> bool:
        of_the_night = {"flow_runs": {"id": {"any_": [latest_run(stack, job)["id"]]}}}
        tasks = stack.prefect("task_runs/filter", **of_the_night)
        return any(str(task["name"]).startswith(step) and task["state_type"] == "RUNNING" for task in tasks)

    wait_for(is_under_way, 300, f"the step {step}")
    engine = engine_of(stack, job)
    cancel(stack, latest_run(stack, job))
    wait_for(lambda: latest_run(stack, job)["state_type"] == "CANCELLED", 300, "the night to be cancelled")
    psutil.wait_procs([engine], timeout=60)
    assert not engine.is_running()
    assert not (stack.home / "store/models" / job).exists()


def test_a_night_whose_stop_came_out_as_another_error_is_killed(stack: Stack) -> None:
    client = MlflowClient(stack.mlflow_url)
    experiment = client.create_experiment("stopped")

    def answer_with_an_error_of_its_own(interruption: BaseException) -> None:
        raise ValueError("halfway") from interruption

    for interruption, status in ((KeyboardInterrupt(), "KILLED"), (OSError(), "FAILED")):
        run = client.create_run(experiment).info.run_id
        with pytest.raises(ValueError, match="halfway"), night_ends_with_its_run(client, run):
            answer_with_an_error_of_its_own(interruption)
        assert client.get_run(run).info.status == status


def test_nights_wait_for_the_device_and_those_of_one_job_wait_or_are_refused_as_it_says(
    stack: Stack, tmp_path: Path
) -> None:
    gate = write_held_job(jobs(stack), "holding", trials=TRIALS)
    nightly(stack, "apply")
    night_under_way(stack, "holding", gate, trials=1)
    first = latest_run(stack, "holding")
    log = stack.home / "logs/worker.log"
    logged = log.read_text()
    nightly(stack, "run", "refusing", "--promotion", "never", "--no-follow")
    # Prefect keeps these lines too, but gives up on sending them where its database is locked for long.
    waits = "waiting for cpu, which another night holds"
    wait_for(lambda: waits in log.read_text().removeprefix(logged), 300, "another job's night to wait for the device")
    waiting = latest_run(stack, "refusing")

    for job, state in (("holding", "AwaitingConcurrencySlot"), ("refusing", "Cancelled")):
        nightly(stack, "run", job, "--no-follow")
        wait_for(lambda: latest_run(stack, job)["state_name"] == state, 300, f"the second night to be {state}")  # noqa: B023
    shown = stack.nightly("up", NIGHTLY_JOBS=str(tmp_path)).stdout
    assert "worker keeps its old settings (NIGHTLY_JOBS changed) while a night runs" in shown

    second = latest_run(stack, "holding")
    assert second["id"] != first["id"]
    for run in (second, first):
        cancel(stack, run)

    def has_gone_on() -> bool:
        return bool(stack.ask_prefect("GET", f"flow_runs/{waiting['id']}").json()["state_type"] == "COMPLETED")

    wait_for(has_gone_on, 300, "the night that waited to go on")
