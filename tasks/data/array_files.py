"""Arrays in files: NumPy's npz, and MNIST's IDX.

Knows nothing of what the rows are for, and of splits.
"""

import gzip
import math
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tasks.data.rows import Arrays, DataError
from tasks.data.table_files import CHUNK_BYTES
from tasks.job import DataConfig

IDX_SUFFIXES = ("ubyte", "ubyte.gz", ".idx", ".idx.gz")
# A larger array is no data for this machine, whatever a header claims.
MOST_ARRAY_BYTES = 16 * 2**30


def read_npz(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    with path.open("rb") as file:
        try:
            arrays = np.load(file, allow_pickle=False)
            names = () if isinstance(arrays, np.ndarray) else arrays.files
            found = {name: np.asarray(arrays[name]) for name in ("features", "target") if name in names}
        except (zipfile.BadZipFile, EOFError, OSError):
            raise
        except Exception as error:  # a header may claim anything, and NumPy has no error of its own
            reason = str(error).partition("\n")[0]
            raise DataError(
                f"{path} must hold arrays of numbers or texts, but {reason}; save them without objects, by "
                "numpy.savez(path, features=..., target=...)"
            ) from error
    if len(found) < 2:
        raise DataError(
            f"{path} must hold arrays features and target, found {', '.join(names) or 'none with a name'}; save them "
            "by numpy.savez(path, features=..., target=...)"
        )
    return found["features"], found["target"]


def idx_pairs(data: DataConfig) -> Arrays:
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
