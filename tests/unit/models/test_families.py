"""Models: the shapes that hyperparameters ask for, and a user's own class in one file."""

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn

from models.families.errors import ModelError
from models.families.family import FAMILIES, Family, family_named
from models.families.networks import CNN, MLP, build_model
from models.hyperparameters.declared import CNNHyperparameters, MLPHyperparameters, OwnHyperparameters
from models.rows.shapes import DataShape

NET = """
import torch
from torch import nn


class Net(nn.Module):
    @staticmethod
    def suggest(trial):
        kind = trial.suggest_categorical("kind", ["narrow", "wide"])
        low, high = (4, 8) if kind == "narrow" else (16, 32)
        return {"kind": kind, "units": trial.suggest_int("units_" + kind, low, high),
                "slope": trial.suggest_float("slope", 0.01, 0.3, log=True)}

    def __init__(self, hyperparameters, shape):
        super().__init__()
        inputs = 1
        for size in shape.features:
            inputs *= size
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(inputs, hyperparameters["units"]),
                                    nn.LeakyReLU(hyperparameters["slope"]),
                                    nn.Linear(hyperparameters["units"], shape.outputs))

    def forward(self, features):
        return self.layers(features)
"""


TIED_NET = """
import math, torch
from torch import nn

class Net(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        n = math.prod(shape.features)
        self.encoder, self.decoder = nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False)
        self.decoder.weight = self.encoder.weight
        self.middle = self.again = nn.Linear(n, n)
        self.out = nn.Linear(n, shape.outputs)

    def forward(self, rows):
        hidden = self.again(torch.tanh(self.middle(torch.tanh(self.encoder(rows.flatten(1))))))
        return self.out(torch.tanh(self.decoder(hidden)))
"""


def write_net(folder: Path, text: str = NET) -> str:
    path = folder / "net.py"
    path.write_text(text)
    return f"{path}:Net"


def linear_sizes(model: nn.Module) -> list[tuple[int, int]]:
    return [(layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)]


def test_an_mlp_is_equally_wide_or_tapers(shape: DataShape) -> None:
    tapered = MLP(MLPHyperparameters(depth=3, width=512, taper=0.5), shape)
    assert linear_sizes(tapered) == [(64, 512), (512, 256), (256, 128), (128, 10)]
    equal = MLP(MLPHyperparameters(depth=2, width=30), shape)
    assert linear_sizes(equal) == [(64, 30), (30, 30), (30, 10)]
    assert min(linear_sizes(MLP(MLPHyperparameters(depth=10, width=4, taper=0.1), shape))[5]) == 1


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_cnns_channels_double(batch_norm: bool) -> None:
    chosen = CNNHyperparameters(depth=3, channels=64, batch_norm=batch_norm)
    model = CNN(chosen, DataShape(features=(3, 32, 32), outputs=10))
    layers = list(model.modules())
    assert [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)] == [64, 128, 256]
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in layers) == (3 if batch_norm else 0)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_cnn_takes_images_down_to_one_pixel(depth: int) -> None:
    for size in (1, 8, 28):
        shape = DataShape(features=(1, size, size), outputs=3)
        model = CNN(CNNHyperparameters(depth=depth, channels=4), shape)
        assert model(torch.zeros(2, 1, size, size)).shape == (2, 3)


