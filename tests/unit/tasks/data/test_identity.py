"""Labels, categories, ids and rows are the same by value, however a file, a chunk or a database has typed them."""

import decimal
import sqlite3
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import sqlalchemy
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from models.rows.column import Column
from models.rows.table import by_value, distinct, encode, forms_of, text_of
from tasks.data import table_files, table_queries
from tasks.data.prepare import prepare
from tasks.data.rows import DataError
from tasks.data.snapshots import Snapshot
from tasks.job import CheckName, DataConfig, Severity
from tests.servers import PostgresServer

NFD_TOWN = unicodedata.normalize("NFD", "München")
FRAMES: dict[str, pd.DataFrame] = {}
# What a small random table has by chance.
TOLERATED: dict[CheckName, Severity] = dict.fromkeys(
    ("leaking_column", "unbalanced_split", "small_class", "constant_column"), "ignore"
)


def write_csv(folder: Path, *days: dict[str, list[Any]], name: str = "day") -> str:
    for number, columns in enumerate(days):
        pd.DataFrame(columns, dtype=object).to_csv(folder / f"{name}-{number}.csv", index=False)
    return str(folder / f"{name}-*.csv")


def prepared(source: str, folder: Path, **data: Any) -> Snapshot:
    config = DataConfig(source=source, **{"checks": TOLERATED, **data})
    return prepare(config, "classification", folder / "snapshots")


def measured(rows: int, seed: int = 0) -> list[Any]:
    return list(np.random.default_rng(seed).normal(size=rows).round(4))


@pytest.mark.parametrize(
    ("first", "second", "classes"),
    [
        (["0", "1"], ["0.0", "1.0"], ("0", "1")),
        (["1", "10"], ["+1", "1e1"], ("1", "10")),
        (["-1", "0.5"], ["-1.0", ".50"], ("-1", "0.5")),
        (["True", "False"], ["true", "FALSE"], ("false", "true")),
        (["True", "False"], ["1", "0.0"], ("false", "true")),
        (["2026-11-23", "2026-11-24"], ["2026-11-23 00:00:00", "2026-11-24T00:00Z"], ("2026-11-23", "2026-11-24")),
        (["1.0", "1.0.1"], ["1", "1.0.1"], ("1", "1.0", "1.0.1")),
        (["007", "8"], ["7", "8"], ("007", "7", "8")),
        ([" Köln", "Ulm"], [unicodedata.normalize("NFD", "Köln "), "Ulm"], ("Köln", "Ulm")),
    ],
)  # fmt: skip
def test_labels_are_classes_by_their_values_in_all_files(
    first: list[str], second: list[str], classes: tuple[str, ...], tmp_path: Path
) -> None:
    days = [{"x": measured(60, day), "y": labels * 30} for day, labels in enumerate((first, second))]
    source = write_csv(tmp_path, *days)
    snapshot = prepared(source, tmp_path, checks=TOLERATED | {"labels_alike": "warn", "mixed_values": "warn"})
    assert snapshot.classes == classes


def test_letters_in_two_unicode_forms_are_a_finding_and_one_class(tmp_path: Path) -> None:
    labels = ["München", "Köln", NFD_TOWN, "Köln"] * 20
    source = write_csv(tmp_path, {"u": measured(80), "y": labels})
    with pytest.raises(DataError, match=r"the form of their letters in Unicode, found 'Mu\\u0308nchen' and 'München'"):
        prepared(source, tmp_path)
    tidied = prepared(source, tmp_path, tidy_labels=True)
    assert tidied.classes == ("Köln", "München")
    assert sum(sum(rows) for rows in tidied.class_rows.values()) == 80
    ignored = prepared(source, tmp_path, checks=TOLERATED | {"labels_alike": "warn"})
    assert ignored.classes == ("Köln", "München")


def test_columns_and_categories_have_one_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = "Größe", unicodedata.normalize("NFD", "Größe")
    days = [
        {composed: measured(60), "town": ["München", "Köln"] * 30, "y": ["a", "b", "b"] * 20},
        {decomposed: measured(60, 1), "town": [NFD_TOWN, "Köln"] * 30, "y": ["a", "b", "b"] * 20},
    ]
    snapshot = prepared(
        write_csv(tmp_path, *days), tmp_path, target="y", roles={decomposed: "numeric"}, missing=[decomposed]
    )
    assert [(column.name, column.categories) for column in snapshot.columns] == [
        (composed, ()),
        ("town", ("Köln", "München")),
    ]
    (matrix,) = (encode(pd.DataFrame({decomposed: [1.5], "town": [NFD_TOWN]}), snapshot.columns),)
    assert matrix.tolist() == [[1.5, 1.0]]


