"""The gate: only what is really better passes."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import torch
from optuna.trial import FrozenTrial, create_trial

from models.families import DataShape
from models.preprocessing import Standardization
from tasks.confirm import Challenger
from tasks.gate import Verdict, gate
from tasks.prepare import Snapshot
from tasks.tune import Prepared
from tasks.versions import Champion, Lineage, Manifest, Promotion
from tests.conftest import CPU, make_job, train_on

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
        seed=0,
        validation=trained.validation,
        generalization_gap=0.0,
        sharpness=0.0,
    )


def as_champion(challenger: Challenger, snapshot: Snapshot) -> Champion:
    lineage = Lineage(
        snapshot=snapshot.fingerprint, source="", study="", trial=0, seed=0, device="cpu", mlflow_run_id="",
        prefect_flow_run_id=None, git_commit=None, python="", packages={},
    )  # fmt: skip
    manifest = Manifest(
        job="small", model="mlp", hyperparameters={}, features=snapshot.shape.features, classes=snapshot.classes,
        metrics={}, lineage=lineage, files={},
    )  # fmt: skip
    promotion = Promotion(
        number=7, version="x", judged=6, run="r", reason="", promoted_at=datetime(2026, 1, 1, tzinfo=UTC)
    )
    return Champion(
        promotion=promotion, manifest=manifest, model=challenger.model, preprocessing=challenger.preprocessing
    )


@pytest.fixture(scope="module")
def weak(prepared: Prepared) -> Challenger:
    return make_challenger(prepared, epochs=1)


@pytest.fixture(scope="module")
def strong(prepared: Prepared) -> Challenger:
    return make_challenger(prepared, epochs=12)


def test_the_first_challenger_is_promoted(weak: Challenger, snapshot: Snapshot) -> None:
    verdict = gate(JOB, weak, None, snapshot, CPU)
    assert (verdict.decision, verdict.judged, verdict.champion_test) == ("PROMOTE", 0, None)


def test_a_tie_keeps_the_champion(strong: Challenger, snapshot: Snapshot) -> None:
    verdict = gate(JOB, strong, as_champion(strong, snapshot), snapshot, CPU)
    assert (verdict.decision, verdict.judged) == ("HOLD", 7)


def test_the_better_is_promoted_and_the_worse_rejected(
    weak: Challenger, strong: Challenger, snapshot: Snapshot
) -> None:
    assert gate(JOB, strong, as_champion(weak, snapshot), snapshot, CPU).decision == "PROMOTE"
    assert gate(JOB, weak, as_champion(strong, snapshot), snapshot, CPU).decision == "REJECT"


def test_a_gain_below_the_least_that_matters_holds(weak: Challenger, strong: Challenger, snapshot: Snapshot) -> None:
    picky = make_job(promotion={"min_improvement": 0.9})
    verdict = gate(picky, strong, as_champion(weak, snapshot), snapshot, CPU)
    assert verdict.decision == "HOLD"
    assert "promotion.min_improvement (0.9)" in verdict.reason


def test_each_is_measured_behind_its_own_preprocessing(strong: Challenger, snapshot: Snapshot) -> None:
    blind = Standardization(mean=torch.zeros(1, 1, 1), scale=torch.full((1, 1, 1), 1e9))
    verdict = gate(JOB, strong, as_champion(replace(strong, preprocessing=blind), snapshot), snapshot, CPU)
    assert verdict.decision == "PROMOTE"


def test_a_champion_of_other_rows_is_not_compared(strong: Challenger, snapshot: Snapshot) -> None:
    champion = as_champion(strong, replace(snapshot, shape=DataShape(features=(3,), outputs=10)))
    verdict = gate(JOB, strong, champion, snapshot, CPU)
    assert verdict.decision == "HOLD"
    assert "give the job a new name" in verdict.reason


def test_a_verdict_refuses_nan() -> None:
    with pytest.raises(ValueError, match="found accuracy nan"):
        Verdict(decision="PROMOTE", reason="", judged=0, challenger_test={"accuracy": float("nan")}, champion_test=None)
