"""A split of the data on the device, and its seeded batches. The rows never leave the device: no DataLoader."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Split:
    """Features (rows, ...) float32 and target (rows,), on one device: int64 classes, or values in float32."""

    features: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def first(self, rows: int) -> "Split":
        """The first rows, or all where there are no more; a snapshot's rows lie in an order that says nothing."""
        return Split(features=self.features[:rows], target=self.target[:rows])

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Every row once, in an order drawn from a generator on the CPU, so that each device sees the same order.
        The last batch may be smaller."""
        order = torch.randperm(len(self), generator=generator).to(self.target.device)
        for rows in torch.split(order, batch_size):
            yield self.features[rows], self.target[rows]
