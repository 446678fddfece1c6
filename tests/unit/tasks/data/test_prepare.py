"""The split and the fingerprint: rows stay on their side, duplicates stay together, order does not matter."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.prepare import position_of, prepare, split_of
from tasks.data.rows import DataError, Rows, hash_rows
from tasks.data.snapshots import SPLITS, Snapshot
from tasks.data.sources import read_rows
from tasks.data.split_checks import Copies, split_findings
from tasks.job import DataConfig
from tests.conftest import CPU

DATA = DataConfig(source="sklearn://digits")


def write_source(folder: Path, body: str) -> DataConfig:
    (folder / "load.py").write_text(f"import numpy as np\n\n\ndef rows():\n    {body}\n")
    return DataConfig(source=f"{folder}/load.py:rows")


def rows_by_split(snapshot: Snapshot) -> dict[str, set[tuple[int, int]]]:
    splits = snapshot.load(torch.device("cpu"))
    return {name: {tuple(words) for words in hash_rows(features.numpy())} for name, (features, _) in splits.items()}


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
    assert np.array_equal(first, second)
    zeros = np.where(twice == 0, np.float32(-0.0), twice).astype(np.float32)
    assert np.array_equal(hash_rows(zeros)[0], first)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), more=st.integers(1, 200))
def test_the_order_of_rows_changes_nothing_and_more_rows_move_none(seed: int, more: int) -> None:
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(150 + more, 3)).astype(np.float32)
    features[::7] = features[0]
    with tempfile.TemporaryDirectory() as name:

        def made(rows: Any) -> Snapshot:
            np.savez(Path(name) / "rows.npz", features=features[rows], target=rows % 2)
            return prepare(DataConfig(source=f"{name}/rows.npz"), "classification", Path(name) / "snapshots")

        some, whole, shuffled = (
            made(rows) for rows in (np.arange(150), np.arange(150 + more), draw.permutation(150 + more))
        )
        assert whole.fingerprint == shuffled.fingerprint != some.fingerprint
        before, after = rows_by_split(some), rows_by_split(whole)
    for split in SPLITS:
        assert before[split] <= after[split]
        assert all(after[split].isdisjoint(after[other]) for other in SPLITS if other != split)


def test_a_changed_validation_fraction_moves_no_test_row() -> None:
    hashes = hash_rows(np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32))
    wide = DATA.model_copy(update={"validation_fraction": 0.4})
    before, after = (split_of(position_of(hashes), data) for data in (DATA, wide))
    test = SPLITS.index("test")
    assert np.array_equal(before == test, after == test)
    assert (before != after).any()


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
    first = prepare(DATA, "classification", tmp_path / "snapshots")
    written = (first.path / "train.features.npy").stat().st_mtime_ns
    assert prepare(DATA, "classification", tmp_path / "snapshots") == first
    assert (first.path / "train.features.npy").stat().st_mtime_ns == written
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == [first.fingerprint]


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
def test_an_unknown_source_is_one_sentence(source: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.source"):
        read_rows(DataConfig(source=source), "classification", tmp_path, tmp_path)


TOLERATED = {"leaking_column": "warn"}


def sales(rows: int, groups: int = 40) -> pd.DataFrame:
    """Rows of many customers over three years, of which a third bought again."""
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"amount": draw.normal(size=rows).round(6), "shop": draw.choice(["Bonn", "Ulm"], rows)})
    frame["customer"] = draw.integers(0, groups, rows)
    frame["day"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(draw.integers(0, 1000, rows), unit="D")
    frame["again"] = draw.choice(["no", "yes"], rows, p=[2 / 3, 1 / 3])
    return frame


def prepared_csv(frame: pd.DataFrame, folder: Path, last: Snapshot | None = None, **data: Any) -> Snapshot:
    frame.to_csv(folder / "rows.csv", index=False)
    config = DataConfig(source=str(folder / "rows.csv"), **data)
    return prepare(config, "classification", folder / "snapshots", last)


def test_with_a_time_column_the_test_rows_are_those_of_the_end(tmp_path: Path) -> None:
    frame = sales(900)
    cut: dict[str, Any] = {"time_column": "day", "test_from": "2026-01-01"}
    snapshot = prepared_csv(frame, tmp_path, **cut)
    assert [column.name for column in snapshot.columns] == ["amount", "customer", "shop"]
    late = frame["day"] >= "2026-01-01"
    assert snapshot.row_counts["test"] == late.sum()
    place = [column.name for column in snapshot.columns].index("amount")
    amounts = {split: set(features[:, place].tolist()) for split, (features, _) in snapshot.load(CPU).items()}
    assert amounts["test"] == set(frame["amount"][late])
    assert snapshot.row_counts["validation"] == pytest.approx(0.2 * (~late).sum(), rel=0.3)
    days = (pd.Timestamp("2026-01-01") - pd.Timestamp("2000-01-01")).days
    assert snapshot.test_positions().min() >= days * 86_400_000_000
    later = prepared_csv(frame, tmp_path, **cut | {"test_from": "2026-03-01"})
    assert later.fingerprint != snapshot.fingerprint
    with pytest.raises(DataError, match=r"the test split must not be empty; choose another data.test_from than 2028"):
        prepared_csv(frame, tmp_path, **cut | {"test_from": "2028-01-01"})
    frame.loc[7, "day"] = None
    with pytest.raises(DataError, match=r"column day, data.time_column, must hold a date in every row, found none in"):
        prepared_csv(frame, tmp_path, **cut)


CHANGES: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str | None]] = {
    "nothing": (lambda frame: frame, None),
    "more rows and a column": (lambda frame: pd.concat([frame, frame]).assign(new=1.5), None),
    "a column is gone": (lambda frame: frame.drop(columns="shop"), "shop was categorical and is gone"),
    "texts among numbers": (
        lambda frame: frame.assign(amount="about " + frame["amount"].astype(str)),
        "amount was numeric and is identifier",
    ),
    "half of the rows": (lambda frame: frame[:450], "found 450 where the last snapshot has 900, 50% less"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_since_the_last_snapshot_stops_the_night(change: str, tmp_path: Path) -> None:
    edit, says = CHANGES[change]
    last = prepared_csv(sales(900), tmp_path)
    changed = edit(sales(900))
    changed["again"] = changed.pop("again")
    if says is None:
        prepared_csv(changed, tmp_path, last)
        return
    with pytest.raises(DataError) as error:
        prepared_csv(changed, tmp_path, last)
    assert says in str(error.value)
    tolerant = prepared_csv(changed, tmp_path, last, checks={"changed_column": "warn", "rows_lost": "warn"})
    assert says in tolerant.findings[-1].sentence


def test_classes_that_a_split_has_too_few_of_are_named(tmp_path: Path) -> None:
    frame = sales(3000)
    balanced = prepared_csv(frame, tmp_path, split_by="customer")
    assert "unbalanced_split" not in [found.check for found in balanced.findings]
    frame["again"] = np.where(frame["customer"] % 2 == 0, "yes", "no")
    skewed = prepared_csv(frame, tmp_path, split_by="customer", checks=TOLERATED)
    (found,) = [found for found in skewed.findings if found.check == "unbalanced_split"]
    assert "each class must have about the same share of every split, found" in found.sentence
    assert sum(skewed.class_rows["test"]) == skewed.row_counts["test"]
    with pytest.raises(DataError, match="each class must have about the same share of every split"):
        prepared_csv(frame, tmp_path, split_by="customer", checks={"unbalanced_split": "error"} | TOLERATED)


def findings_of(snapshot: Snapshot) -> dict[str, str]:
    return {found.check: found.sentence for found in snapshot.findings}


# How often a survivor and a victim of each kind is there, as in the passenger list of the Titanic.
KINDS = {
    "crew,male,adult": (150, 494), "3rd,male,adult": (103, 421), "1st,male,adult": (53, 211),
    "2nd,male,adult": (46, 173), "crew,female,adult": (126, 46), "3rd,female,adult": (104, 44),
    "1st,female,adult": (52, 20), "2nd,female,adult": (45, 14), "crew,male,child": (12, 30), "3rd,male,child": (7, 24),
    "3rd,female,child": (6, 5), "2nd,female,child": (4, 3), "1st,male,child": (2, 1), "crew,female,child": (7, 2),
}  # fmt: skip


def test_a_few_kinds_of_rows_are_named_with_the_splits_that_they_make(tmp_path: Path) -> None:
    rows = [
        (*kind.split(","), label)
        for kind, both in KINDS.items()
        for label, n in zip("yn", both, strict=True)
        for _ in range(n)
    ]
    frame = pd.DataFrame(rows, columns=["class", "sex", "age", "survived"])
    findings = findings_of(prepared_csv(frame, tmp_path, checks=TOLERATED))
    assert (
        f"found {len(frame) - 14} of {len(frame)} that are copies of another, one row 644 times"
        in (findings["duplicate_rows"])
    )
    assert "set data.split_by to a column that tells rows apart" in findings["duplicate_rows"]
    assert "each split must have about its share of the rows, found" in findings["odd_split"]
    with pytest.raises(DataError, match="each split must have about its share of the rows, found"):
        prepared_csv(frame, tmp_path, checks=TOLERATED | {"odd_split": "error"})
    frame["passenger"] = np.arange(len(frame)) + 7
    frame["survived"] = frame.pop("survived")
    named = findings_of(prepared_csv(frame, tmp_path, checks=TOLERATED))
    assert "set data.split_by to passenger if they are rows of their own" in named["duplicate_rows"]
    split = findings_of(prepared_csv(frame, tmp_path, checks=TOLERATED, split_by="passenger"))
    assert not {"duplicate_rows", "odd_split", "unbalanced_split"} & set(split)


def test_one_row_many_times_is_named_with_the_rare_class_that_it_drowns(tmp_path: Path) -> None:
    """One row 3,322 times in 7,542 came into the test rows and made them 44 % of all, with a third of the positives
    that there should be."""
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"x": draw.normal(size=4220).round(6), "y": draw.choice(["no", "yes"], 4220, p=[0.945, 0.055])}
    )
    test = prepared_csv(frame, tmp_path).first("test", 1)[0, 0]
    twin = frame[np.isclose(frame["x"], test, atol=1e-6)][:1].assign(y="no")
    many = pd.concat([frame, *[twin] * 3322])
    snapshot = prepared_csv(many, tmp_path)
    assert snapshot.row_counts["test"] / len(many) > 0.5
    findings = findings_of(snapshot)
    assert "found 3322 of 7542 that are copies of another, one row 3323 times" in findings["duplicate_rows"]
    assert "in the test split, which should have 20.0%" in findings["odd_split"]
    assert "rows in 'yes' and 3." in findings["unbalanced_split"]
    even = findings_of(prepared_csv(frame, tmp_path))
    assert not {"duplicate_rows", "odd_split", "unbalanced_split"} & set(even)


def test_what_is_a_copy_depends_on_what_tells_rows_apart(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": np.arange(600) // 2, "x": [0.5, 0.5, 1.5] * 200, "y": ["a", "b", "b", "a"] * 150})
    by_id = findings_of(prepared_csv(frame, tmp_path, split_by="id", checks=TOLERATED))
    assert "found 100 of 600 that are copies of another, one row 2 times" in by_id["duplicate_rows"]
    assert by_id["duplicate_rows"].endswith("the gate counts them as one row; drop them")
    frame["id"] = pd.date_range("2026-01-01", periods=600)
    cut: dict[str, Any] = {"time_column": "id", "test_from": "2027-04-01"}
    by_time = prepared_csv(frame, tmp_path, checks=TOLERATED, roles={"x": "numeric"}, **cut)
    assert by_time.row_counts["test"] > 0
    assert "duplicate_rows" not in findings_of(by_time)
    assert "odd_split" in findings_of(by_time)


@pytest.mark.parametrize("rows", [60, 400, 5000])
def test_splits_that_chance_makes_are_no_finding(rows: int, tmp_path: Path) -> None:
    """With a class of one row in thirty, on twenty tables."""
    draw = np.random.default_rng(rows)
    odd = 0
    for _ in range(20 if rows < 5000 else 4):
        counts = np.array([draw.multinomial(rows, np.outer([0.6, 0.2, 0.2], [29 / 30, 1 / 30]).ravel())]).reshape(3, 2)
        counts[0] += 1  # every class has a training row
        known = Rows(count=rows, shape=(1,), dtype=np.dtype(np.float64), classes=("a", "b"), chunks=lambda: iter(()))
        odd += len(split_findings(counts, Copies(), known, DATA))
    assert odd == 0


@pytest.mark.process
def test_rows_many_times_the_memory_become_a_snapshot_and_are_trained_on(tmp_path: Path) -> None:
    """A process that may have 240 MB beside its libraries, and rows of 280 MB."""
    draw = np.random.default_rng(0)
    schema = pa.schema([*((f"x{place}", pa.float32()) for place in range(100)), ("y", pa.string())])
    with pyarrow.parquet.ParquetWriter(
        tmp_path / "rows.parquet", schema, use_dictionary=False, compression="none"
    ) as writer:
        for _ in range(140):
            columns = list(draw.standard_normal((100, 5000), dtype=np.float32))
            labels = np.where(columns[0] + columns[1] > 0, "high", "low")
            writer.write_table(pa.table([*columns, labels], schema=schema))
    script = Path(__file__).parent / "little_memory.py"
    finished = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "240"],
        # What is freed is given back at once, or the limit would be of what the allocator keeps.
        env={
            **os.environ, "PYTHONPATH": str(script.parents[4]), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr[-3000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert found["rows"] == 700_000
    assert found["accuracy"] > 0.95


@pytest.mark.parametrize("name", ["data[1].csv", "what?.csv", "a*b.csv", "[old] rows.csv"])
def test_a_name_that_could_be_a_pattern_is_a_name_first(tmp_path: Path, name: str) -> None:
    rows = "a,b\n" + "".join(f"{number / 7:.4f},{'xy'[number % 2]}\n" for number in range(100))
    (tmp_path / name).write_text(rows)
    for other in ("data1.csv", "whats.csv", "a-b.csv", "o rows.csv"):
        (tmp_path / other).write_text("another,table\n1,2\n")
    assert prepare(DataConfig(source=str(tmp_path / name)), "classification", tmp_path / "snapshots").rows == 100


def test_fractions_that_leave_few_training_rows_are_refused(tmp_path: Path) -> None:
    rows = "".join(f"{number / 7:.4f},{'xy'[number % 2]}\n" for number in range(30))
    (tmp_path / "few.csv").write_text(f"a,b\n{rows}")
    data = DataConfig(source=str(tmp_path / "few.csv"), validation_fraction=0.4, test_fraction=0.4)
    says = r"the train split must have 10 rows at least, found \d of 30 beside data\.validation_fraction 0\.4 "
    with pytest.raises(DataError, match=says):
        prepare(data, "classification", tmp_path / "snapshots")


@pytest.mark.parametrize("digits", [1, 4])
def test_measured_numbers_are_no_classes(tmp_path: Path, digits: int) -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=3000).round(digits)
    (tmp_path / "real.csv").write_text("a,b\n" + "".join(f"{value / 7:.4f},{value}\n" for value in values))
    says = r"column b, the target, must be a class .* found \d+ numbers with fractions, such as -?\d.*; choose search"
    with pytest.raises(DataError, match=says):
        prepare(DataConfig(source=str(tmp_path / "real.csv")), "classification", tmp_path / "snapshots")


def test_marks_in_halves_are_classes(tmp_path: Path) -> None:
    marks = "".join(f"{number / 7:.4f},{1 + number % 11 / 2}\n" for number in range(1100))
    (tmp_path / "marks.csv").write_text(f"a,b\n{marks}")
    data = DataConfig(source=str(tmp_path / "marks.csv"))
    assert len(prepare(data, "classification", tmp_path / "snapshots").classes) == 11
