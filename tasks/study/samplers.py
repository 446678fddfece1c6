"""Which Optuna sampler proposes the next trial, and which pruner stops a hopeless one, by the names a job uses.

A sampler is made anew for each trial, with a seed of its own, so whatever it must remember lies in the study's storage.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from heapq import nsmallest
from types import SimpleNamespace
from typing import Any, assert_never, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    CmaEsSampler,
    GPSampler,
    PartialFixedSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tasks.job import PrunerName, SamplerName

GRID_EXHAUSTED = "grid_exhausted"
NUMBER = "number"
STARTUP_TRIALS = 10
# TPE's best, as many as Optuna's takes for good at most, and all that it reads.
TPE_BEST_TRIALS, MOST_TPE_TRIALS = 25, 300
PRUNER_STARTUP_TRIALS = 5
PRUNER_WARMUP_EPOCHS = 3
REDUCTION_FACTOR = 3
CENTRED_SPREAD = 1 / 6


class CentredSampler(BaseSampler):
    """Another sampler's proposals, but for the first few trials, which lie near the middle of each range: drawn from a
    normal distribution around it, a sixth of the range wide. Choices are the other sampler's from the first trial on.

    A range that a person wrote has its good values inside, not at its ends; drawing evenly spends the first trials, a
    quarter of a night's, on its corners. It is how CMA-ES begins (Hansen, The CMA Evolution Strategy: A Tutorial,
    arXiv 1604.00772).
    """

    def __init__(self, then: BaseSampler, *, seed: int, trials: int) -> None:
        self._then = then
        self._random = np.random.default_rng(seed)
        self._trials = trials

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {} if self._begins(study) else self._then.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {} if self._begins(study) else self._then.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if not self._begins(study) or not isinstance(param_distribution, FloatDistribution | IntDistribution):
            return self._then.sample_independent(study, trial, param_name, param_distribution)
        low, high = param_distribution.low, param_distribution.high
        share = float(np.clip(self._random.normal(0.5, CENTRED_SPREAD), 0, 1))
        value = low * (high / low) ** share if param_distribution.log else low + (high - low) * share
        return round(value) if isinstance(param_distribution, IntDistribution) else min(max(value, low), high)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._then.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._then.after_trial(study, trial, state, values)

    def _begins(self, study: optuna.Study) -> bool:
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        return len(study.get_trials(deepcopy=False, states=states)) < self._trials


class GridSampler(BruteForceSampler):
    """Each point of a finite space once, in an order drawn from the seed; knows which hyperparameters depend on
    others, which Optuna's own GridSampler does not. The study's attribute GRID_EXHAUSTED says that none is left."""

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        try:
            super().after_trial(study, trial, state, values)
        except RuntimeError:  # Study.stop, its way to say that no point is left, works in Study.optimize only
            study.set_user_attr(GRID_EXHAUSTED, True)


class _PartOfStudy:
    """A study of whose trials a sampler sees some."""

    def __init__(self, study: optuna.Study, part_of: Callable[[list[FrozenTrial]], list[FrozenTrial]]) -> None:
        self._study, self._part_of = study, part_of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        return self._part_of(self._study._get_trials(deepcopy=deepcopy, states=states, use_cache=use_cache))


class BoundedTPESampler(TPESampler):
    """TPE that reads a bounded number of trials, where Optuna's reads all at each proposal: of a single objective the
    best, which it takes for good, all that run, and of the others so many, evenly from the first to the last. They
    stand for a density, which that many tell as well."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """From one trial of each set of hyperparameters: what others of the same set have changes nothing."""
        return super().infer_relative_search_space(_part(study, _one_of_each_set), trial)

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return super()._sample(_thinned(study), trial, search_space)


def _part(study: optuna.Study, part_of: Callable[[list[FrozenTrial]], list[FrozenTrial]]) -> optuna.Study:
    return cast("optuna.Study", _PartOfStudy(study, part_of))


def _one_of_each_set(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    first: dict[tuple[str, ...], FrozenTrial] = {}
    for trial in trials:
        first.setdefault(tuple(trial.params), trial)
    return list(first.values())


def _thinned(study: optuna.Study) -> optuna.Study:
    """Of several objectives none is left out: which are best, only comparing each with each tells."""
    if len(study.directions) > 1:
        return study
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    complete, running = TrialState.COMPLETE, TrialState.RUNNING  # an enumeration is slow to look into

    def part_of(trials: list[FrozenTrial]) -> list[FrozenTrial]:
        if len(trials) <= MOST_TPE_TRIALS:
            return trials
        kept, values = set(), []
        for place, trial in enumerate(trials):
            if trial.state is complete:
                values.append((sign * trial.values[0], place))
            elif trial.state is running:
                kept.add(place)
        kept.update(place for _, place in nsmallest(TPE_BEST_TRIALS, values))
        others = [place for place in range(len(trials)) if place not in kept]
        step = len(others) / (MOST_TPE_TRIALS - TPE_BEST_TRIALS)
        kept.update(others[int(number * step)] for number in range(MOST_TPE_TRIALS - TPE_BEST_TRIALS))
        return [trials[place] for place in sorted(kept)]

    return _part(study, part_of)


class HyperbandPruner(optuna.pruners.HyperbandPruner):
    """Gives a trial its bracket by its number in the night. Optuna gives it by the study's name and its own number, of
    which one holds the date and the other counts interruptions, so a night would not go as its seed says."""

    def _get_bracket_id(self, study: optuna.Study, trial: FrozenTrial) -> int:  # noqa: ARG002 Optuna's signature
        by_number = SimpleNamespace(study_name="", number=trial.user_attrs.get(NUMBER, trial.number))
        return super()._get_bracket_id(by_number, by_number)  # type: ignore[arg-type]


def build_sampler(
    name: SamplerName, *, seed: int, study_seed: int, fixed: Mapping[str, Any] | None = None
) -> BaseSampler:
    """The sampler for one trial. `seed` is the trial's; `study_seed` stays the same all night, for a sequence that
    all trials share; what is `fixed` is not drawn.

    Trials that run side by side do not get the same point: TPE by the constant liar, GP by conditioning on what runs,
    the others by drawing at random, or by a position in the sequence or grid that each takes for itself.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        sampler = _sampler(name, seed, study_seed)
        return PartialFixedSampler(dict(fixed), sampler) if fixed else sampler


