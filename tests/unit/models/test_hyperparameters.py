"""The space: what is drawn lies in its domain and matters, and a job overrides domains by name."""

import re
from itertools import product
from typing import Any

import optuna
import pytest

from models.families.family import FAMILIES, Family
from models.hyperparameters.declared import Hyperparameters, MLPHyperparameters
from models.hyperparameters.domains import Range, contains

SCHEDULES = ["constant", "step", "exponential", "cosine", "one_cycle", "plateau"]
OPTIMIZERS = ["sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "adagrad"]
EVERYTHING = {
    "epochs": {"low": 2, "high": 30},
    "batch_size": {"low": 16, "high": 4096, "log": True},
    "learning_rate": {"low": 1e-5, "high": 1.0, "log": True},
    "learning_rate_scaling": ["none", "linear"],
    "schedule": SCHEDULES,
    "warmup": {"low": 0, "high": 0.3},
    "step_every": {"low": 0.1, "high": 0.5},
    "step_factor": {"low": 0.1, "high": 0.9},
    "exponential_final": {"low": 1e-3, "high": 1, "log": True},
    "cosine_final": [0.0, 0.1],
    "one_cycle_peak": {"low": 0.1, "high": 0.5},
    "plateau_factor": [0.1, 0.5],
    "plateau_patience": {"low": 1, "high": 5},
    "optimizer": OPTIMIZERS,
    "momentum": {"low": 0.5, "high": 0.99},
    "beta1": [0.8, 0.9],
    "beta2": [0.99, 0.999],
    "rmsprop_alpha": [0.9, 0.99],
    "eps": {"low": 1e-9, "high": 1e-3, "log": True},
    "l1": {"low": 1e-7, "high": 1e-3, "log": True},
    "weight_decay": {"low": 1e-6, "high": 1e-1, "log": True},
    "label_smoothing": {"low": 0, "high": 0.2},
    "gradient_clip_norm": [0.0, 1.0],
    "early_stopping_patience": [0, 5],
    "activation": ["relu", "leaky_relu", "elu", "gelu", "silu", "tanh"],
    "initialisation": ["pytorch", "kaiming", "xavier", "orthogonal"],
    "dropout": {"low": 0, "high": 0.8},
}
OF_A_FAMILY: dict[str, dict[str, Any]] = {
    "mlp": {"depth": {"low": 1, "high": 6}, "width": {"low": 8, "high": 512}, "taper": {"low": 0.3, "high": 1}},
    "cnn": {"depth": [1, 2, 3, 4], "channels": [16, 32, 64], "batch_norm": [False, True]},
}


def drawn(family: Family, overrides: dict[str, Any], count: int) -> list[tuple[optuna.Trial, Hyperparameters]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = family.search_space(overrides)
    trials = [study.ask() for _ in range(count)]
    return [(trial, family.draw(trial, space)) for trial in trials]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_declares_a_domain_for_each_hyperparameter(name: str) -> None:
    declared = FAMILIES[name].hyperparameters
    assert set(declared.default_space) == set(declared.model_fields)
    assert set(EVERYTHING) | set(OF_A_FAMILY[name]) == set(declared.model_fields)


@pytest.mark.parametrize(("name", "overridden"), list(product(FAMILIES, [False, True])))
def test_what_matters_is_drawn_from_its_domain_and_the_rest_keeps_its_default(name: str, overridden: bool) -> None:
    family = FAMILIES[name]
    overrides = EVERYTHING | OF_A_FAMILY[name] if overridden else {}
    space = family.search_space(overrides)
    declared = family.hyperparameters
    mattered: set[str] = set()
    for trial, hyperparameters in drawn(family, overrides, 200):
        values = hyperparameters.model_dump()
        for hyperparameter, domain in space.items():
            when = declared.conditions.get(hyperparameter)
            if when is not None and values[when.parent] not in when.values:
                assert hyperparameter not in trial.params
                assert values[hyperparameter] == declared.default_of(hyperparameter)
            else:
                assert contains(domain, values[hyperparameter])
                assert (hyperparameter in trial.params) == isinstance(domain, Range | tuple)
                mattered.add(hyperparameter)
    if overridden:
        assert mattered == set(space)


def test_a_schedule_is_searched_with_its_own_parameters_only() -> None:
    own = {
        "constant": set(),
        "step": {"step_every", "step_factor"},
        "exponential": {"exponential_final"},
        "cosine": {"cosine_final"},
        "one_cycle": {"one_cycle_peak"},
        "plateau": {"plateau_factor", "plateau_patience"},
    }
    everyones = set.union(*own.values())
    for trial, hyperparameters in drawn(FAMILIES["mlp"], EVERYTHING | OF_A_FAMILY["mlp"], 100):
        assert set(trial.params) & everyones == own[hyperparameters.schedule]
        assert ("warmup" in trial.params) == (hyperparameters.schedule != "one_cycle")


def test_the_default_of_every_class_is_the_textbook() -> None:
    textbook = MLPHyperparameters()
    assert (textbook.optimizer, textbook.learning_rate, textbook.batch_size) == ("adam", 0.01, 64)
    assert (textbook.depth, textbook.width, textbook.epochs) == (1, 50, 10)


def test_an_override_is_a_range_a_list_or_a_fixed_value() -> None:
    space = FAMILIES["mlp"].search_space(
        {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "optimizer": ["adam", "sgd"], "dropout": 0.2}
    )
    assert space["learning_rate"] == Range(low=1e-4, high=1e-2, log=True)
    assert space["optimizer"] == ("adam", "sgd")
    assert space["dropout"] == 0.2


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            {"optimizer": ["sgd"], "momentum": [0.8, 0.9]},
            "momentum matters only where optimizer is momentum or nesterov, which it never is here, found [0.8, 0.9]",
        ),
        ({"schedule": "cosine", "step_factor": 0.5}, "step_factor matters only where schedule is step"),
        ({"depth": 1, "taper": 0.5}, "taper matters only where depth is 2 or 3"),
        ({"momentun": 0.9}, "momentun is not a hyperparameter of mlp, found 0.9; write momentum (known are epochs"),
        (
            {"learning_rate": {"low": 1e-3, "high": 1e-2, "step": 5}},
            "learning_rate.step is not a field of a range, found 5; remove it (known are low",
        ),
        (
            {"learning_rate": {"low": 1e-3, "high": 1e-2, "points": 1}},
            "learning_rate.points must be a whole number from 2 to 1000",
        ),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0, found .nan"),
    ],
)
def test_an_override_that_cannot_be_is_refused_in_one_sentence(overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        FAMILIES["mlp"].search_space(overrides)
    assert "\n" not in str(error.value)


def test_the_nearest_configuration_keeps_what_the_space_allows() -> None:
    space = FAMILIES["mlp"].search_space(
        {
            "learning_rate": {"low": 1e-4, "high": 1e-3},
            "optimizer": ["sgd", "momentum"],
            "batch_size": [16, 100],
            "width": {"low": 10, "high": 40},
            "schedule": "constant",
        }
    )
    nearest = FAMILIES["mlp"].nearest({}, space)
    assert (nearest["learning_rate"], nearest["optimizer"]) == (1e-3, "sgd")
    assert (nearest["batch_size"], nearest["width"], nearest["depth"]) == (100, 40, 1)
    assert "taper" not in nearest  # it does not matter at depth 1
    assert "schedule" not in nearest  # it is fixed
    study = optuna.create_study()
    study.enqueue_trial(nearest)
    trial = study.ask()
    FAMILIES["mlp"].draw(trial, space)
    assert trial.params == nearest


def test_a_grid_takes_the_points_of_a_range_or_says_that_they_are_missing() -> None:
    overrides = {
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True, "points": 3},
        "width": {"low": 8, "high": 10, "points": 5},
    }
    space = FAMILIES["mlp"].grid_space(overrides)
    assert space["learning_rate"] == pytest.approx((1e-4, 1e-3, 1e-2))
    assert space["width"] == (8, 9, 10)
    assert not any(isinstance(domain, Range) for domain in space.values())
    with pytest.raises(ValueError, match="dropout: a grid takes points of a range, found none; add for example"):
        FAMILIES["mlp"].grid_space({"dropout": {"low": 0.0, "high": 0.5}})
