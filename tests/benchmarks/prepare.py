"""The suite `prepare`: the census repeated to millions of rows, from a file to a snapshot, beside plain pandas that
reads the same file and does nothing with it. Peak memory is that of the whole process, libraries included.
"""

import resource
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd
import pyarrow.csv
import pyarrow.parquet
from rich.table import Table

from tasks.job import DataConfig
from tasks.prepare import prepare
from tests.benchmarks.datasets import has_shared_data, shared
from tests.benchmarks.search import Measurement, Record

ALONE = True
ROWS = 5_000_000
FORMATS = ("csv", "parquet")


def measurements(seeds: int) -> list[Measurement]:
    """Ours and pandas in turn, for each format; none without the census."""
    if not has_shared_data():
        return []
    return [(reading, (way, kind)) for _ in range(min(seeds, 3)) for kind in FORMATS for way in ("ours", "pandas")]


def reading(way: str, kind: str) -> Record:
    """Seconds from the file to a snapshot, or to a DataFrame; gigabytes at the peak."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"rows.{kind}"
        _write(path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        if way == "pandas":
            pd.read_csv(path) if kind == "csv" else pd.read_parquet(path)
        else:
            prepare(DataConfig(source=str(path)), "classification", Path(name) / "snapshots")
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "measured": "prepare", "way": way, "format": kind, "rows": ROWS, "seconds": seconds,
        "peak_gigabytes": peak / 1e6, "gigabytes_before": before / 1e6,
    }  # fmt: skip


def summary(records: list[Record]) -> dict[str, float]:
    """How many times as long as pandas a snapshot takes, by format; medians."""
    medians = {
        (way, kind): statistics.median(found["seconds"] for found in runs)
        for kind in FORMATS
        for way in ("ours", "pandas")
        if (runs := [record for record in records if (record["way"], record["format"]) == (way, kind)])
    }
    return {
        f"{kind}_vs_pandas": round(medians["ours", kind] / medians["pandas", kind], 2)
        for kind in FORMATS
        if {("ours", kind), ("pandas", kind)} <= medians.keys()
    }


def tables(records: list[Record]) -> list[Table]:
    """One row a way and format."""
    table = Table("format", "way", "rows a second, median", "peak GB", title=f"The census as {ROWS:,} rows")
    for kind in FORMATS:
        for way in ("ours", "pandas"):
            runs = [record for record in records if (record["way"], record["format"]) == (way, kind)]
            if runs:
                rate = statistics.median(record["rows"] / record["seconds"] for record in runs)
                peak = max(record["peak_gigabytes"] for record in runs)
                table.add_row(kind, way, f"{rate:,.0f}", f"{peak:.1f}")
    return [table]


def _write(path: Path) -> None:
    """The training file of the census, as often as it takes, in chunks: the writer must not be what the peak is of."""
    names = [f"column {place}" for place in range(15)]
    census = pyarrow.csv.read_csv(
        shared("adult/adult-train.csv"), read_options=pyarrow.csv.ReadOptions(column_names=names)
    )
    times, rest = divmod(ROWS, census.num_rows)
    parts = [census] * times + [census.slice(0, rest)]
    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetWriter(path, census.schema) as writer:
            for part in parts:
                writer.write_table(part)
    else:
        with pyarrow.csv.CSVWriter(path, census.schema) as writer:
            for part in parts:
                writer.write(part)
