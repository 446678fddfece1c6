"""What is done to raw features before a model sees them: fitted on training rows only, shipped with the model.

The very same module runs in training, in the gate and where the champion is served.
"""

from typing import Self

import torch
from torch import Tensor, nn


class Standardization(nn.Module):
    """Subtract the mean and divide by the standard deviation: per column of a table, per channel of an image.

    A column that never varies keeps scale 1, so it becomes 0 and not NaN.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    @classmethod
    def fit(cls, features: Tensor) -> Self:
        """Fit on training rows (rows, columns) or (rows, channels, height, width)."""
        dimensions = (0, *range(2, features.ndim))
        mean = features.mean(dim=dimensions, keepdim=True)[0]
        scale = features.std(dim=dimensions, keepdim=True, correction=0)[0]
        return cls(mean, torch.where(scale > 0, scale, 1.0))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The inverse of `state_dict`. Raises KeyError where one is missing."""
        return cls(tensors["mean"], tensors["scale"])

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale
