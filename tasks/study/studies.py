"""The Optuna study of a night: what it asks next, and how an interrupted one is taken up again.

One study a night: the choices of a hyperparameter cannot change within one, and an endless one gets slow. Knows nothing
of training.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from tasks.data.snapshots import Snapshot, read_snapshot
from tasks.job import TuningJob
from tasks.study.samplers import NUMBER, build_pruner, build_sampler
from tasks.study.storage import Studies, storage_of, study_names

JOB = "job"
FINGERPRINT = "snapshot"
SEARCH_DIGEST = "search_digest"
MLFLOW_EXPERIMENT = "mlflow_experiment_id"
MLFLOW_RUN = "mlflow_run_id"
FLOW_RUN = "prefect_flow_run_id"
ENDED = "ended"
OBJECTIVE = "objective"
QUEUE = "queue"
JOB_CONTENT = "job_content"
AFTER_SEARCH_SECONDS = "after_search_seconds"
SEARCH_ENDED_BY = "search_ended_by"
STOPPED = "stopped"
FINISH_BY = "finish_by"

COSTS = "costs"
FAILURE = "failure"
ROLE = "role"
FIXED = "fixed"
HYPERPARAMETERS = "hyperparameters"
IMPORTED_FROM = "imported_from"
WAVE = "wave"
WORKER = "worker"

MOST_INTERRUPTIONS = 3

_logger = logging.getLogger(__name__)


def open_study(job: TuningJob, fingerprint: str, studies: Studies, now: datetime) -> optuna.Study:
    """Continue the job's last study if its night never ended and meant the same (the same search on the same
    snapshot), else create one.

    Trials that nobody trains any more are for `leases.settle` to free; `ask` proposes the same ones again. Whoever
    still works on a study that is not continued is told to stop.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    unfinished = last_study(job.name, studies)
    if unfinished is not None and ENDED not in unfinished.user_attrs:
        attributes = unfinished.user_attrs
        if (attributes.get(SEARCH_DIGEST), attributes.get(FINGERPRINT)) == (job.search_digest, fingerprint):
            _logger.info(
                "continuing study %s with %d finished trials", unfinished.study_name, len(finished_trials(unfinished))
            )
            return _with_pruner(unfinished, job)
        unfinished.set_user_attr(SEARCH_ENDED_BY, STOPPED)
    name = f"{job.name}-{now:%Y%m%d-%H%M%S}"
    directions = [job.objective.direction] if job.search.cost == "none" else [job.objective.direction, "minimize"]
    study = optuna.create_study(study_name=name, storage=storage_of(studies, job.name, name), directions=directions)
    study.set_user_attr(JOB, job.name)
    study.set_user_attr(OBJECTIVE, [job.search.objective, job.search.cost])
    study.set_user_attr(SEARCH_DIGEST, job.search_digest)
    study.set_user_attr(FINGERPRINT, fingerprint)
    return _with_pruner(study, job)


def load_study(name: str, job_name: str, studies: Studies) -> optuna.Study:
    """One study by its name. Raises KeyError where there is none."""
    return optuna.load_study(study_name=name, storage=storage_of(studies, job_name, name))


def last_study(job_name: str, studies: Studies) -> optuna.Study | None:
    """The job's newest study, with Optuna's default sampler; None before the first night."""
    return next(earlier_studies(job_name, studies), None)


def last_snapshot(job_name: str, studies: Studies, snapshots: Path) -> Snapshot | None:
    """What the job's newest study was made on; None before the first night, or where it is not here any more."""
    study = last_study(job_name, studies)
    return None if study is None else read_snapshot(snapshots, study.user_attrs[FINGERPRINT])


def unchanged_night(job: TuningJob, fingerprint: str, studies: Studies) -> str | None:
    """The job's last study, if it came to its end and meant the same: the same search on the same snapshot."""
    last = last_study(job.name, studies)
    if last is None or ENDED not in last.user_attrs:
        return None
    known = (last.user_attrs.get(SEARCH_DIGEST), last.user_attrs.get(FINGERPRINT))
    return last.study_name if known == (job.search_digest, fingerprint) else None


