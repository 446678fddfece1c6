"""The night: one Prefect flow run of a job, from rows to a promoted model.

Reads as the night goes; each step's work is in the module of its name in tasks/. Errors that a person can mend end
the night as FAILED with one sentence.
"""

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import optuna
import torch
from mlflow import MlflowClient
from prefect import flow, runtime
from prefect.artifacts import create_link_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.states import Completed, Failed

from flows.deployments import FLOW, path_of
from flows.steps import (
    confirm_step,
    gate_step,
    notify_step,
    prepare_step,
    promote_step,
    reconcile_step,
    report_step,
    skip_step,
    tune_step,
    utc_now,
)
from infra.deployments import artifact_key, crash_dead_runs, later_due_run
from infra.device import choose_device, hold_device
from infra.errors import ExpectedError
from infra.settings import OUR_LOGGERS, Settings
from infra.store.opening import open_store
from infra.store.protocol import Store, StoreError, StoreUnavailable
from tasks.data.drift import since
from tasks.data.findings import in_brief
from tasks.data.prepared import Prepared
from tasks.data.snapshots import Snapshot, fetch_snapshot, mark_as_used, publish_snapshot, read_snapshot
from tasks.job import (
    Minutes,
    PresetName,
    Priority,
    PromotionMode,
    SamplerName,
    Trials,
    TuningJob,
    check_shape,
    hints,
    load_job,
)
from tasks.promotion.ask import ask
from tasks.promotion.confirm import Confirmed
from tasks.promotion.loaded_back import rehearse
from tasks.promotion.verdict import Verdict
from tasks.reconcile import only_night_of
from tasks.registry.champion import Champion, read_champion
from tasks.registry.log import Promotion, StaleJudgement
from tasks.search.tune import forecast
from tasks.search.worker import processes_for, trainer_of
from tasks.study.leases import check_still_ours
from tasks.study.memory import recall
from tasks.study.storage import PATIENCE_SECONDS, STORAGE_IS_AWAY, Studies, StudiesUnavailable, check_database
from tasks.study.studies import (
    AFTER_SEARCH_SECONDS,
    JOB_CONTENT,
    MLFLOW_EXPERIMENT,
    last_snapshot,
    open_study,
    unchanged_night,
)
from tasks.tracking.nights import begin_night, night_ends_with_its_run, system_metrics
from tasks.trainer.connection import ProcessGroup
from tasks.trainer.fresh import FreshProcess
from tasks.trainer.processes import started_ahead

JUDGEMENTS = 3
# A night that begins so much later than it was due counts as missed, whatever it waited for.
LATE = timedelta(hours=1)
RANKS: dict[Priority, int] = {"high": 0, "normal": 1, "low": 2}

_logger = logging.getLogger(__name__)


def _run_name() -> str:
    given = dict(runtime.flow_run.parameters)
    name = given.pop("job")
    try:
        job = load_job(name, Settings.read().jobs, **given)
    except ExpectedError:  # which ends the night with its sentence
        return f"{name} · {utc_now():%Y-%m-%d}"
    today = utc_now().astimezone(ZoneInfo(job.schedule.timezone))
    return f"{job.name} · {today:%Y-%m-%d} · {job.budget.trials} trials"


