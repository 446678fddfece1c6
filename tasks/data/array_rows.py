"""Rows of arrays, checked before anything trains, and read chunk by chunk.

Knows nothing of files, and of splits.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.rows.shapes import Problem
from models.rows.table import LARGEST
from tasks.data.findings import Finding
from tasks.data.rows import Arrays, Chunk, DataError, Features, Rows, hash_rows, stop_at_errors
from tasks.data.targets import Target
from tasks.job import DataConfig

# The kinds of NumPy's types that are numbers or may be read as such: truths, whole, real, objects, bytes and texts.
NUMBER_KINDS = "biufOSU"
LABEL_KINDS = "biufOSUM"


def array_rows(arrays: Arrays, data: DataConfig, problem: Problem, findings: tuple[Finding, ...] = ()) -> Rows:
    """Rows of arrays: features (rows, ...) and labels or target values (rows,), in chunks. `findings` are of what gave
    them. Raises DataError."""
    source, target = data.source, Target("the target", data, problem)
    if not isinstance(data.raw, bool):
        raise DataError(
            f"{source}: data.raw must be true or false for rows of arrays, found {list(data.raw)}; set true"
        )
    count, shapes, dtypes = 0, set(), set()
    for features, labels in _rows(source, arrays):
        there = target.look(labels)
        numbers = _finite(source, features[there], labels.index[there])
        count += len(numbers)
        shapes.add(features.shape[1:])
        dtypes.add(numbers.dtype)
    if not shapes:
        raise DataError(f"{source} must hold rows, found none; give it some")
    if len(shapes) > 1:
        raise DataError(f"{source}: all rows must have one shape, found {sorted(shapes)}; make them alike")
    findings = (*findings, *target.findings())
    stop_at_errors(findings, data)

    def chunks() -> Iterator[Chunk]:
        for features, labels in _rows(source, arrays):
            there, values = target.read(labels)
            numbers = _finite(source, features[there], labels.index[there])
            yield Chunk(features=numbers, target=values, content=hash_rows(numbers))

    return Rows(
        count=count,
        shape=shapes.pop(),
        dtype=np.result_type(*dtypes),
        classes=target.classes,
        chunks=chunks,
        findings=findings,
    )


def _rows(source: str, arrays: Arrays) -> Iterator[tuple[npt.NDArray[Any], "pd.Series[Any]"]]:
    """Features (rows, ...) and labels, whose index numbers the rows; chunks without a row are left out."""
    before = 0
    for features, labels in arrays():
        if features.ndim < 2 or labels.shape != features.shape[:1]:
            raise DataError(
                f"{source}: features must have shape (rows, ...) and labels (rows,), "
                f"found {features.shape} and {labels.shape}; return or save them so"
            )
        if features.shape[1:].count(0):
            raise DataError(f"{source}: a row must have features, found {features.shape} of all; return or save some")
        if features.dtype.kind not in NUMBER_KINDS:
            raise DataError(f"{source}: features must be numbers, found {features.dtype}; turn them into numbers")
        if labels.dtype.kind not in LABEL_KINDS:
            raise DataError(f"{source}: labels must be numbers or texts, found {labels.dtype}; turn them into such")
        if labels.dtype.kind == "S":
            labels = np.char.decode(labels, "utf-8", "replace")
        labels = labels.astype(labels.dtype.newbyteorder("="), copy=False)
        if len(labels):
            yield features, pd.Series(labels, index=pd.RangeIndex(before, before + len(labels))).infer_objects()
        before += len(labels)


def _finite(source: str, features: npt.NDArray[Any], rows: "pd.Index[Any]") -> Features:
    """Numbers in float32 where that holds whatever their type does, else in float64."""
    try:
        numbers: Features = features.astype(
            np.float32 if np.can_cast(features.dtype, np.float32) else np.float64, copy=False
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{source}: features must be numbers, but {error}; turn them into numbers") from error
    rules = [(np.isfinite(numbers), "finite", "NaN or infinity")]
    if numbers.dtype == np.float64:  # float32 holds none that is larger
        rules.append((np.abs(numbers) <= LARGEST, f"at most {LARGEST:g}", "more"))
    for within, rule, odd in rules:
        bad = np.flatnonzero(~within.all(axis=tuple(range(1, numbers.ndim))))
        if len(bad):
            raise DataError(
                f"{source}: features must be {rule}, found {odd} in {len(bad)} of {len(numbers)} rows, first in row "
                f"{rows[bad[0]]}; fill or drop them"
            )
    return numbers
