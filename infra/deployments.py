"""Prefect's side of a job: its deployment, the work pool, the automation that finds dead runs.

Applying twice changes nothing; a schedule that was paused by hand stays paused, and so does the automation. What bears
one of our names and is somebody else's is refused (ours.py). Knows a flow by its name and entrypoint string only, and
nothing of what it does.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
    WorkPoolUpdate,
)
from prefect.client.schemas.filters import DeploymentFilter, FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, FlowRun, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.states import Crashed

from infra.errors import ExpectedError, NotOurs
from infra.ours import (
    FLOWS,
    ZOMBIE_AUTOMATION,
    ZOMBIE_DESCRIPTION,
    check_flow,
    our_automation,
    our_deployment,
    our_work_pool,
)
from infra.settings import MARK

# Three missed heartbeats of 30 s (settings.py).
ZOMBIE_AFTER = timedelta(seconds=90)
SCHEDULE_SLUG = "nightly"
POOL_DESCRIPTION = f"{MARK}: runs nights and the workers of their searches"
# What earlier versions called two of them.
FORMER_NAMES = ("rollback/rollback", "tuning_worker/worker")


class WrongPool(ExpectedError):
    """The work pool's runs are run by something else than processes of this machine."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What Prefect is told of a job. A run gets `parameters`; `form_defaults` are what the Run form shows for the
    others, so that a scheduled run follows the job file and a person sees what it says."""

    flow: str
    name: str
    description: str
    tags: tuple[str, ...] = ()
    cron: str | None = None
    timezone: str = "UTC"
    overlap: Literal["wait", "refuse"] = "wait"
    at_once: int | None = 1
    parameters: Mapping[str, Any]
    form_defaults: Mapping[str, Any]

    @property
    def path(self) -> str:
        """Its name in Prefect, which finds it by this."""
        return f"{self.flow}/{self.name}"


ROLLBACK = Deployment(
    flow="nightly_rollback",
    name="rollback",
    description="Makes an earlier version of a job champion again.",
    parameters={},
    form_defaults={},
)
WORKER = Deployment(
    flow="nightly_worker",
    name="worker",
    description="Trains trials of a night on one more device; nights start it by themselves.",
    at_once=None,
    parameters={},
    form_defaults={},
)


def load_flows() -> None:
    """Import our flows, of which each deployment says what it takes."""
    for entrypoint in FLOWS.values():
        load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)


def apply_deployment(client: SyncPrefectClient, deployment: Deployment, work_pool: str) -> UUID:
    """Create or update one deployment, with at most so many runs of it at a time. Raises NotOurs."""
    entrypoint = FLOWS[deployment.flow]
    flow: Flow[..., Any] = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    cron = deployment.cron
    schedule = None if cron is None else CronSchedule(cron=cron, timezone=deployment.timezone)
    form = form_schema(flow.parameters.model_dump(), deployment.form_defaults)
    content: dict[str, Any] = {
        "entrypoint": entrypoint,
        "description": deployment.description,
        "tags": [MARK, *deployment.tags],
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
        existing = our_deployment(client, deployment.path)
    except ObjectNotFound:
        return client.create_deployment(
            client.create_flow_from_name(deployment.flow),
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
    Prefect does not know the deployment, NotOurs."""
    deployment = our_deployment(client, name)
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


def worker_runs(client: SyncPrefectClient, study: str, *states: StateType) -> list[FlowRun]:
    """The runs of the worker flow for a study, whose name is their tag, that are in one of the states."""
    wanted = {"tags": {"all_": [MARK, study]}, "state": {"type": {"any_": list(states)}}}
    return client.read_flow_runs(
        flow_filter=FlowFilter.model_validate({"name": {"any_": [WORKER.flow]}}),
        flow_run_filter=FlowRunFilter.model_validate(wanted),
    )


def artifact_key(kind: str, job_name: str) -> str:
    """The key of a job's report or progress among Prefect's artifacts, which takes letters, digits and dashes only."""
    return f"{MARK}-{kind}-{re.sub('[._]', '-', job_name)}"


