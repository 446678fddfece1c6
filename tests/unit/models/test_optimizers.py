"""Schedules agree with torch's own, warm-up and scaling do what they say, and each optimizer gets its parameters."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

from models.families.networks import MLP
from models.hyperparameters.declared import Hyperparameters, MLPHyperparameters
from models.rows.shapes import DataShape
from models.training.optimizers import build_optimizer, l1_norm, learning_rate_at
from tasks.data.prepared import Prepared
from tests.conftest import train_on

EPOCHS, STEPS = 10, 7
RATE = 0.1


def rates(losses: list[float] | None = None, **values: Any) -> list[float]:
    """The learning rate of each step of a training of EPOCHS times STEPS steps."""
    chosen = Hyperparameters(epochs=EPOCHS, learning_rate=RATE, **values)
    known = losses or [1.0] * EPOCHS
    return [
        learning_rate_at(chosen, step / (EPOCHS * STEPS), known[: step // STEPS], STEPS)
        for step in range(EPOCHS * STEPS)
    ]


def torch_rates(build: Callable[[optim.Optimizer], Any]) -> list[float]:
    """The same from torch's scheduler, stepped after each step of the training."""
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], RATE)
    scheduler = build(optimizer)
    found = []
    for _ in range(EPOCHS * STEPS):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


TOTAL = EPOCHS * STEPS


@pytest.mark.parametrize(
    ("values", "build"),
    [
        ({"schedule": "constant"}, lambda o: optim.lr_scheduler.ConstantLR(o, factor=1.0)),
        (
            {"schedule": "step", "step_every": 0.3, "step_factor": 0.2},
            lambda o: optim.lr_scheduler.StepLR(o, round(0.3 * TOTAL), 0.2),
        ),
        (
            {"schedule": "exponential", "exponential_final": 0.01},
            lambda o: optim.lr_scheduler.ExponentialLR(o, 0.01 ** (1 / TOTAL)),
        ),
        (
            {"schedule": "cosine", "cosine_final": 0.1},
            lambda o: optim.lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.1 * RATE),
        ),
    ],
    ids=["constant", "step", "exponential", "cosine"],
)
def test_a_schedule_is_torchs_own(values: dict[str, Any], build: Callable[[optim.Optimizer], Any]) -> None:
    assert rates(**values) == pytest.approx(torch_rates(build), rel=1e-6)


def test_one_cycle_is_torchs_own() -> None:
    """Torch ends on the last step, we after it, so ours is torch's with one step more."""
    ours = rates(schedule="one_cycle", one_cycle_peak=0.3)
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], RATE)
    scheduler = optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=TOTAL + 1, pct_start=(0.3 * TOTAL + 1) / (TOTAL + 1), cycle_momentum=False
    )
    theirs = []
    for _ in range(TOTAL):
        theirs.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert max(ours) == pytest.approx(RATE)


def test_plateau_is_torchs_own() -> None:
    losses = [1.0, 0.9, 0.9, 0.95, 0.91, 0.92, 0.8, 0.8, 0.8, 0.8]
    ours = rates(losses, schedule="plateau", plateau_factor=0.5, plateau_patience=1)[::STEPS]
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], RATE)
    scheduler = optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    theirs = []
    for loss in losses:
        theirs.append(float(optimizer.param_groups[0]["lr"]))
        scheduler.step(loss)
    assert ours == pytest.approx(theirs)
    assert len(set(ours)) > 2


@pytest.mark.parametrize("schedule", ["constant", "step", "exponential", "cosine", "plateau"])
def test_warm_up_rises_to_the_schedule(schedule: str) -> None:
    warm, plain = rates(schedule=schedule, warmup=0.2), rates(schedule=schedule)
    steps = round(0.2 * TOTAL)
    assert warm[:steps] == pytest.approx([RATE * (step + 1) / steps for step in range(steps)])
    assert warm[steps:] == plain[steps:]


def test_a_large_batch_scales_the_learning_rate_where_asked() -> None:
    assert rates(learning_rate_scaling="linear", batch_size=1024)[0] == pytest.approx(4 * RATE)
    assert rates(batch_size=1024)[0] == RATE


def test_an_optimizer_gets_its_own_parameters() -> None:
    chosen: dict[str, Any] = {
        "momentum": 0.8, "beta1": 0.7, "beta2": 0.95, "rmsprop_alpha": 0.6, "eps": 1e-4, "weight_decay": 0.3,
    }  # fmt: skip
    expected: dict[str, dict[str, Any]] = {
        "sgd": {"momentum": 0, "nesterov": False},
        "momentum": {"momentum": 0.8, "nesterov": False},
        "nesterov": {"momentum": 0.8, "nesterov": True},
        "adam": {"betas": (0.7, 0.95), "eps": 1e-4, "decoupled_weight_decay": False},
        "adamw": {"betas": (0.7, 0.95), "eps": 1e-4, "decoupled_weight_decay": True},
        "rmsprop": {"alpha": 0.6, "eps": 1e-4},
        "adagrad": {"eps": 1e-4},
    }
    for name, settings in expected.items():
        hyperparameters = Hyperparameters.from_values({"optimizer": name, **chosen})
        built = build_optimizer([nn.Parameter(torch.zeros(1))], hyperparameters)
        assert built.param_groups[0].items() >= (settings | {"weight_decay": 0.3}).items()


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "adagrad"])
def test_every_optimizer_learns(prepared: Prepared, optimizer: str) -> None:
    rate = 0.1 if optimizer in ("sgd", "momentum", "nesterov", "adagrad") else 3e-3
    trained = train_on(prepared, optimizer=optimizer, learning_rate=rate, epochs=10)
    assert trained.validation["accuracy"] > 0.8
    assert trained.epochs[-1].train_loss < trained.epochs[0].train_loss


@pytest.mark.parametrize("schedule", ["step", "exponential", "cosine", "one_cycle", "plateau"])
def test_a_schedule_changes_what_is_learned(prepared: Prepared, schedule: str) -> None:
    constant, scheduled = train_on(prepared, epochs=6), train_on(prepared, epochs=6, schedule=schedule, warmup=0.1)
    assert math.isfinite(scheduled.kept.train_loss)
    assert scheduled.epochs != constant.epochs


def test_l1_is_the_sum_of_absolute_weights_and_not_of_biases() -> None:
    model = MLP(MLPHyperparameters(width=2), DataShape(features=(2,), outputs=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-0.5)
    assert l1_norm(model.parameters()) == 4.0


def test_l1_and_l2_shrink_weights_each_on_its_own(prepared: Prepared) -> None:
    def size(**values: float) -> float:
        model = train_on(prepared, epochs=5, **values).model  # type: ignore[arg-type]
        return sum(parameter.abs().sum().item() for parameter in model.parameters() if parameter.ndim > 1)

    plain = size()
    assert size(l1=1e-2) < 0.5 * plain
    assert size(weight_decay=0.1) < 0.9 * plain
