"""What is confirmed is a configuration, by the mean of fresh seeds; what ships is one model of it."""

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import create_trial

import tasks.promotion.confirm
from models.evaluation.evaluate import predict_outputs, score
from models.evaluation.metrics import metrics_of
from models.families.networks import Ensemble
from models.fused.train import Outcome
from models.hyperparameters.declared import MLPHyperparameters
from models.rows.preprocessing import Standardization
from models.training.terms import Diverged, Trained
from tasks.data.prepared import Prepared
from tasks.job import TuningJob
from tasks.promotion.confirm import Challenger, choose, confirm
from tasks.search.tune import Tuned, TuningFailed, tune
from tasks.study.memory import baseline_hyperparameters, recall
from tasks.study.samplers import NUMBER
from tasks.study.studies import open_study
from tasks.trainer.local import LocalTrainer
from tests.conftest import make_job
from tests.unit.models.test_families import write_net
from tests.unit.tasks.search.test_tune import NOW

DIVERGED = Diverged("diverged at epoch 1: the loss is not finite")


def searched(job: TuningJob, prepared: Prepared, folder: Path) -> tuple[object, Tuned]:
    study = open_study(job, prepared.snapshot.fingerprint, folder, NOW)
    recall(study, job, prepared.snapshot, None, folder)
    return study, tune(study, job, LocalTrainer(job, prepared), folder)


def confirmed(job: TuningJob, prepared: Prepared, folder: Path, *, baseline: bool = False) -> list[Challenger]:
    """The challenger first, then the baseline where it is asked for."""
    study, tuned = searched(job, prepared, folder)
    found = confirm(study, job, prepared, baseline=tuned.baseline if baseline else None)  # type: ignore[arg-type]
    return [found.challenger] + ([found.baseline] if found.baseline else [])


def test_the_model_of_the_median_seed_ships(prepared: Prepared, tmp_path: Path) -> None:
    (challenger,) = confirmed(make_job(confirm={"candidates": 1, "seeds": 5}), prepared, tmp_path)
    assert len(set(challenger.seeds)) == 5
    (shipped,) = challenger.shipped
    assert challenger.values[challenger.seeds.index(shipped)] == statistics.median(challenger.values)
    assert challenger.validation["accuracy"] == statistics.median(challenger.values)
    assert challenger.mean == pytest.approx(statistics.fmean(challenger.values))
    assert challenger.winners_curse == pytest.approx(challenger.trial.values[0] - challenger.mean)


