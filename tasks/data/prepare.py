"""prepare: rows become a snapshot, an immutable folder named by the fingerprint of what is in it.

A row's split is decided by a hash of its content, or of what the job names, so it never changes as data grows and
exact duplicates never straddle splits. Rows are read in chunks and sorted by their hashes in buckets, so that they may
be many times what the memory holds. Knows nothing of models.
"""

import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from models.rows.column import Column
from models.rows.shapes import DataShape, Problem
from models.rows.table import EPOCH
from tasks.data.far_values import FarValues
from tasks.data.findings import EXAMPLES, Finding, finding
from tasks.data.rows import Chunk, Rows, narrowed, stop_at_errors
from tasks.data.snapshots import (
    FORMAT,
    POSITION,
    SPLITS,
    Snapshot,
    checksum,
    move_into_place,
    read_snapshot,
    write_description,
)
from tasks.data.sources import read_rows
from tasks.data.split_checks import Copies, check_splits, split_findings
from tasks.job import DataConfig

DOWNLOADS = "downloads"
# What is sorted at once; as few rows as this are never written to a bucket.
BUCKET_BYTES = 32 * 2**20
# Each is an open file, of which a process may have 1,024 on most machines.
MOST_BUCKETS = 512

_Array = npt.NDArray[Any]
_logger = logging.getLogger(__name__)


def prepare(data: DataConfig, problem: Problem, snapshots: Path, last: Snapshot | None = None) -> Snapshot:
    """Read the source, split it, and write its snapshot unless one with this fingerprint is there already.

    `last` is the job's last snapshot, which tells what has changed in a way that nobody meant. Raises DataError: what
    is read is no rows for the problem, a check stops the night, a split is empty, or a class has no training row.
    """
    (home := snapshots.parent).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=".preparing-", ignore_cleanup_errors=True) as name:
        rows = read_rows(data, problem, home / DOWNLOADS, Path(name))
        changed = _changes(rows, last, data)
        stop_at_errors(changed, data)
        far = FarValues(rows)
        with _Buckets(rows, problem, data, Path(name)) as buckets:
            for chunk in rows.chunks():
                far.add(chunk)
                buckets.add(chunk, _positions(chunk), _splits(chunk, data))
            counts = buckets.counts
            check_splits(counts, rows, data)
            distant = far.findings(data)
            stop_at_errors(distant, data)
            folder = Path(name) / "snapshot"
            fingerprint, copies = _write(buckets, rows, data, folder)
        odd = split_findings(counts, copies, rows, data)
        stop_at_errors(odd, data)
        row_counts = {split: int(counts[place].sum()) for place, split in enumerate(SPLITS)}
        snapshot = Snapshot(
            fingerprint=fingerprint,
            source=data.source,
            path=snapshots / fingerprint,
            shape=DataShape(features=rows.shape, outputs=max(1, len(rows.classes)), problem=problem),
            classes=rows.classes,
            row_counts=row_counts,
            class_rows={split: tuple(counts[place].tolist()) for place, split in enumerate(SPLITS)}
            if rows.classes
            else {},
            columns=rows.columns,
            described=rows.described,
            findings=(*rows.findings, *distant, *odd, *changed),
            checksums={path.name: checksum(path) for path in sorted(folder.iterdir())},
        )
        if read_snapshot(snapshots, fingerprint) is None:
            write_description(snapshot, folder)
            snapshots.mkdir(exist_ok=True)
            move_into_place(folder, snapshot.path)
    _logger.info("%d rows of %s: %s, snapshot %s", rows.count, data.source, row_counts, fingerprint)
    return snapshot


def names_and_roles(columns: tuple[Column, ...]) -> list[tuple[str, str]]:
    """What two tables must have in common for a model of one to read the other's rows."""
    return sorted((column.name, column.role) for column in columns)


def first_test_moment(data: DataConfig) -> int:
    """The beginning of the test rows' time, in microseconds since 2000-01-01 UTC."""
    assert data.test_from is not None
    epoch: datetime = EPOCH.to_pydatetime()
    return (data.test_from - epoch) // timedelta(microseconds=1)


