"""The optimizers of several trainings as one: a row of weights each, and a column for each of their hyperparameters.

Every update is written as PyTorch's own, which a training alone uses (models/optimizers.py). On a CPU, memory is what
limits them, so where PyTorch has a kernel that passes over a row once, it is called row by row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from models.hyperparameters import Hyperparameters, OptimizerName

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

    def __init__(self, chosen: Sequence[Hyperparameters], weights: Tensor, *, by_row: bool, steps: int = 0) -> None:
        self.steps = steps
        names = dict.fromkeys(name for one in chosen for name in _STATE[UPDATES[one.optimizer]])
        self.state = {name: torch.zeros_like(weights) for name in names}
        self._parts = []
        begin = 0
        for update, members in groupby(chosen, key=lambda one: UPDATES[one.optimizer]):
            some = list(members)
            rows = slice(begin, begin + len(some))
            begin = rows.stop
            state = {name: self.state[name][rows] for name in _STATE[update]}
            self._parts.append(
                (rows, _UPDATES[update], _Part(chosen=some, weights=weights[rows], state=state, by_row=by_row))
            )

    def step(self, gradients: Tensor, rates: Tensor) -> None:
        """Gradients like the weights; learning rates (trainings,) on the CPU."""
        self.steps += 1
        for rows, update, part in self._parts:
            update(part, gradients[rows], rates[rows], self.steps)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The rows of one update."""

    chosen: list[Hyperparameters]
    weights: Tensor
    state: dict[str, Tensor]
    by_row: bool
    columns: dict[str, Tensor | None] = field(default_factory=dict)

    def column(self, name: str, value: Callable[[Hyperparameters], float]) -> Tensor | None:
        """(trainings, 1), made once; None where all are zero, which spares a pass over the weights."""
        if name not in self.columns:
            values = [value(one) for one in self.chosen]
            self.columns[name] = self.on_device(torch.tensor(values, dtype=torch.float64)) if any(values) else None
        return self.columns[name]

    def on_device(self, values: Tensor) -> Tensor:
        return values.to(self.weights.device, self.weights.dtype).unsqueeze(1)

    def with_l2(self, gradients: Tensor) -> Tensor:
        decay = self.column("l2", lambda one: 0.0 if one.optimizer == "adamw" else one.weight_decay)
        return gradients if decay is None else torch.addcmul(gradients, self.weights, decay)


def _sgd(part: _Part, gradients: Tensor, rates: Tensor, _steps: int) -> None:
    buffers = part.state["momentum_buffer"]
    if part.by_row:
        for row, (chosen, rate) in enumerate(zip(part.chosen, rates.tolist(), strict=True)):
            torch._fused_sgd_(
                [part.weights[row]],
                [gradients[row]],
                [buffers[row]] if chosen.optimizer != "sgd" else [],
                weight_decay=chosen.weight_decay,
                momentum=_momentum(chosen),
                lr=rate,
                dampening=0.0,
                nesterov=chosen.optimizer == "nesterov",
                maximize=False,
                is_first_step=False,  # from a buffer of zeros it is the same
            )
        return
    gradients = part.with_l2(gradients)
    momentum = part.column("momentum", _momentum)
    nesterov = part.column("nesterov", lambda one: float(one.optimizer == "nesterov"))
    updates = gradients
    if momentum is not None:
        updates = buffers.mul_(momentum).add_(gradients)
        if nesterov is not None:
            updates = torch.where(nesterov > 0, torch.addcmul(gradients, buffers, momentum), updates)
    part.weights.addcmul_(updates, part.on_device(-rates))


def _adam(part: _Part, gradients: Tensor, rates: Tensor, steps: int) -> None:
    means, squares = part.state["exp_avg"], part.state["exp_avg_sq"]
    if part.by_row:
        step = torch.tensor(float(steps))
        for row, (chosen, rate) in enumerate(zip(part.chosen, rates.tolist(), strict=True)):
            kernel = torch._fused_adamw_ if chosen.optimizer == "adamw" else torch._fused_adam_
            kernel(
                [part.weights[row]],
                [gradients[row]],
                [means[row]],
                [squares[row]],
                [],
                [step],
                lr=rate,
                beta1=chosen.beta1,
                beta2=chosen.beta2,
                weight_decay=chosen.weight_decay,
                eps=chosen.eps,
                amsgrad=False,
                maximize=False,
            )
        return
    gradients = part.with_l2(gradients)
    decay = part.column("decoupled", lambda one: one.weight_decay if one.optimizer == "adamw" else 0.0)
    if decay is not None:
        part.weights.mul_(1 - part.on_device(rates) * decay)
    beta1 = torch.tensor([one.beta1 for one in part.chosen], dtype=torch.float64)
    beta2 = torch.tensor([one.beta2 for one in part.chosen], dtype=torch.float64)
    means.lerp_(gradients, part.on_device(1 - beta1))
    squares.mul_(part.on_device(beta2)).addcmul_(gradients * gradients, part.on_device(1 - beta2))
    scale = part.on_device((1 - beta2**steps).sqrt())
    denominators = squares.sqrt().div_(scale).add_(part.on_device(_eps(part)))
    part.weights.addcmul_(means.div(denominators), part.on_device(-rates / (1 - beta1**steps)))


def _rmsprop(part: _Part, gradients: Tensor, rates: Tensor, _steps: int) -> None:
    squares = part.state["square_avg"]
    gradients = part.with_l2(gradients)
    alpha = torch.tensor([one.rmsprop_alpha for one in part.chosen], dtype=torch.float64)
    squares.mul_(part.on_device(alpha)).addcmul_(gradients * gradients, part.on_device(1 - alpha))
    part.weights.addcmul_(gradients / squares.sqrt().add_(part.on_device(_eps(part))), part.on_device(-rates))


def _adagrad(part: _Part, gradients: Tensor, rates: Tensor, _steps: int) -> None:
    gradients = part.with_l2(gradients)
    sums = part.state["sum"].addcmul_(gradients, gradients)
    part.weights.addcmul_(gradients / sums.sqrt().add_(part.on_device(_eps(part))), part.on_device(-rates))


_UPDATES: Mapping[UpdateName, Callable[[_Part, Tensor, Tensor, int], None]] = {
    "sgd": _sgd,
    "adam": _adam,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
}


def _momentum(chosen: Hyperparameters) -> float:
    return 0.0 if chosen.optimizer == "sgd" else chosen.momentum


def _eps(part: _Part) -> Tensor:
    return torch.tensor([one.eps for one in part.chosen], dtype=torch.float64)
