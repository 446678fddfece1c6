"""What is done to raw features before a model sees them: fitted on training rows only, shipped with the model.

The very same module runs in training, in the gate and where the champion is served.
"""

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from models.table import Column

# As few training rows teach nothing about a category.
FREQUENT_ROWS = 10
PERIODS_DAYS = (1.0, 7.0, 365.2425)


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

    def shape_of(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """A row's shape as the model sees it."""
        return features


class TablePreprocessing(nn.Module):
    """A table's matrix (models/table.py) to numbers that a model can learn from; fitted on training rows.

    A number or a date is standardised, a missing one becomes the mean; a date adds its place in the day, the week and
    the year, on circles. A category that enough training rows have becomes a column of 0 and 1, the rarer ones share
    one; where training rows lack values, that is a column too. A category that training never saw counts as a rare
    one, and is 0 everywhere where there were none.
    """

    measured: Tensor
    dated: Tensor
    mean: Tensor
    scale: Tensor
    coded: Tensor
    code: Tensor
    shared: Tensor
    frequent: Tensor
    gaps: Tensor

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Places are of columns in the matrix. `measured` hold numbers or dates, with `mean` and `scale`; `dated` are
        those that hold dates. Each frequent category is a `code` in the column `coded`; `shared` are the columns with
        rare ones, and `frequent` (categories, shared) says which categories are no rare ones of which. `gaps` have
        missing values. Raises KeyError where one is missing."""
        super().__init__()
        for name in TablePreprocessing.__annotations__:
            self.register_buffer(name, tensors[name])

    @classmethod
    def fit(cls, features: Tensor, columns: Sequence[Column]) -> Self:
        """Fit on training rows (rows, columns)."""
        present = ~features.isnan()
        measured = [place for place, column in enumerate(columns) if column.role != "categorical"]
        dated = [place for place, column in enumerate(columns) if column.role == "datetime"]
        count = present.sum(dim=0).clamp_min(1)
        filled = features.nan_to_num(0).double()
        mean = filled.sum(dim=0) / count
        variance = (torch.where(present, filled - mean, 0) ** 2).sum(dim=0) / count
        categories, shared = [], []
        for place, column in enumerate(columns):
            if column.role != "categorical":
                continue
            codes = features[present[:, place], place].long()
            rows = torch.bincount(codes[codes >= 0], minlength=len(column.categories))
            often = (rows >= FREQUENT_ROWS).nonzero()[:, 0].tolist()
            categories += [(place, code) for code in often]
            if int(rows.sum()) > int(rows[often].sum()):
                shared.append(place)
        tensors = {
            "measured": torch.tensor(measured, dtype=torch.long),
            "dated": torch.tensor(dated, dtype=torch.long),
            "mean": mean[measured].float().cpu(),
            "scale": torch.where(variance > 0, variance.sqrt(), 1.0)[measured].float().cpu(),
            "coded": torch.tensor([place for place, _ in categories], dtype=torch.long),
            "code": torch.tensor([code for _, code in categories], dtype=torch.float32),
            "shared": torch.tensor(shared, dtype=torch.long),
            "frequent": torch.tensor(
                [[float(place == column) for column in shared] for place, _ in categories], dtype=torch.float32
            ).reshape(len(categories), len(shared)),
            "gaps": (~present.all(dim=0)).nonzero()[:, 0].cpu(),
        }
        return cls({name: tensor.to(features.device) for name, tensor in tensors.items()})

    def shape_of(self, _: tuple[int, ...]) -> tuple[int, ...]:
        """A row's shape as the model sees it."""
        circles = 2 * len(PERIODS_DAYS) * len(self.dated)
        return (len(self.measured) + circles + len(self.coded) + len(self.shared) + len(self.gaps),)

    def forward(self, features: Tensor) -> Tensor:
        parts = []
        if len(self.measured):
            numbers = features[:, self.measured]
            parts.append((torch.where(numbers.isnan(), self.mean, numbers) - self.mean) / self.scale)
        if len(self.dated):
            days = features[:, self.dated]
            present = (~days.isnan()).to(days.dtype)
            days = torch.where(days.isnan(), 0.0, days)
            for period in PERIODS_DAYS:
                angle = days * (2 * math.pi / period)
                parts += [angle.sin() * present, angle.cos() * present]
        if len(self.coded):
            members = (features[:, self.coded] == self.code).to(features.dtype)
            parts.append(members)
        if len(self.shared):
            known = (~features[:, self.shared].isnan()).to(features.dtype)
            parts.append(known - members @ self.frequent if len(self.coded) else known)
        if len(self.gaps):
            parts.append(features[:, self.gaps].isnan().to(features.dtype))
        return torch.cat(parts, dim=1)


Preprocessing = Standardization | TablePreprocessing


def preprocessing_of(tensors: dict[str, Tensor]) -> Preprocessing:
    """The inverse of `state_dict`, whichever of the two it was. Raises KeyError where a tensor is missing."""
    return TablePreprocessing(tensors) if "measured" in tensors else Standardization.from_tensors(tensors)
