"""A worker a device on one machine, and a night that uses two of them."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from infra.settings import MARK
from tasks.study.leases import NIGHT, workers_of
from tasks.study.studies import WORKER, finished_trials, last_study
from tests.commands import nightly
from tests.conftest import Stack, make_stack
from tests.held import write_held_job
from tests.nights import assert_the_ledgers_agree, latest_run, study_of
from tests.servers import wait_for

JOB, TRIALS = "shared", 8


@pytest.fixture
def device_workers(breakable_stack: Stack) -> Iterator[Stack]:
    """A stack that has workers of single devices for the time of the test."""
    yield breakable_stack
    nightly(breakable_stack, "workers", "stop")
    breakable_stack.nightly("up")


def helpers(stack: Stack) -> list[dict[str, Any]]:
    """The runs of the worker flow that the job's night asked for."""
    runs: list[dict[str, Any]] = stack.prefect("flow_runs/filter", deployments={"name": {"any_": ["worker"]}})
    return [run for run in runs if run["parameters"]["study"].startswith(f"{JOB}-")]


def at_work(study: optuna.Study) -> dict[str, dict[str, Any]]:
    """The records of the workers that have a trial, by their names."""
    busy = {trial.user_attrs.get(WORKER) for trial in study.get_trials(states=(TrialState.RUNNING,))}
    return {name: record for name, record in workers_of(study.user_attrs).items() if name in busy}


@pytest.mark.timeout(1800)
def test_workers_of_one_machine_share_a_night_and_one_whose_process_dies_is_replaced(device_workers: Stack) -> None:
    """The night asks for two workers, and the second device takes one of them. That one dies."""
    stack = device_workers
    gate = write_held_job(Path(stack.environment["NIGHTLY_JOBS"]), JOB, trials=TRIALS, workers=3)
    shown = stack.nightly("workers", "start", "--devices", "cpu:2").stdout
    assert "worker-cpu-1 is up" in shown
    assert "worker-cpu-2 is up" in shown
    stack.nightly("up")  # applies the new job, and starts no third worker
    services = json.loads(nightly(stack, "status", "--json").stdout)
    assert {row["service"] for row in services} == {"prefect", "mlflow", "worker-cpu-1", "worker-cpu-2"}

    stack.nightly("run", JOB, "--no-follow")
    wait_for(
        lambda: (stack.home / "studies" / JOB).exists() and last_study(JOB, stack.home / "studies"), 300, "a study"
    )
    study = study_of(stack, JOB)
    wait_for(lambda: len(at_work(study)) == 2, 300, "two workers to train")
    assert len(helpers(stack)) == 2
    listed = json.loads(nightly(stack, "workers", "ls", "--json").stdout)
    trains = {row["worker"]: row["trials"] for row in listed if row["study"] == study.study_name}
    assert trains.keys() == at_work(study).keys()
    assert all(trains.values())

    (killed,) = (name for name, record in at_work(study).items() if not record[NIGHT])
    os.kill(at_work(study)[killed]["pid"], signal.SIGKILL)
    wait_for(lambda: len(at_work(study)) == 2 and killed not in at_work(study), 300, "another worker to train")
    wait_for(lambda: len(helpers(stack)) == 3, 300, "one more to be asked for")
    gate.open()
    wait_for(lambda: latest_run(stack, JOB)["state_type"] == "COMPLETED", 300, "the night to end")
    final = ["CANCELLED", "COMPLETED", "CRASHED"]  # for two there was no device at the same time
    wait_for(lambda: sorted(run["state_type"] for run in helpers(stack)) == final, 300, "the workers' runs to end")

    assert all(run["parent_task_run_id"] and MARK in run["tags"] for run in helpers(stack))
    assert len(finished_trials(study)) == TRIALS
    assert len({trial.user_attrs[WORKER] for trial in study.trials}) == 3
    assert_the_ledgers_agree(stack, JOB)

    assert "stopped worker-cpu-1, worker-cpu-2" in nightly(stack, "workers", "stop").stdout
    assert "worker is up" in stack.nightly("up").stdout


def test_devices_that_are_not_there_are_refused_in_one_sentence(tmp_path: Path) -> None:
    refused = nightly(make_stack(tmp_path), "workers", "start", "--devices", "99", ok=False)
    assert refused.returncode == 1
    assert "--devices must be auto, cpu:N, or numbers below" in refused.stderr
    assert "found '99'" in refused.stderr
    assert "Traceback" not in refused.stderr
