"""What is in a table's columns: the role of each, and whatever is wrong with it, before anything trains.

A role is found by looking at every value, never at a sample, so that it cannot change on row 100,001. Knows nothing of
files and of splits.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from models.table import FALSE_WORDS, TRUE_WORDS, Column, Role, text_of
from tasks.job import CheckName, DataConfig, Severity

MOST_CATEGORIES = 1000
EXAMPLES = 5
MOSTLY = 0.5
LEAST_IDENTIFIERS = 20
SEVERITIES: Mapping[CheckName, Severity] = {
    "empty_column": "warn",
    "constant_column": "warn",
    "identifier_column": "warn",
    "too_many_categories": "warn",
    "mixed_values": "error",
    "labels_alike": "error",
    "missing_target": "error",
    "small_class": "warn",
    "leaking_column": "error",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found: the rule that is broken, where, a few examples, and the remedy, in one sentence."""

    check: CheckName
    severity: Severity
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Described:
    """One line of the data card: a column, what it is used as, and what is in it."""

    name: str
    role: str
    missing: int
    values: str


def finding(check: CheckName, data: DataConfig, sentence: str) -> list[Finding]:
    """The finding with the severity that the job gives it, else the usual one; none where the job ignores such."""
    severity = data.checks.get(check, SEVERITIES[check])
    return [] if severity == "ignore" else [Finding(check=check, severity=severity, sentence=sentence)]


def find_columns(frame: pd.DataFrame, data: DataConfig) -> tuple[list[Column], list[Described], list[Finding]]:
    """The features among a table's columns, each with its role; a line about every column; and what is wrong.

    Texts must be stripped already and missing values be NaN. A column that is empty, that tells rows apart and nothing
    else, or that has more than a thousand categories is left out, unless `data.roles` gives it a role.
    """
    columns: list[Column] = []
    described: list[Described] = []
    findings: list[Finding] = []
    for name in frame.columns:
        values = frame[name]
        role, problems = _role(name, values, data)
        findings += problems
        missing = int(values.isna().sum())
        if role == "ignored":
            described.append(Described(name=name, role=role, missing=missing, values=""))
            continue
        categories: tuple[str, ...] = ()
        if role == "categorical":
            categories = tuple(sorted(text_of(values.dropna()).unique()))
        columns.append(Column(name=name, role=role, categories=categories, missing=data.missing))
        described.append(Described(name=name, role=role, missing=missing, values=_in_words(values, categories)))
        if values.nunique() == 1:
            findings += finding(
                "constant_column", data,
                f"column {name} must vary, found {values.dropna().iloc[0]!r} only; set data.roles.{name}: ignored",
            )  # fmt: skip
    return columns, described, findings


def labels_alike(labels: Iterable[str], data: DataConfig) -> list[Finding]:
    """Labels that would be one class if nobody looked at blanks, case and a full stop."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(tidy(label), []).append(label)
    alike = [sorted(group) for group in groups.values() if len(group) > 1]
    if not alike:
        return []
    pairs = "; ".join(" and ".join(repr(label) for label in group) for group in alike[:EXAMPLES])
    return finding(
        "labels_alike", data,
        f"labels must differ in more than blanks, case or punctuation, found {pairs}; set data.tidy_labels: true",
    )  # fmt: skip


def tidy(label: str) -> str:
    """A label without what people do not mean by it."""
    return re.sub(r"\s+", " ", label).strip().rstrip(".,;:!").strip().casefold()


def _role(name: str, values: "pd.Series[Any]", data: DataConfig) -> tuple[Role | Any, list[Finding]]:
    if name in data.roles:
        return data.roles[name], []
    present = values.dropna()
    if present.empty:
        return "ignored", finding(
            "empty_column", data, f"column {name} must hold a value, found none in {len(values)} rows"
        )
    if pd.api.types.is_bool_dtype(present):
        return "boolean", []
    if pd.api.types.is_datetime64_any_dtype(present):
        return "datetime", []
    numbers = _as_numbers(present)
    readable = np.isfinite(numbers)
    if readable.all():
        return _number_or_identifier(name, numbers, len(values), data)
    if readable.mean() > MOSTLY:
        return "categorical", _mixed(name, present, readable, "a finite number", data)
    if not (pd.api.types.is_string_dtype(present) or present.dtype == object):
        return "categorical", []
    texts = text_of(present)
    words = set(texts.str.casefold().unique()[: len(TRUE_WORDS + FALSE_WORDS) + 1])
    if words <= {*TRUE_WORDS, *FALSE_WORDS}:
        return "boolean", []
    if texts.str.match(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}").mean() > MOSTLY:
        dates = pd.to_datetime(texts, errors="coerce", format="ISO8601", utc=True).notna()
        if dates.all():
            return "datetime", []
        return "categorical", _mixed(name, present, dates, "a date such as 2026-11-23", data)
    distinct = texts.nunique()
    if distinct == len(values) >= LEAST_IDENTIFIERS:
        return "ignored", _identifier(name, data)
    if distinct > MOST_CATEGORIES:
        return "ignored", finding(
            "too_many_categories", data,
            f"column {name} must have {MOST_CATEGORIES} categories at most, found {distinct}, and is left out; "
            f"set data.roles.{name}: categorical to keep it",
        )  # fmt: skip
    return "categorical", []


def _as_numbers(present: "pd.Series[Any]") -> "pd.Series[Any]":
    """Each distinct value is read once: a text that is no number costs a hundred times what a number does."""
    codes, distinct = pd.factorize(present)
    numbers = pd.to_numeric(pd.Series(distinct), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    return pd.Series(numbers[codes], index=present.index)


def _number_or_identifier(
    name: str, numbers: "pd.Series[Any]", rows: int, data: DataConfig
) -> tuple[Any, list[Finding]]:
    """Whole numbers that count the rows are an identifier: 1, 2, 3 in any order, from anywhere."""
    counts = len(numbers) == rows >= LEAST_IDENTIFIERS and numbers.max() - numbers.min() == rows - 1
    if counts and (numbers == numbers.round()).all() and numbers.is_unique:
        return "ignored", _identifier(name, data)
    return "numeric", []


def _identifier(name: str, data: DataConfig) -> list[Finding]:
    return finding(
        "identifier_column", data,
        f"column {name} must say more than which row it is, found another value in every row, and is left out; "
        f"set data.roles.{name} to keep it, or data.split_by: {name} to split by it",
    )  # fmt: skip


def _mixed(name: str, present: "pd.Series[Any]", readable: Any, rule: str, data: DataConfig) -> list[Finding]:
    odd = present[~readable]
    examples = ", ".join(f"{value!r} in row {row}" for row, value in odd.head(EXAMPLES).items())
    return finding(
        "mixed_values", data,
        f"column {name} must hold {rule} in every row as it does in most, found {examples} ({len(odd)} of "
        f"{len(present)} rows); add the text to data.missing, or set data.roles.{name}: categorical",
    )  # fmt: skip


def _in_words(values: "pd.Series[Any]", categories: tuple[str, ...]) -> str:
    if categories:
        return ", ".join(categories[:EXAMPLES]) + (
            f" and {len(categories) - EXAMPLES} more" if categories[EXAMPLES:] else ""
        )
    numbers = _as_numbers(values.dropna()).dropna()
    if numbers.empty:
        present = values.dropna().astype("string")
        return f"{present.min()} to {present.max()}"
    return f"{numbers.min():g} to {numbers.max():g}, mean {numbers.mean():.4g}"
