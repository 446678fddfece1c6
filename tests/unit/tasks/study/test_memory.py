"""What a night begins from: the baseline, the champion, and what earlier nights learned."""

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from optuna.trial import FrozenTrial

from models.hyperparameters.declared import MLPHyperparameters
from models.rows.preprocessing import Standardization
from tasks.data.drift import changes, drift, drift_table, since
from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.data.snapshots import Snapshot
from tasks.job import DataConfig, TuningJob, load_job
from tasks.registry.champion import Champion
from tasks.registry.log import Promotion
from tasks.registry.versions import Lineage, Manifest
from tasks.search.tune import tune
from tasks.study.memory import BASELINE, NIGHTS, recall
from tasks.study.studies import (
    ENDED,
    HYPERPARAMETERS,
    IMPORTED_FROM,
    ROLE,
    Asking,
    finished_trials,
    number_of,
    open_study,
    tonights_trials,
)
from tasks.trainer.local import LocalTrainer
from tests.conftest import CPU, make_job
from tests.unit.tasks.data.test_prepare import write_source

EVENING = datetime(2026, 11, 20, 2, 0, tzinfo=UTC)
SPACE: dict[str, Any] = {
    "epochs": 2, "batch_size": 64, "schedule": "constant", "optimizer": ["adam", "momentum"], "depth": 1,
    "width": [16, 32], "weight_decay": 0.0, "dropout": 0.0,
}  # fmt: skip


def job_with(space: dict[str, Any] | None = None, **search: Any) -> TuningJob:
    return make_job(search={"pruner": "none", "space": SPACE | (space or {}), **search}, budget={"trials": 5})


def begin(job: TuningJob, snapshot: Snapshot, studies: Path, night: int, champion: Champion | None = None) -> Any:
    study = open_study(job, snapshot.fingerprint, studies, EVENING + timedelta(days=night))
    recall(study, job, snapshot, champion, studies)
    return study


def whole_night(job: TuningJob, prepared: Prepared, studies: Path, night: int) -> optuna.Study:
    study: optuna.Study = begin(job, prepared.snapshot, studies, night)
    tune(study, job, LocalTrainer(job, prepared), studies)
    study.set_user_attr(ENDED, "yes")
    return study


def imported(study: optuna.Study) -> list[FrozenTrial]:
    return [trial for trial in study.trials if IMPORTED_FROM in trial.user_attrs]


def next_params(study: optuna.Study, job: TuningJob) -> tuple[str, dict[str, Any]]:
    trial = Asking(study, job).ask()
    job.family.draw(trial, job.space)
    study.tell(trial, 0.5)
    return str(trial.user_attrs.get(ROLE)), trial.params


def a_champion(hyperparameters: MLPHyperparameters) -> Champion:
    lineage = Lineage(
        snapshot="", source="", study="", trial=0, seed=0, device="cpu", mlflow_run_id="", prefect_flow_run_id=None,
        git_commit=None, python="", packages={},
    )  # fmt: skip
    manifest = Manifest(
        job="small", model="mlp", hyperparameters=hyperparameters.model_dump(), features=(1, 8, 8), classes=("0", "1"),
        metrics={}, lineage=lineage, files={},
    )  # fmt: skip
    promotion = Promotion(number=1, version="x", judged=0, run="r", reason="", promoted_at=EVENING)
    return Champion(
        promotion=promotion,
        manifest=manifest,
        model=torch.nn.Identity(),
        preprocessing=Standardization(torch.zeros(1), torch.ones(1)),
    )


def test_the_first_trial_is_the_textbook_whatever_the_defaults_search(prepared: Prepared, tmp_path: Path) -> None:
    job = load_job("digits-mlp", None, trials=1)
    study = begin(job, prepared.snapshot, tmp_path, 0)
    tuned = tune(study, job, LocalTrainer(job, prepared), tmp_path)
    (trial,) = study.trials
    assert trial.user_attrs[ROLE] == BASELINE
    textbook = MLPHyperparameters(weight_decay=1e-6)  # as near to none as the default range goes
    assert trial.user_attrs[HYPERPARAMETERS] == textbook.model_dump()
    assert tuned.baseline is not None
    assert tuned.baseline.number == 0


