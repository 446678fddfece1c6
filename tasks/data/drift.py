"""What has moved in the data since an earlier snapshot, column by column, on training rows.

The measure is the population stability index: over bins, the sum of (share now - share before) ln(now / before). Below
0.1 nothing moved, above 0.25 much did (Siddiqi, Credit Risk Scorecards, 2006). What chance alone gives, (bins - 1)
(1/n + 1/m) on average (Yurdakul, Statistical Properties of PSI, 2018), is taken off, or a small table would drift every
night. Knows nothing of models.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.rows.table import recode
from tasks.data.findings import escaped
from tasks.data.prepare import names_and_roles
from tasks.data.snapshots import Snapshot

BINS = 10
MOVED = 0.25
MOVED_CLASSES = 0.1
LEAST_SHARE = 1e-4
MOST_ROWS = 200_000


@dataclass(frozen=True, kw_only=True)
class Change:
    """How far a column moved: its stability index, the share of rows without a value before and now, and categories
    that were not there before."""

    column: str
    stability_index: float
    missing_before: float
    missing_now: float
    new_categories: tuple[str, ...] = ()

    @property
    def is_large(self) -> bool:
        return self.stability_index > MOVED


def since(before: Snapshot | None, now: Snapshot) -> tuple[Change, ...]:
    """What moved since a snapshot, the farthest first; nothing where it is this one, gone, or of other columns."""
    if before is None or before.fingerprint == now.fingerprint or why_other(before, now):
        return ()
    return changes(before, now)


def changes(before: Snapshot, now: Snapshot) -> tuple[Change, ...]:
    """Each column of two snapshots of the same columns, the farthest moved first; of images the brightness of each
    channel. Of very many rows a sample is compared."""
    earlier, later = (_sample(snapshot) for snapshot in (before, now))
    if now.columns:
        earlier = recode(earlier, before.columns, now.columns)
    moved = []
    for place in range(later.shape[1]):
        column = now.columns[place] if now.columns else None
        categorical = column is not None and column.role == "categorical"
        seen = before.columns[place].categories if column is not None else ()
        moved.append(
            Change(
                column=f"column {place}" if column is None else column.name,
                stability_index=_stability_index(earlier[:, place], later[:, place], categorical=categorical),
                missing_before=float(np.isnan(earlier[:, place]).mean()),
                missing_now=float(np.isnan(later[:, place]).mean()),
                new_categories=tuple(name for name in column.categories if name not in seen) if column else (),
            )
        )
    return tuple(sorted(moved, key=lambda change: -change.stability_index))


def why_other(before: Snapshot, now: Snapshot) -> str | None:
    """Why two snapshots cannot be compared column by column; None where they can."""
    if (before.shape, before.classes) != (now.shape, now.classes):
        return f"rows had shape {before.shape.features} in {len(before.classes)} classes"
    if names_and_roles(before.columns) != names_and_roles(now.columns):
        return "rows had other columns"
    return None


def drift(before: Snapshot, now: Snapshot) -> str | None:
    """What makes two snapshots' training rows too different for one's results to guide the other's search; None where
    nothing does.

    Other columns or classes; a column that moved much; classes of which a tenth of the rows changed (total variation
    distance).
    """
    if before.fingerprint == now.fingerprint:
        return None
    if other := why_other(before, now):
        return other
    farthest = changes(before, now)[0]
    if farthest.is_large:
        return f"{farthest.column} moved, its stability index is {farthest.stability_index:.2f}"
    if now.classes:
        counts = [np.array(snapshot.class_rows["train"]) for snapshot in (before, now)]
        if (
            changed := float(np.abs(counts[0] / counts[0].sum() - counts[1] / counts[1].sum()).sum()) / 2
        ) > MOVED_CLASSES:
            return f"the classes' shares moved by {changed:.0%}"
    return None


def drift_table(moved: tuple[Change, ...]) -> str:
    """The changes in Markdown."""
    lines = [
        f"| {escaped(change.column)}{' **moved**' if change.is_large else ''} | {change.stability_index:.3f} | "
        f"{change.missing_before:.1%} | {change.missing_now:.1%} | {escaped(', '.join(change.new_categories[:5]))} |"
        for change in moved
    ]
    head = [
        "| column | stability index | missing before | missing now | new categories |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join(["# What moved since the champion's snapshot", "", *head, *lines, ""])


def _sample(snapshot: Snapshot) -> npt.NDArray[np.floating[Any]]:
    """The first training rows, which are a sample because the file goes by hashes, (rows, columns)."""
    rows = snapshot.first("train", MOST_ROWS)
    if rows.ndim == 2:
        return rows
    return rows.reshape(len(rows), rows.shape[1], -1).mean(axis=2) if rows.ndim > 3 else rows.reshape(len(rows), -1)


def _stability_index(
    before: npt.NDArray[np.floating[Any]], now: npt.NDArray[np.floating[Any]], *, categorical: bool
) -> float:
    """Missing values are no bin: their shares stand beside it. 0 where a column is empty before or now."""
    before, now = before[~np.isnan(before)], now[~np.isnan(now)]
    if not (len(before) and len(now)):
        return 0.0
    if categorical:
        names = np.unique(np.concatenate([before, now]))
        bins_before, bins_now = np.searchsorted(names, before), np.searchsorted(names, now)
    else:
        edges = np.unique(np.quantile(before, np.linspace(0, 1, BINS + 1)[1:-1]))
        bins_before, bins_now = np.searchsorted(edges, before), np.searchsorted(edges, now)
    count = 1 + int(max(bins_before.max(), bins_now.max()))
    shares = [
        np.maximum(np.bincount(bins, minlength=count) / len(bins), LEAST_SHARE) for bins in (bins_before, bins_now)
    ]
    index = float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())
    return max(0.0, index - (count - 1) * (1 / len(before) + 1 / len(now)))
