"""What teams have, read as it is; and what would poison a night, refused in one sentence each."""

import gzip
import os
import sqlite3
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from models.rows.column import Column
from models.rows.preprocessing import FREQUENT_ROWS, TablePreprocessing, preprocessing_of
from models.rows.table import encode, recode
from tasks.data import prepare as prepare_module
from tasks.data import table_files
from tasks.data.prepare import prepare
from tasks.data.rows import DataError
from tasks.data.sources import read_rows, source_stamp
from tasks.job import DataConfig
from tests.conftest import CPU, require
from tests.reading import read, roles_of


def shared_data() -> Path:
    folder = os.environ.get("NIGHTLY_SHARED_DATA")
    if folder is None or not Path(folder).is_dir():
        require("NIGHTLY_SHARED_DATA does not name the folder of real data sets")
    return Path(folder)


def people(rows: int = 200, seed: int = 0) -> pd.DataFrame:
    """A table with every role: numbers with gaps, words, truths, dates, an identifier, and a target."""
    draw = np.random.default_rng(seed)
    age = draw.integers(18, 90, rows).astype(float)
    age[draw.random(rows) < 0.1] = np.nan
    return pd.DataFrame(
        {
            "number": np.arange(rows) + 1000,
            "age": age,
            "town": draw.choice(["Bonn", "Köln", "Ulm"], rows),
            "member": draw.choice(["yes", "no"], rows),
            "since": pd.Timestamp("2020-01-01") + pd.to_timedelta(draw.integers(0, 2000, rows), unit="D"),
            "bought": draw.choice(["often", "never"], rows),
        }
    )


def test_a_csv_file_and_a_parquet_file_of_the_same_rows_are_the_same_snapshot(tmp_path: Path) -> None:
    frame = people()
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_csv(tmp_path / "rows.csv.gz", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    shuffled = frame.sample(frac=1, random_state=0)[frame.columns[::-1]]
    shuffled.to_csv(tmp_path / "shuffled.tsv", index=False, sep="\t")
    snapshots = [
        prepare(DataConfig(source=str(tmp_path / name), target="bought"), "classification", tmp_path / "snapshots")
        for name in ("rows.csv", "rows.csv.gz", "rows.parquet", "shuffled.tsv")
    ]
    assert len({snapshot.fingerprint for snapshot in snapshots}) == 1
    assert roles_of(read(tmp_path / "rows.csv").known) == {
        "number": "identifier", "age": "numeric", "town": "categorical", "member": "boolean", "since": "datetime",
        "bought": "target",
    }  # fmt: skip


def test_a_folder_of_files_that_grows_moves_no_row(tmp_path: Path) -> None:
    def split() -> dict[str, set[bytes]]:
        data = DataConfig(source=str(tmp_path / "day-*.csv"), target="bought", split_by="number")
        splits = prepare(data, "classification", tmp_path / "snapshots").load(CPU)
        return {name: {row.tobytes() for row in features.numpy()} for name, (features, _) in splits.items()}

    people().to_csv(tmp_path / "day-1.csv", index=False)
    before = split()
    people(300, seed=1).assign(number=lambda frame: frame["number"] + 5000).to_csv(tmp_path / "day-2.csv", index=False)
    after = split()
    assert all(before[name] <= after[name] for name in before)


def test_rows_of_one_customer_stay_on_one_side(tmp_path: Path) -> None:
    frame = people().assign(customer=lambda frame: frame["number"] % 40)
    frame["age"] = np.arange(len(frame)) % 40 + frame["number"] / 1e4
    frame.to_csv(tmp_path / "rows.csv", index=False)
    data = DataConfig(source=str(tmp_path / "rows.csv"), target="bought", split_by="customer")
    snapshot = prepare(data, "classification", tmp_path / "snapshots")
    assert "customer" not in [column.name for column in snapshot.columns]
    place = [column.name for column in snapshot.columns].index("age")
    customers = {
        name: {float(age) // 1 for age in features[:, place]} for name, (features, _) in snapshot.load(CPU).items()
    }
    assert not customers["train"] & customers["test"]
    assert not customers["train"] & customers["validation"]


def test_the_census_is_read_with_its_dirt_named_and_mended() -> None:
    folder = shared_data() / "adult"
    names: dict[str, Any] = {"header": False, "target": "14"}
    rows = read(folder / "adult-train.csv", **names)
    assert (len(rows.target), rows.known.classes) == (32561, ("<=50K", ">50K"))
    assert roles_of(rows.known)["0"] == "numeric"
    assert roles_of(rows.known)["13"] == "categorical"
    assert next(line.missing for line in rows.known.described if line.name == "1") == 1836
    with pytest.raises(DataError, match=r"'<=50K' and '<=50K\.'.*set data\.tidy_labels: true"):
        read(folder / "adult-t*.csv", **names)
    both = read(folder / "adult-t*.csv", tidy_labels=True, **names)
    assert (len(both.target), both.known.classes) == (48842, ("<=50K", ">50K"))


def test_mnist_and_the_wines_are_read() -> None:
    mnist = shared_data() / "mnist"
    rows = read(mnist / "t10k-images-idx3-ubyte.gz", labels=str(mnist / "t10k-labels-idx1-ubyte.gz"))
    assert (rows.features.shape, len(rows.known.classes), rows.features.max()) == ((10000, 1, 28, 28), 10, 1.0)
    scores = read(shared_data() / "winequality" / "winequality-white.csv", "regression", header=False)
    assert (scores.features.shape, scores.target.min(), scores.target.max()) == ((4898, 11), 3, 9)


def test_arrays_images_and_frames_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", features=np.eye(20), target=np.arange(20) % 2)
    assert read(tmp_path / "rows.npz").features.shape == (20, 20)
    for number in range(12):
        path = tmp_path / "images" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6), number * 20, dtype=np.uint8)).save(path)
    pictures = read(tmp_path / "images")
    assert (pictures.features.shape, pictures.known.classes) == ((12, 1, 4, 6), ("cat", "dog"))
    frame = "pd.DataFrame({'a': [1.5, 2, 4] * 9, 'b': ['x', 'y', 'y'] * 9})"
    (tmp_path / "load.py").write_text(f"import pandas as pd\n\n\ndef rows():\n    return {frame}\n")
    found = read(f"{tmp_path}/load.py:rows", checks={"leaking_column": "warn"})
    assert (found.features.shape, found.known.classes) == ((27, 1), ("x", "y"))


