"""The suite `throughput`: trials a minute of a whole night, beside the usual ways to search, on the same problem.

The problem is the digits: an MLP, ten epochs; learning rate, batch size, optimizer, depth, width, dropout and weight
decay are searched. Nothing is pruned; then each way prunes by what it has itself, which of Hyperopt is nothing. Each
way runs alone on the machine, in turn, as often as asked for; what is compared is the median. The peers are written as
their own documentation shows it, each in a process of its own.
"""

import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import hyperopt
import numpy as np
import optuna
import ray
import ray.tune
import torch
import yaml
from hyperopt import hp
from optuna.trial import FrozenTrial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from infra.device import choose_device
from tasks.job import TuningJob, parse_job
from tasks.search.tune import tune
from tasks.search.worker import trainer_of
from tasks.study.studies import open_study
from tests.benchmarks.datasets import has_shared_data
from tests.benchmarks.engine import STEP_MEMBERS, STEP_WIDTHS, cnn, late_trials, on_device, on_host, prepared_by, step
from tests.benchmarks.search import Measurement, Record
from tests.servers import free_port

ALONE = True
TARGET = 0.975
BATCH_SIZES, OPTIMIZERS = (16, 32, 64, 128, 256), ("sgd", "momentum", "adam", "rmsprop")
EPOCHS = 10
SPACE = {
    "epochs": EPOCHS,
    "batch_size": list(BATCH_SIZES),
    "learning_rate": {"low": 3e-4, "high": 0.1, "log": True},
    "schedule": "constant",
    "optimizer": list(OPTIMIZERS),
    "weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
    "depth": {"low": 1, "high": 3},
    "width": {"low": 16, "high": 256, "log": True},
    "taper": 1.0,
    "dropout": {"low": 0.0, "high": 0.5},
}
# So many that each way takes about half a minute; the slow ones would take an hour for a night's 200.
TRIALS = {
    "night": 200, "bare": 200, "optuna": 60, "hyperopt": 60, "ray": 12, "ray best": 40,
    "night, pruned": 200, "optuna, pruned": 60, "ray best, pruned": 40,
}  # fmt: skip
TARGET_SECONDS = 60
CNN_WAYS = ("bare", "optuna")
BEFORE = (0, 1_000, 5_000)
RATIOS = {
    "vs_optuna": ("night", "optuna"),
    "vs_ray": ("night", "ray"),
    "vs_ray_best": ("night", "ray best"),
    "vs_hyperopt": ("night", "hyperopt"),
    "vs_optuna_pruned": ("night, pruned", "optuna, pruned"),
    "vs_ray_best_pruned": ("night, pruned", "ray best, pruned"),
    "vs_hyperopt_pruned": ("night, pruned", "hyperopt"),
}


def measurements(seeds: int) -> list[Measurement]:
    """Every way once a round, so that a machine that slows down slows all of them; three rounds at most of whatever
    does not depend on luck."""
    rounds = range(min(seeds, 3))
    return [
        *((step, (width, members)) for width in STEP_WIDTHS for members in STEP_MEMBERS),
        *((run, (way, seed)) for seed in rounds for way in TRIALS),
        *((cnn, (way, seed)) for seed in rounds if has_shared_data() for way in CNN_WAYS),
        *((until_target, (way, seed)) for seed in range(seeds) for way in ("ours", "optuna")),
        *((late, (before,)) for before in BEFORE),
    ]


def run(way: str, seed: int) -> Record:
    """One way's seconds for its trials; of a night those of its tune step, and `whole` those of the whole flow run."""
    ways: dict[str, Callable[[int, int], dict[str, float]]] = {
        "night": _night,
        "bare": _bare,
        "optuna": _optuna,
        "hyperopt": _hyperopt,
        "ray": _ray,
        "ray best": _ray_best,
        "night, pruned": partial(_night, pruner="median"),
        "optuna, pruned": partial(_optuna, pruner=optuna.pruners.MedianPruner()),
        "ray best, pruned": partial(_ray_best, scheduler=ASHAScheduler(max_t=EPOCHS)),
    }
    return {"measured": "rate", "way": way, "seed": seed, "trials": TRIALS[way], **ways[way](TRIALS[way], seed)}


