"""MLflow's registry, which follows the promotion log: a model version of each version that was promoted or not, and the
aliases `champion` and `challenger`."""

from collections.abc import Iterator
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tasks.versions import Manifest

CHAMPION_ALIAS = "champion"
CHALLENGER_ALIAS = "challenger"
CHALLENGER_OF = "night"
STORE_VERSION = "store_version"


def point_champion(client: MlflowClient, champion: Manifest, version: str) -> bool:
    """Let the alias `champion` of MLflow's registry follow the promotion log; returns whether it had to be moved.

    A model version is created for a store version that the registry does not hold yet. Raises MlflowException.
    """
    job, run_id = champion.job, champion.lineage.mlflow_run_id
    reason = str(champion.gate.get("reason", ""))
    number = _register(client, job, STORE_VERSION, version, run_id, CHAMPION_ALIAS, reason)
    return _point(client, job, CHAMPION_ALIAS, number)


def point_challenger(client: MlflowClient, job: str, run_id: str, reason: str) -> bool:
    """Let the alias `challenger` name the model that a night logged and did not promote."""
    number = _register(client, job, CHALLENGER_OF, run_id, run_id, CHALLENGER_ALIAS, reason)
    return _point(client, job, CHALLENGER_ALIAS, number)


def drop_challenger(client: MlflowClient, job: str) -> None:
    """A challenger that was promoted is none any more."""
    if CHALLENGER_ALIAS in client.get_registered_model(job).aliases:
        client.delete_registered_model_alias(job, CHALLENGER_ALIAS)


def _register(client: MlflowClient, job: str, tag: str, value: str, run_id: str, folder: str, reason: str) -> str:
    """The number of the model version with that tag, created where there is none."""
    known = {version.tags.get(tag): version.version for version in _model_versions(client, job)}
    if value in known:
        return str(known[value])
    created = client.create_model_version(
        job,
        source=f"runs:/{run_id}/{folder}",
        run_id=run_id,
        tags={tag: value},
        description=reason,
        await_creation_for=0,
    )
    return str(created.version)


def _point(client: MlflowClient, job: str, alias: str, number: str) -> bool:
    if str(client.get_registered_model(job).aliases.get(alias)) == number:
        return False
    client.set_registered_model_alias(job, alias, number)
    return True


def _model_versions(client: MlflowClient, job: str) -> Iterator[Any]:
    try:
        client.get_registered_model(job)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(job)
    token = None
    while True:
        page = client.search_model_versions(f"name = '{job}'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return
