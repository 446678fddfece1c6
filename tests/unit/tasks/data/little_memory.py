"""Prepares and trains in a process whose own memory (RLIMIT_DATA) is limited: run by a test, with a folder that holds
rows.parquet, and the megabytes that it may have beside its libraries. Buckets and shards are an eighth of what they
are otherwise, and chunks a half: the rows are few beside those that they stand for."""

import json
import resource
import sys
from pathlib import Path

import pyarrow as pa
import scipy.stats  # noqa: F401 loaded at its first use, and a library as well
import sklearn.tree  # noqa: F401
import torch

from models.families.family import family_named
from models.rows import batches
from models.training.loop import train
from models.training.terms import Training
from tasks.data import prepare as preparing
from tasks.data import table_files
from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.job import DataConfig
from tests.servers import private_bytes


def main(folder: Path, megabytes: int) -> None:
    batches.SHARD_BYTES //= 8
    preparing.BUCKET_BYTES //= 8
    table_files.CHUNK_VALUES //= 2
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own reserves more than it uses
    torch.set_num_threads(1)
    # What is loaded and reserved at the first use is the libraries' too.
    torch.optim.Adam(torch.nn.Linear(64, 64).parameters())
    limit = private_bytes() + megabytes * 1_000_000
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