@pytest.mark.parametrize("way", ["csv", "parquet", "function", "query"])
def test_two_columns_of_one_name_are_one_sentence(way: str, tmp_path: Path) -> None:
    names = ("Größe", unicodedata.normalize("NFD", "Größe"), "y")
    table = pd.DataFrame(dict(zip(names, (measured(60), measured(60, 1), ["a", "b"] * 30), strict=True)))
    data: dict[str, Any] = {}
    match way:
        case "csv":
            source = write_csv(tmp_path, {str(name): list(values) for name, values in table.items()})
        case "parquet":
            table.to_parquet(tmp_path / "rows.parquet")
            source = str(tmp_path / "rows.parquet")
        case "function":
            source = a_function(tmp_path, table)
        case _:
            source, data["query"] = f"sqlite:///{tmp_path / 'rows.db'}", "SELECT * FROM rows"
            table.to_sql("rows", source, index=False)
    with pytest.raises(DataError, match="'Größe' twice; rename one"):
        prepared(source, tmp_path, **data)


def a_function(folder: Path, frame: pd.DataFrame) -> str:
    """A source that returns the frame."""
    FRAMES[str(folder)] = frame
    (folder / "load.py").write_text(
        f"from tests.unit.tasks.data.test_identity import FRAMES\n\n\ndef rows():\n    return FRAMES[{str(folder)!r}]\n"
    )
    return f"{folder}/load.py:rows"


def sides_of(snapshot: Snapshot, ids: dict[float, str]) -> dict[str, set[str]]:
    """The splits that each id has rows in; `ids` tell them by the value of the only feature."""
    sides: dict[str, set[str]] = {}
    for split in snapshot.row_counts:
        for value in snapshot.first(split, 10**6)[:, 0].tolist():
            sides.setdefault(ids[value], set()).add(split)
    return sides


def numbered_rows(ids: list[Any]) -> tuple[list[float], dict[float, str]]:
    """A feature that tells the rows apart, and the id of each by it."""
    values = [number + 0.5 for number in range(len(ids))]
    return values, dict(zip(values, map(str, ids), strict=True))


def test_rows_of_an_id_stay_on_one_side_however_it_is_written(tmp_path: Path) -> None:
    ids = list(range(60)) * 4
    values, id_of = numbered_rows(ids)
    labels = ["a", "b", "b"] * 80
    ways: list[Callable[[int], Any]] = [int, float, lambda number: f"{number}.00", lambda number: f"+{number}"]
    days = []
    for day, way in enumerate(ways):
        part = slice(60 * day, 60 * (day + 1))
        days.append({"customer": [way(number) for number in ids[part]], "x": values[part], "y": labels[part]})
    snapshot = prepared(write_csv(tmp_path, *days), tmp_path, split_by="customer")
    sides = sides_of(snapshot, id_of)
    assert len(sides) == 60
    assert {len(splits) for splits in sides.values()} == {1}


