"""Whatever a source holds, `nightly check` reads it or says in one sentence why not: small files and frames, each
broken in a way of its own, from fixed seeds."""

import gzip
import io
import itertools
import json
import os
import random
import sqlite3
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from flows.cli import main as cli
from infra.errors import ExpectedError
from models.rows.shapes import Problem
from tasks.data.card import data_card
from tasks.data.prepare import prepare
from tasks.job import CheckName, DataConfig

CASES = 100  # of each kind of source: what spoils one case in thirty is missed once in thirty times
TOKENS = [
    *(
        b",",
        b";",
        b"\t",
        b"|",
        b"\n",
        b"\r",
        b"\r\n",
        b'"',
        b'""',
        b"'",
        b"\0",
        b" ",
        b"",
        b"\\",
        b"\x1b[31m",
        b"a" * 300,
    ),
    *(b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", "\u00e4\u20ac\U0001f600\u2028\u200b".encode()),
    *(b"1e308", b"-1e308", b"1e999", b"-0", b"inf", b"-inf", b"nan", b"NaT", b"NA", b"None", b"?", b"9" * 40, b"0x1f"),
    *(
        b"1_000",
        b"1.234,5",
        b"$5",
        b"7 %",
        b"(3)",
        "\u22124".encode(),
        "\u0661\u0662".encode(),
        b"true",
        b"no",
        b"=1+1",
    ),
    *(
        b"2026-13-45",
        b"0001-01-01",
        b"9999-12-31T23:59:60Z",
        b"2026-11-23",
        b"2026-11-23T02:00:00+25:00",
        b"23.11.2026",
    ),
    *(b"12:30", b"[1, 2]", b"{}"),
]
ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7", "cp437"]
WORDS = ["red", "green", "blue", "Köln", "", "NA", "a b", "1", "1.0", "yes", "no"]

Source = dict[str, Any]
# What the function of a source of the user's own returns next.
returned: list[Any] = []


def broken(draw: random.Random, content: bytes, hits: int = 4) -> bytes:
    """Bytes with a few flipped, cut, doubled, moved, or replaced by what is hard to read."""
    for _ in range(draw.randint(0, hits)):
        begin = draw.randint(0, len(content))
        end = min(len(content), begin + draw.choice([0, 1, 1, 2, 8, 60]))
        way = draw.randrange(6)
        if way == 0 and begin < len(content):
            content = content[:begin] + bytes([content[begin] ^ 1 << draw.randrange(8)]) + content[begin + 1 :]
        elif way == 1:
            content = content[:begin] + content[end:]
        elif way == 2:
            content = content[:end] + content[begin:]
        elif way == 3:
            content = content[:begin] + draw.choice(TOKENS) + content[end:]
        elif way == 4:
            content = content[:begin] + draw.randbytes(end - begin) + content[end:]
        elif draw.random() < 0.2:
            content = content[:begin]
    return content


def table(draw: random.Random) -> pd.DataFrame:
    """A table of a few columns of any kind."""
    rows = draw.choice([0, 1, 12, 40, 60, 60, 60, 130])
    number = itertools.count()
    kinds: list[Callable[[], Any]] = [
        lambda: round(draw.gauss(0, 1), 3),
        lambda: draw.randint(0, 5),
        lambda: next(number),
        lambda: draw.choice(WORDS),
        lambda: draw.choice([True, False]),
        lambda: (date(2026, 1, 1) + timedelta(days=draw.randint(0, 300))).isoformat(),
        lambda: None,
        lambda: 7,
        lambda: draw.choice([0.5, "?", None, "x", 3]),
    ]
    names = draw.sample(["a", "b", "x y", "Größe", "day", "0"], draw.randint(1, 4))
    content = {name: [kind() for _ in range(rows)] for name in names for kind in [draw.choice(kinds)]}
    target: list[Any] = draw.choice([["p", "q"], ["p", "q"], list(range(99))])
    return pd.DataFrame(content | {"y": [draw.choice(target) for _ in range(rows)]})


def options(draw: random.Random) -> Source:
    """What a job says of a table; half of all jobs let the checks pass, so that more is seen."""
    data: Source = {"checks": dict.fromkeys(get_args(CheckName), draw.choice(["warn", "ignore"]))}
    if draw.random() < 0.5:
        data = {}
    names = ["a", "b", "day", "y", "0", "gone"]
    for field, value in (
        ("target", draw.choice(names)),
        ("split_by", draw.choice(names)),
        ("roles", {draw.choice(names): draw.choice(["numeric", "boolean", "categorical", "datetime", "ignored"])}),
        ("tidy_labels", True),
        ("missing", ("", "red")),
        ("max_rows_lost", 1.0),
    ):
        if draw.random() < 0.15:
            data[field] = value
    if draw.random() < 0.15 and "split_by" not in data:
        data |= {"time_column": draw.choice(names), "test_from": datetime(2026, 6, 1, tzinfo=UTC)}
    return data


def a_csv(draw: random.Random, folder: Path) -> Source:
    mark, has_header = draw.choice([",", ",", ";", "\t", "|"]), draw.random() < 0.8
    text = table(draw).to_csv(index=False, sep=mark, header=has_header)
    content = text.encode()
    if draw.random() < 0.1:
        content = text.encode(draw.choice(ENCODINGS), errors="replace")
    if draw.random() < 0.1:
        content = content.replace(b"\n", draw.choice([b"\r\n", b"\r", b"\n\n"]))
    content = broken(draw, content, draw.choice([0, 1, 4]))
    name = draw.choice(["rows.csv", "rows.csv", "rows.tsv", "rows.txt", "rows.csv.gz", "rows.data"])
    if name.endswith(".gz"):
        content = broken(draw, gzip.compress(content), 1)
    (folder / name).write_bytes(content)
    if draw.random() < 0.1:
        (folder / f"other-{name}").write_bytes(broken(draw, content))
        name = f"*{name}"
    data = options(draw) | {
        "source": str(folder / name),
        "header": has_header if draw.random() < 0.9 else not has_header,
    }
    if draw.random() < 0.8:
        data["delimiter"] = mark if draw.random() < 0.9 else draw.choice([" ", "'", "a"])
    return data


def a_parquet(draw: random.Random, folder: Path) -> Source:
    frame = table(draw)
    odd: list[Any] = [
        pa.array([[1, 2]] * len(frame)),
        pa.array([{"a": 1}] * len(frame)),
        pa.array([Decimal("1.50"), Decimal("-2.25")] * len(frame), type=pa.decimal128(9, 2))[: len(frame)],
        pa.array([time(1, 2, 3)] * len(frame)),
        pa.array([timedelta(seconds=row) for row in range(len(frame))], type=pa.duration("us")),
        pa.array(["u", "v"] * len(frame))[: len(frame)].dictionary_encode(),
        pa.array([b"\xff\0"] * len(frame)),
        pa.array([None] * len(frame)),
        pa.array([date(1, 1, 1), date(9999, 12, 31)] * len(frame))[: len(frame)],
        pa.array([-(2**62), 2**62] * len(frame), type=pa.timestamp(draw.choice(["s", "ms", "us", "ns"])))[: len(frame)],
        pa.array([2**64 - 1, 0] * len(frame), type=pa.uint64())[: len(frame)],
        pa.array([1e308, -1e308, float("inf"), float("nan")] * len(frame))[: len(frame)],
        pa.array(np.arange(len(frame), dtype=np.float16)),
        pa.array(["x", None] * len(frame), type=pa.large_string())[: len(frame)],
        pa.array([True, None] * len(frame))[: len(frame)],
        pa.array([1, None] * len(frame), type=pa.int8())[: len(frame)],
        pa.array(["x"] * len(frame), type=pa.string_view()),
        pa.array([0, 1] * len(frame), type=pa.timestamp("ms", tz="Europe/Berlin"))[: len(frame)],
    ]
    texts = [name for name, dtype in frame.dtypes.items() if dtype == "object"]
    content = pa.Table.from_pandas(frame.astype(dict.fromkeys(texts, "string")))
    for _ in range(draw.randint(0, 2)):
        column = draw.choice(odd)
        if draw.random() < 0.3:
            with suppress(pa.ArrowException):
                column = column.dictionary_encode()
        content = content.append_column(draw.choice(["a", "v", "w", "z", "", "\n"]), column)
    if draw.random() < 0.05:
        content = content.select([])
    buffer = io.BytesIO()
    try:
        pyarrow.parquet.write_table(content, buffer, compression=draw.choice(["snappy", "none", "gzip", "zstd"]))
    except pa.ArrowException:
        buffer.write(b"PAR1")
    (folder / "rows.parquet").write_bytes(
        broken(draw, buffer.getvalue(), 2) if draw.random() < 0.5 else buffer.getvalue()
    )
    return options(draw) | {"source": str(folder / "rows.parquet")}


def an_array(draw: random.Random, *expected: int) -> Any:
    """Features or labels of any kind, most of the shape that is expected."""
    rows = expected[0]
    shape = draw.choice([expected] * 7 + [(rows, 3), (rows, 1, 2, 2), (rows,), (rows, 0), (), (rows + 1, 3)])
    numbers = np.random.default_rng(draw.randrange(1000)).normal(size=shape)
    kinds: list[Callable[[], Any]] = [
        lambda: numbers,
        lambda: numbers.astype(draw.choice(["f2", "f4", ">f8", "i1", "u8", "longdouble", "bool"])),
        lambda: (numbers > 0).astype(draw.choice(["i8", "U3", "S2", "f4"])),
        lambda: np.where(numbers > 0, draw.choice([np.nan, np.inf, 1e300, 1e-300, -0.0]), numbers),
        lambda: numbers.astype(draw.choice(["c16", "M8[s]", "m8[D]", "O"])),
        lambda: np.zeros(shape, dtype="i4,f8"),
        lambda: np.full(shape, draw.choice(["a", "", "NaN", "\udc80", "x\0y", "1"])),
        lambda: np.where(numbers > 0, np.datetime64("NaT", "s"), np.datetime64("2026-01-01", "s")),
    ]
    with np.errstate(all="ignore"):
        return draw.choice((kinds[2:3] if len(expected) == 1 else kinds[:3]) * 6 + kinds)()


def an_npz(draw: random.Random, folder: Path) -> Source:
    rows = draw.choice([0, 1, 60, 60, 60, 60])
    arrays = {draw.choice(["features"] * 9 + ["x"]): an_array(draw, rows, 3), "target": an_array(draw, rows)}
    if draw.random() < 0.1:
        arrays["target"] = np.array([None, "a", 1] * rows, dtype=object)[:rows]
    if draw.random() < 0.1:
        arrays["other"] = np.array([object()])
    buffer = io.BytesIO()
    draw.choice([np.savez, np.savez_compressed])(buffer, **arrays)
    content = broken(draw, buffer.getvalue(), draw.choice([0, 0, 3]))
    if draw.random() < 0.1:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            shape = draw.choice(["10**9", "99999999999", "-1", "2, 2"])
            header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({shape},), }}"
            for name in ("features.npy", "target.npy"):
                length = struct.pack("<H", len(header))
                file.writestr(name, b"\x93NUMPY\1\0" + length + header.encode() + b"12345678")
        content = buffer.getvalue()
    elif draw.random() < 0.05:
        buffer = io.BytesIO()
        np.save(buffer, np.eye(3))
        content = buffer.getvalue()
    (folder / "rows.npz").write_bytes(content)
    return options(draw) | {"source": str(folder / "rows.npz")}


