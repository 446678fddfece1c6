"""What is published: whole, the same each time, and servable by anybody."""

import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import mlflow.pyfunc
import numpy as np
import onnxruntime
import optuna
import pandas as pd
import pytest
import torch
from mlflow.pyfunc.model import PythonModel
from torch import nn

from infra.settings import Settings
from infra.store.opening import open_store
from infra.store.protocol import Store
from models.evaluation.evaluate import predict_outputs
from models.families.family import FAMILIES
from models.families.networks import build_model
from models.rows.preprocessing import Standardization
from models.rows.shapes import DataShape
from models.rows.table import encode
from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.job import TuningJob
from tasks.promotion.confirm import confirm
from tasks.promotion.gate import gate
from tasks.promotion.promote import write_version
from tasks.promotion.reproduce import reproduce
from tasks.promotion.servable import export_onnx, write_servable
from tasks.promotion.verdict import Verdict
from tasks.registry.champion import Champion, load_champion, read_champion, read_version
from tasks.registry.log import append_promotion
from tasks.registry.versions import DamagedVersion, Manifest, publish_version
from tasks.search.tune import tune
from tasks.study.memory import recall
from tasks.study.studies import FLOW_RUN, MLFLOW_RUN, open_study
from tasks.trainer.local import LocalTrainer
from tests.conftest import CPU, make_job
from tests.servers import answers, background, free_port, wait_for
from tests.unit.models.test_families import TIED_NET, write_net

pytestmark = pytest.mark.slow
NOW = datetime(2026, 11, 23, 2, 0, tzinfo=UTC)


def judged(
    job: TuningJob, prepared: Prepared, folder: Path, champion: Champion | None = None
) -> tuple[optuna.Study, Verdict]:
    """A whole night's work up to the verdict, without servers."""
    study = open_study(job, prepared.snapshot.fingerprint, folder, NOW)
    study.set_user_attr(MLFLOW_RUN, "run")
    study.set_user_attr(FLOW_RUN, None)
    recall(study, job, prepared.snapshot, champion, folder)
    tuned = tune(study, job, LocalTrainer(job, prepared), folder)
    confirmed = confirm(study, job, prepared, baseline=tuned.baseline)
    return study, gate(job, confirmed, champion, prepared.snapshot, CPU)


def write(job: TuningJob, prepared: Prepared, folder: Path) -> Manifest:
    study, verdict = judged(job, prepared, folder.with_name(f"{folder.name}-night"))
    folder.mkdir()
    return write_version(job, study, prepared.snapshot, verdict, folder, NOW)


