"""What the suite `throughput` measures of the engine alone: how much of the machine a training step uses, whether a
trial costs more the more there were before it, and a CNN whose convolutions are too long for fusing to pay."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, create_trial
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from infra.device import choose_device
from models.families.networks import build_model
from models.hyperparameters.declared import MLPHyperparameters
from models.rows.batches import Split
from models.train import train_all
from models.training.terms import Training, new_model
from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.job import TuningJob, parse_job
from tasks.search.tune import tune
from tasks.search.worker import trainer_of
from tasks.study.samplers import NUMBER
from tasks.study.studies import WAVE, open_study
from tasks.trainer.local import LocalTrainer
from tests.benchmarks.datasets import shared
from tests.benchmarks.search import Record

LATE_TRIALS = 100
CNN_TRIALS = 32
STEP_WIDTHS = (32, 128, 512)
STEP_MEMBERS = (1, 8)
_BATCH, _EPOCHS = 64, 5
_CNN_EPOCHS, _CNN_CHANNELS, _CNN_OPTIMIZERS, _CNN_BATCH_SIZES = 2, (8, 16), ("momentum", "adam"), (32, 64, 128)
_CNN_SPACE = {
    "epochs": _CNN_EPOCHS,
    "batch_size": list(_CNN_BATCH_SIZES),
    "learning_rate": {"low": 1e-3, "high": 3e-2, "log": True},
    "schedule": "constant",
    "optimizer": list(_CNN_OPTIMIZERS),
    "weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
    "depth": 2,
    "channels": list(_CNN_CHANNELS),
    "batch_norm": False,
    "dropout": {"low": 0.0, "high": 0.5},
}


def late_trials(content: dict[str, Any], before: int) -> Record:
    """Seconds a trial of the bare engine after so many finished ones: the first hundred's results, again and again.
    All have one structure, so that every hundred is as much arithmetic."""
    space = content["search"]["space"] | {"batch_size": 64, "depth": 2, "width": 64}
    content = content | {"search": content["search"] | {"space": space}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = _with_trials(content, LATE_TRIALS)
        prepared = prepared_by(first, folder)
        study = open_study(first, prepared.snapshot.fingerprint, folder / "first", datetime.now(UTC))
        tune(study, first, LocalTrainer(first, prepared), folder / "checkpoints")
        later = _with_trials(content, before + LATE_TRIALS)
        grown = open_study(later, prepared.snapshot.fingerprint, folder / "later", datetime.now(UTC))
        known = study.get_trials()
        grown.add_trials([_as_if_number(known[number % len(known)], number) for number in range(before)])
        began = time.perf_counter()
        tune(grown, later, LocalTrainer(later, prepared), folder / "checkpoints")
        seconds = time.perf_counter() - began
    return {"measured": "late", "before": before, "seconds": seconds / LATE_TRIALS}


def cnn(way: str, seed: int) -> Record:
    """Seconds for CNNs of MNIST's 10,000: the bare engine's, or a plain Optuna loop's with a DataLoader."""
    content = {
        "name": "bench",
        "seed": seed,
        "data": {
            "source": str(shared("mnist/t10k-images-idx3-ubyte.gz")),
            "labels": str(shared("mnist/t10k-labels-idx1-ubyte.gz")),
        },
        "model": "cnn",
        "search": {"sampler": "tpe", "pruner": "none", "space": _CNN_SPACE, "baseline": False, "memory": False},
        "budget": {"trials": CNN_TRIALS, "minutes": 600},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = parse_job(content, Path("bench.yaml"))
        prepared = prepared_by(job, folder)
        study = open_study(job, prepared.snapshot.fingerprint, folder, datetime.now(UTC))
        began = time.perf_counter()
        if way == "bare":
            with trainer_of(job, prepared.snapshot, choose_device()) as trainer:
                tune(study, job, trainer, folder / "checkpoints")
        else:
            _plain_cnns(prepared, seed)
        seconds = time.perf_counter() - began
    return {"measured": "cnn", "way": way, "seed": seed, "trials": CNN_TRIALS, "seconds": seconds}


def step(width: int, members: int) -> Record:
    """Of one training step of digits MLPs (two hidden layers, Adam): the floating-point operations that PyTorch counts
    in a second, beside those that the same matrix products reach with nothing around them."""
    content = {"name": "bench", "data": {"source": "sklearn://digits"}, "model": "mlp"}
    with tempfile.TemporaryDirectory() as name:
        job = parse_job(content, Path("bench.yaml"))
        prepared = prepared_by(job, Path(name))
    setting = prepared.setting(job.family, "accuracy")
    chosen = MLPHyperparameters.from_values(
        {"epochs": _EPOCHS, "batch_size": _BATCH, "depth": 2, "width": width, "optimizer": "adam", "dropout": 0.1}
    )
    trainings = [Training(hyperparameters=chosen, seed=seed) for seed in range(members)]
    model = new_model(setting, trainings[0]).to(setting.device)
    with FlopCounterMode(display=False) as counter:
        outputs = model(prepared.training.features[:_BATCH])
        nn.functional.cross_entropy(outputs, prepared.training.target[:_BATCH]).backward()  # type: ignore[no-untyped-call]
    with FlopCounterMode(display=False) as evaluation, torch.no_grad():
        build_model(job.family, chosen, setting.shape).to(setting.device).eval()(prepared.validation.features)
    steps = len(prepared.training) // _BATCH
    operations = members * _EPOCHS * (steps * counter.get_total_flops() + evaluation.get_total_flops())
    seconds = min(_seconds(lambda: list(train_all(setting, trainings))) for _ in range(5))
    sizes = [prepared.shape.features[0], width, width, 10]
    return {
        "measured": "step", "width": width, "members": members, "rate": operations / seconds / 1e9,
        "peak": _peak(sizes, members) / 1e9,
    }  # fmt: skip


def prepared_by(job: TuningJob, folder: Path) -> Prepared:
    return Prepared.load(prepare(job.data, job.objective.problem, folder / "snapshots"), choose_device())


def on_host(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and target where a tutorial has them: what trains on a GPU brings each batch there."""
    return split.all_features.cpu(), split.target.cpu()


def on_device(batches: Iterable[Sequence[torch.Tensor]]) -> Iterator[tuple[torch.Tensor, ...]]:
    device = choose_device()
    return (tuple(tensor.to(device) for tensor in batch) for batch in batches)


def _with_trials(content: dict[str, Any], trials: int) -> TuningJob:
    return parse_job(content | {"budget": {"trials": trials, "minutes": 600}}, Path("bench.yaml"))


def _as_if_number(trial: FrozenTrial, number: int) -> FrozenTrial:
    attributes = trial.user_attrs | {NUMBER: number, WAVE: [number, 1]}
    return create_trial(
        values=trial.values, params=trial.params, distributions=trial.distributions, user_attrs=attributes
    )


def _peak(sizes: list[int], members: int) -> float:
    """Operations a second of the products of one step: each layer's outputs, and its two gradients."""
    products = []
    device = choose_device()
    for inputs, outputs in itertools.pairwise(sizes):
        rows, weights = (torch.rand(members, *shape, device=device) for shape in ((_BATCH, inputs), (inputs, outputs)))
        gradients = torch.rand(members, _BATCH, outputs, device=device)
        products += [(rows, weights), (gradients, weights.mT), (rows.mT, gradients)]
    operations = sum(2 * members * left.shape[1] * left.shape[2] * right.shape[2] for left, right in products)

    def often() -> None:
        for _ in range(200):
            for left, right in products:
                torch.bmm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return 200 * operations / min(_seconds(often) for _ in range(5))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _plain_cnns(prepared: Prepared, seed: int) -> None:
    """The loop of a tutorial, for as many trials of the same space."""
    torch.manual_seed(seed)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    device = choose_device()
    rows, unseen_rows = on_host(prepared.training), on_host(prepared.validation)
    unseen = DataLoader(TensorDataset(*unseen_rows), batch_size=256)

    def objective(trial: optuna.Trial) -> float:
        channels = trial.suggest_categorical("channels", _CNN_CHANNELS)
        model = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(trial.suggest_float("dropout", 0.0, 0.5)),
            nn.Linear(2 * channels, 10),
        ).to(device)  # fmt: skip
        rate = trial.suggest_float("learning_rate", 1e-3, 3e-2, log=True)
        decay = trial.suggest_float("weight_decay", 1e-6, 1e-2, log=True)
        optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(model.parameters(), rate, weight_decay=decay)
            if trial.suggest_categorical("optimizer", _CNN_OPTIMIZERS) == "adam"
            else torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay)
        )
        batch_size = trial.suggest_categorical("batch_size", _CNN_BATCH_SIZES)
        batches = DataLoader(TensorDataset(*rows), batch_size=batch_size, shuffle=True)
        right = 0
        for _ in range(_CNN_EPOCHS):
            model.train()
            for features, target in on_device(batches):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(features), target).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            model.eval()
            with torch.no_grad():
                right = sum(int((model(features).argmax(1) == target).sum()) for features, target in on_device(unseen))
        return right / len(unseen_rows[1])

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=CNN_TRIALS)