def a_csv(text: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "rows.csv").write_text(text, encoding="utf-8")
        return {"source": str(folder / "rows.csv")}

    return write


def some_bytes(name: str, content: bytes, **data: Any) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / name).write_bytes(content)
        return {"source": str(folder / name), **data}

    return write


def table(rows: int = 40, **columns: Any) -> Callable[[Path], dict[str, Any]]:
    """Rows with one honest column, and those that are given."""
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"x": draw.normal(size=rows), **columns})
    frame["y"] = frame.pop("y") if "y" in frame else draw.choice(["a", "b"], rows)
    return a_csv(frame.to_csv(index=False))


def an_idx(*sizes: int, content: bytes = b"") -> bytes:
    return b"\0\0\x08" + bytes([len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + content


def images(*files: tuple[str, bytes | tuple[int, int]]) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        for name, content in files:
            path = folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                Image.new("L", content).save(path)
        return {"source": str(folder / "images")}

    return write


def a_parquet(cut: int | None = None, **columns: Any) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        path = folder / "rows.parquet"
        pd.DataFrame(columns).to_parquet(path)
        path.write_bytes(path.read_bytes()[:cut])
        return {"source": str(path)}

    return write


def an_npz(**arrays: Any) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        np.savez(folder / "rows.npz", **arrays)
        return {"source": str(folder / "rows.npz")}

    return write


def an_idx_pair(images: bytes, name: str = "i.idx") -> Callable[[Path], dict[str, Any]]:
    """Images, and good labels for two."""

    def write(folder: Path) -> dict[str, Any]:
        (folder / "labels.idx").write_bytes(an_idx(2, content=b"\0\1"))
        return some_bytes(name, images, labels=str(folder / "labels.idx"))(folder)

    return write


WORDS = ["yes", "no"] * 20
NUMBERED = b"n,x,y\n" + b"".join(b"%d,%d,%d\n" % (n, n * 7 % 5, n % 2) for n in range(40))
ZIPPED = gzip.compress(b"".join(b"%d,%d\n" % (number * 7919 % 104729, number % 2) for number in range(20000)))


def a_parquet_of(names: list[str] | None = None, **columns: Any) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        pyarrow.parquet.write_table(pa.table([*columns.values()], names=names or [*columns]), folder / "rows.parquet")
        return {"source": str(folder / "rows.parquet")}

    return write


AN_ARRAY = b"\x93NUMPY\x01\x00\x3a\x00{'descr': '|u1', 'fortran_order': False, 'shape': (1,), }\n1"
CUBE = an_idx(2, 2, 2, content=bytes(8))


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (a_csv(""), "must hold rows, found an empty first line"),
        (a_csv("a,b\n"), "must hold rows, found none below its header"),
        (a_csv("\n1,2\n"), "found an empty first line"),
        (a_csv("a,b\n1,2\n3\n"), "line 3 must have 2 fields as line 1 has, found 1: '3'"),
        (a_csv("a,b\n1,2\n3,4,5\n"), "line 3 must have 2 fields as line 1 has, found 3: '3,4,5'"),
        (a_csv("a,a\n1,2\n"), "found 'a' twice"),
        (a_csv("a,b\n1,x\0y\n2,z\n"), "found a NUL byte in row 0"),
        (a_csv("a,b\n" + "x" * 10_000_000 + ",1\n"), "a must hold at most 100000 letters a field, found 10000000"),
        (a_csv("<html>\n<body>404, not found</body>\n</html>\n"), "line 2 must have 1 fields as line 1 has, found 2"),
        (a_csv("x\n1\n2\n"), "must have a column to learn from"),
        (some_bytes("rows.csv", "a,b\nä,1\n".encode("latin-1") + b"\xff,2\n"), "UTF-8"),
        (some_bytes("rows.csv", "ä,b\n1,2\n".encode("latin-1")), "must be text in UTF-8"),
        (some_bytes("rows.csv", "a,b\n1,2\n".encode("utf-16")), "must be text in UTF-8"),
        (some_bytes("rows.csv.gz", ZIPPED[: len(ZIPPED) // 2], header=False), "Truncated compressed stream"),
        (some_bytes("rows.csv.gz", b"a,b\n1,2\n"), "Not a gzipped file"),
        (some_bytes("rows.csv.gz", ZIPPED[:5]), "must be readable whole"),
        (table(y=["a", None, "b", None] * 10), "must have a value in every row, found 20 without one (row 1, 3, 5"),
        (table(y=[None] * 40), "the target, must have a value, found none"),
        (table(y=["a"] * 40), "labels must have two classes at least, found 1"),
        (table(y=["yes", "Yes ", "no", "no."] * 10), "'Yes' and 'yes'; 'no' and 'no.'; set data.tidy_labels: true"),
        (table(z=[*range(37), "abc", "?", "12,5"]), "found 'abc' in row 37, '12,5' in row 39 (2 of 39 rows)"),
        (table(z=["2026-11-23"] * 30 + ["23.11.2026"] * 10), "must hold a date such as 2026-11-23 in every row"),
        (table(z=[1.5] * 39 + ["inf"]), "must hold a finite number in every row as it does in most, found 'inf'"),
        (table(400, y=WORDS * 10, z=WORDS * 10), "z must not give the target away, found that it predicts 100.0%"),
        (some_bytes("rows.csv", b"a,b\n1,2\n3,4\n", target="c"), "data.target must name a column"),
        (some_bytes("rows.csv", b"a,b\n1,2\n3,4\n", split_by="c"), "data.split_by must name a column"),
        (some_bytes("rows.csv", b"a,b\n1,2\n3,4\n", roles={"c": "numeric"}), "data.roles must name a column"),
        (some_bytes("rows.csv", b"a,b\n1,2\n3,4\n", raw=("c",)), "data.raw must name a column"),
        (
            some_bytes("rows.csv", NUMBERED, raw=("n",)),
            "found n, which is read as identifier; set data.roles.n to numeric",
        ),
        (some_bytes("rows.csv", b"a,b\nx,2\ny,4\n", roles={"a": "numeric"}), "a must hold a finite number, found"),
        (some_bytes("rows.csv", b"a,b\nx,2\ny,4\n", roles={"a": "datetime"}), "column a must hold a date such as"),
        (some_bytes("rows.csv", b"a,b\nx,2\ny,4\n", roles={"a": "boolean"}), "column a must hold true or false"),
        (a_parquet(cut=-200, a=[1.0] * 40, b=WORDS), "must be readable whole"),
        (a_parquet(cut=10, a=[1.0] * 40, b=WORDS), "must be readable whole"),
        (a_parquet(a=[[1, 2]] * 40, b=WORDS), "column a must hold plain values, found list"),
        (some_bytes("rows.parquet", b"<html>not found</html>"), "must be readable whole"),
        (some_bytes("rows.npz", b"PK\x03\x04 cut"), "must be readable whole"),
        (an_npz(x=np.eye(4)), "must hold arrays features and target, found x"),
        (an_npz(features=np.eye(4)[:, :0], target=np.arange(4)), "a row must have features, found (4, 0) of all"),
        (an_npz(features=np.eye(4), target=np.full(4, np.nan)), "the target must have a value, found none"),
        (some_bytes("rows.npz", AN_ARRAY), "must hold arrays features and target, found none with a name"),
        (some_bytes("rows.npz", b"\x80\x04N."), "must hold arrays of numbers or texts, but This file contains pickled"),
        (some_bytes("rows.npz", b"no archive"), "must hold arrays of numbers or texts, but This file contains pickled"),
        (some_bytes("rows.csv.gz", ZIPPED[:30] + b"\xff" * 9 + ZIPPED[39:], header=False), "must be readable whole"),
        (a_parquet_of(a=pa.array([1, 2]), b=pa.array([1, 2]), names=["a", "a"]), "found 'a' twice; rename one"),
        (a_parquet_of(a=pa.array([b"1"]).dictionary_encode()), "a must hold plain values, found dictionary<values=bin"),
        (a_parquet_of(a=pa.array([1], pa.duration("s"))), "a must hold plain values, found duration[s]; leave it out"),
        (a_parquet_of(**{"a\nb": pa.array([[1]])}), "column a\\nb must hold plain values, found list<"),
        (an_npz(features=np.eye(4), target=np.array([1, "a", None, 2], dtype=object)), "without objects"),
        (some_bytes("i.idx", b"\0\0\x0d" + CUBE[3:], labels="l"), "must begin as an IDX file"),
        (an_idx_pair(CUBE[:-1]), "the 8 bytes that its header claims, found 7"),
        (an_idx_pair(CUBE + b"1"), "the 8 bytes that its header claims, found more"),
        (some_bytes("i.idx", an_idx(2**31, 2**10, 2**10), labels="l"), "claims 2251799813685248 bytes, above"),
        (some_bytes("i.idx", an_idx(8, content=bytes(8)), labels="l"), "must hold images, found a list"),
        (some_bytes("i.idx", CUBE), "data.labels must name the file of labels"),
        (an_idx_pair(an_idx(3, 2, 2, content=bytes(12))), "must hold a label for each of 3 images, found (2,)"),
        (some_bytes("i.idx", CUBE, labels="gone.idx"), "gone.idx does not exist"),
        (an_idx_pair(gzip.compress(CUBE)[:-12], "i.idx.gz"), "must be readable whole"),
        (images(("cat/1.png", (4, 4)), ("dog/1.png", b"<html>404</html>")), "1 that are not (dog/1.png)"),
        (images(("cat/1.png", (4, 4)), ("cat/2.png", (4, 4)), ("dog/1.png", (5, 4))), "the same size, found 1"),
        (images(("readme.txt", b"nothing")), "must hold a sub-folder of images for each class, found no image"),
    ],
)  # fmt: skip
def test_a_bad_source_is_one_sentence_and_leaves_no_snapshot(
    write: Callable[[Path], dict[str, Any]], says: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        prepare(DataConfig(**write(tmp_path)), "classification", tmp_path / "snapshots")
    assert says in str(error.value)
    assert not (tmp_path / "snapshots").exists()


def test_everything_that_is_wrong_is_said_at_once_and_a_job_may_ignore_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    content = {"x": [*range(37), "abc", 4, 4], "empty": [None] * 40, "same": [1] * 40, "y": ["a", "b", "a", "b "] * 10}
    content["y"][3] = "B"
    pd.DataFrame(content).to_csv(path, index=False)
    with pytest.raises(DataError, match=r"column x must hold.*; and labels must differ"):
        read(path)
    rows = read(path, checks={"mixed_values": "warn", "labels_alike": "ignore", "constant_column": "ignore"})
    assert [finding.check for finding in rows.known.findings] == ["mixed_values", "empty_column", "small_class"]


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6, width=32), st.integers(-100, 100)), min_size=1))
def test_a_number_is_read_alike_as_a_number_and_as_a_text(values: list[float | None]) -> None:
    columns = [Column(name="x", role="numeric")]
    as_numbers = encode(pd.DataFrame({"x": pd.array(values, dtype="Float64")}), columns)
    as_texts = encode(pd.DataFrame({"x": ["" if value is None else f" {value!r} " for value in values]}), columns)
    assert np.array_equal(as_numbers, as_texts, equal_nan=True)


