"""Fused training: each member ends as it would alone, whatever becomes of the others."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import models.fused.fusion
import models.fused.group
from models.families.family import family_named
from models.fused.fusion import fusion_signature
from models.fused.group import NotFusable
from models.fused.layers import stacked_chain
from models.fused.optimizers import UPDATES, StackedOptimizer
from models.fused.train import Stopped, train_fused
from models.hyperparameters.declared import OptimizerName
from models.rows.batches import Split
from models.train import fusion_for, train_all
from models.training.dropout import SeededDropout
from models.training.loop import train
from models.training.optimizers import build_optimizer
from models.training.terms import Diverged, Epoch, Resumable, Setting, Trained, Training, new_model
from tasks.data.prepared import Prepared
from tests.unit.models.test_solo import assert_equal

EVERYTHING = {
    "dropout": 0.3,
    "l1": 1e-4,
    "weight_decay": 1e-3,
    "label_smoothing": 0.1,
    "gradient_clip_norm": 0.5,
    "schedule": "cosine",
}


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Adam and its kin divide by the root of tiny numbers, which lets float32's rounding grow; here nothing hides."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["by row", "at once"])
def each_kind_of_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row as on a CPU, and, on a CPU too, in the steps that a GPU replays."""
    if request.param == "at once":
        monkeypatch.setattr(models.fused.group.Group, "_by_row", False)


def setting_of(prepared: Prepared, model: str = "mlp", rows: int = 300) -> Setting:
    def doubled(split: Split) -> Split:
        floats = torch.get_default_dtype()
        target = split.target.to(floats) if split.target.is_floating_point() else split.target
        return Split(features=split.all_features.to(floats), target=target).first(rows)

    regression = prepared.snapshot.shape.problem == "regression"
    setting = prepared.setting(family_named(model), "rmse" if regression else "accuracy")
    return replace(setting, training=doubled(setting.training), validation=doubled(setting.validation))


def trainings(setting: Setting, *chosen: Mapping[str, Any], **common: Any) -> list[Training]:
    read = setting.family.hyperparameters.from_values
    return [
        Training(hyperparameters=read({"epochs": 3, "batch_size": 64, **common, **one}), seed=seed)
        for seed, one in enumerate(chosen)
    ]


def fused(setting: Setting, some: list[Training]) -> list[Trained]:
    """All as one computation; a member that is not trained fails the test."""
    outcomes = dict(train_fused(setting, dict(enumerate(some)), lambda _: ()))
    return [outcomes[place] for place in range(len(some))]  # type: ignore[misc]


def assert_as_alone(setting: Setting, some: list[Training], tolerance: float) -> None:
    for found, training in zip(fused(setting, some), some, strict=True):
        alone = train(setting, training)
        assert len(found.epochs) == len(alone.epochs)
        for one, other in zip(found.epochs, alone.epochs, strict=True):
            assert one.train_loss == pytest.approx(other.train_loss, rel=tolerance)
            assert one.validation_loss == pytest.approx(other.validation_loss, rel=tolerance)
            assert one.objective == pytest.approx(other.objective, rel=tolerance)
        assert found.kept.number == alone.kept.number
        assert found.validation == pytest.approx(alone.validation, rel=tolerance)
        weights = alone.model.state_dict()
        for name, tensor in found.model.state_dict().items():
            torch.testing.assert_close(tensor, weights[name], rtol=tolerance, atol=tolerance)


OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "adagrad")
SCHEDULES = ("constant", "step", "exponential", "cosine", "one_cycle", "plateau")


@pytest.mark.usefixtures("in_float64")
@pytest.mark.usefixtures("each_kind_of_step")
def test_every_optimizer_and_schedule_in_one_group_trains_as_alone(prepared: Prepared) -> None:
    setting = setting_of(prepared)
    by_optimizer = [{"optimizer": name, "learning_rate": 0.01 + 0.01 * i} for i, name in enumerate(OPTIMIZERS)]
    by_schedule = [{"schedule": name, "optimizer": "adam", "warmup": 0.2} for name in SCHEDULES]
    some = trainings(setting, *({**EVERYTHING, **one} for one in by_optimizer + by_schedule))
    assert_as_alone(setting, some, 1e-9)


