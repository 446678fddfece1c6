"""Where rows come from: files (CSV, Parquet, NumPy, IDX, folders of images) here or in S3, a database's query, a
built-in scikit-learn set, or a Python function of the user's own.

Files of tables are table_files.py's. Knows nothing of what is in a column, and of splits.
"""

import gzip
import importlib.metadata
import importlib.util
import json
import math
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import sqlalchemy
from PIL import Image

from infra.downloads import download, is_in_s3, object_tags
from models.shapes import Problem
from tasks.findings import EXAMPLES
from tasks.job import DataConfig
from tasks.rows import DataError, Frames, Rows, array_rows, table_rows
from tasks.table_files import (
    CHUNK_BYTES,
    CSV_SUFFIXES,
    alike,
    chunk_rows,
    first_repeated,
    frames_of_files,
    matching,
    parquet_frames,
    with_row_numbers,
)

SKLEARN_SETS = ("digits", "iris", "wine", "breast_cancer", "diabetes")
IDX_SUFFIXES = ("ubyte", "ubyte.gz", ".idx", ".idx.gz")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
DATABASES = ("postgresql", "sqlite")
# A larger array is no data for this machine, whatever a header claims.
MOST_ARRAY_BYTES = 16 * 2**30
QUERY_ROWS = 2**15


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
    if is_in_s3(data.source):
        here = {"source": download(data.source, downloads)}
        if data.labels is not None and is_in_s3(data.labels):
            here["labels"] = download(data.labels, downloads)
        try:
            return _read(data.model_copy(update=here), problem, scratch)
        except DataError as error:
            raise DataError(str(error).replace(here["source"], data.source)) from error
    return _read(data, problem, scratch)


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
    try:
        if source.startswith("sklearn://"):
            return array_rows(source, _slices(*_built_in(source)), problem)
        if source.partition(":")[0].partition("+")[0] in DATABASES:
            return table_rows(_frames_of_query(data, scratch), data, problem)
        if ".py:" in source:
            found = _call(source)
            if isinstance(found, pd.DataFrame):
                return table_rows(_frames_of(found), data, problem)
            return array_rows(source, _slices(*_pair(source, found)), problem)
        if name.endswith((*CSV_SUFFIXES, ".parquet")):
            return table_rows(frames_of_files(data), data, problem)
        if name.endswith(".npz"):
            return array_rows(source, _slices(*_read_npz(Path(source))), problem)
        if name.endswith(IDX_SUFFIXES):
            return array_rows(source, _idx_pairs(data), problem)
        if Path(source).is_dir():
            return array_rows(source, _images(Path(source)), problem)
    except FileNotFoundError as error:
        raise DataError(f"data.source: {error.filename or source} does not exist; correct the path") from error
    except (OSError, EOFError, pa.ArrowException, zipfile.BadZipFile, struct.error) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{source} must be readable whole, but {reason}; mend it or fetch it again") from error
    raise DataError(
        "data.source must name a file (.csv, .tsv, .parquet, .npz, IDX) or a folder of images, here or as s3://..., "
        "a database (postgresql://... or sqlite:///...), sklearn://NAME or path/to/load.py:function, found "
        f"{source!r}; name one of them"
    )


def _slices(features: Any, labels: Any) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """What is in memory already, in pieces; arrays that do not fit together are left for whoever checks them."""
    features, labels = np.asarray(features), np.asarray(labels)

    def pieces() -> Iterator[tuple[Any, Any]]:
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


def _pair(source: str, found: Any) -> tuple[Any, Any]:
    try:
        features, labels = found
    except (TypeError, ValueError) as error:
        raise DataError(
            f"data.source: {source} must return features and labels, or a DataFrame, found {type(found).__name__}"
        ) from error
    return features, labels


def _call(source: str) -> Any:
    path, _, function = source.rpartition(":")
    spec = importlib.util.spec_from_file_location("nightly_user_source", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise DataError(f"data.source: {path} is not a Python file; correct the path")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, function)()
    except Exception as error:
        raise DataError(
            f"data.source: {source} must return features and labels, but raised {type(error).__name__}: {error}"
        ) from error


def _frames_of(frame: pd.DataFrame) -> Frames:
    numbered, step = frame.reset_index(drop=True), chunk_rows(frame.columns)
    return lambda: (numbered.iloc[begin : begin + step] for begin in range(0, max(1, len(numbered)), step))


