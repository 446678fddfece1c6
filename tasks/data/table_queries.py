"""Tables that a database answers: a query's rows, copied into Parquet files in chunks and read from there, because two
runs of it may give two tables.

Values stay what the database holds: a whole number beside gaps is no float, which would change an id of 19 digits.
Knows nothing of what is in a column, and of splits.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import sqlalchemy

from tasks.data.rows import DataError, Frames, first_repeated
from tasks.data.table_files import alike, parquet_frames, with_row_numbers
from tasks.job import DataConfig

QUERY_ROWS = 2**15
# Types that are read as they are; whatever else a database has (UUIDs, dates, arrays) is read as its text.
_PLAIN = (pa.null(), pa.bool_(), pa.int64(), pa.float64(), pa.string())


def frames_of_query(data: DataConfig, scratch: Path) -> Frames:
    """What the query gives, copied into the folder `scratch`. Raises DataError."""
    if data.query is None:
        raise DataError(f"data.query must say what to select from {data.source}, found none; add it")
    paths: list[Path] = []
    try:
        url = sqlalchemy.make_url(data.source)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
        with engine.connect().execution_options(stream_results=True) as connection:
            answer = connection.execute(sqlalchemy.text(data.query))
            names = list(answer.keys())
            if (repeated := first_repeated(names)) is not None:
                raise DataError(f"data.query must name each column once, found {repeated!r} twice; rename one with AS")
            _write(scratch, paths, [[] for _ in names], names)
            for rows in answer.partitions(QUERY_ROWS):
                _write(scratch, paths, list(zip(*rows, strict=True)), names)
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        # The database's own words, without the query around them.
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise DataError(
            f"data.query must be answered by {data.source}, but {reason}; mend the query, the URL or the password "
            "(PGPASSWORD, ~/.pgpass)"
        ) from error
    return lambda: with_row_numbers(alike((path, parquet_frames(path)) for path in paths))


def _write(folder: Path, paths: list[Path], columns: list[Any], names: list[str]) -> None:
    for name, column in zip(names, columns, strict=True):
        if any(isinstance(value, bytes | memoryview) for value in column):
            raise DataError(
                f"data.query must give numbers, texts, truths or dates, found bytes in column {name}; cast it"
            )
    paths.append(folder / f"{len(paths):06}.parquet")
    pyarrow.parquet.write_table(pa.table([_typed(column) for column in columns], names=names), paths[-1])


def _typed(values: Any) -> "pa.Array[Any]":
    """A column's values as they are where one type holds all of them exactly, else as their texts."""
    try:
        typed = pa.array(values)
    except (pa.ArrowException, OverflowError):
        pass
    else:
        if typed.type in _PLAIN or pa.types.is_timestamp(typed.type):
            return typed
    return pa.array([None if value is None else str(value) for value in values], pa.string())
