"""Training: reproducible from its seed, finite or refused, and for data of the right shape."""

import pytest
import torch

from models.batches import Split
from models.evaluate import METRICS, evaluate
from models.families import FAMILIES, DataShape
from models.hyperparameters import search_space
from models.preprocessing import Standardization
from models.solo import Diverged, train
from tasks.tune import Prepared


def hyperparameters(family: str, **values: object) -> object:
    chosen = {"learning_rate": 3e-3, "batch_size": 64, "optimizer": "adam", "weight_decay": 0.0, "depth": 2}
    chosen |= {"dropout": 0.1, "epochs": 3} | ({"width": 32} if family == "mlp" else {"channels": 8}) | values
    return FAMILIES[family].hyperparameters.model_validate(chosen)


def train_on(prepared: Prepared, family: str, seed: int = 0, **values: object) -> object:
    return train(
        FAMILIES[family],
        hyperparameters(family, **values),  # type: ignore[arg-type]
        prepared.snapshot.shape,
        prepared.training,
        prepared.validation,
        seed=seed,
    )


@pytest.mark.parametrize("family", ["mlp", "cnn"])
def test_the_same_seed_gives_the_same_model_and_another_seed_does_not(prepared: Prepared, family: str) -> None:
    first = train_on(prepared, family, seed=1)
    torch.rand(1)  # whatever else draws from the global generator must not matter
    again, other = train_on(prepared, family, seed=1), train_on(prepared, family, seed=2)
    assert first.epochs == again.epochs  # type: ignore[attr-defined]
    assert first.epochs != other.epochs  # type: ignore[attr-defined]


def test_training_leaves_the_global_random_state_alone(prepared: Prepared) -> None:
    before = torch.random.get_rng_state()
    train_on(prepared, "mlp")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw", "rmsprop"])
def test_every_optimizer_learns(prepared: Prepared, optimizer: str) -> None:
    rate = 0.1 if optimizer in ("sgd", "momentum") else 3e-3
    trained = train_on(prepared, "mlp", optimizer=optimizer, learning_rate=rate, epochs=10)
    assert trained.epochs[-1].validation["accuracy"] > 0.8  # type: ignore[attr-defined]
    assert trained.epochs[-1].train_loss < trained.epochs[0].train_loss  # type: ignore[attr-defined]


def test_a_loss_that_is_not_finite_ends_the_training(prepared: Prepared) -> None:
    with pytest.raises(Diverged, match=r"diverged at epoch \d"):
        train_on(prepared, "mlp", optimizer="sgd", learning_rate=1e30)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_cnn_takes_images_down_to_one_pixel(depth: int) -> None:
    for size in (1, 8, 28):
        shape = DataShape(features=(1, size, size), classes=3)
        model = FAMILIES["cnn"].build(hyperparameters("cnn", depth=depth), shape)
        assert model(torch.zeros(2, 1, size, size)).shape == (2, 3)


def test_a_cnn_refuses_a_table() -> None:
    with pytest.raises(ValueError, match=r"needs images of shape .*, found rows of shape \(4,\)"):
        FAMILIES["cnn"].build(hyperparameters("cnn"), DataShape(features=(4,), classes=3))


def test_each_row_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    split = Split(features=torch.arange(10.0)[:, None], target=torch.arange(10))
    generator = torch.Generator().manual_seed(0)
    epochs = [torch.cat([target for _, target in split.batches(4, generator)]).tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_standardization_keeps_a_constant_column_finite() -> None:
    features = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert Standardization.fit(features)(features).tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_an_image_is_standardised_per_channel() -> None:
    images = torch.randn(50, 3, 4, 4) * torch.tensor([1.0, 10.0, 100.0])[:, None, None] + 7
    standard = Standardization.fit(images)(images)
    assert torch.allclose(standard.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(standard.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-4)


def test_metrics_agree_with_a_count_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 0.0]])
    measured = evaluate(torch.nn.Identity(), logits, torch.tensor([0, 1, 1, 0]))
    assert measured["accuracy"] == 0.75
    right, wrong = -torch.log_softmax(torch.tensor([2.0, 0.0]), 0)
    assert measured["log_loss"] == pytest.approx((2 * right + wrong + torch.log(torch.tensor(2.0))).item() / 4)


def test_a_gain_is_positive_for_the_better_in_either_direction() -> None:
    assert METRICS["accuracy"].gain(0.9, 0.8) > 0 > METRICS["accuracy"].gain(0.8, 0.9)
    assert METRICS["log_loss"].gain(0.1, 0.2) > 0 > METRICS["log_loss"].gain(0.2, 0.1)


def test_default_spaces_build_for_digits(shape: DataShape) -> None:
    for family in FAMILIES.values():
        space = search_space(family.hyperparameters, {})
        ends = [
            {
                name: (domain[end] if isinstance(domain, tuple) else getattr(domain, ("low", "high")[end], domain))
                for name, domain in space.items()
            }
            for end in (0, -1)
        ]
        for values in ends:
            model = family.build(family.hyperparameters.model_validate(values), shape)
            assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
