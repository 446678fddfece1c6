"""Where rows come from: files (CSV, Parquet, NumPy, IDX, folders of images), a built-in scikit-learn set, or a Python
function of the user's own.

Tables are read by pyarrow, which names the row that is ragged and which MLflow brings along anyway. Knows nothing of
what is in a column, and of splits.
"""

import csv
import gzip
import importlib.util
import math
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from PIL import Image
from sklearn import datasets

from models.shapes import Problem
from tasks.columns import EXAMPLES
from tasks.job import DataConfig
from tasks.rows import DataError, Rows, array_rows, table_rows

SKLEARN_SETS: dict[str, Callable[[], Any]] = {
    "digits": datasets.load_digits,
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast_cancer": datasets.load_breast_cancer,
    "diabetes": datasets.load_diabetes,
}
CSV_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".data", ".txt")
IDX_SUFFIXES = ("ubyte", "ubyte.gz", ".idx", ".idx.gz")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
# A longer field is no value of a table, and a larger array no data for this machine, whatever a header claims.
MOST_FIELD_LETTERS = 100_000
MOST_ARRAY_BYTES = 16 * 2**30


def read_rows(data: DataConfig, problem: Problem) -> Rows:
    """Read a source.

    `path/to/*.csv` (or .tsv, gzip or not) and `path/to/*.parquet`: a table, of one file or of all that match.
    `path/to/rows.npz`: arrays `features` and `target`. `images-idx3-ubyte.gz` with `data.labels`: MNIST's format.
    `path/to/folder`: images, a sub-folder a class. `sklearn://digits`. `path/to/load.py:rows`: a function without
    arguments that returns a DataFrame, or features (rows, ...) and labels or target values (rows,).

    Raises DataError: the source is unknown or cannot be read, or what it gives does not make rows for the problem.
    """
    source = data.source
    name = Path(source).name.lower()
    try:
        if source.startswith("sklearn://"):
            return array_rows(source, *_built_in(source), problem)
        if ".py:" in source:
            found = _call(source)
            if isinstance(found, pd.DataFrame):
                return table_rows(found, data, problem)
            return array_rows(source, *_pair(source, found), problem)
        if name.endswith((*CSV_SUFFIXES, ".parquet")):
            read = _read_parquet if name.endswith(".parquet") else _read_csv
            return table_rows(_read_files(data, read), data, problem)
        if name.endswith(".npz"):
            return array_rows(source, *_read_npz(Path(source)), problem)
        if name.endswith(IDX_SUFFIXES):
            return array_rows(source, *_read_idx_pair(data), problem)
        if Path(source).is_dir():
            return array_rows(source, *_read_images(Path(source)), problem)
    except FileNotFoundError as error:
        raise DataError(f"data.source: {error.filename or source} does not exist; correct the path") from error
    except (OSError, EOFError, pa.ArrowException, zipfile.BadZipFile, struct.error) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{source} must be readable whole, but {reason}; mend it or fetch it again") from error
    raise DataError(
        f"data.source must name a file (.csv, .tsv, .parquet, .npz, IDX), a folder of images, sklearn://NAME or "
        f"path/to/load.py:function, found {source!r}; name one of them"
    )


def _built_in(source: str) -> tuple[Any, Any]:
    name = source.removeprefix("sklearn://")
    if name not in SKLEARN_SETS:
        raise DataError(f"data.source: no scikit-learn set {name!r} is known; known are {', '.join(SKLEARN_SETS)}")
    bunch = SKLEARN_SETS[name]()
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


def _read_files(data: DataConfig, read: Callable[[Path, DataConfig], pd.DataFrame]) -> pd.DataFrame:
    """All files that match, in the order of their names; they must have the same columns."""
    source = Path(data.source)
    paths = sorted(source.parent.glob(source.name)) if {"*", "?", "["} & set(source.name) else [source]
    if not paths:
        raise DataError(f"data.source: no file matches {data.source}; correct the pattern")
    frames = [read(path, data) for path in paths]
    for path, frame in zip(paths[1:], frames[1:], strict=True):
        if list(frame.columns) != list(frames[0].columns):
            odd = sorted(set(frame.columns) ^ set(frames[0].columns))
            raise DataError(
                f"{path} must have the columns of {paths[0].name}, found a difference in "
                f"{', '.join(map(str, odd[:EXAMPLES])) or 'their order'}; mend it or match fewer files"
            )
    return pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]


def _read_csv(path: Path, data: DataConfig) -> pd.DataFrame:
    """Every cell as a text, as it stands in the file; what it means is seen when the whole column is known."""
    delimiter = "\t" if ".tsv" in path.name and data.delimiter == "," else data.delimiter
    with (
        gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig")
    ) as file:
        try:
            first = next(csv.reader([file.readline(MOST_FIELD_LETTERS)], delimiter=delimiter), None)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} must be text in UTF-8, but {error}; convert it") from error
    if not first:
        raise DataError(f"{path} must hold rows, found an empty first line; give a file with rows")
    names = [name.strip() for name in first] if data.header else [str(place) for place in range(len(first))]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path}: each column must have a name of its own, found {repeated[0]!r} twice; rename one")
    table = pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(column_names=names, skip_rows=int(data.header), block_size=2**24),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
        ),
    )
    frame = table.to_pandas()
    for name in frame.columns:
        if (longest := frame[name].str.len().max()) > MOST_FIELD_LETTERS:
            raise DataError(
                f"{path}: column {name} must hold at most {MOST_FIELD_LETTERS} letters a field, found {longest}; look "
                "for a quote that is never closed"
            )
        zero = frame[name].str.contains("\0", regex=False)
        if zero.any():
            raise DataError(
                f"{path}: column {name} must be text, found a NUL byte in row {int(np.flatnonzero(zero)[0])}; "
                "write the file again"
            )
    return frame


def _read_parquet(path: Path, _: DataConfig) -> pd.DataFrame:
    table = pyarrow.parquet.read_table(path)
    for field in table.schema:
        if pa.types.is_nested(field.type) or pa.types.is_binary(field.type):
            raise DataError(
                f"{path}: column {field.name} must hold plain values, found {field.type}; leave it out of the file"
            )
    return table.to_pandas()


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


def _read_idx_pair(data: DataConfig) -> tuple[Any, Any]:
    if data.labels is None:
        raise DataError(f"data.labels must name the file of labels beside {data.source}, found none; add it")
    images = _read_idx(Path(data.source))
    if images.ndim < 2:
        raise DataError(
            f"{data.source} must hold images, found a list of {len(images)} numbers; swap it with data.labels"
        )
    scaled = images.astype(np.float32) / np.float32(255)
    return (scaled[:, None] if images.ndim == 3 else scaled), _read_idx(Path(data.labels))


def _read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Two zero bytes, the type (8: unsigned byte), the number of dimensions, their sizes as big-endian 32-bit numbers,
    then the bytes (yann.lecun.com/exdb/mnist). What the header claims is compared before anything is allocated."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        magic = file.read(4)
        if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
            raise DataError(
                f"{path} must begin as an IDX file of bytes does (00 00 08), found {magic.hex(' ')}; name another"
            )
        shape = struct.unpack(f">{magic[3]}I", file.read(4 * magic[3]))
        wanted = math.prod(shape)
        if wanted > MOST_ARRAY_BYTES:
            raise DataError(f"{path} claims {wanted} bytes, above the {MOST_ARRAY_BYTES} that are read; split it")
        content = file.read(wanted + 1)
    if len(content) != wanted:
        found = "more" if len(content) > wanted else len(content)
        raise DataError(f"{path} must hold the {wanted} bytes that its header claims, found {found}; fetch it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _read_images(folder: Path) -> tuple[Any, Any]:
    """Values from 0 to 1, (rows, channels, height, width): one channel where every image is grey, else three."""
    paths = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder} must hold a sub-folder of images for each class, found no image; fill it")
    images, bad = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")))
        except (OSError, Image.DecompressionBombError, SyntaxError):
            bad.append(path.relative_to(folder).as_posix())
    if bad:
        raise DataError(
            f"{folder}: every image must be readable, found {len(bad)} that are not "
            f"({', '.join(bad[:EXAMPLES])}); replace or delete them"
        )
    sizes = Counter(image.shape[:2] for image in images)
    if len(sizes) > 1:
        height, width = sizes.most_common(1)[0][0]
        odd = [
            path.relative_to(folder).as_posix()
            for path, image in zip(paths, images, strict=True)
            if image.shape[:2] != (height, width)
        ]
        raise DataError(
            f"{folder}: every image must have the same size, found {len(odd)} that are not {width} by {height} "
            f"({', '.join(odd[:EXAMPLES])}); resize them"
        )
    if len({image.ndim for image in images}) > 1:
        images = [image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in images]
    stacked = np.stack(images).astype(np.float32) / np.float32(255)
    return (stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)), [
        path.parent.name for path in paths
    ]
