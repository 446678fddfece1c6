"""How good the models are that a night with defaults finds: 60 trials, then the confirmed challenger on the test rows,
beside what a practitioner would try first in scikit-learn on the same training and test rows.
"""

import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR
from torch import nn

from models.evaluation.evaluate import evaluate
from models.evaluation.metrics import METRICS
from models.training.loop import train
from models.training.terms import Training
from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.data.snapshots import Snapshot
from tasks.job import TuningJob, parse_job
from tasks.promotion.confirm import confirm
from tasks.search.tune import tune
from tasks.study.memory import recall
from tasks.study.studies import open_study
from tasks.trainer.local import LocalTrainer
from tests.benchmarks.datasets import DATASETS

# By name: data.source, model, search.objective. Everything else is a job's default.
NIGHTS = {
    "mnist-10k cnn": (f"{DATASETS}:mnist", "cnn", "accuracy"),
    "adult mlp": (f"{DATASETS}:adult", "mlp", "accuracy"),
    "digits cnn": ("sklearn://digits", "cnn", "accuracy"),
    "digits mlp": ("sklearn://digits", "mlp", "accuracy"),
    "wine quality mlp": (f"{DATASETS}:wine_quality", "mlp", "rmse"),
}
PEERS = {
    "classification": {
        "logistic regression": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "SVC": lambda: make_pipeline(StandardScaler(), SVC(random_state=0)),
        "histogram gradient boosting": lambda: HistGradientBoostingClassifier(random_state=0),
    },
    "regression": {
        "ridge regression": lambda: make_pipeline(StandardScaler(), Ridge()),
        "SVR": lambda: make_pipeline(StandardScaler(), SVR()),
        "histogram gradient boosting": lambda: HistGradientBoostingRegressor(random_state=0),
    },
}


def night(name: str) -> dict[str, Any]:
    """One night's record."""
    source, model, objective = NIGHTS[name]
    content = {"name": "bench", "data": {"source": source}, "model": model, "search": {"objective": objective}}
    job = parse_job(content, DATASETS.with_name("bench.yaml"))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        snapshot = prepare(job.data, job.objective.problem, home / "snapshots")
        began = time.process_time()
        ours = _tuned(job, snapshot, home)
        seconds = round(time.process_time() - began)
        peers = {peer: _peer_test(peer, snapshot, job) for peer in PEERS[job.objective.problem]}
    return {"measured": "night", "night": name, "objective": objective, **ours, "seconds": seconds, "peers": peers}


def _tuned(job: TuningJob, snapshot: Snapshot, home: Path) -> dict[str, Any]:
    prepared = Prepared.load(snapshot, torch.device("cpu"))
    study = open_study(job, snapshot.fingerprint, home / "studies", datetime.now(UTC))
    recall(study, job, snapshot, None, home / "studies")
    tuned = tune(study, job, LocalTrainer(job, prepared), home / "checkpoints")
    challenger = confirm(study, job, prepared).challenger
    features, target = snapshot.load(torch.device("cpu"))["test"]
    test = evaluate(nn.Sequential(challenger.preprocessing, challenger.model), features, target)
    textbook_training = Training(hyperparameters=job.family.hyperparameters(), seed=job.seed)
    trained = train(prepared.setting(job.family, job.search.objective), textbook_training)
    textbook = evaluate(nn.Sequential(prepared.preprocessing, trained.model), features, target)
    return {
        "test": test[job.search.objective],
        "validation": challenger.validation[job.search.objective],
        "textbook_test": textbook[job.search.objective],
        "complete": tuned.complete,
        "pruned": tuned.pruned,
        "failed": tuned.failed,
    }


def _peer_test(peer: str, snapshot: Snapshot, job: TuningJob) -> float:
    """The peer's metric on the test rows, trained on the training rows alone, with scikit-learn's defaults."""
    splits = snapshot.load(torch.device("cpu"))

    def arrays(split: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        features, target = splits[split]  # type: ignore[index]
        return features.flatten(1).numpy(), target.numpy()

    fitted = PEERS[job.objective.problem][peer]().fit(*arrays("train"))
    features, target = arrays("test")
    predicted = fitted.predict(features)
    if job.objective.problem == "classification":
        return float(np.mean(predicted == target))
    return METRICS[job.search.objective].compute(predicted, target)
