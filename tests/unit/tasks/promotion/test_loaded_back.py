"""What is judged is what ships: a version is loaded in a fresh process before it can be the champion, and a model that
is another one once it is loaded is found out, before the search where one step of training shows it."""

import math
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from infra.store.opening import open_store
from infra.store.protocol import Store
from tasks.data.prepared import Prepared
from tasks.job import TuningJob
from tasks.promotion.loaded_back import Differs, WouldNotShip, compare, rehearse
from tasks.promotion.promote import promote
from tasks.promotion.servable import write_servable
from tasks.promotion.verdict import Verdict
from tasks.registry.champion import load_champion
from tasks.registry.log import Promotion, append_promotion, history
from tasks.trainer.fresh import FreshProcess, Loaded
from tasks.trainer.local import LocalTrainer
from tests.conftest import CPU, make_job
from tests.servers import free_port
from tests.unit.models.test_families import TIED_NET, write_net
from tests.unit.tasks.promotion.test_promote import NOW, a_table, judged

NET = """
import torch
import torch.nn.functional as F
from torch import nn

{top}

class Net(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.a, self.out = nn.Linear(64, 16), nn.Linear(16, shape.outputs)
{init}

    def forward(self, rows):
        rows = rows.flatten(1)
{forward}
"""


def net(forward: str, init: str = "", top: str = "") -> str:
    indented = (textwrap.indent(textwrap.dedent(part).strip(), " " * 8) for part in (init, forward))
    init, forward = indented
    return NET.format(top=textwrap.dedent(top).strip(), init=init, forward=forward)


COUNTER = net(
    """
    self.seen += self.training
    return self.out(torch.tanh(self.a(rows)) * min(1.0, self.seen / 20))
    """,
    "self.seen = 0",
)
STATE, CHANCE, BATCH = "state outside its state_dict", "draws at random in evaluation", "depends on the batch"
UNSHIPPABLE = {
    "a counter in Python": (COUNTER, STATE),
    "layers in a list": (
        net(
            """
            for layer in self.hidden:
                rows = torch.relu(layer(rows))
            return self.out(self.a(rows))
            """,
            "self.hidden = [nn.Linear(64, 64) for _ in range(2)]",
        ),
        STATE,
    ),
    "tensors in a dict": (
        net("return self.out(self.a(rows) + self.more['b'])", "self.more = {'b': torch.randn(16)}"),
        STATE,
    ),
    "a buffer that is not persistent": (
        net(
            """
            if self.training:
                self.mean.add_(rows.detach().mean())
            return self.out(self.a(rows)) * (1 + self.mean)
            """,
            "self.register_buffer('mean', torch.ones(()), persistent=False)",
        ),
        STATE,
    ),
    "a global that training changes": (
        net(
            """
            STEPS.append(self.training)
            return self.out(self.a(rows)) * (1 + sum(STEPS))
            """,
            top="STEPS = []",
        ),
        STATE,
    ),
    "statistics as a plain attribute": (
        net(
            """
            if self.training:
                self.mean = rows.detach().mean(0)
            return self.out(self.a(rows - self.mean))
            """,
            "self.mean = 0",
        ),
        STATE,
    ),
    "what forward learns from the first batch": (
        net(
            """
            if self.scale is None:
                self.scale = 3 * rows.detach().abs().mean()
            return self.out(self.a(rows) / self.scale)
            """,
            "self.scale = None",
        ),
        "other outputs than were judged",
    ),
    "dropout that is always on": (net("return self.out(F.dropout(self.a(rows), 0.5, training=True))"), CHANCE),
    "weights drawn in forward": (net("return self.out(self.a(rows) @ torch.randn(16, 16))"), CHANCE),
    "centred by the batch": (net("return self.out(self.a(rows - rows.mean(0)))"), BATCH),
    "a softmax over the batch": (net("return self.out(F.softmax(self.a(rows), dim=0))"), BATCH),
    "what evaluation counts": (
        net("self.seen += 1\nreturn self.out(self.a(rows)) * (1 + self.seen / 100)", "self.seen = 0"),
        "changes the model",
    ),
    "a mean of earlier weights in a list": (
        net(
            """
            if self.training:
                self.kept = [0.9 * old + 0.1 * new.detach() for old, new in zip(self.kept, self.a.parameters())]
            return self.out(F.linear(rows, *self.kept)) + 0 * self.a(rows).sum()
            """,
            "self.kept = [weight.detach().clone() for weight in self.a.parameters()]",
        ),
        STATE,
    ),
    "an attribute drawn where it is built": (
        net("return self.out(self.a(rows)) * self.scale", "import random\nself.scale = random.random()"),
        STATE,
    ),
    "layers made in forward": (
        net(
            """
            if not hasattr(self, 'late'):
                self.late = nn.Linear(16, 16)
            return self.out(self.late(self.a(rows)))
            """
        ),
        r"do not fit a model that was just built .*late.*make all parameters",
    ),
}
SHIPPABLE = {
    "tied": TIED_NET,
    "a lambda as an attribute": net("return self.out(self.act(self.a(rows)))", "self.act = lambda x: x.sin()"),
    "constants in a dict": net("return self.out(self.a(rows) * self.c['two'])", "self.c = {'two': torch.tensor(2.0)}"),
    "batch norm": net("return self.out(self.norm(self.a(rows)))", "self.norm = nn.BatchNorm1d(16)"),
    "a counter that counts in training only": net(
        """
        self.seen += self.training
        return self.out(self.a(rows)) if self.training or self.seen >= 0 else rows
        """,
        "self.seen = 0",
    ),
    "squeezed": net("return self.out(self.a(rows)).unsqueeze(-1).squeeze()"),
    "masked by torch.nn.utils.prune": net(
        "return self.out(self.a(rows))",
        "from torch.nn.utils import prune\nprune.l1_unstructured(self.a, 'weight', 0.5)",
    ),
    "recurrent": net(
        "return self.out(self.more(rows.view(-1, 8, 8))[0][:, -1])",
        "self.more = nn.LSTM(8, 16, 2, batch_first=True, dropout=0.2)",
    ),
    "of several types": net(
        "return self.out(self.more(rows.double()).bfloat16()).float()",
        "self.more = nn.Linear(64, 16).double()\nself.out.bfloat16()",
    ),
    "extra state as a tensor": net(
        "self.seen += self.training\nreturn self.out(self.a(rows)) * (1 + self.seen)",
        "self.seen = 0",
    )
    + """
    def get_extra_state(self):
        return torch.tensor(self.seen)

    def set_extra_state(self, state):
        self.seen = int(state)
""",
    "as good as constant": net("return self.out(0 * self.a(rows))"),
}


