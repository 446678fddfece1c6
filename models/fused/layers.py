"""A chain of well-known layers over stacked weights, layer by layer: what vmap gives, without its price.

vmap takes a tenth of a millisecond a layer to find out what to do, and multiplies and adds in two passes; for the
small models that fusing is for, that is as long as the work. Whatever is not such a chain goes through vmap.

On a CPU a chain is also led backward by hand: autograd lays out a weight's gradient transposed, which costs a copy, and
puts it where it has room, which costs another before an optimizer finds all of them in one row. What nobody reads any
more is overwritten: a cache holds little more than the weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.families.networks import MLP, Unscale
from models.training.dropout import SeededDropout, dropout_mask

Tensors = Mapping[str, Tensor]
_aten = torch.ops.aten


class StackedChain:
    """Layers in their order, over tensors (members, ...) by the model's names and features (members, rows, ...)."""

    def __init__(self, layers: "list[_Layer]") -> None:
        self._layers = layers

    def __call__(self, tensors: Tensors, features: Tensor) -> Tensor:
        for layer in self._layers:
            features, _ = layer.bound(tensors, {}).forward(features)
        return features

    def by_hand(self, tensors: Tensors, into: Tensors) -> "ChainByHand":
        """The same over these very tensors, to be led backward to those named in `into`."""
        return ChainByHand(self._layers, tensors, into)


class ChainByHand:
    """Layers over tensors that stay where they are; so do the tensors that their gradients are written to."""

    def __init__(self, layers: "list[_Layer]", tensors: Tensors, into: Tensors) -> None:
        self._last = min(place for place, layer in enumerate(layers) if layer.has_any(into))
        self._layers: list[_Bound] = []
        is_kept = False
        for layer in layers:
            bound = layer.bound(tensors, into, may_overwrite=not is_kept)
            is_kept = bound.keeps_outputs or (bound.hands_on and is_kept)
            self._layers.append(bound)

    def forward(self, features: Tensor) -> tuple[Tensor, list[Any]]:
        """Outputs, and what `backward` must know of the way there; the features may be overwritten."""
        kept = []
        for layer in self._layers:
            features, own = layer.forward(features)
            kept.append(own)
        return features, kept

    def backward(self, kept: list[Any], gradient: Tensor) -> None:
        """From the outputs' gradient, which is overwritten, to the tensors'."""
        for place in range(len(self._layers) - 1, self._last - 1, -1):
            gradient = self._layers[place].backward(kept[place], gradient, place > self._last)


def stacked_chain(model: nn.Module) -> StackedChain | None:
    """None where the model is not a chain of the layers known here."""
    layers = _chain(model, "")
    return None if layers is None else StackedChain(layers)


def _chain(model: nn.Module, prefix: str) -> "list[_Layer] | None":
    if type(model) in _RULES and not (isinstance(model, nn.Flatten) and (model.start_dim, model.end_dim) != (1, -1)):
        own = (*model.named_parameters(), *model.named_buffers())
        return [_Layer(model, {name: prefix + name for name, _ in own})]
    if type(model) not in (nn.Sequential, MLP):
        return None
    layers = []
    for name, child in model.named_children():
        some = _chain(child, f"{prefix}{name}.")
        if some is None:
            return None
        layers += some
    return layers


# From the features to the outputs, and whatever the way back needs.
Forward = Callable[[Tensor], tuple[Tensor, Any]]
# From that, the outputs' gradient, which may be overwritten, and whether the features' is asked for, to the latter; one
# that nobody asks for may be anything.
Backward = Callable[[Any, Tensor, bool], Tensor]


@dataclass(frozen=True)
class _Bound:
    """How a layer goes forward and backward over tensors that are known; whether its way back needs its outputs as they
    are; whether it hands on its features, as its outputs."""

    forward: Forward
    backward: Backward
    keeps_outputs: bool = False
    hands_on: bool = False


@dataclass(frozen=True)
class _Layer:
    """One layer, and its tensors' names in the whole model by their own."""

    module: nn.Module
    names: Mapping[str, str]

    def has_any(self, tensors: Tensors) -> bool:
        return not tensors.keys().isdisjoint(self.names.values())

    def bound(self, tensors: Tensors, into: Tensors, *, may_overwrite: bool = False) -> _Bound:
        rule = _RULES[type(self.module)]
        return rule(self.module, self._own(tensors), self._own(into), may_overwrite)

    def _own(self, tensors: Tensors) -> dict[str, Tensor]:
        return {name: tensors[full] for name, full in self.names.items() if full in tensors}


def _flatten(*_: Any) -> _Bound:
    return _Bound(
        lambda features: (features.flatten(2), features.shape),
        lambda shape, gradient, _: gradient.view(shape),
        hands_on=True,
    )


