"""Whether trainings can be one computation, and how many of them the device gains from.

A model is asked by trying: what several give as one must be what each gives alone. Knows nothing of how a group is
trained.
"""

import random
import warnings
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from models.evaluation.evaluate import predict_outputs
from models.families.own_module import in_a_line
from models.fused.group import NotFusable
from models.fused.layers import stacked_chain
from models.fused.stack import tensors_of
from models.fused.train import train_fused
from models.hyperparameters.declared import OwnHyperparameters
from models.rows.batches import Split
from models.training.checkpoints import Checkpoint
from models.training.loop import train
from models.training.optimizers import trained_parameters
from models.training.terms import Setting, Training, forked_random_state, new_model

MEMORY_SHARE = 0.5
# Operations of one training's forward step above which arithmetic, not launching, is what a step costs. Measured on one
# core: 16 MLPs as one against one by one 8e4 operations 4.4 times as fast, 1e6 2.5, 1e7 1.4, 7e7 0.9; 8 CNNs, whose
# vmapped convolutions are grouped ones, 5e5 2.0, 3e6 1.2, 9e6 0.8, 4e7 0.5. On an H200, 25 as one: MLPs 3e5 35, 4e7 10,
# 1e9 1.8, 4e9 1.7; CNNs 1e7 18, 4e7 16, 5e8 4.4, 1.5e10 1.3.
WORTHWHILE_OPERATIONS = {"cpu": 5e7, "cuda": 1e10}
WORTHWHILE_WITH_CONVOLUTIONS = {"cpu": 5e6, "cuda": 1e10}