@pytest.fixture(scope="module")
def fresh() -> Iterator[FreshProcess]:
    with FreshProcess() as process:
        yield process


@pytest.mark.process
@pytest.mark.parametrize("what", UNSHIPPABLE)
def test_one_step_of_training_shows_that_a_model_would_not_ship(
    prepared: Prepared, fresh: FreshProcess, tmp_path: Path, what: str
) -> None:
    text, cause = UNSHIPPABLE[what]
    job = make_job(model=write_net(tmp_path, text), search={"space": {"epochs": 1}})
    says = rf"model .*net\.py:Net cannot be published as it is trained, .* in a fresh process, .*{cause}"
    with pytest.raises(WouldNotShip, match=says):
        rehearse(job, prepared.snapshot, LocalTrainer(job, prepared), fresh)


UNSAVED = {
    "more .*found a tensor of layout torch.sparse_coo": net(
        "return self.out(self.a(rows))", "self.register_buffer('more', torch.eye(16).to_sparse())"
    ),
    "_extra_state .*found dict": net("return self.out(self.a(rows))")
    + "    def get_extra_state(self):\n        return {}\n",
}


@pytest.mark.process
@pytest.mark.parametrize("found", UNSAVED)
def test_what_cannot_be_saved_is_named_before_the_search(
    prepared: Prepared, fresh: FreshProcess, tmp_path: Path, found: str
) -> None:
    job = make_job(model=write_net(tmp_path, UNSAVED[found]), search={"space": {"epochs": 1}})
    with pytest.raises(WouldNotShip, match=rf"after one step of training, model\.{found}; keep a sparse"):
        rehearse(job, prepared.snapshot, LocalTrainer(job, prepared), fresh)


@pytest.mark.process
@pytest.mark.parametrize("what", ["mlp", "cnn", *SHIPPABLE])
def test_a_model_that_is_the_same_once_it_is_loaded_passes(
    prepared: Prepared, fresh: FreshProcess, tmp_path: Path, what: str
) -> None:
    model = write_net(tmp_path, SHIPPABLE[what]) if what in SHIPPABLE else what
    job = make_job(model=model, search={"space": {"epochs": 1}})
    rehearse(job, prepared.snapshot, LocalTrainer(job, prepared), fresh)