@pytest.mark.usefixtures("in_float64")
def test_what_only_some_members_have_is_each_ones_own(prepared: Prepared) -> None:
    """Penalties, dropout and clipping in one and not in another, other epochs, early stopping."""
    setting = setting_of(prepared)
    some = trainings(
        setting, {}, {"dropout": 0.5}, {"l1": 1e-3}, {"weight_decay": 0.01}, {"gradient_clip_norm": 0.1},
        {"label_smoothing": 0.2}, {"epochs": 5}, {"early_stopping_patience": 1, "learning_rate": 0.3, "epochs": 6},
        {"initialisation": "orthogonal"}, {"learning_rate_scaling": "linear"},
        optimizer="momentum", depth=2, width=30, taper=0.5,
    )  # fmt: skip
    assert_as_alone(setting, some, 1e-9)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_cnn_trains_as_alone(prepared: Prepared, batch_norm: bool) -> None:
    setting = setting_of(prepared, "cnn", rows=200)
    some = trainings(
        setting, EVERYTHING, {"optimizer": "sgd"}, {"optimizer": "rmsprop"}, channels=4, batch_norm=batch_norm
    )
    assert_as_alone(setting, some, 1e-8)


@pytest.mark.usefixtures("in_float64")
def test_a_regression_trains_as_alone(prepared_regression: Prepared) -> None:
    setting = setting_of(prepared_regression)
    assert_as_alone(setting, trainings(setting, EVERYTHING, {"optimizer": "adagrad"}, {"l1": 0.01}), 1e-9)


def test_in_float32_the_curves_of_momentum_agree(prepared: Prepared) -> None:
    setting = setting_of(prepared)
    assert_as_alone(setting, trainings(setting, {"dropout": 0.2}, {"learning_rate": 0.1}, optimizer="momentum"), 1e-4)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("by_row", [True, False])
def test_stacked_optimizers_step_as_pytorchs_own(by_row: bool) -> None:
    """Row by row as on a CPU, and all rows at once as on a GPU."""
    read = family_named("mlp").hyperparameters.from_values
    chosen = [
        read({"optimizer": name, "weight_decay": decay, "momentum": 0.8, "beta1": 0.8, "eps": 1e-6})
        for name in sorted(OPTIMIZERS, key=lambda name: UPDATES[name])
        for decay in (0.0, 0.1)
    ]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(chosen), 12, generator=generator)
    alone = [nn.Parameter(row.clone()) for row in weights]
    optimizers = [build_optimizer([row], one) for row, one in zip(alone, chosen, strict=True)]
    stacked = StackedOptimizer(chosen, weights)
    for number in range(1, 11):
        gradients = torch.randn(len(chosen), 12, generator=generator)
        rates = torch.rand(len(chosen), generator=generator) / 10
        if by_row:
            stacked.step_by_row(gradients, rates.tolist(), number)
        else:
            stacked.step(gradients, stacked.factors(rates.unsqueeze(0), number)[0])
        for row, optimizer, gradient, rate in zip(alone, optimizers, gradients, rates.tolist(), strict=True):
            row.grad = gradient.clone()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    torch.testing.assert_close(weights, torch.stack([row.detach() for row in alone]), rtol=1e-12, atol=1e-12)


ACTIVATIONS = ("relu", "leaky_relu", "elu", "gelu", "silu", "tanh")


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_with_every_activation_a_group_trains_as_alone(prepared: Prepared, activation: str) -> None:
    setting = setting_of(prepared)
    assert_as_alone(setting, trainings(setting, {"dropout": 0.3}, {}, activation=activation, depth=2, width=20), 1e-9)


