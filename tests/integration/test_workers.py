"""A worker a device on one machine, and a night that uses two of them."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tasks.leases import workers_of
from tasks.study import WORKER, finished_trials
from tests.conftest import Stack
from tests.nights import assert_the_ledgers_agree, latest_run, study_of
from tests.servers import wait_for

# Trains by waiting, so that a second worker, which takes seconds to start, finds something left to do.
SLOW_NET = """
import time
from torch import nn

class Net(nn.Module):
    @staticmethod
    def suggest(trial):
        return {"units": trial.suggest_int("units", 8, 12)}

    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, hyperparameters["units"]), nn.ReLU(),
                                    nn.Linear(hyperparameters["units"], shape.outputs))

    def forward(self, rows):
        if self.training:
            time.sleep(0.02)
        return self.layers(rows)
"""


@pytest.fixture
def stack(breakable_stack: Stack) -> Stack:
    return breakable_stack


def write_slow_job(jobs: Path, name: str, *, trials: int, workers: int, epochs: int) -> None:
    (jobs / "net.py").write_text(SLOW_NET)
    (jobs / f"{name}.yaml").write_text(
        f"name: {name}\n"
        "data: {source: 'sklearn://digits'}\n"
        "model: net.py:Net\n"
        f"search: {{pruner: none, space: {{epochs: {epochs}, batch_size: 64}}}}\n"
        f"budget: {{trials: {trials}, minutes: 20, workers: {workers}}}\n"
        "confirm: {candidates: 1, seeds: 2}\n"
    )


def services(stack: Stack) -> set[str]:
    return {row["service"] for row in json.loads(stack.nightly("status", "--json").stdout)}


def test_workers_of_one_machine_share_a_night(stack: Stack) -> None:
    write_slow_job(Path(stack.environment["NIGHTLY_JOBS"]), "shared", trials=24, workers=3, epochs=12)
    shown = stack.nightly("workers", "start", "--devices", "cpu:2").stdout
    assert "worker-cpu-1 is up" in shown
    assert "worker-cpu-2 is up" in shown
    assert services(stack) == {"prefect", "mlflow", "worker-cpu-1", "worker-cpu-2"}
    stack.nightly("up")  # applies the new job, and starts no third worker
    assert services(stack) == {"prefect", "mlflow", "worker-cpu-1", "worker-cpu-2"}

    stack.nightly("run", "shared", "--no-follow")
    wait_for(lambda: (stack.home / "studies/shared").exists(), 180, "the night to begin")

    def at_work() -> list[dict[str, str]]:
        rows = json.loads(stack.nightly("workers", "ls", "--json").stdout)
        return [row for row in rows if row["state"] == "trains" and row["study"].startswith("shared-")]

    wait_for(lambda: len(at_work()) == 2, 180, "two workers to train")
    wait_for(lambda: latest_run(stack, "shared")["state_type"] == "COMPLETED", 240, "the night to end")
    trained = Counter(trial.user_attrs[WORKER] for trial in study_of(stack, "shared").trials)
    assert sum(trained.values()) == 24
    assert len(trained) == 2
    assert_the_ledgers_agree(stack, "shared")
    helpers = stack.prefect("flow_runs/filter", deployments={"name": {"any_": ["worker"]}})
    assert sorted(str(run["state_type"]) for run in helpers) == ["CANCELLED", "COMPLETED"]  # two were asked for
    assert all(run["parent_task_run_id"] for run in helpers)

    assert "stopped worker-cpu-1, worker-cpu-2" in stack.nightly("workers", "stop").stdout
    assert "worker is up" in stack.nightly("up").stdout


def test_a_worker_whose_process_dies_is_replaced_in_the_same_night(stack: Stack) -> None:
    write_slow_job(Path(stack.environment["NIGHTLY_JOBS"]), "replaced", trials=40, workers=2, epochs=12)
    stack.nightly("workers", "start", "--devices", "cpu:2")
    stack.nightly("up")
    stack.nightly("run", "replaced", "--no-follow")

    def helpers(*states: str) -> list[dict[str, object]]:
        kinds = {"state": {"type": {"any_": list(states)}}}
        runs = stack.prefect("flow_runs/filter", deployments={"name": {"any_": ["worker"]}}, flow_runs=kinds)
        return [run for run in runs if str(run["parameters"]["study"]).startswith("replaced-")]  # type: ignore[index]

    def trains(run: dict[str, object]) -> bool:
        records = workers_of(study_of(stack, "replaced").user_attrs).values()
        return any(record["flow_run"] == run["id"] for record in records)

    wait_for(lambda: [run for run in helpers("RUNNING") if trains(run)], 180, "a worker to help")
    (first,) = helpers("RUNNING")
    records = workers_of(study_of(stack, "replaced").user_attrs).values()
    os.kill(next(record["pid"] for record in records if record["flow_run"] == first["id"]), signal.SIGKILL)
    wait_for(
        lambda: [run for run in helpers("RUNNING") if trains(run) and run["id"] != first["id"]],
        120,
        "another worker to help",
    )
    wait_for(lambda: latest_run(stack, "replaced")["state_type"] == "COMPLETED", 240, "the night to end")
    assert len(finished_trials(study_of(stack, "replaced"))) == 40
    assert_the_ledgers_agree(stack, "replaced")
    assert sorted(str(run["state_type"]) for run in helpers("CRASHED", "COMPLETED")) == ["COMPLETED", "CRASHED"]
    stack.nightly("workers", "stop")
    stack.nightly("up")


def test_devices_that_are_not_there_are_refused_in_one_sentence(stack: Stack) -> None:
    refused = stack.nightly("workers", "start", "--devices", "99", ok=False)
    assert refused.returncode == 1
    assert "--devices must be auto, cpu:N, or numbers below" in refused.stderr
    assert "found '99'" in refused.stderr
    assert "Traceback" not in refused.stderr
