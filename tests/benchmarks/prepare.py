"""The suite `prepare`: the census repeated to millions of rows, from a file to a snapshot, beside plain pandas that
reads the same file and does nothing with it; from a snapshot to the first batch; and a table several times larger than
the memory that the process may have. Peak memory is that of the whole process, libraries included.
"""

import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from rich.table import Table

from infra.store.opening import open_store
from models.families.family import family_named
from models.training.loop import train
from models.training.terms import Training
from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.data.snapshots import fetch_snapshot, publish_snapshot
from tasks.job import DataConfig
from tests.benchmarks.datasets import has_shared_data, shared
from tests.benchmarks.search import Measurement, Record
from tests.servers import private_bytes

ALONE = True
ROWS = 5_000_000
FORMATS = ("csv", "parquet")
LARGER_ROWS, NUMBERS, LIMIT_MEGABYTES = 15_000_000, 50, 1000


def measurements(seeds: int) -> list[Measurement]:
    """Ours and pandas in turn, for each format; without the census only what is drawn at random."""
    census: list[Measurement] = [
        *((reading, (way, kind)) for _ in range(min(seeds, 3)) for kind in FORMATS for way in ("ours", "pandas")),
        (first_batch, ()),
    ]
    return [*(census if has_shared_data() else []), (larger_than_memory, ())]


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


def first_batch() -> Record:
    """Seconds from a snapshot's fingerprint to the first batch that a worker trains on: with the snapshot in its
    folder, and with an empty folder, where the files are fetched from a store in another folder and their checksums
    compared."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder / "rows.parquet")
        made = prepare(DataConfig(source=str(folder / "rows.parquet")), "classification", folder / "here")
        store = open_store((folder / "store").as_uri())
        publish_snapshot(store, made)
        seconds = {}
        for cache in ("cold", "warm"):
            began = time.perf_counter()
            found = fetch_snapshot(store, folder / "there", made.fingerprint)
            assert found is not None
            prepared = Prepared.load(found, torch.device("cpu"))
            next(prepared.training.batches(256, torch.Generator().manual_seed(0)))
            seconds[cache] = time.perf_counter() - began
        size = sum(path.stat().st_size for path in made.path.iterdir())
    return {"measured": "first batch", "megabytes": size / 1e6, **seconds}


def larger_than_memory() -> Record:
    """A Parquet file of random numbers becomes a snapshot and is trained on for an epoch by a process whose own memory
    (RLIMIT_DATA) may grow by a fraction of that."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.parquet"
        writer = multiprocessing.get_context("spawn").Process(target=_write_numbers, args=(path,))
        writer.start()
        writer.join()
        pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own reserves more than it uses
        limit = private_bytes() + LIMIT_MEGABYTES * 1_000_000
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        began = time.perf_counter()
        snapshot = prepare(DataConfig(source=str(path)), "classification", Path(name) / "snapshots")
        prepared_at = time.perf_counter()
        prepared = Prepared.load(snapshot, torch.device("cpu"))
        assert prepared.training.is_streamed
        loaded_at = time.perf_counter()
        family = family_named("mlp")
        chosen = family.hyperparameters.from_values({"epochs": 1, "batch_size": 4096, "width": 32, "depth": 1})
        trained = train(prepared.setting(family, "accuracy"), Training(hyperparameters=chosen, seed=0))
        ended = time.perf_counter()
    return {
        "measured": "larger", "rows": snapshot.rows, "gigabytes": snapshot.rows * NUMBERS * 4 / 1e9,
        "limit_megabytes": LIMIT_MEGABYTES, "prepare": prepared_at - began, "preprocessing": loaded_at - prepared_at,
        "epoch": ended - loaded_at, "accuracy": trained.validation["accuracy"],
    }  # fmt: skip


def summary(records: list[Record]) -> dict[str, float]:
    """How many times as long as pandas a snapshot takes, by format; medians."""
    medians = {
        (way, kind): statistics.median(found["seconds"] for found in runs)
        for kind in FORMATS
        for way in ("ours", "pandas")
        if (runs := [record for record in records if (record.get("way"), record.get("format")) == (way, kind)])
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
            runs = [record for record in records if (record.get("way"), record.get("format")) == (way, kind)]
            if runs:
                rate = statistics.median(record["rows"] / record["seconds"] for record in runs)
                peak = max(record["peak_gigabytes"] for record in runs)
                table.add_row(kind, way, f"{rate:,.0f}", f"{peak:.1f}")
    others = Table("what", "figure", title="Snapshots")
    for record in records:
        if record["measured"] == "first batch":
            others.add_row(
                f"a snapshot of {record['megabytes']:.0f} MB to the first batch",
                f"{record['warm']:.1f} s from its folder, {record['cold']:.1f} s from the store",
            )
        if record["measured"] == "larger":
            others.add_row(
                f"{record['rows']:,} rows of {record['gigabytes']:.1f} GB, with {record['limit_megabytes']} MB",
                f"{record['prepare']:.0f} s to a snapshot, {record['epoch']:.0f} s an epoch",
            )
    return [table, others]


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


def _write_numbers(path: Path) -> None:
    """Random columns, of which two decide the target."""
    draw = np.random.default_rng(0)
    schema = pa.schema([*((f"x{place}", pa.float32()) for place in range(NUMBERS)), ("y", pa.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for _ in range(0, LARGER_ROWS, 50_000):
            columns = list(draw.normal(size=(NUMBERS, 50_000)).astype(np.float32))
            writer.write_table(
                pa.table([*columns, np.where(columns[0] + columns[1] > 0, "high", "low")], schema=schema)
            )
