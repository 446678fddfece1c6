"""Training: reproducible from its seed, resumed as if it had never stopped, finite or refused."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.families.networks import Unscale
from models.training.checkpoints import Checkpoint
from models.training.terms import Diverged, Epoch, Resumable, Trained, gains_from_mixed_precision, mean_loss
from tasks.data.prepared import Prepared
from tests.conftest import CPU, train_on
from tests.unit.models.test_families import NET, TIED_NET, write_net

RICH = {
    "optimizer": "adamw",
    "schedule": "plateau",
    "plateau_patience": 1,
    "dropout": 0.3,
    "l1": 1e-5,
    "weight_decay": 1e-3,
    "label_smoothing": 0.1,
    "gradient_clip_norm": 1.0,
    "early_stopping_patience": 50,
    "epochs": 8,
}


def assert_equal(one: Trained, other: Trained) -> None:
    assert one.epochs == other.epochs
    assert one.validation == other.validation
    weights = other.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in one.model.state_dict().items())


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_the_same_seed_gives_the_same_model_and_another_seed_does_not(prepared: Prepared, model: str) -> None:
    first = train_on(prepared, model, seed=1, dropout=0.2)
    torch.rand(1)  # whatever else draws from the global generator must not matter
    again, other = train_on(prepared, model, seed=1, dropout=0.2), train_on(prepared, model, seed=2, dropout=0.2)
    assert_equal(first, again)
    assert first.epochs != other.epochs


CONVOLUTIONS = """
import torch
from torch import nn

LAST = []


class Net(nn.Module):
    @staticmethod
    def suggest(trial):
        return {}

    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(64, shape.outputs)

    def forward(self, features):
        LAST.append(self.second.weight.is_contiguous(memory_format=torch.channels_last))
        outputs = self.second(self.first(features).relu())
        return self.last(outputs.FLATTENED)
