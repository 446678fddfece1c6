"""Rows of arrays, checked before anything trains, and read chunk by chunk.

Knows nothing of files, and of splits.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from models.shapes import Problem
from tasks.rows import Arrays, Chunk, DataError, Rows, hash_rows


def array_rows(source: str, arrays: Arrays, problem: Problem) -> Rows:
    """Rows of arrays: features (rows, ...) and labels or target values (rows,), in chunks. Raises DataError."""
    count, shapes, found = 0, set(), np.array([])
    for features, labels in _numbers(source, arrays, problem):
        bad_rows = np.flatnonzero(~np.isfinite(features).reshape(len(features), -1).all(axis=1))
        if len(bad_rows):
            raise DataError(
                f"{source}: features must be finite, found NaN or infinity in {len(bad_rows)} of {len(features)} rows, "
                f"first in row {count + bad_rows[0]}; fill or drop them"
            )
        count += len(labels)
        shapes.add(features.shape[1:])
        # Of values the ends are enough to see that they vary.
        known = np.unique(labels)
        known = known[[0, -1]] if problem == "regression" and len(known) > 1 else known
        found = np.unique(np.concatenate([found.astype(known.dtype) if found.size == 0 else found, known]))
    if not count:
        raise DataError(f"{source} must hold rows, found none; give it some")
    if len(shapes) > 1:
        raise DataError(f"{source}: all rows must have one shape, found {sorted(shapes)}; mend it")
    if problem == "regression" and len(found) < 2:
        raise DataError(f"{source}: the target must vary, found {found[0]} in every row")
    if len(found) < 2:
        raise DataError(f"{source}: labels must have two classes at least, found {len(found)}")

    def chunks() -> Iterator[Chunk]:
        for features, labels in _numbers(source, arrays, problem):
            target = labels if problem == "regression" else np.searchsorted(found, labels).astype(np.int64)
            yield Chunk(features=features, target=target, content=hash_rows(features))

    classes = () if problem == "regression" else tuple(str(name) for name in found)
    return Rows(count=count, shape=shapes.pop(), classes=classes, chunks=chunks)


def _numbers(source: str, arrays: Arrays, problem: Problem) -> Iterator[tuple[npt.NDArray[np.float32], Any]]:
    before = 0
    for found in arrays():
        try:
            features, labels = np.asarray(found[0], dtype=np.float32), np.asarray(found[1])
        except (TypeError, ValueError) as error:
            raise DataError(f"{source}: features must be numbers, but {error}") from error
        if features.ndim < 2 or labels.shape != features.shape[:1]:
            raise DataError(
                f"{source}: features must have shape (rows, ...) and labels (rows,), "
                f"found {features.shape} and {labels.shape}"
            )
        yield features, _values(source, labels, before) if problem == "regression" else labels
        before += len(labels)


def _values(source: str, labels: npt.NDArray[Any], before: int) -> npt.NDArray[np.float32]:
    """The target of a regression; `before` is the number of the first row."""
    try:
        values = labels.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{source}: the target of a regression must be numbers, but {error}; choose a search.objective for classes"
        ) from error
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(
            f"{source}: the target must be finite, found {labels[row]} in row {before + row}; fill or drop it"
        )
    return values