def test_the_baseline_keeps_to_what_the_job_fixes(prepared: Prepared, tmp_path: Path) -> None:
    job = job_with({"learning_rate": {"low": 1e-4, "high": 1e-3}})
    study = begin(job, prepared.snapshot, tmp_path, 0)
    tune(study, job, LocalTrainer(job, prepared), tmp_path)
    values = study.trials[0].user_attrs[HYPERPARAMETERS]
    assert (values["learning_rate"], values["epochs"], values["width"]) == (1e-3, 2, 32)
    assert values["optimizer"] == "adam"


def test_a_night_begins_with_baseline_champion_and_the_best_of_earlier_nights(
    prepared: Prepared, tmp_path: Path
) -> None:
    job = job_with()
    first = whole_night(job, prepared, tmp_path, 0)
    champion = a_champion(
        MLPHyperparameters(learning_rate=0.02, width=32, optimizer="momentum", epochs=2, schedule="constant")
    )
    second = begin(job, prepared.snapshot, tmp_path, 1, champion)
    assert [trial.params for trial in imported(second)] == [trial.params for trial in first.trials]
    assert [trial.value for trial in imported(second)] == [trial.value for trial in first.trials]
    assert finished_trials(second) == tonights_trials(second) == []
    ordered = sorted(first.trials, key=lambda trial: -(trial.value or 0))
    asked = [next_params(second, job) for _ in range(6)]
    assert asked[0][0] == BASELINE
    assert asked[1] == ("champion x", {"learning_rate": 0.02, "optimizer": "momentum", "width": 32})
    best = [params for role, params in asked[2:] if role.startswith("best of small-20261120")]
    assert best == [trial.params for trial in ordered if trial.params != asked[0][1]][: len(best)]
    assert len(best) >= 2
    assert asked[5][0] == "None"
    assert [number_of(trial) for trial in tonights_trials(second)] == list(range(6))


def test_an_imported_trial_never_wins(prepared: Prepared, tmp_path: Path) -> None:
    job = job_with()
    first = begin(job, prepared.snapshot, tmp_path, 0)
    lucky = Asking(first, job).ask()
    drawn = job.family.draw(lucky, job.space)
    lucky.set_user_attr(HYPERPARAMETERS, drawn.model_dump())
    first.tell(lucky, 0.999)
    first.set_user_attr(ENDED, "yes")
    second = begin(job, prepared.snapshot, tmp_path, 1)
    assert [trial.value for trial in imported(second)] == [0.999]
    tuned = tune(second, job, LocalTrainer(job, prepared), tmp_path)
    assert IMPORTED_FROM not in tuned.best.user_attrs
    assert tuned.best.values[0] < 0.999


def test_a_continued_night_recalls_nothing_twice(prepared: Prepared, tmp_path: Path) -> None:
    job = job_with()
    whole_night(job, prepared, tmp_path, 0)
    second = begin(job, prepared.snapshot, tmp_path, 1)
    before = len(second.trials)
    again = begin(job, prepared.snapshot, tmp_path, 1)
    assert again.study_name == second.study_name
    assert len(again.trials) == before


def test_an_import_that_was_cut_short_is_completed(prepared: Prepared, tmp_path: Path) -> None:
    job = job_with()
    first = whole_night(job, prepared, tmp_path, 0)
    second = open_study(job, prepared.snapshot.fingerprint, tmp_path, EVENING + timedelta(days=1))
    cut = optuna.create_study(direction="maximize")
    recall(cut, job, prepared.snapshot, None, tmp_path)
    second.add_trials(cut.trials[:2])
    recall(second, job, prepared.snapshot, None, tmp_path)
    assert len(imported(second)) == len(first.trials)


def test_only_recent_nights_are_remembered(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job(search={"pruner": "none", "space": SPACE, "sampler": "random"}, budget={"trials": 1})
    for night in range(NIGHTS + 2):
        whole_night(job, prepared, tmp_path, night)
    latest = begin(job, prepared.snapshot, tmp_path, NIGHTS + 2)
    assert len({trial.user_attrs[IMPORTED_FROM] for trial in imported(latest)}) == NIGHTS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"space": {"optimizer": ["adam"]}}, "outside the present space ('momentum' not in"),
        ({"space": {"learning_rate": {"low": 1e-6, "high": 1e-5}}}, "outside the present space"),
        ({"space": {"epochs": 3}}, "epochs was 2 and is 3"),
        ({"space": {"dropout": {"low": 0.1, "high": 0.2}}}, "outside the present space"),
        ({"objective": "log_loss"}, "they had another objective"),
        ({"cost": "parameters"}, "they had another objective"),
        ({"max_parameters": 1000}, "their parameters was not measured"),
    ],
)
def test_what_does_not_fit_tonights_space_is_dropped_and_said(
    prepared: Prepared, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], reason: str
) -> None:
    whole_night(job_with(), prepared, tmp_path, 0)
    with caplog.at_level(logging.INFO, "tasks.study.memory"):
        second = begin(job_with(**change), prepared.snapshot, tmp_path, 1)
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert any(reason in message for message in said), said
    assert len(imported(second)) < 5


