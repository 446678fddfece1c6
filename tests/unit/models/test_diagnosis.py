"""Each diagnosis on a training made to show it."""

import pytest

from models.training.diagnosis import diagnose
from models.training.terms import Epoch
from tasks.data.prepared import Prepared
from tests.conftest import train_on


def curve(train: list[float], validation: list[float]) -> list[Epoch]:
    return [
        Epoch(number=number, train_loss=one, validation_loss=other, objective=0.5)
        for number, (one, other) in enumerate(zip(train, validation, strict=True), 1)
    ]


def test_a_training_that_settles_is_converged(prepared: Prepared) -> None:
    trained = train_on(prepared, epochs=20, learning_rate=3e-3, schedule="cosine", weight_decay=1e-4)
    assert diagnose(trained.epochs, prepared.prior_loss) == "converged"


@pytest.mark.parametrize("values", [{"learning_rate": 1e-6}, {"learning_rate": 1e-3, "epochs": 4, "width": 16}])
def test_a_training_that_hardly_learns_or_stops_too_early_is_underfit(
    prepared: Prepared, values: dict[str, float]
) -> None:
    trained = train_on(prepared, **values)  # type: ignore[arg-type]
    assert diagnose(trained.epochs, prepared.prior_loss) == "underfit"


def test_a_training_that_learns_its_rows_by_heart_is_overfit(prepared_regression: Prepared) -> None:
    trained = train_on(prepared_regression, objective="rmse", epochs=60, width=256, depth=3, batch_size=16)
    assert diagnose(trained.epochs, prepared_regression.prior_loss) == "overfit"


@pytest.mark.parametrize(
    ("train", "validation", "diagnosis"),
    [
        ([0.9], [0.9], "converged"),
        ([0.95], [0.95], "underfit"),
        ([0.5, 0.2, 0.1], [0.5, 0.4, 0.49], "converged"),
        ([0.5, 0.2, 0.1], [0.5, 0.4, 0.51], "overfit"),
        ([0.5, 0.2, 0.3], [0.5, 0.4, 0.6], "converged"),  # both rose: unstable, not learned by heart
        ([0.5, 0.3, 0.2], [0.5, 0.43, 0.45], "underfit"),
        ([0.5, 0.3, 0.2], [0.5, 0.47, 0.47], "converged"),
    ],
)
def test_the_thresholds_are_where_they_are_documented(
    train: list[float], validation: list[float], diagnosis: str
) -> None:
    assert diagnose(curve(train, validation), prior_loss=1.0) == diagnosis
