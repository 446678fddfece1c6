"""work: what trains the trials of a study: ask for a wave of them, train it, tell what each was worth.

Trials are asked for in waves: the sampler draws one freely, and the rest of its wave with that one's structure, so that
they are trained as one computation (`models.fused`). Independent proposals do not meet: of 64 drawn from an MLP's
batch size, depth and width 1.02 share a structure, on average; if all widths are padded to the widest of the same batch
size and depth it is 4.3, at 2.5 times the arithmetic; a wave is full. It costs the search some of the structures that
it would have seen, which is why a wave is no larger than the device gains from.

A trial that diverges or cannot be built fails by itself and the night goes on. Knows nothing of MLflow: whoever wants
to know of finished trials passes a callback.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from infra.device import describe_device
from infra.store.protocol import Store
from models.fused.train import Stopped
from models.hyperparameters.declared import Hyperparameters
from models.training.diagnosis import Diagnosis
from models.training.terms import Diverged, Epoch, Resumable, Training
from tasks.data.snapshots import Snapshot
from tasks.job import TuningJob
from tasks.search.checkpoints import TrialCheckpoints
from tasks.study.leases import Claims, Lease, NightSign, free_trials
from tasks.study.samplers import GRID_EXHAUSTED, NUMBER
from tasks.study.storage import STORAGE_IS_AWAY, ClaimLost
from tasks.study.studies import (
    COSTS,
    FAILURE,
    FIXED,
    HYPERPARAMETERS,
    WORKER,
    Asking,
    attempts,
    derived_seed,
    finished_trials,
    has_waves,
    may_widen_wave,
    tonights_trials,
    widen_wave,
)
from tasks.tracking.trials import CURVE, DEVICE, DIAGNOSIS, SECONDS, TRACEBACK, VALIDATION, curve_of
from tasks.trainer.local import Ended, Failed, Scored, Trainer, TrainerDied, failed
from tasks.trainer.processes import ProcessGroup, TrainerProcesses, worthwhile_processes

CHECKPOINT_SECONDS = 10
# A CPU, which has two processes for them (processes.py), makes 1.4 times as many trials a minute in waves of 16 as in
# waves of 8. But a search that begins with 16 of one structure hardly sees another; so a CPU's first waves are small,
# and they grow with what the search knows. Of the digits MLPs of `make bench ONLY=throughput` the best of 200 trials is
# then right in 97.70 % of the validation rows (mean of ten seeds), with waves of 8 or of 16 throughout in 97.56. A GPU
# takes as long for a few as for all.
WAVE_TRIALS = {"cpu": 16, "cuda": 64}
FIRST_WAVE_TRIALS = {"cpu": 4, "cuda": 64}
LEAST_WAVES = 8
POLL_SECONDS = 0.5
MOST_FAILED_WAVES = 3

_logger = logging.getLogger(__name__)


class Infeasible(Exception):
    """A configuration breaks a limit of the job; the message says which, and by how much."""


class _Candidate:
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


class Interrupted(Exception):
    """A worker was told to stop in the middle of a wave."""


@dataclass(frozen=True, kw_only=True)
class Wave:
    """How the trials of a wave ended; `died` where their trainer did."""

    ended: tuple[Ended | Infeasible, ...] = ()
    died: bool = False

    @property
    def failed(self) -> bool:
        """As on a broken device. What diverges, or breaks a limit, is a configuration's fault."""
        return self.died or (bool(self.ended) and all(isinstance(one, Failed) for one in self.ended))


class Breaker:
    """Takes a device out of the night after three waves of other structures in a row failed on it, while trials were
    trained elsewhere: a broken GPU or a full disk would burn the whole budget."""

    def __init__(self, study: optuna.Study, lease: Lease) -> None:
        self._study, self._lease = study, lease
        self._failed = self._trained_elsewhere = 0
        self.is_open = False

    def counts(self, wave: Wave | None) -> bool:
        """Count a wave; returns whether there was one."""
        if wave is None:
            return False
        self._failed = self._failed + 1 if wave.failed else 0
        elsewhere = sum(
            trial.user_attrs.get(WORKER) != self._lease.name
            for trial in tonights_trials(self._study, TrialState.COMPLETE)
        )
        if self._failed == 1:
            self._trained_elsewhere = elsewhere
        if self._failed >= MOST_FAILED_WAVES and elsewhere > self._trained_elsewhere:
            self.is_open = True
            self._lease.give_up(f"was taken out: {self._failed} waves of trials in a row failed on it alone")
        return True


def work(
    study: optuna.Study,
    job: TuningJob,
    trainer: Trainer,
    checkpoints: Path,
    lease: Lease,
    claims: Claims,
    on_trial: Callable[[FrozenTrial], None],
    store: Store | None = None,
) -> int:
    """Train trials of a study whose night is elsewhere, until that ends or is gone; returns how many. Checkpoints lie
    in a folder, and in a store where other machines are to find them."""
    told = 0

    def count(trial: FrozenTrial) -> None:
        nonlocal told
        told += 1
        on_trial(trial)

    night = NightSign(study)
    with suppress(Interrupted), TrialCheckpoints(checkpoints, study.study_name, store) as kept:
        breaker = Breaker(study, lease)
        while not night.is_gone() and not breaker.is_open:
            wave = run_wave(study, job, trainer, kept, lease, claims, count, lambda: lease.must_cut_off)
            if not breaker.counts(wave):
                time.sleep(POLL_SECONDS)
    return told


