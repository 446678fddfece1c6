"""A user's module: whatever it does to its rows stays its own, and what cannot be trained or served is a sentence."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from models.evaluation.evaluate import latency_ms, parameter_count, predict_outputs, sharpness
from models.families.errors import ModelError
from models.families.family import family_named
from models.families.networks import build_model
from models.families.own_module import own_module_of, probabilities_in_words
from models.rows.shapes import DataShape
from models.train import train_all
from models.training.loop import train
from models.training.terms import Trained, Training, mean_loss
from tasks.data.prepared import Prepared
from tasks.promotion.servable import export_onnx
from tests.conftest import train_on
from tests.unit.models.test_families import write_net
from tests.unit.models.test_solo import assert_equal

NETS = """
import math
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.hidden = nn.Linear(math.prod(shape.features), 16)
        self.out = nn.Linear(16, shape.outputs)

    def forward(self, features):
        return self.out(self.hidden(features.flatten(1)).relu())


class InPlace(Plain):
    def forward(self, features):
        features *= 0.5
        features.flatten(1)[:, 0] = 0
        return super().forward(features)


class WritesData(Plain):
    def forward(self, features):
        features.data.zero_()
        return super().forward(features)


class WritesArray(Plain):
    def forward(self, features):
        if not self.training:
            features.detach().cpu().numpy()[...] = 0
        return super().forward(features)


class Keeps(Plain):
    kept = None

    def forward(self, features):
        if self.kept is not None:
            self.kept.zero_()
        self.kept = features
        return super().forward(features)


