"""tune: ask the study for trials, train them, tell what they were worth, until the budget is used up.

Trials are asked for in waves: the sampler draws one freely, and the rest of its wave with that one's structure, so that
they are trained as one computation (models/fused.py). Independent proposals do not meet: of 64 drawn from an MLP's
batch size, depth and width 1.02 share a structure, on average; if all widths are padded to the widest of the same batch
size and depth it is 4.3, at 2.5 times the arithmetic; a wave is full. It costs the search some of the structures that
it would have seen, which is why a wave is no larger than the device gains from.

A trial that diverges or cannot be built fails by itself and the night goes on. Knows nothing of MLflow: whoever wants
to know of finished trials passes a callback.
"""

import logging
import math
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from infra.device import describe_device, memory_bytes
from infra.errors import ExpectedError, stopped_by
from models.batches import Split
from models.checkpoints import Checkpoint
from models.diagnosis import Diagnosis, diagnose
from models.evaluate import MetricName, latency_ms, parameter_count
from models.families import Family, build_model
from models.fused import Outcome, Stopped
from models.hyperparameters import Hyperparameters
from models.preprocessing import Preprocessing, Standardization, TablePreprocessing
from models.shapes import DataShape
from models.solo import Diverged, Epoch, Resumable, Setting, Trained, Training
from models.training import fusion_for, train_all
from tasks.job import TuningJob
from tasks.memory import BASELINE
from tasks.samplers import GRID_EXHAUSTED, ORDINAL
from tasks.snapshots import Snapshot, SplitName
from tasks.storage import Studies
from tasks.study import (
    COSTS,
    FAILURE,
    FIXED,
    HYPERPARAMETERS,
    NUMBER,
    ROLE,
    ask,
    derived_seed,
    earlier_studies,
    finished_trials,
    is_wave_full,
    may_widen_wave,
    ranked,
    settle_running_trials,
    tonights_trials,
    widen_wave,
)
from tasks.tracking import CURVE, DEVICE, DIAGNOSIS, SECONDS, TRACEBACK, VALIDATION, curve_of

FUTILE_FAILURES = 3
CHECKPOINT_SECONDS = 10
# Of the memory of the whole device; beside the rows lie their raw form for a moment, models, and other processes.
MEMORY_SHARE = 0.25
# A CPU gains from 8 nearly what it gains from 16, and the search sees twice as many structures.
WAVE_TRIALS = {"cpu": 8, "cuda": 64}
LEAST_WAVES = 8

_logger = logging.getLogger(__name__)


class TuningFailed(ExpectedError):
    """No trial finished, or the first three all failed; the message carries the cause."""


class Infeasible(Exception):
    """A configuration breaks a limit of the job; the message says which, and by how much."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A snapshot, standardised by its own training rows: what trials train on. On the device, or streamed from the disk
    where the device's memory does not hold it."""

    snapshot: Snapshot
    preprocessing: Preprocessing
    training: Split
    validation: Split

    @property
    def prior_loss(self) -> float:
        """The training loss of the best constant prediction: the entropy of the classes in nats, or 1."""
        if self.snapshot.shape.problem == "regression":
            return 1.0
        shares = torch.bincount(self.training.target, minlength=self.snapshot.shape.outputs) / len(self.training)
        return float(torch.special.entr(shares).sum())

    @property
    def shape(self) -> DataShape:
        """What a model reads: the rows as they are preprocessed."""
        raw = self.snapshot.shape
        return replace(raw, features=self.preprocessing.shape_of(raw.features))

    def setting(self, family: Family, objective: MetricName) -> Setting:
        """For trainings of a family on these rows."""
        return Setting(
            family=family,
            shape=self.shape,
            training=self.training,
            validation=self.validation,
            objective=objective,
        )

    @classmethod
    def load(cls, snapshot: Snapshot, device: torch.device) -> "Prepared":
        raw = snapshot.features("train", device)
        preprocessing: Preprocessing = (
            TablePreprocessing.fit(raw, snapshot.columns) if snapshot.columns else Standardization.fit(raw)
        )
        row_bytes = 4 * math.prod(preprocessing.shape_of(snapshot.shape.features))
        needed = row_bytes * (snapshot.row_counts["train"] + snapshot.row_counts["validation"])
        is_streamed = needed > MEMORY_SHARE * memory_bytes(device)
        if is_streamed:
            _logger.info("the rows take %.1f GB and are streamed from %s", needed / 1e9, snapshot.path)

        def split(name: SplitName) -> Split:
            rows = replace(snapshot.features(name, device), transform=preprocessing)
            return Split(features=rows if is_streamed else rows[:], target=snapshot.target(name, device))

        return cls(
            snapshot=snapshot, preprocessing=preprocessing, training=split("train"), validation=split("validation")
        )


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
    prepared: Prepared,
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
        _run_wave(study, job, prepared, checkpoints, on_trial)
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