@pytest.mark.usefixtures("in_float64")
def test_a_chains_gradients_are_autograds() -> None:
    """Of layers without bias, frozen ones, some before the first that is trained, those that work in place, and those
    that overwrite what a layer before them has, or may not."""
    layers = [
        nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7, bias=False), nn.ELU(inplace=True), SeededDropout(0.5),
        nn.Linear(7, 6), nn.Tanh(), SeededDropout(0.3), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), SeededDropout(0.4),
        nn.ReLU(), nn.GELU(), nn.Linear(5, 4), nn.SiLU(inplace=True), nn.Linear(4, 3),
        nn.LeakyReLU(0.3, inplace=True),
    ]  # fmt: skip
    model = nn.Sequential(nn.Flatten(), SeededDropout(0.2), nn.Sequential(*layers))
    for frozen in (layers[0], layers[14]):
        frozen.requires_grad_(False)
    chain = stacked_chain(model)
    assert chain is not None
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        """Two of its shape; of dropout's threshold and the like it itself twice."""
        several = torch.stack([tensor, tensor]).detach()
        return torch.randn(several.shape, generator=generator) if isinstance(tensor, nn.Parameter) else several

    tensors = {name: drawn(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    features = torch.randn(2, 9, 2, 3, generator=generator)
    gradient = torch.randn(2, 9, 3, generator=generator)
    for name in trained:
        tensors[name].requires_grad_()
    outputs = chain(tensors, features)
    expected = torch.autograd.grad(outputs, [tensors[name] for name in trained], gradient)
    found = {name: torch.empty_like(tensors[name]) for name in trained}
    with torch.no_grad():
        by_hand = chain.by_hand(tensors, found)
        again, kept = by_hand.forward(features.clone())
        by_hand.backward(kept, gradient.clone())
    torch.testing.assert_close(again, outputs.detach(), rtol=0, atol=0)
    torch.testing.assert_close(list(found.values()), list(expected))


def test_what_flattens_otherwise_is_no_chain() -> None:
    assert stacked_chain(nn.Sequential(nn.Flatten(2), nn.Linear(6, 2))) is None


def stop(*places: int) -> Any:
    return lambda epochs: [place for place in places if place in epochs and epochs[place].number == 2]


@pytest.mark.usefixtures("each_kind_of_step")
def test_a_member_that_is_stopped_or_diverges_leaves_the_others_as_they_were(prepared: Prepared) -> None:
    """Bit for bit: neither NaN nor the smaller group that goes on touches another row."""
    setting = setting_of(prepared)
    some = trainings(
        setting, {}, {"learning_rate": 1e30, "optimizer": "sgd"}, {"dropout": 0.3}, {"optimizer": "rmsprop"}
    )
    outcomes = dict(train_fused(setting, dict(enumerate(some)), stop(2)))
    assert isinstance(outcomes[1], Diverged)
    assert str(outcomes[1]) == "diverged at epoch 1: the loss is not finite"
    assert isinstance(outcomes[2], Stopped)
    undisturbed = trainings(setting, {}, {"optimizer": "sgd"}, {"dropout": 0.3}, {"optimizer": "rmsprop"})
    expected = fused(setting, undisturbed)
    for place in (0, 3):
        assert_equal(outcomes[place], expected[place])  # type: ignore[arg-type]


def test_a_member_whose_checkpoint_finds_no_room_leaves_the_others_as_they_were(
    prepared: Prepared, tmp_path: Path
) -> None:
    """Bit for bit. What stands for a full disk is a file where the folder would be."""
    setting = setting_of(prepared)
    some = trainings(setting, {}, {"dropout": 0.3}, {"optimizer": "rmsprop"})
    (tmp_path / "full").write_text("")
    paths = [tmp_path / "0.safetensors", tmp_path / "full/1.safetensors", tmp_path / "2.safetensors"]
    kept = {
        place: replace(one, resumable=Resumable(path=path, key="k", interval_seconds=0))
        for place, (one, path) in enumerate(zip(some, paths, strict=True))
    }
    outcomes = dict(train_fused(setting, kept, lambda _: ()))
    assert isinstance(outcomes[1], FileExistsError)
    expected = fused(setting, [some[0], some[2]])
    assert_equal(outcomes[0], expected[0])  # type: ignore[arg-type]
    assert_equal(outcomes[2], expected[1])  # type: ignore[arg-type]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("resumed", ["fused", "one is stopped", "alone"])
def test_a_group_that_was_killed_goes_on_from_its_members_checkpoints(
    prepared: Prepared, tmp_path: Path, resumed: str
) -> None:
    """As a group it ends bit for bit as if it had never stopped; a member can also go on alone."""
    setting = setting_of(prepared)
    chosen = [
        {**EVERYTHING, "optimizer": name, "early_stopping_patience": 9} for name in ("adamw", "momentum", "adagrad")
    ]
    some = trainings(setting, *chosen, epochs=6)
    expected = fused(setting, some)
    kept = [
        replace(one, resumable=Resumable(path=tmp_path / f"{place}.safetensors", key="k", interval_seconds=0))
        for place, one in enumerate(some)
    ]

    def kill(epochs: Mapping[int, Epoch]) -> Collection[int]:
        if epochs[0].number == 4:
            raise Killed
        return ()

    with pytest.raises(Killed):
        list(train_fused(setting, dict(enumerate(kept)), kill))
    seen: list[int] = []

    def see(epochs: Mapping[int, Epoch]) -> Collection[int]:
        seen.extend(epoch.number for epoch in epochs.values())
        return ()

    if resumed == "one is stopped":
        outcomes = dict(train_fused(setting, dict(enumerate(kept)), stop(1)))
        assert isinstance(outcomes.pop(1), Stopped)
        for place, outcome in outcomes.items():
            assert_equal(outcome, expected[place])  # type: ignore[arg-type]
    elif resumed == "fused":
        outcomes = dict(train_fused(setting, dict(enumerate(kept)), see))
        assert seen == [number for number in range(1, 7) for _ in kept]
        for place, one in enumerate(expected):
            assert_equal(outcomes[place], one)  # type: ignore[arg-type]
    else:
        for training, one in zip(kept, expected, strict=True):
            alone = train(setting, training)
            assert [epoch.train_loss for epoch in alone.epochs] == pytest.approx(
                [epoch.train_loss for epoch in one.epochs], rel=1e-3
            )


def test_a_group_too_large_for_memory_is_halved_and_reports_each_epoch_once(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No CPU raises OutOfMemoryError, so the second epoch of a group of more than two does in its place."""
    setting = setting_of(prepared)
    some = trainings(setting, {}, {"dropout": 0.2}, {"optimizer": "sgd"}, {"l1": 0.01}, {"weight_decay": 0.1})
    expected = fused(setting, some)
    train_epoch = models.fused.group.Group.train_epoch

    def short_of_memory(group: models.fused.group.Group) -> dict[int, Diverged]:
        if len(group.members) > 2 and group.epochs_done == 1:
            raise torch.OutOfMemoryError
        return train_epoch(group)

    monkeypatch.setattr(models.fused.group.Group, "train_epoch", short_of_memory)
    seen: list[tuple[int, int]] = []

    def see(epochs: Mapping[int, Epoch]) -> Collection[int]:
        seen.extend((place, epoch.number) for place, epoch in epochs.items())
        return ()

    outcomes = dict(train_all(setting, some, see))
    assert sorted(seen) == [(place, number) for place in range(5) for number in (1, 2, 3)]
    for place, one in enumerate(expected):
        found = outcomes[place]
        assert isinstance(found, Trained)
        assert [epoch.objective for epoch in found.epochs] == pytest.approx(
            [epoch.objective for epoch in one.epochs], abs=0.02
        )


NETS = """
import torch
from torch import nn

class Plain(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, shape.outputs))
    def forward(self, features):
        return self.layers(features)

class Branching(Plain):
    def forward(self, features):
        return super().forward(features if features.sum() > 0 else -features)

class Noisy(Plain):
    def forward(self, features):
        return super().forward(features + torch.randn_like(features))

class Unused(Plain):
    def __init__(self, hyperparameters, shape):
        super().__init__(hyperparameters, shape)
        self.spare = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.alone = nn.Parameter(torch.ones(3, 3))

class Frozen(Plain):
    def __init__(self, hyperparameters, shape):
        super().__init__(hyperparameters, shape)
        self.layers[1].requires_grad_(False)
        self.first = nn.Linear(64, 64).requires_grad_(False)
    def forward(self, features):
        return super().forward(self.first(features.flatten(1)))

class Sometimes(Plain):
    def __init__(self, hyperparameters, shape):
        super().__init__(hyperparameters, shape)
        self.whole = nn.Linear(64, shape.outputs)
    def forward(self, features):
        outputs = super().forward(features)
        return outputs + self.whole(features.flatten(1)) if len(features) == 64 else outputs

class Vectors(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))
        self.outputs = shape.outputs
    def forward(self, features):
        return (features.flatten(1) * self.scale)[:, 20:20 + self.outputs]

class Normalised(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, shape.outputs)
        )
    def forward(self, features):
        return self.layers(features)

