"""What a trained model is worth: logits for every row, and metrics by name. Knows nothing of who asks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

MetricName = Literal["accuracy", "log_loss"]
EVALUATION_BATCH = 8192


@dataclass(frozen=True, kw_only=True)
class Metric:
    """From logits (rows, classes) and target (rows,) to one number, and whether more of it is better."""

    compute: Callable[[Tensor, Tensor], float]
    direction: Literal["maximize", "minimize"]

    def gain(self, challenger: float, champion: float) -> float:
        """How much better the challenger is, in the metric's own unit; negative where it is worse."""
        return challenger - champion if self.direction == "maximize" else champion - challenger


METRICS: Mapping[MetricName, Metric] = {
    "accuracy": Metric(
        compute=lambda logits, target: (logits.argmax(dim=1) == target).float().mean().item(), direction="maximize"
    ),
    "log_loss": Metric(
        compute=lambda logits, target: nn.functional.cross_entropy(logits, target).item(), direction="minimize"
    ),
}


@torch.inference_mode()
def predict_logits(model: nn.Module, features: Tensor) -> Tensor:
    """Logits (rows, classes) in evaluation mode; the model's own mode is put back."""
    was_training = model.training
    model.eval()
    try:
        return torch.cat([model(batch) for batch in torch.split(features, EVALUATION_BATCH)])
    finally:
        model.train(was_training)


def evaluate(model: nn.Module, features: Tensor, target: Tensor) -> dict[MetricName, float]:
    """Every metric of a model over the given rows."""
    logits = predict_logits(model, features)
    return {name: metric.compute(logits, target) for name, metric in METRICS.items()}
