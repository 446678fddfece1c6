"""The reference: one model, one loop, as plain as it can be. Whatever is faster must agree with it.

Knows nothing of studies: it reports each epoch to a callback, and an exception from there ends the training.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from models.evaluation.evaluate import predict_outputs, score
from models.evaluation.metrics import METRICS, MetricName, metrics_of
from models.families.family import Family
from models.families.networks import Unscale, build_model
from models.hyperparameters.declared import Hyperparameters
from models.rows.batches import Split, step_count
from models.rows.shapes import DataShape
from models.training.checkpoints import (
    Checkpoint,
    copy_weights,
    load_optimizer,
    optimizer_tensors,
    random_states,
    set_random_states,
)
from models.training.dropout import SeededDropout, dropout_keys, seed_dropout
from models.training.optimizers import build_optimizer, l1_norm, learning_rate_at, trained_parameters

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


def train(setting: Setting, training: Training, report: Callable[[Epoch], None] = lambda _: None) -> Trained:
    """Train one model.

    With `resumable` a training that was stopped goes on after its last checkpoint exactly as it would have; the epochs
    before are reported again. Raises Diverged where something is not finite, ModelError where the model cannot be
    built for data of this shape, and whatever `report` or a user's model raises.
    """
    with forked_random_state(setting.device), training_modes():
        run = _Run(setting, training)
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
        return loss_of(model)(model(split.all_features), split.target, 0.0)
    finally:
        model.train(was_training)


class _Run:
    """One training from its first epoch, or from its checkpoint, to its last."""

    def __init__(self, setting: Setting, training: Training) -> None:
        self._chosen = training.hyperparameters
        self._seed = training.seed
        self._training = setting.training
        self._validation = setting.validation
        self._objective = setting.objective
        self._resumable = training.resumable
        self._device = setting.device
        self._order = torch.Generator().manual_seed(training.seed)
        self._model = _laid_out(new_model(setting, training).to(setting.device), setting)
        self._dropouts = [module for module in self._model.modules() if isinstance(module, SeededDropout)]
        self._loss = loss_of(self._model)
        self._parameters = trained_parameters(self._model)
        self._optimizer = build_optimizer(self._parameters, training.hyperparameters)
        self._mixed_precision = gains_from_mixed_precision(self._model, self._device)
        self.epochs: list[Epoch] = []
        self._best: dict[str, Tensor] = {}
        if training.resumable is not None:
            self._written_at = training.resumable.clock()
            self._resume(training.resumable)

    @property
    def is_over(self) -> bool:
        return is_over(self.epochs, self._chosen, self._objective)

    def train_epoch(self) -> Epoch:
        number = len(self.epochs) + 1
        self._model.train()
        # Summed on the device, which spares a wait for the device at every step.
        total = torch.zeros((), device=self._device)
        batch_size = self._chosen.batch_size
        steps = step_count(len(self._training), batch_size)
        losses = [epoch.validation_loss for epoch in self.epochs]
        keys = dropout_keys([self._seed], len(self._dropouts), (number - 1) * steps, steps).to(self._device)
        for step, (features, target) in enumerate(self._training.batches(batch_size, self._order)):
            progress = (number - 1 + step / steps) / self._chosen.epochs
            rate = learning_rate_at(self._chosen, progress, losses, steps)
            for dropout, key in zip(self._dropouts, keys[step, :, 0], strict=True):
                dropout.key = key
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
            model=self._model.eval().to(memory_format=torch.contiguous_format),  # type: ignore[call-overload]
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
                loss = loss + chosen.l1 * l1_norm(self._parameters)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in self._parameters:
            if parameter.grad is None:  # it took no part in this batch
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:  # as an Embedding may have it, and hardly an optimizer takes it
                parameter.grad = parameter.grad.to_dense()
        if chosen.gradient_clip_norm:
            nn.utils.clip_grad_norm_(self._parameters, chosen.gradient_clip_norm)
        self._optimizer.step()
        return loss.detach()

    def _evaluate(self, number: int, train_loss: float) -> Epoch:
        """A gradient that is not finite makes weights that are not, and they make outputs that are not."""
        outputs = predict_outputs(self._model, self._validation.features)
        validation_loss = self._loss(outputs, self._validation.target, 0.0).item()
        return judged_epoch(number, train_loss, validation_loss, outputs, self._validation.target, self._objective)

    def _kept(self) -> Epoch:
        return kept_epoch(self.epochs, self._chosen, self._objective)

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


def _laid_out(model: nn.Module, setting: Setting) -> nn.Module:
    """The model with its convolutions' channels last in memory, which on a CPU takes them 0.6 of the time, and a third
    of it where nothing is learned; as it is where its forward pass asks for another order, as Tensor.view does."""
    if setting.device.type != "cpu" or not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return model
    try:
        with forked_random_state(setting.device), torch.no_grad():
            copy.deepcopy(model).to(memory_format=torch.channels_last)(torch.zeros(2, *setting.shape.features))  # type: ignore[call-overload]
    except Exception:  # noqa: BLE001 a user's forward may raise anything; if it does so in any order, training tells
        return model
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


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
