"""Batches and standardisation: every row once an epoch, and nothing that varies becomes NaN."""

import torch

from models.batches import Split
from models.preprocessing import Standardization


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
