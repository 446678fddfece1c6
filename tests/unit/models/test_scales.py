"""The same data in other units: an offset and a factor of each feature, and of the target, change nothing that is
learned, and no row's place in time is rounded.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from sklearn import datasets
from torch import Tensor, nn

from models.evaluation.evaluate import predict_outputs
from models.evaluation.metrics import METRICS, MetricName, in_figures
from models.families.networks import Unscale
from models.rows.batches import Split
from models.rows.preprocessing import Standardization, preprocessing_of
from models.rows.shapes import Problem
from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.data.rows import DataError, hash_rows
from tasks.job import DataConfig
from tasks.promotion.servable import export_onnx, run_onnx
from tests.conftest import CPU, train_on

Bunch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def cubic() -> Bunch:
    x = np.random.default_rng(0).normal(size=(300, 3))
    return x, x[:, 0] ** 3 - x[:, 1] * x[:, 2]


def waves() -> Bunch:
    x = np.random.default_rng(1).uniform(-3, 3, size=(300, 2))
    return x, np.sin(x[:, 0]) + 0.1 * np.cos(2 * x[:, 1])


DATASETS: dict[str, tuple[Problem, Callable[[], Bunch]]] = {
    "iris": ("classification", lambda: datasets.load_iris(return_X_y=True)),
    "wine": ("classification", lambda: datasets.load_wine(return_X_y=True)),
    "breast_cancer": ("classification", lambda: datasets.load_breast_cancer(return_X_y=True)),
    "moons": ("classification", lambda: datasets.make_moons(400, noise=0.2, random_state=0)),
    "blobs": ("classification", lambda: datasets.make_blobs(300, 4, centers=5, cluster_std=4, random_state=0)),
    "diabetes": ("regression", lambda: datasets.load_diabetes(return_X_y=True)),
    "friedman": ("regression", lambda: datasets.make_friedman1(300, noise=0.5, random_state=0)),
    "linear": ("regression", lambda: datasets.make_regression(300, 8, noise=5, random_state=0)),
    "cubic": ("regression", cubic),
    "waves": ("regression", waves),
}  # fmt: skip


def in_other_units(values: np.ndarray[Any, Any], draw: np.random.Generator) -> np.ndarray[Any, Any]:
    """Each column times 1e-20 to 1e20, and moved by up to 1e9 times its spread."""
    count = values.shape[1]
    factor = 10 ** draw.uniform(-20, 20, count)
    offset = values.std(axis=0) * 10 ** draw.uniform(0, 9, count) * draw.choice([-1, 1], count)
    return np.asarray((values + offset) * factor)


def prepared_from(features: np.ndarray[Any, Any], target: np.ndarray[Any, Any], problem: Problem, to: Path) -> Prepared:
    """Split by a column that stays as it is, where a row's content would put it elsewhere in other units."""
    frame = pd.DataFrame(features, columns=[f"x{place}" for place in range(features.shape[1])])
    frame["row"] = np.arange(len(frame))
    frame["target"] = target
    frame.to_parquet(to / "rows.parquet")
    data = DataConfig(source=str(to / "rows.parquet"), split_by="row", checks={"leaking_column": "ignore"})
    return Prepared.load(prepare(data, problem, to / "snapshots"), CPU)


def in_one_order(prepared: Prepared) -> Prepared:
    """The rows of a split lie in the order of their hashes, which are others in other units."""

    def ordered(split: Split) -> Split:
        order = torch.from_numpy(np.lexsort(split.all_features.T.numpy()))
        return Split(features=split.all_features[order], target=split.target[order])

    return replace(prepared, training=ordered(prepared.training), validation=ordered(prepared.validation))


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_what_is_learned_does_not_depend_on_units(name: str, tmp_path: Path) -> None:
    problem, load = DATASETS[name]
    features, target = load()
    draw = np.random.default_rng(len(name))
    other_target = target if problem == "classification" else in_other_units(target[:, None], draw)[:, 0]
    objective: MetricName = "accuracy" if problem == "classification" else "r2"
    values = []
    for folder, (x, y) in {
        "as it is": (features, target),
        "else": (in_other_units(features, draw), other_target),
    }.items():
        (tmp_path / folder).mkdir()
        prepared = in_one_order(prepared_from(x, y, problem, tmp_path / folder))
        trained = train_on(prepared, objective=objective, epochs=8, learning_rate=0.01, batch_size=32, width=32)
        values.append(trained.validation[objective])
    assert values[1] == pytest.approx(values[0], rel=0.01)


