"""What is done to raw features before a model sees them: fitted on training rows only, shipped with the model.

The very same module runs in training, in the gate and where the champion is served.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from models.batches import DiskRows
from models.column import Column

Rows = Tensor | DiskRows

# As few training rows teach nothing about a category.
FREQUENT_ROWS = 10
PERIODS_DAYS = (1.0, 7.0, 365.2425)
PIECE_BYTES = 4 * 2**20


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
    def fit(cls, features: Rows) -> Self:
        """Fit on training rows (rows, columns) or (rows, channels, height, width)."""
        dimensions = (0, *range(2, features[:1].ndim))
        first = features[:1].double().mean(dim=dimensions, keepdim=True)
        count, total = 0, torch.zeros_like(first)
        for rows in _pieces(features):
            count += rows.numel() // total.numel()
            total += rows.double().sum(dim=dimensions, keepdim=True)
        mean, squares = total / count, torch.zeros_like(first)
        for rows in _pieces(features):
            squares += (rows.double() - mean).square().sum(dim=dimensions, keepdim=True)
        scale = (squares / count).sqrt().float()[0]
        return cls(mean.float()[0], torch.where(scale > 0, scale, 1.0))

    @classmethod
    def unchanged(cls, features: Rows) -> Self:
        """Leave rows of this shape as they are: less 0, over 1."""
        like = cls.fit(features[:1])
        return cls(torch.zeros_like(like.mean), torch.ones_like(like.scale))

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

    Raw columns come first and stay as they are; of a category that is its number from 1 on, or 0 for one that is not
    known. What is missing in one is 0.
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
    def fit(cls, features: Rows, columns: Sequence[Column], raw: Sequence[str] = ()) -> Self:
        """Fit on training rows (rows, columns), of which those that `raw` names are raw."""
        places = {column.name: place for place, column in enumerate(columns)}
        kept = [places[name] for name in raw]
        fitted = [(place, column) for place, column in enumerate(columns) if place not in kept]
        measured = [*kept, *(place for place, column in fitted if column.role != "categorical")]
        dated = [place for place, column in fitted if column.role == "datetime"]
        coded = {place: len(column.categories) for place, column in fitted if column.role == "categorical"}
        like = features[:1]
        rows_of = {place: torch.zeros(size, dtype=torch.long, device=like.device) for place, size in coded.items()}
        count = torch.zeros(len(columns), dtype=torch.long, device=like.device)
        total = torch.zeros(len(columns), dtype=torch.float64, device=like.device)
        rows = 0
        for piece in _pieces(features):
            rows += len(piece)
            count += (~piece.isnan()).sum(dim=0)
            total += piece.nan_to_num(0).double().sum(dim=0)
            for place, found in rows_of.items():
                codes = piece[~piece[:, place].isnan(), place].long()
                found += torch.bincount(codes[codes >= 0], minlength=len(found))
        mean, squares = total / count.clamp_min(1), torch.zeros_like(total)
        for piece in _pieces(features):
            squares += torch.where(piece.isnan(), 0, piece.double() - mean).square().sum(dim=0)
        variance = squares / count.clamp_min(1)
        for place in kept:
            # A code is counted from 0, and -1 is one that is not known.
            mean[place], variance[place] = -1.0 if columns[place].role == "categorical" else 0.0, 1.0
        categories, shared = [], []
        for place, found in rows_of.items():
            often = (found >= FREQUENT_ROWS).nonzero()[:, 0].tolist()
            categories += [(place, code) for code in often]
            if int(found.sum()) > int(found[often].sum()):
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
            "gaps": (count < rows).nonzero()[:, 0].cpu(),
        }
        return cls({name: tensor.to(like.device) for name, tensor in tensors.items()})

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


def _pieces(features: Rows) -> Iterator[Tensor]:
    """All rows, a few megabytes at a time: sums in float64 must not need the data's memory once more."""
    size = max(1, PIECE_BYTES // max(1, features[:1].nbytes))
    for begin in range(0, len(features), size):
        yield features[begin : begin + size]
