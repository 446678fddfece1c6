"""Several trainings as one computation: their weights are stacked, and one vmapped model reads all their batches.

A small model leaves a device idle: what a step costs is launching its operations, not doing them (HFTA, Wang et al.,
MLSys 2021, arXiv 2102.02344). Trainings whose models have one structure and whose batches have one size share every
launch; learning rate and schedule, optimizer, penalties, dropout, loss and seed are each one's own. What comes out is
what `training.loop` makes of each, within the rounding of another order of sums. Knows nothing of studies.
"""

import copy
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from models.evaluation.evaluate import predict_outputs, score
from models.evaluation.metrics import metrics_of
from models.families.own_module import in_a_line, own_module_of
from models.fused.layers import ChainByHand, stacked_chain
from models.fused.optimizers import UPDATES, StackedOptimizer
from models.fused.replay import Replay
from models.rows.batches import batch_sizes, in_batches, step_count
from models.training.checkpoints import Checkpoint, random_states
from models.training.dropout import SeededDropout, dropout_keys
from models.training.optimizers import learning_rate_at
from models.training.terms import (
    Diverged,
    Epoch,
    Setting,
    Trained,
    Training,
    forked_random_state,
    full_precision,
    gains_from_mixed_precision,
    is_over,
    judged_epoch,
    kept_epoch,
    loss_of,
    new_model,
    training_modes,
    unscale_of,
)

# Of all members together, at once: small models, whose launches count.
EVALUATED_ROWS = 32_768
# Of the batches of a CPU's steps, so many values are copied at once.
GATHERED_VALUES = 2**18
# As far apart as rounding leaves the loss of a model in a group and on its own.
SAME_LOSS = 1e-2
_logger = logging.getLogger(__name__)

Outcome = Trained | Exception
OnEpoch = Callable[[Mapping[int, Epoch]], Collection[int]]


class NotFusable(Exception):
    """Several trainings cannot be one computation; the message says why."""


class Stopped(Exception):
    """Whoever follows the training had seen enough of it."""


def train_fused(
    setting: Setting, trainings: Mapping[int, Training], on_epoch: OnEpoch
) -> Iterator[tuple[int, Outcome]]:
    """Train all of them as one, by their keys; each outcome is yielded as soon as it is there.

    Where memory does not suffice, the group is halved and each half begins again. Raises NotFusable, with the rest
    still untrained, and whatever `on_epoch` raises.
    """
    waiting = [dict(trainings)]
    while waiting:
        members = waiting.pop(0)
        try:
            for key, outcome in _outcomes(setting, members, on_epoch):
                del members[key]
                yield key, outcome
        except torch.OutOfMemoryError as error:
            keys = list(members)
            if len(keys) == 1:
                yield keys[0], error
                continue
            half = len(keys) // 2
            waiting[:0] = [{key: members[key] for key in some} for some in (keys[:half], keys[half:])]
            _logger.warning("%d trainings as one do not fit into memory; going on with halves", len(keys))


def _outcomes(setting: Setting, members: Mapping[int, Training], on_epoch: OnEpoch) -> Iterator[tuple[int, Outcome]]:
    with _only_not_fusable():
        group = _Group(setting, members)
    for number in range(group.epochs_done):
        stopped = on_epoch({member.key: member.epochs[number] for member in group.members})
        yield from ((key, Stopped()) for key in stopped)
        group.leave(stopped)
    while True:
        finished = [member for member in group.members if is_over(member.epochs, member.chosen, setting.objective)]
        for member in finished:
            yield member.key, group.result(member)
        group.leave([member.key for member in finished])
        if not group.members:
            return
        with _only_not_fusable():
            diverged = group.train_epoch()
        yield from diverged.items()
        group.leave(diverged)
        stopped = on_epoch({member.key: member.epochs[-1] for member in group.members})
        yield from ((key, Stopped()) for key in stopped)
        group.leave(stopped)
        unwritten = group.checkpoint()
        yield from unwritten.items()
        group.leave(unwritten)


