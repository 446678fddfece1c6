"""The steps of an epoch of several trainings as one: batch by batch on a CPU, recorded once and replayed on a GPU.

Both are given rows, dropout's keys and learning rates for the whole epoch, and return the sums of the losses. Knows
nothing of what the gradients are made by, nor of whose trainings these are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.fused.gradients import Gradients
from models.fused.optimizers import StackedOptimizer
from models.fused.replay import Replay
from models.fused.stack import Stack
from models.rows.batches import Split, batch_sizes, in_batches

# Of the batches of a CPU's steps, so many values are copied at once.
GATHERED_VALUES = 2**18


class Steps(Protocol):
    def epoch(self, rows: Tensor, keys: Tensor, rates: Tensor, done: int) -> Tensor:
        """Train each member once on its rows, by their numbers (members, rows).

        Dropout's keys are (steps, layers, members), the learning rates (steps, members) and `done` is how many steps
        each has behind it. Returns the sums of the losses (members,).
        """


@dataclass
class _Steps:
    """What both kinds of steps are taken with."""

    stack: Stack
    gradients: Gradients
    optimizer: StackedOptimizer
    training: Split
    batch_size: int


class ByRow(_Steps):
    """Steps on a CPU, which updates the members' rows of weights one after the other, while they are in its cache."""

    def epoch(self, rows: Tensor, keys: Tensor, rates: Tensor, done: int) -> Tensor:
        total = torch.zeros(len(self.stack))
        steps = zip(self._batches(rows), keys.unbind(), rates.tolist(), strict=True)
        for step, ((features, target), some_keys, learning_rates) in enumerate(steps, done + 1):
            self.stack.draw_dropout_by(some_keys)
            losses, gradients = self.gradients(features, target)
            self.optimizer.step_by_row(gradients, learning_rates, step)
            total.add_(losses, alpha=target.shape[1])
        return total

    def _batches(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (members, batch, ...) and target (members, batch) of each step, from rows (members, rows), gathered
        for several steps at once."""
        batch = self.batch_size
        each = len(rows) * batch * self.training.all_features[0].numel()
        for some in in_batches(rows, batch * max(1, GATHERED_VALUES // each), dim=1):
            yield from zip(*(in_batches(one, batch, dim=1) for one in gathered(self.training, some)), strict=True)


@dataclass  # so that its own __post_init__ is called
class Recorded(_Steps):
    """Steps of nothing that the host must know, so that what is launched at one step is launched at each, but for a
    last one of another size: a GPU replays it as a graph."""

    def __post_init__(self) -> None:
        self._replay = Replay(self.stack.weights.device)
        self._inputs: list[Tensor] = []

    def epoch(self, rows: Tensor, keys: Tensor, rates: Tensor, done: int) -> Tensor:
        factors = self.optimizer.factors(rates, done + 1)
        whole = batch_sizes(rows.shape[1], self.batch_size).count(self.batch_size)
        first, rest = rows[:, : whole * self.batch_size], rows[:, whole * self.batch_size :]
        numbers = first.reshape(len(first), whole, self.batch_size).transpose(0, 1)
        total = self._sum_of_losses((numbers, keys, factors), whole)
        if rest.shape[1]:
            total = total + self._step(rest.to(total.device), keys[-1].to(total.device), factors[-1])
        return total

    def _step(self, rows: Tensor, keys: Tensor, factors: Tensor) -> Tensor:
        """Take one step; returns the sum of its losses (members,)."""
        self.stack.draw_dropout_by(keys)
        losses, gradients = self.gradients(*gathered(self.training, rows))
        with torch.no_grad():
            self.optimizer.step(gradients, factors)
        return losses * rows.shape[1]

    def _sum_of_losses(self, inputs: Sequence[Tensor], steps: int) -> Tensor:
        """Take the first steps of an epoch, each of which reads its part of the inputs (steps, ...), in tensors on the
        device that stay where they are, as a graph needs it. Returns the sums of the losses (members,)."""
        if not self._inputs:
            device = self.stack.weights.device
            self._inputs = [
                torch.empty_like(one, device=device, memory_format=torch.contiguous_format) for one in inputs
            ]
            self._number = torch.zeros(1, dtype=torch.int64, device=device)
            self._total = torch.zeros(len(self.stack), device=device)
        for kept, one in zip(self._inputs, inputs, strict=True):
            kept.copy_(one)
        self._number.zero_()
        self._total.zero_()

        def take_step() -> None:
            self._total += self._step(*(one.index_select(0, self._number).squeeze(0) for one in self._inputs))
            self._number += 1

        for _ in range(steps):
            self._replay(take_step)
        return self._total


def gathered(training: Split, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return features (members, rows, ...) and target (members, rows) by the rows' numbers (members, rows)."""
    # A CPU copies value by value where a row has several dimensions.
    features = training.all_features.flatten(1).index_select(0, rows.flatten())
    return features.view(*rows.shape, *training.all_features.shape[1:]), training.target[rows]
