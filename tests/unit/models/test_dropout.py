"""Dropout as a function of seed, layer and step: what share it drops, and that no two masks agree by more than luck."""

import pytest
import torch
from torch import nn

from models.training.dropout import SeededDropout, dropout_keys, seed_dropout

SIZE = (64, 128)


def masks(rate: float, keys: torch.Tensor) -> torch.Tensor:
    """Kept or not (masks, values) for each of the keys."""
    dropout = SeededDropout(rate)
    kept = []
    for key in keys:
        dropout.key = key
        kept.append(dropout(torch.ones(SIZE)).flatten() != 0)
    return torch.stack(kept)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_that_is_dropped_is_the_rate(rate: float) -> None:
    """Of 50 masks of 8,192 values, within five standard deviations."""
    kept = masks(rate, dropout_keys([7], 1, 0, 50).flatten()).float()
    assert kept.mean().item() == pytest.approx(1 - rate, abs=5 * (rate * (1 - rate) / kept.numel()) ** 0.5 + 1e-9)


def test_what_is_kept_is_scaled_so_that_the_mean_stays() -> None:
    dropped = SeededDropout(0.2)(torch.full(SIZE, 3.0))
    assert set(dropped.unique().tolist()) == {0.0, 3.75}


def test_no_two_masks_are_alike() -> None:
    """Of three seeds, two layers and four steps: correlations of 8,192 values lie within 5 / sqrt(8192) of zero."""
    kept = masks(0.5, dropout_keys([0, 1, 2**40], 2, 0, 4).flatten()).float()
    correlations = torch.corrcoef(kept) - torch.eye(len(kept))
    assert correlations.abs().max().item() < 5 / kept.shape[1] ** 0.5


def test_neighbouring_values_of_a_mask_are_independent() -> None:
    kept = masks(0.5, dropout_keys([3], 1, 0, 1).flatten()).float().view(SIZE)
    for one, other in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):
        pair = torch.stack([one.flatten(), other.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 5 / one.numel() ** 0.5


def test_keys_of_a_later_step_are_those_of_a_training_that_never_stopped() -> None:
    assert torch.equal(dropout_keys([5, 6], 3, 0, 10)[4:], dropout_keys([5, 6], 3, 4, 6))


def test_a_model_in_evaluation_drops_nothing_and_its_weights_keep_their_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.9), nn.Dropout(0.5)))
    names = list(model.state_dict())
    assert len(seed_dropout(model)) == 2
    assert list(model.state_dict()) == names
    features = torch.ones(2, 4)
    torch.testing.assert_close(model.eval()(features), model[0](features))
