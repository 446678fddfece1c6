"""The suite `publish`: a 1 GB version on its way to a real S3 server, beside boto3's transfer manager sending the same
file bare, without hashing it, verifying it or writing a manifest.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from rich.table import Table

from infra.store.opening import open_store
from tasks.registry.versions import publish_version
from tests.benchmarks.search import Measurement, Record
from tests.promoting import write_version
from tests.servers import ceph_gateway, has_ceph, ministack_server

MEGABYTES = 1000
BUCKET = "bench"


def measurements(seeds: int) -> list[Measurement]:
    """One measurement: as many rounds as there are seeds; three at most, or the server is full."""
    return [(publishing, (min(seeds, 3),))]


def publishing(rounds: int) -> Record:
    """Seconds of each way, by round."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = ceph_gateway if has_ceph() else ministack_server
        (folder / "server").mkdir()
        with server(folder / "server") as s3:
            os.environ.update(s3.environment)
            s3.make_bucket(BUCKET)
            _warm_up(folder)
            found = [_round(folder / "version", number) for number in range(rounds)]
    return {
        "measured": "publish",
        "server": "Ceph RADOS gateway" if has_ceph() else "MiniStack",
        "megabytes": MEGABYTES,
        "ours": [ours for ours, _ in found],
        "bare": [bare for _, bare in found],
    }


def tables(records: list[Record]) -> list[Table]:
    """One row: the share of the bare speed that ours reaches, median of the rounds."""
    table = Table("server", "speed of bare", "ours", "boto3's transfer manager", title=f"Publishing {MEGABYTES} MB")
    for record in records:
        pairs: list[tuple[float, float]] = list(zip(record["ours"], record["bare"], strict=True))
        share = statistics.median(bare / ours for ours, bare in pairs)
        ours, bare = (MEGABYTES / statistics.median(times) for times in (record["ours"], record["bare"]))
        table.add_row(record["server"], f"{share:.0%}", f"{ours:.0f} MB/s", f"{bare:.0f} MB/s")
    return [table]


def _round(folder: Path, number: int) -> tuple[float, float]:
    """The two in turn, each first in every other round, so that neither always has the emptier server."""
    manifest = write_version(folder, number, large=_random_file(number, MEGABYTES))
    weights = folder / "model.safetensors"
    client: Any = boto3.Session().client("s3")
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: publish_version(open_store(f"s3://{BUCKET}"), manifest, folder),
        "bare": lambda: client.upload_file(str(weights), BUCKET, f"bare/{number}"),
    }
    seconds = {}
    for way in list(ways)[:: 1 if number % 2 == 0 else -1]:
        began = time.perf_counter()
        ways[way]()
        seconds[way] = time.perf_counter() - began
    return seconds["ours"], seconds["bare"]


def _warm_up(folder: Path) -> None:
    """A server that has just started makes its first objects several times slower than those that follow."""
    file = folder / "first"
    file.write_bytes(_random_file(0, 300))
    client: Any = boto3.Session().client("s3")
    client.upload_file(str(file), BUCKET, "first")


def _random_file(number: int, megabytes: int) -> bytes:
    return np.random.default_rng(number).bytes(megabytes * 1_000_000)
