"""The gradients of several models' losses as one: by autograd, or by a chain's hand-written backward pass.

Both give losses (members,) and gradients (members, parameters) for features (members, batch, ...) and a target
(members, batch); `Penalised` adds to either what a member's hyperparameters ask for. Knows nothing of optimizers.
"""

from typing import Protocol

import torch
from torch import Tensor

from models.fused.layers import StackedChain
from models.fused.losses import StackedLoss
from models.fused.stack import Stack


class Gradients(Protocol):
    def __call__(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses (members,) and the gradients (members, parameters)."""


class Autograd:
    """For any models, by one backward pass through all of them."""

    def __init__(self, stack: Stack, loss: StackedLoss) -> None:
        self._stack = stack
        self._loss = loss

    def __call__(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        device, structure = self._stack.weights.device, self._stack.structure
        with torch.autocast(device.type, torch.bfloat16, enabled=structure.mixed_precision):
            outputs = self._stack.forward(features)
        losses = self._loss(outputs, target)
        parameters = list(self._stack.parameters.values())
        each = torch.autograd.grad(losses.sum(), parameters, materialize_grads=True)
        return losses.detach(), torch.cat([gradient.flatten(1) for gradient in each], dim=1)


class HandWritten:
    """For a chain of known layers, whose backward pass writes each gradient over the last step's."""

    def __init__(self, stack: Stack, chain: StackedChain, loss: StackedLoss) -> None:
        self._gradients = torch.empty_like(stack.weights)
        views = stack.structure.views
        self._chain = chain.by_hand(views(stack.weights) | stack.others, views(self._gradients))
        self._loss = loss

    @torch.no_grad()
    def __call__(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        outputs, kept = self._chain.forward(features)
        losses, gradient = self._loss.with_gradient(outputs, target)
        self._chain.backward(kept, gradient)
        return losses, self._gradients


class Penalised:
    """With each member's L1 norm added to its loss, and its gradient clipped to its own norm; both (members, 1), None
    where all are zero."""

    def __init__(self, gradients: Gradients, stack: Stack, l1: Tensor | None, clip: Tensor | None) -> None:
        self._gradients = gradients
        self._stack = stack
        self._l1 = l1
        self._clip = clip

    def __call__(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradients = self._gradients(features, target)
        with torch.no_grad():
            if self._l1 is not None:
                penalised = self._stack.weights * self._stack.structure.penalised
                losses = losses + self._l1.squeeze(1) * penalised.abs().sum(dim=1)
                gradients.addcmul_(penalised.sign(), self._l1)
            if self._clip is not None:
                share = (self._clip / (gradients.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
                gradients *= torch.where(self._clip > 0, share, 1.0)
        return losses, gradients
