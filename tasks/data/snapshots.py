"""A snapshot: rows as they were prepared, an immutable folder named by the fingerprint of what is in it.

It is kept where it was made and in the artifact store (snapshots/<fingerprint>/<file>), from which any machine can
fetch it; snapshot.json, with every file's SHA-256, is written last. Knows nothing of sources.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from infra.store.protocol import AlreadyExists, NotFound, Store, StoreError, UploadProgress
from models.rows.batches import DiskRows
from models.rows.column import Column
from models.rows.shapes import DataShape
from tasks.data.findings import Described, Finding

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
DESCRIPTION = "snapshot.json"
FORMAT = 3
POSITION = "test.position.npy"
FILES = (*(f"{split}.{part}.npy" for split in SPLITS for part in ("features", "target")), POSITION)
KEPT = timedelta(days=30)
COMPARED_VALUES = 2**20


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An immutable prepared dataset on disk, named by its fingerprint.

    `class_rows` say how many rows of a split are of each class. `columns` are a table's features, none where the rows
    are arrays; `described` and `findings` say what is in them. `checksums` are the SHA-256 of its files.
    """

    fingerprint: str
    source: str
    path: Path
    shape: DataShape
    classes: tuple[str, ...]
    row_counts: dict[SplitName, int]
    class_rows: dict[SplitName, tuple[int, ...]] = field(default_factory=dict)
    columns: tuple[Column, ...] = ()
    described: tuple[Described, ...] = ()
    findings: tuple[Finding, ...] = ()
    checksums: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> int:
        return sum(self.row_counts.values())

    def features(self, split: SplitName, device: torch.device) -> DiskRows:
        """A split's raw features, read from the disk as they are needed: float32 where that holds every value of the
        snapshot as the source has it, else float64."""
        return DiskRows(path=self.path / f"{split}.features.npy", device=device)

    def target(self, split: SplitName, device: torch.device) -> Tensor:
        """A split's target, int64 classes or float64 values, on the device."""
        return torch.from_numpy(np.load(self.path / f"{split}.target.npy")).to(device)

    def load(self, device: torch.device) -> dict[SplitName, tuple[Tensor, Tensor]]:
        """All raw features and targets of each split, on the device."""
        return {split: (self.features(split, device)[:], self.target(split, device)) for split in SPLITS}

    def first(self, split: SplitName, rows: int) -> npt.NDArray[np.float32 | np.float64]:
        """The first raw rows of a split; they lie in an order that says nothing."""
        found: npt.NDArray[np.float32 | np.float64] = self.features(split, torch.device("cpu"))[:rows].numpy()
        return found

    def test_positions(self) -> Tensor:
        """Where each test row lies in what decides the split: the hash as a number in [0, 1), or with a time column its
        microseconds since 2000-01-01 UTC."""
        return torch.from_numpy(np.load(self.path / POSITION))

    def test_groups(self) -> Tensor:
        """A number for the group of each test row, int64: the rows that came into the split as one. Without a time
        column these are the rows of one hash, so copies, or the rows of one value of `data.split_by`; with one they are
        copies at the same moment."""
        where = self.test_positions().numpy()
        if any(described.role == "time" for described in self.described):
            where = np.stack([_runs(np.load(self.path / "test.features.npy", mmap_mode="r")), where], axis=1)
        return torch.from_numpy(np.unique(where, axis=0, return_inverse=True)[1].reshape(-1))


