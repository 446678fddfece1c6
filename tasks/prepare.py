"""prepare: rows become a snapshot, an immutable folder named by the fingerprint of what is in it.

A row's split is decided by a hash of its content, or of what the job names, so it never changes as data grows and exact
duplicates never straddle splits. Knows nothing of models.
"""

import hashlib
import json
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from models.shapes import DataShape, Problem
from models.table import Column
from tasks.columns import Described, Finding
from tasks.job import DataConfig
from tasks.rows import DataError, Rows
from tasks.sources import read_rows

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
ROWS = "rows.safetensors"
POSITION = "test.position"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An immutable prepared dataset on disk, named by its fingerprint. `columns` are a table's features, none where the
    rows are arrays; `described` and `findings` say what is in them, and `class_rows` how many rows a class has."""

    fingerprint: str
    source: str
    path: Path
    shape: DataShape
    classes: tuple[str, ...]
    row_counts: dict[SplitName, int]
    class_rows: dict[str, int]
    columns: tuple[Column, ...] = ()
    described: tuple[Described, ...] = ()
    findings: tuple[Finding, ...] = ()

    def load(self, device: torch.device) -> dict[SplitName, tuple[Tensor, Tensor]]:
        """Raw features float32 and target (int64 classes, or float32 values) of each split, on the device."""
        tensors = load_file(self.path / ROWS, device=str(device))
        return {split: (tensors[f"{split}.features"], tensors[f"{split}.target"]) for split in SPLITS}

    def example(self, rows: int) -> Tensor:
        """The first training rows, raw, as an example of what a model reads."""
        return self.load(torch.device("cpu"))["train"][0][:rows]

    def test_rows_outside(self, test_fraction: float | None) -> Tensor:
        """Of each test row, whether it was a test row too when their fraction was another; all where it is unknown."""
        tensors = load_file(self.path / ROWS)
        features = tensors["test.features"]
        if test_fraction is None:
            return torch.ones(len(features), dtype=torch.bool)
        if POSITION in tensors:
            return tensors[POSITION] < test_fraction
        return torch.tensor([position_of(row_hash) < test_fraction for row_hash in hash_rows(features.numpy())])


def prepare(data: DataConfig, problem: Problem, snapshots: Path) -> Snapshot:
    """Read the source, split it, and write its snapshot unless one with this fingerprint is there already.

    Raises DataError where a split is empty or a class has no training row.
    """
    rows = read_rows(data, problem)
    row_hashes = hash_rows(rows.features) if rows.content is None else _hash_bytes(rows.content)
    positions = [
        position_of(row_hash) for row_hash in (row_hashes if rows.identity is None else _hash_bytes(rows.identity))
    ]
    parts = _split(rows, row_hashes, positions, data)
    fingerprint = _fingerprint(rows, row_hashes, data)
    snapshot = Snapshot(
        fingerprint=fingerprint,
        source=data.source,
        path=snapshots / fingerprint,
        shape=DataShape(features=rows.features.shape[1:], outputs=max(1, len(rows.classes)), problem=problem),
        classes=rows.classes,
        row_counts={split: len(parts[split]) for split in SPLITS},
        class_rows={name: int(count) for name, count in zip(rows.classes, np.bincount(rows.target), strict=False)}
        if rows.classes
        else {},
        columns=rows.columns,
        described=rows.described,
        findings=rows.findings,
    )
    for found in rows.findings:
        _logger.warning("%s: %s", data.source, found.sentence)
    if not snapshot.path.is_dir():
        _write(snapshot, rows, parts, np.array(positions))
    _logger.info("%d rows of %s: %s, snapshot %s", len(rows.target), data.source, snapshot.row_counts, fingerprint)
    return snapshot


def read_snapshot(snapshots: Path, fingerprint: str) -> Snapshot | None:
    """An earlier night's snapshot; None where it was deleted."""
    path = snapshots / fingerprint
    try:
        content = json.loads((path / "snapshot.json").read_text())
    except FileNotFoundError:
        return None
    classes = tuple(content["classes"])
    return Snapshot(
        fingerprint=fingerprint,
        source=content["source"],
        path=path,
        shape=DataShape(
            features=tuple(content["features"]),
            outputs=max(1, len(classes)),
            problem=content.get("problem", "classification"),
        ),
        classes=classes,
        row_counts=content["row_counts"],
        class_rows=content.get("class_rows", {}),
        columns=tuple(
            Column(**(column | {name: tuple(column[name]) for name in ("categories", "missing")}))
            for column in content.get("columns", [])
        ),
        described=tuple(Described(**described) for described in content.get("described", [])),
        findings=tuple(Finding(**found) for found in content.get("findings", [])),
    )