@pytest.fixture(scope="module")
def version(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    folder = tmp_path_factory.mktemp("version") / "version"
    job = make_job(
        confirm={"candidates": 1, "seeds": 2, "ship": "ensemble"},
        promotion={"max_megabytes": 100},
        description="Digits <b>& more</b>.",
    )
    return write(job, prepared, folder), folder


@pytest.mark.parametrize(
    ("family", "values", "shape", "members"),
    [
        ("mlp", {"depth": 3, "dropout": 0.3}, DataShape(features=(1, 8, 8), outputs=10), 1),
        ("cnn", {"batch_norm": True, "depth": 3}, DataShape(features=(1, 8, 8), outputs=10), 2),
        ("mlp", {}, DataShape(features=(5,), outputs=1, problem="regression"), 2),
    ],
)
def test_the_onnx_program_gives_what_the_model_gives(
    family: str, values: dict[str, Any], shape: DataShape, members: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    chosen = FAMILIES[family]
    model = build_model(chosen, chosen.hyperparameters.from_values(values), shape, members)
    example = torch.randn(2, *shape.features)
    served = nn.Sequential(Standardization(torch.full(shape.features, 0.5), torch.full(shape.features, 2.0)), model)
    export_onnx(served, example, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for rows in (1, 7):
        features = torch.randn(rows, *shape.features)
        (outputs,) = session.run(None, {"features": features.numpy()})
        torch.testing.assert_close(torch.from_numpy(outputs), predict_outputs(served, features), rtol=1e-4, atol=1e-5)


def test_the_same_night_writes_the_same_files(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job(confirm={"candidates": 1, "seeds": 1}, budget={"trials": 2})
    first, second = (write(job, prepared, tmp_path / name) for name in ("first", "second"))
    assert first.files == second.files
    assert first.version == second.version
    text = "".join(path.read_text(errors="replace") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert str(tmp_path) not in text, "a path of this machine was published"


def test_mlflow_loads_it_and_predicts_raw_rows(version: tuple[Manifest, Path], prepared: Prepared) -> None:
    manifest, folder = version
    features = prepared.snapshot.load(CPU)["test"][0]
    table = mlflow.pyfunc.load_model(str(folder / "mlflow")).predict(features.numpy())
    assert set(table["prediction"]) <= set(manifest.classes)
    probabilities = table[[f"probability of {name}" for name in manifest.classes]].to_numpy()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    store = open_store((folder.parent / "store").as_uri())
    name = publish_version(store, manifest, folder)
    published = read_version(store, manifest.job, name, CPU)
    assert list(table["prediction"]) == published.predict(features)
    np.testing.assert_allclose(probabilities, published.outputs(features).softmax(dim=1).numpy(), rtol=1e-3, atol=1e-5)


def a_table(folder: Path, *, towns: tuple[str, ...], seed: int) -> tuple[TuningJob, Prepared, pd.DataFrame]:
    """A job on a table with every role, whose target hangs on two of its columns."""
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "number": np.arange(600) + 600 * seed,
            "age": np.where(draw.random(600) < 0.1, np.nan, draw.normal(40, 10, 600).round(1)),
            "town": draw.choice(towns, 600),
            "member": draw.choice(["yes", "no"], 600),
            "children": draw.integers(0, 4, 600),
            "since": pd.Timestamp("2020-01-01") + pd.to_timedelta(draw.integers(0, 2000, 600), unit="D"),
        }
    )
    chance = draw.random(600) < 0.1
    frame["bought"] = np.where(((frame["age"] > 40) | (frame["town"] == "Ulm")) ^ chance, "often", "never")
    folder.mkdir(exist_ok=True)
    frame.to_csv(folder / "rows.csv", index=False)
    job = make_job(
        data={"source": str(folder / "rows.csv"), "split_by": "number"},
        confirm={"candidates": 1, "seeds": 1},
        budget={"trials": 2},
    )
    return job, Prepared.load(prepare(job.data, "classification", folder / "snapshots"), CPU), frame


@dataclass(frozen=True)
class OfATable:
    """A version of a job on a table, published."""

    job: TuningJob
    prepared: Prepared
    frame: pd.DataFrame
    folder: Path
    store: Store
    name: str


@pytest.fixture(scope="module")
def of_a_table(tmp_path_factory: pytest.TempPathFactory) -> OfATable:
    folder = tmp_path_factory.mktemp("of a table")
    job, prepared, frame = a_table(folder / "data", towns=("Köln", "Ulm"), seed=0)
    manifest = write(job, prepared, folder / "version")
    store = open_store((folder / "store").as_uri())
    return OfATable(
        job, prepared, frame, folder / "version", store, publish_version(store, manifest, folder / "version")
    )


def test_a_table_is_read_alike_in_training_by_the_champion_and_where_it_is_served(
    of_a_table: OfATable, tmp_path: Path
) -> None:
    job, frame, store, name = of_a_table.job, of_a_table.frame, of_a_table.store, of_a_table.name
    published = read_version(store, job.name, name, CPU)
    splits = of_a_table.prepared.snapshot.load(CPU)
    snapshot_rows = torch.cat([splits[split][0] for split in splits])
    raw_rows = torch.from_numpy(encode(frame, published.columns))
    trained_on, read_again = (sorted(row.tobytes() for row in rows.numpy()) for rows in (snapshot_rows, raw_rows))
    assert trained_on == read_again
    served = mlflow.pyfunc.load_model(str(of_a_table.folder / "mlflow"))
    as_texts = frame.drop(columns="bought").astype({"since": str})
    as_texts.loc[0, "town"] = " Atlantis"
    for rows in (as_texts, frame.drop(columns="bought").assign(age=frame["age"].round())):
        assert list(served.predict(rows)["prediction"]) == published.predict(rows)
    assert np.mean(np.array(published.predict(frame)) == frame["bought"]) > 0.7
    assert "town (categorical)" in (of_a_table.folder / "README.md").read_text()
    again = reproduce(store, job.name, name, tmp_path / "elsewhere", CPU)
    assert again.bit_equal


EMBEDDING = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.rows = nn.Embedding(40, 4)
        self.out = nn.Linear(4 * 2, shape.outputs)

    def forward(self, features):
        return self.out(self.rows(features[:, :2].long()).flatten(1))
"""


@pytest.mark.parametrize("kind", ["table", "arrays"])
def test_raw_columns_reach_an_embedding_and_are_served_as_they_were_trained(tmp_path: Path, kind: str) -> None:
    """Whole numbers that mean nothing by their size, as they are, and categories as numbers."""
    draw = np.random.default_rng(0)
    items, towns = draw.integers(0, 40, 800), draw.choice(["Bonn", "Köln", "Ulm"], 800)
    frame = pd.DataFrame({"item": items, "age": draw.normal(40, 10, 800).round(1), "town": towns})
    often = (draw.permutation(40)[items] % 2 == 0) ^ (draw.random(800) < 0.05)
    frame["bought"] = np.where(often, "often", "never")
    pairs = np.stack([items, (towns == "Ulm").astype(np.int64)], axis=1)
    data: dict[str, object]
    if kind == "table":
        frame.to_csv(tmp_path / "rows.csv", index=False)
        data = {"source": str(tmp_path / "rows.csv"), "raw": ["item", "town"]}
    else:
        np.savez(tmp_path / "rows.npz", features=pairs, target=frame["bought"].to_numpy(dtype=str))
        data = {"source": str(tmp_path / "rows.npz"), "raw": True}
    job = make_job(
        data=data,
        model=write_net(tmp_path, EMBEDDING),
        search={"space": {"epochs": 30, "batch_size": 16, "optimizer": "adam", "learning_rate": 0.03}},
        confirm={"candidates": 1, "seeds": 1},
        budget={"trials": 1},
    )
    prepared = Prepared.load(prepare(job.data, "classification", tmp_path / "snapshots"), CPU, job.data.raw)
    manifest = write(job, prepared, tmp_path / "version")
    store = open_store((tmp_path / "store").as_uri())
    name = publish_version(store, manifest, tmp_path / "version")
    published = read_version(store, job.name, name, CPU)
    assert manifest.metrics["test"]["accuracy"] > 0.8
    rows = frame.drop(columns="bought") if kind == "table" else torch.from_numpy(pairs).float()
    served = mlflow.pyfunc.load_model(str(tmp_path / "version" / "mlflow"))
    answers = served.predict(rows if kind == "table" else pairs.astype(np.float32))
    assert list(answers["prediction"]) == published.predict(rows)
    assert reproduce(store, job.name, name, tmp_path / "elsewhere", CPU).bit_equal


def test_a_champion_is_judged_on_a_table_whose_categories_have_changed(of_a_table: OfATable, tmp_path: Path) -> None:
    append_promotion(
        of_a_table.store, of_a_table.job.name, version=of_a_table.name, judged=0, run="run", reason="first", now=NOW
    )
    champion = read_champion(of_a_table.store, of_a_table.job.name, CPU)
    assert champion is not None
    job, prepared, _ = a_table(tmp_path / "data", towns=("Bonn", "Köln", "Ulm"), seed=1)
    _, verdict = judged(job, prepared, tmp_path / "second", champion)
    test_rows = prepared.snapshot.row_counts["test"]
    assert verdict.comparison is not None
    assert verdict.comparison.rows == test_rows
    assert verdict.opponent_test is not None
    assert verdict.opponent_test["accuracy"] > 0.6
    other = job.model_copy(update={"data": job.data.model_copy(update={"split_by": None})})
    _, verdict = judged(other, prepared, tmp_path / "third", champion)
    assert (verdict.decision, verdict.rows_left_out) == ("HOLD", test_rows)


@pytest.mark.process
def test_mlflow_serves_it(version: tuple[Manifest, Path], prepared: Prepared, tmp_path: Path) -> None:
    manifest, folder = version
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder / "mlflow"), "--env-manager", "local",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    features = prepared.snapshot.load(CPU)["test"][0][:3]

    # MLflow starts its server as `uvicorn`, from the PATH.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with background(command, tmp_path / "log", MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false", PATH=path):
        wait_for(lambda: answers(f"{url}/ping"), 60, "MLflow's scoring server")
        answer = httpx.post(f"{url}/invocations", json={"inputs": features.tolist()}).raise_for_status().json()
    assert [row["prediction"] in manifest.classes for row in answer["predictions"]] == [True] * 3


def test_the_card_tells_what_a_stranger_needs(version: tuple[Manifest, Path]) -> None:
    manifest, folder = version
    card = (folder / "README.md").read_text()
    assert card.startswith("# small\n\nDigits <b>& more</b>.\n")
    for text in (
        manifest.lineage.snapshot,
        "sklearn://digits",
        f"| accuracy | {manifest.metrics['test']['accuracy']:.4f} | {manifest.intervals['accuracy'][0]:.4f} to ",
        "an ensemble of 2 models",
        "| size | 0.",
        "| learning_rate |",
        'load_champion("small")',
    ):
        assert text in card


def test_a_model_that_cannot_be_exported_is_published_without(
    prepared: Prepared, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Branching(nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features.flatten(1) if features.sum() > 0 else -features.flatten(1)

    assert not write_servable(tmp_path, Branching(), torch.ones(2, 4), ("a", "b", "c", "d"), (), NOW)
    assert "the version holds no ONNX program" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ship", ["median", "ensemble"])
def test_tied_weights_are_published_once_and_come_back_tied(prepared: Prepared, tmp_path: Path, ship: str) -> None:
    job = make_job(
        model=write_net(tmp_path, TIED_NET),
        search={"space": {"epochs": 1}},
        budget={"trials": 1},
        confirm={"candidates": 1, "seeds": 2, "ship": ship},
    )
    study, verdict = judged(job, prepared, tmp_path / "night")
    (folder := tmp_path / "version").mkdir()
    manifest = write_version(job, study, prepared.snapshot, verdict, folder, NOW)
    if ship == "median":
        (again := tmp_path / "again").mkdir()
        assert write_version(job, study, prepared.snapshot, verdict, again, NOW).version == manifest.version
    store = open_store((tmp_path / "store").as_uri())
    published = read_version(store, job.name, publish_version(store, manifest, folder), CPU)
    features = prepared.snapshot.features("test", CPU)
    winner = nn.Sequential(verdict.challenger.preprocessing, verdict.challenger.model)
    assert torch.equal(published.outputs(features), predict_outputs(winner, features))
    model = published.model.members[0] if ship == "ensemble" else published.model  # type: ignore[index]
    weights = model.state_dict()  # type: ignore[union-attr]
    assert weights["model.decoder.weight"].data_ptr() == weights["model.encoder.weight"].data_ptr()
    assert weights["model.middle.weight"].data_ptr() == weights["model.again.weight"].data_ptr()
    assert "mlflow/artifacts/model.onnx" in manifest.files


@pytest.mark.parametrize("ship", ["median", "ensemble"])
def test_a_version_is_reproduced_bit_by_bit(
    prepared: Prepared, version: tuple[Manifest, Path], tmp_path: Path, ship: str
) -> None:
    manifest, folder = version  # which is an ensemble
    if ship == "median":
        folder = tmp_path / "version"
        manifest = write(make_job(confirm={"candidates": 2, "seeds": 2}, budget={"trials": 3}), prepared, folder)
    store = open_store((tmp_path / "store").as_uri())
    name = publish_version(store, manifest, folder)
    # No snapshot lies there: the source is read again.
    found = reproduce(store, "small", name, tmp_path / "snapshots", CPU)
    assert found.bit_equal
    assert found.near
    assert found.metrics["accuracy"][0] == manifest.metrics["test"]["accuracy"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # MLflow's, of what is saved as a pickle
def test_a_pickled_mlflow_model_is_refused_in_our_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that each of our processes gets keeps MLflow from unpickling."""
    marker = tmp_path / "marker"

    class Payload(PythonModel):
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (marker,))

        def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
            return model_input

    mlflow.pyfunc.save_model(str(tmp_path / "pickled"), python_model=Payload(), pip_requirements=[])
    assert (tmp_path / "pickled/python_model.pkl").exists()
    for name, value in Settings(home=tmp_path).environment().items():
        monkeypatch.setenv(name, value)
    marker.unlink(missing_ok=True)
    with pytest.raises(mlflow.MlflowException, match="MLFLOW_ALLOW_PICKLE_DESERIALIZATION"):
        mlflow.pyfunc.load_model(str(tmp_path / "pickled"))
    assert not marker.exists()


@pytest.mark.process
def test_the_loader_has_no_way_to_unpickle(version: tuple[Manifest, Path], tmp_path: Path) -> None:
    """A whole process that loads a champion never imports a module that can run code from a file."""
    manifest, folder = version
    store = open_store((tmp_path / "store").as_uri())
    name = publish_version(store, manifest, folder)
    append_promotion(store, "small", version=name, judged=0, run="r", reason="", now=NOW)
    script = (
        "import sys, pickle, torch\n"
        "def refuse(*a, **k): raise SystemExit('unpickled')\n"
        "pickle.load = pickle.loads = torch.load = refuse\n"
        "from tasks.registry.champion import load_champion\n"
        f"print(load_champion('small', {store.url!r}).manifest.version)"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == name
    assert load_champion("small", store.url).promotion.number == 1
    assert issubclass(DamagedVersion, Exception)
