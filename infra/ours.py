"""Which objects of a Prefect server are ours. Others may use the server too, so nothing is changed that lacks our mark.

The mark is the tag `nightly-tuner` (of a deployment with our entrypoint, of a flow, of the automation), or that word in
the description of a work pool, which has no tags. What an earlier version made lacks some marks and is recognised by
what else is ours in it. Each check only reads; whatever is found without the mark raises NotOurs.
"""

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, WorkPoolFilter
from prefect.client.schemas.objects import WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.schemas.automations import Automation
from prefect.exceptions import ObjectNotFound

from infra.errors import NotOurs
from infra.settings import MARK

ZOMBIE_AUTOMATION = f"{MARK}: crash runs whose heartbeat stopped"
ZOMBIE_DESCRIPTION = "Marks a flow run as crashed when three heartbeats in a row are missing."
# By their names, which no other project's flow should bear by chance.
FLOWS = {
    "nightly_tuning": "flows.nightly.nightly_tuning",
    "nightly_worker": "flows.worker.tuning_worker",
    "nightly_rollback": "flows.rollback.rollback",
}
LEFT = "nothing was changed"


def our_deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse:
    """The deployment of that name (flow/deployment). Raises ObjectNotFound where there is none, NotOurs."""
    deployment = client.read_deployment_by_name(name)
    if not _is_ours(deployment):
        raise NotOurs(
            f"the deployment {name} of the Prefect server {client.api_url} must have the tag {MARK} and an entrypoint "
            f"of ours, found tags {deployment.tags} and entrypoint {deployment.entrypoint!r}, so it is somebody "
            f"else's; rename the job, or delete that deployment if nothing needs it; {LEFT}"
        )
    return deployment


def check_flow(client: SyncPrefectClient, name: str) -> None:
    """Raises NotOurs where a flow of that name is not ours: our runs would be shown among its runs."""
    named = FlowFilter.model_validate({"name": {"any_": [name]}})
    flows = client.read_flows(flow_filter=named)
    if not flows or MARK in flows[0].tags:
        return
    deployments = client.read_deployments(flow_filter=named)
    # An earlier version gave its flows no tag, and made each together with a deployment.
    if not deployments or not all(map(_is_ours, deployments)):
        raise NotOurs(
            f"the flow {name} of the Prefect server {client.api_url} must have the tag {MARK}, found "
            f"{flows[0].tags}, so it is somebody else's; use another server (PREFECT_API_URL), or delete that flow if "
            f"nothing needs it; {LEFT}"
        )


def our_work_pool(client: SyncPrefectClient, name: str, *, on_own_server: bool) -> WorkPool | None:
    """The work pool of that name, None where there is none. Raises NotOurs: a worker of ours would run whatever
    others submit to it. On the server that `nightly up` starts a process pool needs no mark."""
    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        return None
    if MARK in (pool.description or ""):
        return pool
    if pool.type == "process":
        if on_own_server:
            return pool
        named = WorkPoolFilter.model_validate({"name": {"any_": [name]}})
        deployments = client.read_deployments(work_pool_filter=named)
        if deployments and all(map(_is_ours, deployments)):  # an earlier version made it
            return pool
    raise NotOurs(
        f"the description of the work pool {name} of the Prefect server {client.api_url} must hold {MARK}, found "
        f"{pool.description!r} and type {pool.type}, so it is somebody else's; name another one by NIGHTLY_WORK_POOL, "
        f"or say that it is for nights (prefect work-pool update {name} --description {MARK}); {LEFT}"
    )


def our_automation(client: SyncPrefectClient) -> Automation | None:
    """The automation that finds dead runs, None where there is none. Raises NotOurs."""
    named = client.read_automations_by_name(ZOMBIE_AUTOMATION)
    for automation in named:
        # An earlier version gave it no tag.
        if MARK in automation.tags or automation.description == ZOMBIE_DESCRIPTION:
            return automation
    if named:
        raise NotOurs(
            f"the automation {ZOMBIE_AUTOMATION!r} of the Prefect server {client.api_url} must have the tag {MARK}, "
            f"found {named[0].tags}, so somebody else made or altered it; rename it there; {LEFT}"
        )
    return None


def _is_ours(deployment: DeploymentResponse) -> bool:
    return MARK in deployment.tags and deployment.entrypoint in FLOWS.values()
