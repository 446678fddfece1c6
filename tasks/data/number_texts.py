"""Texts that are numbers to a person: with other marks than the job says, or with a unit beside them.

A text such as 1,234 may be two numbers, so nothing here reads one: it is counted, and the finding says which settings
would read it. Knows nothing of what else a column holds.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.rows.column import Column
from models.rows.table import BLANKS, CURRENCY, MARKS, plain_digits, written_number
from tasks.data.findings import Finding, finding
from tasks.job import DataConfig

Marks = tuple[str, str]

ALL_MARKS: tuple[Marks, ...] = tuple(
    (decimal, thousands) for decimal in (".", ",") for thousands in ("", *MARKS) if decimal != thousands
)
# What is no such text is looked at no further: words, dates, codes.
LIKE_A_NUMBER = (
    rf"\(?[{BLANKS}]*[-+\u2212]?[{BLANKS}]*(?:{CURRENCY})?[{BLANKS}]*[-+\u2212]?[0-9.,][0-9.,'\u2019{BLANKS}]*"
    r"(?:[eE][-+\u2212]?[0-9]+)?[^0-9]*"
)
ORDINALS = ("st", "nd", "rd", "th")
MOST_UNITS = 3
# After as many texts of which few are numbers the column is one of words.
ENOUGH_TEXTS = 10_000


def numeric_column(name: str, data: DataConfig, unit: str | None = None) -> Column:
    """A column of numbers, written as the job says."""
    return Column(
        name=name,
        role="numeric",
        missing=data.missing,
        decimal=data.decimal or ".",
        thousands=data.thousands or "",
        unit=unit,
    )


def unit_of(values: Iterable[object]) -> str | None:
    """What stands beside the first text; an empty text where nothing does and some are in brackets or have a minus
    behind; None for plain numbers and words."""
    texts = [value for value in values if isinstance(value, str)]
    units = [written.unit for text in texts[:1] if (written := written_number(text)) is not None]
    if any(units):
        return units[0]
    accounts = (text for text in texts if text.startswith("(") or text.endswith(("-", "\u2212")))
    return "" if any((written := written_number(text)) and written.unit == "" for text in accounts) else None


class NumberTexts:
    """The texts of a column that the job's settings do not read as numbers, and a person would."""

    def __init__(self, name: str, data: DataConfig) -> None:
        self._name = name
        self._data = data
        self._marks = set(ALL_MARKS)
        self._units: set[str] = set()
        self._is_accounting = self._has_letter_codes = False
        self._seen = self._distinct = 0
        self._example = ""
        self.rows = 0

    def add(self, texts: "pd.Series[Any]", counts: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """The next distinct texts that were not read, and how many rows hold each; returns which are numbers."""
        is_number: npt.NDArray[np.bool_] = (
            texts.astype("string").str.fullmatch(LIKE_A_NUMBER).to_numpy(dtype=np.bool_, na_value=False)
        )
        is_number[is_number] = [
            isinstance(text, str) and self._add(text, count)
            for text, count in zip(texts[is_number], counts[is_number], strict=True)
        ]
        return is_number

    def _add(self, text: str, count: int) -> bool:
        if self._seen >= ENOUGH_TEXTS and 2 * self._distinct < self._seen:
            return False
        self._seen += 1
        written = written_number(text)
        if written is None or written.unit in ORDINALS:
            return False
        marks = {known for known in ALL_MARKS if plain_digits(written.digits, *known) is not None}
        if not marks:
            return False
        self._marks &= marks
        self._distinct += 1
        self.rows += int(count)
        self._example = self._example or text
        if written.unit:
            self._units.add(written.unit)
            # 12a and 12b are codes, where 12 kg and 300 g are not.
            is_tight = text.endswith(written.unit) and text.removesuffix(written.unit)[-1].isdigit()
            self._has_letter_codes |= len(written.unit) == 1 and written.unit.isalpha() and is_tight
        self._is_accounting |= written.unit == ""
        return True

    def are_most(self, readable: int, present: int) -> bool:
        """Whether they are what keeps a column of `present` values from being one of numbers, `readable` of which the
        job's settings read."""
        is_code = len(self._units) > MOST_UNITS or (len(self._units) > 1 and self._has_letter_codes)
        return not is_code and 2 * self.rows > present - readable and 2 * (readable + self.rows) > present

    def finding(self, examples: str, readable: int, present: int, unit: str | None = None) -> list[Finding]:
        """`examples` are some of them, in words; `unit` stands beside those that are read."""
        name = self._name
        return finding(
            "numbers_as_text", self._data,
            f"column {name} must hold plain numbers, found {examples} ({self.rows} of {present} rows); "
            f"{self.remedy(readable, unit)}, or set data.roles.{name}: categorical to keep them as texts",
            name,
        )  # fmt: skip

    def remedy(self, readable: int = 0, unit: str | None = None) -> str:
        """What would read them; `readable` rows of the column are numbers with the `unit`, or plain ones."""
        units = [*(["none"] if readable and not unit else []), *map(repr, sorted({*self._units, unit or ""} - {""}))]
        if self._units and len(units) > 1:
            return f"write all of them in one unit, where now some have {' and some '.join(units)}"
        is_said = self._data.roles.get(self._name) == "numeric"
        is_more = (self._units or self._is_accounting) and not is_said
        role = [f"data.roles.{self._name}: numeric"] if is_more else []
        choices = {" and ".join(self._settings(marks) + role): marks for marks in self._choices()}
        if not choices:
            return "write all of them with the same marks, where now a comma or a point means two things"
        if len(choices) == 1:
            return f"set {next(iter(choices))} to read them"
        written = written_number(self._example)
        assert written is not None
        return "set " + ", or ".join(
            f"{settings} if {self._example!r} is {'-' * written.is_negative}{plain_digits(written.digits, *marks)}"
            for settings, marks in choices.items()
        )

    def _choices(self) -> list[Marks]:
        """The marks that would read all of them; of those that differ in nothing that was seen the simplest."""
        now = (self._data.decimal or ".", self._data.thousands or "")
        if now in self._marks:
            return [now]
        decimals = (now[0], *({".", ","} - {now[0]}))
        simplest = [
            min((marks for marks in self._marks if marks[0] == decimal), key=lambda marks: ALL_MARKS.index(marks))
            for decimal in decimals
            if any(marks[0] == decimal for marks in self._marks)
        ]
        is_same = len({thousands for _, thousands in simplest}) == 1
        return simplest[:1] if is_same or (self._data.decimal and simplest[0][0] == now[0]) else simplest

    def _settings(self, marks: Marks) -> list[str]:
        decimal, thousands = marks
        settings = [] if decimal == (self._data.decimal or ".") else [f'data.decimal: "{decimal}"']
        if thousands != (self._data.thousands or ""):
            settings.append(f'data.thousands: "{thousands}"' if thousands else "no data.thousands")
        return settings
