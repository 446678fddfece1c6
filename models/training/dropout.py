"""Dropout whose masks are a pure function of the training's seed, the layer and the step.

So a training sees the same masks on its own and among others, on a CPU and on a GPU, at once and resumed, and no
generator's state needs to be kept. PyTorch's own draw from one generator for whatever runs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

_INT16 = 2**15
# Tensors, because a number is made one, of 64 bits, at each use.
_FIRST, _SHIFT, _SECOND = (torch.tensor(number, dtype=torch.int32) for number in (0x2C1B3C6D, 12, 0x297A2D39))


class SeededDropout(nn.Module):
    """Zeroes each value with a probability of `rate` while training and scales the rest by 1 / (1 - rate).

    What distinguishes one training from another lies in buffers of shape (), so that several can be stacked:
    `threshold` and `scale` of the rate, and the step's `key`. The fate of two values that lie side by side is the lower
    and the upper half of a 32-bit hash of their place and the key: two rounds of multiply and xor-shift (Wellons,
    Prospecting for Hash Functions, nullprogram.com 2018).
    """

    threshold: Tensor
    scale: Tensor
    key: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        threshold = min(round(rate * 2 * _INT16) - _INT16, _INT16 - 1)
        scale = 1 / (1 - rate) if rate < 1 else 0.0
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.int16), persistent=False)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.register_buffer("key", torch.zeros((), dtype=torch.int32), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            return features
        kept = _hashes(self.key, features.numel()) >= self.threshold  # in place, as below, vmap would be slow
        return features * (kept * self.scale).view(features.shape)


def dropout_mask(key: Tensor, threshold: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
    """What several SeededDropouts multiply features (several, *shape) by: 0, or the scale. From their buffers: key
    (several,), threshold and scale (several, 1)."""
    # Not torch.where, which takes a CPU five times as long where the scale is broadcast, nor a comparison that gives
    # booleans, which takes it twice as long to multiply with.
    return (_hashes(key, shape.numel()).ge_(threshold) * scale).view(len(key), *shape)


def _hashes(key: Tensor, values: int) -> Tensor:
    """int16 (..., values) of keys (...)."""
    hashed = _positions((values + 1) // 2, key.device) ^ key.unsqueeze(-1)
    hashed *= _FIRST
    hashed ^= hashed >> _SHIFT
    hashed *= _SECOND
    return hashed.view(torch.int16)[..., :values]


def seed_dropout(model: nn.Module) -> list[SeededDropout]:
    """Put a SeededDropout in the place of every nn.Dropout; returns them in the order of the model's modules."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, SeededDropout(child.p).train(child.training))
    return [module for module in model.modules() if isinstance(module, SeededDropout)]


def dropout_keys(seeds: Sequence[int], layers: int, first_step: int, steps: int) -> Tensor:
    """Keys (steps, layers, seeds) int32 of each training's steps from `first_step` on.

    SplitMix64's finaliser (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
    """
    step, layer, seed = np.ogrid[first_step : first_step + steps, :layers, : len(seeds)]
    state = np.asarray(seeds, dtype=np.uint64)[seed] * np.uint64(0x9E3779B97F4A7C15)
    state = state + step.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    state = state + layer.astype(np.uint64) * np.uint64(0x8CB92BA72F3D8DD7)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state = state ^ (state >> np.uint64(31))
    return torch.from_numpy((state & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32))


_POSITIONS: dict[torch.device, Tensor] = {}


def _positions(count: int, device: torch.device) -> Tensor:
    """Hashed numbers from 0, int32, kept between calls: they are the same in every mask."""
    known = _POSITIONS.get(device)
    if known is None or len(known) < count:
        numbers = torch.arange(count, dtype=torch.int32, device=device) * -0x61C88647
        known = (numbers ^ (numbers >> 16)) * 0x7FEB352D
        known = _POSITIONS[device] = known ^ (known >> 15)
    return known[:count]
