"""confirm: train the best few configurations again with a fresh seed, and let the best of those be the challenger.

The best of many noisy trials is partly lucky; a second training shows what is left without the luck. Only validation
rows choose; the test rows stay unseen until the gate. Knows nothing of the champion.
"""

import logging
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from models.evaluate import MetricName
from models.hyperparameters import Hyperparameters, complete
from models.preprocessing import Standardization
from models.solo import Diverged, train
from tasks.job import TuningJob
from tasks.study import ORDINAL, derived_seed
from tasks.tune import Prepared, TuningFailed

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Challenger:
    """Tonight's best model, with the preprocessing it was trained on, and where it comes from."""

    model: nn.Module
    preprocessing: Standardization
    hyperparameters: Hyperparameters
    trial: FrozenTrial
    seed: int
    validation: dict[MetricName, float]


def confirm(study: optuna.Study, job: TuningJob, prepared: Prepared) -> Challenger:
    """Retrain the top configurations, each once, and return the best by the objective on validation rows.

    Two trials with equal hyperparameters count once; ties go to the earlier trial. Raises TuningFailed where every
    retraining diverged.
    """
    challengers = []
    for trial in _top_trials(study, job.confirm.candidates):
        hyperparameters = complete(job.family.hyperparameters, job.space, trial.params)
        seed = derived_seed(job.seed, "confirm", trial.user_attrs[ORDINAL])
        try:
            trained = train(
                job.family, hyperparameters, prepared.snapshot.shape, prepared.training, prepared.validation, seed=seed
            )
        except Diverged as error:
            _logger.warning("trial %d did not confirm: %s", trial.number, error)
            continue
        validation = trained.epochs[-1].validation
        _logger.info(
            "trial %d: %s %.4f in the search, %.4f confirmed",
            trial.number,
            job.search.objective,
            trial.value,
            validation[job.search.objective],
        )
        challengers.append(
            Challenger(
                model=trained.model,
                preprocessing=prepared.preprocessing,
                hyperparameters=hyperparameters,
                trial=trial,
                seed=seed,
                validation=validation,
            )
        )
    if not challengers:
        raise TuningFailed(f"no configuration of {job.name} could be trained a second time: each diverged")
    sign = 1 if job.objective.direction == "maximize" else -1
    return max(challengers, key=lambda challenger: sign * challenger.validation[job.search.objective])


def _top_trials(study: optuna.Study, count: int) -> list[FrozenTrial]:
    trials = study.get_trials(states=(TrialState.COMPLETE,))
    trials.sort(key=lambda trial: trial.values[0], reverse=study.direction == optuna.study.StudyDirection.MAXIMIZE)
    distinct: dict[str, FrozenTrial] = {}
    for trial in trials:
        distinct.setdefault(str(sorted(trial.params.items())), trial)
    return list(distinct.values())[:count]
