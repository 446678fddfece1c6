"""Which of two models is better on the same rows, and how sure that is. Pure functions of outputs and targets.

Both models meet the same rows, so their differences are compared row by row: what makes a row hard for both cancels
out. Knows nothing of champions, and decides nothing.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.special import bdtrc
from torch import Tensor

from models.evaluate import METRICS, MetricName, predictions_of

RESAMPLES = 2000
POWER = 0.8
CALIBRATION_BINS = 15
SLICES_OF_A_REGRESSION = 4
RESAMPLED_CELLS = 4_000_000

_Array = npt.NDArray[np.float64]
_Resampled = Callable[[_Array], _Array]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much better ours is than theirs (`gain`, in the metric's unit, negative where it is worse).

    `low` and `high` bound the gain from each side at the confidence: the gain is above `low` with that confidence, and
    below `high` with that confidence. `better` and `worse` say what is proven. `detectable` is the gain that as many
    rows would prove four times in five.
    """

    metric: MetricName
    ours: float
    theirs: float
    gain: float
    low: float
    high: float
    better: bool
    worse: bool
    detectable: float
    rows: int
    method: str

    def __post_init__(self) -> None:
        for name in ("ours", "theirs", "gain", "low", "high"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"a comparison needs finite numbers, found {name} {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class SliceGain:
    """The gain on some of the rows: for a class in recall, for a part of a regression's rows in mean absolute error,
    as a share of theirs over all rows. `high` is its upper bound at the confidence, for all slices together."""

    name: str
    gain: float
    high: float
    rows: int


def compare(
    ours: Tensor,
    theirs: Tensor,
    target: Tensor,
    metric: MetricName,
    *,
    confidence: float,
    seed: int,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compare two models' outputs, logits (rows, classes) or values (rows,), for the same target (rows,).

    The bounds are those of the paired percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, chapter 13): rows are drawn with replacement, each with both models' outputs. What is proven is read from
    them too; for accuracy it is told by the exact one-sided McNemar test, which keeps its level where the models
    disagree on a few rows only (McNemar, Psychometrika 1947; Dietterich, Neural Computation 1998).

    Awkward cases: equal outputs have gain 0 and prove nothing; a single row proves nothing. Raises ValueError where
    an output is not finite.
    """
    rule, wanted = METRICS[metric], target.cpu().numpy()
    predictions = [predictions_of(outputs) for outputs in (ours, theirs)]
    values = [rule.compute(prediction, wanted) for prediction in predictions]
    first, second = (_resampled(metric, prediction, wanted) for prediction in predictions)
    gains = np.concatenate([first(w) - second(w) for w in _weights(len(wanted), resamples, seed)])
    if rule.direction == "minimize":
        gains = -gains
    low, high = (float(np.quantile(gains, share)) for share in (1 - confidence, confidence))
    better, worse, method = low > 0, high < 0, "paired bootstrap"
    if metric == "accuracy":
        right = [prediction.argmax(axis=1) == wanted for prediction in predictions]
        only_ours, only_theirs = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
        better = mcnemar(only_ours, only_theirs) <= 1 - confidence
        worse = mcnemar(only_theirs, only_ours) <= 1 - confidence
        method = f"exact McNemar test ({only_ours} rows won, {only_theirs} lost), bounds by paired bootstrap"
    return Comparison(
        metric=metric,
        ours=values[0],
        theirs=values[1],
        gain=rule.gain(*values),
        low=low,
        high=high,
        better=better,
        worse=worse,
        detectable=_sigmas(confidence) * float(gains.std()),
        rows=len(wanted),
        method=method,
    )


def interval(
    outputs: Tensor, target: Tensor, metric: MetricName, *, seed: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Where a metric of one model lies with that confidence, both sides together, by the percentile bootstrap."""
    measure = _resampled(metric, predictions_of(outputs), target.cpu().numpy())
    values = np.concatenate([measure(weights) for weights in _weights(len(target), RESAMPLES, seed)])
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mcnemar(won: int, lost: int) -> float:
    """The probability that a coin shows heads `won` times or more in `won + lost` throws: the exact one-sided p-value
    of "ours is no better" from the rows on which exactly one of two models is right. 1 where there are none."""
    return float(bdtrc(won - 1, won + lost, 0.5))


def rows_needed(gain: float, deviation: float, confidence: float) -> int:
    """How many rows prove a mean gain four times in five, where a row's gain has that standard deviation (for
    accuracy: the root of the share of rows on which exactly one of the models is right, less the squared gain)."""
    return math.ceil((_sigmas(confidence) * deviation / gain) ** 2)


def slice_gains(
    ours: Tensor,
    theirs: Tensor,
    target: Tensor,
    names: tuple[str, ...],
    *,
    confidence: float,
    seed: int,
    resamples: int = RESAMPLES,
) -> list[SliceGain]:
    """The gain in each class (`names` in order), or for a regression in each quarter of the target's values.

    Many slices are many chances to be fooled, so each bound is at the confidence that makes them hold together
    (Bonferroni). A class without a row is left out.
    """
    wanted = target.cpu().numpy()
    row_gains, slices = _row_gains(ours, theirs, wanted, names)
    present = {name: chosen for name, chosen in slices.items() if chosen.any()}
    each = 1 - (1 - confidence) / len(present)
    found = []
    for number, (name, chosen) in enumerate(present.items()):
        part = row_gains[chosen]
        weights = _weights(len(part), resamples, seed + number)
        means = np.concatenate([w @ part for w in weights]) / len(part)
        found.append(
            SliceGain(name=name, gain=float(part.mean()), high=float(np.quantile(means, each)), rows=len(part))
        )
    return found


def calibration_error(outputs: Tensor, target: Tensor) -> float:
    """The expected calibration error of logits (rows, classes): how far, on average over 15 equal bins of the largest
    probability, that probability is from the share of rows it is right on (Guo et al., arXiv 1706.04599)."""
    probabilities = predictions_of(outputs)
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == target.cpu().numpy()
    bins = np.minimum((sure * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    off = np.bincount(bins, weights=sure - right, minlength=CALIBRATION_BINS)
    return float(np.abs(off).sum() / len(sure))


def _sigmas(confidence: float) -> float:
    return NormalDist().inv_cdf(confidence) + NormalDist().inv_cdf(POWER)


def _weights(rows: int, resamples: int, seed: int) -> Iterator[_Array]:
    """How often each row is drawn in each resample, (some resamples, rows) at a time, to bound the memory."""
    random = np.random.default_rng(seed)
    most = max(1, RESAMPLED_CELLS // rows)
    for begin in range(0, resamples, most):
        count = min(most, resamples - begin)
        drawn = (np.bincount(random.integers(rows, size=rows), minlength=rows) for _ in range(count))
        yield np.stack(list(drawn)).astype(np.float64)


def _resampled(metric: MetricName, predictions: _Array, target: npt.NDArray[np.generic]) -> _Resampled:
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
        return _mean_of(hits.sum(axis=1))
    if metric == "log_loss":
        smallest = np.finfo(np.float64).eps
        return _mean_of(-np.log(np.clip(predictions[np.arange(len(labels)), labels], smallest, 1 - smallest)))

    def over_classes(weights: _Array) -> _Array:
        support, right = weights @ wanted, weights @ hits
        whole = support if metric == "balanced_accuracy" else (support + weights @ chosen) / 2
        occurs = support > 0
        shares = np.divide(right, whole, out=np.zeros_like(right), where=occurs)
        return np.asarray(shares.sum(axis=1) / occurs.sum(axis=1))

    return over_classes


def _resampled_regression(metric: MetricName, values: _Array, target: _Array) -> _Resampled:
    if metric == "mae":
        return _mean_of(np.abs(values - target))
    squared = _mean_of((values - target) ** 2)
    if metric == "rmse":
        return lambda weights: np.sqrt(squared(weights))
    centred = target - target.mean()
    first, second = _mean_of(centred), _mean_of(centred**2)
    # A resample of a single value has no variance, and R² none either: 0, as for a constant prediction.
    return lambda weights: 1 - _divide(squared(weights), second(weights) - first(weights) ** 2, empty=1.0)


def _resampled_roc_auc(probabilities: _Array, labels: npt.NDArray[np.int64]) -> _Resampled:
    """The area is the chance that a row of the class has the higher probability than a row of the rest, ties counting
    half (Hanley and McNeil, Radiology 1982)."""
    ranks = []
    for label in range(probabilities.shape[1]):
        order = np.argsort(probabilities[:, label], kind="stable")
        _, starts = np.unique(probabilities[order, label], return_index=True)
        ranks.append((order, starts, (labels == label)[order].astype(np.float64)))

    def area(weights: _Array) -> _Array:
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


def _row_gains(
    ours: Tensor, theirs: Tensor, target: npt.NDArray[np.generic], names: tuple[str, ...]
) -> tuple[_Array, dict[str, npt.NDArray[np.bool_]]]:
    """Each row's gain (rows,), and the rows of each slice by its name."""
    first, second = predictions_of(ours), predictions_of(theirs)
    if first.ndim == 2:
        right, theirs_right = (prediction.argmax(axis=1) == target for prediction in (first, second))
        slices = {f"class {name}": target == number for number, name in enumerate(names)}
        return right.astype(np.float64) - theirs_right, slices
    values = target.astype(np.float64)
    error, their_error = np.abs(first - values), np.abs(second - values)
    part = np.digitize(values, np.quantile(values, np.linspace(0, 1, SLICES_OF_A_REGRESSION + 1)[1:-1]))
    slices = {f"quarter {number + 1} of the target": part == number for number in range(SLICES_OF_A_REGRESSION)}
    return np.asarray((their_error - error) / max(float(their_error.mean()), np.finfo(np.float64).tiny)), slices


def _mean_of(rows: _Array) -> _Resampled:
    return lambda weights: np.asarray(weights @ rows / len(rows))


def _divide(top: _Array, bottom: _Array, *, empty: float) -> _Array:
    return np.divide(top, bottom, out=np.full_like(top, empty), where=bottom > 0)
