"""promote: publish the winner to the artifact store and make it champion, then let MLflow's registry follow.

The store is the truth. A kill at any point leaves either the old champion or the new one: the version is complete
before the promotion log names it. Knows nothing of why the gate let it pass.
"""

import logging
import platform
import tempfile
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version as package_version
from pathlib import Path

import optuna
import torch
from mlflow import MlflowClient
from mlflow.utils.git_utils import get_git_commit
from torch import nn

from infra.device import describe_device
from infra.store.protocol import Store
from models.training.weights import write_tensors
from tasks.data.snapshots import Snapshot
from tasks.job import TuningJob
from tasks.promotion.loaded_back import load_back
from tasks.promotion.model_card import model_card
from tasks.promotion.servable import SERVABLE, write_servable
from tasks.promotion.verdict import Verdict, with_rail
from tasks.registry.log import Promotion, append_promotion
from tasks.registry.versions import (
    MANIFEST,
    PREPROCESSING,
    WEIGHTS,
    Lineage,
    Manifest,
    TableColumn,
    describe_file,
    publish_version,
)
from tasks.study.studies import FLOW_RUN, MLFLOW_RUN, number_of
from tasks.tracking.aliases import drop_challenger, point_challenger, point_champion
from tasks.tracking.ownership import CHALLENGER_ALIAS, CHAMPION_ALIAS
from tasks.tracking.unavailable import mlflow_may_be_unavailable
from tasks.trainer.fresh import FreshProcess

RECORDED_PACKAGES = ("nightly-tuner", "numpy", "optuna", "safetensors", "scikit-learn", "torch")
MODEL_CARD = "README.md"
EXAMPLE_ROWS = 2

_logger = logging.getLogger(__name__)


def promote(
    job: TuningJob,
    study: optuna.Study,
    snapshot: Snapshot,
    verdict: Verdict,
    store: Store,
    client: MlflowClient,
    fresh: FreshProcess,
    now: datetime,
) -> tuple[Verdict, Promotion | None]:
    """Promote where the verdict and the job say so, and what was published gives the judged outputs where it is loaded
    (`loaded_back.py`): else the verdict becomes REJECT. Without a promotion the champion stays, and MLflow keeps the
    challenger. Returns what became of the verdict.

    Raises StaleJudgement where the champion changed since the gate, StoreError where the store fails; StoreUnavailable
    among those may be tried again, which finds what was done already.
    """
    with tempfile.TemporaryDirectory(prefix="nightly-version-") as name:
        folder = Path(name)
        manifest = write_version(job, study, snapshot, verdict, folder, now)
        run_id = manifest.lineage.mlflow_run_id
        promotion = None
        if verdict.decision == "PROMOTE" and job.promotion.mode != "never":
            version = publish_version(store, manifest, folder)
            verdict = with_rail(verdict, load_back(store, job.name, version, verdict, snapshot, fresh))
            if verdict.decision == "PROMOTE":
                promotion = append_promotion(
                    store, job.name, version=version, judged=verdict.judged, run=run_id, reason=verdict.reason, now=now
                )
                _logger.info("version %s is champion of %s (promotion %d)", version, job.name, promotion.number)
            else:
                _logger.warning("version %s is not promoted: %s", version, verdict.reason)
                manifest = manifest.model_copy(update={"gate": verdict.evidence()})
        if promotion is None:
            with mlflow_may_be_unavailable("the challenger"):
                _log_model(client, run_id, folder, CHALLENGER_ALIAS, manifest)
                point_challenger(client, job.registered_model, job.name, run_id, verdict.reason)
        else:
            with mlflow_may_be_unavailable("the champion's alias"):
                _log_model(client, run_id, folder, CHAMPION_ALIAS, manifest)
                point_champion(client, job.registered_model, manifest, promotion.version)
                drop_challenger(client, job.registered_model)
    return verdict, promotion


def _log_model(client: MlflowClient, run_id: str, folder: Path, artifact_path: str, manifest: Manifest) -> None:
    client.log_text(run_id, manifest.to_bytes().decode(), f"{artifact_path}/{MANIFEST}")
    if (folder / SERVABLE).is_dir():
        client.log_artifacts(run_id, str(folder / SERVABLE), artifact_path)


def write_version(
    job: TuningJob, study: optuna.Study, snapshot: Snapshot, verdict: Verdict, folder: Path, now: datetime
) -> Manifest:
    """Write all files of the verdict's challenger but the manifest into an empty folder; returns the manifest.

    The same night gives the same files, byte for byte.
    """
    challenger = verdict.challenger
    device = next(challenger.model.parameters()).device
    for name, module in ((WEIGHTS, challenger.model), (PREPROCESSING, challenger.preprocessing)):
        write_tensors(module.state_dict(), folder / name)
    manifest = _manifest(job, study, snapshot, verdict, describe_device(device))
    served = nn.Sequential(challenger.preprocessing, challenger.model).cpu()
    write_servable(
        folder, served, torch.from_numpy(snapshot.first("train", EXAMPLE_ROWS)), snapshot.classes, snapshot.columns, now
    )
    served.to(device)
    (folder / MODEL_CARD).write_text(model_card(manifest, snapshot, job.description), encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return manifest.model_copy(
        update={"files": {path.relative_to(folder).as_posix(): describe_file(path) for path in files}}
    )


def _manifest(job: TuningJob, study: optuna.Study, snapshot: Snapshot, verdict: Verdict, device: str) -> Manifest:
    challenger = verdict.challenger
    return Manifest(
        job=job.name,
        model=job.model,
        members=len(challenger.shipped),
        hyperparameters=challenger.hyperparameters.model_dump(mode="json"),
        features=snapshot.shape.features,
        problem=snapshot.shape.problem,
        classes=snapshot.classes,
        columns=tuple(TableColumn(**asdict(column)) for column in snapshot.columns),
        metrics={"validation": dict(challenger.validation), "test": dict(verdict.challenger_test)},
        intervals=dict(verdict.intervals),
        gate=verdict.evidence(),
        lineage=Lineage(
            snapshot=snapshot.fingerprint,
            source=snapshot.source,
            validation_fraction=job.data.validation_fraction,
            test_fraction=job.data.test_fraction,
            data=job.data.model_dump(mode="json", exclude={"source", "validation_fraction", "test_fraction"}),
            objective=job.search.objective,
            study=study.study_name,
            trial=number_of(challenger.trial),
            seed=challenger.shipped[0],
            seeds=challenger.shipped,
            trained_with=challenger.trained_with,
            device=device,
            mlflow_run_id=study.user_attrs[MLFLOW_RUN],
            prefect_flow_run_id=study.user_attrs[FLOW_RUN],
            git_commit=get_git_commit(str(Path(__file__).parent)),
            model_code=job.family.code,
            python=platform.python_version(),
            packages={name: package_version(name) for name in RECORDED_PACKAGES},
        ),
        files={},
    )
