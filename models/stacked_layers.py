"""A chain of well-known layers over stacked weights, layer by layer: what vmap gives, without its price.

vmap takes a tenth of a millisecond a layer to find out what to do, and multiplies and adds in two passes; for the
small models that fusing is for, that is as long as the work. Whatever is not such a chain goes through vmap.

On a CPU a chain is also led backward by hand: autograd lays out a weight's gradient transposed, which costs a copy, and
puts it where it has room, which costs another before an optimizer finds all of them in one row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.dropout import SeededDropout, dropout_mask
from models.families import MLP, Unscale

Tensors = Mapping[str, Tensor]
_aten = torch.ops.aten


class StackedChain:
    """Layers in their order, over tensors (members, ...) by the model's names and features (members, rows, ...)."""

    def __init__(self, layers: "list[_Layer]") -> None:
        self._layers = layers

    def __call__(self, tensors: Tensors, features: Tensor) -> Tensor:
        for layer in self._layers:
            features, _ = layer.forward(tensors, features)
        return features

    def forward(self, tensors: Tensors, features: Tensor) -> tuple[Tensor, list[Any]]:
        """Outputs, and what `backward` must know of the way there."""
        kept = []
        for layer in self._layers:
            features, own = layer.forward(tensors, features)
            kept.append(own)
        return features, kept

    def backward(self, tensors: Tensors, kept: list[Any], gradient: Tensor, into: Tensors) -> None:
        """From the outputs' gradient, which is overwritten, to those of the tensors named in `into`, written there."""
        last = min(place for place, layer in enumerate(self._layers) if layer.has_any(into))
        for place in range(len(self._layers) - 1, last - 1, -1):
            gradient = self._layers[place].backward(tensors, kept[place], gradient, into, place > last)


def stacked_chain(model: nn.Module) -> StackedChain | None:
    """None where the model is not a chain of the layers known here."""
    layers = _chain(model, "")
    return None if layers is None else StackedChain(layers)


def _chain(model: nn.Module, prefix: str) -> "list[_Layer] | None":
    if type(model) in _RULES and not (isinstance(model, nn.Flatten) and (model.start_dim, model.end_dim) != (1, -1)):
        own = (*model.named_parameters(), *model.named_buffers())
        return [_Layer(model, {name: prefix + name for name, _ in own}, *_RULES[type(model)])]
    if type(model) not in (nn.Sequential, MLP):
        return None
    layers = []
    for name, child in model.named_children():
        some = _chain(child, f"{prefix}{name}.")
        if some is None:
            return None
        layers += some
    return layers


Forward = Callable[[Any, dict[str, Tensor], Tensor], tuple[Tensor, Any]]
# From the layer, its tensors, what its forward kept, the outputs' gradient, where to write its tensors' gradients, and
# whether the features' is asked for; a gradient that nobody asks for may be anything.
Backward = Callable[[Any, dict[str, Tensor], Any, Tensor, dict[str, Tensor], bool], Tensor]


@dataclass(frozen=True)
class _Layer:
    """One layer, its tensors' names in the whole model by their own, and how it goes forward and backward."""

    module: nn.Module
    names: Mapping[str, str]
    forward_rule: Forward
    backward_rule: Backward

    def has_any(self, tensors: Tensors) -> bool:
        return not tensors.keys().isdisjoint(self.names.values())

    def forward(self, tensors: Tensors, features: Tensor) -> tuple[Tensor, Any]:
        return self.forward_rule(self.module, self._own(tensors), features)

    def backward(self, tensors: Tensors, kept: Any, gradient: Tensor, into: Tensors, is_asked_for: bool) -> Tensor:
        return self.backward_rule(self.module, self._own(tensors), kept, gradient, self._own(into), is_asked_for)

    def _own(self, tensors: Tensors) -> dict[str, Tensor]:
        return {name: tensors[full] for name, full in self.names.items() if full in tensors}


def _flatten(_: Any, __: Any, features: Tensor) -> tuple[Tensor, torch.Size]:
    return features.flatten(2), features.shape


