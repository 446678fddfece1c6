"""The gate: only what is proven better passes, and what is better passes."""

from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from optuna.trial import FrozenTrial, create_trial

from models.evaluation.comparison import compare
from models.evaluation.evaluate import predict_outputs
from models.rows.preprocessing import Standardization
from models.rows.shapes import DataShape
from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.data.snapshots import Snapshot
from tasks.job import DataConfig, TuningJob
from tasks.promotion.confirm import Challenger, Confirmed
from tasks.promotion.gate import gate, judge
from tasks.promotion.verdict import GuardRail, Verdict
from tasks.registry.champion import Champion
from tasks.registry.log import Promotion
from tasks.registry.versions import Lineage, Manifest, TableColumn
from tests.conftest import CPU, make_job, train_on
from tests.unit.models.test_comparison import simulated

JOB = make_job()


def make_challenger(prepared: Prepared, epochs: int) -> Challenger:
    values: dict[str, Any] = {"learning_rate": 3e-3, "epochs": epochs, "width": 32}
    trained = train_on(prepared, **values)
    trial: FrozenTrial = create_trial(value=0.5)
    return Challenger(
        model=trained.model,
        preprocessing=prepared.preprocessing,
        hyperparameters=JOB.family.hyperparameters.from_values(values),
        trial=trial,
        objective="accuracy",
        seeds=(0,),
        values=(trained.validation["accuracy"],),
        trained_with=(0,),
        shipped=(0,),
        validation=trained.validation,
        generalization_gap=0.0,
        sharpness=0.0,
    )


def as_champion(challenger: Challenger, snapshot: Snapshot, **lineage_fields: Any) -> Champion:
    lineage = Lineage(
        snapshot=snapshot.fingerprint, source="rows.csv", study="", trial=0, seed=0, device="cpu", mlflow_run_id="",
        prefect_flow_run_id=None, git_commit=None, python="", packages={}, **lineage_fields,
    )  # fmt: skip
    manifest = Manifest(
        job="small", model="mlp", hyperparameters=challenger.hyperparameters.model_dump(mode="json"),
        features=snapshot.shape.features, classes=snapshot.classes, metrics={}, lineage=lineage, files={},
    )  # fmt: skip
    promotion = Promotion(
        number=7, version="x", judged=6, run="r", reason="", promoted_at=datetime(2026, 1, 1, tzinfo=UTC)
    )
    return Champion(
        promotion=promotion, manifest=manifest, model=challenger.model, preprocessing=challenger.preprocessing
    )


def verdict_of(
    challenger: Challenger,
    champion: Champion | None,
    snapshot: Snapshot,
    job: TuningJob = JOB,
    baseline: Challenger | None = None,
) -> Verdict:
    return gate(job, Confirmed(challenger=challenger, baseline=baseline, seconds=1.0), champion, snapshot, CPU)


@pytest.fixture(scope="module")
def weak(prepared: Prepared) -> Challenger:
    return make_challenger(prepared, epochs=1)


@pytest.fixture(scope="module")
def strong(prepared: Prepared) -> Challenger:
    return make_challenger(prepared, epochs=12)


def test_without_a_baseline_the_first_challenger_is_promoted(weak: Challenger, snapshot: Snapshot) -> None:
    verdict = verdict_of(weak, None, snapshot)
    assert (verdict.decision, verdict.judged, verdict.opponent, verdict.opponent_test) == ("PROMOTE", 0, "nobody", None)
    assert verdict.reason == "there was no champion yet, and no baseline"


