"""A trial as a run in MLflow, nested in its night's: written in few calls, and once more where it is missing."""

import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import copy_context
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, RunStatus, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.tracking import SEARCH_MAX_RESULTS_DEFAULT
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from optuna.trial import FrozenTrial, TrialState

from models.training.terms import Epoch
from tasks.study.samplers import NUMBER
from tasks.study.studies import (
    FAILURE,
    FIXED,
    FLOW_RUN,
    JOB,
    OBJECTIVE,
    ROLE,
    attempts,
    is_interrupted,
    number_of,
    tonights_trials,
)
from tasks.tracking.unavailable import mlflow_may_be_unavailable

TRIAL_NUMBER = "trial"
OPTUNA_NUMBER = "optuna_trial"
INTERRUPTIONS = "interruptions"
CURVE = "curve"
SECONDS = "seconds"
DEVICE = "device"
DIAGNOSIS = "diagnosis"
TRACEBACK = "traceback"
VALIDATION = "validation"


class TrialTracker:
    """Writes finished trials on a thread of its own; what could not be written is logged and left to
    `track_missing_trials`. The queue is as long as the night's trials at most, and holds no tensors. `run_ids` names
    the runs of the trials that it wrote, by the trials' numbers in the study.

    Where the server's own `database` is a file of this machine, it is written there: a call of the server takes the
    machine twice the time that the writing itself does, and a night has three for each trial. It is opened on that
    thread as well: to load what MLflow needs for it takes 0.7 s, in which trials can train."""

    def __init__(self, client: MlflowClient, parent_run_id: str, database: Path) -> None:
        self._client = client
        self._parent_run_id = parent_run_id
        self._away = False
        self.run_ids: dict[int, str] = {}
        self._may_write = threading.Event()
        self._may_write.set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._opened = self._thread.submit(self._open, database)

    def __enter__(self) -> "TrialTracker":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def track(self, study: optuna.Study, trial: FrozenTrial) -> None:
        # In this thread's context, so that Prefect knows whose log lines they are.
        self._thread.submit(copy_context().run, self._write, study, trial)

    @contextmanager
    def paused(self, claim: AbstractContextManager[object]) -> Iterator[None]:
        """Have the study to oneself by a claim, and begin to write no trial meanwhile: Python runs one thread at once,
        and the device waits for the trials that are asked for."""
        self._may_write.clear()
        try:
            with claim:
                yield
        finally:
            self._may_write.set()

    def _open(self, database: Path) -> tuple[MlflowClient, str]:
        """Where to write, and the night's experiment."""
        writer = _of_database(database, self._parent_run_id) or self._client
        return writer, str(writer.get_run(self._parent_run_id).info.experiment_id)

    def _write(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if self._away:  # each call would wait for its time-out, and the night with them
            return
        self._away = True
        self._may_write.wait()
        with mlflow_may_be_unavailable(f"trial {trial.number} and those after it"):
            writer, experiment_id = self._opened.result()
            run_id = track_trial(self._client, experiment_id, self._parent_run_id, study, trial, writer=writer)
            self.run_ids[trial.number] = run_id
            self._away = False


def _of_database(database: Path, run_id: str) -> MlflowClient | None:
    """A client that writes to a server's SQLite file; None where there is none, one of another version, or another
    server's, which does not hold this run."""
    if database.exists():
        with suppress(MlflowException):
            client = MlflowClient(f"sqlite:///{database}")
            client.get_run(run_id)
            return client
    return None


def track_trial(
    client: MlflowClient,
    experiment_id: str,
    parent_run_id: str,
    study: optuna.Study,
    trial: FrozenTrial,
    *,
    writer: MlflowClient | None = None,
) -> str:
    """Write one finished trial as a nested run: created, or resumed where an interrupted attempt at the trial has one,
    filled by one batch, ended; returns the run's id. What is no file may have a `writer` of its own."""
    writer = writer or client
    number = number_of(trial)
    made = [attempt for attempt in attempts(study, number) if attempt.number <= trial.number]
    interruptions = sum(is_interrupted(attempt) for attempt in made)
    start, end = _milliseconds(made[0].datetime_start), _milliseconds(trial.datetime_complete)
    tags = {
        MLFLOW_PARENT_RUN_ID: parent_run_id,
        MLFLOW_RUN_NAME: f"trial {number:03}",
        "job": study.user_attrs[JOB],
        "optuna_study": study.study_name,
        TRIAL_NUMBER: str(number),
        OPTUNA_NUMBER: str(trial.number),
        "trial_state": trial.state.name,
        FLOW_RUN: study.user_attrs.get(FLOW_RUN) or "none",
    }
    tags |= {
        name: str(trial.user_attrs[name]) for name in (DEVICE, DIAGNOSIS, ROLE, FAILURE) if name in trial.user_attrs
    }
    if interruptions:
        tags[INTERRUPTIONS] = str(interruptions)
    known = run_of(writer, experiment_id, parent_run_id, number) if len(made) > 1 else None
    if known is None:
        run_id = str(writer.create_run(experiment_id, start_time=start, tags=tags).info.run_id)
        tracked_epochs = 0
    else:
        run_id = known
        writer.update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))
        tracked_epochs = max((point.step for point in writer.get_metric_history(run_id, "train_loss")), default=0)
    metrics = []
    objective, cost = study.user_attrs[OBJECTIVE]
    epochs = 0
    for epoch, train_loss, validation_loss, value in trial.user_attrs.get(CURVE, []):
        curve = {"train_loss": train_loss, "val_loss": validation_loss, f"val_{objective}": value}
        if epoch > tracked_epochs:
            metrics += [Metric(name, point, end, epoch) for name, point in curve.items()]
        epochs = epoch
    for name, value in trial.user_attrs.get(VALIDATION, {}).items():
        if name != objective:  # whose last point is there already
            metrics.append(Metric(f"val_{name}", value, end, epochs))
    if cost != "none" and trial.values is not None:
        metrics.append(Metric(cost, trial.values[1], end, 0))
    if any(SECONDS in attempt.user_attrs for attempt in made):
        seconds = sum(attempt.user_attrs.get(SECONDS, 0.0) for attempt in made)
        metrics.append(Metric("seconds", seconds, end, 0))
    params = [Param(name, str(value)) for name, value in (trial.params | trial.user_attrs.get(FIXED, {})).items()]
    for batch in range(0, max(len(metrics), 1), 1000):  # MLflow takes a thousand metrics a batch
        writer.log_batch(
            run_id,
            metrics=metrics[batch : batch + 1000],
            params=params if batch == 0 else [],
            tags=[RunTag(name, value) for name, value in tags.items()] if known and batch == 0 else [],
        )
    if TRACEBACK in trial.user_attrs:
        client.log_text(run_id, trial.user_attrs[TRACEBACK], "traceback.txt")
    writer.set_terminated(run_id, _run_status(trial), end)
    return run_id


