"""The suite `workers`: trials a minute with one worker and with two, and what a trial costs a study in PostgreSQL that
has many already.

A worker is a process with one thread; trials take a second or so, so that what is measured is how well workers share a
study, not how fast they start.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState, create_trial
from rich.table import Table

from tasks.job import TuningJob, parse_job
from tasks.search.tune import tune
from tasks.search.worker import work
from tasks.study.leases import Lease
from tasks.study.samplers import NUMBER
from tasks.study.storage import Studies, one_claims
from tasks.study.studies import SEARCH_ENDED_BY, Asking, finished_trials, load_study, open_study
from tasks.trainer.local import LocalTrainer
from tests.benchmarks.engine import prepared_by
from tests.benchmarks.search import Measurement, Record
from tests.servers import postgres_programs, postgres_server

ALONE = True
TRIALS = 48
FINISHED = (100, 1000, 10_000)
REPORTS = 20
REPEATS = 16


def measurements(seeds: int) -> list[Measurement]:
    """Each count of workers in turn, as often as there are seeds, three times at most; then the studies."""
    rounds = [(scaling, (workers, seed)) for seed in range(min(seeds, 3)) for workers in (1, 2)]
    return [*rounds, *((asking, (finished,)) for finished in FINISHED if postgres_programs() is not None)]


def scaling(workers: int, seed: int) -> Record:
    """Seconds for the trials, from the moment that every worker is ready."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = _job(seed)
        prepared = prepared_by(job, folder)
        study = open_study(job, prepared.snapshot.fingerprint, folder / "studies", datetime.now(UTC))
        study.set_user_attr(SEARCH_ENDED_BY, "")
        context = multiprocessing.get_context("spawn")
        ready = context.Barrier(workers)
        others = [
            context.Process(target=_work, args=(job.model_dump(mode="json"), study.study_name, folder, ready))
            for _ in range(workers - 1)
        ]
        for other in others:
            other.start()
        torch.set_num_threads(1)
        trainer = LocalTrainer(job, prepared)
        ready.wait(120)
        began = time.perf_counter()
        tune(study, job, trainer, folder, claims=lambda: one_claims(folder / "studies", job.name, study.study_name))
        seconds = time.perf_counter() - began
        for other in others:
            other.join(60)
        assert len(finished_trials(study)) == TRIALS
    return {"measured": "scaling", "workers": workers, "seed": seed, "trials_a_minute": 60 * TRIALS / seconds}


def asking(finished: int) -> Record:
    """Milliseconds of a trial in PostgreSQL beside so many finished ones: asked for as a worker does it, with its
    reports and its end; medians."""
    with postgres_server() as postgres:
        os.environ["PGPASSWORD"] = postgres.password
        studies: Studies = postgres.url
        job = _job(0, trials=100_000)
        study = open_study(job, "f" * 32, studies, datetime.now(UTC))
        _fill(study, job, finished)
        lease = Lease(study, "cpu", None)
        lease.renew()
        asks, reports, tells = [], [], []
        for _ in range(REPEATS):
            began = time.perf_counter()
            with one_claims(studies, job.name, study.study_name):
                trial = Asking(study, job).ask(lease.name)
                job.family.draw(trial, job.space)
            asked = time.perf_counter()
            for epoch in range(1, REPORTS + 1):
                trial.report(0.5, epoch)
            reported = time.perf_counter()
            study.tell(trial, 0.5)
            told = time.perf_counter()
            asks.append(asked - began)
            reports.append((reported - asked) / REPORTS)
            tells.append(told - reported)
    found = {"ask": asks, "report": reports, "tell": tells}
    return {
        "measured": "asking",
        "finished": finished,
        **{kind: round(1000 * statistics.median(seconds), 2) for kind, seconds in found.items()},
    }


def tables(records: list[Record]) -> list[Table]:
    """How close two workers come to twice one; and what a trial costs the study."""
    found = summary(records)
    scaling_table = Table("workers", "trials a minute", "of ideal", title="Workers on one machine, one thread each")
    for workers, rate in found.get("trials_a_minute", {}).items():
        ideal = found["trials_a_minute"].get("1")
        scaling_table.add_row(workers, f"{rate:.1f}", f"{rate / ideal / int(workers):.0%}" if ideal else "")
    costs = Table("finished trials", "ask, ms", "report, ms", "tell, ms", title="A trial in PostgreSQL")
    for record in sorted((one for one in records if one["measured"] == "asking"), key=lambda one: int(one["finished"])):
        costs.add_row(*(str(record[name]) for name in ("finished", "ask", "report", "tell")))
    return [scaling_table, costs]


def summary(records: list[Record]) -> dict[str, Any]:
    """The medians of the rounds, and the efficiency of two workers."""
    rates: dict[str, list[float]] = {}
    for record in records:
        if record["measured"] == "scaling":
            rates.setdefault(str(record["workers"]), []).append(record["trials_a_minute"])
    medians = {workers: statistics.median(some) for workers, some in sorted(rates.items())}
    efficiency = medians["2"] / 2 / medians["1"] if {"1", "2"} <= medians.keys() else None
    return {"trials_a_minute": medians, "efficiency": efficiency}


def _work(content: dict[str, Any], study_name: str, folder: Path, ready: Barrier) -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    job = TuningJob.model_validate(content)
    study = load_study(study_name, job.name, folder / "studies")
    trainer = LocalTrainer(job, prepared_by(job, folder))
    ready.wait(120)
    with Lease(study, "cpu", None) as lease:
        claims = partial(one_claims, folder / "studies", job.name, study_name)
        work(study, job, trainer, folder, lease, claims, lambda _: None)


def _job(seed: int, trials: int = TRIALS) -> TuningJob:
    """Trials of equal length, whatever the sampler draws."""
    space = {"epochs": 60, "batch_size": 32, "depth": 2, "width": 128, "early_stopping_patience": 0}
    content = {
        "name": "bench",
        "seed": seed,
        "data": {"source": "sklearn://digits"},
        "search": {"pruner": "none", "baseline": False, "space": space},
        "budget": {"trials": trials, "minutes": 600},
    }
    return parse_job(content, Path("bench.yaml"))


def _fill(study: optuna.Study, job: TuningJob, finished: int) -> None:
    """What so many trials leave in a study, without training them."""
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    rehearsed = []
    for number in range(finished):
        trial = drawn.ask()
        job.family.draw(trial, job.space)
        rehearsed.append(
            create_trial(
                state=TrialState.COMPLETE,
                value=number / finished,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={NUMBER: number},
            )
        )
    study.add_trials(rehearsed)
