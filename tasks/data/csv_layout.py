"""How a CSV file is laid out: the marks between its fields, its quotes, its header, its encoding.

The first lines are compared with what the job says, and where both differ the sentence says what the file looks like:
read otherwise than it was written, a table is rubbish that nothing later can tell from data. Knows nothing of what is
in a column.
"""

import codecs
import csv
import gzip
import io
import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from models.rows.table import column_name, written_number
from tasks.data.findings import EXAMPLES, Finding, finding
from tasks.data.rows import DataError, first_repeated
from tasks.job import DataConfig

SEEN_LINES = 100
MOST_LINE_LETTERS = 2**20
MOST_SEEN_LETTERS = 2**22
DELIMITERS = ",;\t|: "
# What pandas and R call a column of row numbers, which was written without a name.
UNNAMED = ("", "Unnamed: 0")
SINGLE_QUOTES = "must quote its fields with \", found them quoted with '; write it with other quotes"
Record = list[str]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`names` are those of all fields of a line, `read` those of the columns that are read, and the header has
    `header_lines` lines; below it there may be no rows."""

    delimiter: str
    names: tuple[str, ...]
    read: tuple[str, ...]
    header_lines: int
    has_rows: bool
    findings: tuple[Finding, ...]


def layout_of(path: Path, data: DataConfig) -> Layout:
    """Look at a file's first lines. Raises DataError where it is not laid out as the job says."""
    delimiter = data.delimiter or ("\t" if ".tsv" in path.name else ",")
    lines, are_more = _first_lines(path)
    if not lines:
        raise DataError(f"{path} must hold rows, found an empty first line; give a file with rows")
    if lines[0].lower().startswith("sep="):
        raise DataError(f"{path} must begin with its header, found {lines[0].strip()!r}, which is Excel's; remove it")
    if not lines[0].strip("\r\n"):
        raise DataError(f"{path} must begin with its header or a row, found an empty first line; remove it")
    records = _records(lines, delimiter)
    if not _is_even(records):
        _refuse_uneven(path, lines, records, delimiter)
    if _quoted_singly(records[1:]):
        raise DataError(f"{path} {SINGLE_QUOTES}")
    if not records:
        raise DataError(f"{path} must hold rows, found no field in its first lines; write it again")
    first = [column_name(field.strip()) for field in records[0]]
    findings = _header_row(path, first, records[1:], data)
    if any(found.severity == "error" for found in findings):
        raise DataError("; and ".join(f"{path.parent}/{found.sentence}" for found in findings))
    if not data.header:
        names = tuple(str(place) for place in range(len(first)))
        return Layout(
            delimiter=delimiter, names=names, read=names, header_lines=0, has_rows=True, findings=tuple(findings)
        )
    return Layout(
        delimiter=delimiter,
        names=tuple(first),
        read=_named(path, first),
        header_lines=_lines_of_header(lines, delimiter),
        has_rows=len(records) > 1 or are_more,
        findings=(*findings, *_index_column(path, first, data)),
    )


def why_unread(path: Path, layout: Layout) -> DataError | None:
    """The first line that is no UTF-8, or that has other fields than the first; None where nothing such is found."""
    try:
        if (error := _not_utf8(path)) is not None:
            return error
        with _open_text(path) as text:
            reader, begin = csv.reader(text, delimiter=layout.delimiter), 1
            for record in reader:
                if record and len(record) != len(layout.names):
                    shown = layout.delimiter.join(record)[:60]
                    return DataError(
                        f"{path}: line {begin} must have {len(layout.names)} fields as line 1 has, found "
                        f"{len(record)}: {shown!r}; quote a field that holds {layout.delimiter!r}, or correct the line"
                    )
                begin = reader.line_num + 1
    except (OSError, EOFError, csv.Error):
        return None
    return None


def _not_utf8(path: Path) -> DataError | None:
    with _open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start : error.start + 1]
                return DataError(
                    f"{path} must be text in UTF-8, found the byte 0x{byte.hex()} in line {number}, which is "
                    f"{byte.decode('cp1252', errors='replace')!r} in Windows-1252; convert it, as with iconv -f "
                    "WINDOWS-1252 -t UTF-8"
                )
    return None