def test_on_the_first_night_the_test_rows_say_how_sure_it_is_and_decide_nothing(
    weak: Challenger, strong: Challenger, snapshot: Snapshot
) -> None:
    """Validation rows have chosen the challenger; here it is proven better, equal, and proven worse on the test rows.
    A class that falls rejects none: that rail protects a champion."""
    standings = {
        "proven better": verdict_of(strong, None, snapshot, baseline=weak),
        "not proven better": verdict_of(strong, None, snapshot, baseline=replace(strong)),
        "proven worse": verdict_of(weak, None, snapshot, baseline=strong),
    }
    for standing, verdict in standings.items():
        assert (verdict.decision, verdict.opponent, verdict.judged) == ("PROMOTE", "baseline", 0)
        assert f" is {standing} than the textbook on the test rows: test accuracy" in verdict.reason
        assert "no champion yet; the best on validation rows (accuracy " in verdict.reason
        assert verdict.guard_rails == ()
        comparison, challenger = verdict.comparison, verdict.challenger
        assert comparison is not None
        assert (comparison.better, comparison.worse) == (
            "better" in standing and "not" not in standing,
            "worse" in standing,
        )
        served = torch.nn.Sequential(challenger.preprocessing, challenger.model)
        assert torch.equal(verdict.outputs, predict_outputs(served, snapshot.features("test", CPU)))


def test_a_baseline_that_is_best_becomes_the_first_champion(strong: Challenger, snapshot: Snapshot) -> None:
    verdict = verdict_of(strong, None, snapshot, baseline=strong)
    assert (verdict.decision, verdict.opponent, verdict.comparison) == ("PROMOTE", "nobody", None)
    assert verdict.reason == (
        "there was no champion yet; nothing that was tried is better on validation rows than the textbook's "
        f"configuration (accuracy {strong.mean:.4f}, of a single seed)"
    )


def test_no_first_champion_breaks_a_limit(weak: Challenger, strong: Challenger, snapshot: Snapshot) -> None:
    small = make_job(promotion={"max_megabytes": 1e-6})
    for baseline in (None, weak, strong):
        verdict = verdict_of(strong, None, snapshot, small, baseline)
        assert verdict.decision == "REJECT"
        assert "size: 0.009" in verdict.reason
        assert "of max_megabytes 1e-06" in verdict.reason


def test_a_tie_keeps_the_champion(strong: Challenger, snapshot: Snapshot) -> None:
    verdict = verdict_of(strong, as_champion(strong, snapshot), snapshot)
    assert (verdict.decision, verdict.judged) == ("HOLD", 7)
    assert verdict.reason.startswith("no difference is proven: test accuracy")


def test_the_better_is_promoted_and_the_worse_rejected(
    weak: Challenger, strong: Challenger, snapshot: Snapshot
) -> None:
    promoted = verdict_of(strong, as_champion(weak, snapshot), snapshot)
    assert promoted.decision == "PROMOTE"
    assert promoted.comparison is not None
    assert promoted.comparison.low > 0
    assert verdict_of(weak, as_champion(strong, snapshot), snapshot).decision == "REJECT"


def test_a_gain_surely_below_the_least_that_matters_holds(
    weak: Challenger, strong: Challenger, snapshot: Snapshot
) -> None:
    picky = make_job(promotion={"min_improvement": 0.9})
    verdict = verdict_of(strong, as_champion(weak, snapshot), snapshot, picky)
    assert verdict.decision == "HOLD"
    assert "promotion.min_improvement (0.9)" in verdict.reason


def test_a_class_that_surely_falls_rejects_the_better(strong: Challenger, snapshot: Snapshot) -> None:
    """The challenger never answers 3, the champion knows nothing else."""
    last = strong.model[-1]  # type: ignore[index]
    blind, narrow = (torch.nn.Sequential(strong.model, _Shift(amount)) for amount in (-1e3, 1e3))
    assert isinstance(last, torch.nn.Linear)
    verdict = verdict_of(replace(strong, model=blind), as_champion(replace(strong, model=narrow), snapshot), snapshot)
    assert verdict.decision == "REJECT"
    assert "a guard rail is broken (worst slice: class 3 falls by 1.0000" in verdict.reason
    open_job = make_job(promotion={"max_slice_fall": None})
    champion = as_champion(replace(strong, model=narrow), snapshot)
    assert verdict_of(replace(strong, model=blind), champion, snapshot, open_job).decision == "PROMOTE"