def trained_seconds(study: optuna.Study, *states: TrialState) -> float:
    """How long the device has trained tonight's trials, of the given states if any, those that were interrupted too."""
    return float(sum(trial.user_attrs.get(SECONDS, 0.0) for trial in tonights_trials(study, *states)))


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


class _Candidate:
    """One trial of a wave, from ask to tell."""

    def __init__(self, study: optuna.Study, job: TuningJob, prepared: Prepared, checkpoints: Path) -> None:
        self.trial = ask(study, job)
        self._study = study
        self._job = job
        self._prepared = prepared
        self._checkpoint = checkpoints / study.study_name / f"{self.trial.user_attrs[ORDINAL]}.safetensors"
        self._epochs: list[Epoch] = []
        self._seconds = 0.0
        self._cost: list[float] = []

    def draw(self) -> Training:
        """What the study proposes. Raises Infeasible, and what is wrong with the proposal or a user's code."""
        hyperparameters = _draw(self.trial, self._job)
        self._cost = _check_limits(self.trial, self._job, hyperparameters, self._prepared)
        seed = derived_seed(self._job.seed, "trial", self.trial.user_attrs[ORDINAL])
        resumable = Resumable(
            path=self._checkpoint,
            key=f"{seed} {hyperparameters.model_dump_json()}",
            interval_seconds=CHECKPOINT_SECONDS,
        )
        return Training(hyperparameters=hyperparameters, seed=seed, resumable=resumable)

    def report(self, epoch: Epoch, seconds: float) -> None:
        self._epochs.append(epoch)
        self._seconds += seconds
        if self._may_be_pruned:
            self.trial.report(epoch.objective, epoch.number)

    def is_hopeless(self) -> bool:
        return self._may_be_pruned and self.trial.should_prune()

    @property
    def _may_be_pruned(self) -> bool:
        """Optuna takes reports of a single objective only; without a pruner nobody reads them, the curve is kept."""
        return self._job.search.cost == "none" and self._job.search.pruner != "none"

    def tell(self, outcome: Outcome) -> FrozenTrial:
        """How the trial ended and what it was worth."""
        match outcome:
            case Trained():
                self.trial.set_user_attr(VALIDATION, outcome.validation)
                values = [outcome.kept.objective, *self._cost]
                return self._tell(TrialState.COMPLETE, values, diagnose(self._epochs, self._prepared.prior_loss))
            case Stopped():
                return self._tell(TrialState.PRUNED, diagnosis="unfinished")
            case Infeasible():
                return self._tell(TrialState.PRUNED, failure=str(outcome))
            case Diverged():
                return self._tell(TrialState.FAIL, diagnosis="diverged", failure=str(outcome))
            case _:  # a broken configuration costs its trial, not the night
                _logger.warning("trial %d failed", self.trial.user_attrs[NUMBER], exc_info=outcome)
                self.trial.set_user_attr(TRACEBACK, "".join(traceback.format_exception(outcome)))
                return self._tell(TrialState.FAIL, failure=f"{type(outcome).__name__}: {outcome}")

    def tell_interrupted(self) -> None:
        self._tell(TrialState.FAIL, keep_checkpoint=True)

    def _tell(
        self,
        state: TrialState,
        values: list[float] | None = None,
        diagnosis: Diagnosis | None = None,
        *,
        failure: str | None = None,
        keep_checkpoint: bool = False,
    ) -> FrozenTrial:
        self.trial.set_user_attr(CURVE, curve_of(self._epochs))
        self.trial.set_user_attr(SECONDS, round(self._seconds, 3))
        self.trial.set_user_attr(DEVICE, describe_device(self._prepared.training.target.device))
        if failure is not None:
            self.trial.set_user_attr(FAILURE, failure)
        if diagnosis is not None:
            self.trial.set_user_attr(DIAGNOSIS, diagnosis)
        finished = self._study.tell(self.trial, values, state)
        if not keep_checkpoint:
            Checkpoint.delete(self._checkpoint)
        return finished


