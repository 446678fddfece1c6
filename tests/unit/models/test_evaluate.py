"""Metrics are scikit-learn's, and sharpness tells a sharp minimum from a flat one."""

from typing import get_args

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import Tensor, nn

from models.evaluation.evaluate import evaluate, latency_ms, parameter_count, score, sharpness
from models.evaluation.metrics import METRICS, MetricName, metrics_of
from models.training.terms import mean_loss
from tasks.data.prepared import Prepared
from tests.conftest import train_on

RANDOM = np.random.default_rng(0)
TARGET = RANDOM.integers(0, 3, size=200)
LOGITS = RANDOM.normal(size=(200, 3)) + 1.5 * np.eye(3)[TARGET]


def test_every_metric_that_a_job_can_name_is_known() -> None:
    assert set(METRICS) == set(get_args(MetricName)) == {*metrics_of("classification"), *metrics_of("regression")}


def test_classification_metrics_are_scikit_learns() -> None:
    probabilities = torch.tensor(LOGITS).softmax(dim=1).numpy()
    predicted = LOGITS.argmax(axis=1)
    assert score(torch.tensor(LOGITS), torch.tensor(TARGET), metrics_of("classification")) == pytest.approx(
        {
            "accuracy": sklearn.metrics.accuracy_score(TARGET, predicted),
            "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(TARGET, predicted),
            "f1_macro": sklearn.metrics.f1_score(TARGET, predicted, average="macro"),
            "roc_auc": sklearn.metrics.roc_auc_score(TARGET, probabilities, multi_class="ovr"),
            "log_loss": sklearn.metrics.log_loss(TARGET, probabilities),
        }
    )


def test_a_binary_roc_auc_is_scikit_learns() -> None:
    target = (TARGET > 0).astype(int)
    logits = torch.tensor(LOGITS[:, :2])
    expected = sklearn.metrics.roc_auc_score(target, logits.softmax(dim=1)[:, 1].numpy())
    assert score(logits, torch.tensor(target), ["roc_auc"])["roc_auc"] == pytest.approx(expected)


def test_regression_metrics_are_scikit_learns() -> None:
    target = RANDOM.normal(size=100)
    values = target + RANDOM.normal(scale=0.3, size=100)
    assert score(torch.tensor(values), torch.tensor(target), metrics_of("regression")) == pytest.approx(
        {
            "rmse": sklearn.metrics.root_mean_squared_error(target, values),
            "mae": sklearn.metrics.mean_absolute_error(target, values),
            "r2": sklearn.metrics.r2_score(target, values),
        }
    )


def test_metrics_agree_with_a_count_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 0.0]])
    measured = evaluate(nn.Identity(), logits, torch.tensor([0, 1, 1, 0]))
    assert measured["accuracy"] == 0.75
    right, wrong = -torch.log_softmax(torch.tensor([2.0, 0.0]), 0)
    assert measured["log_loss"] == pytest.approx((2 * right + wrong + torch.log(torch.tensor(2.0))).item() / 4)


def test_a_class_without_rows_breaks_no_metric() -> None:
    """A small validation split need not hold every class, and the tests turn warnings into errors."""
    measured = score(torch.randn(20, 5), torch.arange(20) % 2, metrics_of("classification"))
    assert all(np.isfinite(value) for value in measured.values())
    assert score(torch.randn(20, 2), torch.zeros(20, dtype=torch.int64), ["roc_auc"])["roc_auc"] == 0.5


def test_outputs_that_are_not_finite_have_no_metric() -> None:
    with pytest.raises(ValueError, match="outputs must be finite"):
        score(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]), ["accuracy"])


@pytest.mark.parametrize("name", METRICS)
def test_a_gain_is_positive_for_the_better_in_either_direction(name: MetricName) -> None:
    metric = METRICS[name]
    better, worse = (0.9, 0.8) if metric.direction == "maximize" else (0.8, 0.9)
    assert metric.gain(better, worse) > 0 > metric.gain(worse, better)


class Valley(nn.Module):
    """A loss of curvature times w squared, at its minimum."""

    def __init__(self, curvature: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 1e-4))  # at 0 exactly there is no gradient to climb
        self.curvature = curvature

    def loss(self) -> Tensor:
        return self.curvature * (self.weight**2).sum()


def test_sharpness_of_a_valley_is_what_its_formula_says() -> None:
    """Each of three weights moves by 0.001 (|w| + 1), so the loss rises to 3 c 0.0011² and more."""
    for curvature in (1.0, 1e4):
        valley = Valley(curvature)
        moved = 1e-4 + 1e-3 * (1e-4 + 1)
        base, worst = 3 * curvature * 1e-4**2, 3 * curvature * moved**2
        assert sharpness(valley, valley.loss) == pytest.approx((worst - base) / (1 + base), rel=1e-3)
        assert valley.weight.tolist() == pytest.approx([1e-4] * 3)


def test_sharpness_leaves_a_model_as_it_was(prepared: Prepared) -> None:
    model = train_on(prepared).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert sharpness(model, lambda: mean_loss(model, prepared.training)) > 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not model.training


def test_sharpness_is_that_of_what_takes_part(prepared: Prepared) -> None:
    """A parameter without a part in the loss changes nothing."""
    plain = Valley(1e4)
    spare = Valley(1e4)
    spare.unused = nn.Linear(3, 3)
    assert sharpness(spare, spare.loss) == sharpness(plain, plain.loss)


def test_parameters_and_latency_are_measured() -> None:
    model = nn.Linear(10, 5)
    model.bias.requires_grad_(False)
    assert parameter_count(model) == 50
    assert latency_ms(model.train(), torch.zeros(1, 10)) > 0
    assert model.training
