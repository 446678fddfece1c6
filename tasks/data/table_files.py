"""Tables in files: CSV and Parquet, one file or all that match a pattern, frame by frame.

Read by pyarrow, which names the row that is ragged, keeps each distinct text of a chunk once, and which MLflow brings
along anyway. Knows nothing of what is in a column, and of splits.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from models.rows.table import column_name
from tasks.data.csv_layout import Layout, layout_of, why_unread
from tasks.data.findings import EXAMPLES, Finding
from tasks.data.rows import DataError, Frames, first_repeated
from tasks.job import DataConfig

CSV_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".data", ".txt")
# A longer field is no value of a table.
MOST_FIELD_LETTERS = 100_000
# What is read of a source at once, of a table and of a file.
CHUNK_VALUES = 2**20
CHUNK_BYTES = 2**24
# gzip makes a file at most 1,032 times smaller. What people keep in tables shrinks 3 to 20 times.
MOST_INFLATION = 200
LEAST_BOMB_BYTES = 2**30

# Types with a gap of their own: whole numbers with gaps are no floats, which hold 15 digits.
NUMPY_TYPES = {
    pa.bool_(): pd.BooleanDtype(),
    **{kind: pd.Int64Dtype() for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())},
    **{kind: pd.UInt64Dtype() for kind in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())},
}
# What a column of a Parquet file may hold: truths, numbers, moments, texts, or nothing.
PLAIN = (
    *(pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null),
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    *(pa.types.is_date, pa.types.is_time, pa.types.is_timestamp),
)
INDEX_WITHOUT_A_NAME = re.compile(r"__index_level_\d+__")


def frames_of_files(data: DataConfig) -> tuple[Frames, tuple[Finding, ...]]:
    """All files that match, in the order of their names, and what is odd about them; they must have the same
    columns."""
    source = Path(data.source)
    paths = matching(source)
    if not paths:
        raise DataError(f"data.source: no file matches {data.source}; correct the pattern")
    if source.name.lower().endswith(".parquet"):
        return lambda: with_row_numbers(alike((path, parquet_frames(path)) for path in paths)), ()
    layouts = {path: layout_of(path, data) for path in paths}
    findings = tuple(found for layout in layouts.values() for found in layout.findings)
    return lambda: with_row_numbers(alike((path, _csv_frames(path, layouts[path])) for path in paths)), findings


def alike(files: Iterable[tuple[Path, Iterable[pd.DataFrame]]]) -> Iterator[pd.DataFrame]:
    """The frames of all files. Raises DataError where one has other columns than the first."""
    known: list[str] = []
    first = ""
    for path, frames in files:
        for frame in frames:
            names = [column_name(name) for name in frame.columns]
            known, first = known or names, first or path.name
            if names != known:
                odd = sorted(set(names) ^ set(known))
                raise DataError(
                    f"{path} must have the columns of {first}, found a difference in "
                    f"{', '.join(odd[:EXAMPLES]) or 'their order'}; mend it or match fewer files"
                )
            yield frame


def with_row_numbers(frames: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    begin = 0
    for frame in frames:
        yield frame.set_axis(pd.RangeIndex(begin, begin + len(frame)))
        begin += len(frame)


def _csv_frames(path: Path, layout: Layout) -> Iterator[pd.DataFrame]:
    """Every cell as a text, as it stands in the file; what it means is seen when the whole column is known."""
    try:
        yield from _texts(path, layout)
    except pa.ArrowInvalid as error:
        if (why := why_unread(path, layout)) is None:
            raise
        raise why from error


def _texts(path: Path, layout: Layout) -> Iterator[pd.DataFrame]:
    if not layout.has_rows:
        return
    text = pa.dictionary(pa.int32(), pa.string())
    names, read = list(layout.names), list(layout.read)
    reader = pyarrow.csv.open_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(column_names=names, skip_rows=layout.header_lines, block_size=CHUNK_BYTES),
        parse_options=pyarrow.csv.ParseOptions(delimiter=layout.delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, text), include_columns=read, strings_can_be_null=False
        ),
    )
    rows = size = 0
    for batch in reader:
        size += batch.nbytes
        if path.suffix == ".gz" and size > max(LEAST_BOMB_BYTES, MOST_INFLATION * path.stat().st_size):
            raise DataError(
                f"{path} must unpack to at most {MOST_INFLATION} times its size, found more after {rows} rows; look "
                "where it comes from, or unpack it yourself"
            )
        frame = batch.to_pandas()
        for name in frame.columns:
            _check_texts(path, frame[name], rows)
        yield frame
        rows += len(frame)


def _check_texts(path: Path, column: "pd.Series[Any]", before: int) -> None:
    texts = pd.Series(column.cat.categories)
    if texts.empty:
        return
    if (longest := texts.str.len().max()) > MOST_FIELD_LETTERS:
        raise DataError(
            f"{path}: column {column.name} must hold at most {MOST_FIELD_LETTERS} letters a field, found {longest}; "
            "look for a quote that is never closed"
        )
    zero = texts.str.contains("\0", regex=False).to_numpy(dtype=bool)
    if zero.any():
        row = before + int(np.flatnonzero(zero[column.cat.codes])[0])
        raise DataError(f"{path}: column {column.name} must be text, found a NUL byte in row {row}; write it again")


def parquet_frames(path: Path) -> Iterator[pd.DataFrame]:
    """The columns that the file has, whatever pandas wrote beside them; an index without a name is none."""
    with pyarrow.parquet.ParquetFile(path) as file:
        fields = [field for field in file.schema_arrow if INDEX_WITHOUT_A_NAME.fullmatch(field.name) is None]
    names = [field.name for field in fields]
    if (repeated := first_repeated(names)) is not None:
        raise DataError(f"{path}: each column must have a name of its own, found {repeated!r} twice; rename one")
    for field in fields:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if not any(is_plain(kind) for is_plain in PLAIN):
            raise DataError(
                f"{path}: column {field.name} must hold plain values, found {field.type}; leave it out of the file"
            )
    texts = [field.name for field in fields if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    with pyarrow.parquet.ParquetFile(path, read_dictionary=texts, pre_buffer=False, buffer_size=2**20) as file:
        if file.metadata.num_rows == 0:
            yield pa.schema(fields).empty_table().to_pandas()
        for batch in file.iter_batches(chunk_rows(names), columns=names):
            yield batch.replace_schema_metadata().to_pandas(types_mapper=NUMPY_TYPES.get)


def matching(path: Path) -> list[Path]:
    """All files that a pattern matches, in the order of their names; the path itself where it is none, or is there: a
    name such as data[1].csv is one before it is a pattern."""
    is_pattern = {"*", "?", "["} & set(path.name) and not path.exists()
    return sorted(path.parent.glob(path.name)) if is_pattern else [path]


def chunk_rows(columns: Collection[Any]) -> int:
    return max(1, CHUNK_VALUES // max(1, len(columns)))
