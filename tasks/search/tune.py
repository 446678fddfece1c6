"""tune: have trials trained until the budget is used up."""

import logging
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from infra.device import describe_device
from infra.errors import ExpectedError
from infra.store.protocol import Store
from tasks.job import TuningJob
from tasks.search.candidate import trained_seconds
from tasks.search.checkpoints import TrialCheckpoints
from tasks.search.wave import Breaker, run_wave
from tasks.search.worker import POLL_SECONDS
from tasks.study.leases import Claims, Lease, Watch, check_still_ours, mishaps_of, watching
from tasks.study.memory import BASELINE
from tasks.study.samplers import GRID_EXHAUSTED
from tasks.study.storage import STORAGE_IS_AWAY, Studies
from tasks.study.studies import (
    AFTER_SEARCH_SECONDS,
    FAILURE,
    FINISH_BY,
    ROLE,
    SEARCH_ENDED_BY,
    STOPPED,
    earlier_studies,
    finished_trials,
    ranked,
    tonights_trials,
)
from tasks.tracking.trials import SECONDS
from tasks.trainer.local import Trainer

FUTILE_FAILURES = 3
# What is left for confirm and what follows: so much more than the last night took, or such a share where none tells.
AFTER_SEARCH_MARGIN = 1.5
AFTER_SEARCH_SHARE = 0.1

_logger = logging.getLogger(__name__)


class TuningFailed(ExpectedError):
    """No trial finished, or the first three all failed; the message carries the cause."""


def forecast(job: TuningJob, studies: Studies, device: torch.device) -> str:
    """What the search is about to cost, as far as the last night tells."""
    budget = f"{job.budget.trials} trials, {job.budget.minutes:g} minutes at most, on {describe_device(device)}"
    for earlier in earlier_studies(job.name, studies):
        seconds = [trial.user_attrs[SECONDS] for trial in tonights_trials(earlier) if SECONDS in trial.user_attrs]
        if seconds:
            each = statistics.fmean(seconds)
            hours = each * job.budget.trials / 3600
            price = job.budget.price_per_hour
            cost = "" if price is None else f", which cost {hours * price:.2f}"
            return (
                f"{budget}; at {each:.2f} s a trial, as in {earlier.study_name}, that is {60 * hours:.1f} minutes of "
                f"training{cost}"
            )
    return f"{budget}; no earlier night tells how long a trial takes"


