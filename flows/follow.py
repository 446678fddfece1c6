"""Start a night through its Prefect deployment and show in the terminal how it goes.

Everything shown is read from Prefect's API, so it is what the UI shows; following starts and stops nothing.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from rich.console import Console
from rich.markdown import Markdown

from infra.deploy import artifact_key
from infra.errors import ExpectedError
from infra.settings import Settings

POLL_SECONDS = 1.0
PLAIN_PROGRESS_SECONDS = 10.0
WORKER_PATIENCE_SECONDS = 45.0


class NightFailed(ExpectedError):
    """The night could not be started, or did not complete; the message is the night's own."""


def submit_night(settings: Settings, deployment: str, parameters: Mapping[str, Any]) -> FlowRun:
    """Ask Prefect to run the deployment now. Raises NightFailed where Prefect does not answer or does not know it."""
    try:
        night = run_deployment(deployment, parameters=dict(parameters), timeout=0, as_subflow=False)
    except httpx.TransportError as error:
        raise NightFailed(
            f"no Prefect server answers at {settings.prefect_api_url}; start one with `nightly up`"
        ) from error
    except ObjectNotFound as error:
        raise NightFailed(f"Prefect knows no deployment {deployment!r}; apply it with `nightly up`") from error
    return cast(FlowRun, night)


def follow_night(settings: Settings, night: FlowRun, job: str, console: Console) -> None:
    """Show each step as it ends and the trials as they come, then the report.

    Raises NightFailed where the night does not complete, or Prefect stops answering. Ctrl-C ends the following and
    leaves the night running.
    """
    try:
        with get_client(sync_client=True) as client:
            ended = _watch(client, night.id, job, console)
            assert ended.state is not None
            if not ended.state.is_completed():
                raise NightFailed(ended.state.message or f"the night ended as {ended.state.name}")
            report = _artifact(client, night.id, artifact_key("report", job))
    except httpx.TransportError as error:
        raise NightFailed(
            f"Prefect stopped answering at {settings.prefect_api_url}; the night may go on: see `nightly status`"
        ) from error
    except KeyboardInterrupt:
        console.print(f"the night goes on: {settings.prefect_page}/runs/flow-run/{night.id} (cancel it there)")
        raise
    if report is not None:
        console.print(Markdown(str(report.data)) if console.is_terminal else str(report.data))


def pages(settings: Settings, night: FlowRun, job: str) -> str:
    """The two pages to open: the night in Prefect, and the job's nights and trials in MLflow."""
    by_name = f"{settings.mlflow_url}/api/2.0/mlflow/experiments/get-by-name"
    try:
        found = httpx.get(by_name, params={"experiment_name": job}).raise_for_status()
        mlflow_page = settings.mlflow_page(found.json()["experiment"]["experiment_id"])
    except httpx.HTTPError:  # MLflow went away in the night, which is no reason to fail now
        mlflow_page = settings.mlflow_url
    return f"Prefect {settings.prefect_page}/runs/flow-run/{night.id}\nMLflow  {mlflow_page}"


def _watch(client: SyncPrefectClient, night_id: UUID, job: str, console: Console) -> FlowRun:
    shown: set[UUID] = set()
    began = said_at = time.monotonic()
    said, warned = "", False
    # A spinner with the latest news on a terminal, a plain line now and then elsewhere.
    with console.status("") if console.is_terminal else nullcontext() as live:
        while True:
            night = client.read_flow_run(night_id)
            for step in _steps(client, night_id):
                if step.id not in shown and step.state is not None and step.state.is_final():
                    shown.add(step.id)
                    console.print(_ended(step), markup=False)
            assert night.state is not None
            if night.state.is_final():
                return night
            news = _news(client, night, job)
            if live is not None:
                live.update(news)
            elif news != said and time.monotonic() - said_at >= PLAIN_PROGRESS_SECONDS:
                said, said_at = news, time.monotonic()
                console.print(news, markup=False)
            if night.state.is_scheduled() and not warned and time.monotonic() - began > WORKER_PATIENCE_SECONDS:
                warned = True
                console.print("no worker has taken the night yet: another one may be running, or see `nightly status`")
            time.sleep(POLL_SECONDS)


def _steps(client: SyncPrefectClient, night_id: UUID) -> list[TaskRun]:
    steps = client.read_task_runs(flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [night_id]}}))
    return sorted(steps, key=lambda step: (step.start_time is None, step.start_time))


def _ended(step: TaskRun) -> str:
    assert step.state is not None
    mark = "✓" if step.state.is_completed() else "✗"
    return f"{mark} {step.name}  {step.total_run_time.total_seconds():.1f} s"


def _news(client: SyncPrefectClient, night: FlowRun, job: str) -> str:
    assert night.state is not None
    progress = _artifact(client, night.id, artifact_key("progress", job))
    return f"{night.state.name}: {progress.description}" if progress is not None else str(night.state.name)


def _artifact(client: SyncPrefectClient, night_id: UUID, key: str) -> Any:
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter.model_validate({"key": {"any_": [key]}}),
        flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [night_id]}}),
    )
    return found[-1] if found else None
