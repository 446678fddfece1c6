"""Comparing two models: what is said to be better is better, as often as promised."""

import math
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.evaluation.comparison import (
    calibration_error,
    compare,
    flipped,
    interval,
    mcnemar,
    rows_needed,
    slice_gains,
)
from models.evaluation.evaluate import predictions_of
from models.evaluation.metrics import METRICS, MetricName
from models.evaluation.resampling import resampled

ALPHA = 0.05


def outputs_for(metric: MetricName, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two models' outputs and the target; many ties among the probabilities."""
    random = torch.Generator().manual_seed(seed)
    if METRICS[metric].problem == "regression":
        target = torch.randn(rows, generator=random)
        return target + torch.randn(rows, generator=random), target + torch.randn(rows, generator=random), target
    target = torch.randint(0, 3, (rows,), generator=random)
    return (
        torch.randint(0, 3, (rows, 3), generator=random).float(),
        torch.randint(0, 3, (rows, 3), generator=random).float(),
        target,
    )


@pytest.mark.parametrize("metric", get_args(MetricName))
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 40))
@settings(max_examples=25)
def test_a_weighted_metric_is_the_metric_of_the_repeated_rows(metric: MetricName, seed: int, rows: int) -> None:
    outputs, _, target = outputs_for(metric, rows, seed)
    drawn = np.random.default_rng(seed).integers(rows, size=rows)
    weights = np.bincount(drawn, minlength=rows).astype(float)[None]
    predictions = predictions_of(outputs)
    (weighted,) = resampled(metric, predictions, target.numpy())(weights)
    repeated = target.numpy()[drawn]
    if metric == "r2" and len(set(drawn)) == 1:
        assert weighted == 0
    else:
        assert weighted == pytest.approx(METRICS[metric].compute(predictions[drawn], repeated), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("metric", get_args(MetricName))
def test_equal_models_have_no_gain(metric: MetricName) -> None:
    outputs, _, target = outputs_for(metric, 50, 0)
    found = compare(outputs, outputs.clone(), target, metric, confidence=0.95, seed=0)
    assert (found.gain, found.low, found.high, found.better, found.worse) == (0, 0, 0, False, False)


@pytest.mark.parametrize("metric", get_args(MetricName))
def test_the_gain_is_positive_for_the_better_whatever_the_direction(metric: MetricName) -> None:
    _, bad, target = outputs_for(metric, 400, 1)
    noise = torch.randn(400, generator=torch.Generator().manual_seed(2))
    good = target + noise / 10 if target.is_floating_point() else torch.eye(3)[target] * 5 + bad / 10
    found = compare(good, bad, target, metric, confidence=0.95, seed=0)
    assert found.better
    assert 0 < found.low < found.gain < found.high
    reverse = compare(bad, good, target, metric, confidence=0.95, seed=0)
    assert reverse.worse
    assert reverse.gain == pytest.approx(-found.gain)


def test_the_same_seed_gives_the_same_bounds() -> None:
    ours, theirs, target = outputs_for("f1_macro", 100, 3)
    first, again, other = (compare(ours, theirs, target, "f1_macro", confidence=0.9, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_mcnemar_is_the_chance_of_heads() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 0) == 0.5
    assert mcnemar(5, 0) == pytest.approx(1 / 32)
    assert mcnemar(3, 3) == pytest.approx(0.5 + math.comb(6, 3) / 64 / 2)


def test_a_few_rows_prove_nothing() -> None:
    """The bootstrap alone would call three rows won and none lost better: 5 % of resamples hold none of them."""
    target = torch.zeros(100, dtype=torch.int64)
    right, wrong = torch.tensor([[5.0, 0.0]]).repeat(100, 1), torch.tensor([[5.0, 0.0]]).repeat(100, 1)
    wrong[:4] = torch.tensor([0.0, 5.0])
    assert not compare(right, wrong, target, "accuracy", confidence=0.95, seed=0).better
    wrong[:5] = torch.tensor([0.0, 5.0])
    assert compare(right, wrong, target, "accuracy", confidence=0.95, seed=0).better


def simulated(random: np.random.Generator, rows: int, gain: float, disagree: float) -> tuple[Tensor, Tensor, Tensor]:
    """A night's test rows of two classes: on a share `disagree` of rows one model only is right, ours more often by
    `gain` of all rows."""
    draw = random.random(rows)
    ours = (draw < (disagree + gain) / 2) | (draw > disagree)
    theirs = (draw >= (disagree + gain) / 2) & (draw < disagree) | (draw > disagree)
    target = torch.from_numpy(random.integers(0, 2, rows))

    def outputs(right: npt.NDArray[np.bool_]) -> Tensor:
        return torch.eye(2)[torch.where(torch.from_numpy(right), target, 1 - target)]

    return outputs(ours), outputs(theirs), target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "rows"), [("accuracy", 40), ("accuracy", 360), ("log_loss", 200), ("f1_macro", 200)]
)
def test_of_two_equal_models_at_most_alpha_are_called_better(metric: MetricName, rows: int) -> None:
    nights, random = 300, np.random.default_rng(0)
    better = sum(
        compare(
            *simulated(random, rows, gain=0, disagree=0.1), metric, confidence=1 - ALPHA, seed=night, resamples=200
        ).better
        for night in range(nights)
    )
    # Three standard deviations of a binomial around alpha.
    assert better / nights <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / nights)


