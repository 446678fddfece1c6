"""What is in a table's columns: the role of each, and whatever is wrong with it, before anything trains.

A role is found by looking at every value, never at a sample, so that it cannot change on row 100,001; a chunk of rows
at a time, so that a table may be larger than the memory. Knows nothing of files and of splits.
"""

from typing import Any

import pandas as pd

from models.rows.column import Column, Role
from models.rows.table import FALSE_WORDS, TRUE_WORDS, by_value, forms_of
from tasks.data.column_values import EXACT_WHOLE, LEAST_IDENTIFIERS, MOST_CATEGORIES, ColumnValues
from tasks.data.date_texts import numbers_in_words
from tasks.data.findings import EXAMPLES, Described, Finding, finding

MOSTLY = 0.5


class Survey(ColumnValues):
    """What a column is used as, once all of its values were seen.

    `column` is how it is used, None where it is left out: a column that is empty, that tells rows apart and
    nothing else, or that has more than a thousand categories, unless `data.roles` gives it a role.
    """

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


def _in_words(examples: list[tuple[Any, Any]]) -> str:
    return ", ".join(f"{value!r} in row {row}" for row, value in examples)
