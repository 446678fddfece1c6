"""What is written to MLflow of nights: one experiment a job, a parent run a night, a nested run a trial.

A trial's run is derived from the finished Optuna trial alone and written in one batch (one call a metric costs 20
times more), off the training thread. So a trial that MLflow missed can be written later, and twice does no harm. Where
a trial was interrupted and trained again, Optuna has two trials and MLflow one run, which was resumed.
Knows nothing of how a trial was trained.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE

from infra.errors import ExpectedError, stopped_by
from infra.settings import MARK
from tasks.data.card import data_card
from tasks.data.snapshots import Snapshot
from tasks.job import TuningJob
from tasks.study.studies import FLOW_RUN, MLFLOW_EXPERIMENT, MLFLOW_RUN
from tasks.tracking.ownership import our_experiment
from tasks.tracking.trials import is_active
from tasks.tracking.unavailable import mlflow_may_be_unavailable

_logger = logging.getLogger(__name__)


class TrackingError(ExpectedError):
    """MLflow cannot be used; the message says why and what to do."""


def begin_night(
    client: MlflowClient,
    job: TuningJob,
    study: optuna.Study,
    snapshot: Snapshot,
    flow_run_id: str | None,
    prefect_page: str,
) -> str:
    """The night's parent run, created or, for a study that is continued, opened again, with a link to its page in
    Prefect; returns its id.

    Raises TrackingError where MLflow does not answer, NotOurs.
    """
    study.set_user_attr(FLOW_RUN, flow_run_id)
    try:
        run_id = study.user_attrs.get(MLFLOW_RUN)
        if run_id is None or not is_active(client, run_id):
            experiment_id = _experiment(client, job)
            run_id = _create_night_run(client, experiment_id, job, study, snapshot)
            study.set_user_attr(MLFLOW_EXPERIMENT, experiment_id)
            study.set_user_attr(MLFLOW_RUN, run_id)
        client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, FLOW_RUN, flow_run_id or "none")
        client.set_tag(run_id, MLFLOW_RUN_NOTE, f"Under way: [this night in Prefect]({prefect_page})")
    except MlflowException as error:
        raise TrackingError(
            f"MLflow does not answer as it should at {client.tracking_uri} ({error.message.splitlines()[0]}); "
            "start it with `nightly up` or set MLFLOW_TRACKING_URI right"
        ) from error
    return str(run_id)


@contextmanager
def night_ends_with_its_run(client: MlflowClient, run_id: str) -> Iterator[None]:
    """End the parent run as the night ends: FINISHED, FAILED, or KILLED where it was stopped."""
    status = "KILLED"
    try:
        yield
        status = "FINISHED"
    except Exception as error:
        status = "FAILED" if stopped_by(error) is None else "KILLED"
        raise
    finally:
        with mlflow_may_be_unavailable("the night's end"):
            client.set_terminated(run_id, status)


@contextmanager
def system_metrics(run_id: str) -> Iterator[None]:
    """How busy CPU, GPU and memory are, every ten seconds, as metrics `system/...` of the night's run."""
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    monitor: Any = SystemMetricsMonitor(run_id, resume_logging=True)  # type: ignore[no-untyped-call]
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _create_night_run(
    client: MlflowClient, experiment_id: str, job: TuningJob, study: optuna.Study, snapshot: Snapshot
) -> str:
    tags = {MLFLOW_RUN_NAME: study.study_name, "job": job.name, "optuna_study": study.study_name}
    run_id = str(client.create_run(experiment_id, tags=tags).info.run_id)
    content = _flat(job.model_dump(mode="json", exclude={"search": {"space"}}))
    params = [Param(name, str(value)) for name, value in content]
    params += [Param(f"space.{name}", str(domain)) for name, domain in job.space.items()]
    client.log_batch(run_id, params=params)
    client.log_inputs(run_id, datasets=[_dataset(snapshot)])
    client.log_text(run_id, data_card(snapshot), "data_card.md")
    return run_id


def _experiment(client: MlflowClient, job: TuningJob) -> str:
    experiment = our_experiment(client, job)
    if experiment is None:
        try:
            return str(client.create_experiment(job.experiment, tags={MARK: job.name}))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return _experiment(client, job)  # the night of a job that shares it was first
    if MARK not in experiment.tags:
        client.set_experiment_tag(experiment.experiment_id, MARK, job.name)
    return str(experiment.experiment_id)


def _dataset(snapshot: Snapshot) -> DatasetInput:
    return DatasetInput(
        Dataset(
            name=snapshot.source,
            digest=snapshot.fingerprint,
            source_type="local",
            source=json.dumps({"uri": snapshot.path.as_uri()}),
            schema=json.dumps({"features": snapshot.shape.features, "classes": snapshot.classes}),
            profile=json.dumps(snapshot.row_counts),
        ),
        tags=[InputTag("mlflow.data.context", "snapshot")],
    )


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