class Tied(Plain):
    def __init__(self, hyperparameters, shape):
        super().__init__(hyperparameters, shape)
        self.again = self.layers[2]

class Late(Plain):
    def forward(self, features):
        if len(features) == 300 % 64:
            features = features if features.sum() > 0 else -features
        return super().forward(features)
"""

SOME = """
class Some(Plain):
    def __init__(self, hyperparameters, shape):
        super().__init__(hyperparameters, shape)
        assert torch.rand(()) > 0.5
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


@pytest.mark.parametrize(
    ("name", "obstacle"),
    [
        ("Branching", "data-dependent control flow"),
        ("Noisy", "random operation"),
        ("Tied", "its modules share tensors"),
        ("Late", None),
    ],
)
def test_a_model_that_cannot_be_fused_says_why_and_is_trained_alone(
    prepared: Prepared, nets: Path, caplog: pytest.LogCaptureFixture, name: str, obstacle: str | None
) -> None:
    setting = setting_of(prepared, f"{nets}:{name}")
    some = trainings(setting, {}, {"optimizer": "sgd"})
    with caplog.at_level("INFO"):
        fusion = fusion_for(setting, some[0])
        outcomes = dict(train_all(setting, some))
    if obstacle is None:  # what stands in the way shows in a batch that was not tried
        assert fusion.members > 1
        with pytest.raises(NotFusable):
            fused(setting, some)
    else:
        assert fusion.members == 1
        assert obstacle in fusion.reason
    assert f"nets.py:{name} are trained one by one: " in caplog.text
    for place, training in enumerate(some):
        assert_equal(outcomes[place], train(setting, training))  # type: ignore[arg-type]


