"""Batches and standardisation: every row once an epoch, and nothing that varies becomes NaN; raw columns stay."""

import math

import pandas as pd
import pytest
import torch

from models.rows.batches import Split
from models.rows.column import Column
from models.rows.preprocessing import Standardization, TablePreprocessing
from models.rows.table import encode


def test_each_row_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    split = Split(features=torch.arange(10.0)[:, None], target=torch.arange(10))
    generator = torch.Generator().manual_seed(0)
    epochs = [torch.cat([target for _, target in split.batches(4, generator)]).tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_standardization_keeps_a_constant_column_finite() -> None:
    features = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert Standardization.fit(features)(features).tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_an_image_is_standardised_per_channel() -> None:
    images = torch.randn(50, 3, 4, 4) * torch.tensor([1.0, 10.0, 100.0])[:, None, None] + 7
    standard = Standardization.fit(images)(images)
    assert torch.allclose(standard.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(standard.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-4)


COLUMNS = (
    Column(name="age", role="numeric"),
    Column(name="item", role="numeric"),
    Column(name="since", role="datetime"),
    Column(name="town", role="categorical", categories=("Bonn", "Ulm")),
)


def test_raw_columns_come_first_and_as_they_are() -> None:
    """A category is its number from 1 on; what is missing, or not known, is 0; nothing else of such a column is seen
    but that a value is missing."""
    frame = pd.DataFrame(
        {
            "age": [20.0, 30.0, 40.0, 50.0],
            "item": [7.0, 123_456.0, math.nan, 0.0],
            "since": ["2000-01-01", "2000-01-03", "2000-01-02", "2000-01-02"],
            "town": ["Ulm", "Atlantis", None, "Bonn"],
        }
    )
    rows = torch.from_numpy(encode(frame, COLUMNS))
    preprocessing = TablePreprocessing.fit(rows, COLUMNS, ("town", "item", "since"))
    seen = preprocessing(rows)
    assert seen.shape == (4, *preprocessing.shape_of((4,)))
    assert seen[:, :3].tolist() == [[2, 7, 0], [0, 123_456, 2], [0, 0, 1], [1, 0, 1]]
    assert seen[:, 3].mean().item() == pytest.approx(0, abs=1e-6)
    assert seen[:, 4:].tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]]
    again = TablePreprocessing(preprocessing.state_dict())
    assert torch.equal(again(rows), seen)


def test_raw_arrays_stay_as_they_are() -> None:
    for features in (torch.arange(12.0).view(4, 3), torch.arange(96.0).view(2, 3, 4, 4)):
        assert torch.equal(Standardization.unchanged(features)(features), features)