def test_a_category_keeps_its_meaning_under_another_list() -> None:
    before = [Column(name="town", role="categorical", categories=("Bonn", "Ulm"))]
    after = [Column(name="town", role="categorical", categories=("Köln", "Ulm"))]
    frame = pd.DataFrame({"town": ["Bonn", "Ulm", None, "Mars"]})
    assert np.array_equal(recode(encode(frame, before), before, after), encode(frame, after), equal_nan=True)


def test_rare_unseen_and_missing_values_have_a_place_and_nothing_is_nan() -> None:
    columns = [
        Column(name="age", role="numeric"),
        Column(name="since", role="datetime"),
        Column(name="town", role="categorical", categories=("Bonn", "Rare", "Ulm")),
    ]
    towns = ["Bonn"] * 20 + ["Ulm"] * 20 + ["Rare"] * (FREQUENT_ROWS - 1)
    frame = pd.DataFrame({"age": range(49), "since": "2026-11-23", "town": towns})
    preprocessing = TablePreprocessing.fit(torch.from_numpy(encode(frame, columns)), columns)
    served = pd.DataFrame({"age": [None, 24], "town": ["Mars", "Bonn"]})
    rows = preprocessing(torch.from_numpy(encode(served, columns)))
    assert rows.shape == (2, *preprocessing.shape_of((3,)))
    assert torch.isfinite(rows).all()
    assert rows[0].tolist() == [0.0] * 8 + [0.0, 0.0, 1.0]
    assert rows[1].tolist()[-3:] == [1.0, 0.0, 0.0]
    again = preprocessing_of(dict(preprocessing.state_dict()))
    assert torch.equal(again(torch.from_numpy(encode(served, columns))), rows)


