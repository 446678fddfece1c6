"""Prefect's side of a job: its deployment, the work pool, the automation that finds dead runs.

Applying twice changes nothing; a schedule that was paused by hand stays paused. Knows a flow by its entrypoint
string only, and nothing of what it does.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import (
    DeploymentScheduleCreate,
    DeploymentScheduleUpdate,
    DeploymentUpdate,
    WorkPoolCreate,
)
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, FlowRun, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.states import Crashed

ZOMBIE_AUTOMATION = "nightly-tuner: crash runs whose heartbeat stopped"
# Three missed heartbeats of 30 s (settings.py).
ZOMBIE_AFTER = timedelta(seconds=90)
SCHEDULE_SLUG = "nightly"


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What Prefect is told of a job. A run gets `parameters`; `form_defaults` are what the Run form shows for the
    others, so that a scheduled run follows the job file and a person sees what it says."""

    name: str
    entrypoint: str
    description: str
    tags: tuple[str, ...]
    cron: str | None = None
    timezone: str = "UTC"
    overlap: Literal["wait", "refuse"] = "wait"
    at_once: int | None = 1
    parameters: Mapping[str, Any]
    form_defaults: Mapping[str, Any]


ROLLBACK = Deployment(
    name="rollback",
    entrypoint="flows.rollback.rollback",
    description="Makes an earlier version of a job champion again.",
    tags=("nightly-tuner",),
    parameters={},
    form_defaults={},
)
WORKER = Deployment(
    name="worker",
    entrypoint="flows.worker.tuning_worker",
    description="Trains trials of a night on one more device; nights start it by themselves.",
    tags=("nightly-tuner",),
    at_once=None,
    parameters={},
    form_defaults={},
)


def apply_deployment(client: SyncPrefectClient, deployment: Deployment, work_pool: str) -> UUID:
    """Create or update one deployment, with at most so many runs of it at a time."""
    flow: Flow[..., Any] = load_flow_from_entrypoint(deployment.entrypoint, use_placeholder_flow=False)
    cron = deployment.cron
    schedule = None if cron is None else CronSchedule(cron=cron, timezone=deployment.timezone)
    form = form_schema(flow.parameters.model_dump(), deployment.form_defaults)
    content: dict[str, Any] = {
        "entrypoint": deployment.entrypoint,
        "description": deployment.description,
        "tags": list(deployment.tags),
        "parameters": dict(deployment.parameters),
        "enforce_parameter_schema": True,
        "concurrency_limit": deployment.at_once,
        "concurrency_options": ConcurrencyOptions(
            collision_strategy=ConcurrencyLimitStrategy.ENQUEUE
            if deployment.overlap == "wait"
            else ConcurrencyLimitStrategy.CANCEL_NEW
        ),
        "work_pool_name": work_pool,
    }
    try:
        existing = client.read_deployment_by_name(f"{flow.name}/{deployment.name}")
    except ObjectNotFound:
        return client.create_deployment(
            client.create_flow(flow),
            deployment.name,
            schedules=[DeploymentScheduleCreate(schedule=schedule, active=True, slug=SCHEDULE_SLUG)]
            if schedule
            else [],
            parameter_openapi_schema=form,
            **content,
        )
    # The schedule's `active` is left unset: an update must not wake a schedule that somebody paused.
    updates = [DeploymentScheduleUpdate(schedule=schedule, slug=SCHEDULE_SLUG)] if schedule else []
    client.update_deployment(existing.id, DeploymentUpdate(schedules=updates, **content))
    # Sent by itself: the class above drops additionalProperties.
    client.request(
        "PATCH", "/deployments/{id}", path_params={"id": existing.id}, json={"parameter_openapi_schema": form}
    )
    return existing.id


