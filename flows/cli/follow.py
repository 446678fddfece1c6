"""Start a night through its Prefect deployment and show in the terminal how it goes.

Everything shown is read from Prefect's API, so it is what the UI shows; following starts and stops nothing.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from rich import progress
from rich.console import Console

from flows.cli.markdown import show
from infra.deployments import artifact_key
from infra.errors import ExpectedError
from infra.ours import our_deployment
from infra.settings import Settings

POLL_SECONDS = 1.0
PLAIN_PROGRESS_SECONDS = 10.0
WORKER_PATIENCE_SECONDS = 45.0


class NightFailed(ExpectedError):
    """The night could not be started, or did not complete; the message is the night's own."""


@contextmanager
def prefect_answers(settings: Settings, deployment: str) -> Iterator[None]:
    """Raises NightFailed where Prefect does not answer, or does not know the deployment."""
    try:
        yield
    except httpx.TransportError as error:
        raise NightFailed(
            f"no Prefect server answers at {settings.prefect_api_url}; start one with `nightly up`"
        ) from error
    except ObjectNotFound as error:
        raise NightFailed(f"Prefect knows no deployment {deployment!r}; apply it with `nightly up`") from error


def submit_night(settings: Settings, deployment: str, parameters: Mapping[str, Any]) -> FlowRun:
    """Ask Prefect to run the deployment now. Raises NightFailed where Prefect does not answer or does not know it,
    NotOurs."""
    with prefect_answers(settings, deployment):
        with get_client(sync_client=True) as client:
            deployed = our_deployment(client, deployment).id
        return cast(FlowRun, run_deployment(deployed, parameters=dict(parameters), timeout=0, as_subflow=False))


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
        console.print(f"the night goes on: {settings.night_page(night.id)} (cancel it there)")
        raise
    if report is not None:
        summary, _, _ = str(report.data).partition("\n## ")  # what follows is for whoever opens the report
        console.print()
        show(summary, console)


def _watch(client: SyncPrefectClient, night_id: UUID, job: str, console: Console) -> FlowRun:
    view = _Live(console) if console.is_terminal else _Lines(console)
    shown: set[UUID] = set()
    began = time.monotonic()
    warned = False
    with view:
        while True:
            night = client.read_flow_run(night_id)
            steps = _steps(client, night_id)
            for step in steps:
                if step.id not in shown and step.state is not None and step.state.is_final():
                    shown.add(step.id)
                    console.print(_ended(step))
            assert night.state is not None
            if night.state.is_final():
                return night
            under_way = next((step.name for step in steps if step.id not in shown), str(night.state.name))
            is_tuning = under_way.startswith("tune")
            found = _artifact(client, night_id, artifact_key("progress", job)) if is_tuning else None
            view.update(under_way, found)
            if night.state.is_scheduled() and not warned and time.monotonic() - began > WORKER_PATIENCE_SECONDS:
                warned = True
                console.print("no worker has taken the night yet: another one may be running, or see `nightly status`")
            time.sleep(POLL_SECONDS)


class _Live:
    """On a terminal: the step that runs, how far its trials are, the best of them, what is left, how busy the device
    is; below the steps that ended."""

    def __init__(self, console: Console) -> None:
        self._live = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.fields[news]}"),
            progress.TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._live.add_task("", total=None, news="")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, step: str, found: Any) -> None:
        if found is not None:
            self._live.update(self._task, description=step, completed=found.data, total=100, news=found.description)
        else:
            self._live.update(self._task, description=step, total=None, news="")


class _Lines:
    """Elsewhere, as in a log: a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said, self._said_at = "", time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put away."""

    def update(self, step: str, found: Any) -> None:
        news = step if found is None else f"{step}: {found.description}"
        if news != self._said and time.monotonic() - self._said_at >= PLAIN_PROGRESS_SECONDS:
            self._said, self._said_at = news, time.monotonic()
            self._console.print(news)


def _steps(client: SyncPrefectClient, night_id: UUID) -> list[TaskRun]:
    steps = client.read_task_runs(flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [night_id]}}))
    return sorted(steps, key=lambda step: (step.start_time is None, step.start_time))


def _ended(step: TaskRun) -> str:
    assert step.state is not None
    mark = "✓" if step.state.is_completed() else "✗"
    return f"{mark} {step.name}  {step.total_run_time.total_seconds():.1f} s"


def _artifact(client: SyncPrefectClient, night_id: UUID, key: str) -> Any:
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter.model_validate({"key": {"any_": [key]}}),
        flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [night_id]}}),
    )
    return found[-1] if found else None
