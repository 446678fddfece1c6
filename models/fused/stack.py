"""The weights of several models of one structure as one tensor, a row each, and what the models make of rows.

Knows nothing of how weights are trained, nor of whose they are.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from models.fused.layers import stacked_chain
from models.training.dropout import SeededDropout
from models.training.terms import full_precision, gains_from_mixed_precision, unscale_of


class Structure:
    """What stacked models have in common: a template of them, and where each trained parameter lies in a row."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.template = copy.deepcopy(model).to(device).train()
        self.chain = stacked_chain(self.template)
        self.dropouts = [name for name, module in self.template.named_modules() if isinstance(module, SeededDropout)]
        self.mixed_precision = gains_from_mixed_precision(self.template, device)
        unscale = unscale_of(self.template)
        self.unit = None if unscale is None else unscale.scale
        trained = {name: one for name, one in self.template.named_parameters() if one.requires_grad}
        self.shapes = {name: one.shape for name, one in trained.items()}
        # As `l1_norm` has it: not biases, nor the scales of a normalisation.
        self.penalised = torch.cat(
            [torch.full((one.numel(),), float(one.ndim > 1), device=one.device) for one in trained.values()]
        )

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Return each parameter's own (members, ...) of rows (members, parameters)."""
        parts = torch.split(rows, [shape.numel() for shape in self.shapes.values()], dim=1)
        named = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(len(rows), *shape) for (name, shape), part in named}


class Stack:
    """Stacked models: `weights` (members, parameters), and the tensors that are not trained (members, ...) by name."""

    def __init__(self, structure: Structure, weights: Tensor, others: dict[str, Tensor]) -> None:
        self.structure = structure
        self.weights = weights
        self.others = others
        self.parameters = {name: view.detach().requires_grad_() for name, view in structure.views(weights).items()}
        if structure.dropouts:
            names = [f"{name}.key" for name in structure.dropouts]
            self._keys = torch.stack([others[name] for name in names])
            others.update(zip(names, self._keys.unbind(), strict=True))

    @classmethod
    def of(cls, models: Sequence[nn.Module], device: torch.device) -> "Stack":
        structure = Structure(models[0], device)
        named = [tensors_of(model) for model in models]
        # Stacked before they are brought to the device: each copy to it waits for it.
        rows = [torch.cat([tensors[name].detach().flatten() for name in structure.shapes]) for tensors in named]
        others = {
            name: torch.stack([tensors[name].detach() for tensors in named]).to(device)
            for name in named[0]
            if name not in structure.shapes
        }
        return cls(structure, torch.stack(rows).to(device), others)

    def __len__(self) -> int:
        return len(self.weights)

    def only(self, rows: Sequence[int]) -> "Stack":
        """Return a copy of some of its models."""
        return Stack(self.structure, self.weights[rows], {name: tensor[rows] for name, tensor in self.others.items()})

    def draw_dropout_by(self, keys: Tensor) -> None:
        """Have the next masks drawn by these keys (layers, members)."""
        if self.structure.dropouts:
            self._keys.copy_(keys)

    def forward(self, features: Tensor, *, shared: bool = False) -> Tensor:
        """Return outputs (members, rows, ...) for each member's own rows, or for rows that they share."""
        tensors = self.parameters | self.others
        chain, template = self.structure.chain, self.structure.template
        if chain is not None:
            return full_precision(chain(tensors, features.expand(len(self), *features.shape[1 - shared :])))

        def call(tensors: dict[str, Tensor], rows: Tensor) -> Any:
            return functional_call(template, tensors, (rows,))

        return full_precision(vmap(call, in_dims=(0, None if shared else 0), randomness="error")(tensors, features))

    def tensors_of(self, row: int) -> dict[str, Tensor]:
        """Return a member's own parameters and buffers, by the names of its model."""
        return {name: tensor[row].detach() for name, tensor in (self.parameters | self.others).items()}


def tensors_of(model: nn.Module) -> Mapping[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