@contextmanager
def _only_not_fusable() -> Iterator[None]:
    """A user's forward, and vmap itself, may raise anything."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise NotFusable(in_a_line(error)) from error


@dataclass(kw_only=True, eq=False)
class _Member:
    """One training of a group; its row is its place among the group's members."""

    key: int
    training: Training
    model: nn.Module
    order: torch.Generator
    epochs: list[Epoch] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    written_at: float = 0.0

    def __post_init__(self) -> None:
        self.chosen = self.training.hyperparameters


class _Group:
    """The trainings of a group from their first epoch, or from their checkpoints, on."""

    def __init__(self, setting: Setting, trainings: Mapping[int, Training]) -> None:
        self._setting = setting
        by_update = sorted(trainings.items(), key=lambda item: UPDATES[item[1].hyperparameters.optimizer])
        self.members = []
        for key, training in by_update:
            with forked_random_state(setting.device):
                model = new_model(setting, training)
            order = torch.Generator().manual_seed(training.seed)
            self.members.append(_Member(key=key, training=training, model=model, order=order))
        self._template = copy.deepcopy(self.members[0].model).to(setting.device).train()
        self._chain = stacked_chain(self._template)
        self._layout = _Layout(self._template)
        self._dropouts = [name for name, module in self._template.named_modules() if isinstance(module, SeededDropout)]
        named = [tensors_of(member.model) for member in self.members]
        # Stacked before they are brought to the device: each copy to it waits for it.
        weights = torch.stack([self._layout.flat(tensors) for tensors in named]).to(setting.device)
        others = {
            name: torch.stack([tensors[name].detach() for tensors in named]).to(setting.device)
            for name in self._layout.others
        }
        self._optimizer = StackedOptimizer([member.chosen for member in self.members], weights)
        self._mixed_precision = gains_from_mixed_precision(self._template, setting.device)
        unscale = unscale_of(self._template)
        self._unit = None if unscale is None else unscale.scale
        self._static: _StaticInputs | None = None
        self._arrange(weights, others)
        self._resume()

    @property
    def _by_row(self) -> bool:
        return self._setting.device.type == "cpu"

    @property
    def _batch_size(self) -> int:
        return self.members[0].chosen.batch_size

    @property
    def _steps_an_epoch(self) -> int:
        return step_count(len(self._setting.training), self._batch_size)

    @property
    def epochs_done(self) -> int:
        return len(self.members[0].epochs)

    def leave(self, keys: Collection[int]) -> None:
        """Go on without some of the members, whose memory is given back."""
        if not keys:
            return
        rows = [row for row, member in enumerate(self.members) if member.key not in keys]
        self.members = [self.members[row] for row in rows]
        if not rows:
            return
        weights = self._weights[rows]
        optimizer = StackedOptimizer([member.chosen for member in self.members], weights)
        for name, tensor in optimizer.state.items():
            tensor.copy_(self._optimizer.state[name][rows])
        self._optimizer = optimizer
        self._arrange(weights, {name: tensor[rows] for name, tensor in self._others.items()})

    def train_epoch(self) -> dict[int, Diverged]:
        """One pass of each member over its own order of the rows; returns those that are not finite after it."""
        number, steps = self.epochs_done + 1, self._steps_an_epoch
        done = (number - 1) * steps
        rows = torch.stack(
            [torch.randperm(len(self._setting.training), generator=member.order) for member in self.members]
        )
        rates = self._rates(number, steps)
        seeds = [member.training.seed for member in self.members]
        keys = dropout_keys(seeds, len(self._dropouts), done, steps)
        with training_modes():
            if self._by_row:
                total = self._steps_by_row(rows, keys, rates, done)
            else:
                total = self._steps_at_once(rows, keys, self._optimizer.factors(rates, done + 1))
            return self._evaluate(number, (total / len(self._setting.training)).tolist())

    def _steps_by_row(self, rows: Tensor, keys: Tensor, rates: Tensor, done: int) -> Tensor:
        """An epoch of each member by the numbers of its rows (members, rows), and what the steps need: dropout's keys
        (steps, layers, members) and the learning rates (steps, members). Returns the sum of the losses (members,)."""
        total = torch.zeros(len(self.members))
        steps = zip(self._batches(rows), keys.unbind(), rates.tolist(), strict=True)
        for step, ((features, target), some_keys, learning_rates) in enumerate(steps, done + 1):
            losses, gradients = self._gradients(features, target, some_keys)
            self._optimizer.step_by_row(gradients, learning_rates, step)
            total.add_(losses, alpha=target.shape[1])
        return total

    def _batches(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (members, batch, ...) and target (members, batch) of each step, from rows (members, rows), gathered
        for several steps at once."""
        batch = self._batch_size
        each = len(rows) * batch * self._setting.training.all_features[0].numel()
        for some in in_batches(rows, batch * max(1, GATHERED_VALUES // each), dim=1):
            yield from zip(*(in_batches(one, batch, dim=1) for one in self._gathered(some)), strict=True)

    def _gathered(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features (members, rows, ...) and target (members, rows), by the rows' numbers (members, rows)."""
        training = self._setting.training
        return _taken(training.all_features, rows), training.target[rows]

    def _steps_at_once(self, rows: Tensor, keys: Tensor, factors: Tensor) -> Tensor:
        """The same with the optimizer's factors, and of nothing that the host must know: so that what is launched at
        one step is launched at each, but for a last one of another size."""
        whole = batch_sizes(rows.shape[1], self._batch_size).count(self._batch_size)
        first, rest = rows[:, : whole * self._batch_size], rows[:, whole * self._batch_size :]
        inputs = (first.reshape(len(first), whole, self._batch_size).transpose(0, 1), keys, factors)
        if self._static is None:
            self._static = _StaticInputs(inputs, self._setting.device)
        total = self._static.sum_of_losses(self._step, inputs, whole)
        if rest.shape[1]:
            total = total + self._step(rest.to(total.device), keys[-1].to(total.device), factors[-1])
        return total

    def _step(self, rows: Tensor, keys: Tensor, factors: Tensor) -> Tensor:
        """One step; returns the sum of its losses (members,)."""
        losses, gradients = self._gradients(*self._gathered(rows), keys)
        with torch.no_grad():
            self._optimizer.step(gradients, factors)
        return losses * rows.shape[1]

    def result(self, member: _Member) -> Trained:
        row = self.members.index(member)
        tensors = member.best or self._tensors_of(row)
        model = member.model.to(self._setting.device)
        with torch.no_grad():
            for name, tensor in tensors_of(model).items():
                tensor.copy_(tensors[name])
        outputs = predict_outputs(model, self._setting.validation.features)
        kept = kept_epoch(member.epochs, member.chosen, self._setting.objective)
        if own_module_of(model) is not None:
            loss = loss_of(model)(outputs, self._setting.validation.target, 0.0).item()
            if not math.isclose(loss, kept.validation_loss, rel_tol=SAME_LOSS, abs_tol=SAME_LOSS):
                raise NotFusable("one alone does not give what it gave among others, so it keeps a state that is lost")
        return Trained(
            model=model.eval(),
            epochs=tuple(member.epochs),
            kept=kept,
            validation=score(outputs, self._setting.validation.target, metrics_of(self._setting.shape.problem)),
        )

    def checkpoint(self) -> dict[int, OSError]:
        """Of each member whose last one is old enough; returns those that the disk, which may be full, did not take."""
        unwritten = {}
        for row, member in enumerate(self.members):
            resumable = member.training.resumable
            if resumable is None or resumable.clock() - member.written_at < resumable.interval_seconds:
                continue
            persistent = self._template.state_dict().keys()
            checkpoint = Checkpoint(
                key=resumable.key,
                curve=[asdict(epoch) for epoch in member.epochs],
                weights={name: tensor for name, tensor in self._tensors_of(row).items() if name in persistent},
                best={name: tensor for name, tensor in member.best.items() if name in persistent},
                optimizer=self._optimizer_state(row),
                generators=random_states(member.order, self._setting.device),
            )
            try:
                checkpoint.write(resumable.path)
            except OSError as error:
                unwritten[member.key] = error
            member.written_at = resumable.clock()
        return unwritten

    def _arrange(self, weights: Tensor, others: dict[str, Tensor]) -> None:
        self._weights = weights
        self._others = others
        self._static = None
        self._parameters = {name: view.detach().requires_grad_() for name, view in self._layout.views(weights).items()}
        if self._dropouts:
            self._keys = torch.stack([others[f"{name}.key"] for name in self._dropouts])
            others.update(zip((f"{name}.key" for name in self._dropouts), self._keys.unbind(), strict=True))
        self._led_by_hand: tuple[ChainByHand, Tensor] | None = None
        if self._by_row and self._chain is not None:
            gradients = torch.empty_like(weights)
            tensors = self._layout.views(weights) | others
            self._led_by_hand = self._chain.by_hand(tensors, self._layout.views(gradients)), gradients
        chosen = [member.chosen for member in self.members]
        self._smoothing = self._column([one.label_smoothing for one in chosen])
        # What the class of a row takes from its probability, which is the gradient of cross-entropy.
        self._hit = weights.new_full((1, 1, 1), -1) if self._smoothing is None else self._smoothing.unsqueeze(2) - 1
        self._l1 = self._column([one.l1 for one in chosen])
        self._clip = self._column([one.gradient_clip_norm for one in chosen])

    def _column(self, values: Sequence[float]) -> Tensor | None:
        """(members, 1); None where all are zero."""
        return torch.tensor(values, device=self._setting.device).unsqueeze(1) if any(values) else None

    def _rates(self, number: int, steps: int) -> Tensor:
        """Learning rates (steps, members) of an epoch, on the CPU in float64."""
        rates = []
        for member in self.members:
            losses = [epoch.validation_loss for epoch in member.epochs]
            progress = [(number - 1 + step / steps) / member.chosen.epochs for step in range(steps)]
            rates.append([learning_rate_at(member.chosen, share, losses, steps) for share in progress])
        return torch.tensor(rates, dtype=torch.float64).T

    def _gradients(self, features: Tensor, target: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (members,) of each member on its own batch, features (members, batch, ...) and target (members,
        batch), as it is minimised, and its gradients (members, parameters); `keys` (layers, members) are dropout's."""
        if self._dropouts:
            self._keys.copy_(keys)
        if self._led_by_hand is not None:
            losses, gradients = self._gradients_by_hand(*self._led_by_hand, features, target)
        else:
            with torch.autocast(self._setting.device.type, torch.bfloat16, enabled=self._mixed_precision):
                outputs = self._forward(features)
            losses = self._losses(outputs, target, self._smoothing)
            found = torch.autograd.grad(losses.sum(), list(self._parameters.values()), materialize_grads=True)
            gradients = torch.cat([gradient.flatten(1) for gradient in found], dim=1)
            losses = losses.detach()
        with torch.no_grad():
            if self._l1 is not None:
                penalised = self._weights * self._layout.penalised
                losses = losses + self._l1.squeeze(1) * penalised.abs().sum(dim=1)
                gradients.addcmul_(penalised.sign(), self._l1)
            if self._clip is not None:
                share = (self._clip / (gradients.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
                gradients *= torch.where(self._clip > 0, share, 1.0)
        return losses, gradients

    @torch.no_grad()
    def _gradients_by_hand(
        self, chain: ChainByHand, gradients: Tensor, features: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The losses (members,) without penalties, and the gradients (members, parameters), which the chain writes over
        the last ones."""
        outputs, kept = chain.forward(features)
        losses, gradient = self._losses_and_gradient(outputs, target)
        chain.backward(kept, gradient)
        return losses, gradients

    def _forward(self, features: Tensor, *, shared: bool = False) -> Tensor:
        """Outputs (members, rows, ...) for each member's own rows, or for rows that they share."""
        tensors = self._parameters | self._others
        if self._chain is not None:
            return full_precision(
                self._chain(tensors, features.expand(len(self.members), *features.shape[1 - shared :]))
            )

        def call(tensors: dict[str, Tensor], rows: Tensor) -> Any:
            return functional_call(self._template, tensors, (rows,))

        return full_precision(vmap(call, in_dims=(0, None if shared else 0), randomness="error")(tensors, features))

    def _losses(self, outputs: Tensor, target: Tensor, smoothing: Tensor | None) -> Tensor:
        """The mean loss a row (members,), as `solo` has it."""
        if self._unit is not None:
            return ((outputs - target) / self._unit).square().mean(dim=1)
        return _cross_entropy(_logs(outputs), target, smoothing)

    def _losses_and_gradient(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """`_losses` (members,) of a training batch, and their gradient by the outputs."""
        rows = target.shape[1]
        if self._unit is not None:
            distances = (outputs - target) / self._unit
            return distances.square().mean(dim=1), distances.mul_(2 / rows).div_(self._unit)
        logs = _logs(outputs)
        losses = _cross_entropy(logs, target, self._smoothing)
        gradient = logs.exp_()
        if self._smoothing is not None:
            gradient -= (self._smoothing / logs.shape[1]).unsqueeze(-1)
        classes = target.unsqueeze(1)
        gradient.scatter_add_(1, classes, self._hit.expand(classes.shape))
        return losses, gradient.div_(rows).transpose(1, 2)

    @torch.no_grad()
    def _evaluate(self, number: int, train_losses: list[float]) -> dict[int, Diverged]:
        validation = self._setting.validation
        self._template.eval()
        rows = max(1, EVALUATED_ROWS // len(self.members))
        outputs = torch.cat(
            [self._forward(some, shared=True) for some in torch.split(validation.all_features, rows)], dim=1
        )
        self._template.train()
        losses = self._losses(outputs, validation.target.expand(len(self.members), -1), None).tolist()
        # Off the device at once, not member by member, each of whom would wait for it several times.
        outputs, target = outputs.cpu(), validation.target.cpu()
        diverged = {}
        for row, (member, train_loss, loss) in enumerate(zip(self.members, train_losses, losses, strict=True)):
            try:
                epoch = judged_epoch(number, train_loss, loss, outputs[row], target, self._setting.objective)
            except Diverged as error:
                diverged[member.key] = error
                continue
            member.epochs.append(epoch)
            patience = member.chosen.early_stopping_patience
            if patience and kept_epoch(member.epochs, member.chosen, self._setting.objective) is epoch:
                member.best = {name: tensor.clone() for name, tensor in self._tensors_of(row).items()}
        return diverged

    def _tensors_of(self, row: int) -> dict[str, Tensor]:
        """A member's own parameters and buffers, by the names of its model."""
        return {name: tensor[row].detach() for name, tensor in (self._parameters | self._others).items()}

    def _optimizer_state(self, row: int) -> dict[str, Tensor]:
        """As torch.optim keeps it: by the parameter's number and the name."""
        state = {}
        for name, tensor in self._optimizer.state.items():
            for number, view in enumerate(self._layout.views(tensor).values()):
                state[f"{number}.{name}"] = view[row]
        for number in range(len(self._layout.shapes)):
            state[f"{number}.step"] = torch.tensor(float(self.epochs_done * self._steps_an_epoch))
        return state

    def _resume(self) -> None:
        for row, member in enumerate(self.members):
            resumable = member.training.resumable
            if resumable is None:
                continue
            member.written_at = resumable.clock()
            checkpoint = Checkpoint.read(resumable.path, resumable.key)
            if checkpoint is None:
                continue
            member.epochs = [Epoch(**epoch) for epoch in checkpoint.curve]
            member.order.set_state(checkpoint.generators["order"])
            own = self._tensors_of(row)
            for name, tensor in checkpoint.weights.items():
                own[name].copy_(tensor)
            if checkpoint.best:
                member.best = own | {name: tensor.to(self._setting.device) for name, tensor in checkpoint.best.items()}
            for name, tensor in self._optimizer.state.items():
                for number, view in enumerate(self._layout.views(tensor).values()):
                    if (kept := checkpoint.optimizer.get(f"{number}.{name}")) is not None:
                        view[row].copy_(kept)


class _StaticInputs:
    """What each step of an epoch reads, in tensors on the device that stay where they are, as a graph needs it."""

    def __init__(self, inputs: Sequence[Tensor], device: torch.device) -> None:
        self._inputs = [torch.empty_like(one, device=device, memory_format=torch.contiguous_format) for one in inputs]
        self._number = torch.zeros(1, dtype=torch.int64, device=device)
        self._total = torch.zeros(inputs[-1].shape[-1], device=device)
        self._replay = Replay(device)

    def sum_of_losses(self, step: Callable[..., Tensor], inputs: Sequence[Tensor], steps: int) -> Tensor:
        """(members,) of the first steps of an epoch. `step`, the same at every call, takes a step's part of each of
        the inputs (steps, ..., members last in the last) and returns its losses (members,)."""
        for kept, one in zip(self._inputs, inputs, strict=True):
            kept.copy_(one)
        self._number.zero_()
        self._total.zero_()

        def take_step() -> None:
            self._total += step(*(one.index_select(0, self._number).squeeze(0) for one in self._inputs))
            self._number += 1

        for _ in range(steps):
            self._replay(take_step)
        return self._total


class _Layout:
    """Where each trained parameter lies in a row of stacked weights, and which other tensors a model has."""

    def __init__(self, model: nn.Module) -> None:
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self.shapes = {name: one.shape for name, one in trained.items()}
        self.others = [name for name in tensors_of(model) if name not in trained]
        # As `l1_norm` has it: not biases, nor the scales of a normalisation.
        self.penalised = torch.cat(
            [torch.full((one.numel(),), float(one.ndim > 1), device=one.device) for one in trained.values()]
        )

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].detach().flatten() for name in self.shapes])

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Of rows (members, parameters) each parameter's own (members, ...)."""
        parts = torch.split(rows, [shape.numel() for shape in self.shapes.values()], dim=1)
        named = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(len(rows), *shape) for (name, shape), part in named}


def _taken(features: Tensor, rows: Tensor) -> Tensor:
    """features[rows], which a CPU copies value by value where a row has several dimensions."""
    taken = features.flatten(1).index_select(0, rows.flatten())
    return taken.view(*rows.shape, *features.shape[1:])


def _logs(outputs: Tensor) -> Tensor:
    """Log-probabilities (members, classes, rows) of outputs (members, rows, classes): along the few classes of a row a
    CPU takes them one by one, along the rows as many at once as its registers hold."""
    return outputs.transpose(1, 2).log_softmax(dim=1)


def _cross_entropy(logs: Tensor, target: Tensor, smoothing: Tensor | None) -> Tensor:
    """The mean of each member's rows (members,), from `_logs`, target (members, rows) and smoothing (members, 1)."""
    losses = logs.gather(1, target.unsqueeze(1)).sum(dim=2).squeeze(1).div_(-target.shape[1])
    if smoothing is None:
        return losses
    share = smoothing.squeeze(1)
    return (1 - share) * losses - share * logs.mean(dim=(1, 2))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
