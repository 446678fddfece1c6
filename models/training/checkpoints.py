"""A training's state after an epoch, on disk: enough to go on as if it had never stopped.

One safetensors file, never a pickle: weights, the optimizer's state, the random generators' states, and the curve so
far, with a checksum. It is replaced whole, so a kill leaves the one before, which is kept besides, should a bit of the
newer one flip. Knows nothing of how a training goes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn, optim

from models.training.weights import kept_once, under_every_name


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a training is resumed from. `key` names the training it belongs to; `best` are the weights that early
    stopping would put back, empty without it."""

    key: str
    curve: list[Any]
    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    generators: dict[str, Tensor]

    def write(self, path: Path) -> None:
        """Into a file beside it, flushed to the disk, then renamed over the one before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        groups = {
            "weights": self.weights,
            "best": self.best,
            "optimizer": self.optimizer,
            "generators": self.generators,
        }
        tensors, shared = kept_once(
            {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
        )
        curve = json.dumps(self.curve)
        digest = _digest(under_every_name(tensors, shared), curve)
        metadata = {"key": self.key, "curve": curve, "shared": json.dumps(shared), "sha256": digest}
        content = save(tensors, metadata=metadata)
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:  # of a full disk, which what was written so far would help to fill
            partial.unlink(missing_ok=True)
            raise
        if path.exists():
            path.replace(_previous(path))
        partial.replace(path)

    @classmethod
    def read(cls, path: Path, key: str) -> "Checkpoint | None":
        """The newest that is whole; None where there is none, or it belongs to another training: training begins
        anew."""
        return cls._read(path, key) or cls._read(_previous(path), key)

    @staticmethod
    def delete(path: Path) -> None:
        """Both, if they are there."""
        path.unlink(missing_ok=True)
        _previous(path).unlink(missing_ok=True)

    @classmethod
    def _read(cls, path: Path, key: str) -> "Checkpoint | None":
        groups: dict[str, dict[str, Tensor]] = {"weights": {}, "best": {}, "optimizer": {}, "generators": {}}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                if metadata.get("key") != key:
                    return None
                kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a mapping
                tensors = under_every_name(kept, json.loads(metadata["shared"]))
                if metadata["sha256"] != _digest(tensors, metadata["curve"]):
                    return None
                for name, tensor in tensors.items():
                    group, _, rest = name.partition("/")
                    groups[group][rest] = tensor
                return cls(key=key, curve=json.loads(metadata["curve"]), **groups)
        except (FileNotFoundError, SafetensorError, KeyError, ValueError):
            return None


def _previous(path: Path) -> Path:
    return path.with_suffix(".previous")


def _digest(tensors: Mapping[str, Tensor], curve: str) -> str:
    digest = hashlib.sha256(curve.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def optimizer_tensors(optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state by `parameter number.name`; torch keeps everything in it as tensors."""
    state: Mapping[int, Mapping[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value
        for number, values in state.items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer(optimizer: optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, into an optimizer that was built in the same way."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    # In the order that the parameter has in memory: fused kernels take both as they lie there.
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def random_states(order: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """The generators that a training draws from: its own order of rows, and torch's for the device."""
    states = {"order": order.get_state(), "cpu": torch.random.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Tensor], order: torch.Generator, device: torch.device) -> None:
    order.set_state(states["order"])
    torch.random.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers as they are now, in memory of their own."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