def loaded(outputs: torch.Tensor, **others: torch.Tensor) -> Loaded:
    return Loaded(**{"outputs": outputs, "again": outputs[:256], "alone": outputs[:8]} | others, code_changed=False)


LOGITS = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
# Logits, also of a large offset, and a regression's values in units that they are small or large in, or vary little.
JUDGED = {
    "logits": LOGITS,
    "large logits": 1e4 * LOGITS + 3e5,
    **{
        f"{scale:g} around {at:g}": at + scale * LOGITS[:, 0].double()
        for scale, at in ((1e-23, 0), (0.01, 1e6), (1e20, 0))
    },
}


@pytest.mark.parametrize("what", JUDGED)
def test_rounding_is_forgiven_and_a_hundredth_of_the_spread_is_not(what: str) -> None:
    judged = JUDGED[what]
    spread = float(judged.std())
    for by in (0.0, 1e-5):
        assert compare(judged, loaded(judged + by * spread), "cpu") <= 2e-5 * spread
    moved = judged.clone()
    moved[17] += spread / 100
    for wrong in (moved, judged.flip(0), judged[:-1], moved * math.nan):
        with pytest.raises(Differs, match="state outside its state_dict"):
            compare(judged, loaded(wrong), "cpu")
    assert compare(judged, loaded(moved), "cuda") > 0  # a GPU's convolutions are no more exact


@pytest.mark.parametrize(("what", "cause"), [("again", "draws at random"), ("alone", "depends on the batch")])
def test_a_single_row_and_a_second_time_count_as_well(what: str, cause: str) -> None:
    with pytest.raises(Differs, match=cause):
        compare(LOGITS, loaded(LOGITS, **{what: LOGITS[: 256 if what == "again" else 8] + 1}), "cpu")


def test_a_model_that_was_edited_in_the_night_is_named() -> None:
    with pytest.raises(Differs, match="the file of its model was changed in the meantime"):
        compare(LOGITS, replace(loaded(LOGITS + 1), code_changed=True), "cpu")


@pytest.mark.process
@pytest.mark.parametrize("fault", ["raise LookupError('no')", "return rows * float('nan')"])
def test_what_cannot_be_trained_is_left_to_the_trials(
    prepared: Prepared, fresh: FreshProcess, tmp_path: Path, fault: str
) -> None:
    job = make_job(model=write_net(tmp_path, net(fault)), search={"space": {"epochs": 1}})
    rehearse(job, prepared.snapshot, LocalTrainer(job, prepared), fresh)


