"""The paired bootstrap: a metric of many resamples of rows at once, and how far its bounds can be trusted.

Groups of rows are drawn with replacement, each with all its rows. Knows nothing of two models.
"""

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit
from torch import Tensor

from models.evaluation.metrics import MetricName

RESAMPLES = 2000
RESAMPLED_CELLS = 4_000_000

Array = npt.NDArray[np.float64]
GroupIds = npt.NDArray[np.int64]
ResampledMetric = Callable[[Array], Array]


def tail_share(confidence: float, ids: GroupIds) -> float:
    """The share of resamples beyond a bound. A bootstrap of few draws is too narrow; this widens it by as much as
    Student's interval is wider than a normal one (Hesterberg, What teachers should know about the bootstrap, 2015).
    Groups of unequal sizes count as so many equal ones as have the same design effect (Kish, Survey Sampling, 1965)."""
    sizes = np.bincount(ids)
    draws = float(sizes.sum() ** 2 / (sizes**2).sum())
    if draws <= 1:
        return 0.0
    return NormalDist().cdf(math.sqrt(draws / (draws - 1)) * float(stdtrit(draws - 1, 1 - confidence)))


def can_prove(differing: int, confidence: float) -> bool:
    """Whether a coin would hardly put so many groups on one side; fewer prove nothing, whatever a bootstrap says."""
    return bool(0.5**differing <= 1 - confidence)


def numbered(groups: Tensor | None, rows: int) -> GroupIds:
    """The group of each row, from 0; each row is its own where nothing is known of them."""
    if groups is None:
        return np.arange(rows)
    return np.unique(groups.cpu().numpy(), return_inverse=True)[1]


def resample_weights(ids: GroupIds, resamples: int, seed: int) -> Iterator[Array]:
    """How often each row is drawn in each resample of groups, (some resamples, rows) at a time, to bound the memory."""
    random, count = np.random.default_rng(seed), int(ids.max()) + 1
    most = max(1, RESAMPLED_CELLS // len(ids))
    for begin in range(0, resamples, most):
        drawn = (
            np.bincount(random.integers(count, size=count), minlength=count)
            for _ in range(min(most, resamples - begin))
        )
        yield np.stack(list(drawn)).astype(np.float64)[:, ids]


def resampled(metric: MetricName, predictions: Array, target: npt.NDArray[np.generic]) -> ResampledMetric:
    """From weights (resamples, rows) to the metric of each resample (resamples,): what METRICS would compute for the
    rows repeated so often, without repeating them."""
    if predictions.ndim == 1:
        return _resampled_regression(metric, predictions, target.astype(np.float64))
    labels, classes = target.astype(np.int64), predictions.shape[1]
    if metric == "roc_auc":
        return _resampled_roc_auc(predictions, labels)
    wanted, chosen = np.eye(classes)[labels], np.eye(classes)[predictions.argmax(axis=1)]
    hits = wanted * chosen
    if metric == "accuracy":
        return mean_of(hits.sum(axis=1))
    if metric == "log_loss":
        smallest = np.finfo(np.float64).eps
        return mean_of(-np.log(np.clip(predictions[np.arange(len(labels)), labels], smallest, 1 - smallest)))

    def over_classes(weights: Array) -> Array:
        support, right = weights @ wanted, weights @ hits
        whole = support if metric == "balanced_accuracy" else (support + weights @ chosen) / 2
        occurs = support > 0
        shares = np.divide(right, whole, out=np.zeros_like(right), where=occurs)
        return np.asarray(shares.sum(axis=1) / occurs.sum(axis=1))

    return over_classes


def _resampled_regression(metric: MetricName, values: Array, target: Array) -> ResampledMetric:
    if metric == "mae":
        return mean_of(np.abs(values - target))
    centred = target - target.mean()
    # In units of the largest distance, because the square of 1e-170 is 0, and that of 1e170 infinite.
    unit = max(float(np.abs(distances).max()) for distances in (values - target, centred)) or 1.0
    centred = centred / unit
    squared = mean_of(((values - target) / unit) ** 2)
    if metric == "rmse":
        return lambda weights: unit * np.sqrt(squared(weights))
    first, second = mean_of(centred), mean_of(centred**2)
    # A resample of a single value has no variance, and R² none either: 0, as for a constant prediction.
    return lambda weights: 1 - _divide(squared(weights), second(weights) - first(weights) ** 2, empty=1.0)


def _resampled_roc_auc(probabilities: Array, labels: npt.NDArray[np.int64]) -> ResampledMetric:
    """The area is the chance that a row of the class has the higher probability than a row of the rest, ties counting
    half (Hanley and McNeil, Radiology 1982)."""
    ranks = []
    for label in range(probabilities.shape[1]):
        order = np.argsort(probabilities[:, label], kind="stable")
        _, starts = np.unique(probabilities[order, label], return_index=True)
        ranks.append((order, starts, (labels == label)[order].astype(np.float64)))

    def area(weights: Array) -> Array:
        total, counted = np.zeros(len(weights)), np.zeros(len(weights))
        for order, starts, is_class in ranks:
            sorted_weights = weights[:, order]
            of_class = np.add.reduceat(sorted_weights * is_class, starts, axis=1)
            of_rest = np.add.reduceat(sorted_weights * (1 - is_class), starts, axis=1)
            below = np.cumsum(of_rest, axis=1) - of_rest / 2
            pairs = of_class.sum(axis=1) * of_rest.sum(axis=1)
            total += _divide((of_class * below).sum(axis=1), pairs, empty=0.0)
            counted += pairs > 0
        return _divide(total, counted, empty=0.5)

    return area


def mean_of(rows: Array) -> ResampledMetric:
    return lambda weights: np.asarray(weights @ rows / weights.sum(axis=1))


def _divide(top: Array, bottom: Array, *, empty: float) -> Array:
    return np.divide(top, bottom, out=np.full_like(top, empty), where=bottom > 0)
