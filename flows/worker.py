"""The worker flow: trains trials of a night on one more device, beside the night itself.

A night starts it through its deployment, as often as the job's `budget.workers` says. It needs the servers, the studies
and the artifact store, and of the machine that the night runs on nothing.
"""

import logging
from typing import Any

from mlflow import MlflowClient
from optuna.trial import FrozenTrial
from prefect import flow, runtime
from prefect.states import Completed, Failed

from infra.device import NotNeeded, choose_device, describe_device, hold_device
from infra.errors import ExpectedError
from infra.settings import OUR_LOGGERS, Settings
from infra.store.opening import open_store
from tasks.data.snapshots import fetch_snapshot
from tasks.job import TuningJob
from tasks.search.worker import trainer_of, work
from tasks.study.leases import Lease, NightSign
from tasks.study.storage import STORAGE_IS_AWAY, StudiesUnavailable, one_claims
from tasks.study.studies import FINGERPRINT, JOB_CONTENT, MLFLOW_RUN, load_study, number_of
from tasks.tracking.trials import TrialTracker

_logger = logging.getLogger(__name__)


class NothingToTrain(ExpectedError):
    """The study, or the rows that it is tuned on, cannot be had here."""


@flow(name="nightly_worker", flow_run_name="worker of {study}", persist_result=False)
def tuning_worker(job: str, study: str) -> Any:
    """Train trials of a study until its night has enough of them.

    Args:
        job: Name of the job.
        study: Name of the study, as the night called it.
    """
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        return Completed(message=_work(job, study, Settings.read()))
    except (ExpectedError, *STORAGE_IS_AWAY) as failure:
        error = failure if isinstance(failure, ExpectedError) else StudiesUnavailable.after(failure)
        _logger.error("%s", error)  # noqa: TRY400 the sentence says it all; a traceback would bury it
        return Failed(message=str(error))


def _work(job_name: str, study_name: str, settings: Settings) -> str:
    try:
        study = load_study(study_name, job_name, settings.studies)
    except KeyError:
        raise NothingToTrain(
            f"there is no study {study_name} here; workers of several machines need NIGHTLY_OPTUNA_URL"
        ) from None
    attributes = study.user_attrs
    job = TuningJob.model_validate(attributes[JOB_CONTENT])
    store = open_store(settings.store_url)
    snapshot = fetch_snapshot(store, settings.home / "snapshots", attributes[FINGERPRINT])
    if snapshot is None:
        raise NothingToTrain(
            f"the rows of {study_name} (snapshot {attributes[FINGERPRINT][:12]}) are neither here nor in "
            f"{settings.store_url}; workers of several machines need a store that all of them reach"
        )
    device = choose_device()
    night = NightSign(study)
    try:
        with (
            hold_device(device, settings.home, is_needed=lambda: not night.is_gone()),
            # Left last: the night must not look for what is missing in MLflow while the tracker still writes.
            Lease(study, describe_device(device), runtime.flow_run.id) as lease,
            TrialTracker(
                MlflowClient(settings.mlflow_url), attributes[MLFLOW_RUN], settings.mlflow_database
            ) as tracker,
            trainer_of(job, snapshot, device) as trainer,
        ):

            def on_trial(trial: FrozenTrial) -> None:
                tracker.track(study, trial)
                _logger.info("trial %d ended as %s: %s", number_of(trial), trial.state.name, trial.values)

            trained = work(
                study,
                job,
                trainer,
                settings.home / "checkpoints",
                lease,
                lambda: tracker.paused(one_claims(settings.studies, job.name, study.study_name)),
                on_trial,
                store if settings.are_studies_shared else None,
            )
    except NotNeeded:
        return "the night needed no further device"
    return f"{trained} trials on {describe_device(device)}"
