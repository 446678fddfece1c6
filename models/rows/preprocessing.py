"""What is done to raw features before a model sees them: fitted on training rows only, shipped with the model.

Statistics and differences are computed in float64, from the values as the source has them, and what comes out is
float32: a time in seconds is 1.76e9 and its minutes are lost in float32, but not what is left without the mean. The
very same module runs in training, in the gate and where the champion is served.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from models.rows.batches import PIECE_BYTES, DiskRows
from models.rows.column import Column

Rows = Tensor | DiskRows

# As few training rows teach nothing about a category.
FREQUENT_ROWS = 10
PERIODS_DAYS = (1.0, 7.0, 365.2425)
# A row that no training row was like; a model computes with it, as it could not with infinity.
FARTHEST = 1e30


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
        _, mean, scale = _spread(features, dimensions=(0, *range(2, features[:1].ndim)))
        return cls(mean[0], scale[0])

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
        return _narrow((features - self.mean).div_(self.scale))

    def shape_of(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """A row's shape as the model sees it."""
        return features


class TablePreprocessing(nn.Module):
    """A table's matrix (models/rows/table.py) to numbers that a model can learn from; fitted on training rows.

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
        count, mean, scale = (found[0] for found in _spread(features, dimensions=(0,)))
        for piece in _pieces(features) if rows_of else ():
            for place, found in rows_of.items():
                codes = piece[~piece[:, place].isnan(), place].long()
                found += torch.bincount(codes[codes >= 0], minlength=len(found))
        for place in kept:
            # A code is counted from 0, and -1 is one that is not known.
            mean[place], scale[place] = -1.0 if columns[place].role == "categorical" else 0.0, 1.0
        categories, shared = [], []
        for place, found in rows_of.items():
            often = (found >= FREQUENT_ROWS).nonzero()[:, 0].tolist()
            categories += [(place, code) for code in often]
            if int(found.sum()) > int(found[often].sum()):
                shared.append(place)
        tensors = {
            "measured": torch.tensor(measured, dtype=torch.long),
            "dated": torch.tensor(dated, dtype=torch.long),
            "mean": mean[measured].cpu(),
            "scale": scale[measured].cpu(),
            "coded": torch.tensor([place for place, _ in categories], dtype=torch.long),
            "code": torch.tensor([code for _, code in categories], dtype=torch.float32),
            "shared": torch.tensor(shared, dtype=torch.long),
            "frequent": torch.tensor(
                [[float(place == column) for column in shared] for place, _ in categories], dtype=torch.float32
            ).reshape(len(categories), len(shared)),
            "gaps": (count < len(features)).nonzero()[:, 0].cpu(),
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
            parts.append(_narrow((torch.where(numbers.isnan(), self.mean, numbers) - self.mean) / self.scale))
        if len(self.dated):
            days = features[:, self.dated]
            present = (~days.isnan()).float()
            days = torch.where(days.isnan(), 0.0, days)
            for period in PERIODS_DAYS:
                turns = days / period
                angle = (turns - turns.floor()).float() * (2 * math.pi)
                parts += [angle.sin() * present, angle.cos() * present]
        if len(self.coded):
            members = (features[:, self.coded] == self.code).float()
            parts.append(members)
        if len(self.shared):
            known = (~features[:, self.shared].isnan()).float()
            parts.append(known - members @ self.frequent if len(self.coded) else known)
        if len(self.gaps):
            parts.append(features[:, self.gaps].isnan().float())
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


def _spread(features: Rows, dimensions: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """How many values there are, their mean and their standard deviation, over some dimensions, which are kept.

    Missing values are left out, and where there is none the mean is 0. Where all are equal the mean is that value, and
    the standard deviation counts as 1, as it does where float64 cannot hold it. It is computed in units of the range,
    as the square of a small one would be 0.
    """
    like = features[:1].double().nan_to_num(0).mean(dim=dimensions, keepdim=True)
    count, total = torch.zeros_like(like, dtype=torch.long), torch.zeros_like(like)
    low, high = torch.full_like(like, math.inf), torch.full_like(like, -math.inf)
    for piece in _pieces(features):
        lowest, highest = piece.amin(dim=dimensions, keepdim=True), piece.amax(dim=dimensions, keepdim=True)
        known = torch.full_like(count, piece.numel() // count.numel())
        if lowest.isnan().any():
            missing = piece.isnan()
            known -= missing.sum(dim=dimensions, keepdim=True)
            lowest = piece.masked_fill(missing, math.inf).amin(dim=dimensions, keepdim=True)
            highest = piece.masked_fill(missing, -math.inf).amax(dim=dimensions, keepdim=True)
            piece = piece.masked_fill(missing, 0)
        count += known
        total += piece.sum(dim=dimensions, keepdim=True, dtype=torch.float64)
        low, high = torch.minimum(low, lowest), torch.maximum(high, highest)
    some = count.clamp_min(1)
    mean = torch.where(count > 0, torch.clamp(total / some, low, high), 0.0)
    unit = torch.where(high - low >= torch.finfo(torch.float64).tiny, high - low, 1.0)
    squares = torch.zeros_like(like)
    for piece in _pieces(features):
        squares += (piece - mean).div_(unit).square_().nansum(dim=dimensions, keepdim=True)
    scale = (squares / some).sqrt() * unit
    return count, mean, torch.where((unit == high - low) & (scale > 0), scale, 1.0)


def _narrow(standardised: Tensor) -> Tensor:
    return standardised.float().clamp_(-FARTHEST, FARTHEST)
