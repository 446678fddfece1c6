"""confirm: train the best few configurations again with fresh seeds; the best on average becomes the challenger.

The best of many noisy trials is partly lucky; several fresh trainings show what is left without the luck. Where there
is no champion yet the textbook's configuration competes too, by the same rule. Only validation rows choose; the test
rows stay unseen until the gate.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from models.evaluation.evaluate import predict_outputs, score, sharpness
from models.evaluation.metrics import METRICS, MetricName, in_figures, metrics_of
from models.families.family import Family
from models.families.networks import Ensemble
from models.families.own_module import own_module_of, probabilities_in_words
from models.fused.train import Outcome
from models.hyperparameters.declared import Hyperparameters
from models.rows.batches import Split
from models.rows.preprocessing import Preprocessing
from models.train import train_all
from models.training.terms import Diverged, Trained, Training, mean_loss
from tasks.data.prepared import Prepared
from tasks.job import TuningJob
from tasks.search.tune import TuningFailed
from tasks.study.samplers import NUMBER
from tasks.study.studies import HYPERPARAMETERS, derived_seed, number_of, ranked, tonights_trials

MEASURED_ROWS = 4096

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Challenger:
    """A configuration of tonight's trained again with fresh seeds, and the one model of those that would ship.

    `values` is the objective on validation rows of each seed's model, in the order of `seeds`; `trained_with` are the
    seeds that were trained together, those that diverged too; `shipped` are the seeds that the model is made of: the
    median's, or all of them for an ensemble, whose metrics are `validation`.
    `generalization_gap` is how much the shipped model's mean loss is higher on validation rows than on training rows;
    `sharpness` how much its training loss rises close by (`evaluation.evaluate`). Both are of 4,096 rows at
    most. `remark` says what is odd about its outputs, if anything is.
    """

    model: nn.Module
    preprocessing: Preprocessing
    hyperparameters: Hyperparameters
    trial: FrozenTrial
    objective: MetricName
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    trained_with: tuple[int, ...]
    shipped: tuple[int, ...]
    validation: dict[MetricName, float]
    generalization_gap: float
    sharpness: float
    remark: str = ""

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.values)):
            raise ValueError(f"a challenger needs finite values, found {self.values}")

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """The standard deviation over seeds; 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def winners_curse(self) -> float:
        """How much better the search's own value was than the confirmed mean."""
        return METRICS[self.objective].gain(self.trial.values[0], self.mean)


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """The challenger, the baseline trained with as many seeds (None where none competed), and how long all of it took.
    The two are one where nothing better than the baseline was found."""

    challenger: Challenger
    baseline: Challenger | None
    seconds: float


def confirm(
    study: optuna.Study,
    job: TuningJob,
    prepared: Prepared,
    *,
    baseline: FrozenTrial | None = None,
    on_candidate: Callable[[Challenger], None] = lambda _: None,
) -> Confirmed:
    """Retrain the top configurations with `confirm.seeds` seeds each; the challenger is the best by the objective's
    mean over seeds on validation rows; with a cost the cheapest of those within `search.cost_tolerance` of it.

    What ships is the model of the median seed: the best seed's would be chosen for its luck again, and do worse than
    its validation value promises. A `baseline` is trained in the same way, and competes.

    Two trials with equal hyperparameters count once; ties go to the earlier trial, which the baseline is. A seed that
    diverges is left out. Raises TuningFailed where every retraining diverged.
    """
    began = time.perf_counter()
    candidates = _top_trials(study, job)
    also = [baseline] if baseline and baseline.number not in {trial.number for trial in candidates} else []
    confirmed: dict[int, Challenger] = {}
    for trial in candidates + also:
        found = _retrain(trial, job, prepared)
        if found is None:
            continue
        confirmed[trial.number] = found
        _logger.info(
            "trial %d: %s %s in the search, %s ± %s confirmed with %d seeds; generalization gap %.4f, sharpness %.4f",
            number_of(trial),
            job.search.objective,
            *map(in_figures, (trial.values[0], found.mean, found.spread)),
            len(found.values),
            found.generalization_gap,
            found.sharpness,
        )
        on_candidate(found)
    if not confirmed:
        raise TuningFailed(f"no configuration of {job.name} could be trained a second time: each diverged")
    challenger = choose(list(confirmed.values()), job)
    if challenger.remark:
        _logger.warning("%s: %s", job.family.name, challenger.remark)
    return Confirmed(
        challenger=challenger,
        baseline=confirmed.get(baseline.number) if baseline else None,
        seconds=time.perf_counter() - began,
    )


