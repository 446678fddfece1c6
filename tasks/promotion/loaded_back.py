"""loaded_back: whether a version, loaded as its user will load it, gives what was judged.

PyTorch saves what it knows of, parameters and buffers. A model that keeps anything else trains well, is judged well and
is another one where it is loaded, without a word. So each version is loaded from the store in a fresh process and
compared before it can become the champion. Knows nothing of how a version is published.
"""

import logging
import math
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from infra.errors import ExpectedError
from infra.store.protocol import Store
from models.evaluation.evaluate import predictions_of
from models.hyperparameters.declared import Hyperparameters
from models.training.terms import Training
from models.training.weights import read_tensors
from tasks.data.snapshots import Snapshot
from tasks.job import TuningJob
from tasks.promotion.servable import PROGRAM, SERVABLE, mlflow_predictions, read_as_table, run_onnx
from tasks.promotion.verdict import GuardRail, Verdict
from tasks.registry.versions import (
    MANIFEST,
    PREPROCESSING,
    WEIGHTS,
    Lineage,
    Manifest,
    TableColumn,
    describe_file,
    pull_version,
    version_folder,
)
from tasks.study.memory import baseline_hyperparameters
from tasks.study.studies import derived_seed
from tasks.trainer.fresh import FreshProcess, Loaded, NotLoaded
from tasks.trainer.local import OUTPUTS, LocalTrainer
from tasks.trainer.processes import TrainerProcesses

# What rounding may change: a share of the outputs' spread, and so many of the last digit of the largest. A GPU
# multiplies in convolutions with 10 bits (TF32), and what it made is loaded on a CPU.
ROUNDING: dict[str, tuple[float, float]] = {"cpu": (1e-3, 16), "cuda": (2e-2, 8192)}
STATE = (
    "the likely cause is state outside its state_dict: a plain attribute, layers or tensors in a list or dict, a "
    "buffer with persistent=False, or a global that training changes; register all that it learns as parameters, "
    "submodules or buffers"
)
CHANCE = (
    "it answers the same rows otherwise each time, so something draws at random in evaluation, as dropout that is "
    "always on does, or changes the model; do both only while self.training"
)
BATCH = (
    "a row alone gets other outputs than in a batch, so its forward depends on the batch; let it treat each row by "
    "itself in evaluation"
)
CHANGED = "the file of its model was changed in the meantime; put the earlier code back"
EXPORT = (
    "the likely cause is an operation of its forward that draws at random, or that ONNX computes otherwise; write it "
    "otherwise, or raise in forward while torch.compiler.is_exporting() to have no ONNX program"
)

_logger = logging.getLogger(__name__)


class Differs(Exception):
    """Outputs are not those that were judged; the message says by how much, and the likely cause."""


class WouldNotShip(ExpectedError):
    """A model that was saved and loaded is another one, found out before the search."""


def rehearse(job: TuningJob, snapshot: Snapshot, trainer: TrainerProcesses | LocalTrainer, fresh: FreshProcess) -> None:
    """Train the baseline's configuration for one step, save it as a version, load that in a fresh process and compare,
    so that no budget is spent on a model that cannot be published. Raises WouldNotShip.

    What cannot be trained is left to the trials, which say why.
    """
    with tempfile.TemporaryDirectory(prefix="nightly-rehearsal-") as name:
        folder = Path(name) / "trained"
        folder.mkdir()
        try:
            hyperparameters = baseline_hyperparameters(job)
            seed = derived_seed(job.seed, "rehearsal", 0)
            unsaved = trainer.rehearse(Training(hyperparameters=hyperparameters, seed=seed), folder)
        except Exception as error:  # noqa: BLE001 a user's code raises anything, and its trials will tell it
            _logger.info("no model could be trained ahead of the search: %s", error)
            return
        if unsaved is not None:
            raise _would_not_ship(job, unsaved)
        judged = read_tensors((folder / OUTPUTS).read_bytes())["outputs"]
        manifest = _manifest(job, snapshot, hyperparameters, folder)
        kept = version_folder(Path(name), job.name, manifest.version)
        kept.mkdir(parents=True)
        for file in manifest.files:
            (folder / file).rename(kept / file)
        (kept / MANIFEST).write_bytes(manifest.to_bytes())
        try:
            loaded = fresh.load(Path(name).as_uri(), job.name, manifest.version, snapshot, "validation", len(judged))
            compare(judged, loaded, trainer.device.type)
        except (NotLoaded, Differs) as error:
            raise _would_not_ship(job, f"loaded in a fresh process, {error}") from error


def _would_not_ship(job: TuningJob, why: str) -> WouldNotShip:
    return WouldNotShip(
        f"model {job.model} cannot be published as it is trained, so the night stops before its search: after one step "
        f"of training, {why}"
    )


