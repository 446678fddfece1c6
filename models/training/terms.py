"""What both engines share: a training's terms, what it gives, and how it computes.

`loop.py` trains one model by them, `fused/` several as one. Knows nothing of steps.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from models.evaluation.evaluate import score
from models.evaluation.metrics import METRICS, MetricName
from models.families.family import Family
from models.families.networks import Unscale, build_model
from models.hyperparameters.declared import Hyperparameters
from models.rows.batches import Split
from models.rows.shapes import DataShape
from models.training.dropout import seed_dropout

MIXED_PRECISION_PARAMETERS = 1_000_000


class Diverged(Exception):
    """A loss, or what the model gives for a validation row, was not finite; the message says at which epoch."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One pass over the training rows: its number (from 1), the mean training loss as it was minimised, and the loss
    and objective on the validation rows after it."""

    number: int
    train_loss: float
    validation_loss: float
    objective: float


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model, its curve, the epoch that its weights are from (the last, or with early stopping the best), and every
    metric on the validation rows."""

    model: nn.Module
    epochs: tuple[Epoch, ...]
    kept: Epoch
    validation: dict[MetricName, float]


@dataclass(frozen=True, kw_only=True)
class Resumable:
    """Where a training keeps its checkpoint, what distinguishes it from any other, and how many seconds of work it
    may lose: a training that is shorter writes none."""

    path: Path
    key: str
    interval_seconds: float
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What several trainings have in common: the family of their models, the rows, and the metric they are judged by
    on the validation rows.

    Of a user's module, by the JSON of what it is built from: `tried` are those that were tried out, and `obstacles` say
    why several of one cannot be fused, None where they can be.
    """

    family: Family
    shape: DataShape
    training: Split
    validation: Split
    objective: MetricName
    tried: set[str] = field(default_factory=set, init=False, compare=False, repr=False)
    obstacles: dict[str, str | None] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def device(self) -> torch.device:
        return self.training.target.device


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training from scratch: initial weights, dropout and the order of rows all come from the seed."""

    hyperparameters: Hyperparameters
    seed: int
    resumable: Resumable | None = None


def mean_loss(model: nn.Module, split: Split) -> Tensor:
    """The mean loss a row without dropout, label smoothing or L1; with a gradient, where that is enabled.

    Cross-entropy in nats; for a regression the squared error over the variance of the target, so that a constant
    prediction has about 1.
    """
    was_training = model.training
    model.eval()
    try:
        return loss_of(model)(model(split.all_features), split.target, 0.0)
    finally:
        model.train(was_training)


def new_model(setting: Setting, training: Training) -> nn.Module:
    """A training's model as it begins, on the CPU. Seeds the global random state: for use inside a fork of it."""
    if setting.device.type == "cpu":  # torch.manual_seed seeds every kind of device, at ten times the price
        torch.default_generator.manual_seed(training.seed)
    else:
        torch.manual_seed(training.seed)
    model = build_model(setting.family, training.hyperparameters, setting.shape)
    seed_dropout(model)
    if (unscale := unscale_of(model)) is not None:
        unscale.fit(setting.training.target)
    return model


def is_over(epochs: Sequence[Epoch], chosen: Hyperparameters, objective: MetricName) -> bool:
    """Whether a training with such a curve has had its epochs, or the patience of early stopping is used up."""
    patience = chosen.early_stopping_patience
    if patience > 0 and epochs and epochs[-1].number - kept_epoch(epochs, chosen, objective).number >= patience:
        return True
    return len(epochs) >= chosen.epochs


def judged_epoch(
    number: int, train_loss: float, validation_loss: float, outputs: Tensor, target: Tensor, objective: MetricName
) -> Epoch:
    """The epoch by its outputs for the validation rows. Raises Diverged where anything is not finite."""
    if not (math.isfinite(train_loss) and math.isfinite(validation_loss) and bool(torch.isfinite(outputs).all())):
        raise Diverged(f"diverged at epoch {number}: the loss is not finite")
    value = score(outputs, target, (objective,))[objective]
    return Epoch(number=number, train_loss=train_loss, validation_loss=validation_loss, objective=value)


def kept_epoch(epochs: Sequence[Epoch], chosen: Hyperparameters, objective: MetricName) -> Epoch:
    """The epoch whose weights count: the last, or with early stopping the first of the best."""
    if not chosen.early_stopping_patience:
        return epochs[-1]
    sign = 1 if METRICS[objective].direction == "maximize" else -1
    return max(epochs, key=lambda epoch: sign * epoch.objective)


def gains_from_mixed_precision(model: nn.Module, device: torch.device) -> bool:
    """bfloat16 autocast pays where the device multiplies it natively and the model is large enough for its matrix
    products to outweigh the casts: a small model's step is bound by kernel launches, and casts are more of them."""
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    return sum(parameter.numel() for parameter in model.parameters()) >= MIXED_PRECISION_PARAMETERS


def full_precision(outputs: Tensor) -> Tensor:
    """What mixed precision made small again; a loss needs the digits."""
    return outputs.float() if outputs.dtype == torch.bfloat16 else outputs


def forked_random_state(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside leaves no trace in the global random state."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def training_modes() -> Iterator[None]:
    """How trainings compute. cuDNN would otherwise choose algorithms by timing them, and another choice is another
    rounding. Numbers below 1e-38, which the gradients of a saturated model are full of, are taken for zero: a CPU works
    with them, but takes up to three times as long for a whole step, and no weight moves by them."""
    torch.set_flush_denormal(True)
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
            yield
    finally:
        torch.set_flush_denormal(False)


def unscale_of(model: nn.Module) -> Unscale | None:
    """The first of a regression's; an ensemble's are all the same. None in a classification."""
    return next((module for module in model.modules() if isinstance(module, Unscale)), None)


def loss_of(model: nn.Module) -> Callable[[Tensor, Tensor, float], Tensor]:
    """From outputs, target and label smoothing to the mean loss a row."""
    if (unscale := unscale_of(model)) is not None:
        return lambda outputs, target, _: ((outputs - target) / unscale.scale).square().mean()
    return lambda outputs, target, smoothing: nn.functional.cross_entropy(
        full_precision(outputs), target, label_smoothing=smoothing
    )
