"""Where rows come from: files (CSV, Parquet, NumPy, IDX, folders of images) here or in S3, a database's query, a
built-in scikit-learn set, or a Python function of the user's own.

Files of tables are table_files.py's, queries table_queries.py's, files of arrays array_files.py's and image_files.py's,
and functions source_functions.py's. Knows nothing of what is in a column, and of splits.
"""

import importlib.metadata
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from infra.store.downloads import download, is_in_s3, object_tags
from models.rows.shapes import Problem
from tasks.data.array_files import IDX_SUFFIXES, idx_pairs, read_npz
from tasks.data.array_rows import array_rows
from tasks.data.image_files import images
from tasks.data.rows import Arrays, Chunk, DataError, Frames, Rows
from tasks.data.source_functions import rows_of
from tasks.data.table_files import CHUNK_BYTES, CSV_SUFFIXES, chunk_rows, frames_of_files, matching
from tasks.data.table_queries import frames_of_query
from tasks.data.table_rows import table_rows
from tasks.job import DataConfig
from tasks.job.kinds import SKLEARN_SETS

DATABASES = ("postgresql", "sqlite")
READ_ERRORS = (OSError, EOFError, UnicodeError, pa.ArrowException, zipfile.BadZipFile, zlib.error, struct.error)


def read_rows(data: DataConfig, problem: Problem, downloads: Path, scratch: Path) -> Rows:
    """Find out what a source holds, and how its rows are read, chunk by chunk.

    `path/to/*.csv` (or .tsv, gzip or not) and `path/to/*.parquet`: a table, of one file or of all that match.
    `path/to/rows.npz`: arrays `features` and `target`. `images-idx3-ubyte.gz` with `data.labels`: MNIST's format.
    `path/to/folder`: images, a sub-folder a class. Each of these may be `s3://bucket/key` instead, and is then copied
    into the folder `downloads`, which is kept. `postgresql://host/database` or `sqlite:///file` with `data.query`: what
    the query gives, copied into the folder `scratch`. `sklearn://digits`. `path/to/load.py:rows`: a function without
    arguments that returns a DataFrame, or features (rows, ...) and labels or target values (rows,).

    Raises DataError: the source is unknown or cannot be read, or what it gives does not make rows for the problem.
    StoreError where S3 refuses or does not answer.
    """
    places = {"source": data.source, "labels": data.labels}
    here = {name: download(place, downloads) for name, place in places.items() if place and is_in_s3(place)}
    copied = here.get("source", data.source)
    with _in_one_sentence(data.source, copied):
        rows = _read(data.model_copy(update=here), problem, scratch)

    def chunks() -> Iterator[Chunk]:
        with _in_one_sentence(data.source, copied):
            yield from rows.chunks()

    return replace(rows, chunks=chunks)


def source_stamp(data: DataConfig) -> str | None:
    """A text that changes whenever the source does: names, sizes and times of its files, or what S3 says of its
    objects; None where only reading it tells, as of a function or a query. Raises StoreError, OSError."""
    if data.source.startswith("sklearn://"):
        return f"{data.source} {importlib.metadata.version('scikit-learn')}"
    if ".py:" in data.source or data.query is not None:
        return None
    return json.dumps([_stamp(place) for place in (data.source, data.labels) if place is not None])


def _stamp(place: str) -> list[Any]:
    if is_in_s3(place):
        return sorted(object_tags(place).items())
    path = Path(place)
    found = path.glob("*/*") if path.is_dir() else matching(path)
    stats = {file.as_posix(): file.stat() for file in found}
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())


def _read(data: DataConfig, problem: Problem, scratch: Path) -> Rows:
    source = data.source
    name = Path(source).name.lower()
    if source.startswith("sklearn://"):
        return array_rows(_slices(*_built_in(source)), data, problem)
    if source.partition(":")[0].partition("+")[0] in DATABASES:
        return table_rows(frames_of_query(data, scratch), data, problem)
    if ".py:" in source:
        found = rows_of(source)
        if isinstance(found, pd.DataFrame):
            return table_rows(_frames_of(found), data, problem)
        return array_rows(_slices(*found), data, problem)
    if name.endswith((*CSV_SUFFIXES, ".parquet")):
        frames, findings = frames_of_files(data)
        return table_rows(frames, data, problem, findings)
    if name.endswith(".npz"):
        return array_rows(_slices(*read_npz(Path(source))), data, problem)
    if name.endswith(IDX_SUFFIXES):
        return array_rows(idx_pairs(data), data, problem)
    if Path(source).is_dir():
        pictures, findings = images(data)
        return array_rows(pictures, data, problem, findings)
    raise DataError(
        "data.source must name a file (.csv, .tsv, .parquet, .npz, IDX) or a folder of images, here or as s3://..., "
        "a database (postgresql://... or sqlite:///...), sklearn://NAME or path/to/load.py:function, found "
        f"{source!r}; name one of them"
    )


@contextmanager
def _in_one_sentence(source: str, copied: str) -> Iterator[None]:
    """Raise DataError for whatever reading a source may come to, the first time as well as the second; `copied` is
    where it was read, which is elsewhere if it is in S3."""
    try:
        yield
    except FileNotFoundError as error:
        place = str(error.filename or copied).replace(copied, source)
        raise DataError(f"data.source: {place} does not exist; correct the path") from error
    except READ_ERRORS as error:
        reason = str(error).strip().partition("\n")[0].replace(copied, source)
        raise DataError(f"{source} must be readable whole, but {reason}; mend it or fetch it again") from error
    except DataError as error:
        if copied == source:
            raise
        raise DataError(str(error).replace(copied, source)) from error


def _slices(features: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Arrays:
    """What is in memory already, in pieces; arrays that do not fit together are left for whoever checks them."""

    def pieces() -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        if not (features.ndim and labels.shape == features.shape[:1]):
            yield features, labels
            return
        step = max(1, CHUNK_BYTES * len(labels) // max(1, features.nbytes))
        for begin in range(0, len(labels), step):
            yield features[begin : begin + step], labels[begin : begin + step]

    return pieces


def _built_in(source: str) -> tuple[Any, Any]:
    name = source.removeprefix("sklearn://")
    if name not in SKLEARN_SETS:
        raise DataError(f"data.source: no scikit-learn set {name!r} is known; known are {', '.join(SKLEARN_SETS)}")
    from sklearn import datasets  # a second of its own, which no command and no other night should wait for

    bunch = getattr(datasets, f"load_{name}")()
    return (bunch.images[:, None] if "images" in bunch else bunch.data), bunch.target


def _frames_of(frame: pd.DataFrame) -> Frames:
    numbered, step = frame.reset_index(drop=True), chunk_rows(frame.columns)
    return lambda: (numbered.iloc[begin : begin + step] for begin in range(0, max(1, len(numbered)), step))
