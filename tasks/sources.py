"""Where rows come from: a built-in scikit-learn set, or a Python function of the user's own.

A source gives features and a target for every row, and nothing else. Knows nothing of splits.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn import datasets

from infra.errors import ExpectedError
from models.shapes import Problem

SKLEARN_SETS: dict[str, Callable[[], Any]] = {
    "digits": datasets.load_digits,
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast_cancer": datasets.load_breast_cancer,
    "diabetes": datasets.load_diabetes,
}


class DataError(ExpectedError):
    """The data cannot be used; the message names the source, the rule, what was found and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Features (rows, ...) float32; target (rows,): int64, an index into the classes' names, or for a regression
    float32, and no classes."""

    features: npt.NDArray[np.float32]
    target: npt.NDArray[np.int64 | np.float32]
    classes: tuple[str, ...]


def read_rows(source: str, problem: Problem) -> Rows:
    """Read a source: `sklearn://digits`, or `path/to/load.py:rows`, a function without arguments that returns
    features (rows, ...) and labels or target values (rows,).

    Raises DataError: the source is unknown or cannot be read, or its arrays do not make rows for the problem.
    """
    if source.startswith("sklearn://"):
        name = source.removeprefix("sklearn://")
        if name not in SKLEARN_SETS:
            raise DataError(f"data.source: no scikit-learn set {name!r} is known; known are {', '.join(SKLEARN_SETS)}")
        bunch = SKLEARN_SETS[name]()
        features, labels = (bunch.images[:, None] if "images" in bunch else bunch.data), bunch.target
    elif ".py:" in source:
        features, labels = _call(source)
    else:
        raise DataError(
            f"data.source must be sklearn://NAME or path/to/load.py:function, found {source!r}; name one of the two"
        )
    return _rows(source, features, labels, problem)


def _call(source: str) -> tuple[Any, Any]:
    path, _, function = source.rpartition(":")
    spec = importlib.util.spec_from_file_location("nightly_user_source", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise DataError(f"data.source: {path} is not a Python file; correct the path")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        features, labels = getattr(module, function)()
    except Exception as error:
        raise DataError(
            f"data.source: {source} must return features and labels, but raised {type(error).__name__}: {error}"
        ) from error
    return features, labels


def _rows(source: str, features: Any, labels: Any, problem: Problem) -> Rows:
    try:
        features = np.asarray(features, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{source}: features must be numbers, but {error}") from error
    labels = np.asarray(labels)
    if features.ndim < 2 or labels.shape != features.shape[:1]:
        raise DataError(
            f"{source}: features must have shape (rows, ...) and labels (rows,), "
            f"found {features.shape} and {labels.shape}"
        )
    bad_rows = np.flatnonzero(~np.isfinite(features).reshape(len(features), -1).all(axis=1))
    if len(bad_rows):
        raise DataError(
            f"{source}: features must be finite, found NaN or infinity in {len(bad_rows)} of {len(features)} rows, "
            f"first in row {bad_rows[0]}; fill or drop them"
        )
    if problem == "regression":
        return Rows(features=features, target=_values(source, labels), classes=())
    names, target = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise DataError(f"{source}: labels must have two classes at least, found {len(names)}")
    return Rows(features=features, target=target.astype(np.int64), classes=tuple(str(name) for name in names))


def _values(source: str, labels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    try:
        values = labels.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{source}: the target of a regression must be numbers, but {error}; choose a search.objective for classes"
        ) from error
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(f"{source}: the target must be finite, found {labels[row]} in row {row}; fill or drop it")
    if values.min() == values.max():
        raise DataError(f"{source}: the target must vary, found {labels[0]} in every row")
    return values
