"""Nights that are killed, cancelled or crowded, against real servers."""

import os
import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState

from tasks.study import finished_trials
from tasks.tracking import night_ends_with_its_run
from tests.conftest import Stack
from tests.nights import (
    assert_the_ledgers_agree,
    cancel,
    engine_of,
    latest_run,
    night_under_way,
    run_directly,
    runs_of,
    service_of,
    study_of,
    unfinished,
)
from tests.servers import S3Server, free_port, wait_for


@pytest.fixture
def stack(breakable_stack: Stack) -> Stack:
    return breakable_stack


@pytest.mark.parametrize("reason", ["unreachable", "damaged"])
def test_a_store_that_cannot_be_used_is_found_before_the_first_trial(stack: Stack, reason: str, tmp_path: Path) -> None:
    if reason == "unreachable":
        environment = S3Server(f"http://127.0.0.1:{free_port()}").environment | {"NIGHTLY_STORE": "s3://away"}
        says = "the artifact store s3://away cannot be reached"
    else:
        environment = {"NIGHTLY_STORE": tmp_path.as_uri()}
        assert run_directly(stack, "damaged", **environment)[0] == "COMPLETED"
        (manifest,) = tmp_path.rglob("manifest.json")
        manifest.write_bytes(manifest.read_bytes().replace(b"accuracy", b"accuracx"))
        says = "is damaged: manifest.json was altered; restore the store from a backup, nothing was changed"
    studies = sorted((stack.home / "studies/damaged").glob("*.journal"))
    kind, message = run_directly(stack, "damaged", **environment)
    assert kind == "FAILED"
    assert says in message
    assert sorted((stack.home / "studies/damaged").glob("*.journal")) == studies


def test_a_killed_night_is_continued_and_loses_no_finished_trial(stack: Stack) -> None:
    study = night_under_way(stack, "long", trials=8)
    os.kill(engine_of(stack, "long").pid, signal.SIGKILL)
    wait_for(lambda: latest_run(stack, "long")["state_type"] == "CRASHED", 180, "the worker to notice")
    kept = [trial.params for trial in finished_trials(study)]
    stack.nightly("run", "long", "--trials", str(len(kept) + 10))
    assert study_of(stack, "long").study_name == study.study_name
    finished = finished_trials(study)
    assert [trial.params for trial in finished[: len(kept)]] == kept
    assert len(finished) == len(kept) + 10
    assert_the_ledgers_agree(stack, "long")


def test_a_night_that_went_down_with_its_stack_is_continued(stack: Stack) -> None:
    study = night_under_way(stack, "longer", trials=3)
    engine = engine_of(stack, "longer")
    stack.nightly("down")
    assert not engine.is_running()
    stack.nightly("up")
    wait_for(lambda: latest_run(stack, "longer")["state_type"] != "RUNNING", 10, "no run to be left RUNNING")
    stack.nightly("run", "longer", "--trials", str(len(finished_trials(study)) + 2))
    assert study_of(stack, "longer").study_name == study.study_name
    assert_the_ledgers_agree(stack, "longer")


def test_a_night_whose_machine_lost_its_power_is_continued(stack: Stack) -> None:
    """As near as it gets: every process is killed at once, and all are started again."""
    study = night_under_way(stack, "powerless", trials=8)
    everything = [service_of(stack, name) for name in ("prefect", "mlflow", "worker")]
    for process in [child for service in everything for child in service.children(recursive=True)] + everything:
        process.kill()
    kept = [trial.params for trial in finished_trials(study)]
    stack.nightly("up")
    stack.nightly("run", "powerless", "--trials", str(len(kept) + 10), "--no-follow")
    wait_for(lambda: len(finished_trials(study)) > len(kept), 180, "the night to go on")
    wait_for(lambda: latest_run(stack, "powerless")["state_type"] == "COMPLETED", 180, "the night to end")
    assert [trial.params for trial in finished_trials(study)][: len(kept)] == kept
    assert len(finished_trials(study)) == len(kept) + 10
    assert_the_ledgers_agree(stack, "powerless")