def track_confirmed(
    client: MlflowClient, parent_run_id: str, trial: FrozenTrial, metrics: Mapping[str, float], now: datetime
) -> None:
    """Add to a trial's run what its second training came to; doing it again changes nothing but the time."""
    experiment_id = client.get_run(parent_run_id).info.experiment_id
    if (run_id := run_of(client, experiment_id, parent_run_id, number_of(trial))) is not None:
        moment = int(now.timestamp() * 1000)
        client.log_batch(run_id, [Metric(name, value, moment, 0) for name, value in metrics.items()])


def track_missing_trials(
    client: MlflowClient, parent_run_id: str, study: optuna.Study, written: Collection[int] = ()
) -> int:
    """Write every finished trial that has no complete run, or whose run tells of an earlier attempt; returns how many.
    MLflow is asked nothing where all have been `written`, as the trials' numbers in the study say.

    A run that was begun and not ended (its writer was killed) is deleted and written anew.
    """
    # One that was interrupted as it was asked for has no number, and never became a trial of the night.
    numbered = (trial for trial in tonights_trials(study) if trial.user_attrs.get(NUMBER) is not None)
    latest = {number_of(trial): trial for trial in numbered}
    finished = {number: trial for number, trial in latest.items() if trial.state.is_finished()}
    if all(trial.number in written for trial in finished.values()):
        return 0
    experiment_id = client.get_run(parent_run_id).info.experiment_id
    tracked = {}
    for run in nested_runs(client, parent_run_id):
        if run.info.status == RunStatus.to_string(RunStatus.RUNNING):
            client.delete_run(run.info.run_id)
        else:
            tracked[int(run.data.tags[TRIAL_NUMBER])] = int(run.data.tags[OPTUNA_NUMBER])
    missing = [trial for number, trial in finished.items() if tracked.get(number, -1) < trial.number]
    for trial in missing:
        track_trial(client, experiment_id, parent_run_id, study, trial)
    return len(missing)


def nested_runs(client: MlflowClient, parent_run_id: str) -> Iterator[Any]:
    """Every run of the night's trials, in no particular order."""
    experiment_id = client.get_run(parent_run_id).info.experiment_id
    token = None
    while True:
        page = client.search_runs(
            [experiment_id],
            f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent_run_id}'",
            ViewType.ACTIVE_ONLY,
            SEARCH_MAX_RESULTS_DEFAULT,
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def curve_of(epochs: tuple[Epoch, ...] | list[Epoch]) -> list[Any]:
    """A trial's curve as it is kept in Optuna: number, training loss, validation loss and objective of each epoch."""
    return [[epoch.number, epoch.train_loss, epoch.validation_loss, epoch.objective] for epoch in epochs]


def run_of(client: MlflowClient, experiment_id: str, parent_run_id: str, number: int) -> str | None:
    """The id of a trial's nested run."""
    tags = {MLFLOW_PARENT_RUN_ID: parent_run_id, TRIAL_NUMBER: str(number)}
    query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    return next((str(run.info.run_id) for run in client.search_runs([experiment_id], query, max_results=1)), None)


def is_active(client: MlflowClient, run_id: str) -> bool:
    """False where MLflow lost the run, or somebody deleted it."""
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _run_status(trial: FrozenTrial) -> str:
    if trial.state == TrialState.FAIL:
        return "KILLED" if is_interrupted(trial) else "FAILED"
    return "FINISHED"


def _milliseconds(moment: datetime | None) -> int:
    assert moment is not None, "a finished trial has both its times"
    return int(moment.timestamp() * 1000)