class GivesRowsBack(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.outputs = shape.outputs

    def forward(self, features):
        return features.flatten(1)[:, : self.outputs].mul_(self.scale)


class Pops(Plain):
    def __init__(self, hyperparameters, shape):
        hyperparameters.pop("units", None)
        hyperparameters["popped"] = True
        super().__init__(hyperparameters, shape)


class Lazy(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(shape.outputs)
        )

    def forward(self, features):
        return self.layers(features)


class LazyUnused(Plain):
    def __init__(self, hyperparameters, shape):
        super().__init__(hyperparameters, shape)
        self.spare = nn.LazyLinear(4)


class Squeezes(Plain):
    def forward(self, features):
        return super().forward(features).unsqueeze(-1).squeeze()


class CachesInEvaluation(Plain):
    table = None

    def forward(self, features):
        if self.table is None:
            self.table = torch.ones_like(features[:1].flatten(1))
        return super().forward(features.flatten(1) * self.table * nn.functional.softplus(self.hidden.bias[0]))


class Unsqueezes(Plain):
    def forward(self, features):
        return super().forward(features).unsqueeze(1)


class Flat(Plain):
    def forward(self, features):
        return super().forward(features).squeeze(-1)


class Double(Plain):
    def __init__(self, hyperparameters, shape):
        super().__init__(hyperparameters, shape)
        self.double()

    def forward(self, features):
        return super().forward(features.double())


class Half(Plain):
    def forward(self, features):
        return super().forward(features).bfloat16()


class Pair(Plain):
    def forward(self, features):
        return super().forward(features), features


class Classes(Plain):
    def forward(self, features):
        return super().forward(features).argmax(dim=1)


class Detached(Plain):
    def forward(self, features):
        return super().forward(features).detach()


class NeedsTwo(Plain):
    def forward(self, features):
        assert len(features) > 1, "two rows at least"
        return super().forward(features)


class OfTheBatch(Plain):
    def forward(self, features):
        return super().forward((features - features.mean(dim=0)) / (features.std(dim=0) + 1e-3))


class LooksUp(Plain):
    def __init__(self, hyperparameters, shape):
        super().__init__(hyperparameters, shape)
        self.table = nn.Embedding(17, 1)

    def forward(self, features):
        return super().forward(self.table((9 * features).flatten(1).long()).squeeze(-1))


class InAList(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.layers = [nn.Linear(math.prod(shape.features), shape.outputs)]

    def forward(self, features):
        return self.layers[0](features.flatten(1))


class AllFrozen(Plain):
    def __init__(self, hyperparameters, shape):
        super().__init__(hyperparameters, shape)
        self.requires_grad_(False)
"""

OF_ROWS = DataShape(features=(4,), outputs=3)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


def built(nets: Path, name: str, shape: DataShape = OF_ROWS) -> nn.Module:
    family = family_named(f"{nets}:{name}")
    return build_model(family, family.hyperparameters.from_values({}), shape)


WRITERS = ("InPlace", "WritesData", "WritesArray", "Keeps", "GivesRowsBack")


@pytest.mark.parametrize("name", WRITERS)
def test_a_model_that_writes_into_its_rows_changes_them_for_no_one_else(
    prepared: Prepared, nets: Path, name: str
) -> None:
    """Fused and alone, in training, evaluation, and whatever measures it; equal trainings end alike."""
    rows, unseen = prepared.training.all_features, prepared.validation.all_features
    before = rows.clone(), unseen.clone(), prepared.training.target.clone(), prepared.validation.target.clone()
    family = family_named(f"{nets}:{name}")
    setting = prepared.setting(family, "accuracy")
    training = Training(hyperparameters=family.hyperparameters.from_values({"epochs": 2}), seed=3)
    first, second = (dict(train_all(setting, [training, training])) for _ in range(2))
    alone = train(setting, training)
    model = alone.model
    sharpness(model, lambda: mean_loss(model, prepared.training.first(64)))
    latency_ms(model, rows[:1])
    predict_outputs(nn.Sequential(nn.Identity(), model), unseen)
    after = rows, unseen, prepared.training.target, prepared.validation.target
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    outcomes = [*first.values(), *second.values()]
    assert all(isinstance(outcome, Trained) for outcome in outcomes)
    for outcome in outcomes[1:]:
        assert_equal(outcome, outcomes[0])  # type: ignore[arg-type]


def test_a_constructor_may_take_out_of_its_hyperparameters(nets: Path) -> None:
    """What was drawn is what is published, and what the next model of the trial is built from."""
    family = family_named(f"{nets}:Pops")
    chosen = family.hyperparameters.from_values({"own": {"units": 3}})
    build_model(family, chosen, OF_ROWS, members=2)
    assert chosen.model_dump()["own"] == {"units": 3}


def test_lazy_layers_have_their_sizes_before_anything_looks(prepared: Prepared, nets: Path) -> None:
    model = built(nets, "Lazy", prepared.shape)
    inputs, classes = math.prod(prepared.shape.features), prepared.shape.outputs
    assert parameter_count(model) == 16 * (inputs + 1) + 2 * 16 + classes * (16 + 1)
    assert model.training
    assert not model.state_dict()["model.layers.2.num_batches_tracked"]
    trained = train_on(prepared, f"{nets}:Lazy", seed=1)
    assert_equal(train_on(prepared, f"{nets}:Lazy", seed=1), trained)
    again = built(nets, "Lazy", prepared.shape)
    again.load_state_dict(trained.model.state_dict())
    with pytest.raises(ModelError, match=r"nets\.py:LazyUnused must use each of its lazy layers"):
        built(nets, "LazyUnused", prepared.shape)


@pytest.mark.parametrize("name", ["Unsqueezes", "Flat", "Double", "Half"])
@pytest.mark.parametrize("shape", [OF_ROWS, DataShape(features=(4,), outputs=1, problem="regression")])
def test_outputs_of_another_rank_or_type_are_taken_for_what_they_are(nets: Path, name: str, shape: DataShape) -> None:
    """One row, and several; classes, and a value."""
    torch.manual_seed(0)
    model = built(nets, name, shape).eval()
    rows = torch.randn(5, 4)
    own = own_module_of(model)
    assert own is not None
    own.try_out(rows)
    outputs = model(rows)
    assert outputs.shape == ((5,) if shape.problem == "regression" else (5, 3))
    assert own(rows).dtype == torch.float32
    alone = torch.cat([model(rows[place : place + 1]) for place in range(5)])
    torch.testing.assert_close(alone, outputs, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Unsqueezes", "InPlace"])
def test_the_onnx_program_of_such_a_module_gives_what_it_gives(nets: Path, tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = built(nets, name).eval()
    rows = torch.randn(5, 4)
    export_onnx(model, rows[:2].clone(), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for some in (rows, rows[:1]):
        (outputs,) = session.run(None, {"features": some.numpy()})
        assert outputs.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(outputs), predict_outputs(model, some), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Pair", "must return outputs of shape (8, 10), found a tuple; return the tensor of outputs alone"),
        ("Classes", "must return outputs of shape (8, 10), found torch.int64; return the outputs before argmax"),
        ("Detached", "must give outputs that its parameters take part in, found none that does"),
        ("NeedsTwo", "must take a single row, as a champion is asked for, but AssertionError: two rows at least"),
        ("Squeezes", "must give as many dimensions for a single row as for several, found outputs of shape (10,) and "),
        ("LooksUp", "raised IndexError: index out of range in self; where it looks whole numbers up"),
        ("InAList", "must have a parameter to train, found none; keep its layers as attributes"),
        ("AllFrozen", "must have a parameter to train, found none"),
    ],
)
def test_what_cannot_be_trained_or_served_is_a_sentence_before_it_is_trained(
    prepared: Prepared, nets: Path, name: str, says: str
) -> None:
    family = family_named(f"{nets}:{name}")
    training = Training(hyperparameters=family.hyperparameters.from_values({}), seed=0)
    heard: list[Any] = []

    def hear(epochs: Any) -> tuple[()]:
        heard.append(epochs)
        return ()

    outcomes = dict(train_all(prepared.setting(family, "accuracy"), [training, training], hear))
    for outcome in outcomes.values():
        assert isinstance(outcome, ModelError)
        assert str(outcome).startswith(f"nets.py:{name} ")
        assert says in str(outcome)
    assert heard == []


def test_what_a_model_keeps_from_an_evaluation_serves_in_training(prepared: Prepared, nets: Path) -> None:
    model = built(nets, "CachesInEvaluation", prepared.shape)
    predict_outputs(model.to(prepared.training.target.device), prepared.validation.features)
    model(prepared.training.all_features[:8]).sum().backward()


@pytest.mark.filterwarnings("ignore:std")
def test_statistics_of_a_batch_of_one_are_a_sentence(nets: Path) -> None:
    model = built(nets, "OfTheBatch")
    with pytest.raises(ModelError, match=r"must give finite outputs for a single row as it does for 8, found \[nan"):
        model.try_out(torch.randn(8, 4))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("ending", "says"),
    [
        (lambda logits: logits.softmax(dim=1), "sum to 1 in each row, as probabilities do"),
        (torch.sigmoid, "lie between 0 and 1, as probabilities do"),
        (lambda logits: logits, ""),
        (lambda logits: logits.log_softmax(dim=1), ""),
        (torch.relu, ""),
    ],
)
def test_probabilities_are_noticed_where_logits_are_expected(ending: Callable[[Tensor], Tensor], says: str) -> None:
    logits = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    found = probabilities_in_words(ending(logits))
    assert says in found
    assert bool(found) == bool(says)


EMBEDDING = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.rows = nn.Embedding(50, 4, sparse=SPARSE)
        self.out = nn.Linear(4, shape.outputs)

    def forward(self, features):
        return self.out(self.rows((9 * features).flatten(1).long().clamp(0, 49)).mean(dim=1))
"""


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "rmsprop", "adagrad"])
def test_sparse_gradients_train_as_dense_ones(prepared: Prepared, tmp_path: Path, optimizer: str) -> None:
    found = []
    for sparse in ("True", "False"):
        (tmp_path / sparse).mkdir()
        net = write_net(tmp_path / sparse, EMBEDDING.replace("SPARSE", sparse))
        trained = train_on(prepared, net, optimizer=optimizer, l1=1e-4, gradient_clip_norm=0.5, epochs=2)
        found.append([epoch.train_loss for epoch in trained.epochs])
        assert_sharpness_is_measured(trained.model, prepared)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def assert_sharpness_is_measured(model: nn.Module, prepared: Prepared) -> None:
    """Only that it can be measured."""
    assert math.isfinite(sharpness(model, lambda: mean_loss(model, prepared.training.first(64))))
