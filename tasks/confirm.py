"""confirm: train the best few configurations again with a fresh seed, and let the best of those be the challenger.

The best of many noisy trials is partly lucky; a second training shows what is left without the luck. Only validation
rows choose; the test rows stay unseen until the gate. Knows nothing of the champion.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from models.evaluate import MetricName, sharpness
from models.hyperparameters import Hyperparameters
from models.preprocessing import Standardization
from models.solo import Diverged, mean_loss, train
from tasks.job import TuningJob
from tasks.samplers import ORDINAL
from tasks.study import HYPERPARAMETERS, derived_seed, number_of, ranked, tonights_trials
from tasks.tune import Prepared, TuningFailed

MEASURED_ROWS = 4096

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Challenger:
    """A configuration of tonight's trained again, with the preprocessing it was trained on, and where it comes from.

    `generalization_gap` is how much the mean loss is higher on validation rows than on training rows; `sharpness` how
    much the training loss rises close by (models.evaluate). Both are of 4,096 rows at most.
    """

    model: nn.Module
    preprocessing: Standardization
    hyperparameters: Hyperparameters
    trial: FrozenTrial
    seed: int
    validation: dict[MetricName, float]
    generalization_gap: float
    sharpness: float


def confirm(
    study: optuna.Study,
    job: TuningJob,
    prepared: Prepared,
    *,
    on_candidate: Callable[[Challenger], None] = lambda _: None,
) -> Challenger:
    """Retrain the top configurations, each once, and return the best by the objective on validation rows; with a cost
    the cheapest of those within `search.cost_tolerance` of it.

    Two trials with equal hyperparameters count once; ties go to the earlier trial. Raises TuningFailed where every
    retraining diverged.
    """
    challengers = []
    for trial in _top_trials(study, job):
        try:
            challenger = _retrain(trial, job, prepared)
        except Diverged as error:
            _logger.warning("trial %d did not confirm: %s", number_of(trial), error)
            continue
        _logger.info(
            "trial %d: %s %.4f in the search, %.4f confirmed; generalization gap %.4f, sharpness %.4f",
            number_of(trial),
            job.search.objective,
            trial.values[0],
            challenger.validation[job.search.objective],
            challenger.generalization_gap,
            challenger.sharpness,
        )
        on_candidate(challenger)
        challengers.append(challenger)
    if not challengers:
        raise TuningFailed(f"no configuration of {job.name} could be trained a second time: each diverged")
    return _choose(challengers, job)


def _top_trials(study: optuna.Study, job: TuningJob) -> list[FrozenTrial]:
    distinct: dict[str, FrozenTrial] = {}
    for trial in ranked(tonights_trials(study, TrialState.COMPLETE), job):
        distinct.setdefault(repr(trial.user_attrs[HYPERPARAMETERS]), trial)
    return list(distinct.values())[: job.confirm.candidates]


def _retrain(trial: FrozenTrial, job: TuningJob, prepared: Prepared) -> Challenger:
    hyperparameters = job.family.hyperparameters.from_values(trial.user_attrs[HYPERPARAMETERS])
    seed = derived_seed(job.seed, "confirm", trial.user_attrs[ORDINAL])
    trained = train(
        job.family,
        hyperparameters,
        prepared.snapshot.shape,
        prepared.training,
        prepared.validation,
        objective=job.search.objective,
        seed=seed,
    )
    training, validation = prepared.training.first(MEASURED_ROWS), prepared.validation.first(MEASURED_ROWS)
    with torch.no_grad():
        gap = (mean_loss(trained.model, validation) - mean_loss(trained.model, training)).item()
    return Challenger(
        model=trained.model,
        preprocessing=prepared.preprocessing,
        hyperparameters=hyperparameters,
        trial=trial,
        seed=seed,
        validation=trained.validation,
        generalization_gap=gap,
        sharpness=sharpness(trained.model, lambda: mean_loss(trained.model, training)),
    )


def _choose(challengers: list[Challenger], job: TuningJob) -> Challenger:
    """The rule of `tasks.study.ranked`, over confirmed values."""
    sign = 1 if job.objective.direction == "maximize" else -1

    def value(challenger: Challenger) -> float:
        return sign * challenger.validation[job.search.objective]

    best = max(challengers, key=value)
    if job.search.cost == "none":
        return best
    near = [found for found in challengers if value(best) - value(found) <= job.search.cost_tolerance]
    return min(near, key=lambda found: found.trial.values[1])
