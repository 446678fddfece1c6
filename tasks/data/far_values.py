"""Numbers that lie so far from all others of their feature that these become equal once it is standardised: mostly
marks for a missing value, such as 1e20 or 9.97e36, that nobody declared.

The bulk is that of a sample, which the rows' hashes draw; the ends are those of all rows. Knows nothing of files.
"""

import numpy as np
import numpy.typing as npt

from tasks.data.findings import Finding, finding
from tasks.data.rows import Chunk, Rows
from tasks.job import DataConfig

SAMPLED_ROWS = 20_000
# Times the typical distance; where one of a million rows lies so far, the others lie within a millionth of the standard
# deviation.
FAR = 1e9


class FarValues:
    """The ends and a sample of each feature of a table, or of an array (rows, columns); of images nothing."""

    def __init__(self, rows: Rows) -> None:
        self._columns = rows.columns
        self._is_table = len(rows.shape) == 1
        self._below = np.uint64(min(1, SAMPLED_ROWS / max(1, rows.count)) * (2**64 - 2**11))
        width = rows.shape[0] if self._is_table else 0
        self._low, self._high = np.full(width, np.inf), np.full(width, -np.inf)
        self._sample: list[npt.NDArray[np.float64]] = []

    def add(self, chunk: Chunk) -> None:
        if not self._is_table or not len(chunk.features):
            return
        self._low = np.fmin(self._low, np.fmin.reduce(chunk.features))
        self._high = np.fmax(self._high, np.fmax.reduce(chunk.features))
        self._sample.append(chunk.features[chunk.content[:, 0] <= self._below].astype(np.float64))

    def findings(self, data: DataConfig) -> list[Finding]:
        """A number is far where its distance from the median is a billion times the median of the distances that are
        not 0."""
        found: list[Finding] = []
        if not self._sample:
            return found
        sample = np.concatenate(self._sample)
        for place in range(sample.shape[1]):
            if self._columns and self._columns[place].role != "numeric":
                continue
            values = sample[~np.isnan(sample[:, place]), place]
            if not len(values):
                continue
            middle = float(np.median(values))
            distances = np.abs(values - middle)
            typical = float(np.median(distances[distances > 0])) if distances.any() else 0.0
            farthest = max(float(self._low[place]), float(self._high[place]), key=lambda end: abs(end - middle))
            if not 0 < FAR * typical < abs(farthest - middle):
                continue
            name = self._columns[place].name if self._columns else f"{place} of the features"
            found += finding(
                "far_value", data,
                f"column {name} must hold numbers that can be told apart, found {farthest:g} where most lie within "
                f"{typical:.3g} of {middle:.3g}; if it marks a missing value, "
                + ("add its text to data.missing or leave it empty" if self._columns else "fill or drop such rows")
                + ", or set data.checks.far_value: warn",
                name,
            )  # fmt: skip
        return found