@flow(name=FLOW, flow_run_name=_run_name, persist_result=False)
def nightly_tuning(
    job: str,
    preset: PresetName = "nightly",
    trials: Trials | None = None,
    minutes: Minutes | None = None,
    sampler: SamplerName | None = None,
    promotion: PromotionMode | None = None,
) -> Any:
    """Tune one job and promote the best model if it beats the champion.

    1. reconcile: the store is usable, what earlier nights left open is settled
    2. prepare: rows become an immutable snapshot
    3. tune: a study of trials, each tracked in MLflow, once it is known that such a model can be published
    4. confirm: the best are trained again with fresh seeds
    5. gate: challenger against champion on the same test rows
    6. promote: the winner is published in the artifact store, where the job says so after a person was asked, and
       gives what was judged when it is loaded from there
    7. report: what happened, in Prefect and MLflow

    Args:
        job: Name of the job, as its YAML file is called.
        preset: nightly is the job as its file says; smoke a few trials that promote nothing; deep four times the
            budget. What you change below counts in any case.
        trials: How many finished trials end the tuning: 1 to 100,000.
        minutes: After how many minutes no further trial begins: 10,080 (a week) at most.
        sampler: How the next hyperparameters are chosen.
        promotion: automatic publishes a winner; ask waits for a person's yes; never does everything but that.
    """
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        settings = Settings.read()
        tuning_job = load_job(
            job, settings.jobs, preset=preset, trials=trials, minutes=minutes, sampler=sampler, promotion=promotion
        )
        if reason := _missed(tuning_job):
            return Completed(name="Skipped", message=skip_step(tuning_job, reason))
        _warn_if_studies_are_away(tuning_job, settings)
        device = choose_device()
        with (
            only_night_of(tuning_job.name, settings.home),
            FreshProcess() as fresh,
            started_ahead(processes_for(tuning_job, device), fresh) as started,
        ):
            may_skip = preset == "nightly" and trials is None and minutes is None
            return _night(tuning_job, settings, device, started, fresh, may_skip=may_skip)
    except (ExpectedError, *STORAGE_IS_AWAY) as failure:
        error = failure if isinstance(failure, ExpectedError) else StudiesUnavailable.after(failure)
        _logger.error("%s", error)  # noqa: TRY400 the sentence says it all; a traceback would bury it
        _tell(Settings.read(), {"event": "failed", "job": job, "reason": str(error)})
        return Failed(message=str(error))


def _warn_if_studies_are_away(job: TuningJob, settings: Settings) -> None:
    """The night waits for them; somebody may have to do something about it."""
    if not isinstance(settings.studies, str):
        return
    try:
        check_database(settings.studies)
    except StudiesUnavailable as error:
        _logger.warning("%s; the night waits for it up to %d s", error, PATIENCE_SECONDS)
        _tell(settings, {"event": "waiting", "job": job.name, "reason": str(error)})


def _night(
    job: TuningJob,
    settings: Settings,
    device: torch.device,
    started: ProcessGroup,
    fresh: FreshProcess,
    *,
    may_skip: bool,
) -> Any:
    flow_run_id = runtime.flow_run.id
    client = MlflowClient(settings.mlflow_url)
    store = open_store(settings.store_url)
    studies = settings.studies

    with get_client(sync_client=True) as prefect:
        dead = (StateType.RUNNING, StateType.CANCELLING)
        crash_dead_runs(prefect, path_of(job.name), states=dead, spare=UUID(flow_run_id))
    _logger.info(forecast(job, studies, device))
    for hint in hints(job):
        _logger.warning("%s", hint)
    champion = reconcile_step(job, store, client, studies, device)
    snapshots = settings.home / "snapshots"
    snapshot = _snapshot(job, snapshots, studies, store)
    check_shape(job, snapshot.shape)
    if may_skip and job.data.unchanged == "skip" and (night := unchanged_night(job, snapshot.fingerprint, studies)):
        reason = (
            f"nothing has changed since {night}: the same search, and the same {snapshot.rows} rows (snapshot "
            f"{snapshot.fingerprint[:12]}); data.unchanged: continue searches on"
        )
        return Completed(name="Skipped", message=skip_step(job, reason))
    moved = since(_snapshot_of(champion, snapshots, store), snapshot)
    for change in moved:
        if change.is_large:
            _logger.warning("%s moved since the champion: stability index %.2f", change.column, change.stability_index)
    study = open_study(job, snapshot.fingerprint, studies, utc_now())
    study.set_user_attr(JOB_CONTENT, job.model_dump(mode="json"))
    recall(study, job, snapshot, champion, studies)
    run_id = begin_night(client, job, study, snapshot, flow_run_id, settings.night_page(flow_run_id))
    mlflow_page = settings.mlflow_page(study.user_attrs[MLFLOW_EXPERIMENT], run_id)
    create_link_artifact(
        mlflow_page,
        "This night in MLflow",
        key=artifact_key("mlflow", job.name),
        description="Trials, plots and models",
    )
    _logger.info("this night in MLflow: %s", mlflow_page)
    with night_ends_with_its_run(client, run_id), system_metrics(run_id):
        with hold_device(device, settings.home, RANKS[job.schedule.priority]):
            trainer = trainer_of(job, snapshot, device, started)
            rehearse(job, snapshot, trainer, fresh)
            tuned = tune_step(study, job, trainer, settings, client, run_id)
            searched = utc_now()
            prepared = Prepared.load(snapshot, device, job.data.raw)
            baseline = tuned.baseline if champion is None else None
            confirmed = confirm_step(study, job, prepared, baseline, client, run_id)
        verdict, promotion = _judge_and_promote(
            job, study, snapshot, confirmed, champion, store, device, settings, fresh
        )
        _notify(settings, job, verdict, promotion)
        study.set_user_attr(AFTER_SEARCH_SECONDS, (utc_now() - searched).total_seconds())
        return report_step(
            job, study, snapshot, moved, tuned, confirmed, verdict, promotion, settings, client, utc_now()
        )