def _run_wave(
    study: optuna.Study, job: TuningJob, prepared: Prepared, checkpoints: Path, on_trial: Callable[[FrozenTrial], None]
) -> None:
    """A trial whose structure the sampler drew, and as many more of that structure as make one computation with it.

    An interruption (Ctrl-C, a cancelled night) leaves them FAIL without a reason, which is how the next night knows
    to train them again.
    """
    setting = prepared.setting(job.family, job.search.objective)
    untold: list[_Candidate] = []
    drawn: list[tuple[_Candidate, Training]] = []
    began = counted_to = time.perf_counter()
    may_take = job.budget.most_device_seconds - trained_seconds(study)

    def on_epoch(epochs: Mapping[int, Epoch]) -> list[int]:
        nonlocal counted_to
        seconds = (time.perf_counter() - counted_to) / len(epochs)
        counted_to += seconds * len(epochs)
        is_spent = counted_to - began >= may_take
        for place, epoch in epochs.items():
            drawn[place][0].report(epoch, seconds)
        return [place for place in epochs if is_spent or drawn[place][0].is_hopeless()]

    try:
        candidate = None
        while candidate is None or not is_wave_full(study, job, candidate.trial):
            first = candidate is None
            candidate = _Candidate(study, job, prepared, checkpoints)
            untold.append(candidate)
            try:
                training = candidate.draw()
                if first and may_widen_wave(candidate.trial, study, job):
                    widen_wave(candidate.trial, min(_wave_size(job, setting), fusion_for(setting, training).members))
            except Exception as error:  # noqa: BLE001 told with its traceback
                _go_on_unless_stopped(error)
                untold.remove(candidate)
                on_trial(candidate.tell(error))
            else:
                drawn.append((candidate, training))
        began = counted_to = time.perf_counter()
        for place, outcome in train_all(setting, [training for _, training in drawn], on_epoch):
            candidate = drawn[place][0]
            if isinstance(outcome, Exception):
                _go_on_unless_stopped(outcome)
            untold.remove(candidate)
            on_trial(candidate.tell(outcome))
    except BaseException:
        for candidate in untold:
            candidate.tell_interrupted()
        settle_running_trials(study)  # one whose ask was interrupted
        raise


def _go_on_unless_stopped(error: Exception) -> None:
    """Optuna's journal, whose lock a signal finds released halfway, says FileNotFoundError: no fault of the trial's."""
    if (signal := stopped_by(error)) is not None:
        raise signal from error


def _wave_size(job: TuningJob, setting: Setting) -> int:
    """Not more than the device gains from, and few enough that the sampler learns several times a night."""
    return max(1, min(WAVE_TRIALS[setting.device.type], job.budget.trials // LEAST_WAVES))


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
    model = build_model(job.family, hyperparameters, prepared.shape).to(prepared.training.target.device)
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