def test_a_wider_space_keeps_what_was_learned(prepared: Prepared, tmp_path: Path) -> None:
    whole_night(job_with(), prepared, tmp_path, 0)
    wider = job_with({"optimizer": ["adam", "momentum", "sgd"], "width": [16, 24, 32], "weight_decay": [0.0, 1e-4]})
    assert len(imported(begin(wider, prepared.snapshot, tmp_path, 1))) == 5


def test_memory_can_be_switched_off(prepared: Prepared, tmp_path: Path) -> None:
    whole_night(job_with(), prepared, tmp_path, 0)
    assert imported(begin(job_with(memory=False), prepared.snapshot, tmp_path, 1)) == []


def make_snapshot(folder: Path, body: str) -> Snapshot:
    return prepare(write_source(folder, body), "classification", folder / "snapshots")


ROWS = "r = np.random.default_rng(0); x = r.normal(size=(300, 3)); y = np.arange(300) % 3; {change}; return x, y"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("pass", None),
        ("x, y = x[:200], y[:200]", None),
        ("x[:, 1] += 1", "column 1 moved, its stability index is"),
        ("x[:, 1] *= 3", "column 1 moved, its stability index is"),
        ("y[:] = np.where(r.random(300) < .4, 0, y)", "the classes' shares moved by"),
        ("x = x[:, :2]", "rows had shape (3,)"),
        ("y[y == 2] = 1", "in 3 classes"),
    ],
)
def test_drift_is_told_from_growth(tmp_path: Path, change: str, reason: str | None) -> None:
    earlier = make_snapshot(tmp_path, ROWS.format(change="pass"))
    found = drift(earlier, make_snapshot(tmp_path, ROWS.format(change=change)))
    assert (found is None) == (reason is None)
    assert found is None or str(reason) in found


def test_memory_is_off_by_itself_when_data_has_drifted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = job_with()
    before = make_snapshot(tmp_path, ROWS.format(change="pass"))
    after = make_snapshot(tmp_path, ROWS.format(change="x[:, 1] += 1"))
    whole_night(job, Prepared.load(before, CPU), tmp_path / "studies", 0)
    with caplog.at_level(logging.INFO, "tasks.study.memory"):
        second = begin(job, after, tmp_path / "studies", 1)
    assert imported(second) == []
    assert "5 trials of earlier nights were left out: the data drifted: column 1 moved, its" in caplog.text
    assert np.isfinite(after.load(CPU)["train"][0].numpy()).all()


def test_what_moved_in_a_table_is_told_column_by_column(tmp_path: Path) -> None:
    def snapshot(towns: list[str], shift: float, gap: float) -> Snapshot:
        draw = np.random.default_rng(len(towns))
        frame = pd.DataFrame({"age": draw.normal(40 + shift, 10, 900), "town": draw.choice(towns, 900)})
        frame["steady"] = draw.normal(size=900)
        frame.loc[draw.random(900) < gap, "age"] = np.nan
        frame["y"] = draw.choice(["a", "b"], 900)
        frame.to_csv(tmp_path / "rows.csv", index=False)
        return prepare(DataConfig(source=str(tmp_path / "rows.csv")), "classification", tmp_path / "snapshots")

    before, now = snapshot(["Bonn", "Ulm"], 0, 0.0), snapshot(["Bonn", "Köln", "Ulm"], 20, 0.3)
    moved = {change.column: change for change in since(before, now)}
    assert [name for name, change in moved.items() if change.is_large] == ["age", "town"]
    assert moved["steady"].stability_index < 0.05
    assert moved["town"].new_categories == ("Köln",)
    assert (moved["age"].missing_before, moved["age"].missing_now) == pytest.approx((0.0, 0.3), abs=0.05)
    assert "| age **moved** | " in drift_table(changes(before, now))
    assert since(None, now) == since(now, now) == ()
