"""What kind of source a job names, by its text alone: before any file is looked at, and wherever it lies.

Knows nothing of how a source is read.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Literal

Kind = Literal["csv", "parquet", "npz", "idx", "images", "database", "built_in", "function"]

IN_WORDS: Mapping[Kind, str] = {
    "csv": "a CSV file",
    "parquet": "a Parquet file",
    "npz": "a NumPy file",
    "idx": "an IDX file",
    "images": "a folder of images",
    "database": "a database",
    "built_in": "a scikit-learn set",
    "function": "a function",
}
# A function may return a table.
TABLES: tuple[Kind, ...] = ("csv", "parquet", "database", "function")

_BY_SUFFIX: Mapping[str, Kind] = {
    **dict.fromkeys((".csv", ".csv.gz", ".tsv", ".tsv.gz", ".data", ".txt"), "csv"),
    ".parquet": "parquet",
    ".npz": "npz",
    **dict.fromkeys(("ubyte", "ubyte.gz", ".idx", ".idx.gz"), "idx"),
}
SKLEARN_SETS = ("digits", "iris", "wine", "breast_cancer", "diabetes")
# What people keep rows in too.
UNREAD = (
    *(
        ".xlsx",
        ".xls",
        ".ods",
        ".json",
        ".jsonl",
        ".xml",
        ".html",
        ".feather",
        ".arrow",
        ".orc",
        ".avro",
        ".h5",
        ".hdf5",
    ),
    *(".pkl", ".pickle", ".npy", ".pt", ".zip", ".tar", ".tar.gz", ".sqlite", ".db", ".mat", ".rds"),
)
_BY_SCHEME: Mapping[str, Kind] = {"sklearn": "built_in", "postgresql": "database", "sqlite": "database"}


def kind_of(source: str) -> Kind:
    """The kind of a source; a name without a known ending is a folder. Raises ValueError where nothing reads it."""
    scheme, _, rest = source.partition("://") if "://" in source else ("", "", source)
    kind = _BY_SCHEME.get(scheme.partition("+")[0])
    if kind is not None:
        return kind
    if scheme not in ("", "s3"):
        remedy = "fetch the file first and name its path" if scheme in ("http", "https", "ftp") else "name its path"
        raise ValueError(
            f"must be a path, s3://..., postgresql://..., sqlite:///... or sklearn://..., found {source!r}; {remedy}"
        )
    if scheme and not all(rest.partition("/")[::2]):
        raise ValueError(f"must be s3://bucket/key, found {source!r}; add what is missing")
    if ".py:" in source:
        return "function"
    name = PurePosixPath(source).name.lower()
    if name.endswith(".py"):
        raise ValueError(f"must name a function of the file, found {source!r}; write {name}:rows")
    return next((kind for suffix, kind in _BY_SUFFIX.items() if name.endswith(suffix)), "images")
