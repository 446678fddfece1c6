"""Rows on the device and rows on the disk: each is seen once an epoch, in a seeded order, as what it is."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.families.family import family_named
from models.rows import batches
from models.rows.batches import DiskRows, Split, batch_sizes, step_count
from models.rows.preprocessing import Standardization
from models.train import fusion_for
from models.training.loop import train
from models.training.terms import Training
from tasks.data import prepared as prepared_module
from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.data.snapshots import Snapshot
from tasks.job import DataConfig
from tests.conftest import CPU


def on_disk(folder: Path, rows: int) -> Split:
    np.save(folder / "rows.npy", np.arange(rows * 3, dtype=np.float32).reshape(rows, 3))
    return Split(features=DiskRows(path=folder / "rows.npy", device=CPU), target=torch.arange(rows))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 129, 1000])
@pytest.mark.parametrize("shard_bytes", [1, 2000, 10**9])
def test_streamed_rows_are_each_seen_once_with_their_targets(
    rows: int, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "SHARD_BYTES", shard_bytes)
    split = on_disk(tmp_path, rows)
    seen = list(split.batches(64, torch.Generator().manual_seed(0)))
    target = torch.cat([some for _, some in seen])
    assert sorted(target.tolist()) == list(range(rows))
    assert torch.equal(torch.cat([features for features, _ in seen])[:, 0], 3.0 * target)
    assert len(seen) == step_count(rows, 64)
    assert rows == 1 or min(len(some) for _, some in seen) > 1
    assert rows < 64 or target.tolist() != sorted(target.tolist())
    again, other = (
        torch.cat([some for _, some in split.batches(64, torch.Generator().manual_seed(seed))]) for seed in (0, 1)
    )
    assert torch.equal(again, target)
    assert rows < 63 or not torch.equal(other, target)


@pytest.mark.parametrize(
    ("rows", "batch_size", "sizes"),
    [
        (1, 64, [1]), (64, 64, [64]), (65, 64, [65]), (66, 64, [64, 2]), (128, 64, [64, 64]), (129, 64, [64, 65]),
        (3, 1, [1, 1, 1]), (5, 2, [2, 3]),
    ],
)  # fmt: skip
def test_a_row_that_is_left_over_joins_the_batch_before_it(rows: int, batch_size: int, sizes: list[int]) -> None:
    assert batch_sizes(rows, batch_size) == sizes
    order = torch.Generator().manual_seed(0)
    split = Split(features=torch.zeros(rows, 1), target=torch.arange(rows))
    assert [len(target) for _, target in split.batches(batch_size, order)] == sizes


def test_a_slice_of_the_disk_is_what_a_tensor_s_would_be(tmp_path: Path) -> None:
    features = on_disk(tmp_path, 100).features
    assert isinstance(features, DiskRows)
    assert (len(features), features.raw_shape, features.raw_bytes) == (100, (100, 3), 1200)
    assert torch.equal(features[5:7], torch.tensor([[15.0, 16, 17], [18, 19, 20]]))
    fitted = [Standardization.fit(rows) for rows in (features, features[:])]
    assert torch.equal(fitted[0].mean, fitted[1].mean)


def test_a_night_whose_rows_do_not_fit_streams_them_and_learns_as_well(
    snapshot: Snapshot, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_module, "memory_bytes", lambda _: 1_000_000)
    monkeypatch.setattr(batches, "SHARD_BYTES", 50_000)
    streamed = Prepared.load(snapshot, CPU)
    assert (streamed.training.is_streamed, prepared.training.is_streamed) == (True, False)
    assert torch.equal(streamed.validation.features[:], prepared.validation.all_features)
    family = family_named("mlp")
    training = Training(hyperparameters=family.hyperparameters.from_values({"epochs": 8}), seed=0)
    accuracies = [
        train(from_.setting(family, "accuracy"), training).validation["accuracy"] for from_ in (streamed, prepared)
    ]
    assert min(accuracies) > 0.93
    assert abs(accuracies[0] - accuracies[1]) < 0.03
    fusion = fusion_for(streamed.setting(family, "accuracy"), training)
    assert (fusion.members, "streamed" in fusion.reason) == (1, True)


def test_a_table_is_preprocessed_alike_on_the_disk_and_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"{n % 17},{'red' if n % 3 else 'blue'},{'' if n % 5 else n},{n % 2}" for n in range(400)]
    (tmp_path / "rows.csv").write_text("a,b,c,y\n" + "\n".join(lines))
    snapshot = prepare(DataConfig(source=str(tmp_path / "rows.csv")), "classification", tmp_path / "snapshots")
    loaded = Prepared.load(snapshot, CPU)
    monkeypatch.setattr(prepared_module, "memory_bytes", lambda _: 1)
    streamed = Prepared.load(snapshot, CPU)
    assert streamed.training.is_streamed
    assert torch.equal(streamed.training.features[:], loaded.training.all_features)
    assert loaded.training.all_features.isfinite().all()
    assert loaded.shape == streamed.shape
