"""tune: ask the study for a trial, train it, tell what it was worth, until the budget is used up.

A trial that diverges or cannot be built fails by itself and the night goes on. Knows nothing of MLflow: whoever
wants to know of finished trials passes a callback.
"""

import logging
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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
from models.diagnosis import Diagnosis, diagnose
from models.evaluate import MetricName, latency_ms, parameter_count
from models.families import Family, build_model
from models.hyperparameters import Hyperparameters
from models.preprocessing import Standardization
from models.solo import Diverged, Epoch, Resumable, Setting, Trained, Training, train
from tasks.job import TuningJob
from tasks.memory import BASELINE
from tasks.prepare import Snapshot
from tasks.samplers import GRID_EXHAUSTED, ORDINAL
from tasks.study import (
    COSTS,
    FAILURE,
    FIXED,
    HYPERPARAMETERS,
    NUMBER,
    ROLE,
    ask,
    derived_seed,
    finished_trials,
    ranked,
    tonights_trials,
)
from tasks.tracking import CURVE, DEVICE, DIAGNOSIS, SECONDS, TRACEBACK, VALIDATION, curve_of

FUTILE_FAILURES = 3
CHECKPOINT_SECONDS = 10

_logger = logging.getLogger(__name__)


class TuningFailed(ExpectedError):
    """No trial finished, or the first three all failed; the message carries the cause."""


class Infeasible(Exception):
    """A configuration breaks a limit of the job; the message says which, and by how much."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A snapshot on the device, standardised by its own training rows: what trials train on."""

    snapshot: Snapshot
    preprocessing: Standardization
    training: Split
    validation: Split

    @property
    def prior_loss(self) -> float:
        """The training loss of the best constant prediction: the entropy of the classes in nats, or 1."""
        if self.snapshot.shape.problem == "regression":
            return 1.0
        shares = torch.bincount(self.training.target, minlength=self.snapshot.shape.outputs) / len(self.training)
        return float(torch.special.entr(shares).sum())

    def setting(self, family: Family, objective: MetricName) -> Setting:
        """For trainings of a family on these rows."""
        return Setting(
            family=family,
            shape=self.snapshot.shape,
            training=self.training,
            validation=self.validation,
            objective=objective,
        )

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
    """What the search came to: its best trial, the baseline's if it completed, how many ended how, and which limit
    ended it."""

    best: FrozenTrial
    baseline: FrozenTrial | None
    complete: int
    pruned: int
    failed: int
    ended_by: str

    def __post_init__(self) -> None:
        assert self.best.values is not None
        assert all(math.isfinite(value) for value in self.best.values)