def test_a_query_s_answer_is_a_table_whatever_types_it_has(tmp_path: Path) -> None:
    frame = people(300).drop(columns="number")
    frame["since"] = frame["since"].dt.date
    with sqlite3.connect(tmp_path / "people.db") as connection:
        frame.to_sql("people", connection, index=False)
        connection.execute("UPDATE people SET age = NULL WHERE town = 'Ulm'")
    connection.close()
    source = f"sqlite:///{tmp_path / 'people.db'}"
    rows = read(source, query="SELECT * FROM people ORDER BY age", target="bought")
    assert roles_of(rows.known) == {
        "age": "numeric", "town": "categorical", "member": "boolean", "since": "datetime", "bought": "target",
    }  # fmt: skip
    assert np.isnan(rows.features[:, 0]).sum() == (frame["age"].isna() | (frame["town"] == "Ulm")).sum()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "data.query must say what to select"),
        ({"query": "SELECT * FROM nowhere"}, "no such table: nowhere"),
        ({"query": "SELECT 1 AS a, 2 AS a"}, "must name each column once, found 'a' twice"),
        ({"query": "SELECT x, y FROM rows WHERE x > 10"}, "must hold rows, found none"),
        ({"query": "SELECT x'ff' AS x, 1 AS y"}, "must give numbers, texts, truths or dates, found bytes in column x"),
    ],
)
def test_a_bad_query_is_one_sentence(tmp_path: Path, data: dict[str, Any], says: str) -> None:
    with sqlite3.connect(tmp_path / "rows.db") as connection:
        connection.execute("CREATE TABLE rows (x, y)")
    connection.close()
    with pytest.raises(DataError) as error:
        read(f"sqlite:///{tmp_path / 'rows.db'}", **data)
    assert says in str(error.value)


def a_function(body: str) -> Callable[[Path], dict[str, Any]]:
    """A source of the user's own: what `rows` does; x are three numbers in each of 40 rows, y is a or b by chance."""

    def write(folder: Path) -> dict[str, Any]:
        before = (
            "import datetime\nimport numpy as np\nimport pandas as pd\nimport torch\n\n"
            "draw = np.random.default_rng(0)\nx = draw.normal(size=(40, 3))\ny = draw.choice(['a', 'b'], 40)\n"
        )
        (folder / "load.py").write_text(f"{before}\n\ndef rows():\n    {body}\n")
        return {"source": f"{folder}/load.py:rows"}

    return write


def a_database(*labels: Any) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        with sqlite3.connect(folder / "rows.db") as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS rows (x, y)")
            connection.execute("DELETE FROM rows")
            connection.executemany("INSERT INTO rows VALUES (?, ?)", [(i * 0.37 % 1, y) for i, y in enumerate(labels)])
        connection.close()
        return {"source": f"sqlite:///{folder}/rows.db", "query": "SELECT * FROM rows"}

    return write


X40 = np.random.default_rng(0).normal(size=(40, 3))
GAPS = [3, 5, 39]