# What the first step does not show: a gate that opens at the fifth. Read by `item`, so that each is trained alone.
LATE = net(
    """
    self.seen += self.training and rows.sum().item() < float("inf")
    return self.out(self.a(rows)) * (1 if self.seen < 5 else 2)
    """,
    "self.seen = 0",
)
OTHER_AS_ONNX = {
    "where it is exported": net("return self.out(self.a(rows)) * (2 if torch.compiler.is_exporting() else 1)"),
    "noise from a seed": net(
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return self.out(self.a(rows)) + torch.randn(10)
        """
    ),
    "the order of equal values": net(
        "return self.out(self.a(rows)) + torch.topk(self.a(rows).sign(), 10, dim=1).indices / 10"
    ),
}


@dataclass(frozen=True)
class Night:
    """A night up to its verdict, and a store; MLflow is unavailable, which costs no promotion."""

    job: TuningJob
    study: optuna.Study
    prepared: Prepared
    verdict: Verdict
    store: Store
    fresh: FreshProcess

    def promote(self, verdict: Verdict | None = None) -> tuple[Verdict, Promotion | None]:
        client = MlflowClient(f"http://127.0.0.1:{free_port()}")
        snapshot, verdict = self.prepared.snapshot, verdict or self.verdict
        return promote(self.job, self.study, snapshot, verdict, self.store, client, self.fresh, NOW)


@pytest.fixture
def night_of(
    prepared: Prepared, fresh: FreshProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Night]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def of(model: str, rows: Prepared = prepared, **content: object) -> Night:
        job = make_job(
            **{
                "model": write_net(tmp_path, model) if "\n" in model else model,
                "search": {"space": {"epochs": 1, "batch_size": 64}},
                "budget": {"trials": 2},
                "confirm": {"candidates": 1, "seeds": 2},
            }
            | content
        )
        study, verdict = judged(job, rows, tmp_path / "night")
        store = open_store((tmp_path / "store").as_uri())
        return Night(job, study, rows, verdict, store, fresh)

    return of


@pytest.mark.process
@pytest.mark.parametrize("ship", ["median", "ensemble"])
def test_a_version_that_gives_other_outputs_is_rejected_and_not_in_the_log(
    night_of: Callable[..., Night], ship: str
) -> None:
    night = night_of(LATE, confirm={"candidates": 1, "seeds": 2, "ship": ship})
    assert night.verdict.decision == "PROMOTE"
    rehearse(night.job, night.prepared.snapshot, LocalTrainer(night.job, night.prepared), night.fresh)
    assert night.verdict.reason.startswith("there was no champion yet")
    append_promotion(night.store, "small", version="0" * 16, judged=0, run="earlier", reason="", now=NOW)
    for _ in range(2 if ship == "median" else 1):  # once more, as after a kill: now the version is there already
        verdict, promotion = night.promote()
        assert promotion is None
        assert verdict.decision == "REJECT"
        assert re.fullmatch(
            r"a guard rail is broken \(loaded back: loaded in a fresh process, the model gives other outputs than were "
            r"judged, by up to [\d.]+ on 382 rows, where rounding explains [\d.]+; the likely cause is .*\)",
            verdict.reason,
        )
        assert verdict.evidence()["guard_rails"][-1]["holds"] is False
        assert [entry.run for entry in history(night.store, "small")] == ["earlier"]


@pytest.mark.process
def test_a_version_that_gives_what_was_judged_is_promoted_once(night_of: Callable[..., Night]) -> None:
    night = night_of("cnn", confirm={"candidates": 1, "seeds": 2, "ship": "ensemble"})
    for _ in range(2):
        verdict, promotion = night.promote()
        assert promotion is not None
        assert (verdict.decision, promotion.number) == ("PROMOTE", 1)
        rail = verdict.guard_rails[-1]
        assert rail.holds
        assert re.fullmatch(r"382 test rows get the judged outputs, within [\de.-]+", rail.evidence)
    champion = load_champion("small", night.store.url)
    features = night.prepared.snapshot.features("test", CPU)
    torch.testing.assert_close(champion.outputs(features), night.verdict.outputs, rtol=1e-5, atol=1e-5)
    assert len(history(night.store, "small")) == 1


@pytest.mark.process
@pytest.mark.parametrize("of", ["a regression", "a table"])
def test_a_regression_and_a_table_are_compared_as_onnx_and_in_mlflow_too(
    night_of: Callable[..., Night], prepared_regression: Prepared, tmp_path: Path, of: str
) -> None:
    if of == "a regression":
        search = {"objective": "r2", "space": {"epochs": 2}}
        night = night_of("mlp", prepared_regression, data={"source": "sklearn://diabetes"}, search=search)
    else:
        job, rows, _ = a_table(tmp_path / "data", towns=("Bonn", "Köln", "Ulm"), seed=0)
        night = night_of("mlp", rows, data={"source": job.data.source, "split_by": "number"})
    rehearse(night.job, night.prepared.snapshot, LocalTrainer(night.job, night.prepared), night.fresh)
    verdict, promotion = night.promote()
    assert promotion is not None, verdict.reason


@pytest.mark.process
@pytest.mark.parametrize("what", OTHER_AS_ONNX)
def test_an_onnx_program_that_gives_something_else_is_not_shipped(night_of: Callable[..., Night], what: str) -> None:
    night = night_of(OTHER_AS_ONNX[what])
    verdict, promotion = night.promote()
    assert (verdict.decision, promotion) == ("REJECT", None)
    assert "the ONNX program gives other outputs than were judged" in verdict.reason


def test_a_program_that_is_for_one_number_of_rows_only_is_none(tmp_path: Path) -> None:
    class Expanding(nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows + torch.arange(4.0).expand(len(rows), 4)

    assert not write_servable(tmp_path, Expanding(), torch.ones(2, 4), ("a", "b", "c", "d"), (), NOW)
    assert list(tmp_path.iterdir()) == []