def _frames_of_query(data: DataConfig, scratch: Path) -> Frames:
    """What the query gives, copied to Parquet files in chunks and read from there: two runs of it may give two
    tables."""
    if data.query is None:
        raise DataError(f"data.query must say what to select from {data.source}, found none; add it")
    paths: list[Path] = []
    try:
        url = sqlalchemy.make_url(data.source)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
        with engine.connect().execution_options(stream_results=True) as connection:
            for frame in pd.read_sql_query(sqlalchemy.text(data.query), connection, chunksize=QUERY_ROWS):
                if (repeated := first_repeated(frame.columns)) is not None:
                    raise DataError(
                        f"data.query must name each column once, found {repeated!r} twice; rename one with AS"
                    )
                paths.append(scratch / f"{len(paths):06}.parquet")
                _plain(frame).to_parquet(paths[-1])
    except (sqlalchemy.exc.SQLAlchemyError, pd.errors.DatabaseError, ImportError) as error:
        # The database's own words, without the query around them.
        cause = error.__cause__ if isinstance(error, pd.errors.DatabaseError) else error
        reason = str(getattr(cause, "orig", None) or cause).strip().partition("\n")[0]
        raise DataError(
            f"data.query must be answered by {data.source}, but {reason}; mend the query, the URL or the password "
            "(PGPASSWORD, ~/.pgpass)"
        ) from error
    return lambda: with_row_numbers(alike((path, parquet_frames(path, data)) for path in paths))


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers, truths, moments and texts; whatever else a database has (UUIDs, dates, decimals) as its text."""
    odd = [name for name, dtype in frame.dtypes.items() if pd.api.types.is_object_dtype(dtype)]
    return frame.astype(dict.fromkeys(odd, "string"))


def _read_npz(path: Path) -> tuple[Any, Any]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        missing = {"features", "target"} - set(arrays.files)
        if missing:
            raise DataError(
                f"{path} must hold arrays features and target, found {', '.join(arrays.files) or 'none'}; rename them"
            )
        try:
            return arrays["features"], arrays["target"]
        except ValueError as error:
            raise DataError(
                f"{path} must hold arrays of numbers or texts, but {error}; save them without objects"
            ) from error


def _idx_pairs(data: DataConfig) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """Images as values from 0 to 1, (rows, 1, height, width), and their labels, which are few bytes."""
    if data.labels is None:
        raise DataError(f"data.labels must name the file of labels beside {data.source}, found none; add it")
    path = Path(data.source)
    with _open(path) as file:
        shape = _idx_shape(path, file)
    if len(shape) < 2:
        raise DataError(f"{data.source} must hold images, found a list of {shape[0]} numbers; swap it with data.labels")
    with _open(Path(data.labels)) as file:
        label_shape = _idx_shape(Path(data.labels), file)
        labels = np.concatenate([*_idx_values(Path(data.labels), file, label_shape), np.zeros(0, dtype=np.uint8)])
    if labels.shape != shape[:1]:
        raise DataError(
            f"{data.labels} must hold a label for each of {shape[0]} images, found {labels.shape}; name another"
        )

    def pairs() -> Iterator[tuple[Any, Any]]:
        begin = 0
        with _open(path) as file:
            for images in _idx_values(path, file, _idx_shape(path, file)):
                scaled = images.astype(np.float32) / np.float32(255)
                yield (scaled[:, None] if images.ndim == 3 else scaled), labels[begin : begin + len(images)]
                begin += len(images)

    return pairs


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _idx_shape(path: Path, file: BinaryIO) -> tuple[int, ...]:
    """Two zero bytes, the type (8: unsigned byte), the number of dimensions, their sizes as big-endian 32-bit numbers,
    then the bytes (yann.lecun.com/exdb/mnist)."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
        raise DataError(
            f"{path} must begin as an IDX file of bytes does (00 00 08), found {magic.hex(' ')}; name another"
        )
    shape = struct.unpack(f">{magic[3]}I", file.read(4 * magic[3]))
    if (claimed := math.prod(shape)) > MOST_ARRAY_BYTES:
        raise DataError(f"{path} claims {claimed} bytes, above the {MOST_ARRAY_BYTES} that are read; split it")
    return shape


def _idx_values(path: Path, file: BinaryIO, shape: tuple[int, ...]) -> Iterator[npt.NDArray[np.uint8]]:
    """The rows that follow the header, in chunks, and not a byte less or more than it claims."""
    each, wanted = math.prod(shape[1:]), math.prod(shape)
    step = max(1, CHUNK_BYTES // max(1, each))
    found = 0
    for begin in range(0, shape[0], step):
        rows = min(step, shape[0] - begin)
        content = file.read(rows * each)
        found += len(content)
        if len(content) == rows * each:
            yield np.frombuffer(content, dtype=np.uint8).reshape(rows, *shape[1:])
    if found != wanted or file.read(1):
        much = "more" if found == wanted else found
        raise DataError(f"{path} must hold the {wanted} bytes that its header claims, found {much}; fetch it again")


def _images(folder: Path) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """Values from 0 to 1, (rows, channels, height, width): one channel where every image is grey, else three."""
    paths = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder} must hold a sub-folder of images for each class, found no image; fill it")
    sizes: dict[Path, tuple[int, int]] = {}
    modes, bad = set(), []
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
                sizes[path] = image.size
                modes.add("L" if image.mode in ("1", "L") else "RGB")
        except (OSError, Image.DecompressionBombError, SyntaxError):
            bad.append(path.relative_to(folder).as_posix())
    if bad:
        raise DataError(
            f"{folder}: every image must be readable, found {len(bad)} that are not "
            f"({', '.join(bad[:EXAMPLES])}); replace or delete them"
        )
    (width, height), _ = Counter(sizes.values()).most_common(1)[0]
    odd = [path.relative_to(folder).as_posix() for path, size in sizes.items() if size != (width, height)]
    if odd:
        raise DataError(
            f"{folder}: every image must have the same size, found {len(odd)} that are not {width} by {height} "
            f"({', '.join(odd[:EXAMPLES])}); resize them"
        )
    mode = "RGB" if "RGB" in modes else "L"
    step = max(1, CHUNK_BYTES // (width * height * len(mode)))

    def pairs() -> Iterator[tuple[Any, Any]]:
        for begin in range(0, len(paths), step):
            some = paths[begin : begin + step]
            stacked = np.stack([_pixels(path, mode) for path in some]).astype(np.float32) / np.float32(255)
            yield stacked, [path.parent.name for path in some]

    return pairs


def _pixels(path: Path, mode: str) -> npt.NDArray[np.uint8]:
    """(channels, height, width)."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert(mode))
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