def seconds_to_search(job: TuningJob, studies: Studies, now: datetime) -> float:
    """How long the search may take so that the night is done by `budget.finish_by`, as far as the last night tells how
    long confirming, judging and promoting take; without an end where the job has none. Right where clocks are put
    forward or back: what is left is counted in UTC."""
    if job.budget.finish_by is None:
        return math.inf
    zone = ZoneInfo(job.schedule.timezone)
    at = datetime.strptime(job.budget.finish_by, "%H:%M").time()  # noqa: DTZ007 a time of day has no zone
    today = now.astimezone(zone).date()
    ends = (datetime.combine(today + timedelta(days=days), at, zone).astimezone(UTC) for days in (0, 1))
    left = next((end - now).total_seconds() for end in ends if end > now)
    known = (study.user_attrs.get(AFTER_SEARCH_SECONDS) for study in earlier_studies(job.name, studies))
    last = next((seconds for seconds in known if seconds is not None), AFTER_SEARCH_SHARE * left)
    return float(max(0.0, left - AFTER_SEARCH_MARGIN * last))


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What the search came to: its best trial, the baseline's if it completed, how many ended how, which limit ended
    it, for how long it held the device without training, and a sentence for each worker that was lost or broken."""

    best: FrozenTrial
    baseline: FrozenTrial | None
    complete: int
    pruned: int
    failed: int
    ended_by: str
    idle_seconds: float
    mishaps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.best.values is not None
        assert all(math.isfinite(value) for value in self.best.values)


def tune(
    study: optuna.Study,
    job: TuningJob,
    trainer: Trainer,
    checkpoints: Path,
    *,
    claims: Claims = nullcontext,
    flow_run_id: str | None = None,
    seconds_left: float = math.inf,
    on_trial: Callable[[FrozenTrial], None] = lambda _: None,
    store: Store | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Train trials, beside whatever other workers do so, until the budget's trials are finished, its minutes are over
    (`clock` counts seconds), the device's hours are used up, a grid has no point left, or `seconds_left` are: then
    trials that are under way are cut off.

    A trial that is interrupted goes on from its last checkpoint, tonight or in the next night: from the folder, or from
    the store where other machines are to find it too. Raises TuningFailed where not a single trial completed, or
    already when the first three all failed: then the rest would fail as well. Raises NightSuperseded where another
    night takes up the study.
    """
    began, trained_before = clock(), trained_seconds(study)
    deadline, cut_at = began + job.budget.minutes * 60, began + seconds_left

    def limit_reached() -> str | None:
        if len(finished_trials(study)) >= job.budget.trials:
            return "trials"
        now = clock()
        limits = {
            FINISH_BY: now >= cut_at,
            "minutes": now >= deadline,
            job.budget.hours_limit: trained_seconds(study) >= job.budget.most_device_seconds,
            "the end of the grid": GRID_EXHAUSTED in study.user_attrs,
            "the loss of every device": breaker.is_open and not watch.look().keys() - {lease.name},
        }
        return next((name for name, is_reached in limits.items() if is_reached), None)

    def is_cut_off() -> bool:
        return cut_at < math.inf and clock() >= cut_at

    study.set_user_attr(SEARCH_ENDED_BY, "")
    watch = Watch(study, claims)
    watch.look()
    try:
        with (
            Lease(study, describe_device(trainer.device), flow_run_id, is_night=True) as lease,
            watching(watch),
            TrialCheckpoints(checkpoints, study.study_name, store) as kept,
        ):
            breaker = Breaker(study, lease)
            while (ended_by := limit_reached()) is None:
                if breaker.is_open or not breaker.counts(
                    run_wave(study, job, trainer, kept, lease, claims, on_trial, is_cut_off)
                ):
                    time.sleep(POLL_SECONDS)
                _stop_if_futile(study, job)
            study.set_user_attr(SEARCH_ENDED_BY, ended_by)
            while watch.look().keys() - {lease.name}:
                time.sleep(POLL_SECONDS)
    except STORAGE_IS_AWAY:
        raise
    except BaseException:
        check_still_ours(study, flow_run_id)
        study.set_user_attr(SEARCH_ENDED_BY, STOPPED)
        raise
    trials = finished_trials(study)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    failures = _failures(trials)
    if not complete:
        reasons = failures or [trial.user_attrs[FAILURE] for trial in trials if FAILURE in trial.user_attrs]
        raise TuningFailed(
            f"none of {len(trials)} trials of {job.name} completed"
            + (f"; the first ended with: {reasons[0]}" if reasons else f"; give the budget more {ended_by}")
        )
    return Tuned(
        best=ranked(complete, job)[0],
        baseline=next((trial for trial in complete if trial.user_attrs.get(ROLE) == BASELINE), None),
        complete=len(complete),
        pruned=len(trials) - len(complete) - len(failures),
        failed=len(failures),
        ended_by=ended_by,
        idle_seconds=max(0.0, clock() - began - (trained_seconds(study) - trained_before)),
        mishaps=mishaps_of(study.user_attrs),
    )


def _failures(trials: list[FrozenTrial]) -> list[str]:
    return [
        trial.user_attrs.get(FAILURE, "its process died three times")
        for trial in trials
        if trial.state == TrialState.FAIL
    ]


def _stop_if_futile(study: optuna.Study, job: TuningJob) -> None:
    trials = finished_trials(study)
    failures = _failures(trials)
    if len(trials) == len(failures) >= FUTILE_FAILURES:
        raise TuningFailed(
            f"the first {len(trials)} trials of {job.name} all failed, so the night stops: {failures[0]}"
        )
