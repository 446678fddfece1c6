"""Which of two models is better on the same rows, and how sure that is. Pure functions of outputs and targets.

Both models meet the same rows, so their differences are compared row by row: what makes a row hard for both cancels
out. Rows that were drawn together, such as copies of one, are one observation: the unit of every draw below is a group
of them, because a model that is right on a row is right on its copies, and a hundred copies prove no more than the row
(Field and Welsh, Bootstrapping clustered data, Journal of the Royal Statistical Society B, 2007). Knows nothing of
champions, and decides nothing.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.special import bdtrc
from torch import Tensor

from models.evaluation.evaluate import predictions_of
from models.evaluation.metrics import METRICS, MetricName
from models.evaluation.resampling import (
    RESAMPLES,
    Array,
    can_prove,
    mean_of,
    numbered,
    resample_weights,
    resampled,
    tail_share,
)

FLIPS = 100_000
POWER = 0.8
CALIBRATION_BINS = 15
SLICES_OF_A_REGRESSION = 4


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much better ours is than theirs (`gain`, in the metric's unit, negative where it is worse).

    `low` and `high` bound the gain from each side at the confidence: the gain is above `low` with that confidence, and
    below `high` with that confidence. `better` and `worse` say what is proven. `detectable` is the gain that as many
    rows would prove four times in five. `groups` says how many of the rows are independent of each other.
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
    groups: int
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
    groups: Tensor | None = None,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compare two models' outputs, logits (rows, classes) or values (rows,), for the same target (rows,). Rows with the
    same value of `groups` (rows,) are no independent draws; all are where it is None.

    The bounds are those of the paired percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, chapter 13): groups are drawn with replacement, each with all its rows and both models' outputs. What is
    proven is read from them too, where more groups differ than a coin would put on one side; for accuracy it is told by
    the exact one-sided McNemar test, which keeps its level where the models disagree on a few rows only (McNemar,
    Psychometrika 1947; Dietterich, Neural Computation 1998), and which is `flipped` for groups of several sizes.

    Awkward cases: equal outputs have gain 0 and prove nothing; a single row, or a single group, proves nothing. Raises
    ValueError where an output is not finite.
    """
    rule, wanted, ids = METRICS[metric], target.cpu().numpy(), numbered(groups, len(target))
    predictions = [predictions_of(outputs) for outputs in (ours, theirs)]
    values = [rule.compute(prediction, wanted) for prediction in predictions]
    first, second = (resampled(metric, prediction, wanted) for prediction in predictions)
    gains = np.concatenate([first(w) - second(w) for w in resample_weights(ids, resamples, seed)])
    if rule.direction == "minimize":
        gains = -gains
    count = int(ids.max()) + 1
    tail = tail_share(confidence, ids)
    low, high = (float(np.quantile(gains, share)) for share in (tail, 1 - tail))
    unit = "rows" if count == len(wanted) else "groups of rows"
    if metric == "accuracy":
        right = [(prediction.argmax(axis=1) == wanted).astype(np.float64) for prediction in predictions]
        net = np.bincount(ids, weights=right[0] - right[1]).astype(np.float64)
        better, worse = (p_value <= 1 - confidence for p_value in flipped(net, seed))
        won, lost = int((net > 0).sum()), int((net < 0).sum())
        name = "exact McNemar test" if len(_sizes(net)[0]) < 2 else "sign-flip test"
        method = f"{name} ({won} {unit} won, {lost} lost), bounds by paired bootstrap"
    else:
        differs = (predictions[0] != predictions[1]).reshape(len(wanted), -1).any(axis=1)
        may_prove = can_prove(len(np.unique(ids[differs])), confidence)
        better, worse = low > 0 and may_prove, high < 0 and may_prove
        method = f"paired bootstrap of {unit}"
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
        groups=count,
        method=method,
    )


def interval(
    outputs: Tensor,
    target: Tensor,
    metric: MetricName,
    *,
    seed: int,
    groups: Tensor | None = None,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Where a metric of one model lies with that confidence, both sides together, by the percentile bootstrap."""
    ids = numbered(groups, len(target))
    measure = resampled(metric, predictions_of(outputs), target.cpu().numpy())
    values = np.concatenate([measure(weights) for weights in resample_weights(ids, RESAMPLES, seed)])
    tail = tail_share((1 + confidence) / 2, ids)
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def mcnemar(won: int, lost: int) -> float:
    """The probability that a coin shows heads `won` times or more in `won + lost` throws: the exact one-sided p-value
    of "ours is no better" from the rows on which exactly one of two models is right. 1 where there are none."""
    return float(bdtrc(won - 1, won + lost, 0.5))


def flipped(net: Array, seed: int) -> tuple[float, float]:
    """The probability that rows won less rows lost are as many as in `net` (groups,) where a coin says of each group
    which model has won it: the one-sided p-values of "ours is no better" and of "ours is no worse".

    Where all groups that count are of one size it is exact, and for single rows McNemar's; else it is that of random
    flips, which counts what was found as one of them, so that it keeps its level (Phipson and Smyth, Permutation
    p-values should never be zero, 2010). One group that outweighs all others together proves nothing.
    """
    sizes, counts = _sizes(net)
    if len(sizes) < 2:
        won, lost = int((net > 0).sum()), int((net < 0).sum())
        return mcnemar(won, lost), mcnemar(lost, won)
    random = np.random.default_rng(seed)
    sums = sum(
        size * (2.0 * random.binomial(count, 0.5, FLIPS) - count) for size, count in zip(sizes, counts, strict=True)
    )
    better, worse = (float((1 + np.sum(sums >= sign * net.sum())) / (1 + FLIPS)) for sign in (1, -1))
    return better, worse


def _sizes(net: Array) -> tuple[Array, npt.NDArray[np.int64]]:
    return np.unique(np.abs(net[net != 0]), return_counts=True)


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
    groups: Tensor | None = None,
    resamples: int = RESAMPLES,
) -> list[SliceGain]:
    """The gain in each class (`names` in order), or for a regression in each quarter of the target's values.

    Many slices are many chances to be fooled, so each bound is at the confidence that makes them hold together
    (Bonferroni). A class without a row is left out; where too few groups differ to prove a fall the bound is 0 or more.
    """
    wanted, ids = target.cpu().numpy(), numbered(groups, len(target))
    row_gains, slices = _row_gains(ours, theirs, wanted, names)
    present = {name: chosen for name, chosen in slices.items() if chosen.any()}
    each = 1 - (1 - confidence) / len(present)
    found = []
    for number, (name, chosen) in enumerate(present.items()):
        part, part_ids = row_gains[chosen], np.unique(ids[chosen], return_inverse=True)[1]
        measure = mean_of(part)
        means = np.concatenate([measure(w) for w in resample_weights(part_ids, resamples, seed + number)])
        tail = tail_share(each, part_ids)
        high = float(np.quantile(means, 1 - tail))
        if not can_prove(len(np.unique(part_ids[part != 0])), each):
            high = max(high, 0.0)
        found.append(SliceGain(name=name, gain=float(part.mean()), high=high, rows=len(part)))
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


def _row_gains(
    ours: Tensor, theirs: Tensor, target: npt.NDArray[np.generic], names: tuple[str, ...]
) -> tuple[Array, dict[str, npt.NDArray[np.bool_]]]:
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
