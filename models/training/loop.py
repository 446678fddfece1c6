"""The reference: one model, one loop, as plain as it can be. Whatever is faster must agree with it.

Knows nothing of studies: it reports each epoch to a callback, and an exception from there ends the training.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from models.evaluation.evaluate import predict_outputs, score
from models.evaluation.metrics import METRICS, metrics_of
from models.rows.batches import step_count
from models.training.checkpoints import (
    Checkpoint,
    copy_weights,
    load_optimizer,
    optimizer_tensors,
    random_states,
    set_random_states,
)
from models.training.dropout import SeededDropout, dropout_keys
from models.training.optimizers import build_optimizer, l1_norm, learning_rate_at, trained_parameters
from models.training.terms import (
    Epoch,
    Resumable,
    Setting,
    Trained,
    Training,
    forked_random_state,
    gains_from_mixed_precision,
    is_over,
    judged_epoch,
    kept_epoch,
    loss_of,
    new_model,
    training_modes,
)


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
