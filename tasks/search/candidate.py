"""One trial on its way from ask to tell: what was drawn, its epochs, its checkpoint, and how it ended."""

import logging
from contextlib import suppress

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from infra.device import describe_device
from models.fused.train import Stopped
from models.hyperparameters.declared import Hyperparameters
from models.training.diagnosis import Diagnosis
from models.training.terms import Diverged, Epoch, Resumable, Training
from tasks.job import TuningJob
from tasks.search.checkpoints import TrialCheckpoints
from tasks.study.samplers import NUMBER
from tasks.study.storage import STORAGE_IS_AWAY
from tasks.study.studies import COSTS, FAILURE, FIXED, HYPERPARAMETERS, attempts, derived_seed, tonights_trials
from tasks.tracking.trials import CURVE, DEVICE, DIAGNOSIS, SECONDS, TRACEBACK, VALIDATION, curve_of
from tasks.trainer.local import Ended, Failed, Scored, Trainer

_logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 10


class Infeasible(Exception):
    """A configuration breaks a limit of the job; the message says which, and by how much."""


class Candidate:
    """One trial of a wave, from ask to tell."""

    def __init__(
        self, trial: optuna.Trial, study: optuna.Study, job: TuningJob, trainer: Trainer, checkpoints: TrialCheckpoints
    ) -> None:
        self.trial = trial
        self._study = study
        self._job = job
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._number: int = self.trial.user_attrs[NUMBER]
        self._epochs: list[Epoch] = []
        self._unreported: list[Epoch] = []
        self._seconds = 0.0
        self._cost: list[float] = []

    def draw(self) -> Training:
        """What the study proposes. Raises Infeasible, and what is wrong with the proposal or a user's code."""
        hyperparameters = _draw(self.trial, self._job)
        self._cost = _check_limits(self.trial, self._job, hyperparameters, self._trainer)
        seed = derived_seed(self._job.seed, "trial", self._number)
        resumable = Resumable(
            path=self._checkpoints.path(self._number),
            key=f"{seed} {hyperparameters.model_dump_json()}",
            interval_seconds=CHECKPOINT_SECONDS,
        )
        return Training(hyperparameters=hyperparameters, seed=seed, resumable=resumable)

    def fetch_checkpoint(self, resumable: Resumable | None) -> None:
        """Of an earlier attempt that another machine may have made."""
        if self._checkpoints.is_shared and resumable is not None and len(attempts(self._study, self._number)) > 1:
            self._checkpoints.fetch(self._number, resumable.key)

    def report(self, epoch: Epoch, seconds: float) -> None:
        """While the storage is away, reports are kept and nothing is pruned: training goes on."""
        self._epochs.append(epoch)
        self._seconds += seconds
        self._checkpoints.share(self._number, epoch.number)
        if not self._may_be_pruned:
            return
        self._unreported.append(epoch)
        with suppress(*STORAGE_IS_AWAY):
            while self._unreported:
                self.trial.report(self._unreported[0].objective, self._unreported[0].number)
                del self._unreported[0]

    def is_hopeless(self) -> bool:
        return self._may_be_pruned and not self._unreported and self.trial.should_prune()

    @property
    def _may_be_pruned(self) -> bool:
        """Optuna takes reports of a single objective only; without a pruner nobody reads them, the curve is kept."""
        return self._job.search.cost == "none" and self._job.search.pruner != "none"

    def tell(self, outcome: Ended | Infeasible) -> FrozenTrial:
        """How the trial ended and what it was worth."""
        match outcome:
            case Scored():
                self.trial.set_user_attr(VALIDATION, outcome.validation)
                values = [outcome.kept.objective, *self._cost]
                return self._tell(TrialState.COMPLETE, values, outcome.diagnosis)
            case Stopped():
                return self._tell(TrialState.PRUNED, diagnosis="unfinished")
            case Infeasible():
                return self._tell(TrialState.PRUNED, failure=str(outcome))
            case Diverged():
                return self._tell(TrialState.FAIL, diagnosis="diverged", failure=str(outcome))
            case Failed():  # a broken configuration costs its trial, not the night
                _logger.warning("trial %d failed:\n%s", self._number, outcome.trace)
                self.trial.set_user_attr(TRACEBACK, outcome.trace)
                return self._tell(TrialState.FAIL, failure=outcome.sentence)

    def give_back(self) -> None:
        """Without its number, which somebody else may have taken for another trial."""
        with suppress(UpdateFinishedTrialError):
            self.trial.set_user_attr(NUMBER, None)

    def tell_interrupted(self) -> None:
        """Unless somebody else did, who had declared its worker dead."""
        with suppress(UpdateFinishedTrialError):
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
        self.trial.set_user_attr(DEVICE, describe_device(self._trainer.device))
        if failure is not None:
            self.trial.set_user_attr(FAILURE, failure)
        if diagnosis is not None:
            self.trial.set_user_attr(DIAGNOSIS, diagnosis)
        try:
            finished = self._study.tell(self.trial, values, state)
        except UpdateFinishedTrialError:
            # A database may have kept what it could not acknowledge before it went away.
            finished = next(trial for trial in self._study.trials if trial.number == self.trial.number)
            if (finished.state, finished.values) != (state, values):
                raise
        if not keep_checkpoint:
            self._checkpoints.drop(self._number)
        return finished


def _draw(trial: optuna.Trial, job: TuningJob) -> Hyperparameters:
    """What the study proposes; what is queued may fix values that take no part in the search."""
    drawn = job.family.draw(trial, job.space)
    hyperparameters = type(drawn).from_values({**drawn.model_dump(), **trial.user_attrs.get(FIXED, {})})
    trial.set_user_attr(HYPERPARAMETERS, hyperparameters.model_dump())
    return hyperparameters


def _check_limits(
    trial: optuna.Trial, job: TuningJob, hyperparameters: Hyperparameters, trainer: Trainer
) -> list[float]:
    """The model's cost, empty where the job names none. Raises Infeasible where the model breaks a limit; the sampler
    learns by how much."""
    needed = {*job.limits, job.search.cost} - {"none"}
    if not needed:
        return []
    costs = trainer.costs(hyperparameters, needed)
    trial.set_user_attr(COSTS, costs)
    broken = []
    for name, (field, limit) in job.limits.items():
        trial.set_constraint(name, costs[name] / limit - 1)
        if costs[name] > limit:
            broken.append(f"{name} {costs[name]:g} is above {field} {limit:g}")
    if broken:
        raise Infeasible("; ".join(broken))
    return [] if job.search.cost == "none" else [costs[job.search.cost]]


def trained_seconds(study: optuna.Study, *states: TrialState) -> float:
    """How long the device has trained tonight's trials, of the given states if any, those that were interrupted too."""
    return float(sum(trial.user_attrs.get(SECONDS, 0.0) for trial in tonights_trials(study, *states)))
