"""work: what trains the trials of a study: ask for a wave of them, train it, tell what each was worth.

Trials are asked for in waves: the sampler draws one freely, and the rest of its wave with that one's structure, so that
they are trained as one computation (`models.fused`). Independent proposals do not meet: of 64 drawn from an MLP's
batch size, depth and width 1.02 share a structure, on average; if all widths are padded to the widest of the same batch
size and depth it is 4.3, at 2.5 times the arithmetic; a wave is full. It costs the search some of the structures that
it would have seen, which is why a wave is no larger than the device gains from.

A trial that diverges or cannot be built fails by itself and the night goes on. Knows nothing of MLflow: whoever wants
to know of finished trials passes a callback.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import optuna
import torch
from optuna.trial import FrozenTrial

from infra.store.protocol import Store
from tasks.data.snapshots import Snapshot
from tasks.job import TuningJob
from tasks.search.checkpoints import TrialCheckpoints
from tasks.search.wave import Breaker, Interrupted, largest_wave, run_wave
from tasks.study.leases import Claims, Lease, NightSign
from tasks.study.studies import has_waves
from tasks.trainer.connection import ProcessGroup
from tasks.trainer.local import Trainer
from tasks.trainer.processes import TrainerProcesses, worthwhile_processes

POLL_SECONDS = 0.5

_logger = logging.getLogger(__name__)


def work(
    study: optuna.Study,
    job: TuningJob,
    trainer: Trainer,
    checkpoints: Path,
    lease: Lease,
    claims: Claims,
    on_trial: Callable[[FrozenTrial], None],
    store: Store | None = None,
) -> int:
    """Train trials of a study whose night is elsewhere, until that ends or is gone; returns how many. Checkpoints lie
    in a folder, and in a store where other machines are to find them."""
    told = 0

    def count(trial: FrozenTrial) -> None:
        nonlocal told
        told += 1
        on_trial(trial)

    night = NightSign(study)
    with suppress(Interrupted), TrialCheckpoints(checkpoints, study.study_name, store) as kept:
        breaker = Breaker(study, lease)
        while not night.is_gone() and not breaker.is_open:
            wave = run_wave(study, job, trainer, kept, lease, claims, count, lambda: lease.must_cut_off)
            if not breaker.counts(wave):
                time.sleep(POLL_SECONDS)
    return told


def trainer_of(
    job: TuningJob, snapshot: Snapshot, device: torch.device, started: ProcessGroup | None = None
) -> TrainerProcesses:
    """As many processes as use the device best; those that were `started_ahead` are among them."""
    processes = processes_for(job, device, snapshot.features("train", device).raw_bytes)
    return TrainerProcesses(job, snapshot, device, processes, started)


def processes_for(job: TuningJob, device: torch.device, rows_bytes: int = 0) -> int:
    """How many use the device best for training on rows of such a size: no more than a wave has trials."""
    most = largest_wave(job, device) if has_waves(job) else 1
    return min(most, worthwhile_processes(device, rows_bytes))
