"""The metrics that a job can name, each from predictions and the target to one number.

By scikit-learn's definitions, and tested against it; its own functions check their arguments for longer than a small
model trains for an epoch. Knows nothing of torch, which keeps what only reads a job quick.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from models.rows.shapes import Problem

MetricName = Literal["accuracy", "balanced_accuracy", "f1_macro", "roc_auc", "log_loss", "rmse", "mae", "r2"]

_Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """From class probabilities (rows, classes) or a regression's values (rows,), and the target (rows,), to one
    number; and whether more of it is better."""

    compute: Callable[[_Array, _Array], float]
    direction: Literal["maximize", "minimize"]
    problem: Problem = "classification"

    def gain(self, challenger: float, champion: float) -> float:
        """How much better the challenger is, in the metric's own unit; negative where it is worse."""
        return challenger - champion if self.direction == "maximize" else champion - challenger


def _accuracy(probabilities: _Array, target: _Array) -> float:
    return float(np.mean(probabilities.argmax(axis=1) == target))


def _balanced_accuracy(probabilities: _Array, target: _Array) -> float:
    """The mean recall of the classes that occur."""
    right, _, rows = _counts(probabilities, target)
    return float(np.mean(right[rows > 0] / rows[rows > 0]))


def _f1_macro(probabilities: _Array, target: _Array) -> float:
    """The mean over the classes that occur of the harmonic mean of precision and recall."""
    right, predicted, rows = _counts(probabilities, target)
    return float(np.mean(2 * right[rows > 0] / (predicted + rows)[rows > 0]))


def _counts(probabilities: _Array, target: _Array) -> tuple[_Array, _Array, _Array]:
    """For each class, how many rows are rightly predicted to be in it, are predicted to be, and are."""
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    right = np.bincount(target[predicted == target], minlength=classes)
    return right, np.bincount(predicted, minlength=classes), np.bincount(target, minlength=classes)


def _roc_auc(probabilities: _Array, target: _Array) -> float:
    """The mean over classes of one class against the rest (Provost and Domingos' unweighted form), each by the ranks
    of its rows (Mann and Whitney). A class that no row has, or every row, has no curve and is left out; 0.5, the value
    of guessing, where none has one."""
    member = target[:, None] == np.arange(probabilities.shape[1])
    inside = member.sum(axis=0)
    outside = len(target) - inside
    curved = (inside > 0) & (outside > 0)
    if not curved.any():
        return 0.5
    ranks = (np.stack([_ranks(column) for column in probabilities.T], axis=1) * member).sum(axis=0)
    areas = (ranks - inside * (inside + 1) / 2)[curved] / (inside * outside)[curved]
    return float(areas.mean())


def _ranks(values: _Array) -> _Array:
    """From 1; equal values share the mean of theirs. SciPy's own costs whoever starts to train a second of imports."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") + 1) / 2


def _log_loss(probabilities: _Array, target: _Array) -> float:
    own = probabilities[np.arange(len(target)), target]
    return float(-np.log(np.maximum(own, np.finfo(own.dtype).eps)).mean())


def _r2(values: _Array, target: _Array) -> float:
    """Of a constant target 1 where every value is right, else 0."""
    missed, spread = _rms(target - values), _rms(target - target.mean())
    return 1 - (missed / spread) ** 2 if spread else float(missed == 0)


def _rms(values: _Array) -> float:
    """The root of the mean square, in units of the largest: the square of 1e-170 is 0, and that of 1e170 infinite."""
    largest = float(np.abs(values).max())
    return largest * float(np.sqrt(np.square(values / largest).mean())) if largest else 0.0


METRICS: Mapping[MetricName, Metric] = {
    "accuracy": Metric(compute=_accuracy, direction="maximize"),
    "balanced_accuracy": Metric(compute=_balanced_accuracy, direction="maximize"),
    "f1_macro": Metric(compute=_f1_macro, direction="maximize"),
    "roc_auc": Metric(compute=_roc_auc, direction="maximize"),
    "log_loss": Metric(compute=_log_loss, direction="minimize"),
    "rmse": Metric(
        compute=lambda values, target: _rms(target - values),
        direction="minimize",
        problem="regression",
    ),
    "mae": Metric(
        compute=lambda values, target: float(np.abs(target - values).mean()),
        direction="minimize",
        problem="regression",
    ),
    "r2": Metric(compute=_r2, direction="maximize", problem="regression"),
}


def in_figures(value: float) -> str:
    """Write a metric as people read it: four decimals, or four digits where it is very large or small."""
    return f"{value:.4f}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.4g}"


def metrics_of(problem: Problem) -> tuple[MetricName, ...]:
    """The names of all metrics that fit the problem."""
    return tuple(name for name, metric in METRICS.items() if metric.problem == problem)