def until_target(way: str, seed: int) -> Record:
    """Seconds until the first trial whose validation accuracy is the target's, or until it is given up."""
    began = time.perf_counter()
    reached = (_ours_until if way == "ours" else _optuna_until)(seed)
    return {
        "measured": "target", "way": way, "seed": seed, "reached": reached, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def late(before: int) -> Record:
    """Seconds a trial of the bare engine after so many."""
    return late_trials(_content(1, 0), before)


def summary(records: list[Record]) -> dict[str, Any]:
    """The ratios of medians, above 1 where a night is faster; `overhead` is a night's time over the bare engine's."""
    rates = {way: _rate(records, way) for way in TRIALS if _runs(records, way)}
    found: dict[str, Any] = {
        name: round(rates[ours] / rates[theirs], 2)
        for name, (ours, theirs) in RATIOS.items()
        if {ours, theirs} <= rates.keys()
    }
    if {"night", "bare"} <= rates.keys():
        found["overhead"] = round(rates["bare"] / rates["night"], 2)
    ours, theirs = (_target_seconds(records, way) for way in ("ours", "optuna"))
    if ours and theirs:
        found["time_to_target_vs_optuna"] = round(theirs / ours, 2)
    cnns = {way: _median_seconds(records, measured="cnn", way=way) for way in CNN_WAYS}
    if all(cnns.values()):
        found["cnn_vs_optuna"] = round(cnns["optuna"] / cnns["bare"], 2)
    late = {before: _median_seconds(records, measured="late", before=before) for before in BEFORE}
    for before in BEFORE[1:]:
        if late[0] and late[before]:
            found[f"trial_after_{before}"] = round(late[before] / late[0], 2)
    return found


def _median_seconds(records: list[Record], **wanted: Any) -> float:
    """0 where there is none."""
    seconds = [record["seconds"] for record in records if wanted.items() <= record.items()]
    return statistics.median(seconds) if seconds else 0.0


def tables(records: list[Record]) -> list[Table]:
    """The ratios, then what they are made of."""
    ratios = Table("what", "ratio", title="A whole night beside the usual ways, on digits")
    for name, value in summary(records).items():
        ratios.add_row(name, f"{value:g}")
    rates = Table("way", "trials a minute, median", "least to most", "trials", title="What the ratios are made of")
    for way, trials in TRIALS.items():
        if runs := _runs(records, way):
            each = sorted(60 * one["trials"] / one["seconds"] for one in runs)
            rates.add_row(way, f"{_rate(records, way):.0f}", f"{each[0]:.0f} to {each[-1]:.0f}", str(trials))
    for one in _runs(records, "night"):
        rates.add_row("night, its whole flow run", f"{60 * one['trials'] / one['whole']:.0f}", "", str(one["trials"]))
    for way in ("ours", "optuna"):
        if seconds := _target_seconds(records, way):
            reached = [
                record["reached"] for record in records if record["measured"] == "target" and record["way"] == way
            ]
            text = f"{way}, seconds until {TARGET:.1%} (reached by {sum(reached)} of {len(reached)})"
            rates.add_row(text, f"{seconds:.1f}", "", "")
    steps = Table("width", "members", "GFLOP a second", "of the matrix products alone", title="A step of digits MLPs")
    for one in (record for record in records if record["measured"] == "step"):
        share = f"{one['rate'] / one['peak']:.0%} of {one['peak']:.0f}"
        steps.add_row(str(one["width"]), str(one["members"]), f"{one['rate']:.1f}", share)
    return [ratios, rates, steps]


def _runs(records: list[Record], way: str) -> list[Record]:
    return [record for record in records if record["measured"] == "rate" and record["way"] == way]


def _rate(records: list[Record], way: str) -> float:
    return float(statistics.median(60 * one["trials"] / one["seconds"] for one in _runs(records, way)))


def _target_seconds(records: list[Record], way: str) -> float | None:
    """The median; a search of ours that misses the target counts as longer than any other, a peer's as if it had
    reached it at its end."""
    runs = [record for record in records if record["measured"] == "target" and record["way"] == way]
    seconds = [record["seconds"] if record["reached"] or way != "ours" else math.inf for record in runs]
    return statistics.median_high(seconds) if seconds else None


def _content(trials: int, seed: int, pruner: str = "none") -> dict[str, Any]:
    return {
        "name": "bench",
        "seed": seed,
        "data": {"source": "sklearn://digits"},
        "model": "mlp",
        "search": {"sampler": "tpe", "pruner": pruner, "space": SPACE, "baseline": False, "memory": False},
        "budget": {"trials": trials, "minutes": 600},
    }


def _job(trials: int, seed: int) -> TuningJob:
    return parse_job(_content(trials, seed), Path("bench.yaml"))


def _night(trials: int, seed: int, pruner: str = "none") -> dict[str, float]:
    """Prefect, MLflow, Optuna's storage and the artifact store, as `make run` sets them up."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "jobs").mkdir()
        (folder / "jobs/bench.yaml").write_text(yaml.safe_dump(_content(trials, seed, pruner)))
        ports = {f"NIGHTLY_{service}_PORT": str(free_port()) for service in ("PREFECT", "MLFLOW")}
        environment = {
            **os.environ, **ports, "NIGHTLY_HOME": str(folder / "home"), "NIGHTLY_JOBS": str(folder / "jobs"),
        }  # fmt: skip
        nightly = str(Path(sys.executable).with_name("nightly"))
        try:
            for command in (["up"], ["run", "bench"]):
                subprocess.run([nightly, *command], env=environment, check=True, stdout=subprocess.DEVNULL)
            api = f"http://127.0.0.1:{ports['NIGHTLY_PREFECT_PORT']}/api"
            tasks = httpx.post(f"{api}/task_runs/filter", json={}, timeout=30).json()
            flows = httpx.post(f"{api}/flow_runs/filter", json={}, timeout=30).json()
        finally:
            subprocess.run([nightly, "down"], env=environment, check=True, stdout=subprocess.DEVNULL)
    tuning = next(task for task in tasks if task["name"].startswith("tune"))
    whole = next(flow for flow in flows if flow["state_type"] == "COMPLETED")
    return {"seconds": tuning["total_run_time"], "whole": whole["total_run_time"]}


def _bare(trials: int, seed: int) -> dict[str, float]:
    """The same engine, with the start of its processes, and the same storage, without Prefect and MLflow."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = _job(trials, seed)
        prepared = prepared_by(job, folder)
        study = open_study(job, prepared.snapshot.fingerprint, folder, datetime.now(UTC))
        began = time.perf_counter()
        with trainer_of(job, prepared.snapshot, choose_device()) as trainer:
            tune(study, job, trainer, folder / "checkpoints")
        return {"seconds": time.perf_counter() - began}


class _TargetReached(Exception):
    pass


def _ours_until(seed: int) -> bool:
    def on_trial(trial: FrozenTrial) -> None:
        if trial.values and trial.values[0] >= TARGET:
            raise _TargetReached

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = _job(100_000, seed)
        prepared = prepared_by(job, folder)
        study = open_study(job, prepared.snapshot.fingerprint, folder, datetime.now(UTC))
        try:
            with trainer_of(job, prepared.snapshot, choose_device()) as trainer:
                tune(study, job, trainer, folder / "checkpoints", on_trial=on_trial, seconds_left=TARGET_SECONDS)
        except _TargetReached:
            return True
    return False


Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _rows() -> Rows:
    with tempfile.TemporaryDirectory() as name:
        prepared = prepared_by(_job(1, 0), Path(name))
    return *on_host(prepared.training), *on_host(prepared.validation)


def train_plainly(chosen: dict[str, Any], rows: Rows) -> float:
    """The validation accuracy after the last epoch."""
    return list(epochs_of(chosen, rows))[-1]


def epochs_of(chosen: dict[str, Any], rows: Rows, *, loaders: bool = True) -> Iterator[float]:
    """A training as a tutorial writes it: a model, an optimizer, a loop over DataLoaders, or over slices of tensors
    that are on the device; yields the validation accuracy after each epoch."""
    device = choose_device()
    features, target, unseen, wanted = rows if loaders else [tensor.to(device) for tensor in rows]
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = features[0].numel()
    for _ in range(chosen["depth"]):
        layers += [nn.Linear(inputs, chosen["width"]), nn.ReLU(), nn.Dropout(chosen["dropout"])]
        inputs = chosen["width"]
    model = nn.Sequential(*layers, nn.Linear(inputs, 10)).to(device)
    rate, decay = chosen["learning_rate"], chosen["weight_decay"]
    optimizer: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), rate, weight_decay=decay),
        "momentum": lambda: torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay),
        "adam": lambda: torch.optim.Adam(model.parameters(), rate, weight_decay=decay),
        "rmsprop": lambda: torch.optim.RMSprop(model.parameters(), rate, weight_decay=decay),
    }[chosen["optimizer"]]()  # type: ignore[no-untyped-call]
    batches = DataLoader(TensorDataset(features, target), batch_size=chosen["batch_size"], shuffle=True)
    unseen_batches = DataLoader(TensorDataset(unseen, wanted), batch_size=256)
    for _ in range(EPOCHS):
        model.train()
        if loaders:
            some: Any = on_device(batches)
        else:
            order = torch.split(torch.randperm(len(features), device=device), chosen["batch_size"])
            some = ((features[index], target[index]) for index in order)
        for batch, labels in some:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        model.eval()
        with torch.no_grad():
            if loaders:
                found = ((model(batch).argmax(1), labels) for batch, labels in on_device(unseen_batches))
                right = sum((classes == labels).sum().item() for classes, labels in found)
                accuracy = right / len(wanted)
            else:
                accuracy = (model(unseen).argmax(1) == wanted).float().mean().item()
        yield accuracy


