"""MLflow's registry, which follows the promotion log: a model version of each version that was promoted or not, and the
aliases `champion` and `challenger`, in the registered model that the job names."""

from mlflow import MlflowClient

from infra.settings import MARK
from tasks.registry.versions import Manifest
from tasks.tracking.ownership import (
    CHALLENGER_ALIAS,
    CHALLENGER_OF,
    CHAMPION_ALIAS,
    STORE_VERSION,
    our_model,
    versions_of,
)


def point_champion(client: MlflowClient, model: str, champion: Manifest, version: str) -> bool:
    """Let the alias `champion` of a registered model follow the promotion log; returns whether it had to be moved.

    A model version is created for a store version that the registry does not hold yet. Raises NotOurs, MlflowException.
    """
    run_id = champion.lineage.mlflow_run_id
    reason = str(champion.gate.get("reason", ""))
    number = _register(client, model, champion.job, STORE_VERSION, version, run_id, CHAMPION_ALIAS, reason)
    return _point(client, model, CHAMPION_ALIAS, number)


def point_challenger(client: MlflowClient, model: str, job: str, run_id: str, reason: str) -> bool:
    """Let the alias `challenger` name the model that a night logged and did not promote."""
    number = _register(client, model, job, CHALLENGER_OF, run_id, run_id, CHALLENGER_ALIAS, reason)
    return _point(client, model, CHALLENGER_ALIAS, number)


def drop_challenger(client: MlflowClient, model: str) -> None:
    """A challenger that was promoted is none any more."""
    if CHALLENGER_ALIAS in client.get_registered_model(model).aliases:
        client.delete_registered_model_alias(model, CHALLENGER_ALIAS)


def _register(
    client: MlflowClient, model: str, job: str, tag: str, value: str, run_id: str, folder: str, reason: str
) -> str:
    """The number of the model version with that tag, created where there is none."""
    registered = our_model(client, model, job)
    if registered is None:
        client.create_registered_model(model, tags={MARK: job})
    elif MARK not in registered.tags:
        client.set_registered_model_tag(model, MARK, job)
    known = {version.tags.get(tag): version.version for version in versions_of(client, model)}
    if value in known:
        return str(known[value])
    created = client.create_model_version(
        model,
        source=f"runs:/{run_id}/{folder}",
        run_id=run_id,
        tags={tag: value},
        description=reason,
        await_creation_for=0,
    )
    return str(created.version)


def _point(client: MlflowClient, model: str, alias: str, number: str) -> bool:
    if str(client.get_registered_model(model).aliases.get(alias)) == number:
        return False
    client.set_registered_model_alias(model, alias, number)
    return True