def _unflatten(_: Any, __: Any, shape: torch.Size, gradient: Tensor, *___: Any) -> Tensor:
    return gradient.view(shape)


def _linear(_: Any, own: dict[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    weight = own["weight"].transpose(1, 2)
    if "bias" not in own:
        return torch.bmm(features, weight), features
    return torch.baddbmm(own["bias"].unsqueeze(1), features, weight), features


def _linear_backward(
    _: Any, own: dict[str, Tensor], features: Tensor, gradient: Tensor, into: dict[str, Tensor], is_asked_for: bool
) -> Tensor:
    if "weight" in into:
        torch.bmm(gradient.transpose(1, 2), features, out=into["weight"])
    if "bias" in into:
        torch.sum(gradient, dim=1, out=into["bias"])
    return torch.bmm(gradient, own["weight"]) if is_asked_for else gradient


def _dropout(layer: SeededDropout, own: dict[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor | None]:
    if not layer.training:
        return features, None
    each = [-1, *[1] * (features.ndim - 1)]
    key, threshold, scale = (own[name].view(each) for name in ("key", "threshold", "scale"))
    mask = dropout_mask(key, threshold, scale, features.shape[1:])
    return features * mask, mask


def _dropout_backward(_: Any, __: Any, mask: Tensor, gradient: Tensor, *___: Any) -> Tensor:
    return gradient.mul_(mask)


def _unscale(_: Any, own: dict[str, Tensor], features: Tensor) -> tuple[Tensor, None]:
    return features.squeeze(-1) * own["scale"].unsqueeze(1) + own["mean"].unsqueeze(1), None


def _unscale_backward(_: Any, own: dict[str, Tensor], __: None, gradient: Tensor, *___: Any) -> Tensor:
    return (gradient * own["scale"].unsqueeze(1)).unsqueeze(-1)


def _activation(
    forward: Callable[[Any, Tensor], Tensor], backward: Callable[[Any, Tensor, Tensor], Tensor], *, keeps: str
) -> tuple[Forward, Backward]:
    """Of a function and its derivative (layer, gradient, features or outputs) in each value on its own. Never in place,
    whatever the layer says: what it would overwrite may be kept."""

    def forward_rule(layer: Any, _: dict[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        outputs = forward(layer, features)
        return outputs, outputs if keeps == "outputs" else features

    def backward_rule(layer: Any, _: Any, kept: Tensor, gradient: Tensor, *__: Any) -> Tensor:
        return backward(layer, gradient, kept)

    return forward_rule, backward_rule


_RULES: Mapping[type[nn.Module], tuple[Forward, Backward]] = {
    nn.Flatten: (_flatten, _unflatten),
    nn.Linear: (_linear, _linear_backward),
    SeededDropout: (_dropout, _dropout_backward),
    Unscale: (_unscale, _unscale_backward),
    nn.ReLU: _activation(
        lambda _, x: x.relu(), lambda _, gradient, y: _aten.threshold_backward(gradient, y, 0), keeps="outputs"
    ),
    nn.Tanh: _activation(
        lambda _, x: x.tanh(), lambda _, gradient, y: _aten.tanh_backward(gradient, y), keeps="outputs"
    ),
    nn.LeakyReLU: _activation(
        lambda layer, x: _aten.leaky_relu(x, layer.negative_slope),
        lambda layer, gradient, x: _aten.leaky_relu_backward(gradient, x, layer.negative_slope, False),
        keeps="features",
    ),
    nn.ELU: _activation(
        lambda layer, x: _aten.elu(x, layer.alpha),
        lambda layer, gradient, x: _aten.elu_backward(gradient, layer.alpha, 1, 1, False, x),
        keeps="features",
    ),
    nn.GELU: _activation(
        lambda layer, x: _aten.gelu(x, approximate=layer.approximate),
        lambda layer, gradient, x: _aten.gelu_backward(gradient, x, approximate=layer.approximate),
        keeps="features",
    ),
    nn.SiLU: _activation(
        lambda _, x: _aten.silu(x), lambda _, gradient, x: _aten.silu_backward(gradient, x), keeps="features"
    ),
}