def test_a_cnn_refuses_a_table() -> None:
    with pytest.raises(ModelError, match=r"needs images of shape .*, found rows of shape \(4,\)"):
        CNN(CNNHyperparameters(), DataShape(features=(4,), outputs=3))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ends_of_the_default_space_build(name: str, shape: DataShape) -> None:
    family = FAMILIES[name]
    for end in (0, -1):
        values = {
            name: domain[end] if isinstance(domain, tuple) else getattr(domain, ("low", "high")[end], domain)
            for name, domain in family.search_space({}).items()
        }
        model = build_model(family, family.hyperparameters.from_values(values), shape)
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_initialisations_have_the_variance_of_their_papers(shape: DataShape) -> None:
    def first_weight(name: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = MLP(MLPHyperparameters.from_values({"width": 256, "initialisation": name}), shape)
        layer = model[1]
        assert isinstance(layer, nn.Linear)
        assert name == "pytorch" or not layer.bias.any()
        return layer.weight.detach()

    assert first_weight("kaiming").var().item() == pytest.approx(2 / 64, rel=0.05)
    assert first_weight("xavier").var().item() == pytest.approx(2 / (64 + 256), rel=0.05)
    orthogonal = first_weight("orthogonal")
    assert torch.allclose(orthogonal.T @ orthogonal, torch.eye(64), atol=1e-5)
    assert first_weight("pytorch").abs().max().item() <= 1 / 8


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu", "gelu", "silu", "tanh"])
def test_an_activation_is_the_one_that_was_named(activation: str, shape: DataShape) -> None:
    model = MLP(MLPHyperparameters.from_values({"activation": activation}), shape)
    assert type(model[2]).__name__.lower() == activation.replace("_", "")


def test_dropout_drops_while_training_only(shape: DataShape) -> None:
    model = MLP(MLPHyperparameters(dropout=0.5), shape)
    features = torch.randn(4, *shape.features)
    assert not torch.equal(model.train()(features), model(features))
    assert torch.equal(model.eval()(features), model(features))


def draw_one(family: Family, overrides: dict[str, Any], seed: int = 0) -> tuple[optuna.Trial, OwnHyperparameters]:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    drawn = family.draw(trial, family.search_space(overrides))
    assert isinstance(drawn, OwnHyperparameters)
    return trial, drawn


def test_an_own_class_is_drawn_built_and_trained_with_the_rest(tmp_path: Path, shape: DataShape) -> None:
    family = family_named(write_net(tmp_path))
    assert family.name == "net.py:Net"
    assert set(family.own_names) == {"kind", "units_narrow", "units_wide", "slope"}
    trial, drawn = draw_one(family, {})
    assert {"learning_rate", "optimizer", "kind", "slope"} <= set(trial.params)
    assert drawn.own["kind"] == trial.params["kind"]
    model = build_model(family, drawn, shape)
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_a_job_overrides_what_an_own_class_suggests(tmp_path: Path) -> None:
    family = family_named(write_net(tmp_path))
    overrides = {"kind": "wide", "units_wide": [20, 24], "slope": {"low": 0.1, "high": 0.2}, "optimizer": "adam"}
    for seed in range(10):
        trial, drawn = draw_one(family, overrides, seed)
        assert drawn.own["kind"] == "wide"
        assert drawn.own["units"] in (20, 24)
        assert 0.1 <= float(drawn.own["slope"]) <= 0.2  # type: ignore[arg-type]
        assert "kind" not in trial.params
    with pytest.raises(ModelError, match=r"search\.space\.kind must be among \('narrow', 'wide'\), found 'huge'"):
        draw_one(family, {"kind": ["huge"]})
    with pytest.raises(
        ValueError,
        match=r"slop is not a hyperparameter of net\.py:Net, found 1; write slope \(known are .*units_narrow",
    ):
        family.search_space({"slop": 1})


def test_an_edited_file_is_another_model(tmp_path: Path) -> None:
    before = family_named(write_net(tmp_path))
    assert family_named(write_net(tmp_path)) is before
    after = family_named(write_net(tmp_path, NET.replace('"slope"', '"bend"')))
    assert "bend" in after.own_names
    assert after.code != before.code


def test_a_class_that_suggests_nothing_is_tuned_by_its_training_alone(tmp_path: Path, shape: DataShape) -> None:
    text = (
        "import torch\n\n\nclass Net(torch.nn.Sequential):\n"
        "    def __init__(self, hyperparameters, shape):\n"
        "        super().__init__(torch.nn.Flatten(), torch.nn.LazyLinear(shape.outputs))\n"
    )
    family = family_named(write_net(tmp_path, text))
    assert family.own_names == ()
    assert draw_one(family, {})[1].own == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("class Net:\n    pass\n", "holds no nn.Module named Net; correct the name or add the class"),
        ("raise OSError('no')\n", "raised OSError when it was loaded: no; mend it"),
        ("class Net(\n", "raised SyntaxError when it was loaded"),
        (NET.replace('"slope", 0.01', '"learning_rate", 0.01'), "draws learning_rate, which every model is tuned by"),
        (NET.replace("return {", "return [] and {"), "suggest of net.py:Net must return a dict, found list"),
        (NET.replace("0.01, 0.3", "0.3, 0.01"), "suggest of net.py:Net raised ValueError"),
    ],
)
def test_a_file_that_makes_no_model_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ModelError) as error:
        family_named(write_net(tmp_path, text))
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["transformer", "nowhere/net.py:Net", "net.py"])
def test_an_unknown_model_is_one_sentence(name: str) -> None:
    with pytest.raises(ModelError, match=r"known are mlp, cnn|is not a Python file that can be read"):
        family_named(name)


@pytest.mark.parametrize("returns", ["features.flatten(1)", "[1, 2]", "self.layers(features)[:1]"])
def test_outputs_of_a_wrong_shape_are_one_sentence(tmp_path: Path, shape: DataShape, returns: str) -> None:
    family = family_named(write_net(tmp_path, NET.replace("return self.layers(features)", f"return {returns}")))
    model = build_model(family, draw_one(family, {})[1], shape)
    with pytest.raises(ModelError, match=r"net\.py:Net must return outputs of shape \(3, 10\), found "):
        model(torch.zeros(3, 1, 8, 8))