def earlier_studies(job_name: str, studies: Studies) -> Iterator[optuna.Study]:
    """The job's studies, the newest first."""
    for name in study_names(studies, job_name):
        try:
            yield load_study(name, job_name, studies)
        except KeyError:
            _logger.warning("the journal of %s holds no study: its night was killed as it began", name)


class Asking:
    """What is to be asked for next, by one look at the study's trials: right for as long as nobody else asks."""

    def __init__(self, study: optuna.Study, job: TuningJob) -> None:
        self._study, self._job = study, job
        trials = tonights_trials(study)
        claimed = _claimed_of(trials)
        self._count = len(claimed)
        self._claimed: dict[int | None, FrozenTrial | optuna.Trial] = {
            trial.user_attrs.get(NUMBER): trial for trial in claimed
        }
        self._free = (number for number in count() if number not in self._claimed)
        self._interrupted: dict[int | None, list[FrozenTrial]] = {}
        for trial in filter(is_interrupted, trials):
            self._interrupted.setdefault(trial.user_attrs.get(NUMBER), []).append(trial)
        # Where an ask was cut off before, what it queued is for the very number that is asked for now.
        self._is_queued = any(trial.state == TrialState.WAITING for trial in trials)

    @property
    def is_budget_claimed(self) -> bool:
        """Whether every trial that the budget has room for is finished, or under way with some worker."""
        return self._count >= self._job.budget.trials

    def ask(self, worker: str = "") -> optuna.Trial:
        """Ask for the next trial: what is queued comes first, then a sampler seeded by the trial's number, the first
        that no finished and no running trial has. Within a wave (`widen_wave`) the structure is that of its first
        trial.

        An interrupted night thus goes on exactly as it would have without the interruption: an interrupted trial is
        asked for again as it was, and for others the history is the same and so is the seed. (A sampler made once a
        process would propose the study's first trials again.)
        """
        study, job = self._study, self._job
        number = next(self._free)
        queue: list[dict[str, Any]] = study.user_attrs.get(QUEUE, [])
        interrupted = next(iter(self._interrupted.get(number, [])), None)
        if not self._is_queued:
            if number < len(queue):
                study.enqueue_trial(queue[number]["params"], user_attrs=queue[number]["attributes"])
            elif interrupted:
                study.enqueue_trial(interrupted.params)
        first, size = _wave_of(number, interrupted, self._claimed.get(number - 1))
        params = self._claimed[first].params if first != number else {}
        study.sampler = build_sampler(
            job.search.sampler,
            seed=derived_seed(job.seed, "sampler", number),
            study_seed=derived_seed(job.seed, "sequence", 0),
            fixed={name: params[name] for name in job.family.structure if name in params},
        )
        trial = study.ask()
        trial.set_user_attr(WORKER, worker)
        trial.set_user_attr(NUMBER, number)
        trial.set_user_attr(WAVE, [first, size])
        self._is_queued = False
        self._claimed[number] = trial
        self._count += 1
        return trial

    def is_wave_full(self, trial: optuna.Trial) -> bool:
        """Whether the trial is the last of its wave, or the last that the budget has room for. One that was interrupted
        once less than is tolerated goes alone: if it is what kills the process, it takes no other with it."""
        first, size = trial.user_attrs[WAVE]
        left = [number for number in range(first, first + size) if number not in self._claimed]
        if not left or self.is_budget_claimed:
            return True
        interruptions = max(len(self._interrupted.get(number, [])) for number in (trial.user_attrs[NUMBER], left[0]))
        return interruptions >= MOST_INTERRUPTIONS - 1


def has_waves(job: TuningJob) -> bool:
    """Whether the sampler may be asked for several trials of one structure. Not CMA-ES, whose covariance is of all
    numbers; not a grid or a sequence, whose points are given."""
    return job.search.sampler in ("auto", "tpe", "gp", "random")


