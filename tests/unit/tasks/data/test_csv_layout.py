"""CSV files whose delimiter, quotes, header or encoding are other than the job says: found in the first lines, and said
in one sentence with the remedy; what can be read is read."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tasks.data.rows import DataError
from tasks.job import JobError, parse_job
from tests.reading import read, roles_of

NAMES = ("size", "colour", "y")
ROWS = 40


def lines(mark: str = ",", header: bool = True, edit: Callable[[list[str]], list[str]] = list) -> str:
    """A table as a text; `edit` changes the fields of each row."""
    draw = np.random.default_rng(0)
    rows = [
        edit([f"{draw.normal():.3f}", str(draw.choice(["red", "blue"])), str(draw.choice(["a", "b"]))])
        for _ in range(ROWS)
    ]
    return "".join(mark.join(row) + "\n" for row in [*([list(NAMES)] if header else []), *rows])


def written(folder: Path, text: str | bytes, name: str = "rows.csv") -> Path:
    content = text.encode() if isinstance(text, str) else text
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


@pytest.fixture
def sizes(tmp_path: Path) -> NDArray[np.float32]:
    """The column of sizes of the table as it should be read."""
    rows = read(written(tmp_path, lines()))
    return rows.features[:, 1]


@pytest.mark.parametrize(
    ("text", "name", "data"),
    [
        (lines(";"), "rows.csv", {"delimiter": ";"}),
        (lines("|"), "rows.csv.gz", {"delimiter": "|"}),
        (lines("\t"), "rows.tsv", {}),
        (lines("\t"), "rows.tsv.gz", {}),
        (lines(","), "rows.tsv", {"delimiter": ","}),
        (lines(" "), "rows.data", {"delimiter": " "}),
        ("\ufeff" + lines(), "rows.csv", {}),
        ("\ufeff" + lines(), "rows.csv.gz", {}),
        (lines().replace("\n", "\r"), "rows.csv", {}),
        (lines().replace("\n", "\r\n"), "rows.csv", {}),
        (lines().replace("\n", "\n\n")[:-1], "rows.csv", {}),
        (lines().rstrip("\n"), "rows.csv", {}),
        (lines().replace("colour", '"colour"').replace("red", '"red"'), "rows.csv", {}),
        (lines().replace("size", ' "size"'), "rows.csv", {}),
        (lines().replace(",", " , "), "rows.csv", {}),
        (lines().replace("size", '"size\nin cm"'), "rows.csv", {}),
        (lines(header=False), "rows.csv", {"header": False}),
        (lines().replace("size,", "#size,"), "rows.csv", {}),
        ("\ufeff" + lines(header=False), "rows.csv", {"header": False}),
    ],
)
def test_a_table_is_read_whatever_its_file_looks_like(
    text: str, name: str, data: dict[str, Any], sizes: NDArray[np.float32], tmp_path: Path
) -> None:
    rows = read(written(tmp_path, text, name), **data)
    assert sorted(roles_of(rows.known).values()) == ["categorical", "numeric", "target"]
    place = next(place for place, column in enumerate(rows.known.columns) if column.role == "numeric")
    np.testing.assert_array_equal(rows.features[:, place], sizes)


def numbered(text: str, first: str) -> str:
    head, *rows = text.splitlines()
    return "\n".join([first + head, *(f"{number},{row}" for number, row in enumerate(rows))]) + "\n"


OPENS = lines().replace("red", '"red', 1)


@pytest.mark.parametrize(
    ("text", "data", "says"),
    [
        (lines(";"), {}, "looks like ';' is the delimiter, found 3 fields a line with it and 1 with ','; set"),
        (lines(";").replace(".", ","), {}, "looks like ';' is the delimiter, found 3 fields a line with it and 1 to 2"),
        (lines("\t"), {}, 'set data.delimiter: "\\t"'),
        (lines("|"), {"delimiter": ";"}, 'set data.delimiter: "|"'),
        (lines(","), {"delimiter": ";"}, 'set data.delimiter: ","'),
        (lines(" "), {}, 'set data.delimiter: " "'),
        (lines("   "), {}, "looks like runs of blanks stand between its fields"),
        (lines(header=False), {}, "what looks like a row (0.126, blue, a); set data.header: false"),
        ("x,p\ny,q\nx,p\ny,p\n" * 9, {}, "must name the columns, found what looks like a row (x, p)"),
        (lines(), {"header": False}, "what looks like names (size, colour, y); set data.header: true"),
        ("# made today\n" + lines(), {}, "found '# made today' above lines of 3 fields; remove what stands above them"),
        ("# made, today\n# by us\n" + lines(), {}, "found '# made, today' above lines of 3 fields"),
        ("Report of 2026\n\n" + lines(), {}, "found 'Report of 2026' above lines of 3 fields"),
        ("sep=;\n" + lines(";"), {"delimiter": ";"}, "found 'sep=;', which is Excel's; remove it"),
        ("\n" + lines(), {}, "found an empty first line; remove it"),
        (lines(edit=lambda row: [f"'{field}'" for field in row]), {}, "found them quoted with '; write it with other"),
        (lines(edit=lambda row: [row[0], "'red, or so'", row[2]]), {}, "found them quoted with '; write it with other"),
        (lines(edit=lambda row: [row[0], '"a \\"red\\", say"', row[2]]), {}, 'must write a quote in a field twice'),
        (lines(edit=lambda row: [row[0], ' "red, say"', row[2]]), {}, 'found , "; remove the blank'),
        (OPENS, {}, "must close the quote that it opens, found '"),
        (lines() + lines(header=False) * 8 + "1,red\n" + lines(), {}, "line 362 must have 3 fields as line 1 has"),
        (lines() + "1,red,a,b\n", {}, "line 42 must have 3 fields as line 1 has, found 4: '1,red,a,b'; quote a"),
        (numbered(lines(), ""), {}, "the header must name 4 columns as the rows have, found 3 names; give the first"),
        (lines(edit=lambda row: [*row, ""]), {}, "must end no line with ',', found it below a header without"),
        (lines().replace("\n", ",\n"), {}, "must have a name, found none for column 4 of 4"),
        (lines().replace("colour", ""), {}, "must have a name, found none for column 2 of 3"),
        (lines().encode("utf-16"), {}, "must be text in UTF-8, found UTF-16; convert it, as with iconv -f UTF-16"),
        (lines().encode("utf-16-le"), {}, "must be text in UTF-8, found UTF-16"),
        (lines().replace("colour", "größe").encode("latin-1"), {}, "found the byte 0xf6 in line 1, which is 'ö'"),
        ((lines() * 9 + "1,grün,a\n").encode("cp1252"), {}, "found the byte 0xfc in line 370, which is 'ü'"),
        ("size,y", {}, "must hold rows, found none below its header"),
        ("size,y\n\n\n", {}, "must hold rows, found none below its header"),
        ('"', {}, "must have a name, found none for column 1 of 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_a_file_that_is_other_than_the_job_says_is_one_sentence(
    text: str | bytes, data: dict[str, Any], says: str, name: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        read(written(tmp_path, text, name), **data)
    assert says in str(error.value)
    assert str(error.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    "text",
    [
        lines(),
        lines().replace("size,colour,y", "2024,2025,y"),
        "2024,2025,2026\n" + "0.5,1.5,a\n2,3,b\n" * 20,
        "0,1\n" + "0.5,1.5\n2,3\n" * 20,
        "colour,kind,y\n" + "red,colour,a\nblue,kind,b\nred,kind,b\n" * 20,
        "when,size\n" + "2026-01-01,1\n2026-01-02,2\n" * 20,
    ],
)
def test_names_are_no_row(text: str, tmp_path: Path) -> None:
    checks = {"constant_column": "ignore", "leaking_column": "ignore"}
    assert [found.check for found in read(written(tmp_path, text), checks=checks).known.findings] == []


def test_a_first_column_without_a_name_is_the_index_and_left_out_in_every_file(tmp_path: Path) -> None:
    for first in (",", "Unnamed: 0,"):
        for day in ("day-1.csv", "day-2.csv"):
            written(tmp_path, numbered(lines(), first), day)
        rows = read(tmp_path / "day-*.csv")
        assert [column.name for column in rows.known.columns] == ["colour", "size"]
        assert [found.check for found in rows.known.findings] == ["identifier_column"] * 2
        assert "day-1.csv: the first column must have a name to be read, found none" in rows.known.findings[0].sentence


def test_a_first_row_may_be_called_names(tmp_path: Path) -> None:
    rows = read(written(tmp_path, lines(header=False)), checks={"header_row": "warn"})
    assert [found.check for found in rows.known.findings] == ["header_row"]
    assert len(rows.target) == ROWS - 1


@pytest.mark.parametrize("mark", ["§", "", ";;", '"', "\n"])
def test_a_delimiter_is_one_mark(mark: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"data\.delimiter must "):
        parse_job({"name": "rows", "data": {"source": "rows.csv", "delimiter": mark}}, tmp_path / "rows.yaml")
