"""The reference: one model, one loop, as plain as it can be. Whatever is faster must agree with it.

Knows nothing of studies: it reports each epoch to a callback, and an exception from there ends the training.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from models.batches import Split
from models.evaluate import MetricName, evaluate
from models.families import DataShape, Family
from models.hyperparameters import Hyperparameters
from models.optimizers import build_optimizer


class Diverged(Exception):
    """A loss was not finite; the message says at which epoch."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One pass over the training rows: its number (from 1), mean training loss and the validation metrics after it."""

    number: int
    train_loss: float
    validation: dict[MetricName, float]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model after its last epoch, and its curve."""

    model: nn.Module
    epochs: tuple[Epoch, ...]


def train(
    family: Family,
    hyperparameters: Hyperparameters,
    shape: DataShape,
    training: Split,
    validation: Split,
    *,
    seed: int,
    report: Callable[[Epoch], None] = lambda _: None,
) -> Trained:
    """Train one model from scratch; initial weights, dropout and the order of rows all come from the seed.

    Raises Diverged where a training or validation loss is not finite, ValueError where the model cannot be built for
    data of this shape, and whatever `report` raises.
    """
    device = training.target.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        order = torch.Generator().manual_seed(seed)
        model = family.build(hyperparameters, shape).to(device)
        optimizer = build_optimizer(model.parameters(), hyperparameters)
        epochs = []
        for number in range(1, hyperparameters.epochs + 1):
            train_loss = _train_epoch(model, optimizer, training, hyperparameters.batch_size, order)
            metrics = evaluate(model, validation.features, validation.target)
            if not (math.isfinite(train_loss) and math.isfinite(metrics["log_loss"])):
                raise Diverged(f"diverged at epoch {number}: the loss is not finite")
            epochs.append(Epoch(number=number, train_loss=train_loss, validation=metrics))
            report(epochs[-1])
    return Trained(model=model.eval(), epochs=tuple(epochs))


def _train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, training: Split, batch_size: int, order: torch.Generator
) -> float:
    """Mean loss a row. It is summed on the device, which spares a wait for the device at every step."""
    model.train()
    total = torch.zeros((), device=training.target.device)
    for features, target in training.batches(batch_size, order):
        loss = nn.functional.cross_entropy(model(features), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach() * len(target)
    return (total / len(training)).item()