@pytest.mark.parametrize(
    ("unit", "offset"), [(1e-23, 0.0), (1e20, 0.0), (0.01, 1e6), (1e-100, 0.0), (1e100, -1e105), (1.0, 1e9)]
)
def test_a_target_in_any_unit_is_learned_and_judged(unit: float, offset: float, tmp_path: Path) -> None:
    features, target = cubic()
    np.savez(tmp_path / "rows.npz", features=features, target=target * unit + offset)
    snapshot = prepare(DataConfig(source=str(tmp_path / "rows.npz")), "regression", tmp_path / "snapshots")
    trained = train_on(Prepared.load(snapshot, CPU), objective="rmse", epochs=30, learning_rate=0.01, batch_size=32)
    assert trained.validation["r2"] > 0.75
    assert 0 < trained.validation["mae"] <= trained.validation["rmse"] < 0.6 * target.std() * unit


def test_metrics_are_the_same_in_any_unit() -> None:
    draw = np.random.default_rng(0)
    target, values = draw.normal(size=50), draw.normal(size=50)
    for unit in (1e-200, 1.0, 1e200):
        found = {name: METRICS[name].compute(values * unit, target * unit) for name in ("rmse", "mae", "r2")}
        assert found["r2"] == pytest.approx(METRICS["r2"].compute(values, target))
        assert found["mae"] / unit == pytest.approx(np.abs(values - target).mean())
        assert found["rmse"] / unit == pytest.approx(np.sqrt(np.square(values - target).mean()))


