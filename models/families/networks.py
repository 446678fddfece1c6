"""The networks of the families, and what is put around one: each is a torch module from features to outputs.

Knows nothing of training, nor of how a job names them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from models.evaluation.evaluate import parameter_count
from models.families.errors import ModelError
from models.hyperparameters.declared import (
    ActivationName,
    CNNHyperparameters,
    Hyperparameters,
    InitialisationName,
    MLPHyperparameters,
)
from models.hyperparameters.domains import Domain, Range, Value
from models.rows.shapes import DataShape

if TYPE_CHECKING:
    from models.families.family import Family


class MLP(nn.Sequential):
    """Features of any shape (batch, ...), flattened, to outputs (batch, outputs)."""

    def __init__(self, hyperparameters: MLPHyperparameters, shape: DataShape) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        inputs, width = math.prod(shape.features), float(hyperparameters.width)
        for _ in range(hyperparameters.depth):
            units = max(1, round(width))
            layers += [nn.Linear(inputs, units), _ACTIVATIONS[hyperparameters.activation]()]
            layers.append(nn.Dropout(hyperparameters.dropout))
            inputs, width = units, width * hyperparameters.taper
        super().__init__(*layers, nn.Linear(inputs, shape.outputs))
        _initialise(self, hyperparameters.initialisation)


class CNN(nn.Module):
    """Images (batch, channels, height, width) to outputs (batch, outputs).

    A block halves height and width while they are above 1. What is left is averaged, so the head's size does not
    depend on the image's.
    """

    def __init__(self, hyperparameters: CNNHyperparameters, shape: DataShape) -> None:
        super().__init__()
        if len(shape.features) != 3:
            raise ModelError(
                f"model cnn needs images of shape (channels, height, width), found rows of shape {shape.features}; "
                "choose model mlp or another data source"
            )
        inputs, height, width = shape.features
        blocks: list[nn.Module] = []
        for block in range(hyperparameters.depth):
            outputs = hyperparameters.channels * 2**block
            blocks.append(nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=not hyperparameters.batch_norm))
            if hyperparameters.batch_norm:
                blocks.append(nn.BatchNorm2d(outputs))
            blocks.append(_ACTIVATIONS[hyperparameters.activation]())
            if min(height, width) > 1:
                blocks.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Dropout(hyperparameters.dropout), nn.Linear(inputs, shape.outputs))
        _initialise(self, hyperparameters.initialisation)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(images).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Unscale(nn.Module):
    """A regression's output (batch, 1) in standard deviations of the training target to its own unit (batch,), in
    float64: 1e-23 squared is 0 in float32, and 1e6 ± 0.01 is 1e6."""

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def fit(self, target: Tensor) -> None:
        """Fit on the training rows' target (rows,), float64; where they do not vary the scale is 1."""
        distances = target - target.mean()
        unit = distances.abs().max()
        self.mean.copy_(target.mean())
        if unit > 0:  # in which the squares of small distances are not 0, nor those of large ones infinite
            self.scale.copy_((distances / unit).square().mean().sqrt() * unit)

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs.squeeze(-1).double() * self.scale + self.mean


class Ensemble(nn.Module):
    """Several models as one: their mean probabilities as logits, or for a regression their mean value.

    Deep ensembles, Lakshminarayanan et al., arXiv 1612.01474.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, features: Tensor) -> Tensor:
        outputs = torch.stack([member(features) for member in self.members])
        if outputs.ndim == 2:
            return outputs.mean(dim=0)
        return outputs.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(self.members))


def build_model(family: "Family", hyperparameters: Hyperparameters, shape: DataShape, members: int = 1) -> nn.Module:
    """The module that is trained, judged and published: to logits (batch, classes), or for a regression to values
    (batch,) in the target's own unit, once its `Unscale` is fitted or loaded. Several members make an `Ensemble`."""
    if members > 1:
        return Ensemble([build_model(family, hyperparameters, shape) for _ in range(members)])
    model = family.build(hyperparameters, shape)
    return nn.Sequential(model, Unscale()) if shape.problem == "regression" else model


def least_parameters(family: "Family", space: Mapping[str, Domain], shape: DataShape) -> int:
    """How many parameters the smallest model of a space has, of a family of ours."""
    sizes = {
        name: _least(space[name]) for name in ("depth", "width", "taper", "channels", "batch_norm") if name in space
    }
    with torch.device("meta"):
        model = family.build(family.hyperparameters.from_values(sizes), shape)
    return parameter_count(model)


def _least(domain: Domain) -> Value:
    return domain.low if isinstance(domain, Range) else min(domain) if isinstance(domain, tuple) else domain


_ACTIVATIONS: dict[ActivationName, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def _initialise(model: nn.Module, name: InitialisationName) -> None:
    """Weights by the rule of that name, biases zero; `pytorch` leaves what the layers came with.

    kaiming: He et al., arXiv 1502.01852; xavier: Glorot and Bengio, AISTATS 2010; orthogonal: Saxe et al., arXiv
    1312.6120.
    """
    if name == "pytorch":
        return
    rule = {"kaiming": nn.init.kaiming_normal_, "xavier": nn.init.xavier_normal_, "orthogonal": nn.init.orthogonal_}
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            cast(Callable[[Tensor], Tensor], rule[name])(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
