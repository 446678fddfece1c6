"""A table's column: its role, and the texts that a value may be. Knows nothing of rows, and imports nothing."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["numeric", "boolean", "categorical", "datetime"]
DateOrder = Literal["year_first", "day_first", "month_first"]

MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "NaT", "<NA>")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A feature of a table. `categories` are those that a code stands for, in the order of their codes; `missing` are
    the texts that mean that there is no value.

    Of numbers in texts `decimal` and `thousands` are the marks before a fraction and between groups of digits, no mark
    where it is empty. `unit` is what stands beside each number, such as $ or kg; where it is not None, brackets around
    a number or a minus behind it make it negative, too. `dates` is the order of a day that does not begin with its
    year."""

    name: str
    role: Role
    categories: tuple[str, ...] = ()
    missing: tuple[str, ...] = MISSING
    decimal: str = "."
    thousands: str = ""
    unit: str | None = None
    dates: DateOrder = "year_first"
