"""Servers that others use too: whatever is theirs is the same before and after everything that we do there."""

import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.schemas.automations import AutomationCore, EventTrigger

from infra import deployments as deploy
from infra.errors import NotOurs
from infra.ours import FLOWS, ZOMBIE_AUTOMATION, ZOMBIE_DESCRIPTION
from infra.settings import MARK, Settings
from infra.stack.supervisor import is_prefect_ours
from infra.store.opening import open_store
from tasks.registry.log import Promotion, latest_promotion
from tests.commands import nightly
from tests.conftest import Stack, make_stack
from tests.nights import promote_a_copy, run_directly
from tests.servers import answers, background, wait_for
from tests.strangers import StrangersPrefect, mlflow_objects, move_into_mlflow, their_automation

JOB = "shared"  # others have an experiment, a model and a deployment of that name
CLASHING = "clashing"  # and of this one, which the job does not avoid


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Servers that `nightly` did not start, and its environment there."""
    stack = make_stack(tmp_path_factory.mktemp("strangers"))
    folder = stack.home.parent
    environment = {
        **stack.environment,
        "PREFECT_API_URL": stack.prefect_api,
        "MLFLOW_TRACKING_URI": stack.mlflow_url,
    }
    elsewhere = f"tracking: {{experiment: {JOB} nights, model: {JOB} champion}}\n"
    for name, tracking in ((JOB, elsewhere), (CLASHING, "")):
        (Path(environment["NIGHTLY_JOBS"]) / f"{name}.yaml").write_text(
            f"name: {name}\n"
            "data: {source: 'sklearn://iris'}\n"
            "search: {pruner: none, space: {epochs: 2, batch_size: 64, width: 16, depth: 1}}\n"
            "budget: {trials: 2}\n"
            "confirm: {candidates: 1, seeds: 2}\n" + tracking
        )
    prefect = [sys.executable, "-m", "prefect", "server", "start", "--port", environment["NIGHTLY_PREFECT_PORT"]]
    mlflow = [
        sys.executable, "-m", "mlflow", "server", "--port", environment["NIGHTLY_MLFLOW_PORT"], "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'theirs.db'}",
        "--artifacts-destination", (folder / "artifacts").as_uri(),
    ]  # fmt: skip
    quiet = {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "DO_NOT_TRACK": "1",
        # The server itself ends a run that has been CANCELLING for five minutes, which a slow machine takes for this.
        "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_CANCELLING_TIMEOUT_SECONDS": "36000",
    }
    with (
        background(prefect, folder / "prefect.log", **quiet),
        background(mlflow, folder / "mlflow.log", **quiet) as mlflow_server,
    ):
        wait_for(lambda: answers(f"{stack.prefect_api}/health"), 120, "Prefect")
        wait_for(lambda: answers(f"{stack.mlflow_url}/health"), 120, "MLflow")
        yield Stack(home=stack.home, environment=environment)
        os.killpg(mlflow_server.pid, signal.SIGKILL)  # it takes half a minute to end by itself


@pytest.fixture(scope="module")
def theirs(stack: Stack) -> Iterator[StrangersPrefect]:
    with httpx.Client(base_url=f"{stack.prefect_api}/", timeout=60) as http:
        yield StrangersPrefect(http)


@pytest.fixture
def client(stack: Stack) -> Iterator[SyncPrefectClient]:
    with SyncPrefectClient(stack.prefect_api) as client:
        yield client


def test_what_bears_one_of_our_names_is_refused(theirs: StrangersPrefect, client: SyncPrefectClient) -> None:
    """On a server where nothing is ours yet; each stands there for the time of its check."""

    def refused(says: str, work_pool: str = "local") -> None:
        before = theirs.objects()
        with pytest.raises(NotOurs, match=says):
            deploy.check_server(client, work_pool, on_own_server=False)
        assert theirs.objects() == before

    for kind in ("docker", "process", "kubernetes"):
        theirs.make("work_pools/", name="local", type=kind)
        refused(f"work pool local .* found None and type {kind}.*NIGHTLY_WORK_POOL")
        theirs.ask("DELETE", "work_pools/local")
    automation = theirs.make("automations/", **their_automation(ZOMBIE_AUTOMATION))
    refused("the automation .* must have the tag nightly-tuner")
    theirs.ask("DELETE", f"automations/{automation}")
    for name in FLOWS:
        flow = theirs.make("flows/", name=name, tags=["nightly"])
        refused(f"the flow {name} .* must have the tag nightly-tuner, found \\['nightly'\\]")
        theirs.make("deployments/", flow_id=flow, name="rollback", entrypoint="theirs.py:flow", tags=["nightly-tuner"])
        refused(f"the flow {name}")
        theirs.ask("DELETE", f"flows/{flow}")
    flow = theirs.make("flows/", name=deploy.ROLLBACK.flow, tags=["nightly-tuner"])
    theirs.make("deployments/", flow_id=flow, name="rollback", entrypoint="theirs.py:flow", tags=["nightly-tuner"])
    refused(
        "the deployment nightly_rollback/rollback .* found tags \\['nightly-tuner'\\] and entrypoint 'theirs.py:flow'"
    )
    theirs.ask("DELETE", f"flows/{flow}")
    deploy.check_server(client, "local", on_own_server=False)


def test_what_an_earlier_version_made_is_ours_and_gets_the_mark(
    stack: Stack, theirs: StrangersPrefect, client: SyncPrefectClient
) -> None:
    assert not is_prefect_ours(Settings(home=stack.home, prefect_port=int(stack.environment["NIGHTLY_PREFECT_PORT"])))
    theirs.make("work_pools/", name="local", type="process")
    theirs.make("work_pools/", name="elsewhere", type="docker")
    flow = theirs.make("flows/", name="nightly_worker")  # a plain call makes it
    deploy.check_server(client, "local", on_own_server=True)
    with pytest.raises(NotOurs):
        deploy.check_server(client, "elsewhere", on_own_server=True)
    theirs.ask("DELETE", f"flows/{flow}")
    for former, name, flow in (
        ("nightly_tuning", "digits-mlp", "nightly_tuning"),
        ("rollback", "rollback", "nightly_rollback"),
        ("tuning_worker", "worker", "nightly_worker"),
    ):
        theirs.make(
            "deployments/", flow_id=theirs.make("flows/", name=former), name=name, entrypoint=FLOWS[flow], tags=[MARK],
            work_pool_name="local",
        )  # fmt: skip
    earlier = {**their_automation(ZOMBIE_AUTOMATION), "description": ZOMBIE_DESCRIPTION, "enabled": False}
    automation = theirs.make("automations/", **earlier)
    apply_what_is_shared(client)
    assert_only_our_worker_runs_are_found(theirs, client)
    assert MARK in str(client.read_work_pool("local").description)
    assert {MARK} == {tag for name in FLOWS for tag in client.read_flow_by_name(name).tags}
    (kept,) = client.read_automations_by_name(ZOMBIE_AUTOMATION)
    assert (str(kept.id), kept.enabled, kept.tags) == (automation, False, [MARK])
    deployments = {deployment.name: deployment for deployment in client.read_deployments()}
    assert len(client.read_deployments()) == len(deployments) == 3
    assert str(deployments["worker"].flow_id) == str(client.read_flow_by_name("nightly_worker").id)
    theirs.ask("PATCH", f"automations/{automation}", {"enabled": True})


def assert_only_our_worker_runs_are_found(theirs: StrangersPrefect, client: SyncPrefectClient) -> None:
    """Of all runs that carry the name of a study as a tag."""
    worker = client.read_flow_by_name(deploy.WORKER.flow).id
    runs = {
        name: theirs.make("flow_runs/", flow_id=str(flow), tags=tags, state={"type": "PENDING"})
        for name, flow, tags in (
            ("ours", worker, [MARK, "a study"]),
            ("of another study", worker, [MARK, "another study"]),
            ("in our flow by somebody else", worker, ["a study"]),
            ("of another flow", theirs.make("flows/", name="their_workers"), [MARK, "a study"]),
        )
    }
    found = deploy.worker_runs(client, "a study", StateType.PENDING)
    assert [str(run.id) for run in found] == [runs["ours"]]


def apply_what_is_shared(client: SyncPrefectClient) -> None:
    deploy.check_server(client, "local", on_own_server=False)
    deploy.apply_work_pool(client, "local", on_own_server=False, runs_here=True)
    deploy.apply_shared_deployments(client, "local")


def test_a_house_full_of_theirs_is_the_same_after_all_that_we_do(
    stack: Stack, theirs: StrangersPrefect, client: SyncPrefectClient
) -> None:
    apply_what_is_shared(client)
    already_there = theirs.objects().keys()
    theirs.move_in(JOB)
    theirs.deploy_in("nightly_tuning", CLASHING)
    mlflow = MlflowClient(stack.mlflow_url)
    for name in (JOB, CLASHING):
        move_into_mlflow(mlflow, name)
    before = {key: each for key, each in theirs.objects().items() if key not in already_there}, mlflow_objects(mlflow)
    up = stack.nightly("up", ok=False)
    assert (up.returncode, up.stderr.count("\n")) == (1, 1)
    assert f"the deployment nightly_tuning/{CLASHING} of the Prefect server" in up.stderr
    assert "worker is up" in up.stdout
    for command in ("run", "pause"):
        assert "so it is somebody else's; rename the job" in nightly(stack, command, CLASHING, ok=False).stderr
    assert "✓ promote" in stack.nightly("run", JOB).stdout
    promote_a_copy(open_store((stack.home / "store").as_uri()), JOB)
    stack.nightly("rollback", JOB, "--reason", "it disappoints")
    champion = str(latest(stack).version)

    def alias() -> str:
        return str(mlflow.get_model_version_by_alias(f"{JOB} champion", "champion").tags["store_version"])

    wait_for(lambda: alias() == champion, 120, "the alias to follow")
    nightly(stack, "pause", JOB)
    settled = stack.nightly("reconcile", ok=False)
    assert (settled.returncode, settled.stdout.count("\n")) == (1, 3), settled.stdout  # all jobs but the clashing one
    assert f"name another one by tracking.experiment in the job {CLASHING}" in settled.stderr
    nightly(stack, "gc")
    kind, message = run_directly(stack, CLASHING)
    assert (kind, "name another one by tracking.experiment in the job clashing" in message) == ("FAILED", True)
    assert not (stack.home / "studies" / CLASHING).exists()
    stack.nightly("down")
    after = theirs.objects(), mlflow_objects(mlflow)
    for then, now in zip(before, after, strict=True):
        assert {key: now.get(key) for key in then} == then
    ours = [
        {key: now[key] for key in now.keys() - then.keys() - already_there}
        for then, now in zip(before, after, strict=True)
    ]
    assert {kind for kind, _ in ours[0]} <= {
        "flow runs", "task runs", "deployments", "artifacts", "latest artifacts", "limits", "logs",
    }  # fmt: skip
    runs = [each["id"] for (kind, _), each in ours[0].items() if kind == "flow runs" and MARK in each["tags"]]
    for (kind, _), each in ours[0].items():
        if kind in ("flow runs", "deployments"):
            assert MARK in each["tags"] or each["deployment_id"] is None  # a plain call's
        if kind.endswith("artifacts"):
            assert each["key"].startswith(f"{MARK}-")
            assert each["flow_run_id"] in runs
        if kind == "limits":
            assert each["name"].startswith("deployment:")
    experiment = mlflow.get_experiment_by_name(f"{JOB} nights")
    assert experiment is not None
    assert (experiment.tags[MARK], mlflow.get_registered_model(f"{JOB} champion").tags[MARK]) == (JOB, JOB)
    for (kind, name), each in ours[1].items():
        place = each["info"]["experiment_id"] if kind == "runs" else name.split(" ")[:2]
        assert place in (experiment.experiment_id, [experiment.experiment_id], [JOB, "champion"])


def latest(stack: Stack) -> Promotion:
    promotion = latest_promotion(open_store((stack.home / "store").as_uri()), JOB)
    assert promotion is not None
    return promotion


def test_the_automation_finds_our_dead_runs_alone(
    stack: Stack, theirs: StrangersPrefect, client: SyncPrefectClient
) -> None:
    """With ten seconds in place of ninety, which is Prefect's least."""
    apply_what_is_shared(client)
    (automation,) = client.read_automations_by_name(ZOMBIE_AUTOMATION)
    assert isinstance(automation.trigger, EventTrigger)
    automation.trigger.within = timedelta(seconds=10)
    client.update_automation(
        automation.id, AutomationCore.model_validate(automation.model_dump(exclude={"id", "owner_resource"}))
    )
    ours = client.read_flow_by_name("nightly_tuning").id
    foreign = theirs.make("flows/", name="their_training")
    runs = {
        name: theirs.make("flow_runs/", flow_id=str(flow), tags=tags, name=name, state={"type": "RUNNING"})
        for name, flow, tags in (
            ("of another flow", foreign, []),
            ("of another flow with our tag", foreign, [MARK]),
            ("in our flow by somebody else", ours, ["prod"]),
            ("ours", ours, [MARK, "mlp"]),
        )
    }
    for run in runs.values():
        theirs.beat(run)
    wait_for(lambda: theirs.state(runs["ours"]) == "CRASHED", 120, "the automation")
    assert {name for name, run in runs.items() if theirs.state(run) != "RUNNING"} == {"ours"}
