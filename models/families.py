"""The model families that a job can name, and how each becomes a torch module.

Each takes hyperparameters and the data's shape and returns a module from features to logits. Knows nothing of training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.hyperparameters import CNNHyperparameters, Hyperparameters, MLPHyperparameters


@dataclass(frozen=True, kw_only=True)
class DataShape:
    """One row's features, without the batch dimension, and the number of classes."""

    features: tuple[int, ...]
    classes: int


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model: what it is tuned by, and how it is built."""

    hyperparameters: type[Hyperparameters]
    build: Callable[[Any, DataShape], nn.Module]


class MLP(nn.Sequential):
    """Features of any shape (batch, ...), flattened, to logits (batch, classes)."""

    def __init__(self, hyperparameters: MLPHyperparameters, shape: DataShape) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        inputs = _size(shape.features)
        for _ in range(hyperparameters.depth):
            layers += [nn.Linear(inputs, hyperparameters.width), nn.ReLU(), nn.Dropout(hyperparameters.dropout)]
            inputs = hyperparameters.width
        super().__init__(*layers, nn.Linear(inputs, shape.classes))


class CNN(nn.Module):
    """Images (batch, channels, height, width) to logits (batch, classes).

    A block halves height and width while they are above 1. What is left is averaged, so the head's size does not
    depend on the image's.
    """

    def __init__(self, hyperparameters: CNNHyperparameters, shape: DataShape) -> None:
        super().__init__()
        if len(shape.features) != 3:
            raise ValueError(
                f"model cnn needs images of shape (channels, height, width), found rows of shape {shape.features}; "
                "choose model mlp or another data source"
            )
        inputs, height, width = shape.features
        blocks: list[nn.Module] = []
        for block in range(hyperparameters.depth):
            outputs = hyperparameters.channels * 2**block
            blocks += [nn.Conv2d(inputs, outputs, kernel_size=3, padding=1), nn.ReLU()]
            if min(height, width) > 1:
                blocks.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Dropout(hyperparameters.dropout), nn.Linear(inputs, shape.classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(images).mean(dim=(2, 3)))  # type: ignore[no-any-return]


FAMILIES = {
    "mlp": Family(hyperparameters=MLPHyperparameters, build=MLP),
    "cnn": Family(hyperparameters=CNNHyperparameters, build=CNN),
}


def family_named(name: str) -> Family:
    """Raises ValueError for an unknown name; the known ones are listed."""
    if name not in FAMILIES:
        raise ValueError(f"must be a known model, found {name!r}; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