def may_widen_wave(trial: optuna.Trial, study: optuna.Study, job: TuningJob) -> bool:
    """Whether other trials may share this one's structure: not what is queued, whose structure nobody chose for a whole
    wave."""
    return has_waves(job) and trial.user_attrs[NUMBER] >= len(study.user_attrs.get(QUEUE, []))


def widen_wave(trial: optuna.Trial, size: int) -> None:
    """Let so many trials, from this one on, share its structure, whether they are asked for tonight or after an
    interruption."""
    trial.set_user_attr(WAVE, [trial.user_attrs[NUMBER], size])


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count against the budget: COMPLETE, PRUNED, FAIL by their own fault, and those that were
    interrupted three times: their hyperparameters may be what kills the process."""
    return _finished_of(tonights_trials(study))


def number_of(trial: FrozenTrial) -> int:
    """The trial's number within the night, from 0. One that is trained again after an interruption keeps it, and has
    another of Optuna's, which counts imported trials too, and stands in for one that never had a number."""
    number = trial.user_attrs.get(NUMBER)
    return trial.number if number is None else int(number)


def attempts(study: optuna.Study, number: int) -> list[FrozenTrial]:
    """Every time that a trial of tonight was begun: all but the last were interrupted."""
    return [trial for trial in tonights_trials(study) if trial.user_attrs.get(NUMBER) == number]


def tonights_trials(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """The study's trials, of the given states if any, without those imported from earlier nights."""
    trials = study.get_trials(deepcopy=False, states=states or None)
    return [trial for trial in trials if IMPORTED_FROM not in trial.user_attrs]


def ranked(trials: Iterable[FrozenTrial], job: TuningJob) -> list[FrozenTrial]:
    """Complete trials in the order in which they would be chosen; ties go to the earlier.

    By the objective; with a cost those within `search.cost_tolerance` of the best come first, the cheapest first.
    """
    sign = -1 if job.objective.direction == "maximize" else 1
    order = sorted(trials, key=lambda trial: sign * trial.values[0])
    if job.search.cost == "none" or not order:
        return order
    best = order[0].values[0]
    near = [trial for trial in order if abs(trial.values[0] - best) <= job.search.cost_tolerance]
    return sorted(near, key=lambda trial: trial.values[1]) + order[len(near) :]


def is_interrupted(trial: FrozenTrial) -> bool:
    """A trial that failed by its own fault says why; one whose process was stopped or killed does not."""
    return trial.state == TrialState.FAIL and FAILURE not in trial.user_attrs


def derived_seed(job_seed: int, purpose: str, number: int) -> int:
    """A seed of its own for each purpose and number, all from the job's (numpy's SeedSequence)."""
    return int(np.random.SeedSequence([job_seed, *purpose.encode(), number]).generate_state(1)[0])


def _with_pruner(study: optuna.Study, job: TuningJob) -> optuna.Study:
    study.pruner = build_pruner(job.search.pruner, job.most_epochs)
    return study


def _finished_of(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    finished = []
    interruptions: Counter[object] = Counter()
    for trial in trials:
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            finished.append(trial)
        elif is_interrupted(trial):
            number = trial.user_attrs.get(NUMBER)
            interruptions[number] += 1
            if number is not None and interruptions[number] == MOST_INTERRUPTIONS:
                finished.append(trial)
        elif trial.state == TrialState.FAIL:
            finished.append(trial)
    return finished


def _claimed_of(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Of trials read at once: one that ended between two looks would be in neither, and be asked for again."""
    return [*_finished_of(trials), *(trial for trial in trials if trial.state == TrialState.RUNNING)]


def _wave_of(
    number: int, interrupted: FrozenTrial | None, before: FrozenTrial | optuna.Trial | None
) -> tuple[int, int]:
    """The first number of the wave that a number belongs to, and the wave's size."""
    for known in (interrupted, before):
        if known is not None and WAVE in known.user_attrs:
            first, size = known.user_attrs[WAVE]
            if first <= number < first + size:
                return first, size
    return number, 1