def _suggest(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "batch_size": trial.suggest_categorical("batch_size", BATCH_SIZES),
        "learning_rate": trial.suggest_float("learning_rate", 3e-4, 0.1, log=True),
        "optimizer": trial.suggest_categorical("optimizer", OPTIMIZERS),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-2, log=True),
        "depth": trial.suggest_int("depth", 1, 3),
        "width": trial.suggest_int("width", 16, 256, log=True),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5),
    }


def _optuna_study(seed: int, pruner: optuna.pruners.BasePruner | None = None) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.manual_seed(seed)
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner)


def _optuna(trials: int, seed: int, pruner: optuna.pruners.BasePruner | None = None) -> dict[str, float]:
    rows, study = _rows(), _optuna_study(seed, pruner)

    def objective(trial: optuna.Trial) -> float:
        accuracy = 0.0
        for epoch, accuracy in enumerate(epochs_of(_suggest(trial), rows)):
            if pruner is not None:
                trial.report(accuracy, epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
        return accuracy

    began = time.perf_counter()
    study.optimize(objective, n_trials=trials)
    return {"seconds": time.perf_counter() - began}


def _optuna_until(seed: int) -> bool:
    rows, study = _rows(), _optuna_study(seed)

    def stop(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.values and trial.values[0] >= TARGET:
            study.stop()

    study.optimize(lambda trial: train_plainly(_suggest(trial), rows), timeout=TARGET_SECONDS, callbacks=[stop])
    return study.best_value >= TARGET


def _hyperopt(trials: int, seed: int) -> dict[str, float]:
    rows = _rows()
    space = {
        "batch_size": hp.choice("batch_size", BATCH_SIZES),
        "learning_rate": hp.loguniform("learning_rate", np.log(3e-4), np.log(0.1)),
        "optimizer": hp.choice("optimizer", OPTIMIZERS),
        "weight_decay": hp.loguniform("weight_decay", np.log(1e-6), np.log(1e-2)),
        "depth": hp.uniformint("depth", 1, 3),
        "width": hp.qloguniform("width", np.log(16), np.log(256), 1),
        "dropout": hp.uniform("dropout", 0.0, 0.5),
    }

    def objective(chosen: dict[str, Any]) -> float:
        whole = {name: int(chosen[name]) for name in ("depth", "width")}
        return -train_plainly(chosen | whole, rows)

    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    began = time.perf_counter()
    hyperopt.fmin(
        objective, space, algo=hyperopt.tpe.suggest, max_evals=trials, rstate=random, show_progressbar=False,
        verbose=False,
    )  # fmt: skip
    return {"seconds": time.perf_counter() - began}


RAY_SPACE = {
    "batch_size": ray.tune.choice(BATCH_SIZES),
    "learning_rate": ray.tune.loguniform(3e-4, 0.1),
    "optimizer": ray.tune.choice(OPTIMIZERS),
    "weight_decay": ray.tune.loguniform(1e-6, 1e-2),
    "depth": ray.tune.randint(1, 4),
    "width": ray.tune.qlograndint(16, 256, 1),
    "dropout": ray.tune.uniform(0.0, 0.5),
}


# A trial for each core; on a GPU they share it.
RAY_RESOURCES = {"cpu": 1, "gpu": torch.cuda.device_count() / (os.cpu_count() or 1)}


def _ray(trials: int, seed: int) -> dict[str, float]:
    """As the quick start has it: a function that trains and reports, one CPU a trial."""
    rows = _rows()

    def objective(chosen: dict[str, Any]) -> None:
        ray.tune.report({"accuracy": train_plainly(chosen, rows)})

    return _fit(ray.tune.with_resources(objective, RAY_RESOURCES), trials, seed)


class _Reused(ray.tune.Trainable):  # type: ignore[misc]
    """An actor that goes from one trial to the next, with its rows already in memory."""

    def setup(self, config: dict[str, Any], rows: Rows | None = None) -> None:
        assert rows is not None
        self.rows = rows
        self.reset_config(config)

    def step(self) -> dict[str, Any]:
        return {"accuracy": next(self.epochs), "done": self.iteration + 1 == EPOCHS}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.epochs = epochs_of(new_config, self.rows, loaders=False)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nobody goes on from one."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""


def _ray_best(trials: int, seed: int, **options: Any) -> dict[str, float]:
    trainable = ray.tune.with_resources(ray.tune.with_parameters(_Reused, rows=_rows()), RAY_RESOURCES)
    return _fit(trainable, trials, seed, reuse_actors=True, **options)


def _fit(trainable: Any, trials: int, seed: int, **options: Any) -> dict[str, float]:
    """As many trials at once as there are cores; Ray itself is started before the clock is."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        ray.init(
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": _ray_paths()},
        )
        try:
            tuner = ray.tune.Tuner(
                trainable,
                param_space=RAY_SPACE,
                tune_config=ray.tune.TuneConfig(
                    metric="accuracy", mode="max", num_samples=trials, search_alg=OptunaSearch(seed=seed), **options
                ),
                run_config=ray.tune.RunConfig(storage_path=folder, verbose=0),
            )
            began = time.perf_counter()
            results = tuner.fit()
            seconds = time.perf_counter() - began
        finally:
            ray.shutdown()
    assert results.num_terminated == trials, results.errors
    return {"seconds": seconds}


def _ray_paths() -> dict[str, str]:
    """Where Ray's own processes find the functions that they are sent."""
    return {"PYTHONPATH": str(Path(__file__).parents[2])}
