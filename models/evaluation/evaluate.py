"""What a trained model is worth: outputs for every row, metrics by name, and how flat the minimum is that it found.

Knows nothing of who asks.
"""

import statistics
import time
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models.evaluation.metrics import METRICS, MetricName, metrics_of
from models.rows.batches import DiskRows

# Rows that are evaluated at once. What a CNN's layers give for more of them no longer fits a CPU's cache: 2,000 rows of
# 28x28 pixels take twice as long at once as by 256.
EVALUATION_BATCH = {"cpu": 256, "cuda": 8192}
SHARPNESS_RADIUS = 1e-3
SHARPNESS_STEPS = 10


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