def _linear(_: Any, own: dict[str, Tensor], into: dict[str, Tensor], __: bool) -> _Bound:
    weight = own["weight"]
    transposed = weight.transpose(1, 2)
    bias = own["bias"].unsqueeze(1) if "bias" in own else None

    def forward(features: Tensor) -> tuple[Tensor, Tensor]:
        if bias is None:
            return torch.bmm(features, transposed), features
        return torch.baddbmm(bias, features, transposed), features

    def backward(features: Tensor, gradient: Tensor, is_asked_for: bool) -> Tensor:
        if "weight" in into:
            torch.bmm(gradient.transpose(1, 2), features, out=into["weight"])
        if "bias" in into:
            torch.sum(gradient, dim=1, out=into["bias"])
        return torch.bmm(gradient, weight) if is_asked_for else gradient

    return _Bound(forward, backward)


def _dropout(layer: Any, own: dict[str, Tensor], _: Any, may_overwrite: bool) -> _Bound:
    key, threshold, scale = own["key"], own["threshold"].unsqueeze(1), own["scale"].unsqueeze(1)

    def forward(features: Tensor) -> tuple[Tensor, Tensor | None]:
        if not layer.training:
            return features, None
        mask = dropout_mask(key, threshold, scale, features.shape[1:])
        return features.mul_(mask) if may_overwrite else features * mask, mask

    def backward(mask: Tensor | None, gradient: Tensor, _: bool) -> Tensor:
        return gradient if mask is None else gradient.mul_(mask)

    return _Bound(forward, backward, hands_on=True)


def _unscale(_: Any, own: dict[str, Tensor], *__: Any) -> _Bound:
    scale, mean = own["scale"].unsqueeze(1), own["mean"].unsqueeze(1)
    return _Bound(
        lambda features: (features.squeeze(-1).double() * scale + mean, features.dtype),
        lambda dtype, gradient, __: (gradient * scale).unsqueeze(-1).to(dtype),
    )


def _relu(_: Any, __: Any, ___: Any, may_overwrite: bool) -> _Bound:
    """The way back asks only whether outputs are positive, which no layer that overwrites its features changes."""

    def forward(features: Tensor) -> tuple[Tensor, Tensor]:
        outputs = features.relu_() if may_overwrite else features.relu()
        return outputs, outputs

    def backward(outputs: Tensor, gradient: Tensor, _: bool) -> Tensor:
        _aten.threshold_backward.grad_input(gradient, outputs, 0, grad_input=gradient)
        return gradient

    return _Bound(forward, backward)


Rule = Callable[[Any, dict[str, Tensor], dict[str, Tensor], bool], _Bound]


def _activation(
    forward: Callable[[Any, Tensor], Tensor],
    backward: Callable[[Any, Tensor, Tensor], Tensor],
    *,
    keeps_outputs: bool = False,
) -> Rule:
    """Of a function and its derivative (layer, gradient, features or outputs) in each value on its own. Never in place,
    whatever the layer says: what it would overwrite may be kept."""

    def rule(layer: Any, *_: Any) -> _Bound:
        def lead(features: Tensor) -> tuple[Tensor, Tensor]:
            outputs = forward(layer, features)
            return outputs, outputs if keeps_outputs else features

        return _Bound(lead, lambda kept, gradient, _: backward(layer, gradient, kept), keeps_outputs=keeps_outputs)

    return rule


# From a layer, its tensors, those that their gradients are written to, and whether it may overwrite its features.
_RULES: Mapping[type[nn.Module], Rule] = {
    nn.Flatten: _flatten,
    nn.Linear: _linear,
    SeededDropout: _dropout,
    Unscale: _unscale,
    nn.ReLU: _relu,
    nn.Tanh: _activation(
        lambda _, x: x.tanh(), lambda _, gradient, y: _aten.tanh_backward(gradient, y), keeps_outputs=True
    ),
    nn.LeakyReLU: _activation(
        lambda layer, x: _aten.leaky_relu(x, layer.negative_slope),
        lambda layer, gradient, x: _aten.leaky_relu_backward(gradient, x, layer.negative_slope, False),
    ),
    nn.ELU: _activation(
        lambda layer, x: _aten.elu(x, layer.alpha),
        lambda layer, gradient, x: _aten.elu_backward(gradient, layer.alpha, 1, 1, False, x),
    ),
    nn.GELU: _activation(
        lambda layer, x: _aten.gelu(x, approximate=layer.approximate),
        lambda layer, gradient, x: _aten.gelu_backward(gradient, x, approximate=layer.approximate),
    ),
    nn.SiLU: _activation(lambda _, x: _aten.silu(x), lambda _, gradient, x: _aten.silu_backward(gradient, x)),
}
