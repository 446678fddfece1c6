"""Weights that share memory: each is kept once, and comes back under every name, whichever way it was tied."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.families.networks import Ensemble
from models.training.weights import read_tensors, write_tensors


class Tied(nn.Module):
    """An encoder whose weight is the decoder's too, and a middle layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 6, bias=False)
        self.decoder = nn.Linear(6, 6, bias=False)
        self.decoder.weight = self.encoder.weight
        self.middle = self.again = nn.Linear(6, 6)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.middle(self.again(torch.tanh(self.encoder(rows))))
        return self.decoder(hidden)  # type: ignore[no-any-return]


class Viewing(nn.Module):
    """A second parameter that is a view of the first, and a buffer that is a part of it."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 6))
        self.view = nn.Parameter(view(self.table.data))
        self.register_buffer("row", self.table.data[1])

    def forward(self, rows: Tensor) -> Tensor:
        row = self.get_buffer("row")
        return rows @ self.table + (self.view.flatten() * row[0]).sum() + row


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda table: table.t(),
    "reshaped": lambda table: table.view(4, 9),
    "first rows": lambda table: table[:2],
    "a column": lambda table: table[:, 3],
    "every other": lambda table: table.flatten()[::2],
    "the same": lambda table: table[:],
}


def saved(model: nn.Module, path: Path) -> dict[str, Tensor]:
    write_tensors(model.state_dict(), path)
    return read_tensors(path.read_bytes())


def learned(model: nn.Module) -> nn.Module:
    """After some steps, each of which changes every weight where it lies."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        loss = model(torch.randn(8, 6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("build", [Tied, *(lambda view=view: Viewing(view) for view in VIEWS.values())])
def test_tied_weights_come_back_as_they_were(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = learned(build())
    again = build()
    again.load_state_dict(saved(model, tmp_path / "model.safetensors"))
    rows = torch.randn(5, 6)
    assert torch.equal(again(rows), model(rows))
    assert len(list(again.parameters())) == len(list(model.parameters()))


def test_what_has_several_names_is_kept_once_and_the_same_each_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = learned(Tied())
    tensors = saved(model, tmp_path / "first")
    assert tensors.keys() == model.state_dict().keys()
    assert (tmp_path / "first").stat().st_size < 2 * 6 * 6 * 4 + 6 * 4 + 600, "a weight was kept twice"
    saved(model, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_what_members_of_an_ensemble_share_is_kept_once(tmp_path: Path) -> None:
    shared = nn.Linear(300, 300)
    model = Ensemble([nn.Sequential(shared, nn.Linear(300, 2)) for _ in range(3)])
    tensors = saved(model, tmp_path / "model")
    assert all(torch.equal(tensors[f"members.{place}.0.weight"], shared.weight) for place in range(3))
    assert (tmp_path / "model").stat().st_size < 2 * 300 * 300 * 4


def test_empty_and_strided_tensors_are_kept_as_they_are(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(0, 3),
        "b": torch.zeros(0, 3),
        "c": torch.arange(12.0).view(3, 4).t(),
        "d": torch.ones(()),
    }
    write_tensors(tensors, tmp_path / "file")
    again = read_tensors((tmp_path / "file").read_bytes())
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
