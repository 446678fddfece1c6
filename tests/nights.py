"""What the tests of whole nights share: how one is run, stopped and looked up."""

import contextlib
import json
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
import psutil
import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState

from infra.deployments import artifact_key
from infra.settings import CPU_PART
from infra.store.protocol import Store
from tasks.registry.log import append_promotion, latest_promotion
from tasks.registry.versions import publish_version, pull_version
from tasks.study.studies import attempts, finished_trials, is_interrupted, last_study
from tasks.tracking.trials import INTERRUPTIONS, OPTUNA_NUMBER, TRIAL_NUMBER, nested_runs
from tests.commands import nightly
from tests.conftest import Stack
from tests.held import Gate
from tests.servers import wait_for
from tests.warm import run_warm


def study_of(stack: Stack, job: str) -> optuna.Study:
    study = last_study(job, stack.home / "studies")
    assert study is not None
    return study


def latest_run(stack: Stack, job: str) -> dict[str, object]:
    """The newest run that somebody asked for; the schedule's lie ahead."""
    return next(run for run in stack.flow_runs(job) if not run["auto_scheduled"])


def first_run(stack: Stack, job: str) -> dict[str, object]:
    return stack.flow_runs(job)[-1]


def direct_runs(stack: Stack, job: str) -> list[dict[str, object]]:
    """The runs of a job's nights by their names, which those outside the worker have too; newest first."""
    return stack.prefect("flow_runs/filter", flow_runs={"name": {"like_": f"{job} ·"}}, sort="START_TIME_DESC")


def reports_of(stack: Stack, job: str) -> list[str]:
    """What the job's nights reported in Prefect."""
    artifacts = stack.prefect("artifacts/filter", artifacts={"key": {"any_": [artifact_key("report", job)]}})
    return [str(artifact["data"]) for artifact in artifacts]


def runs_of(stack: Stack, study: optuna.Study) -> tuple[Any, list[Any]]:
    """The night's parent run and its nested runs."""
    client = MlflowClient(stack.mlflow_url)
    parent = client.get_run(study.user_attrs["mlflow_run_id"])
    return parent, list(nested_runs(client, parent.info.run_id))


def champion_alias(stack: Stack, job: str) -> Any:
    return MlflowClient(stack.mlflow_url).get_model_version_by_alias(job, "champion")


def files_with(home: Path, text: str) -> list[Path]:
    """The files that hold the text, below a home in which other tests make and delete some meanwhile."""
    files = []
    for path in home.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and text.encode() in path.read_bytes():
                files.append(path)
    return files


def promote_a_copy(store: Store, job: str) -> str:
    """Promote a copy of the champion under another manifest, as a later night would make; returns its version."""
    champion = latest_promotion(store, job)
    assert champion is not None
    with tempfile.TemporaryDirectory() as name:
        manifest = pull_version(store, job, champion.version, Path(name) / "copy")
        later = manifest.model_copy(update={"gate": {"reason": "a later night"}})
        version = publish_version(store, later, Path(name) / "copy")
    append_promotion(
        store, job, version=version, judged=champion.number, run="later", reason="later", now=datetime.now(UTC)
    )
    return version


def run_directly(
    stack: Stack, job: str, given: Mapping[str, object] = MappingProxyType({}), /, **environment: str
) -> tuple[str, str]:
    """A night outside the worker, as a plain call of the flow; returns the state's type and message."""
    script = (
        "from flows.nightly import nightly_tuning;"
        f"state = nightly_tuning({job!r}, **{dict(given)!r}, return_state=True);"
        "print(f'STATE {state.type.value} {state.message}')"
    )
    finished = run_script(stack, script, **environment)
    line = next((line for line in finished.stdout.splitlines() if line.startswith("STATE ")), None)
    assert line is not None, finished.stdout + finished.stderr
    _, kind, message = line.split(" ", 2)
    return kind, message


def run_script(stack: Stack, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program against the stack's servers, with a part of the CPU of its own: it waits for no other test's night."""
    servers = {
        CPU_PART: f"of the test {uuid.uuid4()}",
        "PREFECT_API_URL": stack.prefect_api,
        "PREFECT_HOME": str(stack.home / "prefect"),
        "MLFLOW_TRACKING_URI": stack.mlflow_url,
        "DO_NOT_TRACK": "true",
    }
    return run_warm(script, {**stack.environment, **servers, **environment})


def night_under_way(stack: Stack, job: str, gate: Gate, *, trials: int) -> optuna.Study:
    """Start a night of a job whose trials wait, and let at least so many of its study end; returns the study. The next
    trials wait."""
    nightly(stack, "run", job, "--no-follow")
    folder = stack.home / "studies"
    wait_for(lambda: (folder / job).exists() and last_study(job, folder), 300, "the night's study")
    study = study_of(stack, job)
    let_trials_end(study, gate, trials=trials)
    wait_for(lambda: study.get_trials(states=(TrialState.RUNNING,)), 300, "the next trial to begin")
    return study


def let_trials_end(study: optuna.Study, gate: Gate, *, trials: int) -> None:
    """Let trials that wait end, one after the other, until at least so many of the study are finished."""

    def are_finished() -> bool:
        gate.let_one_end(socket.gethostname())
        return len(finished_trials(study)) >= trials

    wait_for(are_finished, 300, f"{trials} trials")


def finished_of(study: optuna.Study) -> dict[int, dict[str, object]]:
    """The hyperparameters of the finished trials, by their number."""
    return {trial.number: trial.params for trial in finished_trials(study)}


def service_of(stack: Stack, name: str) -> psutil.Process:
    """The process of one of the stack's services, by its name."""
    return psutil.Process(json.loads((stack.home / f"run/{name}.json").read_text())["pid"])


def engine_of(stack: Stack, job: str) -> psutil.Process:
    """The process in which the stack's worker runs the job's newest night."""
    run = str(latest_run(stack, job)["id"])
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "prefect.engine" in process.cmdline() and process.environ().get("PREFECT__FLOW_RUN_ID") == run:
                return process
    pytest.fail(f"no process runs the night of {job}")


def cancel(stack: Stack, run: dict[str, object]) -> None:
    """What the Prefect UI's Cancel does."""
    kind = "CANCELLING" if run["state_type"] == "RUNNING" else "CANCELLED"
    stack.ask_prefect("POST", f"flow_runs/{run['id']}/set_state", {"state": {"type": kind}, "force": True})


def unfinished(stack: Stack, job: str) -> list[dict[str, object]]:
    return [run for run in stack.flow_runs(job) if run["state_type"] in ("RUNNING", "PENDING", "CANCELLING")]


def assert_the_ledgers_agree(stack: Stack, job: str) -> None:
    """Optuna, MLflow and Prefect tell the same story, and nothing is left RUNNING in any of them."""
    study = study_of(stack, job)
    assert not study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))
    parent, nested = runs_of(stack, study)
    assert parent.info.status == "FINISHED"
    tracked = [int(run.data.tags[TRIAL_NUMBER]) for run in nested]
    assert len(tracked) == len(set(tracked))
    assert set(tracked) == {trial.user_attrs["number"] for trial in study.trials if "number" in trial.user_attrs}
    for run in nested:
        made = attempts(study, int(run.data.tags[TRIAL_NUMBER]))
        assert run.data.tags[OPTUNA_NUMBER] == str(made[-1].number)
        assert run.data.tags.get(INTERRUPTIONS, "0") == str(sum(is_interrupted(trial) for trial in made))
        assert run.info.status == ("KILLED" if is_interrupted(made[-1]) else "FINISHED")
    assert not unfinished(stack, job)
