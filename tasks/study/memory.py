"""What a night begins from: the baseline, the champion's configuration, and what earlier nights of the job learned.

Finished trials of recent nights are imported as the sampler's prior, and the best are tried again first: their values
are from other data, so they guide and never win. Whatever does not fit the present space, or data that has drifted,
is left out, and why is logged. Knows nothing of how a trial is trained.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Any

import optuna
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from models.hyperparameters.declared import Hyperparameters
from models.hyperparameters.domains import Range
from tasks.data.drift import drift
from tasks.data.snapshots import Snapshot, read_snapshot
from tasks.job import TuningJob
from tasks.registry.champion import Champion
from tasks.study.storage import Studies
from tasks.study.studies import (
    COSTS,
    ENDED,
    FINGERPRINT,
    FIXED,
    HYPERPARAMETERS,
    IMPORTED_FROM,
    OBJECTIVE,
    QUEUE,
    ROLE,
    earlier_studies,
    ranked,
    tonights_trials,
)

NIGHTS = 5
BEST_TRIALS = 3
BASELINE = "baseline"

_logger = logging.getLogger(__name__)


def recall(
    study: optuna.Study, job: TuningJob, snapshot: Snapshot, champion: Champion | None, studies: Studies
) -> None:
    """Import earlier trials into a new study and queue what is tried first; a study that is continued has both."""
    if QUEUE in study.user_attrs:
        return
    queue = [_baseline(job)] if job.search.baseline else []
    if job.search.memory:
        prior = _prior(study, job, snapshot, studies)
        study.add_trials(trial for trial in prior if not _is_imported(study, trial))
        if champion is not None and (entry := _champion_entry(job, champion)):
            queue.append(entry)
        queue += [
            _entry(f"best of {trial.user_attrs[IMPORTED_FROM]}", trial.params)
            for trial in ranked(prior, job)[:BEST_TRIALS]
        ]
    distinct: dict[str, dict[str, Any]] = {}
    for entry in queue:
        distinct.setdefault(repr((sorted(entry["params"].items()), entry["attributes"].get(FIXED, {}))), entry)
    study.set_user_attr(QUEUE, list(distinct.values()))


def _baseline(job: TuningJob) -> dict[str, Any]:
    """The textbook's configuration, which is every class's default. Where the job itself fixes a value or narrows a
    range, the baseline keeps to that; where we do, it does not."""
    declared = job.family.hyperparameters
    fixed = {
        name: declared.default_of(name)
        for name, domain in declared.default_space.items()
        if name not in job.search.space
        and not isinstance(domain, Range | tuple)
        and domain != declared.default_of(name)
    }
    entry = _entry(BASELINE, job.family.nearest({}, job.space))
    entry["attributes"][FIXED] = fixed
    return entry


def baseline_hyperparameters(job: TuningJob) -> Hyperparameters:
    """The baseline's; what a user's class draws by itself is drawn at random. Raises what is wrong with that."""
    entry = _baseline(job)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=job.seed))
    study.enqueue_trial(entry["params"])
    drawn = job.family.draw(study.ask(), job.space)
    return type(drawn).from_values({**drawn.model_dump(), **entry["attributes"][FIXED]})


def _champion_entry(job: TuningJob, champion: Champion) -> dict[str, Any] | None:
    if champion.manifest.model != job.model:
        _logger.info("the champion is a %s and tells this search nothing", champion.manifest.model)
        return None
    values = _flat(champion.manifest.hyperparameters)
    params = job.family.nearest(values, job.space)
    params |= {name: values[name] for name in job.family.own_names if name in values}
    moved = [name for name, value in params.items() if name in values and values[name] != value]
    if moved:
        _logger.info("the champion's %s lies outside the present space and was moved into it", ", ".join(moved))
    return _entry(f"champion {champion.promotion.version}", params)


def _prior(study: optuna.Study, job: TuningJob, snapshot: Snapshot, studies: Studies) -> list[FrozenTrial]:
    found: list[FrozenTrial] = []
    dropped: Counter[str] = Counter()
    ended = (earlier for earlier in earlier_studies(job.name, studies) if ENDED in earlier.user_attrs)
    for earlier in islice((earlier for earlier in ended if earlier.study_name != study.study_name), NIGHTS):
        trials = tonights_trials(earlier, TrialState.COMPLETE)
        if reason := _differs(earlier, job, snapshot):
            dropped[reason] += len(trials)
            continue
        for trial in trials:
            fitting = _fit(trial, job, earlier.study_name)
            if isinstance(fitting, FrozenTrial):
                found.append(fitting)
            else:
                dropped[fitting] += 1
    if found or dropped:
        _logger.info("%d trials of earlier nights guide this search", len(found))
    for reason, count in dropped.most_common(5):
        _logger.info("%d trials of earlier nights were left out: %s", count, reason)
    return found


def _differs(earlier: optuna.Study, job: TuningJob, snapshot: Snapshot) -> str | None:
    """Why a whole night tells the present search nothing; None where it does."""
    if earlier.user_attrs.get(OBJECTIVE) != [job.search.objective, job.search.cost]:
        return "they had another objective"
    before = read_snapshot(snapshot.path.parent, earlier.user_attrs[FINGERPRINT])
    if before is None:
        return "their snapshot is gone, so nobody knows whether the data drifted"
    drifted = drift(before, snapshot)
    return drifted and f"the data drifted: {drifted}"


def _fit(trial: FrozenTrial, job: TuningJob, night: str) -> FrozenTrial | str:
    """The trial as one of the present space, or why it is none: every hyperparameter, searched or fixed, must be one
    that could be drawn today."""
    recorded = trial.user_attrs.get(HYPERPARAMETERS)
    if recorded is None:
        return "their hyperparameters were not recorded"
    values = _flat(recorded)
    again = FixedTrial({**values, **trial.params})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Optuna's way to say that a value lies outside its range
            drawn = job.family.draw(again, job.space)  # type: ignore[arg-type]
    except (ValueError, UserWarning, KeyError) as error:
        return f"outside the present space ({error})"
    for name, value in _flat(drawn.model_dump()).items():
        if values.get(name) != value:
            return f"{name} was {values.get(name)} and is {value}"
    costs = trial.user_attrs.get(COSTS, {})
    constraints: dict[str, float] = {}
    for name, (field, limit) in job.limits.items():
        if name not in costs:
            return f"their {name} was not measured"
        if costs[name] > limit:
            return f"their {name} is above {field} {limit:g}"
        constraints[name] = costs[name] / limit - 1
    return optuna.trial.create_trial(
        params=again.params,
        distributions=again.distributions,
        values=trial.values,
        constraints=constraints or None,
        user_attrs={IMPORTED_FROM: night},
    )


def _is_imported(study: optuna.Study, trial: FrozenTrial) -> bool:
    """Importing may have been cut short by a kill."""
    return any(
        known.user_attrs.get(IMPORTED_FROM) == trial.user_attrs[IMPORTED_FROM] and known.params == trial.params
        for known in study.get_trials(deepcopy=False)
    )


def _entry(role: str, params: Mapping[str, Any]) -> dict[str, Any]:
    return {"params": dict(params), "attributes": {ROLE: role}}


def _flat(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    return {**hyperparameters, **hyperparameters.get("own", {})}
