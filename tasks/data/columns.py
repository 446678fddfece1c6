"""What is in a table's columns: the role of each, and whatever is wrong with it, before anything trains.

A role is found by looking at every value, never at a sample, so that it cannot change on row 100,001; a chunk of rows
at a time, so that a table may be larger than the memory. Knows nothing of files and of splits.
"""

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.rows.column import Column, Role
from models.rows.table import FALSE_WORDS, TRUE_WORDS, by_value, distinct, forms_of, read_numbers, text_of
from tasks.data.date_texts import DateTexts, are_days, numbers_in_words
from tasks.data.findings import EXAMPLES, Described, Finding, finding
from tasks.data.number_texts import NumberTexts, numeric_column, unit_of
from tasks.job import DataConfig

MOST_CATEGORIES = 1000
MOSTLY = 0.5
# What pandas says of a column of Python's numbers.
NUMBER_OBJECTS = ("integer", "floating", "mixed-integer-float", "decimal")
# Up to there float64 holds each whole number; of so many in a chunk that are larger a rounded one is looked for.
EXACT_WHOLE = 2**53
SEEN_WHOLE = 100
LEAST_IDENTIFIERS = 20
# As many values that are all different are an identifier's, whatever comes after them.
SURELY_UNIQUE = 1_000_000