def test_of_an_even_number_of_seeds_the_worse_in_the_middle_ships(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job(confirm={"candidates": 1, "seeds": 4}, search={"objective": "log_loss", "space": {"epochs": 1}})
    (challenger,) = confirmed(job, prepared, tmp_path)
    assert challenger.validation["log_loss"] == sorted(challenger.values)[2]


def test_an_ensemble_predicts_with_the_mean_probabilities(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job(confirm={"candidates": 1, "seeds": 3, "ship": "ensemble"})
    (challenger,) = confirmed(job, prepared, tmp_path)
    assert challenger.shipped == challenger.seeds
    assert isinstance(challenger.model, Ensemble)
    features = prepared.validation.features
    mean = torch.stack([member(features).softmax(dim=1) for member in challenger.model.members]).mean(dim=0)
    torch.testing.assert_close(challenger.model(features).softmax(dim=1), mean)
    outputs = predict_outputs(challenger.model, features)
    assert challenger.validation == score(outputs, prepared.validation.target, metrics_of("classification"))


def test_an_ensemble_of_a_regression_predicts_the_mean(prepared_regression: Prepared, tmp_path: Path) -> None:
    search = {"objective": "rmse", "space": {"epochs": 2, "batch_size": 32}}
    confirm_ = {"candidates": 1, "seeds": 3, "ship": "ensemble"}
    job = make_job(data={"source": "sklearn://diabetes"}, search=search, confirm=confirm_)
    (challenger,) = confirmed(job, prepared_regression, tmp_path)
    assert isinstance(challenger.model, Ensemble)
    features = prepared_regression.validation.features
    mean = torch.stack([member(features) for member in challenger.model.members]).mean(dim=0)
    torch.testing.assert_close(challenger.model(features), mean)
    assert challenger.sharpness > 0


@pytest.mark.parametrize("best", ["the baseline", "a trial"])
def test_the_baseline_competes_with_as_many_seeds(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: str
) -> None:
    """Fresh seeds decide, whatever the search found. What each configuration is worth with them is set here."""
    job = make_job(confirm={"candidates": 2, "seeds": 2}, budget={"trials": 6}, search={"pruner": "none"})
    textbook = baseline_hyperparameters(job)
    train_seeds = tasks.promotion.confirm.train_seeds

    def worth(*arguments: Any) -> list[Outcome]:
        is_best = (arguments[2] == textbook) == (best == "the baseline")
        trained = [outcome for outcome in train_seeds(*arguments) if isinstance(outcome, Trained)]
        return [
            replace(outcome, validation={**outcome.validation, "accuracy": 0.9 if is_best else 0.8})
            for outcome in trained
        ]

    monkeypatch.setattr(tasks.promotion.confirm, "train_seeds", worth)
    study, tuned = searched(job, prepared, tmp_path)
    found = confirm(study, job, prepared, baseline=tuned.baseline)  # type: ignore[arg-type]
    assert found.baseline is not None
    assert found.baseline.trial.user_attrs["role"] == "baseline"
    assert len(found.baseline.seeds) == len(found.challenger.seeds) == 2
    assert (found.challenger is found.baseline) == (best == "the baseline")
    assert found.challenger.mean == 0.9


def candidate(number: int, *values: float, cost: float = 1.0) -> Challenger:
    module = torch.nn.Identity()
    return Challenger(
        model=module, preprocessing=Standardization(torch.zeros(1), torch.ones(1)),
        hyperparameters=MLPHyperparameters(), objective="accuracy", seeds=tuple(range(len(values))), values=values,
        trial=create_trial(values=[max(values), cost], user_attrs={NUMBER: number}), shipped=(0,), validation={},
        trained_with=tuple(range(len(values))), generalization_gap=0.0, sharpness=0.0,
    )  # fmt: skip


def test_the_best_mean_is_chosen_and_of_equal_ones_the_earlier_trial() -> None:
    """A tie is the baseline's, which is the first trial; with a cost the cheapest within the tolerance wins."""
    job, least = make_job(), make_job(search={"objective": "log_loss"})
    lucky, steady, baseline = candidate(7, 0.7, 0.99), candidate(4, 0.9, 0.9), candidate(0, 0.9, 0.9)
    assert choose([lucky], job) is lucky
    assert choose([lucky, steady], job) is steady
    assert choose([lucky, steady, baseline], job) is choose([baseline, steady, lucky], job) is baseline
    assert choose([lucky, steady, baseline], least) is lucky
    cheap = make_job(search={"cost": "parameters", "cost_tolerance": 0.1})
    assert (
        choose([candidate(3, 0.9, cost=9.0), candidate(5, 0.85, cost=2.0), candidate(6, 0.7, cost=1.0)], cheap).mean
        == 0.85
    )


def test_a_challenger_refuses_nan() -> None:
    with pytest.raises(ValueError, match="a challenger needs finite values, found"):
        candidate(1, 0.9, math.nan)


def test_a_seed_that_diverges_is_left_out(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(confirm={"candidates": 1, "seeds": 3})
    train_seeds = tasks.promotion.confirm.train_seeds

    def diverge_at_first(*arguments: object) -> list[Outcome]:
        return [DIVERGED, *train_seeds(*arguments)[1:]]  # type: ignore[arg-type]

    monkeypatch.setattr(tasks.promotion.confirm, "train_seeds", diverge_at_first)
    (challenger,) = confirmed(job, prepared, tmp_path)
    assert len(challenger.seeds) == len(challenger.values) == 2
    assert len(challenger.trained_with) == 3


def test_nothing_that_can_be_trained_again_is_one_sentence(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.promotion.confirm, "train_seeds", lambda *arguments: [DIVERGED] * len(arguments[-1]))
    with pytest.raises(TuningFailed, match="no configuration of small could be trained a second time"):
        confirmed(make_job(), prepared, tmp_path)


HEAD_UNUSED = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.hidden, self.out, self.spare = nn.Linear(64, 16), nn.Linear(16, shape.outputs), nn.Linear(16, 3)

    def forward(self, features):
        return self.out(self.hidden(features.flatten(1)).relu())
"""


@pytest.mark.parametrize(("ending", "warned"), [("", 0), (".softmax(dim=1)", 1)])
def test_a_user_s_model_is_confirmed_with_a_remark_where_it_gives_probabilities(
    prepared: Prepared, tmp_path: Path, caplog: pytest.LogCaptureFixture, ending: str, warned: int
) -> None:
    """A head that is never used has a gradient of zero, in sharpness as in the search. One warning a night, of the
    challenger, however many candidates there are."""
    net = write_net(tmp_path, HEAD_UNUSED.replace(".relu())", f".relu()){ending}"))
    job = make_job(
        model=net,
        search={"space": {"epochs": 2, "batch_size": 64}},
        confirm={"candidates": 2, "seeds": 2},
        budget={"trials": 3},
    )
    (challenger,) = confirmed(job, prepared, tmp_path)
    assert math.isfinite(challenger.sharpness)
    assert caplog.text.count("net.py:Net: its outputs sum to 1 in each row, as probabilities do") == warned
    assert bool(challenger.remark) == bool(warned)
