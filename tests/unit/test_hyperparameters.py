"""What is drawn lies in its domain, and a finished trial's hyperparameters are the ones it was trained with."""

import optuna
import pytest

from models.families import FAMILIES
from models.hyperparameters import MLPHyperparameters, Range, complete, search_space, suggest


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_what_is_drawn_lies_in_its_domain_and_is_complete_again(family: object) -> None:
    declared = family.hyperparameters  # type: ignore[attr-defined]
    space = search_space(declared, {})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(50):
        trial = study.ask()
        drawn = suggest(trial, declared, space)
        for name, domain in space.items():
            value = getattr(drawn, name)
            if isinstance(domain, Range):
                assert domain.low <= value <= domain.high
            elif isinstance(domain, tuple):
                assert value in domain
            else:
                assert value == domain
                assert name not in trial.params
        assert complete(declared, space, trial.params) == drawn


def test_a_family_declares_a_default_domain_for_each_hyperparameter() -> None:
    for family in FAMILIES.values():
        assert set(family.hyperparameters.default_space) == set(family.hyperparameters.model_fields)


def test_an_override_is_a_range_a_list_or_a_fixed_value() -> None:
    space = search_space(
        MLPHyperparameters, {"learning_rate": {"low": 1e-3, "high": 1e-2}, "optimizer": ["adam"], "dropout": 0.25}
    )
    assert space["learning_rate"] == Range(low=1e-3, high=1e-2)
    assert space["optimizer"] == ("adam",)
    assert space["dropout"] == 0.25
