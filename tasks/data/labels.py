"""Labels that people would take for one: told apart, or not, by more than blanks, case and punctuation."""

import re
import unicodedata
from collections.abc import Collection

from models.rows.table import forms_of
from tasks.data.findings import EXAMPLES, Finding, finding
from tasks.job import DataConfig


def labels_alike(labels: Collection[str], data: DataConfig) -> list[Finding]:
    """Labels as they are written that would be one class if no one looked at blanks, case, a full stop and the form of
    letters in Unicode; none of a column of numbers, truths or moments, which are told by their values."""
    if forms_of(labels):
        return []
    groups: dict[str, list[str]] = {}
    for label in sorted(labels):
        groups.setdefault(tidy(label), []).append(label)
    alike = [group for group in groups.values() if len(group) > 1]
    if not alike:
        return []
    pairs = "; ".join(" and ".join(_shown(label) for label in group) for group in alike[:EXAMPLES])
    return finding(
        "labels_alike", data,
        "labels must differ in more than blanks, case, punctuation or the form of their letters in Unicode, found "
        f"{pairs}; set data.tidy_labels: true",
    )  # fmt: skip


def tidy(label: str) -> str:
    """A label without what people do not mean by it."""
    spaced = re.sub(r"\s+", " ", unicodedata.normalize("NFC", label))
    return spaced.strip().rstrip(".,;:!").strip().casefold()


def _shown(label: str) -> str:
    """A label between quotes; its accents by their codes where they stand beside their letters."""
    return repr(label) if unicodedata.is_normalized("NFC", label) else ascii(label)