# How often each of 40 rows is there: all of them 50 times; or of many sizes, of which one is a third of all rows.
COPIES = {"alike": [50] * 40, "of many sizes": [300, *(1 + number * 13 % 37 for number in range(39))]}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", COPIES)
@pytest.mark.parametrize("metric", ["accuracy", "log_loss", "f1_macro"])
def test_copies_of_rows_prove_no_more_than_the_rows(metric: MetricName, sizes: str) -> None:
    """Of two models that are equally good, as above, with the same rows many times; taken for rows of their own they
    made a challenger better on a third of all nights, of which sixty nights show eight or fewer once in a thousand."""
    nights, random = 60, np.random.default_rng(0)
    counts = torch.tensor(COPIES[sizes])
    groups = torch.arange(40).repeat_interleave(counts)
    better = {"groups": 0, "rows": 0}
    for night in range(nights):
        ours, theirs, target = (part[groups] for part in simulated(random, 40, gain=0, disagree=0.3))
        for name, of_rows in (("groups", groups), ("rows", None)):
            found = compare(
                ours, theirs, target, metric, confidence=1 - ALPHA, seed=night, groups=of_rows, resamples=200
            )
            better[name] += found.better
    assert better["groups"] / nights <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / nights)
    assert better["rows"] / nights > 0.25


@pytest.mark.parametrize("metric", get_args(MetricName))
def test_equal_copies_change_no_bound_and_no_verdict(metric: MetricName) -> None:
    ours, theirs, target = outputs_for(metric, 40, 5)
    once = compare(ours, theirs, target, metric, confidence=0.95, seed=0)
    each = torch.arange(40).repeat_interleave(20)
    copied = compare(ours[each], theirs[each], target[each], metric, confidence=0.95, seed=0, groups=each * 7 - 3)
    for name in ("gain", "low", "high", "detectable"):
        assert getattr(copied, name) == pytest.approx(getattr(once, name), abs=1e-6)
    assert (copied.better, copied.worse, copied.groups, copied.rows) == (once.better, once.worse, 40, 800)
    alone = interval(ours, target, metric, seed=0)
    assert interval(ours[each], target[each], metric, seed=0, groups=each) == pytest.approx(alone, abs=1e-6)