def test_a_users_model_is_fused_and_exact(prepared: Prepared, nets: Path) -> None:
    setting = setting_of(prepared, f"{nets}:Plain")
    some = trainings(setting, {}, {"learning_rate": 0.1}, optimizer="momentum")
    assert fusion_for(setting, some[0]).members > 100
    assert_as_alone(setting, some, 1e-4)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.usefixtures("each_kind_of_step")
@pytest.mark.parametrize("name", ["Unused", "Frozen", "Sometimes", "Vectors"])
def test_what_gets_no_gradient_trains_as_alone(prepared: Prepared, nets: Path, name: str) -> None:
    """With every optimizer and penalty: zero for what takes no part in a batch, and none where a layer is frozen."""
    setting = setting_of(prepared, f"{nets}:{name}")
    penalties = {key: value for key, value in EVERYTHING.items() if key != "dropout"}
    some = trainings(setting, *({**penalties, "optimizer": optimizer} for optimizer in OPTIMIZERS))
    assert fusion_for(setting, some[0]).members > 100
    assert_as_alone(setting, some, 1e-9)


@pytest.mark.parametrize("kept", ["fused", "alone"])
def test_a_checkpoint_of_a_partly_frozen_model_fits_whoever_goes_on(
    prepared: Prepared, nets: Path, tmp_path: Path, kept: str
) -> None:
    """The optimizer's state is that of the parameters that are trained, in either way."""
    setting = setting_of(prepared, f"{nets}:Frozen")
    (plain,) = trainings(setting, {"optimizer": "momentum"}, epochs=6)
    resumable = replace(plain, resumable=Resumable(path=tmp_path / "one", key="k", interval_seconds=0))

    def kill(epoch: Epoch) -> None:
        if epoch.number == 4:
            raise Killed

    def kill_group(epochs: Mapping[int, Epoch]) -> Collection[int]:
        kill(epochs[0])
        return ()

    with pytest.raises(Killed):
        list(train_fused(setting, {0: resumable}, kill_group)) if kept == "fused" else train(setting, resumable, kill)
    outcome = train(setting, resumable) if kept == "fused" else fused(setting, [resumable])[0]
    expected = [epoch.train_loss for epoch in train(setting, plain).epochs]
    assert [epoch.train_loss for epoch in outcome.epochs] == pytest.approx(expected, rel=1e-4)


