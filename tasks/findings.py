"""What preparing says of the rows: how each column is used, and what is wrong. A process that trains reads it with the
snapshot, so it knows nothing of tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.column import Role
from tasks.job import CheckName, DataConfig, Severity

EXAMPLES = 5
SEVERITIES: Mapping[CheckName, Severity] = {
    "header_row": "error",
    "empty_column": "warn",
    "constant_column": "warn",
    "identifier_column": "warn",
    "too_many_categories": "warn",
    "mixed_values": "error",
    "numbers_as_text": "error",
    "ambiguous_numbers": "warn",
    "dates_as_text": "error",
    "dates_as_numbers": "warn",
    "labels_alike": "error",
    "missing_target": "error",
    "small_class": "warn",
    "leaking_column": "error",
    "unbalanced_split": "warn",
    "changed_column": "error",
    "rows_lost": "error",
    "empty_class": "error",
    "unread_files": "warn",
    "several_frames": "warn",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found: the rule that is broken, where, a few examples, and the remedy, in one sentence."""

    check: CheckName
    severity: Severity
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Described:
    """A line of the data card about a column: what it is used as (a feature's role, identifier, ignored, target, split
    by or time), how many values are missing, and what is in it."""

    name: str
    role: Role | Any
    missing: int
    values: str


def finding(check: CheckName, data: DataConfig, sentence: str) -> list[Finding]:
    """The finding with the severity that the job gives it, else the usual one; none where the job ignores such."""
    severity = data.checks.get(check, SEVERITIES[check])
    return [] if severity == "ignore" else [Finding(check=check, severity=severity, sentence=printable(sentence))]


def printable(text: str) -> str:
    """One line that a terminal shows as it is: what a column's name or a value holds of control characters, line ends
    and halves of a surrogate pair as Python would write it."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