def _top_trials(study: optuna.Study, job: TuningJob) -> list[FrozenTrial]:
    distinct: dict[str, FrozenTrial] = {}
    for trial in ranked(tonights_trials(study, TrialState.COMPLETE), job):
        distinct.setdefault(repr(trial.user_attrs[HYPERPARAMETERS]), trial)
    return list(distinct.values())[: job.confirm.candidates]


def _retrain(trial: FrozenTrial, job: TuningJob, prepared: Prepared) -> Challenger | None:
    """None where each seed diverged."""
    hyperparameters = job.family.hyperparameters.from_values(trial.user_attrs[HYPERPARAMETERS])
    seeds = [
        derived_seed(job.seed, f"confirm {number}", trial.user_attrs[NUMBER]) for number in range(job.confirm.seeds)
    ]
    trained: dict[int, Trained] = {}
    outcomes = train_seeds(job.family, job.search.objective, hyperparameters, prepared, seeds)
    for seed, outcome in zip(seeds, outcomes, strict=True):
        if isinstance(outcome, Diverged):
            _logger.warning("trial %d did not confirm with seed %d: %s", number_of(trial), seed, outcome)
        elif isinstance(outcome, Exception):
            raise outcome
        else:
            trained[seed] = outcome
    if not trained:
        return None
    values = {seed: found.validation[job.search.objective] for seed, found in trained.items()}
    shipped = tuple(trained) if job.confirm.ship == "ensemble" else (_median_seed(values, job),)
    model = assemble([trained[seed].model for seed in shipped])
    outputs = predict_outputs(model, prepared.validation.features)
    validation = score(outputs, prepared.validation.target, metrics_of(job.objective.problem))
    measured, unseen = prepared.training.first(MEASURED_ROWS), prepared.validation.first(MEASURED_ROWS)
    with torch.no_grad():
        gap = (mean_loss(model, unseen) - mean_loss(model, measured)).item()
    return Challenger(
        model=model,
        preprocessing=prepared.preprocessing,
        hyperparameters=hyperparameters,
        trial=trial,
        objective=job.search.objective,
        seeds=tuple(trained),
        values=tuple(values.values()),
        trained_with=tuple(seeds),
        shipped=shipped,
        validation=validation,
        generalization_gap=gap,
        sharpness=sharpness(model, lambda: mean_loss(model, measured)),
        remark=_remark(trained[shipped[0]].model, unseen),
    )


def _remark(model: nn.Module, unseen: Split) -> str:
    """Of a model of ours there is nothing to say."""
    return probabilities_in_words(predict_outputs(model, unseen.features)) if own_module_of(model) else ""


def train_seeds(
    family: Family, objective: MetricName, hyperparameters: Hyperparameters, prepared: Prepared, seeds: Sequence[int]
) -> list[Outcome]:
    """Trainings of one configuration, an outcome for each seed; what comes out bit for bit depends on which seeds are
    trained together."""
    trainings = [Training(hyperparameters=hyperparameters, seed=seed) for seed in seeds]
    outcomes = dict(train_all(prepared.setting(family, objective), trainings))
    return [outcomes[place] for place in range(len(seeds))]


def assemble(models: list[nn.Module]) -> nn.Module:
    """One model as it is, several as an ensemble."""
    return models[0] if len(models) == 1 else Ensemble(models).eval()


def _median_seed(values: dict[int, float], job: TuningJob) -> int:
    """Of an even number the worse of the two in the middle."""
    worst_first = sorted(values, key=lambda seed: values[seed], reverse=job.objective.direction == "minimize")
    return worst_first[math.ceil(len(worst_first) / 2) - 1]


def choose(candidates: Sequence[Challenger], job: TuningJob) -> Challenger:
    """The best of them, by the rule of `studies.ranked` over confirmed means; of equal ones the earlier trial's."""
    sign = 1 if job.objective.direction == "maximize" else -1
    earliest_first = sorted(candidates, key=lambda candidate: number_of(candidate.trial))

    def value(candidate: Challenger) -> float:
        return sign * candidate.mean

    best = max(earliest_first, key=value)
    if job.search.cost == "none":
        return best
    near = [candidate for candidate in earliest_first if value(best) - value(candidate) <= job.search.cost_tolerance]
    return min(near, key=lambda candidate: candidate.trial.values[1])