# Three batches of two sizes, twice, with steps that are large enough to tell a wrong gradient from rounding.
TRIED_ROWS = 20
TRIED_WITH = {"epochs": 2, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.1, "gradient_clip_norm": 1.0}


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How many trainings like this one fit on the device as one computation; 1, and why, where it must be alone."""

    members: int
    reason: str = ""


def fusion_signature(model: nn.Module, training: Training) -> Hashable:
    """Equal where two trainings can be one computation: modules with equal attributes, tensors of equal shapes,
    batches of one size, and as many epochs behind them. Buffers and weights may differ, an attribute may not."""
    registered = {id(tensor) for tensor in tensors_of(model).values()}
    modules = tuple(
        (name, type(module), _comparable(_own(module), registered, _itself)) for name, module in model.named_modules()
    )
    tensors = tuple(
        (name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors_of(model).items()
    )
    trained = 0
    if (resumable := training.resumable) is not None:
        checkpoint = Checkpoint.read(resumable.path, resumable.key)
        trained = len(checkpoint.curve) if checkpoint else 0
    return modules, tensors, training.hyperparameters.batch_size, trained


def fusion_of(setting: Setting, model: nn.Module, training: Training) -> Fusion:
    """Say whether and how far a training can be fused: the operations and the memory of a whole batch are counted, and
    a user's model is tried (`_difference`). The model given is used up by it, and may not be trained afterwards."""
    if setting.training.is_streamed or setting.validation.is_streamed:
        return Fusion(members=1, reason="their rows do not fit into memory and are streamed, each in its own order")
    first = setting.training.first(training.hyperparameters.batch_size)
    model = model.to(setting.device).train()
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
        with (
            forked_random_state(setting.device),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
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
    if (obstacle := _obstacle(setting, model, training)) is not None:
        return Fusion(members=1, reason=obstacle)
    # Weights, gradients twice (as they come and stacked) and two moments, and what the backward pass needs.
    weights = sum(tensor.nbytes for tensor in tensors_of(model).values())
    each = 5 * weights + sum(kept.values()) + first.all_features.nbytes
    members = max(1, int(MEMORY_SHARE * _free_bytes(setting.device) / each))
    return Fusion(members=members, reason="two of them do not fit into the free memory" if members == 1 else "")


def gains_alone(device: torch.device, model: nn.Module) -> bool:
    """Whether a training takes less time as a group of one than alone: on a GPU its step is replayed as a graph, on a
    CPU a chain of layers has a hand-written backward pass."""
    return device.type == "cuda" or stacked_chain(model) is not None


def _obstacle(setting: Setting, model: nn.Module, training: Training) -> str | None:
    """Say why several of a model cannot be one computation; None where they can. Of ours each can."""
    if not isinstance(training.hyperparameters, OwnHyperparameters):
        return None
    if not model.state_dict().keys() <= tensors_of(model).keys():
        return "its modules share tensors, or keep a state that is not a tensor"
    if len({parameter.dtype for parameter in trained_parameters(model)}) > 1:
        return "its parameters have several types"
    built_from = training.hyperparameters.built_from
    if built_from not in setting.obstacles:
        try:
            setting.obstacles[built_from] = _difference(setting, training)
        except Exception as error:  # noqa: BLE001 a user's forward, and vmap itself, may raise anything
            setting.obstacles[built_from] = str(error) if isinstance(error, NotFusable) else in_a_line(error)
    return setting.obstacles[built_from]


def _difference(setting: Setting, training: Training) -> str | None:
    """Train two such models on a few rows, as one and alone, and say what becomes another; None where nothing does.

    A forward pass would not tell: buffers that are assigned, counters and globals show after a step, and only where
    members have other data than each other. On a CPU, where no rounding is coarser than float32's; by SGD, which does
    not divide by tiny gradients. Raises whatever the user's module raises, and Diverged.
    """
    few = replace(setting, training=_first_on_cpu(setting.training), validation=_first_on_cpu(setting.validation))
    chosen = OwnHyperparameters.from_values(training.hyperparameters.model_dump(include={"own"}) | TRIED_WITH)
    some = {seed: Training(hyperparameters=chosen, seed=seed) for seed in (training.seed, training.seed + 1)}
    alone = {}
    for seed, member in some.items():
        with forked_random_state(few.device):
            before = _plain_attributes(new_model(few, member))
        drawn = _generators()
        alone[seed] = train(few, member)
        if _generators() != drawn:
            return "it draws random numbers that do not come from torch"
        after = _plain_attributes(alone[seed].model)
        if changed := [name for name in after if after[name] != before.get(name)]:
            return f"its attribute {changed[0]} changes as it is trained"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")  # where vmap takes the members one by one
        together = dict(train_fused(few, some, lambda _: ()))
    for seed, outcome in together.items():
        if isinstance(outcome, Exception):
            raise outcome
        tensors = tensors_of(alone[seed].model)
        for name, tensor in tensors_of(outcome.model).items():
            if not _is_near(tensor, tensors[name]):
                return f"several as one do not train as each does alone: {name} becomes another"
        outputs, expected = (predict_outputs(one.model, few.validation.features) for one in (outcome, alone[seed]))
        if not _is_near(outputs, expected):
            return "several as one do not give what each gives alone"
    return None


def _first_on_cpu(split: Split) -> Split:
    first = split.first(TRIED_ROWS)
    target = first.target.cpu()
    if target.is_floating_point():  # in few rows it may be the same everywhere, and all that matters is that it varies
        target = torch.linspace(-1, 1, len(target), dtype=target.dtype)
    return Split(features=first.all_features.cpu(), target=target)


def _generators() -> Hashable:
    """The states of Python's and NumPy's global generators, which members would share."""
    return _comparable([random.getstate(), np.random.get_state()], (), type)


def _is_near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-4, equal_nan=True)


def _plain_attributes(model: nn.Module) -> dict[str, Hashable]:
    """What a model's modules hold beside tensors that it registers, by name; of what cannot be compared, the type."""
    registered = {id(tensor) for tensor in tensors_of(model).values()}
    return {
        f"{name}.{key}": _comparable(value, registered, type)
        for name, module in model.named_modules()
        for key, value in _own(module).items()
    }


_INTERNAL = frozenset(vars(nn.Module()))


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _INTERNAL}


def _comparable(value: Any, registered: Collection[int], opaque: Callable[[Any], Hashable]) -> Hashable:
    """Return equal things for equal values: numbers and texts themselves, tensors and arrays by what is in them,
    containers by their items, and anything else as `opaque` says. A registered tensor is compared elsewhere."""
    if id(value) in registered:
        return Tensor
    if isinstance(value, str | bytes | int | float | complex | type | None):
        return value
    if isinstance(value, Tensor) and value.layout is torch.strided:
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return value.dtype, value.shape, content
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return tuple((key, _comparable(item, registered, opaque)) for key, item in value.items())
    if isinstance(value, list | tuple | deque):
        return tuple(_comparable(item, registered, opaque) for item in value)
    if isinstance(value, set | frozenset):
        return frozenset(_comparable(item, registered, opaque) for item in value)
    return opaque(value)


def _itself(value: Any) -> Hashable:
    """The value where it can be compared, otherwise an object that is equal to nothing else."""
    return value if isinstance(value, Hashable) else object()


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available