def test_minutes_of_unix_time_are_as_good_as_minutes(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    minutes = draw.uniform(-1, 1, size=(600, 2))
    labels = (minutes[:, 0] * minutes[:, 1] > 0).astype(int)
    accuracies = []
    for begin in (0.0, 1.76e9):
        np.savez(tmp_path / "rows.npz", features=60 * minutes + begin, target=labels)
        snapshot = prepare(DataConfig(source=str(tmp_path / "rows.npz")), "classification", tmp_path / "snapshots")
        trained = train_on(Prepared.load(snapshot, CPU), epochs=30, learning_rate=0.01, batch_size=16)
        accuracies.append(trained.validation["accuracy"])
    assert min(accuracies) > 0.9


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_snapshot_keeps_every_number_as_the_source_has_it(kind: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    wide = 1.76e9 + draw.normal(size=300)
    frame = pd.DataFrame(
        {"wide": wide, "whole": 2**53 - draw.integers(0, 1000, 300), "y": draw.choice(["a", "b"], 300)}
    )
    path = tmp_path / f"rows.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    snapshot = prepare(DataConfig(source=str(path)), "classification", tmp_path / "snapshots")
    rows = torch.cat([features for features, _ in snapshot.load(CPU).values()])
    assert {tuple(row) for row in rows.tolist()} == set(zip(wide, frame["whole"].astype(float), strict=False)) or {
        tuple(row) for row in rows.tolist()
    } == set(zip(frame["whole"].astype(float), wide, strict=False))


def test_what_float32_holds_takes_no_more_room_and_has_one_hash_in_any_type() -> None:
    draw = np.random.default_rng(0)
    narrow = draw.normal(size=(40, 3)).astype(np.float32)
    assert np.array_equal(hash_rows(narrow), hash_rows(narrow.astype(np.float64)))
    mixed = np.concatenate([narrow.astype(np.float64), draw.normal(size=(40, 3))])
    assert np.array_equal(hash_rows(mixed)[:40], hash_rows(narrow))
    assert np.array_equal(hash_rows(mixed)[40:], hash_rows(mixed[40:])), "other rows do not matter"
    seconds = 1.76e9 + np.arange(300.0)[:, None]
    assert len(np.unique(hash_rows(seconds), axis=0)) == 300


@pytest.mark.parametrize(("dtype", "kept"), [("f4", "f4"), ("i2", "f4"), ("f8", "f8"), ("i8", "f4"), ("u1", "f4")])
def test_a_snapshot_is_float32_where_that_loses_nothing(dtype: str, kept: str, tmp_path: Path) -> None:
    features = (100 * np.random.default_rng(0).random((200, 3))).astype(dtype)
    np.savez(tmp_path / "rows.npz", features=features, target=np.arange(200) % 2)
    snapshot = prepare(DataConfig(source=str(tmp_path / "rows.npz")), "classification", tmp_path / "snapshots")
    assert snapshot.first("train", 1).dtype == np.dtype(kept)


def test_moments_are_exact_to_the_microsecond(tmp_path: Path) -> None:
    begin = pd.Timestamp("2026-10-01T00:00:00Z")
    moments = [begin + pd.Timedelta(microseconds=n) for n in range(-300, 300)]
    late = sum(moment >= begin for moment in moments)
    for write in (
        lambda: [moment.isoformat() for moment in moments],
        lambda: [moment.tz_convert("Asia/Kathmandu").isoformat() for moment in moments],
        lambda: pd.Series(moments).dt.as_unit("ns") + pd.Timedelta(nanoseconds=900),
        lambda: pd.Series(moments).dt.tz_convert("America/St_Johns"),
    ):
        frame = pd.DataFrame({"at": write(), "v": np.arange(600) % 7, "y": [*"ab"] * 300})
        frame.to_parquet(tmp_path / "rows.parquet")
        data = DataConfig(source=str(tmp_path / "rows.parquet"), time_column="at", test_from="2026-10-01T00:00:00Z")
        snapshot = prepare(data, "classification", tmp_path / "snapshots")
        assert snapshot.row_counts["test"] == late
        begins = (begin - pd.Timestamp("2000-01-01", tz="UTC")) // pd.Timedelta(microseconds=1)
        assert sorted(snapshot.test_positions().tolist()) == [begins + n for n in range(300)]


@pytest.mark.parametrize("year", ["0800", "1677", "1969", "2262", "2500", "9999"])
def test_dates_of_any_century_are_read_beside_those_of_today(year: str, tmp_path: Path) -> None:
    days = [f"2026-01-01T00:00:{second:02}.123456789" for second in range(60)] * 4
    days += [f"{year}-12-31T23:59:59.999999"] * 60
    frame = pd.DataFrame({"at": days, "v": np.arange(300) % 7, "y": [*"ab"] * 150})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    snapshot = prepare(DataConfig(source=str(tmp_path / "rows.csv")), "classification", tmp_path / "snapshots")
    assert [(column.name, column.role) for column in snapshot.columns] == [("at", "datetime"), ("v", "numeric")]
    far = (np.datetime64(f"{year}-12-31T23:59:59.999999") - np.datetime64("2000-01-01")) / np.timedelta64(1, "D")
    found = torch.cat([features for features, _ in snapshot.load(CPU).values()])[:, 0]
    assert (found - far).abs().min() < 1e-9


@pytest.mark.slow
def test_served_rows_keep_their_digits_in_onnx_too(tmp_path: Path) -> None:
    """A date, a time in seconds, a gap and a category, of a target of a millionth around a million."""
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({
        "seconds": 1.76e9 + 60 * draw.normal(size=400),
        "at": pd.Timestamp("2026-01-01") + pd.to_timedelta(draw.integers(0, 10**9, 400), unit="us"),
        "kind": draw.choice(["p", "q"], 400),
        "gaps": np.where(draw.random(400) < 0.2, np.nan, draw.normal(size=400)),
    })  # fmt: skip
    frame["y"] = 1e6 + 0.01 * np.sin(frame["seconds"] - 1.76e9)
    frame.to_parquet(tmp_path / "rows.parquet")
    data = DataConfig(source=str(tmp_path / "rows.parquet"))
    prepared = Prepared.load(prepare(data, "regression", tmp_path / "snapshots"), CPU)
    served = nn.Sequential(prepared.preprocessing, train_on(prepared, objective="rmse").model)
    rows = prepared.snapshot.features("validation", CPU)[:]
    outputs = predict_outputs(served, rows)
    assert (rows.dtype, outputs.dtype) == (torch.float64, torch.float64)
    assert outputs.std() > 1e-5, "in float32 a million has steps of 0.06"
    export_onnx(served, rows[:2], tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (again,) = session.run(None, {"features": rows.numpy()})
    np.testing.assert_allclose(again - 1e6, outputs.numpy() - 1e6, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(("features_in", "target_in"), [(1e-150, 1e100), (1e9, 1e-280)])
def test_an_onnx_program_keeps_additions_however_small(features_in: float, target_in: float, tmp_path: Path) -> None:
    rows = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unscale = Unscale()
    unscale.fit((rows.sum(dim=1) + 1) * target_in)
    served = nn.Sequential(Standardization.fit((rows + 1) * features_in), nn.Linear(3, 1), unscale).eval()
    rows = (rows + 1) * features_in
    export_onnx(served, rows[:2], tmp_path / "model.onnx")
    with torch.no_grad():
        torch.testing.assert_close(
            run_onnx(tmp_path / "model.onnx", rows) / target_in, served(rows) / target_in, rtol=1e-5, atol=1e-5
        )


def test_preprocessing_of_an_earlier_version_reads_tonight_s_rows() -> None:
    """Its statistics are float32."""
    rows = torch.randn(50, 2, dtype=torch.float64)
    earlier = {name: tensor.float() for name, tensor in Standardization.fit(rows).state_dict().items()}
    for given in (rows, rows.float()):
        found = preprocessing_of(earlier)(given)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, Standardization.fit(rows)(rows))


@pytest.mark.parametrize("factor", [1e-300, 1e-30, 1.0, 1e30, 1e140])
def test_statistics_hold_in_any_unit(factor: float) -> None:
    rows = torch.tensor([[1.0, 7.0], [3.0, 7.0], [2.0, 7.0]], dtype=torch.float64) * factor
    expected = torch.tensor([[-(1.5**0.5), 0.0], [1.5**0.5, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(Standardization.fit(rows)(rows), expected)
    unscale = Unscale()
    unscale.fit(rows[:, 0])
    torch.testing.assert_close(unscale(expected[:, :1]), rows[:, 0], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.76e9 + 0.1, 1e-320])
def test_a_constant_column_has_no_spread_of_rounding(value: float) -> None:
    rows = torch.full((1001, 1), value, dtype=torch.float64)
    assert Standardization.fit(rows).scale.item() == 1.0
    assert not Standardization.fit(rows)(rows).any()


def test_a_value_far_from_all_training_rows_stays_finite() -> None:
    rows: Tensor = torch.randn(50, 1, dtype=torch.float64)
    far = Standardization.fit(rows)(torch.tensor([[1e140], [-1e140]], dtype=torch.float64))
    assert far.isfinite().all()
    assert far[0] > 0 > far[1]


@pytest.mark.parametrize(
    ("features", "target", "says"),
    [
        ([[1e308, 1.0]] + [[float(n), 1.0] for n in range(300)], [n % 2 / 1 for n in range(301)], "at most 1e\\+150"),
        (
            [[float(n), 1.0] for n in range(301)],
            [1e308, *map(float, range(300))],
            "the target of a regression must be at most 1e\\+150, found 1e\\+308 in",
        ),
        ([[float(n), 1.0] for n in range(301)], [1e-320, *[3e-320] * 300], "the target must vary, found 1e-320 to"),
    ],
)
def test_a_number_that_cannot_be_computed_with_is_one_sentence(
    features: list[list[float]], target: list[float], says: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "rows.npz", features=np.array(features), target=np.array(target))
    with pytest.raises(DataError, match=says):
        prepare(DataConfig(source=str(tmp_path / "rows.npz")), "regression", tmp_path / "snapshots")


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.97501, "0.9750"), (0.0, "0.0000"), (-0.0028, "-0.0028"), (4.54e-24, "4.54e-24"), (-4.54158e20, "-4.542e+20")],
)
def test_a_metric_is_written_with_its_digits(value: float, written: str) -> None:
    assert in_figures(value) == written


MARKS = ["9.96921e36", "1e20", "3.4028235e38", "-9223372036854775808", "1e100", "-1e30"]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("kind", ["csv", "npz"])
def test_a_mark_for_a_missing_value_far_from_all_others_is_named(kind: str, mark: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    values = [*map(str, draw.normal(size=298).round(6)), mark, mark]
    path = tmp_path / f"rows.{kind}"
    pd.DataFrame({"v": values, "w": draw.normal(size=300), "y": [*"ab"] * 150}).to_csv(
        tmp_path / "rows.csv", index=False
    )
    numbers = np.array(values, dtype=float)
    np.savez(tmp_path / "rows.npz", features=np.stack([numbers, numbers % 1], axis=1), target=[*"ab"] * 150)
    says = ("column v" if kind == "csv" else "column 0 of the features") + " must hold numbers that can be told apart"
    with pytest.raises(DataError, match=f"{says}, found {float(mark):g} where".replace("+", "\\+")):
        prepare(DataConfig(source=str(path)), "classification", tmp_path / "snapshots")
    told = DataConfig(source=str(tmp_path / "rows.csv"), missing=["", mark])
    assert not prepare(told, "classification", tmp_path / "snapshots").findings


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).lognormal(0, 3, 300),
        np.random.default_rng(0).pareto(0.5, 300),
        np.where(np.arange(300) % 10, 0, 1e12 * np.arange(300)),
        np.where(np.arange(300) % 10, 1e-30, 1.0),
    ],
    ids=["lognormal", "pareto", "mostly zero", "two values"],
)
def test_numbers_that_are_unequal_by_nature_are_no_marks(values: np.ndarray[Any, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", features=np.stack([values, np.arange(300)], axis=1), target=[*"ab"] * 150)
    snapshot = prepare(DataConfig(source=str(tmp_path / "rows.npz")), "classification", tmp_path / "snapshots")
    assert not snapshot.findings


@pytest.mark.parametrize(
    ("first", "step", "is_found"), [(2**53, 2, False), (2**53, 3, True), (10**17, 7, True), (7, 3, False)]
)
def test_whole_numbers_that_float64_rounds_are_named(first: int, step: int, is_found: bool, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    ids = [first + step * int(number) for number in draw.integers(0, 5000, 2000)]
    for kind in ("csv", "parquet"):
        path = tmp_path / f"rows.{kind}"
        frame = pd.DataFrame({"id": ids, "v": draw.normal(size=2000), "y": draw.choice(["a", "b"], 2000)})
        frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
        snapshot = prepare(DataConfig(source=str(path)), "classification", tmp_path / "snapshots")
        assert [found.check for found in snapshot.findings] == ["rounded_numbers"] * is_found
