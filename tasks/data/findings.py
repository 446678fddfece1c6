"""What preparing says of the rows: how each column is used, and what is wrong. A process that trains reads it with the
snapshot, so it knows nothing of tables.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from models.rows.column import Role
from tasks.job import CheckName, DataConfig, Severity

EXAMPLES = 5
# As many findings of one kind are one line where lines are read as they come.
MANY = 3
# What Markdown would take for its own; an underscore only at the end of a word.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|&~]|(?<!\w)_|_(?!\w)")
SEVERITIES: Mapping[CheckName, Severity] = {
    "header_row": "error",
    "empty_column": "warn",
    "constant_column": "warn",
    "identifier_column": "warn",
    "too_many_categories": "warn",
    "mixed_values": "error",
    "far_value": "error",
    "rounded_numbers": "warn",
    "numbers_as_text": "error",
    "ambiguous_numbers": "warn",
    "dates_as_text": "error",
    "dates_as_numbers": "warn",
    "labels_alike": "error",
    "missing_target": "error",
    "small_class": "warn",
    "leaking_column": "error",
    "duplicate_rows": "warn",
    "odd_split": "warn",
    "unbalanced_split": "warn",
    "changed_column": "error",
    "rows_lost": "error",
    "empty_class": "error",
    "unread_files": "warn",
    "several_frames": "warn",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found: the rule that is broken, where, a few examples, and the remedy, in one sentence; `column`
    names the column where it is about one."""

    check: CheckName
    severity: Severity
    sentence: str
    column: str = ""


@dataclass(frozen=True, kw_only=True)
class Described:
    """A line of the data card about a column: what it is used as (a feature's role, identifier, ignored, target, split
    by or time), how many values are missing, and what is in it."""

    name: str
    role: Role | Any
    missing: int
    values: str


def finding(check: CheckName, data: DataConfig, sentence: str, column: str = "") -> list[Finding]:
    """The finding with the severity that the job gives it, else the usual one; none where the job ignores such."""
    severity = data.checks.get(check, SEVERITIES[check])
    if severity == "ignore":
        return []
    return [Finding(check=check, severity=severity, sentence=printable(sentence), column=printable(column))]


def in_brief(findings: Iterable[Finding]) -> list[Finding]:
    """The findings for a terminal or a log: of many columns with one fault the first, which names some others."""
    kinds: dict[tuple[CheckName, Severity], list[Finding]] = {}
    for found in findings:
        kinds.setdefault((found.check, found.severity), []).append(found)
    brief = []
    for first, *others in kinds.values():
        columns = [found.column for found in others if found.column]
        if len(columns) < MANY or len(columns) < len(others):
            brief += [first, *others]
            continue
        names = ", ".join(columns[:EXAMPLES]) + (", ..." if len(columns) > EXAMPLES else "")
        brief.append(replace(first, sentence=f"{first.sentence}; the same of {len(columns)} more columns ({names})"))
    return brief


def escaped(text: str) -> str:
    """One line of a Markdown document that shows what stands in data as it is, in a table's cell too."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def printable(text: str) -> str:
    """One line that a terminal shows as it is: what a column's name or a value holds of control characters, line ends
    and halves of a surrogate pair as Python would write it."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
