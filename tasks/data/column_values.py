"""The values of a table's column, chunk by chunk: what they have in common, and where they are odd.

Every value is looked at, never a sample, so that what is found cannot change on row 100,001. Knows nothing of roles.
"""

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.rows.table import by_value, distinct, read_numbers, text_of
from tasks.data.date_texts import DateTexts, are_days
from tasks.data.findings import EXAMPLES
from tasks.data.number_texts import NumberTexts, numeric_column, unit_of
from tasks.job import DataConfig

MOST_CATEGORIES = 1000
# What pandas says of a column of Python's numbers.
NUMBER_OBJECTS = ("integer", "floating", "mixed-integer-float", "decimal")
# Up to there float64 holds each whole number; of so many in a chunk that are larger a rounded one is looked for.
EXACT_WHOLE = 2**53
SEEN_WHOLE = 100
LEAST_IDENTIFIERS = 20
# As many values that are all different are an identifier's, whatever comes after them.
SURELY_UNIQUE = 1_000_000


class ColumnValues:
    """What all values of a column have in common; `add` takes the next rows."""

    def __init__(self, name: str, data: DataConfig) -> None:
        self._name = name
        self._data = data
        self._rows = self._missing = self._readable = 0
        self._kinds: set[str] = set()
        self._low, self._high, self._sum, self._whole = math.inf, -math.inf, 0.0, True
        self._first_text, self._last_text = "", ""
        # As they are written: what names a value is known when all have been seen.
        self._texts: set[str] = set()
        self._too_many = False
        self._hashes: npt.NDArray[np.uint64] | None = np.array([], dtype=np.uint64)
        self._as_numbers = numeric_column(name, data)
        self._number_texts = NumberTexts(name, data)
        self._may_be_grouped = data.decimal is None and data.thousands is None
        self._grouped = self._with_zeros = ""
        self._odd_numbers: list[tuple[Any, Any]] = []
        self._written_numbers: list[tuple[Any, Any]] = []
        self._date_texts = DateTexts(name, data)
        self._are_days = True
        self._rounded = ""
        self._odd_dates: list[tuple[Any, Any]] = []

    def add(self, column: "pd.Series[Any]") -> None:
        """The next rows; the index numbers them."""
        if self._too_many and self._hashes is None and self._kinds == {"number"} and _kind_of(column) == "number":
            self._add_measurements(column)
            return
        codes, values = distinct(column, self._data.missing)
        self._rows += len(codes)
        self._missing += int((codes < 0).sum())
        if values.empty:
            return
        counts = np.bincount(codes[codes >= 0], minlength=len(values))
        kind = _kind_of(values)
        self._kinds.add(kind)
        if kind == "datetime":
            self._date_texts.read += int(counts.sum())
        else:
            self._add_numbers(column, codes, values, counts)
        if kind == "number" and self._hashes is None and self._too_many:
            return
        texts = text_of(values)
        self._first_text = min(self._first_text or texts.min(), texts.min())
        self._last_text = max(self._last_text, texts.max())
        if kind == "text":
            self._add_ambiguous(texts)
            self._add_dates(column, codes, texts, counts)
        self._add_texts(texts)
        self._add_hashes(texts, counts)

    def _add_measurements(self, column: "pd.Series[Any]") -> None:
        """Of numbers that are no categories and no identifier less is asked, and nothing of each distinct one."""
        numbers = column.to_numpy(dtype=np.float64, na_value=np.nan)
        there = ~np.isnan(numbers)
        finite = np.isfinite(numbers)
        self._rows += len(numbers)
        self._missing += len(numbers) - int(there.sum())
        if len(self._odd_numbers) < EXAMPLES:
            odd = np.flatnonzero(there & ~finite)[: EXAMPLES - len(self._odd_numbers)]
            self._odd_numbers += list(zip(column.index[odd], column.iloc[odd].tolist(), strict=True))
        self._rounded = self._rounded or _rounded(column, numbers)
        found = numbers[finite]
        self._count_numbers(found, np.ones(len(found), dtype=np.int64))

    def _add_numbers(
        self, column: "pd.Series[Any]", codes: npt.NDArray[np.int64], values: "pd.Series[Any]", counts: npt.NDArray[Any]
    ) -> None:
        numbers = self._read_numbers(values)
        readable = np.isfinite(numbers)
        self._odd_numbers += _examples(column, codes, values, ~readable, EXAMPLES - len(self._odd_numbers))
        self._rounded = self._rounded or _rounded(values, numbers)
        self._count_numbers(numbers[readable], counts[readable])
        if not readable.all():
            is_written = ~readable
            is_written[is_written] = self._number_texts.add(values[~readable], counts[~readable])
            self._written_numbers += _examples(column, codes, values, is_written, 2 - len(self._written_numbers))

    def _read_numbers(self, values: "pd.Series[Any]") -> npt.NDArray[np.float64]:
        """Where the job says that the column holds numbers, its first value says with which unit they are written."""
        if self._data.roles.get(self._name) == "numeric" and not self._as_numbers.unit:
            unit = unit_of(values)
            if unit == "" or (unit and self._readable == 0):
                self._as_numbers = replace(self._as_numbers, unit=unit)
        return read_numbers(values, self._as_numbers)

    def _count_numbers(self, found: npt.NDArray[np.float64], often: npt.NDArray[Any]) -> None:
        if len(found):
            self._readable += int(often.sum())
            self._low, self._high = min(self._low, found.min()), max(self._high, found.max())
            with np.errstate(over="ignore", invalid="ignore"):
                self._sum += float(found @ often)
            self._whole = self._whole and bool((found == found.round()).all())
            self._are_days = self._are_days and are_days(found)

    def _add_ambiguous(self, texts: "pd.Series[Any]") -> None:
        """Look for 1.234, which may be thousands where all texts are so, and for 01067, which may be a code."""
        if self._may_be_grouped:
            self._may_be_grouped = bool(texts.str.fullmatch(r"[-+]?[1-9]\d{0,2}(?:\.\d{3})?").all())
            self._grouped = self._grouped or next(iter(texts[texts.str.contains(".", regex=False)]), "")
        if not self._with_zeros:
            self._with_zeros = next(iter(texts[texts.str.match(r"0\d+$")]), "")

    def _add_dates(
        self, column: "pd.Series[Any]", codes: npt.NDArray[np.int64], texts: "pd.Series[Any]", counts: npt.NDArray[Any]
    ) -> None:
        is_read = self._date_texts.add(texts, counts)
        self._odd_dates += _examples(column, codes, texts, ~is_read, EXAMPLES - len(self._odd_dates))

    def _add_texts(self, texts: "pd.Series[Any]") -> None:
        if self._too_many:
            return
        self._texts.update(texts)
        if len(self._texts) > MOST_CATEGORIES and self._data.roles.get(self._name) != "categorical":
            self._texts, self._too_many = set(), True

    def _add_hashes(self, texts: "pd.Series[Any]", counts: npt.NDArray[Any]) -> None:
        """None from the first value on that is there twice, and of numbers that are not whole."""
        if self._hashes is None or len(self._hashes) >= SURELY_UNIQUE:
            return
        is_measured = self._readable == self._rows and not self._whole
        hashes = pd.util.hash_array(by_value(texts, "number").to_numpy(dtype=object))
        known = np.union1d(self._hashes, hashes)
        is_unique = self._missing == 0 and counts.max() == 1 and len(known) == len(self._hashes) + len(hashes)
        self._hashes = known if is_unique and not is_measured else None


