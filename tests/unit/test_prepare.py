"""The split and the fingerprint: rows stay on their side, duplicates stay together, order does not matter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.job import DataConfig
from tasks.prepare import SPLITS, Snapshot, hash_rows, position_of, prepare, split_of
from tasks.rows import DataError
from tasks.sources import read_rows

DATA = DataConfig(source="sklearn://digits")


def write_source(folder: Path, body: str) -> DataConfig:
    (folder / "load.py").write_text(f"import numpy as np\n\n\ndef rows():\n    {body}\n")
    return DataConfig(source=f"{folder}/load.py:rows")


def rows_by_split(snapshot: Snapshot) -> dict[str, set[bytes]]:
    splits = snapshot.load(torch.device("cpu"))
    return {name: set(hash_rows(features.numpy())) for name, (features, _) in splits.items()}


def test_a_row_never_changes_its_split_as_data_grows(tmp_path: Path) -> None:
    body = "r = np.random.default_rng(0); return r.normal(size=({rows}, 3)), np.arange({rows}) % 2"
    before = rows_by_split(prepare(write_source(tmp_path, body.format(rows=200)), "classification", tmp_path / "s"))
    after = rows_by_split(prepare(write_source(tmp_path, body.format(rows=500)), "classification", tmp_path / "s"))
    for split in SPLITS:
        assert before[split] <= after[split]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4))
def test_duplicates_are_never_on_two_sides(row: list[float]) -> None:
    twice = np.array([row, row], dtype=np.float32)
    first, second = hash_rows(twice)
    assert first == second
    zeros = np.where(twice == 0, np.float32(-0.0), twice).astype(np.float32)
    assert hash_rows(zeros)[0] == first


def test_a_changed_validation_fraction_moves_no_test_row() -> None:
    hashes = hash_rows(np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32))
    wide = DATA.model_copy(update={"validation_fraction": 0.4})
    positions = [position_of(row_hash) for row_hash in hashes]
    assert [split_of(p, DATA) == "test" for p in positions] == [split_of(p, wide) == "test" for p in positions]


def test_the_splits_have_about_their_fractions(snapshot: Snapshot) -> None:
    total = sum(snapshot.row_counts.values())
    assert total == 1797
    assert snapshot.row_counts["test"] / total == pytest.approx(0.2, abs=0.03)
    assert snapshot.row_counts["validation"] / total == pytest.approx(0.2, abs=0.03)


def test_the_fingerprint_depends_on_the_rows_and_not_on_their_order(tmp_path: Path) -> None:
    body = "r = np.random.default_rng(0); x = r.normal(size=(99, 3)); y = np.arange(99) % 2; {change}return x, y"
    fingerprints = [
        prepare(write_source(tmp_path, body.format(change=change)), "classification", tmp_path / "s").fingerprint
        for change in ("", "x, y = x[::-1], y[::-1]; ", "x[5, 0] += 1e-3; ", "y[5] = 1 - y[5]; ")
    ]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3


def test_a_snapshot_is_written_once(tmp_path: Path) -> None:
    first = prepare(DATA, "classification", tmp_path)
    written = (first.path / "rows.safetensors").stat().st_mtime_ns
    assert prepare(DATA, "classification", tmp_path) == first
    assert (first.path / "rows.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == [first.fingerprint]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return np.full((9, 2), np.nan), np.arange(9) % 2", "found NaN or infinity in 9 of 9 rows, first in row 0"),
        ("return np.zeros((9, 2)), np.zeros(9)", "labels must have two classes at least, found 1"),
        ("return np.zeros(9), np.arange(9) % 2", "features must have shape"),
        ("return np.zeros((9, 2)), np.arange(8) % 2", "features must have shape"),
        ("return [['a', 'b']] * 9, np.arange(9) % 2", "features must be numbers"),
        ("return np.arange(4.).reshape(2, 2), [0, 1]", "must not be empty"),
        ("raise OSError('the disk is gone')", "raised OSError: the disk is gone"),
        ("return 5", "must return features and labels"),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path: Path, body: str, says: str) -> None:
    with pytest.raises(DataError) as error:
        prepare(write_source(tmp_path, body), "classification", tmp_path / "s")
    assert says in str(error.value)
    assert not list((tmp_path / "s").glob("*")) if (tmp_path / "s").exists() else True


@pytest.mark.parametrize("source", ["sklearn://digit", "rows.csv", "rows.xlsx", "nowhere/load.py:rows"])
def test_an_unknown_source_is_one_sentence(source: str) -> None:
    with pytest.raises(DataError, match=r"data\.source"):
        read_rows(DataConfig(source=source), "classification")
