"""A split of the data and its seeded batches: on the device where it fits, else read from the disk shard by shard."""

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SHARD_BYTES = 16 * 2**20
PIECE_BYTES = 4 * 2**20


def _unchanged(features: Tensor) -> Tensor:
    return features


@dataclass(frozen=True, kw_only=True)
class DiskRows:
    """Features (rows, ...) in a .npy file, of which a slice is read as if it were a tensor's: onto the device, and
    through `transform`, a few megabytes at a time."""

    path: Path
    device: torch.device
    transform: Callable[[Tensor], Tensor] = _unchanged

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """What the file holds, before `transform`."""
        return self._file().shape

    @property
    def raw_bytes(self) -> int:
        return self._file().nbytes

    def __len__(self) -> int:
        return self.raw_shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        # Mapped anew for each slice, so that what was read leaves the process's memory with it.
        raw = self._file()[rows]
        step = max(1, PIECE_BYTES * len(raw) // max(1, raw.nbytes))
        read: Tensor | None = None
        for begin in range(0, max(1, len(raw)), step):
            piece = self.transform(torch.from_numpy(np.array(raw[begin : begin + step])).to(self.device))
            if len(piece) == len(raw):
                return piece
            if read is None:
                read = piece.new_empty(len(raw), *piece.shape[1:])
            read[begin : begin + step] = piece
        assert read is not None
        return read

    def _file(self) -> "np.memmap[tuple[int, ...], np.dtype[np.float32 | np.float64]]":
        mapped: np.memmap[tuple[int, ...], np.dtype[np.float32 | np.float64]]
        mapped = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return mapped


@dataclass(frozen=True, kw_only=True)
class Split:
    """Features (rows, ...) float32, all on the device or read as they are needed, and their target (rows,) on the
    device: int64 classes, or values in float64."""

    features: Tensor | DiskRows
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    @property
    def is_streamed(self) -> bool:
        return isinstance(self.features, DiskRows)

    @property
    def all_features(self) -> Tensor:
        """Of a split that is on the device."""
        assert isinstance(self.features, Tensor)
        return self.features

    def first(self, rows: int) -> "Split":
        """The first rows, or all where there are no more; a snapshot's rows lie in an order that says nothing."""
        return Split(features=self.features[:rows], target=self.target[:rows])

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Every row once, in an order drawn from a generator on the CPU, so that each device sees the same order.
        The last batch may have another size (`batch_sizes`); where the rows are streamed, it need not come last.

        Streamed, the order is that of the shards, and within a shard that of its rows: the file's own order is that of
        hashes, so that a shard is a sample of all rows.
        """
        if isinstance(self.features, DiskRows):
            yield from self._streamed(self.features, batch_size, generator)
            return
        order = torch.randperm(len(self), generator=generator).to(self.target.device)
        for rows in in_batches(order, batch_size):
            yield self.features[rows], self.target[rows]

    def _streamed(
        self, features: DiskRows, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The next shard is read while one is trained on."""
        batches = max(1, SHARD_BYTES // (batch_size * features.raw_bytes // max(1, len(self)) + 1))
        size = batches * batch_size
        ends = itertools.accumulate(batch_sizes(len(self), size), initial=0)
        shards = [slice(begin, end) for begin, end in itertools.pairwise(ends)]
        order = torch.randperm(len(shards), generator=generator).tolist()
        with ThreadPoolExecutor(1, thread_name_prefix="shards") as reader:
            coming = reader.submit(features.__getitem__, shards[order[0]])
            for place, shard in enumerate(order):
                rows, target = coming.result(), self.target[shards[shard]]
                if place + 1 < len(order):
                    coming = reader.submit(features.__getitem__, shards[order[place + 1]])
                within = torch.randperm(len(target), generator=generator).to(target.device)
                for some in in_batches(within, batch_size):
                    yield rows[some], target[some]


def step_count(rows: int, batch_size: int) -> int:
    """Count the batches of an epoch."""
    return len(batch_sizes(rows, batch_size))


def batch_sizes(rows: int, batch_size: int) -> list[int]:
    """Return how many rows each batch of an epoch has: a single row that is left over joins the batch before it.

    One row has no variance, which batch normalisation needs, and to drop it would leave one out of every epoch. The
    rule is the same for every model, so that a layer more or less changes nothing else of a training.
    """
    steps = max(1, math.ceil((rows - (batch_size > 1)) / batch_size))
    return [batch_size] * (steps - 1) + [rows - batch_size * (steps - 1)]


def in_batches(rows: Tensor, batch_size: int, dim: int = 0) -> tuple[Tensor, ...]:
    """Split rows that lie along a dimension into views of these sizes."""
    return torch.split(rows, batch_sizes(rows.shape[dim], batch_size), dim=dim)