def gapped(labels: list[Any], gap: Any) -> list[Any]:
    """40 labels, of which GAPS have none."""
    return [gap if row in GAPS else labels[row // 2 % 2] for row in range(40)]


@pytest.mark.parametrize(
    "write",
    [
        table(y=gapped(["a", "b"], None)),
        table(y=gapped(["a", "b"], " NA ")),
        a_parquet(x=X40[:, 0], y=gapped(["a", "b"], None)),
        a_parquet(x=X40[:, 0], y=pd.array(gapped([1, 2], pd.NA), dtype="Int64")),
        a_parquet(x=X40[:, 0], y=gapped([1.0, 2.0], np.nan)),
        a_database(*gapped(["a", "b"], None)),
        a_database(*gapped([1, 2], "")),
        an_npz(features=X40, target=np.array(gapped([1.0, 2.0], np.nan))),
        an_npz(features=X40, target=np.array(gapped(["a", "b"], ""))),
        an_npz(features=X40, target=np.array(gapped([b"a", b"b"], b"?"))),
        an_npz(features=X40, target=np.array(gapped(["2026-01-01", "2026-01-02"], "NaT"), dtype="datetime64[D]")),
        a_function("z = y.astype(object); z[[3, 5, 39]] = None; return x, z"),
        a_function("z = y.tolist(); z[3] = None; z[5] = np.nan; z[39] = pd.NA; return x.tolist(), z"),
        a_function("z = pd.Series(y); z[[3, 5, 39]] = None; return pd.DataFrame(x), z"),
        a_function("z = pd.Series(y == 'a', dtype='boolean'); z[[3, 5, 39]] = pd.NA; return x, z"),
        a_function("z = pd.Series(y, dtype='category'); z[[3, 5, 39]] = np.nan; return x, z"),
        a_function("z = pd.Series(y == 'a', dtype='Int64'); z[[3, 5, 39]] = pd.NA; return x, pd.Index(z)"),
        a_function("f = pd.DataFrame(x); f['y'] = y; f.loc[3, 'y'] = None; f.loc[[5, 39], 'y'] = ' '; return f"),
        a_function(
            "z = [datetime.date(2026, 1, 1 + i % 2) for i in range(40)]; z[3] = pd.NaT; z[5] = None; "
            "z[39] = float('nan'); return x, z"
        ),
    ],
)
def test_a_row_without_a_target_is_named_or_left_out_whatever_the_source(
    write: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    data = write(tmp_path)
    source = data.pop("source")
    with pytest.raises(DataError, match=r"must have a value in every row, found 3 without one \(row 3, 5, 39\); fill"):
        read(source, **data)
    rows = read(source, checks={"missing_target": "warn"}, **data)
    assert (len(rows.target), len(rows.known.classes), rows.known.count) == (37, 2, 37)
    assert "missing_target" in [found.check for found in rows.known.findings]


@pytest.mark.parametrize(
    ("gap", "says"),
    [
        ("np.nan", "found 3 without one (row 3, 5, 39)"),
        ("None", "found 3 without one (row 3, 5, 39)"),
        ("np.inf", "found inf in row 3"),
        ("'a lot'", "found 'a lot' in row 3"),
        ("pd.Timestamp(0)", "must be finite numbers, found Timestamp"),
    ],
)
def test_a_number_to_predict_is_there_and_finite(gap: str, says: str, tmp_path: Path) -> None:
    source = a_function(f"z = x[:, 0].astype(object); z[[3, 5, 39]] = {gap}; return x, z")(tmp_path)["source"]
    with pytest.raises(DataError) as error:
        read(source, "regression")
    assert says in str(error.value)


def a_file(code: str, **data: Any) -> Callable[[Path], dict[str, Any]]:
    """A source of the user's own, whole."""

    def write(folder: Path) -> dict[str, Any]:
        (folder / "load.py").write_text(code, encoding="utf-8")
        return {"source": f"{folder}/load.py:rows", **data}

    return write


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (a_function("f = pd.DataFrame(x); return pd.concat([f, f[[0]]], axis=1)"), "found '0' twice; rename"),
        (a_function("return pd.DataFrame({'0': y, 0: y, 'z': y})"), "found '0' twice; rename"),
        (a_function("return pd.DataFrame({('a', 'b'): y, ('a', 'c'): y})"), "found a MultiIndex of 2 levels; join"),
        (a_function("return pd.DataFrame({'a': [{}] * 40, 'y': y})"), "found dict in row 0 of column a; turn it"),
        (a_function("return pd.DataFrame({'a': x[:, 0], 'y': [object()] * 40})"), "found object in row 0 of column y"),
        (a_function("return pd.DataFrame({'a': x[:, 0] * 1j, 'y': y})"), "found complex128; turn"),
        (a_function("return pd.DataFrame({'a': pd.to_timedelta(range(40), unit='s'), 'y': y})"), "found timedelta64["),
        (a_function("return pd.DataFrame()"), "must hold a column"),
        (a_function("return [[1.0, 2.0], [3.0]] * 20, y"), "as an array, or rows of one length, found list"),
        (a_function("return x[:, 0].tolist(), y"), "features must have shape (rows, ...) and labels (rows,), found"),
        (a_function("return x, [[1], [1, 2]] * 20"), "found list in row 0 of labels; turn it"),
        (a_function("return x, [{1}, {2}] * 20"), "found set in row 0 of labels; turn it"),
        (a_function("return [[1, 2, {}]] * 40, y"), "found dict in row 0 of features; turn it"),
        (a_function("import scipy.sparse; return scipy.sparse.eye_array(40).tocsr(), y"), "return its toarray()"),
        (a_function("import scipy.sparse; return scipy.sparse.csr_matrix(x), y"), "found csr_matrix; return its"),
        (a_function("return np.ma.masked_less(x, 0), y"), "features must be finite, found NaN"),
        (a_function("return x * 1j, y"), "features must be numbers, found complex128; turn"),
        (a_function("return torch.tensor(x * 1j), y"), "features must be numbers, found complex128; turn"),
        (a_function("return x.astype('M8[s]'), y"), "features must be numbers, found datetime64[s]; turn"),
        (a_function("return np.zeros((40, 2), dtype='i4,f8'), y"), "features must be numbers, found [("),
        (a_function("return x, np.zeros(40, dtype='i4,f8')"), "labels must be numbers or texts, found [("),
        (a_function("return x, x[:, 0] * 1j"), "labels must be numbers or texts, found complex128"),
        (a_function("return [['a', 'b']] * 40, y"), "features must be numbers, but could not convert string to float"),
        (a_function("return [[10**400, 1]] * 40, y"), "found a whole number of 1329 bits in row 0 of features"),
        (a_function("return pd.DataFrame({'a': [10**400] * 40, 'y': y})"), "of 1329 bits in row 0 of column a; turn"),
        (a_function("return x, ['a', 'b\\udc80'] * 20"), "found 'b\\udc80', which is no text in Unicode in row 1 of"),
        (a_function("return np.full((40, 2), 1e300), y"), "features must be at most 1e+150, found more"),
        (a_function("return torch.empty(40, 2, device='meta'), y"), "must return features as an array"),
        (a_function("yield x\n    yield y"), "found generator, whose rows it must return instead of yielding them"),
        (a_function("return x"), "must return features and labels, or a DataFrame, found ndarray; return"),
        (a_function("return pd.Series([1.0, 2.0])"), "found Series; return a DataFrame"),
        (a_function("return 'ab'"), "found str; return a DataFrame"),
        (a_function("return {'features': x, 'target': y}"), "found dict; return a DataFrame"),
        (a_function("return x, y, x"), "found tuple of 3; return a DataFrame"),
        (a_function("return None"), "found NoneType; return a DataFrame"),
        (a_function("import sys; sys.exit(3)"), "but called sys.exit(3) in line 12; let it return"),
        (a_function("return rows()"), "raised RecursionError: maximum recursion depth exceeded (line 12); end"),
        (a_function("raise ValueError('one\\ntwo')"), "raised ValueError: one (line 12); correct it"),
        (a_function("raise ValueError()"), "raised ValueError: without a word (line 12); correct it"),
        (a_file("async def rows():\n    return 1"), "must be a plain function, found an async one; write"),
        (a_file("async def rows():\n    yield 1"), "must be a plain function, found an async one; write"),
        (a_file("class rows:\n    pass"), "must name a function, found a class; known are no functions"),
        (a_file("rows = 5"), "must name a function, found int rows; known are no functions"),
        (a_file("def row(): pass\n\n\ndef load(): pass"), "must name a function, found none; known are row, load"),
        (a_file("class Stop(BaseException): pass\n\n\ndef rows(): raise Stop"), "raised Stop: without a word (line 4)"),
        (a_function("f = pd.DataFrame(x); f.loc[3, 1] = 1e300; f['y'] = y; return f"), "found 1e+300 in row 3; "),
        (a_function("f = pd.DataFrame(x); f.loc[3, 1] = np.inf; f[5] = y; return f"), "found inf in row 3 (1 of"),
        (a_file("def rows(n): pass"), "must need no argument, but it is missing a required"),
        (a_file("def rows(*, n): pass"), "must need no argument, but it is missing a required"),
        (a_file("def rows(:\n"), "it holds a SyntaxError in line 1: "),
        (a_file("def rows():\nreturn 1\n"), "it holds a SyntaxError in line 2: expected an indented block"),
        (a_file("\0"), "it holds a SyntaxError in line"),
        (a_file("import no_such_module\n"), "No module named 'no_such_module' (line 1); install it"),
        (a_file("from . import sibling\n"), "import a file beside it by its name, without a dot"),
        (a_file("import argparse\nargparse.ArgumentParser().error('no')\n"), "but called sys.exit(2) in line 2"),
    ],
)  # fmt: skip
def test_a_function_that_gives_no_rows_is_one_sentence(
    write: Callable[[Path], dict[str, Any]], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sys.path.copy()
    with pytest.raises(DataError) as error:
        read(**write(tmp_path))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "load.py") in str(error.value)
    assert (sys.path, capfd.readouterr().out) == (before, "")


@pytest.mark.parametrize(
    "write",
    [
        a_function("return x, y"),
        a_function("return [x, y]"),
        a_function("return x.tolist(), y.tolist()"),
        a_function("return [tuple(row) for row in x], tuple(y)"),
        a_function("return pd.DataFrame(x), pd.Series(y)"),
        a_function("return pd.DataFrame(x, dtype='Float64'), pd.Index(y)"),
        a_function("return torch.tensor(x, requires_grad=True), y"),
        a_function("return torch.tensor(x).to_sparse(), y"),
        a_function("return [torch.tensor(row, requires_grad=True) for row in x], y"),
        a_function("return x.astype(object), y.astype(object)"),
        a_function("return x.astype(str), y"),
        a_function("return x.astype('>f8'), y.astype('>U1')"),
        a_function("return np.ma.masked_invalid(x), y"),
        a_function("return x.astype(np.longdouble), y"),
        a_function("print('reading'); return x, y"),
        a_file(
            "from __future__ import annotations\nimport pickle\nfrom dataclasses import dataclass\n"
            "from typing import NamedTuple, get_type_hints\nimport numpy as np\nfrom sibling import X, Y\n\n\n"
            "@dataclass\nclass Config:\n    rows: int = 40\n\n\nclass Rows(NamedTuple):\n    x: np.ndarray\n"
            "    y: np.ndarray\n\n\ndef rows(config=Config()):\n    assert get_type_hints(Config)['rows'] is int\n"
            "    return Rows(X, Y[: pickle.loads(pickle.dumps(config)).rows])\n"
        ),
    ],
)
def test_what_a_function_returns_is_read_whatever_holds_it(
    write: Callable[[Path], dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    a_function("return x, y")(tmp_path)
    code = (tmp_path / "load.py").read_text()
    (tmp_path / "sibling.py").write_text(code.replace("def rows", "X, Y = x, y\n\n\ndef rows"))
    expected = read(f"{tmp_path}/sibling.py:rows")
    rows = read(**write(tmp_path))
    assert np.array_equal(rows.features, expected.features)
    assert (rows.known.classes, rows.target.tolist()) == (("a", "b"), expected.target.tolist())
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "labels",
    [
        "torch.tensor(z)",
        "[torch.tensor(label) for label in z]",
        "z.tolist()",
        "pd.Series(z)",
        "np.ma.masked_array(z)",
        "pd.array(z, dtype='boolean')",
    ],
)
def test_labels_are_named_alike_whatever_holds_them(labels: str, tmp_path: Path) -> None:
    assert read(**a_function(f"z = y == 'a'; return x, {labels}")(tmp_path)).known.classes == ("false", "true")


@pytest.mark.parametrize(
    "rows",
    [
        "pd.DataFrame(x, index=pd.MultiIndex.from_arrays([y, y]))",
        "pd.DataFrame(x)",
        "pd.DataFrame(x, dtype=pd.SparseDtype(float))",
        "pd.DataFrame(x.astype('>f8'))",
    ],
)
def test_a_frame_is_read_whatever_its_index_and_its_columns_hold(rows: str, tmp_path: Path) -> None:
    found = read(**a_function(f"f = {rows}; f['y'] = y; return f")(tmp_path))
    assert roles_of(found.known) == {"0": "numeric", "1": "numeric", "2": "numeric", "y": "target"}
    assert found.features.shape == (40, 3)


def pictures(**names: Any) -> Callable[[Path], dict[str, Any]]:
    """Ten grey images of 6 by 4 of each of two classes, and what else is named: bytes, an image, or its classes'
    folder under another name."""

    def write(folder: Path) -> dict[str, Any]:
        draw = np.random.default_rng(0)
        for number in range(20):
            path = folder / "images" / ("cat" if number % 2 else "dog") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (4, 6), dtype=np.uint8)).save(path)
        for name, content in names.items():
            path = folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content is None:
                path.mkdir()
            else:
                content.save(path)
        return {"source": str(folder / "images")}

    return write


