"""tune: ask the study for a trial, train it, tell what it was worth, until the budget is used up.

A trial that diverges or cannot be built fails by itself and the night goes on. Knows nothing of MLflow: whoever
wants to know of finished trials passes a callback.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from uuid import UUID

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from infra.deploy import artifact_key
from infra.device import describe_device
from infra.errors import ExpectedError
from models.batches import Split
from models.hyperparameters import suggest
from models.preprocessing import Standardization
from models.solo import Diverged, Epoch, train
from tasks.job import TuningJob
from tasks.prepare import Snapshot
from tasks.study import FAILURE, ORDINAL, ask, derived_seed, finished_trials
from tasks.tracking import CURVE, DEVICE, SECONDS, curve_of

_logger = logging.getLogger(__name__)


class TuningFailed(ExpectedError):
    """No trial finished; the message carries the first failure."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A snapshot on the device, standardised by its own training rows: what trials train on."""

    snapshot: Snapshot
    preprocessing: Standardization
    training: Split
    validation: Split

    @classmethod
    def load(cls, snapshot: Snapshot, device: torch.device) -> "Prepared":
        splits = snapshot.load(device)
        preprocessing = Standardization.fit(splits["train"][0])
        training, validation = (
            Split(features=preprocessing(features), target=target)
            for features, target in (splits["train"], splits["validation"])
        )
        return cls(snapshot=snapshot, preprocessing=preprocessing, training=training, validation=validation)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What the search came to: its best trial, how many ended how, and which limit ended it."""

    best: FrozenTrial
    complete: int
    pruned: int
    failed: int
    ended_by: str

    def __post_init__(self) -> None:
        assert self.best.value is not None
        assert math.isfinite(self.best.value)


def tune(
    study: optuna.Study,
    job: TuningJob,
    prepared: Prepared,
    *,
    on_trial: Callable[[FrozenTrial], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Run trials until the budget's trials are finished or its minutes are over; `clock` counts seconds.

    Raises TuningFailed where not a single trial completed.
    """
    deadline = clock() + job.budget.minutes * 60
    ended_by = "trials"
    while len(finished_trials(study)) < job.budget.trials:
        if clock() >= deadline:
            ended_by = "minutes"
            break
        on_trial(_run_trial(study, job, prepared))
    trials = finished_trials(study)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    failures = [
        trial.user_attrs.get(FAILURE, "its process died twice") for trial in trials if trial.state == TrialState.FAIL
    ]
    if not complete:
        raise TuningFailed(
            f"none of {len(trials)} trials of {job.name} completed"
            + (f"; the first failed with: {failures[0]}" if failures else "; give the budget more minutes")
        )
    return Tuned(
        best=study.best_trial,
        complete=len(complete),
        pruned=len(trials) - len(complete) - len(failures),
        failed=len(failures),
        ended_by=ended_by,
    )


def _run_trial(study: optuna.Study, job: TuningJob, prepared: Prepared) -> FrozenTrial:
    """One trial from ask to tell. An interruption (Ctrl-C, a cancelled night) leaves it FAIL without a reason,
    which is how the next night knows to train it again."""
    trial = ask(study, job)
    began = time.perf_counter()
    epochs: list[Epoch] = []

    def report(epoch: Epoch) -> None:
        epochs.append(epoch)
        trial.report(epoch.validation[job.search.objective], epoch.number)
        if trial.should_prune():
            raise optuna.TrialPruned

    state, value, failure = TrialState.FAIL, None, None
    try:
        hyperparameters = suggest(trial, job.family.hyperparameters, job.space)
        train(
            job.family,
            hyperparameters,
            prepared.snapshot.shape,
            prepared.training,
            prepared.validation,
            seed=derived_seed(job.seed, "trial", trial.user_attrs[ORDINAL]),
            report=report,
        )
        state, value = TrialState.COMPLETE, epochs[-1].validation[job.search.objective]
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except Diverged as error:
        failure = str(error)
    except Exception as error:  # a broken configuration costs its trial, not the night
        _logger.warning("trial %d failed", trial.number, exc_info=True)
        failure = f"{type(error).__name__}: {error}"
    finally:
        trial.set_user_attr(CURVE, curve_of(epochs))
        trial.set_user_attr(SECONDS, round(time.perf_counter() - began, 3))
        trial.set_user_attr(DEVICE, describe_device(prepared.training.target.device))
        if failure is not None:
            trial.set_user_attr(FAILURE, failure)
        finished = study.tell(trial, value, state)
    return finished


class ProgressArtifact:
    """How far the tuning is, as Prefect's progress artifact of this task run; written once a second at most."""

    def __init__(self, study: optuna.Study, job: TuningJob) -> None:
        self._study = study
        self._budget = job.budget.trials
        self._written_at = time.monotonic()
        created = create_progress_artifact(
            self._percent(), key=artifact_key("progress", job.name), description=self._text()
        )
        self._id = cast(UUID, created)

    def update(self, *, final: bool = False) -> None:
        if final or time.monotonic() - self._written_at >= 1:
            self._written_at = time.monotonic()
            update_progress_artifact(self._id, self._percent(), description=self._text())

    def _percent(self) -> float:
        return min(100.0, 100 * len(finished_trials(self._study)) / self._budget)

    def _text(self) -> str:
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        best = f", best {self._study.best_value:.4f}" if complete else ""
        return f"{len(finished_trials(self._study))} of {self._budget} trials{best}"