class Survey:
    """What all values of a column have in common, chunk by chunk.

    Afterwards `column` is how it is used, None where it is left out: a column that is empty, that tells rows apart and
    nothing else, or that has more than a thousand categories, unless `data.roles` gives it a role.
    """

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

    @property
    def role(self) -> Role | Any:
        return self._role_and_findings()[0]

    @property
    def column(self) -> Column | None:
        role = self.role
        if role in ("ignored", "identifier"):
            return None
        if role == "numeric":
            return self._as_numbers
        if role == "datetime":
            return Column(name=self._name, role=role, missing=self._data.missing, dates=self._data.dates)
        categories = self._categories if role == "categorical" else ()
        return Column(name=self._name, role=role, categories=categories, missing=self._data.missing)

    @property
    def described(self) -> Described:
        return Described(name=self._name, role=self.role, missing=self._missing, values=self._in_words())

    @property
    def findings(self) -> list[Finding]:
        """A column of one value and gaps is no constant: which rows have the value is what it says."""
        _, found = self._role_and_findings()
        if self.column is None or self._missing or self._too_many or len(categories := self._categories) != 1:
            return found
        (value,) = categories
        return found + finding(
            "constant_column", self._data,
            f"column {self._name} must vary, found {value!r} only; set data.roles.{self._name}: ignored",
            self._name,
        )  # fmt: skip

    @property
    def _categories(self) -> tuple[str, ...]:
        """The names of the values that there are."""
        return tuple(sorted(set(by_value(pd.Series(list(self._texts)), *forms_of(self._texts)))))

    @property
    def _is_identifier(self) -> bool:
        return self._hashes is not None and self._missing == 0 and self._rows >= LEAST_IDENTIFIERS

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

    def _role_and_findings(self) -> tuple[Role | Any, list[Finding]]:
        name, data = self._name, self._data
        present = self._rows - self._missing
        if name in data.roles:
            return data.roles[name], self._unread_in_role(data.roles[name], present)
        if present == 0:
            return "ignored", finding(
                "empty_column", data,
                f"column {name} must hold a value, found none in {self._rows} rows, and is left out; fill it, or set "
                f"data.roles.{name}: ignored",
                name,
            )  # fmt: skip
        if self._kinds == {"boolean"}:
            return "boolean", []
        if self._kinds == {"datetime"}:
            return "datetime", []
        if self._readable == present:
            # Whole numbers that count the rows are an identifier: 1, 2, 3 in any order, from anywhere.
            if self._is_identifier and self._high - self._low == self._rows - 1:
                return "identifier", self._identifier()
            return "numeric", self._ambiguous() + (self._may_be_dates() or self._are_rounded())
        if self._number_texts.are_most(self._readable, present):
            examples = _in_words(self._written_numbers)
            return self._categorical(self._number_texts.finding(examples, self._readable, present))
        if self._readable > MOSTLY * present:
            return self._categorical(self._mixed(self._odd_numbers, self._readable, "a finite number"))
        if not self._too_many and {text.casefold() for text in self._texts} <= {*TRUE_WORDS, *FALSE_WORDS}:
            return "boolean", []
        if self._date_texts.read == present:
            return "datetime", []
        if found := self._date_texts.findings(_in_words(self._odd_dates[:2]), present):
            return self._categorical(found)
        if self._date_texts.read > MOSTLY * present:
            return self._categorical(self._mixed(self._odd_dates, self._date_texts.read, "a date such as 2026-11-23"))
        if self._is_identifier:
            return "identifier", self._identifier()
        return self._categorical([])

    def _unread_in_role(self, role: str, present: int) -> list[Finding]:
        """What settings would read in a column whose role the job says."""
        if role == "datetime" and self._kinds == {"text"} and self._date_texts.read < present:
            return self._date_texts.findings(_in_words(self._odd_dates[:2]), present)
        if role == "numeric" and self._number_texts.rows:
            examples, unit = _in_words(self._written_numbers), self._as_numbers.unit
            return self._number_texts.finding(examples, self._readable, present, unit)
        return []

    def _categorical(self, found: list[Finding]) -> tuple[Role | Any, list[Finding]]:
        if not self._too_many:
            return "categorical", found
        return "ignored", found or finding(
            "too_many_categories", self._data,
            f"column {self._name} must have {MOST_CATEGORIES} categories at most, found more, and is left out; set "
            f"data.roles.{self._name}: categorical to keep those that ten training rows or more have",
            self._name,
        )  # fmt: skip

    def _identifier(self) -> list[Finding]:
        is_number = self._readable == self._rows
        return finding(
            "identifier_column", self._data,
            f"column {self._name} must say more than which row it is, found another value in every row, and is left "
            f"out; set data.split_by: {self._name} to keep a row on its side of the split when its other columns change"
            + (f", or data.roles.{self._name}: numeric if the order of the numbers means something" * is_number),
            self._name,
        )  # fmt: skip

    def _ambiguous(self) -> list[Finding]:
        name = self._name
        if self._may_be_grouped and self._grouped:
            return finding(
                "ambiguous_numbers", self._data,
                f"column {name} must hold numbers that can be read in one way, found {self._grouped!r} and the like, "
                f"which are read as {float(self._grouped):g} and may be {self._grouped.replace('.', '')}; set "
                'data.decimal: "." if it is a point, or data.decimal: "," and data.thousands: "." if not',
                name,
            )  # fmt: skip
        if self._with_zeros:
            return finding(
                "ambiguous_numbers", self._data,
                f"column {name} must hold numbers without zeros before them, found {self._with_zeros!r}, which is read "
                f"as {float(self._with_zeros):g} and may be a code; set data.roles.{name}: categorical, or numeric",
                name,
            )  # fmt: skip
        return []

    def _are_rounded(self) -> list[Finding]:
        if not self._rounded:
            return []
        return finding(
            "rounded_numbers", self._data,
            f"column {self._name} must hold whole numbers of at most {EXACT_WHOLE}, found {self._rounded}, of which "
            f"float64 keeps {int(float(self._rounded))}; set data.roles.{self._name}: categorical or ignored if it is "
            "an id, or numeric if its last digits say nothing",
            self._name,
        )  # fmt: skip

    def _may_be_dates(self) -> list[Finding]:
        if not self._whole or (words := numbers_in_words(self._low, self._high, are_days=self._are_days)) is None:
            return []
        remedy = f"{self._name}: datetime" if self._are_days else f"{self._name}: numeric if they are numbers"
        return finding(
            "dates_as_numbers", self._data,
            f"column {self._name} must hold dates such as 2026-11-23T02:00:00Z for a model to know of days, weeks and "
            f"years, found {words}, and is used as a number; write them so, or set data.roles.{remedy}",
            self._name,
        )  # fmt: skip

    def _mixed(self, odd: list[tuple[Any, Any]], read: int, rule: str) -> list[Finding]:
        present = self._rows - self._missing
        return finding(
            "mixed_values", self._data,
            f"column {self._name} must hold {rule} in every row as it does in most, found {_in_words(odd)} "
            f"({present - read} of {present} rows); add the text to data.missing, or set data.roles.{self._name}: "
            "categorical",
            self._name,
        )  # fmt: skip

    def _in_words(self) -> str:
        column = self.column
        if column is None:
            return ""
        if column.categories:
            more = len(column.categories) - EXAMPLES
            return ", ".join(column.categories[:EXAMPLES]) + (f" and {more} more" if more > 0 else "")
        if self._readable and column.role != "datetime":
            unit = f" {column.unit}" if column.unit else ""
            return f"{self._low:g} to {self._high:g}{unit}, mean {self._sum / self._readable:.4g}{self._marks}"
        return f"{self._first_text} to {self._last_text}"

    @property
    def _marks(self) -> str:
        """How the column's numbers were written, where that is not as programs write them."""
        data = self._data
        marks = [
            *([f"decimal {data.decimal}"] if data.decimal else []),
            *([f"thousands {data.thousands!r}"] if data.thousands else []),
        ]
        return f", read with {' and '.join(marks)}" if marks and "text" in self._kinds else ""


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


def _in_words(examples: list[tuple[Any, Any]]) -> str:
    return ", ".join(f"{value!r} in row {row}" for row, value in examples)


def _examples(
    column: "pd.Series[Any]", codes: npt.NDArray[np.int64], values: "pd.Series[Any]", odd: Any, most: int
) -> list[tuple[Any, Any]]:
    """The first rows that hold one of the odd values, by the index, and what they hold."""
    if most <= 0 or not odd.any():
        return []
    rows = np.flatnonzero(np.append(odd, False)[codes])[:most]
    return list(zip(column.index[rows], values.iloc[codes[rows]].tolist(), strict=True))