"""


@pytest.mark.parametrize(("flattened", "lasts"), [("flatten(1)", True), ("view(len(outputs), -1)", False)])
def test_convolutions_are_trained_channels_last_where_the_model_lets_them(
    prepared: Prepared, tmp_path: Path, flattened: str, lasts: bool
) -> None:
    """On a CPU; what comes out lies in memory as ever, and is the same but for rounding."""
    own = write_net(tmp_path, CONVOLUTIONS.replace("FLATTENED", flattened))
    trained = train_on(prepared, own)
    net = next(module for module in trained.model.modules() if type(module).__name__ == "Net")
    assert sys.modules[type(net).__module__].LAST[-1] == (lasts and prepared.training.target.device == CPU)
    assert all(parameter.is_contiguous() for parameter in trained.model.parameters())
    (tmp_path / "as it is").mkdir()
    as_it_is = write_net(tmp_path / "as it is", CONVOLUTIONS.replace("FLATTENED", "view(len(outputs), -1)"))
    losses, expected = (
        [epoch.validation_loss for epoch in one.epochs] for one in (trained, train_on(prepared, as_it_is))
    )
    assert losses == pytest.approx(expected, rel=1e-4)


def test_training_leaves_the_global_random_state_alone(prepared: Prepared) -> None:
    before = torch.random.get_rng_state()
    train_on(prepared)
    assert torch.equal(torch.random.get_rng_state(), before)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        ("mlp", "momentum"),
        ("mlp", "adamw"),
        ("mlp", "rmsprop"),
        ("mlp", "adagrad"),
        ("cnn", "adam"),
        ("cnn", "nesterov"),
    ],
)
def test_a_resumed_training_ends_as_one_that_never_stopped(
    prepared: Prepared, tmp_path: Path, model: str, optimizer: str
) -> None:
    """Killed after epochs 3 and 6, with dropout, plateaus and early stopping's best weights to remember."""
    chosen = RICH | {"optimizer": optimizer}
    resumable = Resumable(path=tmp_path / "deep" / "trial.safetensors", key="one", interval_seconds=0)
    reported: list[int] = []

    def kill_at(number: int) -> None:
        def report(epoch: Epoch) -> None:
            reported.append(epoch.number)
            if epoch.number == number:
                raise Killed

        with pytest.raises(Killed):
            train_on(prepared, model, resumable=resumable, report=report, **chosen)  # type: ignore[arg-type]

    kill_at(3)
    kill_at(6)
    resumed = train_on(prepared, model, resumable=resumable, **chosen)  # type: ignore[arg-type]
    assert reported == [1, 2, 3, 1, 2, 3, 4, 5, 6]
    assert_equal(resumed, train_on(prepared, model, **chosen))  # type: ignore[arg-type]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "a flipped bit among the numbers": lambda content: content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:],
    "a header that claims too much": lambda content: b"\xff" * 8 + content[8:],
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_damaged_checkpoint_the_one_before_is_taken(prepared: Prepared, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "trial.safetensors"
    resumable = Resumable(path=path, key="one", interval_seconds=0)

    def kill(epoch: Epoch) -> None:
        if epoch.number == 3:
            raise Killed

    with pytest.raises(Killed):
        train_on(prepared, resumable=resumable, report=kill, epochs=5)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    found = Checkpoint.read(path, "one")
    assert found is not None
    assert len(found.curve) == 2
    resumed = train_on(prepared, resumable=resumable, epochs=5)
    assert_equal(resumed, train_on(prepared, epochs=5))
    for file in tmp_path.iterdir():
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert Checkpoint.read(path, "one") is None


def test_another_training_s_checkpoint_is_passed_over(prepared: Prepared, tmp_path: Path) -> None:
    resumable = Resumable(path=tmp_path / "trial.safetensors", key="one", interval_seconds=0)
    train_on(prepared, seed=7, epochs=2, resumable=resumable)
    other = replace(resumable, key="other")
    assert_equal(train_on(prepared, seed=1, resumable=other), train_on(prepared, seed=1))


def test_a_checkpoint_is_written_as_often_as_its_interval_says(prepared: Prepared, tmp_path: Path) -> None:
    seconds = iter(range(0, 100, 4))
    resumable = Resumable(
        path=tmp_path / "trial.safetensors", key="one", interval_seconds=10, clock=lambda: next(seconds)
    )
    seen: list[bool] = []
    train_on(prepared, epochs=5, resumable=resumable, report=lambda _: seen.append(resumable.path.exists()))
    assert seen == [False, False, True, True, True]


def test_early_stopping_puts_the_best_weights_back(prepared: Prepared) -> None:
    """A learning rate that ruins the model after a while: the best epoch lies before the end."""
    trained = train_on(prepared, optimizer="sgd", learning_rate=2.0, epochs=60, early_stopping_patience=3, depth=2)
    best = max(trained.epochs, key=lambda epoch: epoch.objective)
    assert trained.kept == best
    assert len(trained.epochs) == best.number + 3 < 60
    assert trained.validation["accuracy"] == pytest.approx(best.objective)
    without = train_on(prepared, optimizer="sgd", learning_rate=2.0, epochs=best.number, depth=2)
    assert without.validation["accuracy"] == trained.validation["accuracy"]


def test_early_stopping_follows_the_objective_in_its_direction(prepared: Prepared) -> None:
    trained = train_on(prepared, objective="log_loss", learning_rate=0.05, epochs=40, early_stopping_patience=4)
    assert trained.kept == min(trained.epochs, key=lambda epoch: epoch.objective)


def test_a_loss_that_is_not_finite_ends_the_training(prepared: Prepared) -> None:
    with pytest.raises(Diverged, match=r"diverged at epoch \d: the loss is not finite"):
        train_on(prepared, optimizer="sgd", learning_rate=1e30)


def test_a_gradient_that_is_not_finite_ends_the_training(prepared: Prepared, tmp_path: Path) -> None:
    """The square root's slope at 0 is infinite, while the loss itself stays finite."""
    text = NET.replace("return self.layers(features)", "return self.layers(features) + (0 * features).sum().sqrt()")
    text = text.replace("self.layers = ", "self.nought = nn.Parameter(torch.zeros(())); self.layers = ")
    text = text.replace("(0 * features).sum().sqrt()", "self.nought.abs().sqrt()")
    own = {"kind": "wide", "units": 16, "slope": 0.1}
    with pytest.raises(Diverged, match="diverged at epoch 1"):
        train_on(prepared, write_net(tmp_path, text), own=own)


def test_gradient_clipping_bounds_a_step(prepared: Prepared) -> None:
    def moved(**values: float) -> float:
        rows = len(prepared.training)
        common = {"optimizer": "sgd", "learning_rate": 1.0, "batch_size": rows, "epochs": 1}
        after = train_on(prepared, **common, **values).model.state_dict()  # type: ignore[arg-type]
        before = train_on(prepared, **(common | {"learning_rate": 1e-30})).model.state_dict()  # type: ignore[arg-type]
        return math.sqrt(sum(((after[name] - before[name]) ** 2).sum().item() for name in after))

    assert moved() > 0.1
    assert moved(gradient_clip_norm=0.01) == pytest.approx(0.01, rel=1e-3)


def test_label_smoothing_raises_the_training_loss_and_leaves_the_validation_loss_plain(prepared: Prepared) -> None:
    smoothed = train_on(prepared, label_smoothing=0.3, epochs=8)
    plain = train_on(prepared, epochs=8)
    assert smoothed.kept.train_loss > plain.kept.train_loss + 0.3
    logits = smoothed.model(prepared.validation.features)
    expected = nn.functional.cross_entropy(logits, prepared.validation.target).item()
    assert smoothed.kept.validation_loss == pytest.approx(expected, rel=1e-5)


def test_a_regression_is_learned_in_the_targets_own_unit(prepared_regression: Prepared) -> None:
    trained = train_on(prepared_regression, objective="rmse", epochs=30, learning_rate=3e-3)
    assert trained.validation["rmse"] == pytest.approx(trained.kept.objective)
    spread = prepared_regression.validation.target.std(correction=0).item()
    assert 0.6 * spread < trained.validation["rmse"] < 0.9 * spread
    assert trained.validation["r2"] > 0.2
    predicted = trained.model(prepared_regression.validation.features)
    assert predicted.shape == prepared_regression.validation.target.shape


def test_a_constant_prediction_of_a_regression_has_loss_one(prepared_regression: Prepared) -> None:
    unscale = Unscale()
    unscale.fit(prepared_regression.training.target)

    class Nothing(nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(features[:, :1])

    model = nn.Sequential(Nothing(), unscale).to(prepared_regression.training.target.device)
    loss = mean_loss(model, prepared_regression.training)
    assert loss.item() == pytest.approx(prepared_regression.prior_loss, rel=1e-5)


def test_mixed_precision_waits_for_a_device_that_gains_from_it() -> None:
    assert not gains_from_mixed_precision(nn.Linear(2000, 2000), CPU)


def test_a_training_of_tied_weights_is_resumed_like_any_other(prepared: Prepared, tmp_path: Path) -> None:
    model = write_net(tmp_path, TIED_NET)
    chosen: dict[str, Any] = {"epochs": 4, "early_stopping_patience": 2, "optimizer": "adam"}
    resumable = Resumable(path=tmp_path / "trial.safetensors", key="one", interval_seconds=0)

    def kill(epoch: Epoch) -> None:
        if epoch.number == 2:
            raise Killed

    with pytest.raises(Killed):
        train_on(prepared, model, resumable=resumable, report=kill, **chosen)
    resumed = train_on(prepared, model, resumable=resumable, **chosen)
    assert_equal(resumed, train_on(prepared, model, **chosen))
    weights = resumed.model.state_dict()
    assert weights["model.decoder.weight"].data_ptr() == weights["model.encoder.weight"].data_ptr()