def test_a_cancelled_night_stops_and_promotes_nothing(stack: Stack) -> None:
    study = night_under_way(stack, "cancelled", trials=3)
    cancel(stack, latest_run(stack, "cancelled"))
    wait_for(lambda: latest_run(stack, "cancelled")["state_type"] == "CANCELLED", 180, "the night to be cancelled")
    assert not (stack.home / "store/models/cancelled").exists()
    assert not study.get_trials(states=(TrialState.RUNNING,))
    parent, _ = runs_of(stack, study)
    assert parent.info.status == "KILLED"


@pytest.mark.parametrize("step", ["prepare", "confirm"])
def test_a_night_cancelled_in_another_step_does_not_end_it_and_promotes_nothing(stack: Stack, step: str) -> None:
    job = f"cancelled-{step}"
    stack.nightly("run", job, "--no-follow")

    def is_under_way() -> bool:
        of_the_night = {"flow_runs": {"id": {"any_": [latest_run(stack, job)["id"]]}}}
        tasks = stack.prefect("task_runs/filter", **of_the_night)
        return any(str(task["name"]).startswith(step) and task["state_type"] == "RUNNING" for task in tasks)

    wait_for(is_under_way, 180, f"the step {step}")
    engine = engine_of(stack, job)
    cancel(stack, latest_run(stack, job))
    wait_for(lambda: latest_run(stack, job)["state_type"] == "CANCELLED", 120, "the night to be cancelled")
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


@pytest.mark.parametrize(("job", "state"), [("overlapping", "AwaitingConcurrencySlot"), ("refusing", "Cancelled")])
def test_a_second_night_of_a_job_waits_or_is_refused_as_the_job_says(stack: Stack, job: str, state: str) -> None:
    stack.nightly("run", job, "--no-follow")
    wait_for(lambda: (stack.home / "studies" / job).exists(), 180, "the night to begin")
    first = latest_run(stack, job)
    stack.nightly("run", job, "--no-follow")
    wait_for(lambda: latest_run(stack, job)["state_name"] == state, 180, f"the second night to be {state}")
    second = latest_run(stack, job)
    assert first["id"] != second["id"]
    for run in (second, first):
        cancel(stack, run)
    wait_for(lambda: not unfinished(stack, job), 180, "both nights to end")


def test_nights_of_two_jobs_share_the_device_one_after_the_other(stack: Stack, tmp_path: Path) -> None:
    stack.nightly("run", "holding", "--no-follow")
    wait_for(lambda: (stack.home / "studies/holding").exists(), 180, "the first night to begin")
    stack.nightly("run", "shadow", "--trials", "2", "--promotion", "never", "--no-follow")

    def waits() -> bool:
        logs = stack.prefect("logs/filter", logs={"flow_run_id": {"any_": [latest_run(stack, "shadow")["id"]]}})
        return any("waiting for cpu, which another night holds" in str(log["message"]) for log in logs)

    wait_for(waits, 180, "the second night to wait")
    shown = stack.nightly("up", NIGHTLY_JOBS=str(tmp_path)).stdout
    assert "worker keeps its old settings (NIGHTLY_JOBS changed) while a night runs" in shown
    cancel(stack, latest_run(stack, "holding"))
    wait_for(lambda: latest_run(stack, "shadow")["state_type"] == "COMPLETED", 180, "the second night to go on")


def test_a_lost_mlflow_run_is_written_anew(stack: Stack) -> None:
    """Somebody deletes the run of a night that was cancelled; the next night continues the study all the same."""
    study = study_of(stack, "cancelled")
    lost = study.user_attrs["mlflow_run_id"]
    MlflowClient(stack.mlflow_url).delete_run(lost)
    stack.nightly("run", "cancelled", "--trials", str(len(finished_trials(study)) + 1))
    assert study_of(stack, "cancelled").user_attrs["mlflow_run_id"] != lost
    assert_the_ledgers_agree(stack, "cancelled")
