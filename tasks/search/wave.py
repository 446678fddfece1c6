"""A wave of trials: asked for together, trained as one computation, told one by one as they end."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from models.training.terms import Epoch, Training
from tasks.job import TuningJob
from tasks.search.candidate import Candidate, Infeasible, trained_seconds
from tasks.search.checkpoints import TrialCheckpoints
from tasks.study.leases import Claims, Lease, free_trials
from tasks.study.samplers import GRID_EXHAUSTED
from tasks.study.storage import STORAGE_IS_AWAY, ClaimLost
from tasks.study.studies import WORKER, Asking, finished_trials, may_widen_wave, tonights_trials, widen_wave
from tasks.trainer.local import Ended, Failed, Trainer, TrainerDied, failed

_logger = logging.getLogger(__name__)
# A CPU, which has two processes for them (processes.py), makes 1.4 times as many trials a minute in waves of 16 as in
# waves of 8. But a search that begins with 16 of one structure hardly sees another; so a CPU's first waves are small,
# and they grow with what the search knows. Of the digits MLPs of `make bench ONLY=throughput` the best of 200 trials is
# then right in 97.70 % of the validation rows (mean of ten seeds), with waves of 8 or of 16 throughout in 97.56. A GPU
# takes as long for a few as for all.
WAVE_TRIALS = {"cpu": 16, "cuda": 64}
FIRST_WAVE_TRIALS = {"cpu": 4, "cuda": 64}
LEAST_WAVES = 8
MOST_FAILED_WAVES = 3


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
    untold: list[Candidate] = []
    refused: list[tuple[Candidate, Infeasible | Failed]] = []
    drawn: list[tuple[Candidate, Training]] = []
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

    def tell(candidate: Candidate, outcome: Ended | Infeasible) -> None:
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
                candidate = Candidate(asking.ask(lease.name), study, job, trainer, checkpoints)
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


def _wave_size(study: optuna.Study, job: TuningJob, trainer: Trainer) -> int:
    """Half as many as the search knows of, once these are more than it begins with."""
    known = len(finished_trials(study))
    return min(largest_wave(job, trainer.device), max(FIRST_WAVE_TRIALS[trainer.device.type], known // 2))


def largest_wave(job: TuningJob, device: torch.device) -> int:
    """Not more than the device gains from, and few enough that the sampler learns several times a night."""
    return max(1, min(WAVE_TRIALS[device.type], job.budget.trials // LEAST_WAVES))