def _runs(features: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """For rows (rows, ...) of which equal ones lie together how many other ones are before each; gaps are equal."""
    step = max(1, COMPARED_VALUES // max(1, math.prod(features.shape[1:])))
    begins = np.zeros(len(features), dtype=np.int64)
    for begin in range(1, len(features), step):
        rows = np.asarray(features[begin - 1 : begin + step]).reshape(-1, math.prod(features.shape[1:]))
        differs = (rows[1:] != rows[:-1]) & ~(np.isnan(rows[1:]) & np.isnan(rows[:-1]))
        begins[begin : begin + step] = differs.any(axis=1)
    return np.cumsum(begins)


def read_snapshot(snapshots: Path, fingerprint: str) -> Snapshot | None:
    """An earlier night's snapshot; None where it is not here, or of a format that nobody reads any more."""
    path = snapshots / fingerprint
    try:
        content = json.loads((path / DESCRIPTION).read_text())
    except FileNotFoundError:
        return None
    if content.pop("format", 1) != FORMAT:
        return None
    classes = tuple(content["classes"])
    shape = DataShape(features=tuple(content["features"]), outputs=max(1, len(classes)), problem=content["problem"])
    return Snapshot(
        fingerprint=fingerprint,
        source=content["source"],
        path=path,
        shape=shape,
        classes=classes,
        row_counts=content["row_counts"],
        class_rows={split: tuple(rows) for split, rows in content["class_rows"].items()},
        columns=tuple(
            Column(**(column | {name: tuple(column[name]) for name in ("categories", "missing")}))
            for column in content["columns"]
        ),
        described=tuple(Described(**described) for described in content["described"]),
        findings=tuple(Finding(**found) for found in content["findings"]),
        checksums=content["checksums"],
    )


def write_description(snapshot: Snapshot, folder: Path) -> None:
    """What makes a folder of files a snapshot."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": snapshot.fingerprint,
        "source": snapshot.source,
        "features": snapshot.shape.features,
        "problem": snapshot.shape.problem,
        "classes": snapshot.classes,
        "row_counts": snapshot.row_counts,
        "class_rows": snapshot.class_rows,
        "columns": [asdict(column) for column in snapshot.columns],
        "described": [asdict(described) for described in snapshot.described],
        "findings": [asdict(found) for found in snapshot.findings],
        "checksums": snapshot.checksums,
    }
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=2))


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def move_into_place(folder: Path, path: Path) -> None:
    """Give a complete folder its name; another night may have made the same one first, which is as good."""
    try:
        folder.rename(path)
    except OSError:
        if not path.is_dir():
            raise


def publish_snapshot(store: Store, snapshot: Snapshot) -> None:
    """Copy a snapshot into the store, unless it is there. Raises StoreError."""
    description = _key(snapshot.fingerprint, DESCRIPTION)
    if description in store.created(description):
        return
    progress = UploadProgress(
        f"snapshot {snapshot.fingerprint}", sum((snapshot.path / name).stat().st_size for name in FILES)
    )
    for name in FILES:
        store.upload(_key(snapshot.fingerprint, name), snapshot.path / name, progress)
    try:
        store.create(description, (snapshot.path / DESCRIPTION).read_bytes())
    except AlreadyExists:
        return  # the same rows from another source: another machine was first


def fetch_snapshot(store: Store, snapshots: Path, fingerprint: str) -> Snapshot | None:
    """The snapshot from here, else from the store, every file compared with its checksum; None where it is in neither.

    Raises StoreError where the store does not answer, or holds other bytes than were put there.
    """
    if (found := read_snapshot(snapshots, fingerprint)) is not None:
        return found
    try:
        description = store.read(_key(fingerprint, DESCRIPTION))
    except NotFound:
        return None
    snapshots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=snapshots, prefix=".partial-", ignore_cleanup_errors=True) as name:
        partial = Path(name) / fingerprint
        partial.mkdir()
        (partial / DESCRIPTION).write_bytes(description)
        fetched = read_snapshot(Path(name), fingerprint)
        if fetched is None:
            return None
        for file in FILES:
            store.download(_key(fingerprint, file), partial / file)
            if checksum(partial / file) != fetched.checksums[file]:
                raise StoreError(
                    f"snapshot {fingerprint} in {store.url} is damaged: {file} was altered; delete it there, and the "
                    "next night writes it again"
                )
        move_into_place(partial, snapshots / fingerprint)
    return read_snapshot(snapshots, fingerprint)


def mark_as_used(snapshot: Snapshot, now: datetime) -> None:
    """Its age counts from the last night that used it."""
    os.utime(snapshot.path, (now.timestamp(), now.timestamp()))


def drop_old_snapshots(store: Store, snapshots: Path, referenced: set[str], now: datetime) -> list[str]:
    """Delete what no night of the last month used and no promoted version was made of, here and in the store; returns
    the fingerprints and keys that are gone. Raises StoreError."""
    oldest = now - KEPT
    gone = []
    for path in sorted(snapshots.iterdir()) if snapshots.is_dir() else []:
        if path.name not in referenced and path.stat().st_mtime < oldest.timestamp():
            shutil.rmtree(path)
            gone.append(path.name)
    kept = {path.name for path in snapshots.iterdir()} if snapshots.is_dir() else set()
    created = store.created("snapshots/")
    young = {key.split("/")[1] for key, at in created.items() if at >= oldest}
    # The description goes first: without it nobody takes what is left for a snapshot.
    for key in sorted(created, key=lambda key: not key.endswith(DESCRIPTION)):
        if key.split("/")[1] not in referenced | kept | young:
            store.delete(key)
            gone.append(key)
    return gone


def _key(fingerprint: str, name: str) -> str:
    return f"snapshots/{fingerprint}/{name}"
