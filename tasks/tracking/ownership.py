"""What on an MLflow server is ours: a job's experiment and its registered model carry our tag, with the job's name.

Others may use the server too, so one that bears the name without the tag is refused and left as it is, and an
experiment that was deleted stays so. What an earlier version made has no tag, and is recognised by what lies in it.
Each function here only reads. Knows nothing of what is written.
"""

from collections.abc import Iterator

from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, ViewType
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.prompt.constants import IS_PROMPT_TAG_KEY

from infra.errors import NotOurs
from infra.settings import MARK
from tasks.job import TuningJob

CHAMPION_ALIAS = "champion"
CHALLENGER_ALIAS = "challenger"
# The tags of a model version that say what it is of: a version in the store, or a night's run.
STORE_VERSION = "store_version"
CHALLENGER_OF = "night"


def check_tracking(client: MlflowClient, job: TuningJob) -> None:
    """Raises NotOurs where the job's experiment or registered model is somebody else's or was deleted; MlflowException
    where the server does not answer."""
    our_experiment(client, job)
    our_model(client, job.registered_model, job.name)


def our_experiment(client: MlflowClient, job: TuningJob) -> Experiment | None:
    """The job's experiment, None where there is none yet. Raises NotOurs, also for one that was deleted."""
    name = job.experiment
    experiment: Experiment | None = client.get_experiment_by_name(name)
    if experiment is None:
        return None
    if MARK not in experiment.tags and not _began_with_a_night(client, experiment):
        raise NotOurs(
            f"the experiment {name!r} of the MLflow server {client.tracking_uri} must have the tag {MARK}, found "
            f"{sorted(experiment.tags)}, so it is somebody else's; name another one by tracking.experiment in the job "
            f"{job.name}, or give it that tag if nights may write there; nothing was changed"
        )
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        raise NotOurs(
            f"the experiment {name!r} of the MLflow server {client.tracking_uri} was deleted and stays so; restore it "
            f"(mlflow experiments restore --experiment-id {experiment.experiment_id}), or name another one by "
            f"tracking.experiment in the job {job.name}; nothing was changed"
        )
    return experiment


def our_model(client: MlflowClient, name: str, job_name: str) -> RegisteredModel | None:
    """The registered model that is the job's, None where there is none of that name yet. Raises NotOurs: its alias is
    what others serve."""
    try:
        model: RegisteredModel = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        if client.search_registered_models(f"name = '{name}' and tags.`{IS_PROMPT_TAG_KEY}` = 'true'"):
            raise NotOurs(
                f"MLflow cannot keep a registered model {name!r} at {client.tracking_uri} beside the prompt of that "
                f"name; name another one by tracking.model in the job {job_name}; nothing was changed"
            ) from None
        return None
    owner = model.tags.get(MARK)
    if owner != job_name and (owner is not None or not _holds_our_versions(client, name)):
        raise NotOurs(
            f"the registered model {name!r} of the MLflow server {client.tracking_uri} must have the tag {MARK} with "
            f"the value {job_name}, found {f'{owner!r}, another job' if owner else sorted(model.tags)}, so its alias "
            f"is somebody else's; name another one by tracking.model in the job {job_name}; nothing was changed"
        )
    return model


def versions_of(client: MlflowClient, model: str) -> Iterator[ModelVersion]:
    """Every version of a registered model."""
    token = None
    while True:
        page = client.search_model_versions(f"name = '{model}'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _began_with_a_night(client: MlflowClient, experiment: Experiment) -> bool:
    """Whether its oldest run is a night of the job of that name: it was made for it."""
    oldest = client.search_runs(
        [experiment.experiment_id],
        run_view_type=ViewType.ALL,
        max_results=1,
        order_by=["attributes.start_time ASC"],
    )
    return any(run.data.tags.get("job") == experiment.name and "optuna_study" in run.data.tags for run in oldest)


def _holds_our_versions(client: MlflowClient, model: str) -> bool:
    versions = list(versions_of(client, model))
    return bool(versions) and all(
        (STORE_VERSION in version.tags and version.source == f"runs:/{version.run_id}/{CHAMPION_ALIAS}")
        or (CHALLENGER_OF in version.tags and version.source == f"runs:/{version.run_id}/{CHALLENGER_ALIAS}")
        for version in versions
    )
