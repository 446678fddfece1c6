"""Rows of a table, checked before anything trains, and read chunk by chunk.

Everything that is wrong is collected and said together; what only warns goes on to the data card. Knows nothing of
files, and of splits.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.rows.column import Column
from models.rows.shapes import Problem
from models.rows.table import FORMS, NO_MOMENT, by_value, column_name, distinct, encode, microseconds, text_of
from tasks.data.columns import Survey
from tasks.data.findings import Described, Finding, finding
from tasks.data.rows import Chunk, DataError, Frames, Hashes, Rows, hash_bytes, hash_matrix, narrowed, stop_at_errors
from tasks.data.targets import Target
from tasks.job import DataConfig

LEAK_ROWS = 20_000
LEAK_SCORE = 0.999
# The kinds of NumPy's types that no role is for: complex numbers, spans of time, records.
UNREAD_KINDS = "cmV"


def table_rows(frames: Frames, data: DataConfig, problem: Problem, findings: Sequence[Finding] = ()) -> Rows:
    """A table's rows, with everything that is wrong with it collected: what stops the night is raised together. The
    frames have the same columns, and one index that numbers all rows; `findings` are what is known of their files."""
    table = _Table(frames, data, problem)
    stop_at_errors(table.findings, data)
    return Rows(
        count=table.count,
        shape=(len(table.columns),),
        dtype=np.dtype(np.float64),
        classes=table.target.classes,
        chunks=table.chunks,
        columns=table.columns,
        described=table.described,
        findings=(*findings, *table.findings),
    )


class _Table:
    """A table, looked at once from its first row to its last."""

    def __init__(self, frames: Frames, data: DataConfig, problem: Problem) -> None:
        self._frames = frames
        self._data = data
        self._problem = problem
        self._target = data.target or ""
        self._sample = _Sample()
        self.count = 0
        surveys = self._look()
        # In one order whatever the source's, so that equal rows make equal files.
        found = [column for survey in surveys if (column := survey.column) is not None]
        self.columns = tuple(sorted(found, key=lambda column: column.name))
        self.described = (*(survey.described for survey in surveys), *self._others())
        self._check_raw()
        self.findings = self._check(surveys)

    def _others(self) -> list[Described]:
        """The columns that are no features, by what they are for."""
        data = self._data
        others = [self.target.described(self._target)]
        for name, role in ((data.split_by, "split by"), (data.time_column, "time")):
            if name is not None and name != self._target:
                others.append(Described(name=name, role=role, missing=0, values=""))
        return others

    def chunks(self) -> Iterator[Chunk]:
        for frame in self._frames():
            try:
                frame, target = self._with_target(frame.rename(columns=column_name))
            except KeyError as error:
                raise DataError(
                    f"{self._data.source} must stay as it is while it is read, found {error}, which was not there at "
                    "first; run again"
                ) from error
            yield self._chunk(frame, target)

    def _look(self) -> list[Survey]:
        """Raises DataError for what leaves nothing to look at."""
        data, source = self._data, self._data.source
        surveys: dict[str, Survey] = {}
        rows = 0
        for frame in self._frames():
            frame = frame.rename(columns=column_name)
            _check_types(frame, source)
            if not surveys:
                self._target = data.target or str(frame.columns[-1])
                self._check_names(list(frame.columns))
                left_out = {self._target, data.split_by, data.time_column}
                surveys = {name: Survey(name, data) for name in frame.columns if name not in left_out}
                self.target = Target(f"column {self._target}, the target,", data, self._problem, self._target)
            rows += len(frame)
            frame = frame[self.target.look(frame[self._target])]
            for name, survey in surveys.items():
                survey.add(frame[name])
            self._sample.add(frame)
            self.count += len(frame)
        if not rows:
            raise DataError(f"{source} must hold rows, found none below its header; give it some")
        return list(surveys.values())

    def _check_names(self, known: list[str]) -> None:
        data = self._data
        named = [
            ("target", self._target), ("split_by", data.split_by), ("time_column", data.time_column),
            *(("roles", name) for name in data.roles),
            *(("raw", name) for name in (() if isinstance(data.raw, bool) else data.raw)),
        ]  # fmt: skip
        for field, name in named:
            if name is not None and name not in known:
                raise DataError(
                    f"data.{field} must name a column of {data.source}, found {name!r}; known are "
                    f"{', '.join(known[:50])}"
                )

    def _check_raw(self) -> None:
        left_out = {described.name: described.role for described in self.described}
        for column in self.columns:
            del left_out[column.name]
        for name in () if isinstance(self._data.raw, bool) else self._data.raw:
            if name in left_out:
                raise DataError(
                    f"data.raw must name features of {self._data.source}, found {name}, which is read as "
                    f"{left_out[name]}; set data.roles.{name} to numeric, categorical or another role, or leave it out"
                )

    def _with_target(self, frame: pd.DataFrame) -> tuple[pd.DataFrame, npt.NDArray[Any]]:
        """The rows that have a target, and what it is there."""
        there, target = self.target.read(frame[self._target])
        return frame[there], target

    def _chunk(self, frame: pd.DataFrame, target: npt.NDArray[Any]) -> Chunk:
        data = self._data
        matrix = self._encoded(frame)
        identity = moments = None
        if data.split_by is not None:
            codes, values = distinct(frame[data.split_by], data.missing)
            names = by_value(text_of(values), *FORMS)
            identity = hash_bytes([str(name).encode() for name in [*names, pd.NA]])[codes]
        if data.time_column is not None:
            moments = self._moments(frame, data.time_column)
        content = _content(matrix, self.columns)
        return Chunk(features=matrix, target=target, content=content, identity=identity, moments=moments)

    def _moments(self, frame: pd.DataFrame, name: str) -> npt.NDArray[np.int64]:
        column = Column(name=name, role="datetime", missing=self._data.missing, dates=self._data.dates)
        try:
            moments = microseconds(frame, column)
        except ValueError as error:
            raise DataError(
                f"{self._data.source}: {error}; correct it, set data.dates where days or months come first, or split "
                "by something else"
            ) from error
        without = np.flatnonzero(moments == NO_MOMENT)
        if len(without):
            row = frame.index[without[0]]
            raise DataError(
                f"{self._data.source}: column {name}, data.time_column, must hold a date in every row, found none in "
                f"row {row}; fill or drop such rows"
            )
        return moments

    def _encoded(self, frame: pd.DataFrame) -> npt.NDArray[np.float64]:
        try:
            return encode(frame, self.columns)
        except ValueError as error:
            raise DataError(
                f"{self._data.source}: {error}; correct such cells or leave them empty, name the text in "
                "data.missing, or set another role in data.roles"
            ) from error

    def _check(self, surveys: list[Survey]) -> list[Finding]:
        data = self._data
        findings = [*(found for survey in surveys for found in survey.findings), *self.target.findings()]
        if not self.columns:
            why = "".join(f"; {found.sentence}" for found in findings)
            raise DataError(
                f"{data.source} must have a column to learn from, found none beside the target {self._target}; add "
                f"one{why}"
            )
        if any(found.severity == "error" for found in findings):
            return findings  # they stop the night, and say more than a column that cannot be read
        frame, target = self._with_target(self._sample.frame())
        self._sample = _Sample()
        return findings + _leaks(self._encoded(frame), target, self.columns, self._problem, data)


class _Sample:
    """Rows of a table that is read chunk by chunk, each as likely to be among them as any other."""

    def __init__(self) -> None:
        self._draw = np.random.default_rng(0)
        self._keys = np.array([])
        self._parts: list[pd.DataFrame] = []

    def add(self, frame: pd.DataFrame) -> None:
        keys = self._draw.random(len(frame))
        chosen = keys < self._highest
        self._keys = np.concatenate([self._keys, keys[chosen]])
        self._parts.append(frame[chosen].astype(dict.fromkeys(frame.select_dtypes("category"), object)))
        if len(self._keys) > 2 * LEAK_ROWS:
            self.frame()

    @property
    def _highest(self) -> float:
        return float(self._keys.max()) if len(self._keys) == LEAK_ROWS else 1.0

    def frame(self) -> pd.DataFrame:
        """The rows whose keys are the lowest, in the order of their keys."""
        joined = pd.concat(self._parts)
        lowest = np.argsort(self._keys)[:LEAK_ROWS]
        self._keys, self._parts = self._keys[lowest], [joined.iloc[lowest]]
        return self._parts[0]


def _check_types(frame: pd.DataFrame, source: str) -> None:
    if frame.columns.empty:
        raise DataError(f"{source} must hold a column, found none; give it some")
    for name, dtype in frame.dtypes.items():
        if dtype.kind in UNREAD_KINDS:
            raise DataError(
                f"{source}: column {name} must hold numbers, texts, truths or dates, found {dtype}; turn it into one "
                "of them or leave it out"
            )


def _leaks(
    matrix: npt.NDArray[np.float64],
    target: npt.NDArray[Any],
    columns: tuple[Column, ...],
    problem: Problem,
    data: DataConfig,
) -> list[Finding]:
    """Columns of which one alone predicts the target for rows that it was not fitted on, by a small tree; the rows are
    in no order."""
    half = len(matrix) // 2
    if half < 50:
        return []
    if problem == "classification":
        rows = np.bincount(target[:half])
        if rows.max() > LEAK_SCORE * half or np.count_nonzero(rows) > half // 2:
            return []
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor  # as in sources.py

    if problem == "regression":  # scikit-learn takes a variance below 2e-16 for none
        target = (target - target.mean()) / (np.abs(target - target.mean()).max() or 1)
    findings = []
    for place, column in enumerate(columns):
        # It reads float32, but of a single column no more than which value is greater.
        known, values = np.unique(matrix[:, place], return_inverse=True)
        values = np.where(np.isnan(known), np.nan, np.arange(len(known)))[values][:, None]
        tree = (DecisionTreeClassifier if problem == "classification" else DecisionTreeRegressor)(
            max_leaf_nodes=64, random_state=0
        )
        found = tree.fit(values[:half], target[:half]).score(values[half:], target[half:])
        if found >= LEAK_SCORE:
            findings += finding(
                "leaking_column", data,
                f"column {column.name} must not give the target away, found that it predicts {found:.1%} of it alone; "
                f"set data.roles.{column.name}: ignored, or data.checks.leaking_column: warn if that is right",
                column.name,
            )  # fmt: skip
    return findings


def _content(matrix: npt.NDArray[np.float64], columns: tuple[Column, ...]) -> Hashes:
    """Each row's content, whatever the order of the columns, the file it came from, and today's list of categories: a
    category counts by its name, not by its code."""
    parts = {}
    for place, column in enumerate(columns):
        values = matrix[:, place]
        if column.role == "categorical":
            names = pd.util.hash_array(np.array([*column.categories, ""], dtype=object))
            parts[column.name] = names[np.where(np.isnan(values), -1, values).astype(np.int64)]
        else:
            parts[column.name] = _hash_numbers(values + 0)
    hashes = np.column_stack([parts[name] for name in sorted(parts)])
    return hash_matrix(hashes.astype(">u8"))


def _hash_numbers(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """Each as float32 where that holds it, as in `hash_rows`."""
    narrow = narrowed(values)
    hashes: npt.NDArray[np.uint64] = pd.util.hash_array(narrow)
    wide = (narrow != values) & ~np.isnan(values)
    if wide.any():
        hashes[wide] = pd.util.hash_array(values[wide])
    return hashes
