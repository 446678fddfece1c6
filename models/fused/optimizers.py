"""The optimizers of several trainings as one: a row of weights each, and a column for each of their hyperparameters.

Every update is written as PyTorch's own, which a training alone uses (`training.optimizers`). On a CPU, memory is what
limits them, so kernels of PyTorch's that pass over a row once are called row by row. On a GPU launching is, so all rows
of an update share each kernel, and what differs from step to step lies on the device beforehand.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from models.hyperparameters.declared import Hyperparameters, OptimizerName

UpdateName = Literal["sgd", "adam", "rmsprop", "adagrad"]

UPDATES: Mapping[OptimizerName, UpdateName] = {
    "sgd": "sgd",
    "momentum": "sgd",
    "nesterov": "sgd",
    "adam": "adam",
    "adamw": "adam",
    "rmsprop": "rmsprop",
    "adagrad": "adagrad",
}
_STATE: Mapping[UpdateName, tuple[str, ...]] = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "rmsprop": ("square_avg",),
    "adagrad": ("sum",),
}


class StackedOptimizer:
    """Updates weights (trainings, parameters) in place; the trainings are in the order of their update's name.

    `state` (trainings, parameters) is by torch.optim's names; of a name that a training's update does not have, its
    row stays zero.
    """

    def __init__(self, chosen: Sequence[Hyperparameters], weights: Tensor) -> None:
        self._weights = weights
        names = dict.fromkeys(name for one in chosen for name in _STATE[UPDATES[one.optimizer]])
        self.state = {name: torch.zeros_like(weights) for name in names}
        adams = [UPDATES[one.optimizer] == "adam" for one in chosen]
        self._beta1, self._beta2, self._decoupled = (
            torch.tensor(values, dtype=torch.float64)
            for values in (
                [one.beta1 if adam else 0.0 for one, adam in zip(chosen, adams, strict=True)],
                [one.beta2 if adam else 0.0 for one, adam in zip(chosen, adams, strict=True)],
                [one.weight_decay if one.optimizer == "adamw" else 0.0 for one in chosen],
            )
        )
        self._parts = []
        begin = 0
        for update, members in groupby(chosen, key=lambda one: UPDATES[one.optimizer]):
            some = tuple(members)
            rows = slice(begin, begin + len(some))
            begin = rows.stop
            state = {name: self.state[name][rows] for name in _STATE[update]}
            columns = {name: _column(weights, [value(one) for one in some]) for name, value in _COLUMNS.items()}
            part = _Part(update=update, chosen=some, weights=weights[rows], state=state, columns=columns)
            self._parts.append((rows, part))

    def factors(self, rates: Tensor, first_step: int) -> Tensor:
        """What `step` needs of the steps from `first_step` (from 1) on, (steps, 3, trainings) on the weights' device:
        the size of the update, negative; the root of Adam's second bias correction; what is left of a weight after
        AdamW's decay. From learning rates (steps, trainings) in float64 on the CPU."""
        steps = torch.arange(first_step, first_step + len(rates), dtype=torch.float64).unsqueeze(1)
        sizes = -rates / (1 - self._beta1**steps)
        roots = (1 - self._beta2**steps).sqrt()
        kept = 1 - rates * self._decoupled
        return torch.stack([sizes, roots, kept], dim=1).to(self._weights.device, self._weights.dtype)

    def step(self, gradients: Tensor, factors: Tensor) -> None:
        """All rows at once: gradients like the weights, factors (3, trainings). The host reads nothing of them."""
        for rows, part in self._parts:
            _UPDATES[part.update](part, gradients[rows], factors[:, rows].unsqueeze(2))

    def step_by_row(self, gradients: Tensor, rates: Sequence[float], number: int) -> None:
        """The same on a CPU; `rates` are the learning rates, and `number` is the step's, from 1."""
        by_row = gradients.unbind()
        for rows, part in self._parts:
            _UPDATES_BY_ROW[part.update](part, by_row[rows], rates[rows], number)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The rows of one update; columns (trainings, 1) by name, None where all are zero, which spares a pass."""

    update: UpdateName
    chosen: tuple[Hyperparameters, ...]
    weights: Tensor
    state: Mapping[str, Tensor]
    columns: Mapping[str, Tensor | None]

    @cached_property
    def overwritten(self) -> list[Tensor]:
        """Room for each training that its kernel writes to and nobody reads: one's own, so that no NaN gets about."""
        return list(torch.zeros_like(self.weights).unbind())

    @cached_property
    def by_row(self) -> list[tuple[Tensor, ...]]:
        """Of each training its weights and state, which an update changes in place."""
        return list(zip(*(tensor.unbind() for tensor in (self.weights, *self.state.values())), strict=True))

    def __getitem__(self, name: str) -> Tensor:
        """A column that an update cannot do without."""
        column = self.columns[name]
        return torch.zeros_like(self.weights[:, :1]) if column is None else column

    def with_l2(self, gradients: Tensor) -> Tensor:
        decay = self.columns["l2"]
        return gradients if decay is None else torch.addcmul(gradients, self.weights, decay)


def _momentum(chosen: Hyperparameters) -> float:
    return 0.0 if chosen.optimizer == "sgd" else chosen.momentum


_COLUMNS: Mapping[str, Callable[[Hyperparameters], float]] = {
    "l2": lambda one: 0.0 if one.optimizer == "adamw" else one.weight_decay,
    "decoupled": lambda one: one.weight_decay if one.optimizer == "adamw" else 0.0,
    "momentum": _momentum,
    "nesterov": lambda one: float(one.optimizer == "nesterov"),
    "1 - beta1": lambda one: 1 - one.beta1,
    "beta2": lambda one: one.beta2,
    "1 - beta2": lambda one: 1 - one.beta2,
    "alpha": lambda one: one.rmsprop_alpha,
    "1 - alpha": lambda one: 1 - one.rmsprop_alpha,
    "eps": lambda one: one.eps,
}