GREY = Image.new("L", (6, 4), 7)


@pytest.mark.parametrize(
    ("names", "check", "says"),
    [
        ({".ipynb_checkpoints/1.png": GREY, "cat/.DS_Store": b"", "__MACOSX/cat/._1.png": b"", "Thumbs.db": b"",
          "dog/._1.png": b"no image", ".DS_Store": b"", "desktop.ini": b"", ".git/x": b""}, None, ""),
        ({"fox/1.heic": b"1", "fox/2.heic": b"2"}, "empty_class", "found none in fox/ (1.heic, 2.heic); fill"),
        ({"fox": None}, "empty_class", "found none in fox/ (nothing in it); fill"),
        ({"train/fox/1.png": GREY, "train/owl/1.png": GREY}, "empty_class", "found none in train/ (fox/, owl/); fill"),
        ({"cat/1.heic": b"1"}, "unread_files", "found 1 that are left out (cat/1.heic); convert"),
        ({"cat/old/1.png": GREY}, "unread_files", "found 1 that are left out (cat/old/); convert"),
        ({"README.md": b"1", "1.png": GREY}, "unread_files", "found 2 that are left out (1.png, README.md); convert"),
        ({"dog/1.png/2.png": GREY}, "unread_files", "found 1 that are left out (dog/1.png/); convert"),
    ],
)  # fmt: skip
def test_nothing_in_a_folder_of_images_is_lost_in_silence(
    names: dict[str, Any], check: str | None, says: str, tmp_path: Path
) -> None:
    source = pictures(**names)(tmp_path)["source"]
    rows = read(source, checks={"empty_class": "warn"}).known
    assert (rows.count, rows.classes) == (20, ("cat", "dog"))
    assert [found.check for found in rows.findings] == [check] * (check is not None)
    assert all(says in found.sentence for found in rows.findings)
    if check == "empty_class":
        with pytest.raises(DataError, match="every class's folder must hold an image"):
            read(source)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"cat/1.png": b"no image"}, "found 1 that are not (cat/1.png), the first because it holds no image"),
        ({"cat/a.tif": Image.new("F", (6, 4))}, "(cat/a.tif), the first because a pixel of its mode F has 32 bits"),
        ({"Cat/1.png": GREY}, "punctuation or the form of their letters in Unicode, found 'Cat' and 'cat'"),
        ({"a\nb/1.png": GREY}, "a class's folder must have a printable name, found 'a\\nb'"),
        ({"b\udcff/1.png": GREY}, "a class's folder must have a printable name, found 'b\\udcff'"),
    ],
)
def test_an_image_that_cannot_be_read_is_one_sentence(names: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read(**pictures(**names)(tmp_path))
    assert says in str(error.value)


def test_a_folder_of_folders_of_classes_is_named(tmp_path: Path) -> None:
    pictures(**{"a/x": b""})(tmp_path)
    with pytest.raises(DataError, match=r"found no image but images/ \(a/, cat/, dog/\); fill it, or name the folder"):
        read(tmp_path)


def saved(image: Image.Image, name: str, folder: Path, **options: Any) -> NDArray[np.float32]:
    """What is read of one image."""
    for label in ("a", "b"):
        (folder / "images" / label).mkdir(parents=True, exist_ok=True)
        image.save(folder / "images" / label / name, **options)
    pixels: NDArray[np.float32] = read(folder / "images", checks={"several_frames": "error"}).features[0]
    return pixels


def test_sixteen_bits_are_read_in_their_full_range(tmp_path: Path) -> None:
    deep = np.array([[0, 255, 256], [1000, 40000, 65535]], dtype=np.uint16)
    for name in ("1.png", "1.TIF", "1.tiff", "1.pgm"):
        assert np.array_equal(saved(Image.fromarray(deep), name, tmp_path / name), deep[None] / np.float32(65535))
    shallow = Image.fromarray((deep // 257).astype(np.uint8))
    (tmp_path / "mixed" / "a").mkdir(parents=True)
    Image.fromarray(deep).save(tmp_path / "mixed" / "a" / "1.png")
    shallow.save(tmp_path / "mixed" / "a" / "2.png")
    shallow.convert("RGB").save(tmp_path / "mixed" / "a" / "3.png")
    (tmp_path / "mixed" / "b").symlink_to(tmp_path / "mixed" / "a")
    mixed = read(tmp_path / "mixed").features
    assert mixed.shape == (6, 3, 2, 3)
    assert np.abs(mixed - deep / 65535).max() < 1 / 255


@pytest.mark.parametrize(
    ("name", "mode"),
    [("1.png", "RGBA"), ("1.png", "LA"), ("1.png", "P"), ("1.webp", "RGBA"), ("1.gif", "RGBA"), ("1.tif", "RGBA"),
     ("1.tif", "LA"), ("1.tif", "PA")],
)  # fmt: skip
def test_what_is_transparent_is_seen_over_white(name: str, mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 3, 4))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    pixels = saved(image, name, tmp_path, **({"lossless": True} if name == "1.webp" else {}))
    assert np.allclose(pixels[:, :, :3], 0, atol=0.01)
    assert np.allclose(pixels[:, :, 3:], 1, atol=0.01)
    assert len(pixels) == (1 if mode == "LA" else 3)


@pytest.mark.parametrize(
    ("name", "mode"), [("1.jpg", "RGB"), ("1.JPEG", "CMYK"), ("1.tif", "I;16"), ("1.webp", "RGB"), ("1.png", "L")]
)
def test_an_image_is_turned_as_its_camera_says(name: str, mode: str, tmp_path: Path) -> None:
    """Tag 274 is the orientation; 6: the camera was turned, so the first column is the picture's top."""
    bright = np.zeros((8, 16), dtype=np.uint8)
    bright[:, :8] = 255
    if mode == "I;16":
        image = Image.fromarray(bright.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(bright).convert("RGB" if mode == "CMYK" else mode).convert(mode)
    exif = Image.Exif()
    exif[274] = 6
    pixels = saved(image, name, tmp_path, exif=exif)
    assert pixels.shape[1:] == (16, 8)
    assert pixels[:, :7].min() > 0.9
    assert pixels[:, 9:].max() < 0.1


@pytest.mark.parametrize("name", ["1.gif", "1.tif", "1.webp", "1.png"])
def test_of_several_frames_the_first_is_read_and_said(name: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), (255 * (2 - place) // 2,) * 3) for place in range(3)]
    with pytest.raises(DataError, match=r"found 2 of more frames or pages \(a/1\..*, b/1\..*\), of which the first"):
        saved(frames[0], name, tmp_path, save_all=True, append_images=frames[1:])
    rows = read(tmp_path / "images")
    assert [found.check for found in rows.known.findings][:1] == ["several_frames"]
    assert rows.features.min() > 0.99


def test_a_parquet_file_s_columns_are_read_whatever_pandas_wrote_beside_them(tmp_path: Path) -> None:
    frame = people()
    frame["town"] = frame["town"].astype("category")
    frame[frame["age"] > 0].to_parquet(tmp_path / "unnamed.parquet")
    frame[frame["age"] > 0].set_index("town").to_parquet(tmp_path / "named.parquet")
    damaged = pyarrow.parquet.read_table(tmp_path / "named.parquet").replace_schema_metadata({"pandas": "{cut"})
    pyarrow.parquet.write_table(damaged, tmp_path / "damaged.parquet")
    names = ("unnamed.parquet", "named.parquet", "damaged.parquet")
    first, *others = [roles_of(read(tmp_path / name, target="bought").known) for name in names]
    assert others == [first, first]
    assert first["town"] == "categorical"


@pytest.mark.parametrize("kind", ["boolean", "Float64", "float64", "Int64", "string", "datetime64[us]"])
@pytest.mark.parametrize("role", ["numeric", "boolean", "categorical", "datetime"])
def test_a_column_without_a_value_is_of_any_role(kind: str, role: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": X40[:, 0], "empty": pd.Series([None] * 40, dtype=kind), "y": WORDS})
    frame.to_parquet(tmp_path / "rows.parquet")
    rows = read(tmp_path / "rows.parquet", roles={"empty": role})
    assert np.isnan(rows.features[:, 0]).all()


def test_a_date_is_no_number(tmp_path: Path) -> None:
    dates = a_parquet(a=pd.date_range("2026-01-01", periods=40), y=WORDS)(tmp_path)
    with pytest.raises(DataError, match=r"column a must hold a finite number, found Timestamp"):
        read(**dates, roles={"a": "numeric"})


def test_numbers_whose_sum_is_none_are_one_sentence(tmp_path: Path) -> None:
    huge = a_parquet(x=[1.7e308, 1.7e308, -1.7e308, -1.7e308, 1e308] * 8, y=WORDS)(tmp_path)
    with pytest.raises(DataError, match=r"column x must hold a number of at most 1e\+150"):
        read(**huge)


def test_a_source_that_changes_while_it_is_read_is_one_sentence(tmp_path: Path) -> None:
    people().to_csv(tmp_path / "rows.csv", index=False)
    rows = read_rows(DataConfig(source=str(tmp_path / "rows.csv")), "classification", tmp_path, tmp_path)
    (tmp_path / "rows.csv").unlink()
    with pytest.raises(DataError, match=r"data\.source: .*rows\.csv does not exist; correct the path"):
        next(rows.chunks())


def test_a_file_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "LEAST_BOMB_BYTES", 2**22)
    with gzip.open(tmp_path / "rows.csv.gz", "wb") as file:
        for _ in range(40):
            file.write(b"0,aaaaaaaaaaaaaaa,b\n" * 50_000)
    with pytest.raises(DataError, match="must unpack to at most 200 times its size, found more after"):
        read(tmp_path / "rows.csv.gz", header=False)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [7, 64, 10**6])
def test_how_a_source_is_cut_into_chunks_and_buckets_changes_nothing(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = people(500).assign(code=lambda frame: np.where(frame.index < 400, 1.0, 2.5))
    for name in ("code", "town"):
        frame.loc[frame.index % 50 == 3, name] = None
    frame.to_parquet(tmp_path / "rows.parquet")
    data = DataConfig(source=str(tmp_path / "rows.parquet"), target="bought", roles={"code": "categorical"})
    whole = prepare(data, "classification", tmp_path / "whole")
    monkeypatch.setattr(table_files, "CHUNK_VALUES", 7 * chunk)
    monkeypatch.setattr(prepare_module, "BUCKET_BYTES", 40 * chunk if chunk > 7 else 1)
    cut = prepare(data, "classification", tmp_path / "cut")
    assert replace(cut, path=whole.path) == whole
    assert [column.categories for column in cut.columns if column.name == "code"] == [("1", "2.5")]


def test_a_source_s_stamp_changes_with_the_source_alone(tmp_path: Path) -> None:
    data = DataConfig(source=str(tmp_path / "day-*.csv"))
    (tmp_path / "day-1.csv").write_text("a,b\n1,2\n")
    first = source_stamp(data)
    assert first == source_stamp(data)
    (tmp_path / "day-2.csv").write_text("a,b\n1,2\n")
    second = source_stamp(data)
    os.utime(tmp_path / "day-1.csv", (0, 0))
    assert len({first, second, source_stamp(data)}) == 3
    assert source_stamp(DataConfig(source="load.py:rows")) is None
    assert source_stamp(DataConfig(source="sqlite:///rows.db", query="SELECT 1")) is None
