"""Named tensors as safetensors keeps them: what several names share is kept once, and each name finds it again.

Weights may be tied: one parameter under two names, a module that is used twice, a view of another parameter. Knows
nothing of what the tensors are for.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save_file
from torch import Tensor

_SHARED = "shared"


class NotKept(ValueError):
    """A value cannot be kept as a tensor in a file; the message names it."""


def kept_once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors on the CPU, of which no two share memory; and for each name that was left out, the name that its
    tensor is kept under, which is the first. A view that covers only part of another gets memory of its own.

    Raises NotKept where a value is no dense tensor.
    """
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[object, str] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            found = f"a tensor of layout {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise NotKept(
                f"{name} of its state_dict must be a dense tensor, found {found}; keep a sparse tensor as its dense "
                "parts, and let get_extra_state return a tensor"
            )
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(identity, name) != name:
            shared[name] = first[identity]
            continue
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() != own.nbytes:
            own = own.clone(memory_format=torch.contiguous_format)
        taken.add(own.untyped_storage().data_ptr())
        kept[name] = own
    return kept, shared


def under_every_name(tensors: dict[str, Tensor], shared: Mapping[str, str]) -> dict[str, Tensor]:
    """The inverse of `kept_once`. Raises KeyError where a tensor is missing."""
    return tensors | {name: tensors[kept] for name, kept in shared.items()}


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file; the same tensors give the same bytes."""
    kept, shared = kept_once(tensors)
    save_file(kept, path, metadata={_SHARED: json.dumps(shared)} if shared else None)


def read_tensors(content: bytes) -> dict[str, Tensor]:
    """The tensors of such a file's content. Raises SafetensorError where it is none, KeyError where one is missing."""
    return under_every_name(load(content), json.loads(metadata_of(content).get(_SHARED, "{}")))


def metadata_of(content: bytes) -> dict[str, str]:
    """What a safetensors file says beside its tensors."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata: dict[str, str] = header.get("__metadata__", {})
    return metadata
