"""promote: publish the challenger to the artifact store and make it champion, then let MLflow's registry follow.

The store is the truth. A kill at any point leaves either the old champion or the new one: the version is complete
before the promotion log names it. Knows nothing of why the gate let it pass.
"""

import logging
import platform
from datetime import datetime
from importlib.metadata import version as package_version
from pathlib import Path

import optuna
from mlflow import MlflowClient
from mlflow.utils.git_utils import get_git_commit
from safetensors.torch import save

from infra.device import describe_device
from infra.store import Store
from tasks.confirm import Challenger
from tasks.gate import Verdict
from tasks.job import TuningJob
from tasks.prepare import Snapshot
from tasks.study import FLOW_RUN, MLFLOW_RUN, number_of
from tasks.tracking import mlflow_may_be_away, point_champion_alias
from tasks.versions import (
    MANIFEST,
    PREPROCESSING,
    WEIGHTS,
    Lineage,
    Manifest,
    Promotion,
    append_promotion,
    describe_file,
    publish_version,
)

RECORDED_PACKAGES = ("nightly-tuner", "numpy", "optuna", "safetensors", "scikit-learn", "torch")

_logger = logging.getLogger(__name__)


def promote(
    job: TuningJob,
    study: optuna.Study,
    snapshot: Snapshot,
    challenger: Challenger,
    verdict: Verdict,
    store: Store,
    client: MlflowClient,
    now: datetime,
) -> Promotion | None:
    """Promote where the verdict and the job say so; None where the champion stays.

    Raises StaleJudgement where the champion changed since the gate, StoreError where the store fails; StoreUnavailable
    among those may be tried again, which finds what was done already.
    """
    if verdict.decision != "PROMOTE" or job.promotion.mode == "never":
        return None
    files = {
        WEIGHTS: save({name: tensor.cpu().contiguous() for name, tensor in challenger.model.state_dict().items()}),
        PREPROCESSING: save({name: tensor.cpu() for name, tensor in challenger.preprocessing.state_dict().items()}),
    }
    manifest = _manifest(job, study, snapshot, challenger, verdict, files)
    version = publish_version(store, manifest, files)
    run_id = manifest.lineage.mlflow_run_id
    promotion = append_promotion(
        store, job.name, version=version, judged=verdict.judged, run=run_id, reason=verdict.reason, now=now
    )
    _logger.info("version %s is champion of %s (promotion %d)", version, job.name, promotion.number)
    with mlflow_may_be_away("the champion's alias"):
        client.log_text(run_id, manifest.to_bytes().decode(), f"champion/{MANIFEST}")
        point_champion_alias(client, job.name, promotion)
    return promotion


def _manifest(
    job: TuningJob,
    study: optuna.Study,
    snapshot: Snapshot,
    challenger: Challenger,
    verdict: Verdict,
    files: dict[str, bytes],
) -> Manifest:
    return Manifest(
        job=job.name,
        model=job.model,
        hyperparameters=challenger.hyperparameters.model_dump(),
        features=snapshot.shape.features,
        problem=snapshot.shape.problem,
        classes=snapshot.classes,
        metrics={"validation": dict(challenger.validation), "test": dict(verdict.challenger_test)},
        lineage=Lineage(
            snapshot=snapshot.fingerprint,
            source=snapshot.source,
            study=study.study_name,
            trial=number_of(challenger.trial),
            seed=challenger.seed,
            device=describe_device(next(challenger.model.parameters()).device),
            mlflow_run_id=study.user_attrs[MLFLOW_RUN],
            prefect_flow_run_id=study.user_attrs[FLOW_RUN],
            git_commit=get_git_commit(str(Path(__file__).parent)),
            model_code=job.family.code,
            python=platform.python_version(),
            packages={name: package_version(name) for name in RECORDED_PACKAGES},
        ),
        files={name: describe_file(content) for name, content in files.items()},
    )
