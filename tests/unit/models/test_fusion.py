"""Whether a user's model is fused is found out by a few steps: nothing that is fused ends other than alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.families.family import family_named
from models.fused.fusion import fusion_signature
from models.fused.group import NotFusable
from models.rows.batches import Split
from models.train import fusion_for, train_all
from models.training.loop import train
from models.training.terms import Resumable, Trained, Training, new_model
from tasks.data.prepared import Prepared
from tests.unit.models.test_fused import assert_as_alone, fused, setting_of, trainings
from tests.unit.models.test_solo import assert_equal

NETS = """
import random

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations

CALLS = [0]


class Plain(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.hidden = nn.Linear(64, 16)
        self.out = nn.Linear(16, shape.outputs)
        self.setup()

    def setup(self):
        pass

    def forward(self, features):
        return self.out(self.hidden(features.flatten(1)).relu())


class AssignsBuffer(Plain):
    def setup(self):
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, features):
        features = features.flatten(1)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * features.detach().mean(0)
        return super().forward(features - 3 * self.mean)


class CopiesIntoBuffer(AssignsBuffer):
    def forward(self, features):
        features = features.flatten(1)
        if self.training:
            self.mean.copy_(0.9 * self.mean + 0.1 * features.detach().mean(0))
        return Plain.forward(self, features - 3 * self.mean)


class Counts(Plain):
    def setup(self):
        self.seen = 0

    def forward(self, features):
        self.seen += self.training
        return super().forward(features) * min(1.0, self.seen / 20)


class CountsInADict(Plain):
    def setup(self):
        self.state = {"seen": [0]}

    def forward(self, features):
        self.state["seen"][0] += 1
        return super().forward(features)


class CountsGlobally(Plain):
    def forward(self, features):
        CALLS[0] += 1
        return super().forward(features) * min(1.0, CALLS[0] / 1000)


class CountsInItsClass(Plain):
    calls = 0

    def forward(self, features):
        type(self).calls += 1
        return super().forward(features) * min(1.0, self.calls / 1000)


class Momentum(Plain):
    def setup(self):
        self.mean = torch.zeros(64)

    def forward(self, features):
        features = features.flatten(1)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * features.detach().mean(0)
        return super().forward(features - self.mean)


class CountsInATensor(Plain):
    def setup(self):
        self.seen = torch.zeros(())

    def forward(self, features):
        if self.training:
            self.seen += 1
        return super().forward(features)


class KeepsActivations(Plain):
    def setup(self):
        self.kept = None
        self.hidden.register_forward_hook(self.keep)

    def keep(self, module, inputs, outputs):
        self.kept = outputs


class OwnDropout(Plain):
    def forward(self, features):
        if self.training:
            features = features * (torch.rand(features.shape) > 0.2).to(features)
        return super().forward(features)


class NumpyDropout(Plain):
    def forward(self, features):
        if self.training and np.random.random() < 0.01:
            return super().forward(0 * features)
        return super().forward(features)


class RandomDepth(Plain):
    def forward(self, features):
        if self.training and random.random() < 0.01:
            return super().forward(0 * features)
        return super().forward(features)


class InAList(Plain):
    def setup(self):
        self.more = [nn.Linear(64, 64)]

    def forward(self, features):
        return super().forward(self.more[0](features.flatten(1)))


class Spectral(Plain):
    def setup(self):
        parametrizations.spectral_norm(self.hidden)


class Recurrent(Plain):
    def setup(self):
        self.rows = nn.GRU(8, 64, batch_first=True)

    def forward(self, features):
        return super().forward(self.rows(features.flatten(1).unflatten(1, (8, 8)))[0][:, -1])


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(context, features):
        return features.sign()

    @staticmethod
    def backward(context, gradient):
        return gradient


class CustomFunction(Plain):
    def forward(self, features):
        return super().forward(Sign.apply(features))


class SeveralTypes(Plain):
    def setup(self):
        self.out.double()

    def forward(self, features):
        return self.out(self.hidden(features.flatten(1)).relu().double())


class CountsLate(Plain):
    def setup(self):
        self.seen = 0

    def forward(self, features):
        self.seen += self.training and len(features) == 64
        return super().forward(features) * (1 if self.seen < 4 else 3)


class WeightNorm(Plain):
    def setup(self):
        parametrizations.weight_norm(self.hidden)


class Hooked(Plain):
    def setup(self):
        self.hidden.register_forward_hook(lambda module, inputs, outputs: 2 * outputs)


class Groups(Plain):
    def setup(self):
        self.hidden = nn.Sequential(nn.Linear(64, 16), nn.GroupNorm(4, 16), nn.Dropout(0.2), nn.BatchNorm1d(16))


class AnyRows(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.layers = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(shape.outputs))

    def forward(self, features):
        return self.layers(features)


