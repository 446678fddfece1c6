"""Prepares and trains in a process whose own memory (RLIMIT_DATA) is limited: run by a test, with a folder that holds
rows.parquet, and the megabytes that it may have beside its libraries. Chunks, buckets and shards are an eighth of what
they are otherwise, as the rows are small beside what they stand for."""

import json
import resource
import sys
from pathlib import Path

import torch

from models import batches
from models.families import family_named
from models.solo import Training, train
from tasks import prepare as preparing
from tasks import sources
from tasks.job import DataConfig
from tasks.prepare import prepare
from tasks.tune import Prepared


def main(folder: Path, megabytes: int) -> None:
    batches.SHARD_BYTES //= 8
    preparing.BUCKET_BYTES //= 8
    sources.CHUNK_VALUES //= 8
    torch.set_num_threads(1)
    torch.ones(64, 64) @ torch.ones(64, 64)  # its threads and buffers are libraries' too
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    limit = int(line.split()[1]) * 1024 + megabytes * 1_000_000
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    snapshot = prepare(DataConfig(source=str(folder / "rows.parquet")), "classification", folder / "snapshots")
    prepared = Prepared.load(snapshot, torch.device("cpu"))
    assert prepared.training.is_streamed
    family = family_named("mlp")
    chosen = family.hyperparameters.from_values({"epochs": 1, "batch_size": 4096, "width": 8, "depth": 1})
    trained = train(prepared.setting(family, "accuracy"), Training(hyperparameters=chosen, seed=0))
    print(json.dumps({"rows": snapshot.rows, "accuracy": trained.validation["accuracy"], "limit": limit}))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
