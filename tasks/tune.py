"""tune: have trials trained until the budget is used up."""

import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from infra.device import describe_device
from infra.errors import ExpectedError
from tasks.job import TuningJob
from tasks.memory import BASELINE
from tasks.samplers import GRID_EXHAUSTED
from tasks.storage import Studies
from tasks.study import FAILURE, ROLE, earlier_studies, finished_trials, ranked, tonights_trials
from tasks.tracking import SECONDS
from tasks.trainer import Trainer
from tasks.work import run_wave, trained_seconds

FUTILE_FAILURES = 3

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


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What the search came to: its best trial, the baseline's if it completed, how many ended how, which limit ended
    it, and for how long it held the device without training."""

    best: FrozenTrial
    baseline: FrozenTrial | None
    complete: int
    pruned: int
    failed: int
    ended_by: str
    idle_seconds: float

    def __post_init__(self) -> None:
        assert self.best.values is not None
        assert all(math.isfinite(value) for value in self.best.values)


def tune(
    study: optuna.Study,
    job: TuningJob,
    trainer: Trainer,
    checkpoints: Path,
    *,
    on_trial: Callable[[FrozenTrial], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Run trials until the budget's trials are finished, its minutes are over (`clock` counts seconds), its money is
    spent, or a grid has no point left.

    A trial that is interrupted goes on from its last checkpoint in the next night. Raises TuningFailed where not a
    single trial completed, or already when the first three all failed: then the rest would fail as well.
    """
    began, trained_before = clock(), trained_seconds(study)
    deadline = began + job.budget.minutes * 60
    ended_by = "trials"
    while len(finished_trials(study)) < job.budget.trials:
        if clock() >= deadline:
            ended_by = "minutes"
            break
        if trained_seconds(study) >= job.budget.most_device_seconds:
            ended_by = "max_cost"
            break
        if GRID_EXHAUSTED in study.user_attrs:
            ended_by = "the end of the grid"
            break
        run_wave(study, job, trainer, checkpoints, on_trial)
        _stop_if_futile(study, job)
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
