"""The steps of a night as Prefect's tasks, each a plain function of `tasks` under the name that the UI shows."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import optuna
from mlflow import MlflowClient
from optuna.trial import FrozenTrial
from prefect import State, Task, runtime, task
from prefect.cache_policies import NO_CACHE
from pydantic import SecretStr

from flows.extra_workers import extra_workers
from infra.errors import ExpectedError
from infra.settings import Settings
from infra.store.opening import open_store
from infra.store.protocol import StoreUnavailable
from infra.webhook import post
from models.rows.shapes import Problem
from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.data.snapshots import FORMAT, Snapshot
from tasks.data.sources import source_stamp
from tasks.job import DataConfig, TuningJob
from tasks.promotion.confirm import Challenger, Confirmed, confirm
from tasks.promotion.gate import gate
from tasks.promotion.promote import promote
from tasks.reconcile import reconcile
from tasks.report.report import report, report_skipped
from tasks.search.progress import Progress
from tasks.search.tune import Tuned, seconds_to_search, tune
from tasks.study.storage import one_claims
from tasks.study.studies import MLFLOW_EXPERIMENT
from tasks.tracking.trials import TrialTracker, track_confirmed, track_missing_trials
from tasks.tracking.unavailable import mlflow_may_be_unavailable
from tasks.trainer.processes import TrainerProcesses

P = ParamSpec("P")
R = TypeVar("R")


def _prepare(data: DataConfig, problem: Problem, snapshots: Path, last: Snapshot | None) -> str:
    return prepare(data, problem, snapshots, last).fingerprint


def _source_and_its_stamp(_: Any, parameters: dict[str, Any]) -> str | None:
    """What a snapshot is made of, for Prefect's cache; None where only reading it tells whether it has changed."""
    data: DataConfig = parameters["data"]
    with suppress(ExpectedError, OSError):
        stamp = source_stamp(data)
        content = [FORMAT, stamp, data.model_dump_json(), parameters["problem"], str(parameters["snapshots"])]
        return None if stamp is None else hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return None


def _tune(
    study: optuna.Study,
    job: TuningJob,
    trainer: TrainerProcesses,
    settings: Settings,
    client: MlflowClient,
    run_id: str,
) -> Tuned:
    tracker = TrialTracker(client, run_id, settings.mlflow_database)

    def trial_page(trial: FrozenTrial) -> str | None:
        run = tracker.run_ids.get(trial.number)
        return None if run is None else settings.mlflow_page(study.user_attrs[MLFLOW_EXPERIMENT], run)

    def on_trial(trial: FrozenTrial) -> None:
        tracker.track(study, trial)
        progress.update()

    with (
        Progress(study, job, trainer.device, trial_page) as progress,
        tracker,
        trainer,
        extra_workers(study, job),
    ):
        tuned = tune(
            study,
            job,
            trainer,
            settings.home / "checkpoints",
            claims=lambda: tracker.paused(one_claims(settings.studies, job.name, study.study_name)),
            flow_run_id=runtime.flow_run.id,
            seconds_left=seconds_to_search(job, settings.studies, utc_now()),
            on_trial=on_trial,
            store=open_store(settings.store_url) if settings.are_studies_shared else None,
        )
    with mlflow_may_be_unavailable("trials"):
        track_missing_trials(client, run_id, study, tracker.run_ids)
    return tuned


def _confirm(
    study: optuna.Study,
    job: TuningJob,
    prepared: Prepared,
    baseline: FrozenTrial | None,
    client: MlflowClient,
    run_id: str,
) -> Confirmed:
    def on_candidate(candidate: Challenger) -> None:
        metrics = {
            f"confirmed_{job.search.objective}": candidate.mean,
            f"confirmed_{job.search.objective}_spread": candidate.spread,
            "winners_curse": candidate.winners_curse,
            "generalization_gap": candidate.generalization_gap,
            "sharpness": candidate.sharpness,
        }
        with mlflow_may_be_unavailable("what was confirmed"):
            track_confirmed(client, run_id, candidate.trial, metrics, utc_now())

    return confirm(study, job, prepared, baseline=baseline, on_candidate=on_candidate)


def _post(webhook: SecretStr, content: dict[str, str]) -> None:
    post(webhook.get_secret_value(), content)


def _step(name: str, inputs: str, **options: Any) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Prefect shows a task's name and duration but none of its inputs' values, so the run's name carries them."""
    return task(name=name, task_run_name=f"{name}: {inputs}", cache_policy=NO_CACHE, persist_result=False, **options)


def _store_was_away(_task: Task[..., Any], _run: Any, state: State) -> bool:
    return isinstance(state.result(raise_on_failure=False), StoreUnavailable)


def utc_now() -> datetime:
    return datetime.now(UTC)


reconcile_step = _step("reconcile", "{job.name} with {store.url}")(reconcile)
prepare_step = task(
    name="prepare",
    task_run_name="prepare: {data.source}",
    cache_key_fn=_source_and_its_stamp,
    persist_result=True,
    result_serializer="json",
)(_prepare)
skip_step = _step("skip", "{job.name}")(report_skipped)
tune_step = _step("tune", "{job.budget.trials} trials of {job.model}, {job.search.sampler}")(_tune)
confirm_step = _step("confirm", "best {job.confirm.candidates} of {study.study_name}")(_confirm)
gate_step = _step("gate", "trial {confirmed.challenger.trial.user_attrs[number]} on {snapshot.fingerprint}")(gate)
notify_step = _step("notify", "{content[event]}", retries=3, retry_delay_seconds=[1, 5, 15])(_post)
promote_step = _step(
    "promote",
    "trial {verdict.challenger.trial.user_attrs[number]}, {verdict.decision}, {job.promotion.mode}",
    retries=4,
    retry_delay_seconds=[2, 10, 30, 60],
    retry_condition_fn=_store_was_away,
)(promote)
report_step = _step("report", "{study.study_name}")(report)