def _manifest(job: TuningJob, snapshot: Snapshot, hyperparameters: Hyperparameters, folder: Path) -> Manifest:
    """As far as loading needs one."""
    return Manifest(
        job=job.name,
        model=job.model,
        hyperparameters=hyperparameters.model_dump(mode="json"),
        features=snapshot.shape.features,
        problem=snapshot.shape.problem,
        classes=snapshot.classes,
        columns=tuple(TableColumn(**asdict(column)) for column in snapshot.columns),
        metrics={},
        lineage=Lineage(
            snapshot=snapshot.fingerprint,
            source=snapshot.source,
            study="",
            trial=0,
            seed=0,
            device="",
            mlflow_run_id="",
            prefect_flow_run_id=None,
            git_commit=None,
            model_code=job.family.code,
            python="",
            packages={},
        ),
        files={name: describe_file(folder / name) for name in (WEIGHTS, PREPROCESSING)},
    )


def load_back(
    store: Store, job: str, version: str, verdict: Verdict, snapshot: Snapshot, fresh: FreshProcess
) -> GuardRail:
    """Load a published version in a fresh process, its ONNX program and MLflow's model, and compare the outputs with
    those that were judged, of 4,096 test rows at most and of single ones.

    It is loaded from a copy, verified, because a user's code must not see the store's credentials. Raises StoreError.
    """
    judged = verdict.outputs
    device = next(verdict.challenger.model.parameters()).device.type
    with tempfile.TemporaryDirectory(prefix="nightly-loaded-back-") as name:
        folder = version_folder(Path(name), job, version)
        manifest = pull_version(store, job, version, folder)
        try:
            loaded = fresh.load(Path(name).as_uri(), job, version, snapshot, "test")
            deviations = [compare(judged, loaded, device)]
            if (folder / SERVABLE).is_dir():
                deviations.append(compare_served(folder, manifest, judged, snapshot, device))
        except (NotLoaded, Differs) as error:
            return GuardRail(name="loaded back", holds=False, evidence=f"loaded in a fresh process, {error}")
    return GuardRail(
        name="loaded back",
        holds=True,
        evidence=f"{len(judged)} test rows get the judged outputs, within {max(deviations):.1g}",
    )


def compare(judged: Tensor, loaded: Loaded, device: str) -> float:
    """How far the outputs that a version gives when it is loaded lie from those that were judged on such a device.
    Raises Differs where that is more than rounding, in the batch, once more, or for a row alone."""
    allowed = rounding(judged, device)
    by_chance = _deviation(loaded.outputs[: len(loaded.again)], loaded.again)
    by_batch = _deviation(loaded.outputs[: len(loaded.alone)], loaded.alone)
    alone = _deviation(judged[: len(loaded.alone)], loaded.alone)
    largest = max(_deviation(judged, loaded.outputs), alone, by_chance)
    if largest <= allowed:
        return largest
    if by_chance > allowed:
        cause = CHANCE
    elif by_batch > allowed:
        cause = BATCH
    else:
        cause = CHANGED if loaded.code_changed else STATE
    raise Differs(f"the model gives other outputs than were judged, {_in_words(largest, allowed, judged)}; {cause}")


def compare_served(folder: Path, manifest: Manifest, judged: Tensor, snapshot: Snapshot, device: str) -> float:
    """The same of a version's ONNX program, and of MLflow's model, which reads a table and not its matrix."""
    rows = torch.from_numpy(snapshot.first("test", len(judged)))
    allowed = rounding(judged, device)
    try:
        outputs, alone = run_onnx(folder / PROGRAM, rows), run_onnx(folder / PROGRAM, rows[:1])
    except Exception as error:
        raise Differs(f"the ONNX program cannot be run on the test rows ({error}); {EXPORT}") from error
    if not (largest := max(_deviation(judged, outputs), _deviation(judged[:1], alone))) <= allowed:
        raise Differs(
            f"the ONNX program gives other outputs than were judged, {_in_words(largest, allowed, judged)}; {EXPORT}"
        )
    if snapshot.columns:
        outputs = run_onnx(folder / PROGRAM, read_as_table(rows, snapshot.columns))
    expected = torch.from_numpy(predictions_of(outputs))
    predicted = torch.from_numpy(mlflow_predictions(folder, rows, manifest.classes, snapshot.columns))
    allowed = rounding(expected, "cpu")
    if not (deviation := _deviation(expected, predicted)) <= allowed:
        raise Differs(
            f"MLflow's model predicts otherwise than its ONNX program, {_in_words(deviation, allowed, expected)}; "
            "report it, with the model's code, as a fault of Nightly Tuner"
        )
    return largest


def rounding(judged: Tensor, device: str) -> float:
    """How far apart two outputs may be by rounding alone, where these were judged on a kind of device."""
    of_spread, last_digits = ROUNDING[device]
    values = judged.double()
    digit = torch.finfo(judged.dtype).eps * values.abs().max()
    return float(of_spread * values.std(correction=0) + last_digits * digit)


def _deviation(expected: Tensor, found: Tensor) -> float:
    """The largest; infinite where only one of two is finite, or there are others than expected."""
    if expected.shape != found.shape:
        return math.inf
    expected, found = expected.double(), found.double()
    is_same = (expected == found) | (expected.isnan() & found.isnan())
    return float(torch.where(is_same, 0.0, (expected - found).abs()).nan_to_num(nan=math.inf, posinf=math.inf).max())


def _in_words(largest: float, allowed: float, judged: Tensor) -> str:
    return f"by up to {largest:.3g} on {len(judged)} rows, where rounding explains {allowed:.2g}"