def check_server(client: SyncPrefectClient, work_pool: str, *, on_own_server: bool) -> None:
    """Raises NotOurs where something of the server that all jobs share bears one of our names and is somebody
    else's: before anything is applied. On the server that `nightly up` starts our flows are ours, whoever else has
    deployed or called them."""
    our_work_pool(client, work_pool, on_own_server=on_own_server)
    our_automation(client)
    for name in () if on_own_server else FLOWS:
        check_flow(client, name)
    for deployment in (ROLLBACK, WORKER):
        with suppress(ObjectNotFound):
            our_deployment(client, deployment.path)


def apply_work_pool(client: SyncPrefectClient, name: str, *, on_own_server: bool, runs_here: bool) -> None:
    """Create the process work pool, or mark the one that is there and ours. Raises NotOurs, and WrongPool where a
    worker of this machine is to take runs from a pool of another type."""
    pool = our_work_pool(client, name, on_own_server=on_own_server)
    if pool is None:
        with suppress(ObjectAlreadyExists):  # of two machines at once
            client.create_work_pool(WorkPoolCreate(name=name, type="process", description=POOL_DESCRIPTION))
        return
    if runs_here and pool.type != "process":
        raise WrongPool(
            f"a work pool whose runs this machine runs must be of type process, found type {pool.type} of the pool "
            f"{name}; name another one by NIGHTLY_WORK_POOL, or let `nightly apply` apply the deployments alone"
        )
    if MARK not in (pool.description or ""):
        description = " ".join(filter(None, [pool.description, POOL_DESCRIPTION]))
        client.update_work_pool(name, WorkPoolUpdate(description=description))


def apply_shared_deployments(client: SyncPrefectClient, work_pool: str) -> None:
    """What all jobs share: the deployments of the worker and of the rollback, and the automation, for our flows."""
    for deployment in (ROLLBACK, WORKER):
        apply_deployment(client, deployment, work_pool)
    for name in FORMER_NAMES:
        with suppress(ObjectNotFound, NotOurs):
            client.delete_deployment(our_deployment(client, name).id)
    apply_zombie_automation(client, [_marked_flow(client, name) for name in FLOWS])


def _marked_flow(client: SyncPrefectClient, name: str) -> UUID:
    flow_id = client.create_flow_from_name(name)  # which gives the one that is there
    tags = client.read_flow(flow_id).tags
    if MARK not in tags:
        client.request("PATCH", "/flows/{id}", path_params={"id": flow_id}, json={"tags": [*tags, MARK]})
    return flow_id


def apply_zombie_automation(client: SyncPrefectClient, flows: Sequence[UUID]) -> None:
    """Let Prefect mark a run of our flows crashed when its heartbeat stops (docs.prefect.io, "Detect zombie flows"):
    where a worker dies with its run, the run stays RUNNING otherwise and keeps every later night of the job waiting.
    It must be a run of our deployments too, which have our tag: others may have a flow of the same name."""
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    heartbeat = "prefect.flow-run.heartbeat"
    existing = our_automation(client)
    ours: list[dict[str, str | list[str]]] = [
        {"prefect.resource.role": "flow", "prefect.resource.id": [f"prefect.flow.{flow}" for flow in flows]},
        {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{MARK}"},
    ]
    automation = AutomationCore(
        name=ZOMBIE_AUTOMATION,
        description=ZOMBIE_DESCRIPTION,
        tags=[MARK],
        enabled=existing is None or existing.enabled,
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=[ResourceSpecification(labels) for labels in ours],
            after={heartbeat},
            expect={heartbeat, *ends},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=ZOMBIE_AFTER,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="Its heartbeat stopped: the process is gone.")],
    )
    if existing is None:
        client.create_automation(automation)
    else:
        client.update_automation(existing.id, automation)


def crash_dead_runs(
    client: SyncPrefectClient, deployment_name: str, *, states: tuple[StateType, ...], spare: UUID | None = None
) -> list[str]:
    """Mark the runs in these states of a deployment of ours (flow/deployment) as crashed, but for the spared one;
    returns their names, none where there is no such deployment.

    Only right for a caller who knows that their processes are gone.
    """
    try:
        deployment = our_deployment(client, deployment_name)
    except (ObjectNotFound, NotOurs):
        return []
    runs = client.read_flow_runs(
        deployment_filter=DeploymentFilter.model_validate({"id": {"any_": [deployment.id]}}),
        flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": list(states)}}}),
    )
    dead = [run for run in runs if run.id != spare]
    for run in dead:
        client.set_flow_run_state(run.id, Crashed(message="Its process is gone."), force=True)
    return [run.name for run in dead]
