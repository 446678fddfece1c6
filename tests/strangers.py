"""Servers that others use: houses full of their objects, and what stands in them, read through the servers' API."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, ViewType

from tests.servers import wait_for

# What a server makes of time and of signs of life by itself.
FLEETING = {
    "created", "updated", "last_polled", "status", "estimated_run_time", "estimated_start_time_delta", "last_activity",
}  # fmt: skip
LISTS = {
    "flows": "flows/filter",
    "flow runs": "flow_runs/filter",
    "task runs": "task_runs/filter",
    "deployments": "deployments/filter",
    "work pools": "work_pools/filter",
    "work queues": "work_queues/filter",
    "automations": "automations/filter",
    "variables": "variables/filter",
    "blocks": "block_documents/filter",
    "limits of tags": "concurrency_limits/filter",
    "limits": "v2/concurrency_limits/filter",
    "artifacts": "artifacts/filter",
    "latest artifacts": "artifacts/latest/filter",
    "logs": "logs/filter",
}

Objects = dict[tuple[str, str], dict[str, Any]]


class StrangersPrefect:
    """Others' objects on a Prefect server, some of which bear names that ours have, or had."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """A call that is repeated while the server answers 503, because SQLite is locked."""
        for _ in range(20):
            answer = self._http.request(method, path, json=body)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(1)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def make(self, path: str, **body: object) -> str:
        return str(self.ask("POST", path, body)["id"])

    def objects(self) -> Objects:
        """Everything that is on the server, by kind and id."""
        return {
            (kind, str(each["id"])): {name: value for name, value in each.items() if name not in FLEETING}
            for kind, path in LISTS.items()
            for each in self.ask("POST", path, {})
        }

    def state(self, run: str) -> str:
        return str(self.ask("GET", f"flow_runs/{run}")["state_type"])

    def beat(self, run: str) -> None:
        """A sign of life, as Prefect's engine gives it."""
        found = self.ask("GET", f"flow_runs/{run}")
        related = [{"prefect.resource.id": f"prefect.flow.{found['flow_id']}", "prefect.resource.role": "flow"}]
        related += [
            {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"} for tag in found["tags"]
        ]
        event = {
            "id": str(uuid4()),
            "event": "prefect.flow-run.heartbeat",
            "occurred": datetime.now(UTC).isoformat(),
            "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
            "related": related,
        }
        self.ask("POST", "events", [event])

    def move_in(self, job: str) -> None:
        """Fill the house, with names that a job of ours has too, or had in an earlier version."""
        self.make("variables/", name="threshold", value="7", tags=["theirs"])
        self.make("v2/concurrency_limits/", name="their-database", limit=3, active=True)
        self.make("concurrency_limits/", tag="theirs", concurrency_limit=2)
        self._make_block()
        self.make("work_pools/", name="theirs", type="process", description="the team's runs")
        self.make("work_pools/", name="containers", type="docker", concurrency_limit=4)
        self.make("work_pools/theirs/queues", name="urgent", priority=1)
        train, rollback, worker = (self.make("flows/", name=name) for name in ("train", "rollback", "tuning_worker"))
        deployments = [
            self.make(
                "deployments/", flow_id=flow, name=name, entrypoint=entrypoint, work_pool_name="theirs", tags=tags
            )
            for flow, name, entrypoint, tags in (
                (train, job, "train.py:train", ["prod"]),
                (rollback, "rollback", "flows.rollback.rollback", []),
                (worker, "worker", "flows/worker.py:tuning_worker", ["nightly-tuner"]),
            )
        ]
        in_a_year = (datetime.now(UTC) + timedelta(days=365)).isoformat()
        long_ago = (datetime.now(UTC) - timedelta(days=2)).isoformat()
        runs = [
            self.make(
                "flow_runs/", flow_id=train, deployment_id=deployment, name=f"{kind.lower()} of theirs", tags=["prod"],
                state={"type": kind, "state_details": {"scheduled_time": in_a_year}},
            )
            for deployment in (deployments[0], None)
            for kind in ("RUNNING", "PENDING", "CANCELLING", "PAUSED", "SCHEDULED", "COMPLETED", "FAILED")
        ]  # fmt: skip
        self.make("task_runs/", flow_run_id=runs[0], task_key="fit", dynamic_key="0", state={"type": "RUNNING"})
        for kind in ("report", "progress", "trials", "mlflow"):
            self.make("artifacts/", key=f"{kind}-{job}", type="markdown", data="# theirs", flow_run_id=runs[0])
        self.make("automations/", **their_automation("tell the team"))
        self.ask("POST", "logs/", [
            {"name": "theirs", "level": 20, "message": "hello", "timestamp": long_ago, "flow_run_id": runs[0]}
        ])  # fmt: skip

    def deploy_in(self, flow: str, name: str) -> None:
        """A deployment of theirs with a run, in a flow that is there."""
        flow_id = str(self.ask("GET", f"flows/name/{flow}")["id"])
        deployment = self.make("deployments/", flow_id=flow_id, name=name, entrypoint="theirs.py:train", tags=["prod"])
        self.make("flow_runs/", flow_id=flow_id, deployment_id=deployment, tags=["prod"], state={"type": "RUNNING"})

    def _make_block(self) -> None:
        """Prefect registers the types of blocks while it starts, and a little later."""
        kind = ""

        def is_registered() -> bool:
            nonlocal kind
            answer = self._http.get("block_types/slug/secret")
            kind = answer.json()["id"] if answer.is_success else ""
            return bool(kind)

        wait_for(is_registered, 60, "the types of blocks")
        wanted = {"block_schemas": {"block_type_id": {"any_": [kind]}}}
        (schema,) = self.ask("POST", "block_schemas/filter", wanted)
        self.make(
            "block_documents/", name="their-password", data={"value": "secret"}, block_type_id=kind,
            block_schema_id=schema["id"],
        )  # fmt: skip


def their_automation(name: str) -> dict[str, object]:
    trigger = {
        "type": "event",
        "posture": "Reactive",
        "expect": ["prefect.flow-run.Failed"],
        "threshold": 1,
        "within": 0,
    }
    return {"name": name, "description": "theirs", "trigger": trigger, "actions": [{"type": "do-nothing"}]}


def mlflow_objects(client: MlflowClient) -> Objects:
    """Everything that is on an MLflow server, by kind and id."""
    experiments = {each.experiment_id: dict(each) for each in client.search_experiments(ViewType.ALL)}
    runs = client.search_runs(list(experiments), run_view_type=ViewType.ALL, max_results=5000)
    models = {each.name: dict(client.get_registered_model(each.name)) for each in client.search_registered_models()}
    prompts = client.search_registered_models("tags.`mlflow.prompt.is_prompt` = 'true'")
    kinds: dict[str, dict[str, Any]] = {
        "experiments": experiments,
        "runs": {run.info.run_id: run.to_dictionary() for run in runs},
        "models": {name: {**model, "latest_versions": None} for name, model in models.items()},
        "versions": {f"{each.name} {each.version}": dict(each) for each in client.search_model_versions()},
        "prompts": {each.name: dict(each) for each in prompts},
    }
    return {(kind, name): each for kind, objects in kinds.items() for name, each in objects.items()}


def move_into_mlflow(client: MlflowClient, name: str) -> None:
    """Fill the house: an experiment and a registered model that are called as a job of ours, which are in use."""
    for experiment in (name, f"{name} of last year"):
        made = client.create_experiment(experiment, tags={"team": "theirs"})
        for status in ("FINISHED", "RUNNING", None):
            run = client.create_run(made, tags={"job": name, "note": "theirs"}).info.run_id
            client.log_batch(run, [Metric("accuracy", 0.9, 0, 0)], [Param("depth", "3")])
            if status is None:
                client.delete_run(run)
            elif status != "RUNNING":
                client.set_terminated(run, status)
    client.delete_experiment(made)
    client.create_run("0", tags={"note": "theirs"})
    client.create_registered_model(name, tags={"team": "theirs"}, description="theirs")
    for number in ("1", "2"):
        client.create_model_version(name, f"s3://theirs/{number}", tags={"night": "true"}, await_creation_for=0)
    client.set_registered_model_alias(name, "champion", "1")
    client.set_registered_model_alias(name, "challenger", "2")
    client.register_prompt(f"{name}-prompt", "How much is {{this}}?")
