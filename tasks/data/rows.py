"""What a source gives, as rows: features and a target, checked before anything trains, and read chunk by chunk, so
that they may be more than the memory holds.

Every source is read twice: what all values of a column are decides how each is read. Knows nothing of files, and
of splits.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from infra.errors import ExpectedError
from models.rows.column import Column
from models.rows.table import column_name
from tasks.data.findings import Described, Finding, in_brief, printable
from tasks.job import DataConfig

Features = npt.NDArray[np.float32 | np.float64]
Hashes = npt.NDArray[np.uint64]
Frames = Callable[[], Iterator[pd.DataFrame]]
Arrays = Callable[[], Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]]


class DataError(ExpectedError):
    """The data cannot be used; the message names the source, the rule, what was found and the remedy."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some rows: features (rows, ...) float32 or float64; target (rows,) int64 classes or float64 values; and two words
    of 64 bits for each row's content, and for what tells its split where that is something else. `moments` are those
    that the split goes by, in microseconds since 2000-01-01 UTC, where the job splits by time."""

    features: Features
    target: npt.NDArray[np.int64 | np.float64]
    content: Hashes
    identity: Hashes | None = None
    moments: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is known of all rows, and the way to read them, from the beginning whenever `chunks` is called.

    `dtype` is what the features come in: float32 holds an image's values, and anything else needs float64. `classes`
    are the names that a target indexes, none for a regression. `columns` are those of a table's matrix, none where the
    rows are arrays; `described` and `findings` are for the data card.
    """

    count: int
    shape: tuple[int, ...]
    dtype: "np.dtype[np.float32 | np.float64]"
    classes: tuple[str, ...]
    chunks: Callable[[], Iterator[Chunk]]
    columns: tuple[Column, ...] = ()
    described: tuple[Described, ...] = ()
    findings: tuple[Finding, ...] = ()


def stop_at_errors(findings: Iterable[Finding], data: DataConfig) -> None:
    """Raise DataError where a finding is an error, one for all of them."""
    if errors := [found.sentence for found in in_brief(findings) if found.severity == "error"]:
        raise DataError(f"{data.source}: " + "; and ".join(errors))


def hash_rows(features: Features) -> Hashes:
    """The content of rows of arrays: 16 bytes of BLAKE2b over a row's values as little-endian float32 (-0 counts as 0),
    or as float64 where float32 does not hold each of them. So equal rows have one hash, in whichever type they come."""
    canonical = features.reshape(len(features), math.prod(features.shape[1:])) + np.float32(0)
    narrow = narrowed(canonical)
    hashes = hash_matrix(np.ascontiguousarray(narrow, dtype="<f4"))
    wide = (narrow != canonical).any(axis=1)
    if wide.any():
        hashes[wide] = hash_matrix(np.ascontiguousarray(canonical[wide], dtype="<f8"))
    return hashes


def narrowed(values: Features) -> npt.NDArray[np.float32]:
    """The values as float32, in which a very large one is infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def hash_matrix(matrix: npt.NDArray[Any]) -> Hashes:
    content, width = memoryview(matrix.tobytes()), matrix.itemsize * matrix.shape[1]
    return hash_bytes(content[begin : begin + width] for begin in range(0, len(content), width))


def hash_bytes(values: Iterable[bytes | memoryview]) -> Hashes:
    """16 bytes of BLAKE2b over each, as two words (values, 2), the higher first."""
    digests = b"".join(hashlib.blake2b(value, digest_size=16).digest() for value in values)
    return np.frombuffer(digests, dtype=">u8").reshape(-1, 2).astype(np.uint64)


def first_repeated(names: Iterable[object]) -> str | None:
    """The first name of a column that stands there twice."""
    return next((name for name, count in Counter(map(column_name, names)).items() if count > 1), None)