def _open_bytes(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _open_text(path: Path) -> TextIO:
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline="")


def _first_lines(path: Path) -> tuple[list[str], bool]:
    """The lines that are looked at, none from the first on that is longer than a line of a table is; and whether there
    are more."""
    with _open_bytes(path) as file:
        begin = file.read(2**12)
    if begin[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or begin.partition(b"\n")[0].count(b"\0") > 2:
        raise DataError(f"{path} must be text in UTF-8, found UTF-16; convert it, as with iconv -f UTF-16 -t UTF-8")
    lines: list[str] = []
    size = 0
    try:
        with _open_text(path) as file:
            while len(lines) < SEEN_LINES and size < MOST_SEEN_LETTERS and (line := file.readline(MOST_LINE_LETTERS)):
                if len(line) == MOST_LINE_LETTERS:
                    return lines, True
                lines.append(line)
                size += len(line)
            return lines, bool(file.read(1))
    except UnicodeDecodeError:
        if (odd := _not_utf8(path)) is not None:
            raise odd from None
        raise


def _records(lines: list[str], delimiter: str, **reading: Any) -> list[Record]:
    """The fields of each line that is not empty. Of a record that goes on below the lines the part that is here is no
    record."""
    try:
        records = [record for record in csv.reader(lines, delimiter=delimiter, **reading) if record]
    except csv.Error:
        return []
    return records[:-1] if len(lines) == SEEN_LINES and len(records) > 1 else records


def _is_even(records: list[Record]) -> bool:
    """Whether all lines have as many fields, and more than one."""
    return len({len(record) for record in records}) == 1 and len(records[0]) > 1


def _refuse_uneven(path: Path, lines: list[str], records: list[Record], delimiter: str) -> None:
    """Say what lines that do not fit what the job says look like. Raises DataError where that can be told."""
    counts = Counter(len(record) for record in records)
    fields = counts.most_common(1)[0][0] if counts else 0
    seen = " to ".join(str(count) for count in sorted({min(counts, default=0), max(counts, default=0)}))
    if any("  " in line for line in lines) and _is_even([line.split() for line in lines if line.strip()]):
        raise DataError(f"{path} looks like runs of blanks stand between its fields; write it with one {delimiter!r}")
    for other in DELIMITERS.replace(delimiter, ""):
        if _is_even(even := _records(lines, other)):
            raise DataError(
                f"{path} looks like {other!r} is the delimiter, found {len(even[0])} fields a line with it and "
                f"{seen} with {delimiter!r}; set data.delimiter: {json.dumps(other)}"
            )
    quoted = f"{delimiter}'"
    if any(quoted in line for line in lines) and _is_even(_records(lines, delimiter, quotechar="'")):
        raise DataError(f"{path} {SINGLE_QUOTES}")
    if any('\\"' in line for line in lines) and _is_even(_records(lines, delimiter, escapechar="\\")):
        raise DataError(f'{path} must write a quote in a field twice, found \\"; write "" instead')
    if any(f'{delimiter} "' in line for line in lines) and _is_even(_records(lines, delimiter, skipinitialspace=True)):
        raise DataError(f'{path} must begin a quoted field with its quote, found {delimiter} "; remove the blank')
    if _is_even(_records(lines, delimiter, quoting=csv.QUOTE_NONE)):
        place, line = next((place, line) for place, line in enumerate(lines, start=1) if line.count('"') % 2)
        raise DataError(
            f"{path}: line {place} must close the quote that it opens, found {line.strip()[:60]!r}; close it, or write "
            "a quote that belongs to the text twice, in quotes"
        )
    begin = next((place for place, record in enumerate(records) if len(record) == fields), 0)
    above, below = records[:begin], records[begin:]
    if not above or fields < 2 or len(below) < 2 or len({len(record) for record in below}) > 1:
        return
    if len(above) == 1 and len(above[0]) == fields - 1 and fields > 2:
        if all(record[-1] == "" for record in below):
            raise DataError(f"{path} must end no line with {delimiter!r}, found it below a header without; remove it")
        raise DataError(
            f"{path}: the header must name {fields} columns as the rows have, found {fields - 1} names; give the first "
            "column a name, which R's write.table leaves out"
        )
    if all(len(record) == 1 or record[0].startswith(("#", "%", "//")) for record in above):
        raise DataError(
            f"{path} must begin with its header or a row, found {delimiter.join(above[0])[:60]!r} above lines of "
            f"{fields} fields; remove what stands above them"
        )


def _quoted_singly(rows: list[Record]) -> bool:
    """Whether a column's fields all have quotes that count as text."""
    for column in zip_longest(*rows, fillvalue=""):
        fields = [field.strip() for field in column if field.strip()]
        if len(fields) > 1 and all(len(field) > 1 and field[0] == field[-1] == "'" for field in fields):
            return True
    return False


def _header_row(path: Path, first: Record, rows: list[Record], data: DataConfig) -> list[Finding]:
    """Whether the first line names columns is told by columns whose rows are numbers, and where there is none by
    columns in which the first line's text is a value of rows, too."""
    like_rows = like_names = names = 0
    for text, column in zip(first, zip(*(row for row in rows if len(row) == len(first)), strict=True), strict=False):
        values = [value.strip() for value in column if value.strip() not in data.missing]
        if not values or text in data.missing:
            continue
        if sum(map(_is_number, values)) > 0.9 * len(values):  # a header may stand there again
            like_rows, names = like_rows + _is_number(text), names + (not _is_number(text))
        elif len(set(values)) < len(values):
            like_rows, like_names = like_rows + (text in values), like_names + (text not in values)
    shown = ", ".join(first[:EXAMPLES])
    if data.header and names == 0 and like_rows > like_names and not _count_up(first):
        return finding(
            "header_row", data,
            f"{path.name}: the first line must name the columns, found what looks like a row ({shown}); set "
            "data.header: false, or data.checks.header_row: ignore if these are names",
        )  # fmt: skip
    if not data.header and names > 0 and not any(_is_number(text) for text in first):
        return finding(
            "header_row", data,
            f"{path.name}: the first line must be a row where data.header is false, found what looks like names "
            f"({shown}); set data.header: true, or data.checks.header_row: ignore if this is a row",
        )  # fmt: skip
    return []


def _is_number(text: str) -> bool:
    written = written_number(text)
    return written is not None and written.unit is None


def _count_up(names: Record) -> bool:
    """Names such as 2024, 2025, 2026 with others beside them, or 0, 1 alone, as pandas names columns without names."""
    numbers = [int(name) for name in names if name.isascii() and name.isdigit()]
    is_even = len(numbers) > 2 and len({after - before for before, after in pairwise(numbers)}) == 1
    return is_even or [str(place) for place in range(len(names))] == names


def _named(path: Path, names: Record) -> tuple[str, ...]:
    """The columns that are read: all but a first one without a name. Raises DataError for others without, and for a
    name that stands there twice."""
    read = tuple(names[1:] if names[0] in UNNAMED else names)
    if "" in read or not read:
        place = len(names) - len(read) + (read.index("") + 1 if read else 0)
        raise DataError(
            f"{path}: each column must have a name, found none for column {place} of {len(names)}; add it, or remove "
            "what ends each line with an empty field"
        )
    if (repeated := first_repeated(names)) is not None:
        raise DataError(f"{path}: each column must have a name of its own, found {repeated!r} twice; rename one")
    return read


def _index_column(path: Path, names: Record, data: DataConfig) -> list[Finding]:
    if names[0] not in UNNAMED:
        return []
    return finding(
        "identifier_column", data,
        f"{path.name}: the first column must have a name to be read, found none, as pandas and R write the numbers of "
        "rows, and it is left out; name it in the header to keep it",
    )  # fmt: skip


def _lines_of_header(lines: list[str], delimiter: str) -> int:
    """More than one where a name holds a line end."""
    reader = csv.reader(lines, delimiter=delimiter)
    next(reader)
    return reader.line_num