def test_models_that_freeze_other_layers_are_not_of_one_group(prepared: Prepared) -> None:
    setting = setting_of(prepared)
    (training,) = trainings(setting, {})
    one, other = (new_model(setting, training) for _ in range(2))
    assert fusion_signature(one, training) == fusion_signature(other, training)
    next(other.parameters()).requires_grad_(False)
    assert fusion_signature(one, training) != fusion_signature(other, training)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.usefixtures("each_kind_of_step")
@pytest.mark.parametrize(("rows", "batch_size"), [(129, 64), (65, 64), (257, 32), (257, 256), (33, 64)])
def test_a_row_that_is_left_over_joins_the_batch_before_it(
    prepared: Prepared, nets: Path, rows: int, batch_size: int
) -> None:
    """Batch normalisation refuses a batch of one row; fused and alone have the same batches."""
    setting = setting_of(prepared, f"{nets}:Normalised", rows=rows)
    some = trainings(setting, {}, {"optimizer": "momentum"}, {"schedule": "cosine"}, batch_size=batch_size)
    assert_as_alone(setting, some, 1e-8)


def test_our_cnn_with_batch_norm_takes_rows_that_leave_one_over(prepared: Prepared) -> None:
    """At its deepest a single pixel is left of an image, so one row would have no variance."""
    setting = setting_of(prepared, "cnn", rows=129)
    some = trainings(setting, {}, {}, depth=4, channels=2, batch_norm=True)
    assert all(isinstance(outcome, Trained) for _, outcome in train_all(setting, some))


@pytest.mark.parametrize(("model", "size", "least", "most"), [("mlp", "width", 64, 2048), ("cnn", "channels", 4, 32)])
def test_a_large_model_is_trained_alone_because_the_device_is_busy_with_one(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, model: str, size: str, least: int, most: int
) -> None:
    """How large that is depends on the device; here it is a CPU's limit on each."""
    setting = setting_of(prepared, model)
    for name in ("WORTHWHILE_OPERATIONS", "WORTHWHILE_WITH_CONVOLUTIONS"):
        limits = getattr(models.fused.fusion, name)
        monkeypatch.setattr(models.fused.fusion, name, dict.fromkeys(limits, limits["cpu"]))
    small, large = (trainings(setting, {size: value, "depth": 2})[0] for value in (least, most))
    assert fusion_for(setting, small).members > 100
    assert "keeps the device busy on its own" in fusion_for(setting, large).reason


@pytest.mark.parametrize(
    ("change", "together"),
    [
        ({"learning_rate": 0.5, "optimizer": "sgd", "schedule": "step", "dropout": 0.4, "epochs": 9}, True),
        ({"initialisation": "kaiming", "l1": 0.1, "label_smoothing": 0.1}, True),
        ({"width": 51}, False),
        ({"depth": 2}, False),
        ({"activation": "tanh"}, False),
        ({"batch_size": 32}, False),
    ],
)
def test_what_may_differ_within_a_group(prepared: Prepared, change: dict[str, Any], together: bool) -> None:
    setting = setting_of(prepared)
    one, other = trainings(setting, {}, change)
    signatures = [fusion_signature(new_model(setting, training), training) for training in (one, other)]
    assert (signatures[0] == signatures[1]) == together


def test_a_model_that_cannot_be_built_costs_its_own_training_only(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(f"{NETS}{SOME}")
    setting = setting_of(prepared, f"{path}:Some")
    outcomes = dict(train_all(setting, trainings(setting, *[{}] * 6)))
    kinds = {type(outcome) for outcome in outcomes.values()}
    assert kinds == {Trained, AssertionError}


def test_what_the_follower_raises_ends_the_training(prepared: Prepared, nets: Path) -> None:
    def fail(_: Mapping[int, Epoch]) -> Collection[int]:
        raise OSError("the disk is full")

    for model in ("mlp", f"{nets}:Noisy"):
        setting = setting_of(prepared, model)
        with pytest.raises(OSError, match="the disk is full"):
            list(train_all(setting, trainings(setting, {}, {}), fail))
