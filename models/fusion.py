"""Whether trainings can be one computation, and how many of them the device gains from.

A model is asked by trying: what several give as one must be what each gives alone. Knows nothing of how a group is
trained.
"""

import copy
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from models.checkpoints import Checkpoint
from models.fused import in_a_line, tensors_of
from models.solo import Setting, Training, forked_random_state
from models.stacked_layers import stacked_chain

MEMORY_SHARE = 0.5
# Operations of one training's forward step above which arithmetic, not launching, is what a step costs. Measured on one
# core: 16 MLPs as one against one by one 8e4 operations 4.4 times as fast, 1e6 2.5, 1e7 1.4, 7e7 0.9; 8 CNNs, whose
# vmapped convolutions are grouped ones, 5e5 2.0, 3e6 1.2, 9e6 0.8, 4e7 0.5. On an H200, 25 as one: MLPs 3e5 35, 4e7 10,
# 1e9 1.8, 4e9 1.7; CNNs 1e7 18, 4e7 16, 5e8 4.4, 1.5e10 1.3.
WORTHWHILE_OPERATIONS = {"cpu": 5e7, "cuda": 1e10}
WORTHWHILE_WITH_CONVOLUTIONS = {"cpu": 5e6, "cuda": 1e10}


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How many trainings like this one fit on the device as one computation; 1, and why, where it must be alone."""

    members: int
    reason: str = ""


def fusion_signature(model: nn.Module, training: Training) -> Hashable:
    """Equal where two trainings can be one computation: modules with equal attributes, tensors of equal shapes,
    batches of one size, and as many epochs behind them. Buffers and weights may differ, an attribute may not."""
    modules = tuple((name, type(module), _attributes(module)) for name, module in model.named_modules())
    tensors = tuple(
        (name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors_of(model).items()
    )
    trained = 0
    if (resumable := training.resumable) is not None:
        checkpoint = Checkpoint.read(resumable.path, resumable.key)
        trained = len(checkpoint.curve) if checkpoint else 0
    return modules, tensors, training.hyperparameters.batch_size, trained


def fusion_of(setting: Setting, model: nn.Module, training: Training) -> Fusion:
    """Whether and how far a training can be fused, by trying: a vmapped pass over two rows must give what the model
    gives alone; the operations and the memory of a whole batch are counted."""
    if setting.training.is_streamed or setting.validation.is_streamed:
        return Fusion(members=1, reason="their rows do not fit into memory and are streamed, each in its own order")
    first = setting.training.first(training.hyperparameters.batch_size)
    model = copy.deepcopy(model).to(setting.device).train()
    if (obstacle := _obstacle(model, first.all_features[:2])) is not None:
        return Fusion(members=1, reason=obstacle)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    operations = 0

    def count(module: nn.Module, _: Any, outputs: Any) -> None:
        nonlocal operations
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1 and isinstance(outputs, Tensor):
            operations += 2 * outputs.numel() * weight[0].numel()

    for module in model.modules():
        module.register_forward_hook(count)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(first.all_features)
    except Exception as error:  # noqa: BLE001 a user's forward may raise anything
        return Fusion(members=1, reason=in_a_line(error))
    convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
    has_convolutions = any(isinstance(module, convolutions) for module in model.modules())
    limits = WORTHWHILE_WITH_CONVOLUTIONS if has_convolutions else WORTHWHILE_OPERATIONS
    worthwhile = limits[setting.device.type]
    if operations > worthwhile:
        reason = (
            f"a step of one takes {operations:.1e} operations forward, and above {worthwhile:.0e} it keeps the device "
            "busy on its own"
        )
        return Fusion(members=1, reason=reason)
    # Weights, gradients twice (as they come and stacked) and two moments, and what the backward pass needs.
    weights = sum(tensor.nbytes for tensor in tensors_of(model).values())
    each = 5 * weights + sum(kept.values()) + first.all_features.nbytes
    members = max(1, int(MEMORY_SHARE * _free_bytes(setting.device) / each))
    return Fusion(members=members, reason="two of them do not fit into the free memory" if members == 1 else "")


def gains_alone(device: torch.device, model: nn.Module) -> bool:
    """Whether a training takes less time as a group of one than alone: on a GPU its step is replayed as a graph, on a
    CPU a chain of layers is led by hand."""
    return device.type == "cuda" or stacked_chain(model) is not None


def _obstacle(model: nn.Module, features: Tensor) -> str | None:
    """Why two of a model cannot be one computation; None where they can."""
    if not model.state_dict().keys() <= tensors_of(model).keys():
        return "its modules share tensors, or keep a state that is not a tensor"
    tensors = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
    stacked = {name: torch.stack([tensor, tensor]) for name, tensor in tensors.items()}

    def call(stacked: dict[str, Tensor], rows: Tensor) -> Any:
        return functional_call(model, stacked, (rows,))

    try:
        with forked_random_state(features.device):
            outputs = vmap(call, randomness="error")(stacked, torch.stack([features, features]))
            expected = model(features)
    except Exception as error:  # noqa: BLE001 a user's forward, and vmap itself, may raise anything
        return in_a_line(error)
    if outputs.shape != (2, *expected.shape) or not torch.allclose(outputs, expected.expand_as(outputs), 1e-3, 1e-4):
        return "several as one do not give what each gives alone"
    return None


_INTERNAL = frozenset(vars(nn.Module()))


def _attributes(module: nn.Module) -> Hashable:
    own = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
    return _hashable(own)


def _hashable(value: Any) -> Hashable:
    """The value itself, or where it is a container its items; otherwise an object that is equal to nothing else."""
    if isinstance(value, Mapping):
        return tuple((key, _hashable(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, Hashable):
        return value
    return object()


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available