class Constant(Plain):
    def setup(self):
        self.frequencies = torch.arange(64.0)
        self.table = np.ones(3)

    def forward(self, features):
        return super().forward(features.flatten(1) * self.frequencies.cos())
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("AssignsBuffer", "do not train as each does alone"),
        ("Counts", "its attribute model.seen changes as it is trained"),
        ("CountsInADict", "its attribute model.state changes as it is trained"),
        ("CountsGlobally", "do not train as each does alone"),
        ("CountsInItsClass", "do not train as each does alone"),
        ("Momentum", "its attribute model.mean changes as it is trained"),
        ("CountsInATensor", "its attribute model.seen changes as it is trained"),
        ("KeepsActivations", "its attribute model.kept changes as it is trained"),
        ("OwnDropout", "random operation"),
        ("NumpyDropout", "it draws random numbers that do not come from torch"),
        ("RandomDepth", "it draws random numbers that do not come from torch"),
        ("InAList", "one alone does not give what it gave among others"),
        ("WeightNorm", "There is a performance drop"),
        ("Spectral", "aten::div.out"),
        ("Recurrent", "aten::gru.input"),
        ("CustomFunction", "setup_context"),
        ("SeveralTypes", "its parameters have several types"),
    ],
)
def test_what_a_step_makes_another_of_is_trained_alone(prepared: Prepared, nets: Path, name: str, reason: str) -> None:
    setting = setting_of(prepared, f"{nets}:{name}", rows=100)
    some = trainings(setting, {}, {}, optimizer="momentum")
    fusion = fusion_for(setting, some[0])
    assert fusion.members == 1
    assert reason in fusion.reason
    outcomes = dict(train_all(setting, some))
    assert all(isinstance(outcome, Trained) for outcome in outcomes.values())
    if "Counts" not in name and name not in ("NumpyDropout", "RandomDepth"):  # which nothing makes equal
        for place, training in enumerate(some):
            assert_equal(outcomes[place], train(setting, training))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["CopiesIntoBuffer", "Hooked", "Groups", "Constant"])
def test_what_trains_as_alone_is_fused(prepared: Prepared, nets: Path, name: str) -> None:
    setting = setting_of(prepared, f"{nets}:{name}", rows=150)
    some = trainings(setting, {}, {"learning_rate": 0.03}, optimizer="momentum")
    assert fusion_for(setting, some[0]).members > 100
    assert_as_alone(setting, some, 1e-3)


def test_a_state_that_shows_after_the_trial_is_found_at_the_end(prepared: Prepared, nets: Path, tmp_path: Path) -> None:
    """A group's outcome is compared with what its members judged, and is trained again alone where they differ: from
    the beginning, not from what the group wrote."""
    setting = setting_of(prepared, f"{nets}:CountsLate")
    some = trainings(setting, {}, {})
    assert fusion_for(setting, some[0]).members > 1
    with pytest.raises(NotFusable, match="one alone does not give what it gave among others"):
        fused(setting, some)
    kept = [
        replace(training, resumable=Resumable(path=tmp_path / f"{place}", key="k", interval_seconds=0))
        for place, training in enumerate(some)
    ]
    outcomes = dict(train_all(setting, kept))
    for place, training in enumerate(some):
        assert_equal(outcomes[place], train(setting, training))  # type: ignore[arg-type]


def test_a_target_that_does_not_vary_in_the_first_rows_is_no_obstacle(
    prepared_regression: Prepared, nets: Path
) -> None:
    """As where most of a regression's values are 0."""
    setting = setting_of(prepared_regression, f"{nets}:AnyRows")
    target = torch.where(torch.arange(len(setting.training)) < 50, 0.0, setting.training.target.cpu())
    training_rows = Split(features=setting.training.features, target=target.to(setting.training.target))
    setting = replace(setting, training=training_rows)
    (training,) = trainings(setting, {})
    assert fusion_for(setting, training).reason == ""


def test_a_trial_leaves_no_trace(prepared: Prepared, nets: Path) -> None:
    """Neither in the rows nor in the random generators; a structure is tried once."""
    setting = setting_of(prepared, f"{nets}:Groups")
    (training,) = trainings(setting, {})
    rows, state = setting.training.all_features.clone(), torch.random.get_rng_state()
    first = fusion_for(setting, training)
    assert torch.equal(setting.training.all_features, rows)
    assert torch.equal(torch.random.get_rng_state(), state)
    family = family_named(f"{nets}:Groups")
    assert setting.family == family
    assert setting.obstacles == {"{}": None}
    setting.obstacles["{}"] = "it was tried before"
    assert fusion_for(setting, training).reason == "it was tried before"
    assert first.members > 1


def test_equal_constants_are_one_structure_and_other_ones_another(prepared: Prepared, nets: Path) -> None:
    setting = setting_of(prepared, f"{nets}:Constant")
    (training,) = trainings(setting, {})

    def signature_with(change: float, table: np.ndarray[tuple[int], np.dtype[np.float64]]) -> object:
        model = new_model(setting, training)
        net = model.model
        net.frequencies, net.table = net.frequencies + change, table  # type: ignore[union-attr, operator]
        return fusion_signature(model, training)

    plain = signature_with(0, np.ones(3))
    assert plain == signature_with(0, np.ones(3))
    assert plain != signature_with(1, np.ones(3))
    assert plain != signature_with(0, np.zeros(3))
    assert isinstance(training, Training)
