"""reconcile: settle what earlier nights left open, before a new one begins.

Optuna, MLflow and Prefect each keep a state of every trial or run, and after a kill each goes stale by itself. Only
right while the job's lock is held: that is the proof that no other night of the job is alive. A second reconcile
changes nothing.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import RunStatus
from mlflow.exceptions import MlflowException

from infra.errors import ExpectedError
from infra.store.opening import check_store
from infra.store.protocol import Store
from tasks.job import TuningJob
from tasks.registry.champion import Champion, read_champion
from tasks.study.leases import settle
from tasks.study.storage import Studies, one_claims
from tasks.study.studies import ENDED, MLFLOW_RUN, last_study
from tasks.tracking.aliases import point_champion
from tasks.tracking.ownership import check_tracking
from tasks.tracking.trials import track_missing_trials
from tasks.tracking.unavailable import mlflow_may_be_unavailable

_logger = logging.getLogger(__name__)


class NightRuns(ExpectedError):
    """Another night of the job is alive on this machine."""


@contextmanager
def only_night_of(job_name: str, home: Path) -> Iterator[None]:
    """Hold the job's lock, which the kernel frees when its holder dies. Raises NightRuns."""
    lock = home / "locks" / f"{job_name}.lock"
    lock.parent.mkdir(exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise NightRuns(f"another night of {job_name} runs on this machine; wait for it or cancel it") from None


def reconcile(
    job: TuningJob, store: Store, client: MlflowClient, studies: Studies, device: torch.device
) -> Champion | None:
    """Check the store, verify the champion, settle the last night; returns the champion, None before the first.

    Raises StoreError where the store cannot be used or the champion in it is damaged, NotOurs where the job's
    experiment or registered model in MLflow is somebody else's: better now than after a night of training. MLflow's
    part is made up for by the next night where MLflow does not answer; whoever writes there asks again whose it is.
    """
    check_store(store)
    try:
        check_tracking(client, job)
    except MlflowException as error:
        _logger.warning("MLflow does not say whose experiment and model %s would write to: %s", job.name, error.message)
    champion = read_champion(store, job.name, device)
    with mlflow_may_be_unavailable("what was to be reconciled"):
        _settle_last_night(job.name, client, studies)
    with mlflow_may_be_unavailable("the champion's alias"):
        if champion is not None and point_champion(
            client, job.registered_model, champion.manifest, champion.promotion.version
        ):
            _logger.warning("MLflow's alias did not name the champion of the store; it was set right")
    return champion


def _settle_last_night(job_name: str, client: MlflowClient, studies: Studies) -> None:
    study = last_study(job_name, studies)
    if study is None:
        return
    settle(study, lambda: one_claims(studies, job_name, study.study_name))
    run_id = study.user_attrs.get(MLFLOW_RUN)
    if run_id is None:
        return
    if missing := track_missing_trials(client, run_id, study):
        _logger.warning("%d trials of %s were missing in MLflow and were written", missing, study.study_name)
    if client.get_run(run_id).info.status == RunStatus.to_string(RunStatus.RUNNING):
        status = "FINISHED" if ENDED in study.user_attrs else "KILLED"
        client.set_terminated(run_id, status)
        _logger.warning("the run of %s was left RUNNING and was set %s", study.study_name, status)