def build_pruner(name: PrunerName, epochs: int) -> optuna.pruners.BasePruner:
    """The pruner of a study whose trials last so many epochs.

    halving: Jamieson and Talwalkar, arXiv 1502.07943, asynchronous as in Li et al., arXiv 1810.05934; hyperband: Li
    et al., arXiv 1603.06560; patient waits until a trial has not improved for some epochs, then asks the median;
    wilcoxon compares a trial's epochs pairwise with the best one's, by a signed-rank test.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return _pruner(name, epochs)


def _sampler(name: SamplerName, seed: int, study_seed: int) -> BaseSampler:
    match name:
        # Without pruning it reached the targets of `make bench ONLY=search` with every seed: on digits after 18 trials
        # and on MNIST after 9, sooner than any other but random on digits (18, four seeds of five); on the census after
        # 19, where CMA-ES needs 7, GP 11, TPE 13. CMA-ES is not it, because Optuna keeps it as a pickle in the study.
        case "auto":
            return CentredSampler(_sampler("tpe", seed, study_seed), seed=seed, trials=STARTUP_TRIALS)
        case "tpe":
            return BoundedTPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, group=True)
        case "gp":
            return GPSampler(
                seed=seed,
                n_startup_trials=STARTUP_TRIALS,
                independent_sampler=TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS),
                warn_independent_sampling=False,
            )
        case "cmaes":  # it moves numbers only; choices and what depends on them are TPE's
            return CmaEsSampler(
                seed=seed,
                independent_sampler=TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS),
                warn_independent_sampling=False,
            )
        case "random":
            return RandomSampler(seed=seed)
        case "qmc":  # the sequence covers the numbers; choices are drawn at random
            return QMCSampler(
                scramble=True,
                seed=study_seed,
                independent_sampler=RandomSampler(seed=seed),
                warn_independent_sampling=False,
            )
        case "grid":
            return GridSampler(seed=seed)
    assert_never(name)


def _pruner(name: PrunerName, epochs: int) -> optuna.pruners.BasePruner:
    median = optuna.pruners.MedianPruner(
        n_startup_trials=PRUNER_STARTUP_TRIALS, n_warmup_steps=PRUNER_WARMUP_EPOCHS, n_min_trials=PRUNER_STARTUP_TRIALS
    )
    match name:
        case "none":
            return optuna.pruners.NopPruner()
        case "median":
            return median
        case "halving":
            return optuna.pruners.SuccessiveHalvingPruner(
                min_resource=max(1, epochs // REDUCTION_FACTOR**2), reduction_factor=REDUCTION_FACTOR
            )
        case "hyperband":
            return HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=REDUCTION_FACTOR)
        case "patient":
            return optuna.pruners.PatientPruner(median, patience=PRUNER_WARMUP_EPOCHS)
        case "wilcoxon":
            return optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=PRUNER_WARMUP_EPOCHS)
    assert_never(name)