def position_of(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Hashes (rows, 2) as numbers in [0, 1)."""
    positions: npt.NDArray[np.float64] = words[:, 0] / 2.0**64
    return positions


def split_of(positions: npt.NDArray[np.float64], data: DataConfig) -> npt.NDArray[np.int64]:
    """Each row's place in SPLITS: its position against the fractions. Test rows come first, so a changed validation
    fraction moves no row into or out of the test split."""
    test, validation = data.test_fraction, data.test_fraction + data.validation_fraction
    return np.where(positions < test, 2, np.where(positions < validation, 1, 0))


def _positions(chunk: Chunk) -> npt.NDArray[np.float64]:
    return position_of(chunk.content if chunk.identity is None else chunk.identity)


def _splits(chunk: Chunk, data: DataConfig) -> npt.NDArray[np.int64]:
    """With a time column the test rows are those of its end, and all others are split by their hashes."""
    positions = _positions(chunk)
    if chunk.moments is None:
        return split_of(positions, data)
    earlier = np.where(positions < data.validation_fraction, 1, 0)
    return np.where(chunk.moments >= first_test_moment(data), 2, earlier)


class _Buckets:
    """Rows by the first bits of their hashes: in memory where they are few, else each bucket in a file of its own.
    `is_narrow` says whether float32 holds every feature as it is."""

    def __init__(self, rows: Rows, problem: Problem, data: DataConfig, folder: Path) -> None:
        self.dtype = np.dtype(
            [
                ("high", ">u8"),
                ("low", ">u8"),
                ("label", ">i8" if problem == "classification" else ">f8"),
                ("split", "i1"),
                ("position", "<f8" if data.time_column is None else "<i8"),
                ("features", rows.dtype.newbyteorder("<"), rows.shape),
            ]
        )
        self.is_narrow = True
        self.counts = np.zeros((len(SPLITS), max(1, len(rows.classes))), dtype=np.int64)
        wanted = max(1, rows.count * self.dtype.itemsize / BUCKET_BYTES)
        self._count = min(MOST_BUCKETS, 2 ** math.ceil(math.log2(wanted)))
        self._in_memory: list[_Array] = []
        self._folder = folder
        self._files: list[BinaryIO] = []
        self._stack = ExitStack()

    def __enter__(self) -> "_Buckets":
        if self._count > 1:
            self._files = [
                self._stack.enter_context((self._folder / f"{number}.bucket").open("w+b"))
                for number in range(self._count)
            ]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, chunk: Chunk, positions: npt.NDArray[np.float64], splits: npt.NDArray[np.int64]) -> None:
        rows = np.empty(len(chunk.target), dtype=self.dtype)
        rows["high"], rows["low"] = chunk.content.T
        rows["label"] = chunk.target + chunk.target.dtype.type(0)
        rows["split"], rows["features"] = splits, chunk.features
        rows["position"] = positions if chunk.moments is None else chunk.moments
        self.is_narrow = self.is_narrow and np.array_equal(narrowed(chunk.features), chunk.features, equal_nan=True)
        labels = chunk.target.astype(np.int64) if self.dtype["label"].kind == "i" else np.zeros(len(rows), np.int64)
        np.add.at(self.counts, (splits, labels), 1)
        if not self._files:
            self._in_memory.append(rows)
            return
        numbers = (chunk.content[:, 0] >> np.uint64(64 - self._count.bit_length() + 1)).astype(np.int64)
        order = np.argsort(numbers, kind="stable")
        for number, part in zip(*_runs(numbers[order], rows[order]), strict=True):
            part.tofile(self._files[number])

    def sorted(self) -> Iterator[_Array]:
        """All rows by hash, then by label, the same whatever order they came in."""
        for number in range(self._count):
            if self._files:
                self._files[number].flush()
                self._files[number].seek(0)
                rows = np.fromfile(self._files[number], dtype=self.dtype)
            else:
                rows = np.concatenate(self._in_memory, dtype=self.dtype)  # or it has this machine's order of bytes
                self._in_memory = []
            label = np.ascontiguousarray(rows["label"]).view(f">u{self.dtype['label'].itemsize}")
            yield rows[np.lexsort((label, rows["low"], rows["high"]))]


def _runs(numbers: npt.NDArray[np.int64], rows: _Array) -> tuple[list[int], list[_Array]]:
    """The distinct numbers of a sorted array, and the rows of each."""
    begins = np.flatnonzero(np.diff(numbers, prepend=-1))
    return numbers[begins].tolist(), np.split(rows, begins[1:])


def _write(buckets: _Buckets, rows: Rows, data: DataConfig, folder: Path) -> tuple[str, Copies]:
    """The files of a snapshot; returns the fingerprint: 32 hexadecimal digits over the rows in any order, their labels,
    and how they are split; and which rows are copies."""
    folder.mkdir()
    digest, copies = hashlib.sha256(), Copies()
    header: list[Any] = [FORMAT, rows.shape, rows.classes, data.validation_fraction, data.test_fraction]
    if rows.columns:
        # What a column is read as, whatever the order of the columns; the categories are in the rows' hashes.
        header += [names_and_roles(rows.columns), data.split_by]
    if data.test_from is not None:
        header += [data.time_column, data.test_from.isoformat()]
    digest.update(json.dumps(header).encode())
    target = np.dtype(np.int64 if rows.classes else np.float64)
    features = np.dtype("<f4" if buckets.is_narrow else "<f8")
    totals = buckets.counts.sum(axis=1).tolist()
    with ExitStack() as stack:

        def begin(name: str, dtype: Any, shape: tuple[int, ...]) -> BinaryIO:
            file = stack.enter_context((folder / name).open("wb"))
            description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, description)
            return file

        files = {
            split: (
                begin(f"{split}.features.npy", features, (total, *rows.shape)),
                begin(f"{split}.target.npy", target, (total,)),
            )
            for split, total in zip(SPLITS, totals, strict=True)
        }
        position = begin(POSITION, buckets.dtype["position"], (totals[SPLITS.index("test")],))
        for bucket in buckets.sorted():
            copies.add(bucket["high"], bucket["low"], bucket["position"])
            digest.update(bucket[["high", "low", "label"]].astype(_packed(bucket.dtype)).tobytes())
            for place, split in enumerate(SPLITS):
                part = bucket[bucket["split"] == place]
                np.ascontiguousarray(part["features"], dtype=features).tofile(files[split][0])
                part["label"].astype(target).tofile(files[split][1])
                if split == "test":
                    part["position"].tofile(position)
    return digest.hexdigest()[:32], copies


def _packed(dtype: "np.dtype[Any]") -> "np.dtype[Any]":
    """The fields that the fingerprint is of, one beside the other."""
    return np.dtype([(name, dtype[name]) for name in ("high", "low", "label")])


def _changes(rows: Rows, last: Snapshot | None, data: DataConfig) -> list[Finding]:
    """What is other than in the last snapshot, in a way that breaks a model of it: a column that is gone or read
    otherwise, and rows that are gone."""
    if last is None:
        return []
    roles = {described.name: described.role for described in rows.described}
    known = {described.name: described.role for described in last.described} if roles else {}
    changed = [
        f"{name} was {role} and is {roles.get(name, 'gone')}" for name, role in known.items() if roles.get(name) != role
    ]
    findings = []
    if changed:
        findings += finding(
            "changed_column", data,
            f"each column must be what it was in the last snapshot, found that {', '.join(changed[:EXAMPLES])}; mend "
            "the source, say what it is in data.roles, or set data.checks.changed_column: warn for a night",
        )  # fmt: skip
    lost = 1 - rows.count / last.rows
    if lost > data.max_rows_lost:
        findings += finding(
            "rows_lost", data,
            f"the source must keep its rows, found {rows.count} where the last snapshot has {last.rows}, {lost:.0%} "
            f"less, above data.max_rows_lost {data.max_rows_lost:g}; mend the source, or set data.checks.rows_lost: "
            "warn for a night",
        )  # fmt: skip
    return findings
