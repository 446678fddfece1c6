"""How soon a search is there: trials and CPU seconds until a target, by sampler and pruner, beside Hyperopt's TPE.

Every method gets the same space, budget, training function and seeds, and neither baseline nor memory. CPU seconds,
because they mean the same on a machine that has other work; training uses one thread.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import hyperopt
import numpy as np
import torch
from hyperopt import hp
from optuna.trial import FrozenTrial

from models.hyperparameters.domains import Domain, Range
from models.training.loop import train
from models.training.terms import Diverged, Training
from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.job import TuningJob, parse_job
from tasks.search.tune import TuningFailed, tune
from tasks.study.memory import recall
from tasks.study.studies import derived_seed, open_study
from tasks.trainer.local import LocalTrainer
from tests.benchmarks.datasets import DATASETS

HYPEROPT = "hyperopt tpe"
METHODS = (
    *product(("auto", "tpe", "cmaes", "qmc", "random", "grid"), ("median", "none")),
    ("gp", "none"),  # which learns from complete trials only, so a job refuses it beside a pruner
    (HYPEROPT, "none"),
)


@dataclass(frozen=True)
class Setting:
    """Where rows come from, what is searched on them, and the validation accuracy that counts as reached."""

    source: str
    target: float
    trials: int
    space: Mapping[str, Any] = field(default_factory=dict)

    def job(self, seed: int, sampler: str, pruner: str, **search: object) -> TuningJob:
        content = {
            "name": "bench",
            "seed": seed,
            "data": {"source": self.source},
            "search": {
                "sampler": sampler,
                "pruner": pruner,
                "space": dict(self.space),
                "baseline": False,
                "memory": False,
                **search,
            },
            "budget": {"trials": self.trials, "minutes": 600},
        }
        return parse_job(content, DATASETS.with_name("bench.yaml"))


SETTINGS = {
    "digits": Setting("sklearn://digits", target=0.974, trials=60),
    "mnist-10k": Setting(
        f"{DATASETS}:mnist", target=0.944, trials=40, space={"epochs": 8, "batch_size": [64, 128, 256]}
    ),
    "adult": Setting(
        f"{DATASETS}:adult", target=0.855, trials=40, space={"epochs": 5, "batch_size": [128, 256, 512, 1024]}
    ),
}


@dataclass(frozen=True)
class Reached:
    """After how many trials and CPU seconds the target was reached; None where the budget ended first."""

    trials: int | None
    seconds: float


def search(dataset: str, method: str, pruner: str, seed: int) -> dict[str, Any]:
    """One search's record: after how many trials and CPU seconds the target was reached."""
    setting = SETTINGS[dataset]
    with tempfile.TemporaryDirectory() as folder:
        job = setting.job(seed, "random" if method == HYPEROPT else method, pruner)
        prepared = Prepared.load(prepare(job.data, job.objective.problem, Path(folder)), torch.device("cpu"))
        reached = (_hyperopt if method == HYPEROPT else _ours)(job, prepared, setting.target)
    return {
        "measured": "reach",
        "dataset": dataset,
        "method": method,
        "pruner": pruner,
        "seed": seed,
        **asdict(reached),
    }


class _TargetReached(Exception):
    pass


def _ours(job: TuningJob, prepared: Prepared, target: float) -> Reached:
    """Run our own search until the target."""
    count = 0

    def on_trial(trial: FrozenTrial) -> None:
        nonlocal count
        count += 1
        if trial.values and trial.values[0] >= target:
            raise _TargetReached

    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        study = open_study(job, prepared.snapshot.fingerprint, Path(folder), datetime.now(UTC))
        recall(study, job, prepared.snapshot, None, Path(folder))
        try:
            tune(study, job, LocalTrainer(job, prepared), Path(folder) / "checkpoints", on_trial=on_trial)
        except _TargetReached:
            return Reached(count, time.process_time() - began)
        except TuningFailed:
            pass
    return Reached(None, time.process_time() - began)


def _hyperopt(job: TuningJob, prepared: Prepared, target: float) -> Reached:
    """Run Hyperopt's TPE over the same space with the same training function."""
    declared = job.family.hyperparameters
    # What depends on a parent is drawn always: where it does not matter the model ignores it.
    space = {name: _hyperopt_domain(name, domain, declared) for name, domain in job.space.items()}
    trials = hyperopt.Trials()
    setting = prepared.setting(job.family, job.search.objective)

    def objective(values: dict[str, Any]) -> float:
        for name, domain in job.space.items():
            if isinstance(domain, Range) and declared.model_fields[name].annotation is int:
                values[name] = int(values[name])
        chosen = declared.from_values(values)
        seed = derived_seed(job.seed, "trial", len(trials.trials) - 1)
        try:
            trained = train(setting, Training(hyperparameters=chosen, seed=seed))
        except Diverged:
            return float("inf")
        return -trained.kept.objective

    began = time.process_time()
    hyperopt.fmin(
        objective, space, algo=hyperopt.tpe.suggest, max_evals=job.budget.trials, trials=trials, loss_threshold=-target,
        rstate=np.random.default_rng(job.seed), show_progressbar=False, verbose=False,
    )  # fmt: skip
    reached = min(loss for loss in trials.losses() if loss is not None) <= -target
    return Reached(len(trials.trials) if reached else None, time.process_time() - began)


def _hyperopt_domain(name: str, domain: Domain, declared: Any) -> Any:
    if isinstance(domain, Range):
        low, high = domain.low, domain.high
        whole = declared.model_fields[name].annotation is int
        if domain.log:
            bounds = np.log(low), np.log(high)
            return hp.qloguniform(name, *bounds, 1) if whole else hp.loguniform(name, *bounds)
        return hp.quniform(name, low, high, 1) if whole else hp.uniform(name, low, high)
    return hp.choice(name, list(domain)) if isinstance(domain, tuple) else domain