def names_and_roles(columns: tuple[Column, ...]) -> list[tuple[str, str]]:
    """What two tables must have in common for a model of one to read the other's rows."""
    return [(column.name, column.role) for column in columns]


def hash_rows(features: npt.NDArray[np.float32]) -> list[bytes]:
    """A row's identity: 16 bytes of BLAKE2b over its values as little-endian float32 (-0 counts as 0)."""
    canonical = np.ascontiguousarray(features + np.float32(0), dtype="<f4").reshape(len(features), -1)
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in canonical]


def _hash_bytes(values: list[bytes]) -> list[bytes]:
    return [hashlib.blake2b(value, digest_size=16).digest() for value in values]


def position_of(row_hash: bytes) -> float:
    """The hash read as a number in [0, 1)."""
    return int.from_bytes(row_hash[:8], "big") / 2**64


def split_of(position: float, data: DataConfig) -> SplitName:
    """The split of a row: its position against the fractions. Test rows come first, so a
    changed validation fraction moves no row into or out of the test split."""
    if position < data.test_fraction:
        return "test"
    return "validation" if position < data.test_fraction + data.validation_fraction else "train"


def _split(
    rows: Rows, row_hashes: list[bytes], positions: list[float], data: DataConfig
) -> dict[SplitName, npt.NDArray[np.int64]]:
    """Row numbers of each split, in the order of their hashes, which is the same whatever the source's order."""
    numbers: dict[SplitName, list[int]] = {split: [] for split in SPLITS}
    for number in sorted(range(len(row_hashes)), key=lambda row: (row_hashes[row], rows.target[row])):
        numbers[split_of(positions[number], data)].append(number)
    parts = {split: np.array(numbers[split], dtype=np.int64) for split in SPLITS}
    for split, part in parts.items():
        if len(part) == 0:
            raise DataError(
                f"{data.source}: the {split} split must not be empty; give more rows than {len(rows.target)}"
            )
    missing = set(range(len(rows.classes))) - set(rows.target[parts["train"]].tolist())
    if missing:
        names = ", ".join(rows.classes[index] for index in sorted(missing)[:5])
        raise DataError(
            f"{data.source}: every class needs a training row, found none of {len(missing)} of {len(rows.classes)} "
            f"classes ({names}); give more rows, or choose search.objective rmse, mae or r2 if the target is a number"
        )
    return parts


def _fingerprint(rows: Rows, row_hashes: list[bytes], data: DataConfig) -> str:
    """32 hexadecimal digits over the rows in any order, their labels, and how they are split."""
    digest = hashlib.sha256()
    header = [rows.features.shape[1:], rows.classes, data.validation_fraction, data.test_fraction]
    if rows.columns:
        # What a column is read as, whatever the order of the columns; the categories are in the rows' hashes.
        header += [sorted(names_and_roles(rows.columns)), data.split_by]
    digest.update(json.dumps(header).encode())
    for row in sorted(row_hash + label for row_hash, label in zip(row_hashes, _target_bytes(rows.target), strict=True)):
        digest.update(row)
    return digest.hexdigest()[:32]


def _target_bytes(target: npt.NDArray[np.int64 | np.float32]) -> list[bytes]:
    if target.dtype == np.int64:
        return [int(label).to_bytes(8, "big") for label in target]
    return [value.tobytes() for value in (target + np.float32(0)).astype(">f4")]


def _write(
    snapshot: Snapshot, rows: Rows, parts: dict[SplitName, npt.NDArray[np.int64]], positions: npt.NDArray[np.float64]
) -> None:
    """Into a folder of its own, renamed when it is complete: who finds the name finds a whole snapshot."""
    snapshot.path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, npt.NDArray[np.generic]] = {}
    for split, part in parts.items():
        tensors[f"{split}.features"] = rows.features[part]
        tensors[f"{split}.target"] = rows.target[part]
    tensors[POSITION] = positions[parts["test"]]
    with tempfile.TemporaryDirectory(dir=snapshot.path.parent, prefix=".partial-", ignore_cleanup_errors=True) as name:
        partial = Path(name) / "snapshot"
        partial.mkdir()
        save_file(tensors, partial / ROWS)
        (partial / "snapshot.json").write_text(
            json.dumps(
                {
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
                },
                indent=2,
            )
        )
        try:
            partial.rename(snapshot.path)
        except OSError:
            if not snapshot.path.is_dir():  # else another night wrote the same snapshot first, which is as good
                raise