def an_idx(draw: random.Random, folder: Path) -> Source:
    rows = draw.choice([0, 2, 40, 40, 40])
    images = b"\0\0\x08\3" + struct.pack(">3I", rows, 2, draw.choice([2, 2, 0, 2**31])) + draw.randbytes(rows * 4)
    labels = b"\0\0\x08\1" + struct.pack(">I", rows) + bytes(draw.randrange(2) for _ in range(rows))
    for name, content in (("i.idx", images), ("l.idx.gz", gzip.compress(labels))):
        (folder / name).write_bytes(broken(draw, content, draw.choice([0, 2])))
    return options(draw) | {"source": str(folder / "i.idx"), "labels": str(folder / "l.idx.gz")}


def some_images(draw: random.Random, folder: Path) -> Source:
    modes = {
        "png": ["L", "RGB", "RGBA", "LA", "P", "1", "I;16"],
        "jpg": ["L", "RGB", "CMYK"],
        "gif": ["L", "P", "RGB", "RGBA"],
        "webp": ["RGB", "RGBA"],
        "tif": ["L", "RGB", "RGBA", "I;16", "F", "CMYK", "1", "I"],
        "bmp": ["L", "RGB", "1"],
    }
    mode = draw.choice([mode for known in modes.values() for mode in known])
    suffix = draw.choice([suffix for suffix, known in modes.items() if mode in known])
    damaged = draw.random() < 0.3
    for number in range(24):
        image = Image.new(mode, (3, 3))
        bands = len(image.getbands())
        for place in itertools.product(range(3), range(3)):
            image.putpixel(place, draw.randrange(256) if bands == 1 else (draw.randrange(256),) * bands)
        extra: Source = {}
        if draw.random() < 0.3:
            extra["exif"] = Image.Exif()
            extra["exif"][274] = draw.randint(0, 9)
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix), **extra)
        content = buffer.getvalue()
        if damaged and number == 7:
            content = broken(draw, content, 3)
        name = draw.choice(["cat", "dog"] * 60 + ["Cat", ".x", "a/b", "é", "dog "]) + f"/{number}.{suffix}"
        path = folder / "images" / (name if draw.random() < 0.99 else f"{number}.{draw.choice([suffix, 'txt'])}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return options(draw) | {"source": str(folder / "images")}


def a_database(draw: random.Random, folder: Path) -> Source:
    values = [
        *("a", "b", "c", "d", 1, 2, 3, 2.5, True, 2**63 - 1, -1, 1e308, float("inf")),
        *(None, "", "NA", "2026-01-01", b"\xff", "x\0y", "\u2028"),
    ]
    kinds = [draw.sample(values, draw.randint(1, 3)) for _ in range(3)]
    with sqlite3.connect(folder / "rows.db") as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(f"CREATE TABLE rows (a {draw.choice(['', 'INT', 'TEXT', 'BLOB', 'DATE', 'REAL'])}, b, y)")
        for _ in range(draw.choice([0, 1, 40, 60, 80, 100])):
            row = [draw.choice([*kind, draw.gauss(0, 1)]) for kind in kinds[:2]] + [draw.choice(kinds[2])]
            connection.execute("INSERT INTO rows VALUES (?, ?, ?)", row)
    connection.close()
    if draw.random() < 0.2:
        (folder / "rows.db").write_bytes(broken(draw, (folder / "rows.db").read_bytes(), 3))
    query = draw.choice(
        ["SELECT * FROM rows"] * 9
        + [
            "SELECT a FROM rows",
            "SELECT a AS y, b AS y FROM rows",
            "SELECT",
            "SELECT 1; SELECT 2",
            "SELECT a, :b, y FROM rows",
        ]
        + [
            "SELECT a, b AS ' ', y FROM rows",
            "SELECT count(*), y FROM rows GROUP BY y",
            "DROP TABLE rows",
            "PRAGMA foreign_keys",
        ]
        + ["SELECT '%s', y FROM rows", 'SELECT a AS "x\ny", y FROM rows']
    )
    return options(draw) | {"source": f"sqlite:///{folder / 'rows.db'}", "query": query}


def a_frame(draw: random.Random, folder: Path) -> Source:
    """What a function of the user's own may return."""
    frame = table(draw)
    rows = len(frame)
    numbers = np.random.default_rng(draw.randrange(1000)).normal(size=rows)
    cells = [
        *(
            None,
            1,
            2.5,
            "a",
            "",
            b"\xff",
            True,
            1j,
            10**30,
            10**400,
            "\udc80",
            "x" * 200_000,
            Decimal("1.5"),
            np.float32(3),
        ),
        *(
            pd.NA,
            pd.NaT,
            np.nan,
            np.datetime64("NaT"),
            pd.Timestamp(0),
            pd.Timestamp("0001-01-01"),
            date(2026, 1, 1),
            time(1),
        ),
        *(
            datetime(2026, 1, 1, tzinfo=UTC),
            timedelta(1),
            pd.Interval(0, 1),
            {},
            (1, 2),
            [3],
            object(),
            np.array([1]),
            float,
        ),
    ]
    odd: list[Callable[[], Any]] = [
        lambda: pd.cut(numbers, 3) if rows else [],
        lambda: pd.array(numbers, dtype=draw.choice(["Float64", "Float32", "double[pyarrow]"])),
        lambda: pd.array(
            np.arange(rows) % 100, dtype=draw.choice(["Int8", "UInt64", "int64[pyarrow]", "string", "string[pyarrow]"])
        ),
        lambda: pd.Series(numbers).astype(
            draw.choice(["f2", "f4", ">f8", "longdouble", "c16", "category", "object", "str"])
        ),
        lambda: pd.arrays.SparseArray(numbers),
        lambda: pd.period_range("2026-01", periods=rows, freq=draw.choice(["D", "M"])),
        lambda: pd.date_range("2026-01-01", periods=rows, tz=draw.choice([None, "UTC", "Europe/Berlin"])),
        lambda: pd.to_timedelta(np.arange(rows), unit="s"),
        lambda: pd.Series([[1]] * rows, dtype=pd.ArrowDtype(pa.list_(pa.int64()))),
        lambda: pd.Series([timedelta(1)] * rows, dtype=pd.ArrowDtype(pa.duration("s"))),
        lambda: pd.Series([date(2026, 1, 1)] * rows, dtype=pd.ArrowDtype(pa.date32())),
        lambda: pd.Series([Decimal(1)] * rows, dtype=pd.ArrowDtype(pa.decimal128(5, 1))),
        lambda: pd.Series([draw.choice(cells) for _ in range(rows)], dtype=object),
        lambda: pd.Series([draw.choice(kinds) for kinds in [draw.sample(cells, 2)] * rows], dtype=object),
        lambda: pd.Categorical([draw.choice([(1, 2), (3,)]) for _ in range(rows)]),
        lambda: pd.array(numbers > 0, dtype=draw.choice(["boolean", "bool[pyarrow]", "object"])),
        lambda: np.full(rows, draw.choice([np.inf, 1e300, 1e39, 5e-324, 2**53 + 1.0])),
    ]
    for name in draw.sample(["a", "b", 0, None, np.nan, "y", ("p", "q"), "\n", ""], draw.randint(0, 3)):
        frame[name] = draw.choice(odd)()
    results: list[Callable[[], Any]] = [
        lambda: frame,
        lambda: frame.set_index("y"),
        lambda: pd.concat([frame, frame], axis=1),
        lambda: (frame.drop(columns="y"), frame["y"]),
        lambda: (
            numbers[:, None],
            pd.Series([draw.choice(kinds) for kinds in [draw.sample(cells, 3)] * rows], dtype=object),
        ),
        lambda: (numbers[:, None], [draw.choice(kinds) for kinds in [draw.sample(cells, 2)] * rows]),
        lambda: ([[draw.choice(cells)] for _ in range(rows)], [draw.choice("ab") for _ in range(rows)]),
        lambda: [an_array(draw, rows, 3), an_array(draw, rows)],
        lambda: (torch.tensor(numbers[:, None], requires_grad=True), torch.tensor(numbers > 0)),
        lambda: (
            torch.tensor(numbers[:, None], dtype=draw.choice([torch.bfloat16, torch.half, torch.cfloat])),
            numbers > 0,
        ),
        lambda: np.ma.masked_less(numbers, 0),
        lambda: (np.ma.masked_less(numbers, 0)[:, None], np.ma.masked_less(numbers, 0)),
        lambda: frame.T,
        lambda: draw.choice([*cells, frame["y"], frame.columns, (frame,), (frame, frame), iter([1]), {"features": 1}]),
    ]
    returned[:] = [draw.choice(results[:1] * 12 + results)()]
    (folder / "load.py").write_text(f"import sys\n\n\ndef rows():\n    return sys.modules[{__name__!r}].returned[0]\n")
    return options(draw) | {"source": f"{folder}/load.py:rows"}


def a_program(draw: random.Random, folder: Path) -> Source:
    """A file of the user's own that is broken."""
    code = (
        "import numpy as np\nimport sys\n\n\n@staticmethod\ndef rows(count=40):\n    draw = np.random.default_rng(0)\n"
        "    x = draw.normal(size=(count, 3))\n    return x, (x[:, 0] > 0).astype(int)\n"
    )
    words = [
        b"raise KeyError(1)",
        b"sys.exit()",
        b"return",
        b"yield ",
        b"async ",
        b"rows",
        b"lambda",
        b"(",
        b"    ",
        b"class ",
        b"del x",
    ]
    content = code.encode()
    for _ in range(draw.randint(0, 2)):
        place = draw.randrange(len(content))
        content = content[:place] + draw.choice(words) + content[place + draw.choice([0, 4]) :]
    (folder / "load.py").write_bytes(broken(draw, content, 2))
    return options(draw) | {
        "source": f"{folder}/load.py:{draw.choice(['rows'] * 9 + ['np', 'gone', '', 'rows:x', '__name__'])}"
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "write",
    [a_csv, a_parquet, an_npz, an_idx, some_images, a_database, a_frame, a_program],
    ids=lambda write: write.__name__,
)
def test_whatever_a_source_holds_it_is_read_or_one_sentence_says_why_not(
    write: Callable[[random.Random, Path], Source], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong, passed = [], 0
    for number in range(CASES):
        draw = random.Random(f"{write.__name__} {number}")
        folder = tmp_path / str(number)
        folder.mkdir()
        data = write(draw, folder)
        problem: Problem = draw.choice(["classification", "classification", "classification", "regression"])
        try:
            snapshot = prepare(DataConfig(**data), problem, folder / "home" / "snapshots")
            data_card(snapshot).encode()
            json.dumps(asdict(snapshot), default=str, allow_nan=False)
            passed += 1
        except ExpectedError as error:
            if not str(error).isprintable() or str(error).endswith("."):
                wrong.append(f"{number}: not one printable sentence: {error!r}"[:300])
        except (Exception, SystemExit) as error:  # noqa: BLE001
            wrong.append(f"{number}: {type(error).__name__}: {error}"[:300])
    assert not wrong, f"{len(wrong)} of {CASES}, such as\n" + "\n".join(wrong[:40])
    assert passed, "most are broken, but not all"
    assert capfd.readouterr() == ("", "")


@pytest.mark.process
def test_the_command_says_one_sentence_and_keeps_stdout_for_its_own(tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(
        "import numpy as np\n\n\ndef rows():\n    print('reading')\n"
        "    return np.random.default_rng(0).normal(size=(40, 3)), ['a', None, 'b', 'a'] * 10\n"
    )
    (tmp_path / "gaps.yaml").write_text(f"name: gaps\ndata:\n  source: {tmp_path}/load.py:rows\nmodel: mlp\n")
    finished = subprocess.run(
        [sys.executable, "-c", "from flows.cli.main import main; main()", "check", "gaps", "--json"],
        env=os.environ | {"NIGHTLY_JOBS": str(tmp_path), "NIGHTLY_HOME": str(tmp_path / "home")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    printed, sentence = finished.stderr.splitlines()
    assert (finished.returncode, finished.stdout, printed) == (1, "", "reading")
    assert sentence.startswith(
        f"nightly: {tmp_path}/load.py:rows: the target must have a value in every row, found 10 without"
    )


def test_an_error_that_nobody_expected_is_one_sentence_and_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails() -> None:
        raise ValueError("one\ntwo")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    (path,) = tmp_path.iterdir()
    assert capsys.readouterr().err == (
        "nightly: this is a fault of Nightly Tuner's own, found ValueError: one; report it with the traceback in "
        f"{path}\n"
    )
    assert path.read_text().startswith("Traceback (most recent call last)")