def _snapshot(job: TuningJob, snapshots: Path, studies: Studies, store: Store) -> Snapshot:
    """Read from the source again where anything in it changed, or what was read before is gone."""
    last = last_snapshot(job.name, studies, snapshots)
    snapshot = read_snapshot(snapshots, prepare_step(job.data, job.objective.problem, snapshots, last))
    if snapshot is None:
        again = prepare_step.with_options(refresh_cache=True)
        snapshot = read_snapshot(snapshots, again(job.data, job.objective.problem, snapshots, last))
    assert snapshot is not None
    for found in in_brief(snapshot.findings):
        _logger.warning("%s: %s", snapshot.source, found.sentence)
    mark_as_used(snapshot, utc_now())
    try:
        publish_snapshot(store, snapshot)
    except StoreUnavailable as error:
        _logger.warning("the snapshot is on this machine only, until a later night: %s", error)
    return snapshot


def _snapshot_of(champion: Champion | None, snapshots: Path, store: Store) -> Snapshot | None:
    """What the champion was trained on; a night needs it for no more than to say what moved since."""
    try:
        return None if champion is None else fetch_snapshot(store, snapshots, champion.manifest.lineage.snapshot)
    except StoreError as error:
        _logger.warning("nobody knows what moved in the data since the champion: %s", error)
        return None


def _judge_and_promote(
    job: TuningJob,
    study: optuna.Study,
    snapshot: Snapshot,
    confirmed: Confirmed,
    champion: Champion | None,
    store: Store,
    device: torch.device,
    settings: Settings,
    fresh: FreshProcess,
) -> tuple[Verdict, Promotion | None]:
    """Whoever comes second to the promotion log compares with the champion that came first, three times at most."""
    client = MlflowClient(settings.mlflow_url)
    judgements = 0
    while True:
        judgements += 1
        with hold_device(device, settings.home, RANKS[job.schedule.priority]):
            verdict = gate_step(job, confirmed, champion, snapshot, device)
        verdict = ask(job, verdict)
        check_still_ours(study, runtime.flow_run.id)
        try:
            return promote_step(job, study, snapshot, verdict, store, client, fresh, utc_now())
        except StaleJudgement as error:
            if judgements == JUDGEMENTS:
                raise
            _logger.warning("%s", error)
            champion = read_champion(store, job.name, device)


def _missed(job: TuningJob) -> str | None:
    """Why a night that the schedule made is not to begin so late; None where it is."""
    with get_client(sync_client=True) as prefect:
        run = prefect.read_flow_run(UUID(runtime.flow_run.id))
        due = run.expected_start_time
        if not run.auto_scheduled or due is None:
            return None
        later = later_due_run(prefect, run)
    missed = f"it was due at {due:%Y-%m-%d %H:%M} UTC and missed"
    if later is not None:
        return f"{missed}; the night of {later.expected_start_time:%Y-%m-%d %H:%M} UTC stands in for it"
    if job.schedule.missed == "skip" and utc_now() - due > LATE:
        return f"{missed}; schedule.missed: once would make up for it"
    return None


def _notify(settings: Settings, job: TuningJob, verdict: Verdict, promotion: Promotion | None) -> None:
    """Nobody is told of a night that changed nothing."""
    if promotion is not None:
        _tell(settings, {"event": "promoted", "job": job.name, "version": promotion.version, "reason": verdict.reason})
    elif verdict.decision == "REJECT":
        _tell(settings, {"event": "rejected", "job": job.name, "reason": verdict.reason})


def _tell(settings: Settings, content: dict[str, str]) -> None:
    if settings.webhook is not None:
        run = runtime.flow_run.id
        state = notify_step(settings.webhook, content | {"night": settings.night_page(run)}, return_state=True)
        if not state.is_completed():
            _logger.warning("%s; the night goes on", state.message)