def test_a_few_groups_prove_nothing_however_many_rows_they_have() -> None:
    target = torch.arange(400.0)
    groups = torch.arange(4).repeat_interleave(100)
    metrics: tuple[MetricName, ...] = ("rmse", "mae")
    for metric in metrics:
        found = compare(target + 0.1, target + 1, target, metric, confidence=0.95, seed=0, groups=groups)
        assert not found.better
        assert compare(target + 0.1, target + 1, target, metric, confidence=0.95, seed=0, groups=target // 50).better
    one = compare(target + 0.1, target + 1, target, "mae", confidence=0.95, seed=0, groups=target * 0)
    assert (one.better, one.groups) == (False, 1)
    labels = torch.arange(2).repeat_interleave(200)
    right, wrong = torch.eye(2)[labels], torch.eye(2)[1 - labels]
    worst = slice_gains(wrong, right, labels, ("a", "b"), confidence=0.95, seed=0, groups=torch.arange(400) // 100)
    assert [(part.gain, part.high) for part in worst] == [(-1.0, 0.0)] * 2


def test_a_coin_for_groups_of_many_sizes_is_as_exact_as_its_throws() -> None:
    """Groups of 3, 2, 2 and 1 rows, all won but the last: of 16 throws two reach it."""
    assert flipped(np.array([3.0, 2.0, 2.0, -1.0]), seed=0) == pytest.approx((2 / 16, 15 / 16), abs=0.005)
    assert flipped(np.array([5.0, 5.0, -5.0, 0.0]), seed=0) == (mcnemar(2, 1), mcnemar(1, 2))
    assert flipped(np.array([1000.0, 1.0, 1.0, 1.0, -1.0]), seed=0)[0] > 0.1
    assert flipped(np.array([0.0, 0.0]), seed=0) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("gain", [0.02, 0.05])
def test_a_real_gain_is_proven_four_times_in_five_with_the_rows_that_it_needs(gain: float) -> None:
    nights, disagree, random = 150, 0.1, np.random.default_rng(1)
    rows = rows_needed(gain, math.sqrt(disagree - gain**2), 1 - ALPHA)
    # The exact test is a little more careful than the normal approximation of the power, as exact tests are.
    rows = math.ceil(1.15 * rows)
    found = [
        compare(*simulated(random, rows, gain, disagree), "accuracy", confidence=1 - ALPHA, seed=night, resamples=300)
        for night in range(nights)
    ]
    assert sum(comparison.better for comparison in found) / nights >= 0.8 - 3 * math.sqrt(0.8 * 0.2 / nights)
    assert np.mean([comparison.detectable for comparison in found]) == pytest.approx(gain, rel=0.15)


def test_one_class_that_falls_is_seen_behind_a_better_whole() -> None:
    target = torch.arange(3).repeat_interleave(100)
    theirs, ours = torch.eye(3)[target], torch.eye(3)[target]
    theirs[:40] = torch.eye(3)[1]
    ours[200:230] = torch.eye(3)[1]
    gains = {found.name: found for found in slice_gains(ours, theirs, target, ("a", "b", "c"), confidence=0.95, seed=0)}
    assert gains["class a"].gain == pytest.approx(0.4)
    assert gains["class c"].gain == pytest.approx(-0.3)
    assert gains["class c"].high < -0.15
    assert gains["class b"].high == 0


def test_a_regression_is_sliced_by_the_target() -> None:
    target = torch.arange(400.0)
    theirs = target + 1
    ours = torch.where(target < 300, target + 0.5, target + 3)
    found = slice_gains(ours, theirs, target, (), confidence=0.95, seed=0)
    assert [round(part.gain, 2) for part in found] == [0.5, 0.5, 0.5, -2.0]
    assert [part.rows for part in found] == [100, 100, 100, 100]


def test_a_model_that_is_as_sure_as_it_is_right_is_calibrated() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 2, generator=random)
    target = (torch.rand(20_000, generator=random) < logits.softmax(dim=1)[:, 1]).long()
    assert calibration_error(logits, target) < 0.02
    assert calibration_error(logits * 10, target) > 0.15