class _Shift(torch.nn.Module):
    """Adds to the logit of class 3."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.register_buffer("shift", amount * torch.eye(10)[3])

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs + self.shift  # type: ignore[operator]


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ({"max_latency_ms": 1e-6}, "latency: "),
        ({"max_megabytes": 1e-6}, "size: "),
        ({"max_calibration_error": 1e-6}, "calibration error: "),
    ],
)
def test_a_broken_limit_rejects_the_better(
    weak: Challenger, strong: Challenger, snapshot: Snapshot, limit: dict[str, float], says: str
) -> None:
    verdict = verdict_of(strong, as_champion(weak, snapshot), snapshot, make_job(promotion=limit))
    assert verdict.decision == "REJECT"
    assert f"a guard rail is broken ({says}" in verdict.reason
    (broken,) = (rail for rail in verdict.guard_rails if not rail.holds)
    assert broken.evidence.endswith(f"of {next(iter(limit))} 1e-06")


def test_each_is_measured_behind_its_own_preprocessing(strong: Challenger, snapshot: Snapshot) -> None:
    blind = Standardization(mean=torch.zeros(1, 1, 1), scale=torch.full((1, 1, 1), 1e9))
    verdict = verdict_of(strong, as_champion(replace(strong, preprocessing=blind), snapshot), snapshot)
    assert verdict.decision == "PROMOTE"


def test_a_champion_of_other_rows_is_not_compared(strong: Challenger, snapshot: Snapshot) -> None:
    champion = as_champion(strong, replace(snapshot, shape=DataShape(features=(3,), outputs=10)))
    verdict = verdict_of(strong, champion, snapshot)
    assert verdict.decision == "HOLD"
    assert "give the job a new name" in verdict.reason


def test_rows_that_the_champion_may_know_are_left_out(weak: Challenger, strong: Challenger, snapshot: Snapshot) -> None:
    rows = snapshot.row_counts["test"]
    all_rows = verdict_of(strong, as_champion(weak, snapshot, test_fraction=0.2), snapshot)
    assert (all_rows.rows_left_out, all_rows.comparison and all_rows.comparison.rows) == (0, rows)
    half = verdict_of(strong, as_champion(weak, snapshot, test_fraction=0.1), snapshot)
    assert half.comparison is not None
    assert half.comparison.rows + half.rows_left_out == rows
    assert 0.35 * rows < half.rows_left_out < 0.65 * rows
    none = verdict_of(strong, as_champion(weak, snapshot, test_fraction=1e-9), snapshot)
    assert (none.decision, none.rows_left_out) == ("HOLD", rows)


def people_with(folder: Path, *columns: str, **data: Any) -> Snapshot:
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"id": np.arange(900) // 2, "x": draw.normal(size=900), "town": draw.choice(["Bonn", "Ulm"], 900)}
    )
    frame["extra"] = draw.choice(["old", "new"], 900)
    frame["y"] = np.where(frame["x"] + draw.normal(size=900) > 0, "high", "low")
    frame[[*columns, "y"]].to_csv(folder / "rows.csv", index=False)
    return prepare(DataConfig(source=str(folder / "rows.csv"), **data), "classification", folder / "snapshots")


def test_the_gate_counts_copies_of_a_row_once(tmp_path: Path) -> None:
    """A table whose rows are there 20 times is judged as the one whose rows are there once."""
    once = people_with(tmp_path, "x", "town")
    table = pd.read_csv(tmp_path / "rows.csv")
    pd.concat([table] * 20).sample(frac=1, random_state=0).to_csv(tmp_path / "rows.csv", index=False)
    copied = prepare(DataConfig(source=str(tmp_path / "rows.csv")), "classification", tmp_path / "snapshots")
    rows = once.row_counts["test"]
    assert (copied.row_counts["test"], len(set(copied.test_groups().tolist()))) == (20 * rows, rows)
    known = Prepared.load(once, CPU)
    challenger, champion = make_challenger(known, 2), make_challenger(known, 1)
    columns = tuple(TableColumn(**asdict(column)) for column in once.columns)
    verdicts = []
    for found in (once, copied):
        made = as_champion(champion, found)
        manifest = made.manifest.model_copy(update={"columns": columns})
        verdicts.append(verdict_of(challenger, replace(made, manifest=manifest), found))
    first, second = (verdict.comparison for verdict in verdicts)
    assert first is not None
    assert second is not None
    assert (second.groups, second.rows, first.groups, first.rows) == (rows, 20 * rows, rows, rows)
    assert (second.low, second.high) == pytest.approx((first.low, first.high), abs=0.02)
    assert verdicts[0].decision == verdicts[1].decision
    assert f"on {20 * rows} rows in {rows} independent groups, a gain of" in verdicts[1].reason


def test_rows_that_the_split_drew_as_one_are_one_group(tmp_path: Path) -> None:
    """Those of an id; with a time column only copies at the same moment."""
    by_id = people_with(tmp_path, "id", "x", "town", split_by="id")
    groups = by_id.test_groups().tolist()
    assert len(groups) == 2 * len(set(groups))
    moments = np.repeat(pd.date_range("2026-01-01", periods=50).astype(str), 6)
    frame = pd.DataFrame({"day": moments, "x": [0.5, 0.5, None, None, 1.5, 2.5] * 50, "y": ["a", "b"] * 150})
    frame.to_csv(tmp_path / "days.csv", index=False)
    data = DataConfig(source=str(tmp_path / "days.csv"), time_column="day", test_from="2026-02-10")
    by_time = prepare(data, "classification", tmp_path / "snapshots")
    assert (by_time.row_counts["test"], len(set(by_time.test_groups().tolist()))) == (60, 40)


@pytest.mark.parametrize(
    ("before", "now", "data", "why_not"),
    [
        (("id", "x", "town"), ("id", "x", "town"), {"split_by": "id"}, None),
        (("id", "x", "town"), ("town", "extra", "id", "x"), {"split_by": "id"}, None),
        (("id", "x", "town"), ("town", "extra", "id", "x"), {}, "may have been trained on each of tonight's"),
        (("id", "x", "town"), ("id", "x"), {"split_by": "id"}, "or of other columns: give the job a new name"),
    ],
)
def test_a_table_with_a_column_more_is_judged_where_its_rows_kept_their_sides(
    tmp_path: Path, before: tuple[str, ...], now: tuple[str, ...], data: dict[str, Any], why_not: str | None
) -> None:
    """Without `split_by` the column moves rows from one side to another, so the champion may know them."""
    then = people_with(tmp_path, *before, **data)
    champion = as_champion(make_challenger(Prepared.load(then, CPU), 3), then, data=data)
    columns = tuple(TableColumn(**asdict(column)) for column in then.columns)
    champion = replace(champion, manifest=champion.manifest.model_copy(update={"columns": columns}))
    tonight = people_with(tmp_path, *now, **data)
    verdict = verdict_of(
        make_challenger(Prepared.load(tonight, CPU), 3),
        champion,
        tonight,
        make_job(data={"source": "rows.csv", **data}),
    )
    assert (verdict.comparison is None) == (why_not is not None)
    if why_not is not None:
        assert verdict.decision == "HOLD"
        assert why_not in verdict.reason


def test_with_a_time_column_only_rows_after_the_champion_s_cut_are_judged(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"day": pd.date_range("2026-01-01", periods=600), "x": np.random.default_rng(0).normal(size=600)}
    )
    frame["y"] = np.where(frame["x"] > 0, "high", "low")
    frame.loc[::7, "y"] = "low"
    frame.to_csv(tmp_path / "rows.csv", index=False)

    def cut(moment: str) -> tuple[dict[str, str], Snapshot]:
        data = {"time_column": "day", "test_from": moment}
        config = DataConfig(source=str(tmp_path / "rows.csv"), **data)
        return data, prepare(config, "classification", tmp_path / "snapshots")

    data, then = cut("2027-02-01T00:00:00Z")
    champion = as_champion(make_challenger(Prepared.load(then, CPU), 3), then, data=data)
    columns = tuple(TableColumn(**asdict(column)) for column in then.columns)
    champion = replace(champion, manifest=champion.manifest.model_copy(update={"columns": columns}))
    earlier, tonight = cut("2027-01-01T00:00:00Z")
    job = make_job(data={"source": "rows.csv", **earlier})
    verdict = verdict_of(make_challenger(Prepared.load(tonight, CPU), 3), champion, tonight, job)
    assert verdict.rows_left_out == 31


def of_an_earlier_format(champion: Champion) -> Champion:
    return replace(champion, manifest=champion.manifest.model_copy(update={"format": 4}))


def test_a_champion_of_rounded_rows_is_judged_on_those_that_float32_holds(
    weak: Challenger, snapshot: Snapshot, tmp_path: Path
) -> None:
    """Any other has another hash than it had then, and may be one that it was trained on."""
    champion = of_an_earlier_format(as_champion(weak, snapshot, test_fraction=0.2))
    assert verdict_of(weak, champion, snapshot).rows_left_out == 0
    frame = pd.DataFrame({"x": np.random.default_rng(0).normal(size=600), "y": np.arange(600) % 2})
    frame.loc[::2, "x"] = frame["x"].astype(np.float32).astype(np.float64)
    frame.to_parquet(tmp_path / "rows.parquet")
    rows = prepare(DataConfig(source=str(tmp_path / "rows.parquet")), "classification", tmp_path / "snapshots")
    challenger = make_challenger(Prepared.load(rows, CPU), 1)
    champion = of_an_earlier_format(as_champion(challenger, rows, test_fraction=0.2))
    columns = tuple(TableColumn(**asdict(column)) for column in rows.columns)
    champion = replace(champion, manifest=champion.manifest.model_copy(update={"columns": columns}))
    verdict = verdict_of(challenger, champion, rows, make_job(data={"source": "rows.parquet"}))
    assert 0.3 * rows.row_counts["test"] < verdict.rows_left_out < 0.7 * rows.row_counts["test"]


def test_what_was_rolled_back_needs_new_rows_to_win_again(
    weak: Challenger, strong: Challenger, snapshot: Snapshot
) -> None:
    withdrawn = as_champion(strong, snapshot).manifest
    champion = replace(as_champion(weak, snapshot), taken_back=(withdrawn,))
    verdict = verdict_of(strong, champion, snapshot)
    assert verdict.decision == "HOLD"
    assert "of the same hyperparameters was rolled back, and no row is new since" in verdict.reason
    assert verdict_of(strong, champion, replace(snapshot, fingerprint="more rows")).decision == "PROMOTE"
    other = replace(strong, hyperparameters=weak.hyperparameters)
    assert verdict_of(other, champion, snapshot).decision == "PROMOTE"


def test_the_gate_does_not_lock_out_a_better_challenger_for_ever() -> None:
    """The champion was the luckiest of twenty equal models on these very rows, which do not change. A challenger that
    is really better comes in all the same, and of more that are equal hardly one."""
    random, rows, nights = np.random.default_rng(0), 1000, 100
    target = torch.from_numpy(random.integers(0, 2, rows))

    def outputs(accuracy: float) -> torch.Tensor:
        right = torch.from_numpy(random.random(rows) < accuracy)
        return torch.eye(2)[torch.where(right, target, 1 - target)]

    champion = max((outputs(0.9) for _ in range(20)), key=lambda found: (found.argmax(dim=1) == target).sum().item())

    def promoted(accuracy: float) -> float:
        decisions = [
            judge(
                compare(outputs(accuracy), champion, target, "accuracy", confidence=0.95, seed=night, resamples=200),
                (),
                JOB.promotion,
            )[0]
            for night in range(nights)
        ]
        return decisions.count("PROMOTE") / nights

    assert promoted(0.95) > 0.5
    assert promoted(0.9) <= 0.05


def test_a_verdict_refuses_nan(weak: Challenger) -> None:
    with pytest.raises(ValueError, match="found accuracy nan"):
        Verdict(
            decision="PROMOTE", reason="", judged=0, challenger=weak, intervals={},
            challenger_test={"accuracy": float("nan")}, outputs=torch.zeros(1, 2),
        )  # fmt: skip


def test_a_broken_guard_rail_outweighs_any_gain() -> None:
    random = np.random.default_rng(0)
    comparison = compare(*simulated(random, 500, 0.1, 0.1), "accuracy", confidence=0.95, seed=0)
    rail = GuardRail(name="latency", holds=False, evidence="9 of 5")
    assert judge(comparison, (), JOB.promotion)[0] == "PROMOTE"
    assert judge(comparison, (rail,), JOB.promotion) == ("REJECT", "a guard rail is broken (latency: 9 of 5)")
