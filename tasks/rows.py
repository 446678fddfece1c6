"""What a source gave, as rows: features and a target, checked before anything trains.

Of a table everything that is wrong is collected and said together; what only warns goes on to the data card. Knows
nothing of files, and of splits.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from infra.errors import ExpectedError
from models.shapes import Problem
from models.table import Column, encode, text_of, without_missing
from tasks.columns import EXAMPLES, Described, Finding, find_columns, finding, labels_alike, tidy
from tasks.job import DataConfig

LEAK_ROWS = 20_000
LEAK_SCORE = 0.999
SMALL_CLASS_ROWS = 10


class DataError(ExpectedError):
    """The data cannot be used; the message names the source, the rule, what was found and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Features (rows, ...) float32; target (rows,): int64, an index into the classes' names, or for a regression
    float32, and no classes.

    A table's features are the matrix of its `columns`. `content` and `identity` are the bytes that a row's content and
    its split are told by, None where those are its features. `described` and `findings` are for the data card.
    """

    features: npt.NDArray[np.float32]
    target: npt.NDArray[np.int64 | np.float32]
    classes: tuple[str, ...]
    columns: tuple[Column, ...] = ()
    content: list[bytes] | None = None
    identity: list[bytes] | None = None
    described: tuple[Described, ...] = ()
    findings: tuple[Finding, ...] = ()


def array_rows(source: str, features: Any, labels: Any, problem: Problem) -> Rows:
    """Rows of arrays: features (rows, ...) and labels or target values (rows,). Raises DataError."""
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


def table_rows(frame: pd.DataFrame, data: DataConfig, problem: Problem) -> Rows:
    """A table's rows, with everything that is wrong with it collected: what stops the night is raised together."""
    source = data.source
    frame = frame.rename(columns=str)
    if frame.empty:
        raise DataError(f"{source} must hold rows, found none below its header; give it some")
    target_name = data.target or str(frame.columns[-1])
    named = [("target", target_name), ("split_by", data.split_by), *(("roles", name) for name in data.roles)]
    for field, name in named:
        if name is not None and name not in frame.columns:
            known = ", ".join(frame.columns[:50])
            raise DataError(f"data.{field} must name a column of {source}, found {name!r}; known are {known}")
    frame = frame.apply(lambda values: without_missing(values, data.missing))
    findings: list[Finding] = []
    there = frame[target_name].notna()
    if not there.all():
        rows = ", ".join(str(row) for row in np.flatnonzero(~there)[:EXAMPLES])
        findings += finding(
            "missing_target", data,
            f"column {target_name}, the target, must have a value in every row, found none in {int((~there).sum())} "
            f"rows (row {rows}); set data.checks.missing_target: warn to leave such rows out",
        )  # fmt: skip
        frame = frame[there].reset_index(drop=True)
    if frame.empty:
        raise DataError(f"{source}: column {target_name}, the target, must have a value, found none; name another")
    labels = frame[target_name]
    features = frame.drop(columns=[target_name, *({data.split_by} - {None, target_name})])
    columns, described, found = find_columns(features, data)
    findings += found
    if not columns:
        raise DataError(
            f"{source} must have a column to learn from, found none beside the target {target_name}; add one"
        )
    try:
        matrix = encode(features, columns)
    except ValueError as error:
        raise DataError(
            f"{source}: {error}; mend it, add the text to data.missing, or set another data.roles"
        ) from error
    if problem == "classification":
        texts = text_of(labels)
        findings += [] if data.tidy_labels else labels_alike(texts.unique(), data)
        labels = _tidied(texts) if data.tidy_labels else texts
        findings += _small_classes(labels, data)
        whole = pd.to_numeric(labels, errors="coerce").notna().all()
        names = tuple(sorted(labels.unique(), key=(lambda label: (float(label), label)) if whole else str))
        target: npt.NDArray[Any] = pd.Index(names).get_indexer(labels).astype(np.int64)
        if len(names) < 2:
            raise DataError(f"{source}: labels must have two classes at least, found {len(names)}")
    else:
        names, target = (), _values(source, labels.to_numpy(dtype=object, na_value=np.nan))
    findings += _leaks(matrix, target, columns, problem, data)
    errors = [found.sentence for found in findings if found.severity == "error"]
    if errors:
        raise DataError(f"{source}: " + "; and ".join(errors))
    return Rows(
        features=matrix,
        target=target,
        classes=names,
        columns=tuple(columns),
        content=_content(matrix, columns),
        identity=None if data.split_by is None else [str(value).encode() for value in text_of(frame[data.split_by])],
        described=tuple(described),
        findings=tuple(findings),
    )


def _tidied(texts: "pd.Series[Any]") -> "pd.Series[Any]":
    """Each label as its most frequent spelling; the first in the alphabet where two are as frequent."""
    spelled: dict[str, str] = {}
    for label in sorted(counts := Counter(texts), key=lambda label: (-counts[label], label)):
        spelled.setdefault(tidy(label), label)
    return texts.map(lambda label: spelled[tidy(label)])


def _small_classes(labels: "pd.Series[Any]", data: DataConfig) -> list[Finding]:
    small = [f"{name!r} ({count})" for name, count in sorted(Counter(labels).items()) if count < SMALL_CLASS_ROWS]
    if not small:
        return []
    return finding(
        "small_class", data,
        f"each class must have {SMALL_CLASS_ROWS} rows or more, found {', '.join(small[:EXAMPLES])}; join or drop such",
    )  # fmt: skip


def _leaks(
    matrix: npt.NDArray[np.float32], target: npt.NDArray[Any], columns: list[Column], problem: Problem, data: DataConfig
) -> list[Finding]:
    """Columns of which one alone predicts the target for rows that it was not fitted on, by a small tree."""
    chosen = np.random.default_rng(0).permutation(len(matrix))[:LEAK_ROWS]
    half = len(chosen) // 2
    if half < 50 or (problem == "classification" and np.bincount(target).max() > LEAK_SCORE * len(target)):
        return []
    findings = []
    for place, column in enumerate(columns):
        values = matrix[chosen, place : place + 1]
        tree = (DecisionTreeClassifier if problem == "classification" else DecisionTreeRegressor)(
            max_leaf_nodes=64, random_state=0
        )
        found = tree.fit(values[:half], target[chosen[:half]]).score(values[half:], target[chosen[half:]])
        if found >= LEAK_SCORE:
            findings += finding(
                "leaking_column", data,
                f"column {column.name} must not give the target away, found that it predicts {found:.1%} of it alone; "
                f"set data.roles.{column.name}: ignored, or data.checks.leaking_column: warn if that is right",
            )  # fmt: skip
    return findings


def _content(matrix: npt.NDArray[np.float32], columns: list[Column]) -> list[bytes]:
    """Each row's content, whatever the order of the columns, the file it came from, and today's list of categories: a
    category counts by its name, not by its code."""
    parts = {}
    for place, column in enumerate(columns):
        values = matrix[:, place]
        if column.role == "categorical":
            names = pd.util.hash_array(np.array([*column.categories, ""], dtype=object))
            parts[column.name] = names[np.where(np.isnan(values), -1, values).astype(np.int64)]
        else:
            parts[column.name] = pd.util.hash_array(values + np.float32(0))
    hashes = np.column_stack([parts[name] for name in sorted(parts)])
    return [row.tobytes() for row in np.ascontiguousarray(hashes, dtype=">u8")]