def _rounded(values: "pd.Series[Any]", numbers: npt.NDArray[np.float64]) -> str:
    """The first whole number that float64 does not hold; an empty text where there is none."""
    with np.errstate(invalid="ignore"):
        texts = (str(value).strip() for value in values[np.abs(numbers) > EXACT_WHOLE][:SEEN_WHOLE])
    whole = (text for text in texts if re.fullmatch(r"[-+]?[0-9]{1,100}", text))
    return next((text for text in whole if int(text) != int(float(text))), "")


def _kind_of(values: "pd.Series[Any]") -> str:
    if pd.api.types.is_bool_dtype(values):
        return "boolean"
    if pd.api.types.is_datetime64_any_dtype(values):
        return "datetime"
    if pd.api.types.is_numeric_dtype(values):
        return "number"
    is_number = values.dtype == object and pd.api.types.infer_dtype(values, skipna=True) in NUMBER_OBJECTS
    return "number" if is_number else "text"


def _examples(
    column: "pd.Series[Any]", codes: npt.NDArray[np.int64], values: "pd.Series[Any]", odd: Any, most: int
) -> list[tuple[Any, Any]]:
    """The first rows that hold one of the odd values, by the index, and what they hold."""
    if most <= 0 or not odd.any():
        return []
    rows = np.flatnonzero(np.append(odd, False)[codes])[:most]
    return list(zip(column.index[rows], values.iloc[codes[rows]].tolist(), strict=True))
