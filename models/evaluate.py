"""What a trained model is worth: outputs for every row, metrics by name, and how flat the minimum is that it found.

Metrics are by scikit-learn's definitions, and tested against it; its own functions check their arguments for longer
than a small model trains for an epoch. Knows nothing of who asks.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models.batches import DiskRows
from models.shapes import Problem

MetricName = Literal["accuracy", "balanced_accuracy", "f1_macro", "roc_auc", "log_loss", "rmse", "mae", "r2"]
# Rows that are evaluated at once. What a CNN's layers give for more of them no longer fits a CPU's cache: 2,000 rows of
# 28x28 pixels take twice as long at once as by 256.
EVALUATION_BATCH = {"cpu": 256, "cuda": 8192}
SHARPNESS_RADIUS = 1e-3
SHARPNESS_STEPS = 10

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


@torch.no_grad()
def predict_outputs(model: nn.Module, features: Tensor | DiskRows) -> Tensor:
    """Logits (rows, classes) or values (rows,) in evaluation mode; the model's own mode is put back.

    Not in inference mode: what a user's model keeps from an evaluation, it may need in training.
    """
    was_training = model.training
    model.eval()
    try:
        rows = EVALUATION_BATCH[features.device.type]
        return torch.cat([model(features[begin : begin + rows]) for begin in range(0, len(features), rows)])
    finally:
        model.train(was_training)


def score(outputs: Tensor, target: Tensor, names: Iterable[MetricName]) -> dict[MetricName, float]:
    """Metrics by name. Outputs that are not finite have none: raises ValueError."""
    predictions = predictions_of(outputs)
    return {name: METRICS[name].compute(predictions, target.cpu().numpy()) for name in names}


def predictions_of(outputs: Tensor) -> npt.NDArray[np.float64]:
    """What a metric reads: class probabilities (rows, classes) of logits, or values (rows,) as they are.

    Raises ValueError where an output is not finite.
    """
    values = outputs.double().softmax(dim=1) if outputs.ndim == 2 else outputs.double()
    if not torch.isfinite(values).all():
        raise ValueError("a model's outputs must be finite to be scored, found NaN or infinity")
    return np.asarray(values.cpu().numpy())


def evaluate(model: nn.Module, features: Tensor | DiskRows, target: Tensor) -> dict[MetricName, float]:
    """Every metric of a model that fits its outputs. Raises ValueError where the outputs are not finite."""
    outputs = predict_outputs(model, features)
    return score(outputs, target, metrics_of("classification" if outputs.ndim == 2 else "regression"))


def parameter_count(model: nn.Module) -> int:
    """How many numbers a training can move."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@torch.no_grad()
def latency_ms(model: nn.Module, row: Tensor) -> float:
    """Median milliseconds from one row (1, ...) on the device to its outputs, of 30 runs after 5 to warm up."""
    was_training = model.training
    model.eval()
    seconds = []
    try:
        for _ in range(35):
            began = time.perf_counter()
            model(row).cpu()  # the copy waits until the device is done
            seconds.append(time.perf_counter() - began)
    finally:
        model.train(was_training)
    return 1000 * statistics.median(seconds[5:])


def sharpness(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """How much the training loss rises, relative to 1 + loss, at worst within a small box around the weights.

    Definition 2.1 of Keskar et al., On Large-Batch Training for Deep Learning (arXiv 1609.04836), over all weights:
    each may move by 0.001 (|w| + 1). They maximise by L-BFGS-B; this takes ten signed gradient steps projected into
    the box and keeps the highest loss seen. `loss` computes the loss of the model as it is; the weights are put back.
    What takes no part in the loss has a gradient of zero. In per cent it is 100 times this; near 0 is flat.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    centre = [weight.detach().clone() for weight in weights]
    radius = [SHARPNESS_RADIUS * (weight.abs() + 1) for weight in centre]
    base = loss()
    worst = base.detach()
    value = base
    try:
        for _ in range(SHARPNESS_STEPS):
            gradients = [one.to_dense() for one in torch.autograd.grad(value, weights, materialize_grads=True)]
            with torch.no_grad():
                for weight, gradient, middle, reach in zip(weights, gradients, centre, radius, strict=True):
                    moved = weight + 2 / SHARPNESS_STEPS * reach * gradient.sign()
                    weight.copy_(torch.minimum(torch.maximum(moved, middle - reach), middle + reach))
            value = loss()
            worst = torch.maximum(worst, value.detach())
    finally:
        with torch.no_grad():
            for weight, middle in zip(weights, centre, strict=True):
                weight.copy_(middle)
    return ((worst - base.detach()) / (1 + base.detach())).item()