@pytest.mark.parametrize("kind", ["INTEGER", "NUMERIC", "TEXT"])
def test_long_ids_of_a_database_are_never_floats(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pandas' reading by chunks a gap made floats, in which three ids of 19 digits are one."""
    monkeypatch.setattr(table_queries, "QUERY_ROWS", 50)
    ids = [9_007_199_254_740_993_000 + number for number in range(60)] * 4
    values, id_of = numbered_rows(ids)
    with sqlite3.connect(tmp_path / "rows.db") as connection:
        connection.execute(f"CREATE TABLE rows (id {kind}, x REAL, y TEXT)")
        gaps = [(None, -1.5, "a"), (None, -2.5, "b")]
        rows = [*zip(ids, values, ["a", "b", "b"] * 80, strict=True)]
        connection.executemany("INSERT INTO rows VALUES (?, ?, ?)", [*rows[:120], *gaps, *rows[120:]])
    connection.close()
    source = f"sqlite:///{tmp_path / 'rows.db'}"
    snapshot = prepared(source, tmp_path, query="SELECT * FROM rows", split_by="id")
    sides = sides_of(snapshot, id_of | {-1.5: "none", -2.5: "none"})
    assert (len(sides), {len(splits) for splits in sides.values()}) == (61, {1})
    in_one_file = prepared(
        write_csv(tmp_path, {"id": [*ids, "", ""], "x": [*values, -1.5, -2.5], "y": [*["a", "b", "b"] * 80, "a", "b"]}),
        tmp_path,
        split_by="id",
    )
    assert in_one_file.checksums == snapshot.checksums


def test_a_served_category_and_truth_is_read_by_its_value() -> None:
    columns = [
        Column(name="code", role="categorical", categories=("1", "2.5")),
        Column(name="version", role="categorical", categories=("1", "1.0", "1.0.1")),
        Column(name="open", role="boolean"),
    ]
    rows = pd.DataFrame(
        {
            "code": [1, 1.0, "1", "1.00", decimal.Decimal("2.50"), np.float32(2.5)],
            "version": [1, 1.0, "1", "1.0", "1.0.1", None],
            "open": [True, 1.0, "1.0", "Yes", "T", decimal.Decimal(1)],
        },
        dtype=object,
    )
    assert encode(rows, columns).T.tolist()[:1] == [[0, 0, 0, 0, 1, 1]]
    assert encode(rows[:5], columns).T.tolist()[1] == [0, 0, 0, 1, 2]
    assert encode(rows, columns).T.tolist()[2] == [1] * 6


def test_a_text_does_not_depend_on_the_other_values_of_its_column() -> None:
    moments = pd.Series(pd.to_datetime(["2026-11-23", "2026-11-23 02:00"], format="ISO8601"))
    assert text_of(moments).tolist() == ["2026-11-23", "2026-11-23 02:00:00"]
    assert text_of(moments[:1]).tolist() == ["2026-11-23"]
    assert text_of(moments.dt.tz_localize("Europe/Berlin"))[1] == "2026-11-23 01:00:00"
    assert text_of(pd.Series([1e22, -0.0, 1e-7, 0.1])).tolist() == ["1" + 22 * "0", "0", "0.0000001", "0.1"]
    mixed = pd.Series([2**70, True, 2.0, decimal.Decimal("1.50"), "1.0", 2, None], dtype=object)
    codes, values = distinct(mixed, ())
    assert codes.tolist() == [0, 1, 2, 3, 4, 2, -1]
    assert text_of(values).tolist() == [str(2**70), "true", "2", "1.5", "1.0"]


@given(st.lists(st.one_of(st.integers(-(10**25), 10**25), st.decimals(-(10**9), 10**9, places=4)), min_size=1))
@settings(max_examples=50)
def test_the_name_of_a_number_is_that_of_its_value(numbers: list[Any]) -> None:
    exact = [decimal.Decimal(number) for number in numbers]
    ways = (
        str,
        lambda number: f"{number:+f}",
        lambda number: f"{number:f}.0" if number == int(number) else f"{number:f}00",
    )
    names = [by_value(pd.Series([way(number) for number in exact], dtype="string"), "number") for way in ways]
    assert names[0].tolist() == names[1].tolist()
    assert [decimal.Decimal(name) for name in names[0]] == exact
    assert forms_of(names[0].tolist()) == ("number",)
    assert by_value(names[0], "number").tolist() == names[0].tolist()


@dataclass(frozen=True)
class Written:
    """A random table, and the draws by which it is written in one way or another."""

    draw: np.random.Generator
    columns: dict[str, list[Any]]

    def parts(self) -> Iterator[dict[str, list[Any]]]:
        """One to four pieces of the rows, one after the other."""
        rows = len(self.columns["y"])
        cuts = sorted(self.draw.choice(np.arange(1, rows), self.draw.integers(0, 4), replace=False).tolist())
        for begin, end in zip([0, *cuts], [*cuts, rows], strict=True):
            yield {name: values[begin:end] for name, values in self.columns.items()}

    def spelled(self, name: str, value: Any) -> str:
        """A cell as one program or another writes it."""
        if value is None:
            return str(self.draw.choice(["", "NA", "?"]))
        if isinstance(value, bool):
            words = [["false", "False", "FALSE"], ["true", "True", "TRUE"]][value]
            return str(self.draw.choice([*words, str(int(value))] if name == "flag" else words))
        if isinstance(value, int):
            return str(self.draw.choice([f"{value}", f"{value}.0", f" {value}", f"{value}.00"]))
        if isinstance(value, float):
            return repr(value)
        if isinstance(value, datetime):
            ways = [f"{value:%Y-%m-%d %H:%M:%S.%f}", f"{value:%Y-%m-%dT%H:%M:%S.%fZ}"]
            if value.time() == time(0):
                ways += [f"{value:%Y-%m-%d}", f"{value:%Y-%m-%dT%H:%M}"]
            return str(self.draw.choice(ways))
        return unicodedata.normalize("NFC" if self.draw.random() < 0.5 else "NFD", value)

    def arrow(self, name: str, values: list[Any]) -> pa.Array:
        """A column of one of the types that can hold its values exactly."""
        there = [value for value in values if value is not None]
        if all(isinstance(value, bool) for value in there):
            kinds = [pa.bool_(), *([pa.int8()] if name == "flag" else []), pa.string()]
        elif all(isinstance(value, int) for value in there):
            largest = max(map(abs, there), default=0)
            kinds = [pa.int64(), pa.string(), pa.decimal128(38, 2), pa.dictionary(pa.int32(), pa.int64())]
            kinds += [pa.float64(), pa.int32()] if largest < 2**31 else []
        elif all(isinstance(value, float) for value in there):
            kinds = [pa.float64()]
        elif all(isinstance(value, datetime) for value in there):
            kinds = [pa.timestamp("us"), pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.string()]
        else:
            kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
        kind = kinds[self.draw.integers(len(kinds))]
        if kind == pa.string():
            spelled = [None if value is None else self.spelled(name, value) for value in values]
            return pa.array(spelled, kind)
        if pa.types.is_dictionary(kind):
            return pa.array(values, kind.value_type).dictionary_encode()
        if kind == pa.int8() or pa.types.is_decimal(kind):
            values = [None if value is None else int(value) for value in values]
        return pa.array(values, kind)

    def to_csv(self, folder: Path) -> str:
        parts = [
            {name: [self.spelled(name, value) for value in values] for name, values in part.items()}
            for part in self.parts()
        ]
        return write_csv(folder, *parts, name="part")

    def to_parquet(self, folder: Path) -> str:
        for number, part in enumerate(self.parts()):
            table = pa.table({name: self.arrow(name, values) for name, values in part.items()})
            pyarrow.parquet.write_table(table, folder / f"part-{number}.parquet")
        return str(folder / "part-*.parquet")

    def to_frame(self, folder: Path) -> str:
        table = pa.table({name: self.arrow(name, values) for name, values in self.columns.items()})
        mapper = table_files.NUMPY_TYPES.get if self.draw.random() < 0.5 else None
        exact = {name for name, values in self.columns.items() if any(isinstance(value, int) for value in values)}
        frame = table.to_pandas(types_mapper=mapper)
        for name in exact if mapper is None else ():
            frame[name] = pd.Series(self.columns[name], dtype=object)
        return a_function(folder, frame)

    def to_database(self, url: str) -> None:
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
        # A whole number of PostgreSQL may have any length, and psycopg gives it as a Decimal.
        number = sqlalchemy.BigInteger() if engine.name == "sqlite" else sqlalchemy.Numeric(24, 2)
        id_types = {int: number, str: sqlalchemy.Text(), datetime: sqlalchemy.DateTime()}
        (id_type,) = {type(value) for value in self.columns["id"] if value is not None}
        types: dict[str, Any] = {
            "id": id_types[id_type],
            "code": sqlalchemy.BigInteger,
            "flag": sqlalchemy.Boolean,
            "since": sqlalchemy.DateTime,
        }
        values: dict[str, list[Any]] = dict(self.columns)
        if isinstance(values["y"][0], int) and not isinstance(values["y"][0], bool):
            types["y"] = sqlalchemy.Float
        else:
            values["y"] = [self.spelled("y", value) for value in values["y"]]
        kinds = {"x": sqlalchemy.Double, "amount": sqlalchemy.Double} | types
        meta = sqlalchemy.MetaData()
        table = sqlalchemy.Table(
            "written", meta, *(sqlalchemy.Column(name, kinds.get(name, sqlalchemy.Text)) for name in values)
        )
        with engine.begin() as connection:
            meta.drop_all(connection)
            meta.create_all(connection)
            rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
            connection.execute(table.insert(), rows)


def a_table(seed: int) -> Written:
    draw = np.random.default_rng(seed)
    rows = int(draw.integers(150, 250))

    def drawn(choices: list[Any], gaps: float = 0.0) -> list[Any]:
        taken = draw.integers(len(choices), size=rows)
        return [None if draw.random() < gaps else choices[place] for place in taken]

    gaps = float(draw.choice([0.0, 0.02, 0.3]))
    number_or_name: list[list[Any]] = [
        list(range(60)),
        [10**18 + number for number in range(60)],
        [f"Jürgen {number}" for number in range(60)],
        [datetime.fromisoformat("2026-01-01") + timedelta(hours=12 * number) for number in range(60)],
    ]
    ids = number_or_name[draw.integers(4)]
    moments = [
        datetime.fromisoformat("2026-03-01T12:30") + timedelta(days=number, microseconds=number) for number in range(90)
    ]
    kinds: list[list[Any]] = [[0, 1], [True, False], ["München", "Köln", "Ulm"], [-1, 0, 10]]
    labels = kinds[draw.integers(4)]
    columns: dict[str, list[Any]] = {
        "id": drawn(ids, gaps / 10),
        "code": drawn([1, 2, 3, 40], gaps),
        "flag": drawn([True, False], gaps),
        "town": drawn(["München", "Köln", "Ulm", "1.0"], gaps),
        "amount": drawn([0.5, 1.0, 2.0, 1e6], gaps),
        "since": drawn(moments, gaps),
        "x": draw.normal(size=rows).tolist(),
        "y": drawn(labels),
    }
    return Written(draw, columns)


READ: dict[str, Any] = {
    "target": "y",
    "split_by": "id",
    "roles": {"code": "categorical", "flag": "boolean"},
    "checks": TOLERATED | {"labels_alike": "ignore"},
}


def same(snapshot: Snapshot, wanted: Snapshot) -> None:
    assert snapshot.classes == wanted.classes
    assert snapshot.columns == wanted.columns
    assert snapshot.row_counts == wanted.row_counts
    assert snapshot.class_rows == wanted.class_rows
    assert snapshot.fingerprint == wanted.fingerprint
    assert snapshot.checksums == wanted.checksums  # of each split's rows, in an order that only the rows decide


@pytest.mark.slow
@given(seed=st.integers(0, 2**32 - 1), chunk=st.sampled_from([500, 1500, 10**6]))
@settings(max_examples=5, phases=[Phase.generate])
def test_a_table_is_the_same_in_all_the_ways_that_it_can_be_written(
    tmp_path_factory: pytest.TempPathFactory, seed: int, chunk: int
) -> None:
    written, folder = a_table(seed), tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_files, "CHUNK_VALUES", chunk)
        patch.setattr(table_files, "CHUNK_BYTES", 4 * chunk)
        patch.setattr(table_queries, "QUERY_ROWS", max(1, chunk // 8))
        wanted = prepared(written.to_csv(folder), folder, **READ)
        same(prepared(written.to_parquet(folder), folder, **READ), wanted)
        same(prepared(written.to_frame(folder), folder, **READ), wanted)
        written.to_database(f"sqlite:///{folder / 'rows.db'}")
        in_database = {**READ, "query": "SELECT * FROM written"}
        same(prepared(f"sqlite:///{folder / 'rows.db'}", folder, **in_database), wanted)
        by_content = {**READ, "split_by": None, "roles": {**READ["roles"], "id": "ignored"}}
        same(
            prepared(str(folder / "part-*.parquet"), folder, **by_content),
            prepared(str(folder / "part-*.csv"), folder, **by_content),
        )


@pytest.mark.process
def test_a_postgresql_table_is_the_same_as_a_file(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    monkeypatch.setattr(table_queries, "QUERY_ROWS", 40)
    written = a_table(3)
    written.to_database(postgres.url.replace("postgresql://", "postgresql+psycopg://"))
    in_database = prepared(postgres.url, tmp_path, **READ, query="SELECT * FROM written")
    same(in_database, prepared(written.to_csv(tmp_path), tmp_path, **READ))


def test_python_s_whole_numbers_beside_a_gap_are_no_floats(tmp_path: Path) -> None:
    ids = [10**18 + number for number in range(60)] * 4
    values, id_of = numbered_rows(ids)
    gap: list[Any] = [None]
    frame = pd.DataFrame(
        {"id": pd.Series([*ids, *gap], dtype=object), "x": [*values, -1.5], "y": ["a", *["a", "b"] * 120]}
    )
    sides = sides_of(prepared(a_function(tmp_path, frame), tmp_path, split_by="id"), id_of | {-1.5: "none"})
    assert (len(sides), {len(splits) for splits in sides.values()}) == (61, {1})
    assert {split for splits in sides.values() for split in splits} == {"train", "validation", "test"}


def test_moments_and_their_texts_in_two_files_are_one_column(tmp_path: Path) -> None:
    days = pd.date_range("2026-01-01 12:00", periods=60)
    rest = {"x": measured(60), "y": ["a", "b"] * 30}
    pd.DataFrame({"day": days, **rest}).to_parquet(tmp_path / "1.parquet")
    pd.DataFrame({"day": days.astype(str), **rest}).to_parquet(tmp_path / "2.parquet")
    snapshot = prepared(str(tmp_path / "*.parquet"), tmp_path)
    assert [(column.name, column.role) for column in snapshot.columns] == [("day", "datetime"), ("x", "numeric")]
