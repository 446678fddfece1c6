"""The reference: one model, one loop, as plain as it can be. Whatever is faster must agree with it.

Knows nothing of studies: it reports each epoch to a callback, and an exception from there ends the training.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.batches import Split
from models.checkpoints import (
    Checkpoint,
    copy_weights,
    load_optimizer,
    optimizer_tensors,
    random_states,
    set_random_states,
)
from models.evaluate import METRICS, MetricName, metrics_of, predict_outputs, score
from models.families import Family, Unscale, build_model
from models.hyperparameters import Hyperparameters
from models.optimizers import build_optimizer, l1_norm, learning_rate_at
from models.shapes import DataShape

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


def train(
    family: Family,
    hyperparameters: Hyperparameters,
    shape: DataShape,
    training: Split,
    validation: Split,
    *,
    objective: MetricName,
    seed: int,
    report: Callable[[Epoch], None] = lambda _: None,
    resumable: Resumable | None = None,
) -> Trained:
    """Train one model from scratch; initial weights, dropout and the order of rows all come from the seed.

    With `resumable` a training that was stopped goes on after its last checkpoint exactly as it would have; the epochs
    before are reported again. Raises Diverged where something is not finite, ModelError where the model cannot be
    built for data of this shape, and whatever `report` or a user's model raises.
    """
    device = training.target.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _deterministic():
        run = _Run(family, hyperparameters, shape, training, validation, objective, seed, resumable)
        for epoch in run.epochs:
            report(epoch)
        while not run.is_over:
            report(run.train_epoch())
        return run.result()


def mean_loss(model: nn.Module, split: Split) -> Tensor:
    """The mean loss a row without dropout, label smoothing or L1; with a gradient, where that is enabled.

    Cross-entropy in nats; for a regression the squared error over the variance of the target, so that a constant
    prediction has about 1.
    """
    was_training = model.training
    model.eval()
    try:
        return _loss_of(model)(model(split.features), split.target, 0.0)
    finally:
        model.train(was_training)


class _Run:
    """One training from its first epoch, or from its checkpoint, to its last."""

    def __init__(
        self,
        family: Family,
        hyperparameters: Hyperparameters,
        shape: DataShape,
        training: Split,
        validation: Split,
        objective: MetricName,
        seed: int,
        resumable: Resumable | None,
    ) -> None:
        self._chosen = hyperparameters
        self._training = training
        self._validation = validation
        self._objective = objective
        self._resumable = resumable
        self._device = training.target.device
        self._order = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self._model = build_model(family, hyperparameters, shape).to(self._device)
        if (unscale := _unscale_of(self._model)) is not None:
            unscale.fit(training.target)
        self._loss = _loss_of(self._model)
        self._optimizer = build_optimizer(self._model.parameters(), hyperparameters)
        self._mixed_precision = gains_from_mixed_precision(self._model, self._device)
        self.epochs: list[Epoch] = []
        self._best: dict[str, Tensor] = {}
        if resumable is not None:
            self._written_at = resumable.clock()
            self._resume(resumable)

    @property
    def is_over(self) -> bool:
        patience = self._chosen.early_stopping_patience
        stopped = patience > 0 and bool(self.epochs) and self.epochs[-1].number - self._kept().number >= patience
        return stopped or len(self.epochs) >= self._chosen.epochs

    def train_epoch(self) -> Epoch:
        number = len(self.epochs) + 1
        self._model.train()
        # Summed on the device, which spares a wait for the device at every step.
        total = torch.zeros((), device=self._device)
        batch_size = self._chosen.batch_size
        steps = math.ceil(len(self._training) / batch_size)
        losses = [epoch.validation_loss for epoch in self.epochs]
        for step, (features, target) in enumerate(self._training.batches(batch_size, self._order)):
            progress = (number - 1 + step / steps) / self._chosen.epochs
            rate = learning_rate_at(self._chosen, progress, losses, steps)
            total += self._step(features, target, rate) * len(target)
        epoch = self._evaluate(number, (total / len(self._training)).item())
        self.epochs.append(epoch)
        if self._chosen.early_stopping_patience and self._kept() is epoch:
            self._best = copy_weights(self._model)
        if self._resumable is not None:
            self._checkpoint(self._resumable)
        return epoch

    def result(self) -> Trained:
        if self._best:
            self._model.load_state_dict(self._best)
        outputs = predict_outputs(self._model, self._validation.features)
        problem = METRICS[self._objective].problem
        return Trained(
            model=self._model.eval(),
            epochs=tuple(self.epochs),
            kept=self._kept(),
            validation=score(outputs, self._validation.target, metrics_of(problem)),
        )

    def _step(self, features: Tensor, target: Tensor, rate: float) -> Tensor:
        chosen = self._chosen
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed_precision):
            loss = self._loss(self._model(features), target, chosen.label_smoothing)
            if chosen.l1:
                loss = loss + chosen.l1 * l1_norm(self._model)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if chosen.gradient_clip_norm:
            nn.utils.clip_grad_norm_(self._model.parameters(), chosen.gradient_clip_norm)
        self._optimizer.step()
        return loss.detach()

    def _evaluate(self, number: int, train_loss: float) -> Epoch:
        """A gradient that is not finite makes weights that are not, and they make outputs that are not."""
        outputs = predict_outputs(self._model, self._validation.features)
        validation_loss = self._loss(outputs, self._validation.target, 0.0).item()
        if not (math.isfinite(train_loss) and math.isfinite(validation_loss) and bool(torch.isfinite(outputs).all())):
            raise Diverged(f"diverged at epoch {number}: the loss is not finite")
        value = score(outputs, self._validation.target, (self._objective,))[self._objective]
        return Epoch(number=number, train_loss=train_loss, validation_loss=validation_loss, objective=value)

    def _kept(self) -> Epoch:
        """The epoch whose weights count: the last, or with early stopping the first of the best."""
        if not self._chosen.early_stopping_patience:
            return self.epochs[-1]
        sign = 1 if METRICS[self._objective].direction == "maximize" else -1
        return max(self.epochs, key=lambda epoch: sign * epoch.objective)

    def _checkpoint(self, resumable: Resumable) -> None:
        if resumable.clock() - self._written_at < resumable.interval_seconds:
            return
        Checkpoint(
            key=resumable.key,
            curve=[asdict(epoch) for epoch in self.epochs],
            weights=self._model.state_dict(),
            best=self._best,
            optimizer=optimizer_tensors(self._optimizer),
            generators=random_states(self._order, self._device),
        ).write(resumable.path)
        self._written_at = resumable.clock()

    def _resume(self, resumable: Resumable) -> None:
        checkpoint = Checkpoint.read(resumable.path, resumable.key)
        if checkpoint is None:
            return
        self._model.load_state_dict(checkpoint.weights)
        load_optimizer(self._optimizer, checkpoint.optimizer)
        set_random_states(checkpoint.generators, self._order, self._device)
        self._best = {name: tensor.to(self._device) for name, tensor in checkpoint.best.items()}
        self.epochs = [Epoch(**epoch) for epoch in checkpoint.curve]


def gains_from_mixed_precision(model: nn.Module, device: torch.device) -> bool:
    """bfloat16 autocast pays where the device multiplies it natively and the model is large enough for its matrix
    products to outweigh the casts: a small model's step is bound by kernel launches, and casts are more of them."""
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    return sum(parameter.numel() for parameter in model.parameters()) >= MIXED_PRECISION_PARAMETERS


def _deterministic() -> AbstractContextManager[None]:
    """cuDNN would otherwise choose algorithms by timing them, and another choice is another rounding."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(deterministic=True, benchmark=False)
    return flags


def _unscale_of(model: nn.Module) -> Unscale | None:
    """The first of a regression's; an ensemble's are all the same. None in a classification."""
    return next((module for module in model.modules() if isinstance(module, Unscale)), None)


def _loss_of(model: nn.Module) -> Callable[[Tensor, Tensor, float], Tensor]:
    """From outputs, target and label smoothing to the mean loss a row."""
    if (unscale := _unscale_of(model)) is not None:
        variance = unscale.scale**2
        return lambda outputs, target, _: nn.functional.mse_loss(outputs.float(), target) / variance
    return lambda outputs, target, smoothing: nn.functional.cross_entropy(
        outputs.float(), target, label_smoothing=smoothing
    )
