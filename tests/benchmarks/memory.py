"""What the memory of earlier nights is worth: trials until a target on each of five nights whose data grows, from 60 %
of the digits to all of them, with the memory and without.
"""

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.job import parse_job
from tasks.search.tune import tune
from tasks.study.memory import recall
from tasks.study.studies import ENDED, open_study
from tasks.trainer.local import LocalTrainer
from tests.benchmarks.datasets import DATASETS

NIGHTS = (1, 2, 3, 4, 5)
TARGET = 0.965
TRIALS = 20


def five_nights(memory: bool, seed: int) -> dict[str, Any]:
    """Five nights of one job; by night the trials until the target, TRIALS + 1 where it was missed."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            "measured": "memory",
            "memory": memory,
            "seed": seed,
            "trials": {str(night): _trials_until_target(Path(folder), night, memory, seed) for night in NIGHTS},
        }


def _trials_until_target(home: Path, night: int, memory: bool, seed: int) -> int:
    content = {
        "name": "bench",
        "seed": 1000 * night + seed,  # else two nights without memory would try the same
        "data": {"source": f"{DATASETS}:digits_of_night_{night}"},
        "search": {"memory": memory},
        "budget": {"trials": TRIALS, "minutes": 600},
    }
    job = parse_job(content, DATASETS.with_name("bench.yaml"))
    snapshot = prepare(job.data, job.objective.problem, home / "snapshots")
    prepared = Prepared.load(snapshot, torch.device("cpu"))
    study = open_study(job, snapshot.fingerprint, home / "studies", datetime(2026, 1, night, tzinfo=UTC))
    recall(study, job, snapshot, None, home / "studies")
    values: list[float] = []
    tune(
        study,
        job,
        LocalTrainer(job, prepared),
        home / "checkpoints",
        on_trial=lambda trial: values.append(trial.values[0] if trial.values else 0.0),
    )
    study.set_user_attr(ENDED, "yes")
    return next((number for number, value in enumerate(values, 1) if value >= TARGET), TRIALS + 1)
