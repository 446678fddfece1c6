"""The target of all rows, whatever source they come from: which rows have one, which classes there are, and what is
wrong with it.

It is seen twice, as rows are: `look` at every chunk, then `read` each. Knows nothing of features.
"""

from collections import Counter
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.rows.shapes import Problem
from models.rows.table import LARGEST, by_value, distinct, forms_of, read_numbers, text_of
from tasks.data.findings import EXAMPLES, Described, Finding, finding
from tasks.data.labels import labels_alike, tidy
from tasks.data.number_texts import NumberTexts, numeric_column, unit_of
from tasks.data.rows import DataError
from tasks.job import DataConfig

SMALL_CLASS_ROWS = 10
# A scale of marks in halves has fewer; what has more is measured, not named.
MOST_FRACTIONS = 30


class Target:
    """What all rows have in common of what is predicted. `named` is how a sentence names it, such as "the target", and
    `column` its name in a table."""

    def __init__(self, named: str, data: DataConfig, problem: Problem, column: str = "") -> None:
        self._named = named
        self._as_numbers = numeric_column(column, data)
        self._data = data
        self._problem = problem
        self._labels: Counter[str] = Counter()
        self._ends: list[float] = []
        self._missing, self._first_missing = 0, list[Any]()

    def look(self, values: "pd.Series[Any]") -> npt.NDArray[np.bool_]:
        """Which of the next rows have a target; the index numbers them. Raises DataError: one is no number in a
        regression."""
        codes, known = distinct(values, self._data.missing)
        there = codes >= 0
        if not there.all():
            self._missing += int((~there).sum())
            self._first_missing += list(values.index[~there][: EXAMPLES - len(self._first_missing)])
        if self._problem == "regression":
            numbers = self._numbers(known, codes, values.index)
            if len(numbers):
                self._ends = [float(min([*self._ends, numbers.min()])), float(max([*self._ends, numbers.max()]))]
        else:
            counts = np.bincount(codes[there], minlength=len(known))
            for label, count in zip(text_of(known), counts.tolist(), strict=True):
                self._labels[label] += count
        return there

    def read(self, values: "pd.Series[Any]") -> tuple[npt.NDArray[np.bool_], npt.NDArray[Any]]:
        """Which rows have a target, and those targets: int64 classes, or float64 values. Raises DataError."""
        codes, known = distinct(values, self._data.missing)
        there = codes >= 0
        if self._problem == "regression":
            return there, self._numbers(known, codes, values.index)[codes[there]]
        try:
            classes = np.array([self._codes[label] for label in text_of(known)], dtype=np.int64)
        except KeyError as error:
            raise DataError(
                f"{self._data.source} must stay as it is while it is read, found the label {error}, which was not "
                "there at first; run again"
            ) from error
        return there, classes[codes[there]]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, once all rows were looked at: by number where all are numbers, else by the
        alphabet; none for a regression."""
        return () if self._problem == "regression" else _in_order(set(self._spelled.values()))

    def described(self, column: str) -> Described:
        values = f"{self._ends[0]:g} to {self._ends[1]:g}" if self._ends else ", ".join(self.classes[:EXAMPLES])
        return Described(name=column, role="target", missing=self._missing, values=values)

    def findings(self) -> list[Finding]:
        """What the checks say of it. Raises DataError for a target that nothing can be learned of."""
        data, source = self._data, self._data.source
        if not self._labels and not self._ends:
            raise DataError(f"{source}: {self._named} must have a value, found none; name another or fill it")
        findings: list[Finding] = []
        if self._missing:
            rows = ", ".join(str(row) for row in self._first_missing)
            findings += finding(
                "missing_target", data,
                f"{self._named} must have a value in every row, found {self._missing} without one (row {rows}); fill "
                "it, set data.missing to the texts that mean none, or set data.checks.missing_target: warn to leave "
                "such rows out",
            )  # fmt: skip
        if self._problem == "regression":
            low, high = self._ends
            if high - low < np.finfo(np.float64).tiny:  # what float64 cannot divide by
                found = f"{low!r} in every row" if low == high else f"{low!r} to {high!r}"
                raise DataError(f"{source}: the target must vary, found {found}; name another")
            return findings
        if len(self.classes) < 2:
            raise DataError(
                f"{source}: labels must have two classes at least, found {len(self.classes)} "
                f"({', '.join(map(repr, self.classes))}); give rows of another"
            )
        if len(self.classes) > MOST_FRACTIONS and _are_fractions(self.classes):
            raise DataError(
                f"{source}: {self._named} must be a class for such a search.objective, found {len(self.classes)} "
                f"numbers with fractions, such as {self.classes[0]}; choose search.objective rmse, mae or r2"
            )
        findings += [] if data.tidy_labels else labels_alike(self._labels, data)
        return findings + self._small_classes()

    def _small_classes(self) -> list[Finding]:
        rows: Counter[str] = Counter()
        for label, count in self._labels.items():
            rows[self._spelled[label]] += count
        small = [f"{name!r} ({count})" for name, count in sorted(rows.items()) if count < SMALL_CLASS_ROWS]
        if not small:
            return []
        return finding(
            "small_class", self._data,
            f"each class must have {SMALL_CLASS_ROWS} rows or more, found {', '.join(small[:EXAMPLES])}; join or drop "
            "such",
        )  # fmt: skip

    @cached_property
    def _spelled(self) -> dict[str, str]:
        return _spelled(self._labels, tidied=self._data.tidy_labels)

    @cached_property
    def _codes(self) -> dict[str, int]:
        places = {name: place for place, name in enumerate(self.classes)}
        return {label: places[self._spelled[label]] for label in self._labels}

    def _numbers(
        self, known: "pd.Series[Any]", codes: npt.NDArray[np.int64], rows: "pd.Index[Any]"
    ) -> npt.NDArray[np.float64]:
        """The distinct values as numbers; a date is none."""
        texts = known.astype("string") if pd.api.types.is_datetime64_any_dtype(known) else known
        column = self._as_numbers.name
        if self._data.roles.get(column) == "numeric" and not self._as_numbers.unit:
            self._as_numbers = replace(self._as_numbers, unit=unit_of(texts))
        numbers = read_numbers(texts, self._as_numbers)
        bad = np.flatnonzero(np.append(~(np.abs(numbers) <= LARGEST), False)[codes])
        if len(bad):
            value = known.iloc[codes[bad[0]]]
            rule = f"at most {LARGEST:g}" if np.isfinite(numbers[codes[bad[0]]]) else "finite numbers"
            number_texts, unread = NumberTexts(column, self._data), texts[~np.isfinite(numbers)]
            is_written = number_texts.add(unread, np.ones(len(unread), dtype=np.int64)).all()
            raise DataError(
                f"{self._data.source}: the target of a regression must be {rule}, found "
                f"{value if isinstance(value, float) else repr(value)} in row {rows[bad[0]]}; "
                f"{number_texts.remedy() if is_written and column else 'correct it'}, or choose a search.objective for "
                "classes"
            )
        return numbers


def _spelled(counts: Counter[str], *, tidied: bool) -> dict[str, str]:
    """The class of each label as it is written: the name of its value; tidied, the most frequent name of those that are
    alike, and the first in the alphabet where two are as frequent."""
    names = dict(zip(counts, by_value(pd.Series(list(counts)), *forms_of(counts)), strict=True))
    if not tidied:
        return names
    rows: Counter[str] = Counter()
    for label, name in names.items():
        rows[name] += counts[label]
    spelled: dict[str, str] = {}
    for name in sorted(rows, key=lambda name: (-rows[name], name)):
        spelled.setdefault(tidy(name), name)
    return {label: spelled[tidy(name)] for label, name in names.items()}


def _are_fractions(names: tuple[str, ...]) -> bool:
    """Whether all are numbers, and not all whole ones."""
    numbers = pd.to_numeric(pd.Series(names), errors="coerce")
    return bool(numbers.notna().all() and (numbers % 1 != 0).any())


def _in_order(names: set[str]) -> tuple[str, ...]:
    """By number where all are numbers, else by the alphabet."""
    numbers = pd.to_numeric(pd.Series(sorted(names)), errors="coerce").notna().all()
    return tuple(sorted(names, key=(lambda label: (float(label), label)) if numbers else str))