def form_schema(schema: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A flow's parameter schema as a person should meet it: `X | None` shows as a type switch in Prefect's form
    (PrefectHQ/prefect#22759), so each parameter with a default of its own becomes a plain X. An unknown parameter is
    refused, where Prefect would accept it and crash the run."""
    schema = {**copy.deepcopy(schema), "additionalProperties": False}
    for name, default in defaults.items():
        field = schema["properties"][name]
        plain = next(kind for kind in field.pop("anyOf") if kind.get("type") != "null")
        schema["properties"][name] = {**field, **plain, "default": default}
    return schema


def pause(client: SyncPrefectClient, name: str, *, paused: bool) -> None:
    """Pause a deployment's schedule, or let it go on, as the switch in Prefect's UI does. Raises ObjectNotFound where
    Prefect does not know the deployment."""
    deployment = client.read_deployment_by_name(name)
    for schedule in deployment.schedules:
        client.update_deployment_schedule(deployment.id, schedule.id, active=not paused)
    if deployment.paused and not paused:
        client.resume_deployment(deployment.id)


def later_due_run(client: SyncPrefectClient, run: FlowRun) -> FlowRun | None:
    """A run that the schedule made for a later time that is past as well: Prefect keeps every run that nobody took,
    and starts all of them once somebody does."""
    assert run.expected_start_time is not None
    due = {"after_": run.expected_start_time + timedelta(seconds=1), "before_": datetime.now(UTC)}
    kinds = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.COMPLETED]
    later = client.read_flow_runs(
        deployment_filter=DeploymentFilter.model_validate({"id": {"any_": [run.deployment_id]}}),
        flow_run_filter=FlowRunFilter.model_validate({"expected_start_time": due, "state": {"type": {"any_": kinds}}}),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
    )
    return next((other for other in later if other.auto_scheduled), None)


def runs_tagged(client: SyncPrefectClient, tag: str, *states: StateType) -> list[FlowRun]:
    """The flow runs with a tag that are in one of the states."""
    wanted = {"tags": {"all_": [tag]}, "state": {"type": {"any_": list(states)}}}
    return client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted))


def artifact_key(kind: str, job_name: str) -> str:
    """The key of a job's report or progress among Prefect's artifacts, which takes letters, digits and dashes only."""
    return f"{kind}-{re.sub('[._]', '-', job_name)}"


def apply_work_pool(client: SyncPrefectClient, name: str) -> None:
    """Create the process work pool unless it is there."""
    try:
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    except ObjectAlreadyExists:
        return


def apply_zombie_automation(client: SyncPrefectClient) -> None:
    """Let Prefect mark a run crashed when its heartbeat stops (docs.prefect.io, "Detect zombie flows"): where a worker
    dies with its run, the run stays RUNNING otherwise and keeps every later night of the job waiting."""
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    heartbeat = "prefect.flow-run.heartbeat"
    automation = AutomationCore(
        name=ZOMBIE_AUTOMATION,
        description="Marks a flow run as crashed when three heartbeats in a row are missing.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            after={heartbeat},
            expect={heartbeat, *ends},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=ZOMBIE_AFTER,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="Its heartbeat stopped: the process is gone.")],
    )
    existing = client.read_automations_by_name(ZOMBIE_AUTOMATION)
    if existing:
        client.update_automation(existing[0].id, automation)
    else:
        client.create_automation(automation)


def crash_dead_runs(
    client: SyncPrefectClient, deployment_name: str, *, states: tuple[StateType, ...], spare: UUID | None = None
) -> list[str]:
    """Mark a deployment's runs in these states as crashed, but for the spared one; returns their names.

    Only right for a caller who knows that their processes are gone.
    """
    runs = client.read_flow_runs(
        deployment_filter=DeploymentFilter.model_validate({"name": {"any_": [deployment_name]}}),
        flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": list(states)}}}),
    )
    dead = [run for run in runs if run.id != spare]
    for run in dead:
        client.set_flow_run_state(run.id, Crashed(message="Its process is gone."), force=True)
    return [run.name for run in dead]
