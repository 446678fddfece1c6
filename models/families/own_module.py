"""A user's module as everything behind it relies on it, and what is asked of one before it is trained.

Strangers write models for a loop of their own: they change the rows in place, drop the batch dimension of a single row,
give float64, or know a layer's size only once it has seen rows. Knows nothing of training.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from models.families.errors import ModelError
from models.rows.shapes import DataShape

# Rows that a module is tried with, and fewest rows of which outputs between 0 and 1 are no chance.
TRIED_ROWS = 8
TELLING_ROWS = 20


class OwnModule(nn.Module):
    """Calls a user's module with rows of its own, and gives outputs (rows, outputs) of the features' type.

    The copy of the rows is what keeps a module that changes them in place from changing them for all others: it costs
    some 5 % of a small model's step, as far as that can be told from noise. Raises ModelError where the module has no
    parameter to train, a lazy layer that no row reaches, or outputs of another shape.
    """

    def __init__(self, name: str, module: nn.Module, shape: DataShape) -> None:
        super().__init__()
        self.model = module
        self._name = name
        self._outputs = shape.outputs
        self._settle_lazy_layers(shape)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ModelError(
                f"{name} must have a parameter to train, found none; keep its layers as attributes or in an "
                "nn.ModuleList, and do not freeze all of them"
            )

    def forward(self, features: Tensor) -> Tensor:
        outputs = self.model(features.clone())
        expected = (features.shape[0], self._outputs)
        if not torch.compiler.is_exporting():  # a program is for any number of rows, and what it gives was checked
            self._check(outputs, expected)
            if outputs.shape == expected and outputs.dtype == features.dtype:
                return outputs  # type: ignore[no-any-return]
        return outputs.reshape(expected).to(features.dtype)  # type: ignore[no-any-return]

    def try_out(self, features: Tensor) -> None:
        """Call the module as training and serving will. Raises ModelError: it does not take one row alone, looks
        up what is not there, or gives what no parameter takes part in; and whatever else it raises for several rows."""
        self.eval()
        try:
            several = self.model(features[:TRIED_ROWS].clone())
        except IndexError as error:
            raise ModelError(
                f"{self._name} raised {in_a_line(error)}; where it looks whole numbers up, as an Embedding does, name "
                "their columns in data.raw, or they arrive standardised, and give it room for the largest"
            ) from error
        self._check(several, (len(features[:TRIED_ROWS]), self._outputs))
        if not several.requires_grad:
            raise ModelError(
                f"{self._name} must give outputs that its parameters take part in, found none that does; leave out "
                "detach and torch.no_grad in its forward"
            )
        try:
            alone = self.model(features[:1].clone())
        except Exception as error:
            raise ModelError(
                f"{self._name} must take a single row, as a champion is asked for, but {in_a_line(error)}; fix its "
                "forward"
            ) from error
        if alone.ndim != several.ndim:
            raise ModelError(
                f"{self._name} must give as many dimensions for a single row as for several, found outputs of shape "
                f"{tuple(alone.shape)} and {tuple(several.shape)}; give squeeze the dimension that it drops"
            )
        if several.isfinite().all() and not alone.isfinite().all():
            raise ModelError(
                f"{self._name} must give finite outputs for a single row as it does for {len(several)}, found "
                f"{alone.flatten().tolist()}; use no statistics of the batch in its forward"
            )

    def _settle_lazy_layers(self, shape: DataShape) -> None:
        """Let lazy layers learn their sizes, before anyone counts, stacks or keeps their weights."""

        def has_lazy() -> bool:
            return any(is_lazy(tensor) for tensor in (*self.parameters(), *self.buffers()))

        if not has_lazy():
            return
        was_training = self.training
        with torch.no_grad():
            self.eval()(torch.zeros(2, *shape.features))
        self.train(was_training)
        if has_lazy():
            raise ModelError(
                f"{self._name} must use each of its lazy layers in evaluation too, found one that is not; give it its "
                "size, or leave it out"
            )

    def _check(self, outputs: Any, expected: tuple[int, int]) -> None:
        """Sizes of 1 may be missing or too many, as squeeze and unsqueeze make them: no value changes its place."""
        if not isinstance(outputs, Tensor):
            found = f"a {type(outputs).__name__}; return the tensor of outputs alone"
        elif not outputs.is_floating_point():
            found = f"{outputs.dtype}; return the outputs before argmax or rounding"
        elif _without_ones(outputs.shape) != _without_ones(expected):
            found = f"{tuple(outputs.shape)}; fix its forward"
        else:
            return
        raise ModelError(f"{self._name} must return outputs of shape {expected}, found {found}")


def own_module_of(model: nn.Module) -> OwnModule | None:
    """Return the user's module that a model is made of; None where the model is one of ours."""
    return next((module for module in model.modules() if isinstance(module, OwnModule)), None)


def probabilities_in_words(outputs: Tensor) -> str:
    """Say why outputs (rows, classes) look like probabilities, where logits are wanted; empty where they do not."""
    if outputs.ndim != 2 or len(outputs) < TELLING_ROWS or not bool(((outputs >= 0) & (outputs <= 1)).all()):
        return ""
    sums = outputs.double().sum(dim=1)
    is_softmax = torch.allclose(sums, torch.ones_like(sums), atol=1e-4)
    how, what = ("sum to 1 in each row", "softmax") if is_softmax else ("lie between 0 and 1", "sigmoid")
    return (
        f"its outputs {how}, as probabilities do, where logits are expected: their softmax is taken once more, so that "
        f"it learns slowly and is never sure; leave out the {what} at its end"
    )


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def in_a_line(error: Exception) -> str:
    """Name an error that a user's module raised, with the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
