"""A table's column: its role, and the texts that a value may be. Knows nothing of rows, and imports nothing."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["numeric", "boolean", "categorical", "datetime"]

MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "NaT", "<NA>")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A feature of a table. `categories` are those that a code stands for, in the order of their codes; `missing` are
    the texts that mean that there is no value."""

    name: str
    role: Role
    categories: tuple[str, ...] = ()
    missing: tuple[str, ...] = MISSING
