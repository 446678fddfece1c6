"""Texts that are dates to a person: with the day or the month before the year, two digits of a year, or a month's name.

A text such as 03.04.2026 may be two days, so nothing here guesses: rows are counted by the order that would read them,
and the finding says which settings do. Knows nothing of what else a column holds.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.rows.column import Column, DateOrder
from models.rows.table import read_moments
from tasks.data.findings import Finding, finding
from tasks.job import DataConfig

MOSTLY = 0.5
ORDERS: dict[DateOrder, str] = {
    "year_first": "the year first",
    "day_first": "the day first",
    "month_first": "the month first",
}
LOOKS_LIKE_A_DATE = r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}(?:\D.*)?"
SHORT_YEAR = r"(\d{1,2})[-./](\d{1,2})[-./](\d{2})"
# 23 Nov 2026, 23-Nov-26, November 23, 2026
MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
WITH_MONTH = rf"(?i)(?:{_DAY}[-./ ]*{MONTH}|{MONTH}[. ]*{_DAY})[-./, ]+\d{{2,4}}(?:\D.*)?"

FIRST_SECOND, LAST_SECOND = (pd.Timestamp(f"{year}-01-01").timestamp() for year in (2000, 2040))


class DateTexts:
    """How many rows of a column hold texts that look like dates, and how many of those are read."""

    def __init__(self, name: str, data: DataConfig) -> None:
        self._name = name
        self._data = data
        self._orders: dict[DateOrder, int] = dict.fromkeys(set(ORDERS) - {data.dates}, 0)
        self._short: dict[str, int] = {}
        self._with_month = self._with_time = 0
        self.looks = self.read = 0

    def add(self, texts: "pd.Series[Any]", counts: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """The next distinct texts, and how many rows hold each; returns which are read as dates."""
        looks = texts.str.fullmatch(LOOKS_LIKE_A_DATE).to_numpy(dtype=bool)
        self.looks += int(counts[looks].sum())
        self._with_month += int(counts[texts.str.fullmatch(WITH_MONTH).to_numpy(dtype=bool)].sum())
        is_read = np.zeros(len(texts), dtype=np.bool_)
        if not self.looks:  # nothing is read as a date before something looks like one
            return is_read
        is_read = self._are_read(texts, self._data.dates)
        self.read += int(counts[is_read].sum())
        odd, often = texts[looks & ~is_read], counts[looks & ~is_read]
        if len(odd):
            for order in self._orders:
                self._orders[order] += int(often[self._are_read(odd, order)].sum())
            self._add_short(odd, often)
            days = odd.str.replace(r"[T ,].*$", "", regex=True)
            is_day = np.logical_or.reduce([self._are_read(days, order) for order in ORDERS])
            self._with_time += int(often[is_day & (days != odd).to_numpy(dtype=bool)].sum())
        return is_read

    def _add_short(self, texts: "pd.Series[Any]", counts: npt.NDArray[Any]) -> None:
        for form in (r"20\1-\2-\3", r"20\3-\2-\1", r"20\3-\1-\2"):
            long = texts.str.replace(f"^{SHORT_YEAR}$", form, regex=True)
            is_short = (long != texts).to_numpy(dtype=bool) & self._are_read(long, "year_first")
            self._short[form] = self._short.get(form, 0) + int(counts[is_short].sum())

    def _are_read(self, texts: "pd.Series[Any]", order: DateOrder) -> npt.NDArray[np.bool_]:
        column = Column(name=self._name, role="datetime", dates=order)
        is_read: npt.NDArray[np.bool_] = read_moments(texts, column).notna().to_numpy(dtype=np.bool_)
        return is_read

    def findings(self, examples: str, present: int) -> list[Finding]:
        """What keeps a column of `present` values from being one of dates, `examples` of which are not read; nothing
        where it is one, and where it holds other texts."""
        odd = present - self.read
        other = max(self._orders.values())
        orders = [order for order, rows in self._orders.items() if rows == other]
        if 2 * other > odd and self.read + other > MOSTLY * present:
            rows, how = other, f"dates with {' or '.join(ORDERS[order] for order in sorted(orders))}"
            remedy = f"set data.dates: {' or '.join(sorted(orders))} to read them"
        elif max(self._short.values(), default=0) == present:
            rows, how, remedy = present, "what may be dates with two digits for the year", "write four"
        elif self._with_month > MOSTLY * present:
            rows, how, remedy = self._with_month, "dates with the name of a month", "write its number"
        elif self._with_time > MOSTLY * present:
            rows, how, remedy = self._with_time, "dates with another time than 14:05:00 or 14:05:00Z", "write it so"
        else:
            return []
        return finding(
            "dates_as_text", self._data,
            f"column {self._name} must hold a date such as 2026-11-23 in every row, found {examples} ({rows} of "
            f"{present} rows hold {how}); {remedy}, or set data.roles.{self._name}: categorical or ignored",
            self._name,
        )  # fmt: skip


def are_days(numbers: npt.NDArray[np.float64]) -> bool:
    """Whether all are days such as 20261231, of 1900 to 2100."""
    year, month, day = numbers // 10_000, numbers // 100 % 100, numbers % 100
    is_day = (year >= 1900) & (year <= 2100) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
    return bool((is_day & (numbers == np.floor(numbers))).all())


def numbers_in_words(low: float, high: float, *, are_days: bool) -> str | None:
    """What whole numbers from `low` to `high` may be: days such as 20261231, or moments counted since 1970 that lie
    between 2000 and 2040; None for other numbers."""
    if are_days:
        return f"{low:.0f} to {high:.0f}, which are days"
    for unit, each in (("seconds", 1), ("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)):
        if FIRST_SECOND * each <= low and high <= LAST_SECOND * each:
            first, last = (pd.Timestamp(end / each, unit="s") for end in (low, high))
            days = f"{first:%Y-%m-%d} to {last:%Y-%m-%d}"
            return f"{low:.0f} to {high:.0f}, which may be moments, {days} in {unit} since 1970"
    return None