def tune(
    study: optuna.Study,
    job: TuningJob,
    prepared: Prepared,
    checkpoints: Path,
    *,
    on_trial: Callable[[FrozenTrial], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Run trials until the budget's trials are finished, its minutes are over (`clock` counts seconds), or a grid has
    no point left.

    A trial that is interrupted goes on from its last checkpoint in the next night. Raises TuningFailed where not a
    single trial completed, or already when the first three all failed: then the rest would fail as well.
    """
    deadline = clock() + job.budget.minutes * 60
    ended_by = "trials"
    while len(finished_trials(study)) < job.budget.trials:
        if clock() >= deadline:
            ended_by = "minutes"
            break
        if GRID_EXHAUSTED in study.user_attrs:
            ended_by = "the end of the grid"
            break
        on_trial(_run_trial(study, job, prepared, checkpoints))
        _stop_if_futile(study, job)
    trials = finished_trials(study)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    failures = _failures(trials)
    if not complete:
        reasons = failures or [trial.user_attrs[FAILURE] for trial in trials if FAILURE in trial.user_attrs]
        raise TuningFailed(
            f"none of {len(trials)} trials of {job.name} completed"
            + (f"; the first ended with: {reasons[0]}" if reasons else "; give the budget more minutes")
        )
    return Tuned(
        best=ranked(complete, job)[0],
        baseline=next((trial for trial in complete if trial.user_attrs.get(ROLE) == BASELINE), None),
        complete=len(complete),
        pruned=len(trials) - len(complete) - len(failures),
        failed=len(failures),
        ended_by=ended_by,
    )


def _failures(trials: list[FrozenTrial]) -> list[str]:
    return [
        trial.user_attrs.get(FAILURE, "its process died twice") for trial in trials if trial.state == TrialState.FAIL
    ]


def _stop_if_futile(study: optuna.Study, job: TuningJob) -> None:
    trials = finished_trials(study)
    failures = _failures(trials)
    if len(trials) == len(failures) == FUTILE_FAILURES:
        raise TuningFailed(
            f"the first {FUTILE_FAILURES} trials of {job.name} all failed, so the night stops: {failures[0]}"
        )


def _run_trial(study: optuna.Study, job: TuningJob, prepared: Prepared, checkpoints: Path) -> FrozenTrial:
    """One trial from ask to tell. An interruption (Ctrl-C, a cancelled night) leaves it FAIL without a reason,
    which is how the next night knows to train it again."""
    trial = ask(study, job)
    began = time.perf_counter()
    epochs: list[Epoch] = []
    checkpoint = checkpoints / study.study_name / f"{trial.user_attrs[ORDINAL]}.safetensors"

    def report(epoch: Epoch) -> None:
        epochs.append(epoch)
        if job.search.cost == "none":  # Optuna takes reports of a single objective only
            trial.report(epoch.objective, epoch.number)
            if trial.should_prune():
                raise optuna.TrialPruned

    state, values, failure = TrialState.FAIL, None, None
    diagnosis: Diagnosis | None = None
    try:
        hyperparameters = _draw(trial, job)
        cost = _check_limits(trial, job, hyperparameters, prepared)
        trained = _train(trial, job, hyperparameters, prepared, checkpoint, report)
        trial.set_user_attr(VALIDATION, trained.validation)
        diagnosis = diagnose(epochs, prepared.prior_loss)
        state, values = TrialState.COMPLETE, [trained.kept.objective, *cost]
    except optuna.TrialPruned:
        state, diagnosis = TrialState.PRUNED, "unfinished"
    except Infeasible as error:
        state, failure = TrialState.PRUNED, str(error)
    except Diverged as error:
        failure, diagnosis = str(error), "diverged"
    except Exception as error:  # a broken configuration costs its trial, not the night
        _logger.warning("trial %d failed", trial.user_attrs[NUMBER], exc_info=True)
        failure = f"{type(error).__name__}: {error}"
        trial.set_user_attr(TRACEBACK, traceback.format_exc())
    finally:
        trial.set_user_attr(CURVE, curve_of(epochs))
        trial.set_user_attr(SECONDS, round(time.perf_counter() - began, 3))
        trial.set_user_attr(DEVICE, describe_device(prepared.training.target.device))
        if failure is not None:
            trial.set_user_attr(FAILURE, failure)
        if diagnosis is not None:
            trial.set_user_attr(DIAGNOSIS, diagnosis)
        finished = study.tell(trial, values, state)
    checkpoint.unlink(missing_ok=True)
    return finished


def _draw(trial: optuna.Trial, job: TuningJob) -> Hyperparameters:
    """What the study proposes; what is queued may fix values that take no part in the search."""
    drawn = job.family.draw(trial, job.space)
    hyperparameters = type(drawn).from_values({**drawn.model_dump(), **trial.user_attrs.get(FIXED, {})})
    trial.set_user_attr(HYPERPARAMETERS, hyperparameters.model_dump())
    return hyperparameters


def _check_limits(
    trial: optuna.Trial, job: TuningJob, hyperparameters: Hyperparameters, prepared: Prepared
) -> list[float]:
    """The model's cost, empty where the job names none. Raises Infeasible where the model breaks a limit; the sampler
    learns by how much."""
    needed = {*job.limits, job.search.cost} - {"none"}
    if not needed:
        return []
    model = build_model(job.family, hyperparameters, prepared.snapshot.shape).to(prepared.training.target.device)
    costs: dict[str, float] = {}
    if "parameters" in needed:
        costs["parameters"] = float(parameter_count(model))
    if "latency" in needed:
        costs["latency"] = latency_ms(model, prepared.training.features[:1])
    trial.set_user_attr(COSTS, costs)
    broken = []
    for name, (field, limit) in job.limits.items():
        trial.set_constraint(name, costs[name] / limit - 1)
        if costs[name] > limit:
            broken.append(f"{name} {costs[name]:g} is above {field} {limit:g}")
    if broken:
        raise Infeasible("; ".join(broken))
    return [] if job.search.cost == "none" else [costs[job.search.cost]]


def _train(
    trial: optuna.Trial,
    job: TuningJob,
    hyperparameters: Hyperparameters,
    prepared: Prepared,
    checkpoint: Path,
    report: Callable[[Epoch], None],
) -> Trained:
    seed = derived_seed(job.seed, "trial", trial.user_attrs[ORDINAL])
    resumable = Resumable(
        path=checkpoint, key=f"{seed} {hyperparameters.model_dump_json()}", interval_seconds=CHECKPOINT_SECONDS
    )
    training = Training(hyperparameters=hyperparameters, seed=seed, resumable=resumable)
    return train(prepared.setting(job.family, job.search.objective), training, report)


class ProgressArtifact:
    """How far the tuning is, as Prefect's progress artifact of this task run; written once a second at most."""

    def __init__(self, study: optuna.Study, job: TuningJob) -> None:
        self._study = study
        self._job = job
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
        complete = ranked(tonights_trials(self._study, TrialState.COMPLETE), self._job)
        best = f", best {complete[0].values[0]:.4f}" if complete else ""
        return f"{len(finished_trials(self._study))} of {self._budget} trials{best}"
