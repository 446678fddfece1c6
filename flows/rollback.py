"""Put an earlier champion back, from the Prefect UI as from the terminal."""

import logging
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from prefect import flow
from prefect.states import Failed

from infra.errors import ExpectedError
from infra.settings import OUR_LOGGERS, Settings
from infra.store.opening import open_store
from tasks.job import JobError, load_job
from tasks.registry.rollback import roll_back
from tasks.tracking.aliases import point_champion
from tasks.tracking.unavailable import mlflow_may_be_unavailable

_logger = logging.getLogger(__name__)


@flow(name="nightly_rollback", flow_run_name="{job}", persist_result=False)
def rollback(job: str, reason: str, version: str = "") -> Any:
    """Make an earlier version of a job champion again; one more entry in the promotion log, nothing is deleted.

    Args:
        job: Name of the job.
        reason: Why; it is kept in the promotion log.
        version: Which version; empty goes back to the one that the present champion replaced.
    """
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    settings = Settings.read()
    try:
        store = open_store(settings.store_url)
        promotion, manifest = roll_back(store, job, to=version or None, reason=reason, now=datetime.now(UTC))
    except ExpectedError as error:
        _logger.error("%s", error)  # noqa: TRY400 the sentence says it all; a traceback would bury it
        return Failed(message=str(error))
    try:
        model = load_job(job, settings.jobs).registered_model
    except JobError as error:  # a rollback is no night, and needs no job file that can be read
        _logger.warning("MLflow misses the champion's alias until the next night: %s", error)
    else:
        with mlflow_may_be_unavailable("the champion's alias"):
            point_champion(MlflowClient(settings.mlflow_url), model, manifest, promotion.version)
    return f"version {promotion.version} is champion of {job} again"