def _column(weights: Tensor, values: Sequence[float]) -> Tensor | None:
    if not any(values):
        return None
    return torch.tensor(values, dtype=torch.float64).to(weights.device, weights.dtype).unsqueeze(1)


def _sgd(part: _Part, gradients: Tensor, factors: Tensor) -> None:
    buffers = part.state["momentum_buffer"]
    gradients = part.with_l2(gradients)
    momentum, nesterov = part.columns["momentum"], part.columns["nesterov"]
    updates = gradients
    if momentum is not None:
        updates = buffers.mul_(momentum).add_(gradients)
        if nesterov is not None:
            updates = torch.where(nesterov > 0, torch.addcmul(gradients, buffers, momentum), updates)
    part.weights.addcmul_(updates, factors[0])


def _adam(part: _Part, gradients: Tensor, factors: Tensor) -> None:
    means, squares = part.state["exp_avg"], part.state["exp_avg_sq"]
    gradients = part.with_l2(gradients)
    if part.columns["decoupled"] is not None:
        part.weights.mul_(factors[2])
    means.lerp_(gradients, part["1 - beta1"])
    squares.mul_(part["beta2"]).addcmul_(gradients * gradients, part["1 - beta2"])
    denominators = squares.sqrt().div_(factors[1]).add_(part["eps"])
    part.weights.addcmul_(means.div(denominators), factors[0])


def _rmsprop(part: _Part, gradients: Tensor, factors: Tensor) -> None:
    squares = part.state["square_avg"]
    gradients = part.with_l2(gradients)
    squares.mul_(part["alpha"]).addcmul_(gradients * gradients, part["1 - alpha"])
    part.weights.addcmul_(gradients / squares.sqrt().add_(part["eps"]), factors[0])


def _adagrad(part: _Part, gradients: Tensor, factors: Tensor) -> None:
    gradients = part.with_l2(gradients)
    sums = part.state["sum"].addcmul_(gradients, gradients)
    part.weights.addcmul_(gradients / sums.sqrt().add_(part["eps"]), factors[0])


_UPDATES: Mapping[UpdateName, Callable[[_Part, Tensor, Tensor], None]] = {
    "sgd": _sgd,
    "adam": _adam,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
}


def _sgd_by_row(part: _Part, gradients: Sequence[Tensor], rates: Sequence[float], _: int) -> None:
    for chosen, (weights, buffer), gradient, rate in zip(part.chosen, part.by_row, gradients, rates, strict=True):
        torch._fused_sgd_(
            [weights],
            [gradient],
            [buffer] if chosen.optimizer != "sgd" else [],
            weight_decay=chosen.weight_decay,
            momentum=_momentum(chosen),
            lr=rate,
            dampening=0.0,
            nesterov=chosen.optimizer == "nesterov",
            maximize=False,
            is_first_step=False,  # from a buffer of zeros it is the same
        )


def _adam_by_row(part: _Part, gradients: Sequence[Tensor], rates: Sequence[float], number: int) -> None:
    step = torch.tensor(float(number))
    for chosen, (weights, mean, square), gradient, rate in zip(part.chosen, part.by_row, gradients, rates, strict=True):
        _adam_row(chosen, weights, mean, square, gradient, step, rate, beta1=chosen.beta1, beta2=chosen.beta2)


def _rmsprop_by_row(part: _Part, gradients: Sequence[Tensor], rates: Sequence[float], _: int) -> None:
    """PyTorch has no such kernel for RMSprop, but it is Adam whose first moment is the gradient itself and whose
    second needs no correction, because it is infinitely many steps old."""
    step = torch.tensor(math.inf)
    for chosen, (weights, square), mean, gradient, rate in zip(
        part.chosen, part.by_row, part.overwritten, gradients, rates, strict=True
    ):
        _adam_row(chosen, weights, mean, square, gradient, step, rate, beta1=0.0, beta2=chosen.rmsprop_alpha)


def _adam_row(
    chosen: Hyperparameters,
    weights: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    step: Tensor,
    rate: float,
    *,
    beta1: float,
    beta2: float,
) -> None:
    kernel = torch._fused_adamw_ if chosen.optimizer == "adamw" else torch._fused_adam_
    kernel(
        [weights],
        [gradient],
        [mean],
        [square],
        [],
        [step],
        lr=rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=chosen.weight_decay,
        eps=chosen.eps,
        amsgrad=False,
        maximize=False,
    )


def _adagrad_by_row(part: _Part, gradients: Sequence[Tensor], rates: Sequence[float], number: int) -> None:
    step = torch.tensor(float(number))
    for chosen, (weights, squares), gradient, rate in zip(part.chosen, part.by_row, gradients, rates, strict=True):
        torch._fused_adagrad_(
            [weights],
            [gradient],
            [squares],
            [step],
            lr=rate,
            lr_decay=0.0,
            weight_decay=chosen.weight_decay,
            eps=chosen.eps,
            maximize=False,
        )


_UPDATES_BY_ROW: Mapping[UpdateName, Callable[[_Part, Sequence[Tensor], Sequence[float], int], None]] = {
    "sgd": _sgd_by_row,
    "adam": _adam_by_row,
    "rmsprop": _rmsprop_by_row,
    "adagrad": _adagrad_by_row,
}
