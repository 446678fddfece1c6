"""What is odd about the splits: sizes and shares of classes that chance would hardly make, and rows that are there many
times. Knows how many rows are where, and nothing of what is in them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, bdtrc

from tasks.data.findings import EXAMPLES, Finding, finding
from tasks.data.rows import DataError, Rows
from tasks.data.snapshots import SPLITS
from tasks.job import DataConfig

# Splits differ by chance; by less chance than this it is no chance.
ODD_CHANCE = 1e-4
# And it matters where a split has this much more or less than its share of the rows, relative to that share,
ODD_SIZE = 0.25
# or a class, of which that much more or less is there, or half of what all rows have.
ODD_CLASS, ODD_RARE_CLASS = 0.05, 0.5
COPIES_SHARE = 0.01
# Fewer say nothing about any others.
LEAST_TRAINING_ROWS = 10

_Array = npt.NDArray[Any]


@dataclass
class Copies:
    """How many rows are the same as one before, whatever their targets, and how often the most frequent row is there.
    Rows of other values of `data.split_by`, or of other moments, are not the same."""

    rows: int = 0
    most: int = 0

    def add(self, high: _Array, low: _Array, positions: _Array) -> None:
        """The next rows (rows,): both words of their hashes, of which equal ones lie together, and what tells their
        splits."""
        if not len(high):
            return
        runs = np.cumsum(np.append(False, (high[1:] != high[:-1]) | (low[1:] != low[:-1])))
        order = np.lexsort((positions, runs))
        runs, positions = runs[order], positions[order]
        begins = np.flatnonzero(np.append(True, (runs[1:] != runs[:-1]) | (positions[1:] != positions[:-1])))
        counts = np.diff(np.append(begins, len(high)))
        self.rows += int((counts - 1).sum())
        self.most = max(self.most, int(counts.max()))


def check_splits(counts: _Array, rows: Rows, data: DataConfig) -> None:
    """Raise DataError where a split is empty, or training rows are too few or lack a class; `counts` are (splits,
    classes)."""
    for place, split in enumerate(SPLITS):
        if counts[place].sum() == 0:
            remedy = f"give more rows than {rows.count}"
            if data.test_from is not None:
                remedy = f"choose another data.test_from than {data.test_from:%Y-%m-%d}, or {remedy}"
            raise DataError(f"{data.source}: the {split} split must not be empty; {remedy}")
    if (left := int(counts[0].sum())) < LEAST_TRAINING_ROWS:
        raise DataError(
            f"{data.source}: the train split must have {LEAST_TRAINING_ROWS} rows at least, found {left} of "
            f"{rows.count} beside data.validation_fraction {data.validation_fraction:g} and data.test_fraction "
            f"{data.test_fraction:g}; give more rows, or lower a fraction"
        )
    missing = [name for name, count in zip(rows.classes, counts[0], strict=False) if count == 0]
    if missing:
        names = ", ".join(missing[:EXAMPLES])
        raise DataError(
            f"{data.source}: every class needs a training row, found none of {len(missing)} of {len(rows.classes)} "
            f"classes ({names}); give more rows, or choose search.objective rmse, mae or r2 if the target is a number"
        )


def split_findings(counts: _Array, copies: Copies, rows: Rows, data: DataConfig) -> list[Finding]:
    return [
        *_duplicate_rows(copies, rows, data),
        *_odd_sizes(counts.sum(axis=1), data),
        *(_unbalanced(counts, rows.classes, data) if rows.classes else []),
    ]


def _duplicate_rows(copies: Copies, rows: Rows, data: DataConfig) -> list[Finding]:
    if copies.rows < COPIES_SHARE * rows.count:
        return []
    ids = [described.name for described in rows.described if described.role == "identifier"]
    remedy = "drop them"
    if rows.columns and data.split_by is None and data.time_column is None:
        column = ids[0] if ids else "a column that tells rows apart"
        remedy = f"drop them, or set data.split_by to {column} if they are rows of their own"
    return finding(
        "duplicate_rows", data,
        f"rows must differ from each other, found {copies.rows} of {rows.count} that are copies of another, one row "
        f"{copies.most} times; all copies are in one split, and the gate counts them as one row; {remedy}",
    )  # fmt: skip


def _odd_sizes(sizes: _Array, data: DataConfig) -> list[Finding]:
    """The split whose share of the rows is the furthest from the wanted one, beyond what independent rows would do
    (binomial). The test rows of a time's end are as many as there are."""
    wanted = {"validation": data.validation_fraction, "test": data.test_fraction}
    wanted["train"] = 1 - sum(wanted.values())
    if data.test_from is not None:
        sizes, wanted = sizes[:2], {"train": 1 - data.validation_fraction, "validation": data.validation_fraction}
    count = int(sizes.sum())
    odd = {}
    for split, size in zip(SPLITS, sizes.tolist(), strict=False):
        chance = 2 * min(bdtr(size, count, wanted[split]), bdtrc(size - 1, count, wanted[split]))
        if chance <= ODD_CHANCE:
            odd[split] = size / count / wanted[split] - 1
    if not odd or max(map(abs, odd.values())) < ODD_SIZE:
        return []
    split = max(odd, key=lambda name: abs(odd[name]))
    return finding(
        "odd_split", data,
        f"each split must have about its share of the rows, found {(1 + odd[split]) * wanted[split]:.1%} of them in "
        f"the {split} split, which should have {wanted[split]:.1%} ({', '.join(map(str, sizes))} rows for "
        f"{', '.join(SPLITS[: len(sizes)])}); {_remedy(data)}",
    )  # fmt: skip


def _unbalanced(counts: _Array, classes: tuple[str, ...], data: DataConfig) -> list[Finding]:
    """The class whose share in a split is the furthest from that in all rows, beyond what chance would do (each by
    Fisher's hypergeometric test, all of them together by Bonferroni), and by an amount that matters."""
    from scipy.stats import hypergeom  # half a second, as in sources.py

    total, of_split, of_class = counts.sum(), counts.sum(axis=1, keepdims=True), counts.sum(axis=0)
    tails = hypergeom.cdf(counts, total, of_class, of_split), hypergeom.sf(counts - 1, total, of_class, of_split)
    chance = 2 * np.minimum(*tails) * counts.size
    shares, overall = counts / of_split, of_class / total
    away = np.abs(shares - overall) / np.minimum(ODD_CLASS, ODD_RARE_CLASS * overall)
    away[chance > ODD_CHANCE] = 0
    split, label = np.unravel_index(int(away.argmax()), away.shape)
    if away[split, label] < 1:
        return []
    return finding(
        "unbalanced_split", data,
        f"each class must have about the same share of every split, found {shares[split, label]:.1%} of the "
        f"{SPLITS[int(split)]} rows in {classes[int(label)]!r} and {overall[label]:.1%} of all; {_remedy(data)}",
    )  # fmt: skip


def _remedy(data: DataConfig) -> str:
    if data.test_from is not None:
        return "choose another data.test_from"
    if data.split_by is not None:
        return "give more groups of rows, or split by another column"
    return "drop copies of rows, or set data.split_by to a column that tells them apart"
