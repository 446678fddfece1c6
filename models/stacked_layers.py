"""A chain of well-known layers over stacked weights, layer by layer: what vmap gives, without its price.

vmap takes a tenth of a millisecond a layer to find out what to do, and multiplies and adds in two passes; for the
small models that fusing is for, that is as long as the work. Whatever is not such a chain goes through vmap.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.dropout import SeededDropout, drop
from models.families import MLP, Unscale

Tensors = Mapping[str, Tensor]
StackedForward = Callable[[Tensors, Tensor], Tensor]


def stacked_forward(model: nn.Module) -> StackedForward | None:
    """From tensors (members, ...) by the model's names and features (members, rows, ...) to outputs; None where the
    model is not a chain of the layers known here."""
    layers = _chain(model, "")
    if layers is None:
        return None

    def forward(tensors: Tensors, features: Tensor) -> Tensor:
        for layer, names in layers:
            own = {name: tensors[full] for name, full in names.items()}
            features = _LAYERS[type(layer)](layer, own, features)
        return features

    return forward


def _chain(model: nn.Module, prefix: str) -> list[tuple[nn.Module, dict[str, str]]] | None:
    """The layers in their order, each with its tensors' names in the whole model by their own."""
    if type(model) in _LAYERS:
        own = (*model.named_parameters(), *model.named_buffers())
        return [(model, {name: prefix + name for name, _ in own})]
    if type(model) not in (nn.Sequential, MLP):
        return None
    layers = []
    for name, child in model.named_children():
        some = _chain(child, f"{prefix}{name}.")
        if some is None:
            return None
        layers += some
    return layers


def _flatten(_: Any, __: Tensors, features: Tensor) -> Tensor:
    return features.flatten(2)


def _linear(_: Any, own: Tensors, features: Tensor) -> Tensor:
    weight = own["weight"].transpose(1, 2)
    if "bias" not in own:
        return torch.bmm(features, weight)
    return torch.baddbmm(own["bias"].unsqueeze(1), features, weight)


def _elementwise(layer: Any, _: Tensors, features: Tensor) -> Tensor:
    return layer(features)  # type: ignore[no-any-return]


def _dropout(layer: SeededDropout, own: Tensors, features: Tensor) -> Tensor:
    if not layer.training:
        return features
    each = [-1, *[1] * (features.ndim - 1)]
    key, threshold, scale = (own[name].view(each) for name in ("key", "threshold", "scale"))
    return drop(features, key, threshold, scale, features.shape[1:])


def _unscale(_: Any, own: Tensors, features: Tensor) -> Tensor:
    return features.squeeze(-1) * own["scale"].unsqueeze(1) + own["mean"].unsqueeze(1)


_LAYERS: Mapping[type[nn.Module], Callable[[Any, Tensors, Tensor], Tensor]] = {
    nn.Flatten: _flatten,
    nn.Linear: _linear,
    SeededDropout: _dropout,
    Unscale: _unscale,
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh), _elementwise),
}