def run_wave(
    study: optuna.Study,
    job: TuningJob,
    trainer: Trainer,
    checkpoints: TrialCheckpoints,
    lease: Lease,
    claims: Claims,
    on_trial: Callable[[FrozenTrial], None],
    is_cut_off: Callable[[], bool],
) -> Wave | None:
    """A trial whose structure the sampler drew, and as many more of that structure as make one computation with it;
    None where other workers have all that the budget has room for. Once `is_cut_off`, its trials end at their next
    epoch.

    An interruption (Ctrl-C, a cancelled night, a trainer that died, a claim that was lost) leaves them FAIL without a
    reason, which is how the next wave, or the next night, knows to train them again.
    """
    untold: list[_Candidate] = []
    refused: list[tuple[_Candidate, Infeasible | Failed]] = []
    drawn: list[tuple[_Candidate, Training]] = []
    outcomes: list[Ended | Infeasible] = []
    began = counted_to = time.perf_counter()
    may_take = job.budget.most_device_seconds - trained_seconds(study)

    def on_epoch(epochs: Mapping[int, Epoch]) -> list[int]:
        nonlocal counted_to
        seconds = (time.perf_counter() - counted_to) / len(epochs)
        counted_to += seconds * len(epochs)
        is_spent = counted_to - began >= may_take or is_cut_off()
        for place, epoch in epochs.items():
            drawn[place][0].report(epoch, seconds)
        if lease.must_stop:
            raise Interrupted("this worker was told to stop")
        return [place for place in epochs if is_spent or drawn[place][0].is_hopeless()]

    def tell(candidate: _Candidate, outcome: Ended | Infeasible) -> None:
        told = candidate.tell(outcome)
        untold.remove(candidate)
        outcomes.append(outcome)
        on_trial(told)

    try:
        with claims():
            asking = Asking(study, job)
            if asking.is_budget_claimed or may_take <= 0 or GRID_EXHAUSTED in study.user_attrs:
                return None
            candidate = None
            while candidate is None or not asking.is_wave_full(candidate.trial):
                first = candidate is None
                candidate = _Candidate(asking.ask(lease.name), study, job, trainer, checkpoints)
                untold.append(candidate)
                try:
                    training = candidate.draw()
                    if first and may_widen_wave(candidate.trial, study, job):
                        widen_wave(candidate.trial, min(_wave_size(study, job, trainer), trainer.members(training)))
                except (TrainerDied, UpdateFinishedTrialError, *STORAGE_IS_AWAY):
                    raise
                except Exception as error:  # noqa: BLE001 told with its traceback
                    refused.append((candidate, error if isinstance(error, Infeasible | Failed) else failed(error)))
                else:
                    drawn.append((candidate, training))
        for candidate, reason in refused:
            tell(candidate, reason)
        for candidate, training in drawn:
            candidate.fetch_checkpoint(training.resumable)
        began = counted_to = time.perf_counter()
        for place, ended in trainer.train([training for _, training in drawn], on_epoch):
            tell(drawn[place][0], ended)
    except STORAGE_IS_AWAY:  # which has been waited for, and would be again for each trial
        raise
    except BaseException as error:
        for candidate in untold:
            if isinstance(error, ClaimLost):
                candidate.give_back()
            candidate.tell_interrupted()
        with suppress(ClaimLost), claims():  # one whose ask was interrupted
            free_trials(study, lambda trial: trial.user_attrs.get(WORKER) in (None, lease.name))
        if isinstance(error, TrainerDied):
            _logger.warning("%s; the %d trials that it had are asked for again", error, len(untold))
            return Wave(died=True)
        if isinstance(error, UpdateFinishedTrialError):
            lease.renew()
            _logger.warning("this worker had been declared dead; what it trained is thrown away, and it begins anew")
            return Wave()
        if isinstance(error, ClaimLost):
            _logger.warning("%s; this worker gives back the %d that it asked for", error, len(untold))
            return Wave()
        raise
    return Wave(ended=tuple(outcomes))


def trainer_of(
    job: TuningJob, snapshot: Snapshot, device: torch.device, started: ProcessGroup | None = None
) -> TrainerProcesses:
    """As many processes as use the device best; those that were `started_ahead` are among them."""
    processes = processes_for(job, device, snapshot.features("train", device).raw_bytes)
    return TrainerProcesses(job, snapshot, device, processes, started)


def processes_for(job: TuningJob, device: torch.device, rows_bytes: int = 0) -> int:
    """How many use the device best for training on rows of such a size: no more than a wave has trials."""
    most = _largest_wave(job, device) if has_waves(job) else 1
    return min(most, worthwhile_processes(device, rows_bytes))


def _wave_size(study: optuna.Study, job: TuningJob, trainer: Trainer) -> int:
    """Half as many as the search knows of, once these are more than it begins with."""
    known = len(finished_trials(study))
    return min(_largest_wave(job, trainer.device), max(FIRST_WAVE_TRIALS[trainer.device.type], known // 2))


def _largest_wave(job: TuningJob, device: torch.device) -> int:
    """Not more than the device gains from, and few enough that the sampler learns several times a night."""
    return max(1, min(WAVE_TRIALS[device.type], job.budget.trials // LEAST_WAVES))


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
