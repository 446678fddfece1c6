"""report: what happened, in words and numbers, where people already look: Prefect, MLflow and the terminal.

Reads what the steps returned and decides nothing.
"""

import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from numpy.typing import NDArray
from prefect.artifacts import create_markdown_artifact
from torch import nn

from infra.deployments import artifact_key
from infra.settings import Settings
from models.evaluation.evaluate import predict_outputs, predictions_of
from tasks.data.drift import Change, drift_table
from tasks.data.findings import escaped
from tasks.data.snapshots import Snapshot
from tasks.job import TuningJob
from tasks.promotion.confirm import Confirmed
from tasks.promotion.verdict import Verdict
from tasks.registry.log import Promotion
from tasks.report import plots
from tasks.report.details import changes_since, details
from tasks.report.explore import explore
from tasks.report.page import Cost, costs_of, night_page
from tasks.report.summary import summary
from tasks.search.tune import Tuned
from tasks.study.studies import ENDED, FLOW_RUN, MLFLOW_EXPERIMENT, MLFLOW_RUN, earlier_studies, number_of
from tasks.tracking.unavailable import mlflow_may_be_unavailable

PAGE = "report.html"
MOST_NIGHTS = 60
CAPTIONS = {
    "history": "Every complete trial in the order of the night, and the best so far",
    "importance": "How much of the objective's variation each hyperparameter explains (fANOVA)",
    "slices": "The objective over the hyperparameters that explain the most",
    "contour": "The objective over the two numbers that explain the most: the darker, the better",
    "parallel": "Each complete trial as a line through its hyperparameters, the best tenth in colour",
    "curves": "How the best trials learned",
    "intermediate": "Every trial's curve, and where the pruner cut",
    "confusion": "Test rows of each class by the class that the challenger takes them for",
    "reliability": "How often the challenger is right where it is so sure, on the test rows",
    "residuals": "What the challenger predicts for the test rows, and what is",
    "nights": "The best validation value of each night",
}


def report(
    job: TuningJob,
    study: optuna.Study,
    snapshot: Snapshot,
    moved: tuple[Change, ...],
    tuned: Tuned,
    confirmed: Confirmed,
    verdict: Verdict,
    promotion: Promotion | None,
    settings: Settings,
    client: MlflowClient,
    now: datetime,
) -> str:
    """Write the night's summary and plots to its MLflow run and as a Prefect artifact, mark the study ended; returns
    Markdown."""
    studies = list(reversed(list(earlier_studies(job.name, settings.studies))))[-MOST_NIGHTS:]
    run_id, experiment_id = study.user_attrs[MLFLOW_RUN], study.user_attrs[MLFLOW_EXPERIMENT]
    links = {
        "The night in Prefect": settings.night_page(study.user_attrs[FLOW_RUN]),
        "The trials in MLflow": settings.mlflow_page(experiment_id, run_id),
        "The report with plots": settings.mlflow_page(experiment_id, run_id, PAGE),
    }
    before = studies[-2] if len(studies) > 1 else None
    changed = "" if before is None else changes_since(job, study, before, snapshot, settings.home / "snapshots")
    text = summary(job, study, tuned, confirmed, verdict, promotion, links)
    text += details(job, study, snapshot, moved, tuned, verdict, changed)
    tags = {
        MLFLOW_RUN_NOTE: text,
        "verdict": verdict.decision,
        "promoted": promotion.version if promotion else "no",
        "best_trial": str(number_of(tuned.best)),
    }
    metrics = {f"val_{name}": value for name, value in verdict.challenger.validation.items()}
    metrics |= {f"test_{name}": value for name, value in verdict.challenger_test.items()}
    metrics |= {f"{verdict.opponent}_test_{name}": value for name, value in (verdict.opponent_test or {}).items()}
    metrics |= {"winners_curse": verdict.challenger.winners_curse, "confirmed_spread": verdict.challenger.spread}
    costs = costs_of(job, study, tuned, confirmed)
    metrics |= {f"device_hours_{cost.outcome}": cost.hours for cost in costs}
    if moved:
        metrics["drift_stability_index"] = moved[0].stability_index
    if verdict.comparison is not None:
        metrics |= {f"gain_{name}": getattr(verdict.comparison, name) for name in ("low", "high")}
        metrics["gain"] = verdict.comparison.gain
    with mlflow_may_be_unavailable("the night's report"):
        client.log_batch(
            run_id,
            metrics=[Metric(name, value, int(now.timestamp() * 1000), 0) for name, value in metrics.items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )
        client.log_dict(run_id, verdict.evidence(), "gate.json")
        if moved:
            client.log_text(run_id, drift_table(moved), "drift.md")
        _log_page(client, run_id, job, study, snapshot, moved, verdict, costs, text, studies)
    create_markdown_artifact(
        text, key=artifact_key("report", job.name), description=f"{study.study_name}: {verdict.decision}"
    )
    study.set_user_attr(ENDED, now.isoformat())
    return text


def _log_page(
    client: MlflowClient,
    run_id: str,
    job: TuningJob,
    study: optuna.Study,
    snapshot: Snapshot,
    moved: tuple[Change, ...],
    verdict: Verdict,
    costs: Sequence[Cost],
    summary: str,
    studies: Sequence[optuna.Study],
) -> None:
    """The plots as pictures and to be explored, and the page with all of them."""
    importance = plots.importance(study, job)
    nights = [one for one in studies if one.directions == study.directions]
    predictions, target = _predicted(snapshot, verdict)
    figures = {
        "history": plots.history(study, job),
        "importance": plots.importances(importance),
        "slices": plots.slices(study, job, importance),
        "contour": plots.contour(study, job, importance),
        "parallel": plots.parallel(study, job, importance),
        "curves": plots.curves(study, job),
        "intermediate": plots.intermediate(study, job),
        **_test_figures(snapshot, predictions, target),
        "nights": plots.nights(nights, job),
    }
    drawn = {name: plots.as_svg(figure) for name, figure in figures.items() if figure is not None}
    with tempfile.TemporaryDirectory(prefix="nightly-plots-") as folder:
        for name, svg in drawn.items():
            (Path(folder) / f"{name}.svg").write_bytes(svg)
        client.log_artifacts(run_id, folder, "plots")
    captions = {CAPTIONS[name]: svg for name, svg in drawn.items()}
    page = night_page(job, study, summary, verdict, moved, importance, captions, costs)
    client.log_text(run_id, page, PAGE)
    to_explore = explore(study, job, importance, nights, predictions, target, snapshot.classes)
    client.log_text(run_id, to_explore, "plots/explore.html")


def _predicted(snapshot: Snapshot, verdict: Verdict) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """What the challenger makes of the test rows, and what they are."""
    challenger = verdict.challenger
    device = next(challenger.model.parameters()).device
    served = nn.Sequential(challenger.preprocessing, challenger.model)
    predictions = predictions_of(predict_outputs(served, snapshot.features("test", device)))
    return predictions, snapshot.target("test", torch.device("cpu")).numpy()


def _test_figures(
    snapshot: Snapshot, predictions: NDArray[np.float64], target: NDArray[Any]
) -> dict[str, Figure | None]:
    if not snapshot.classes:
        return {"residuals": plots.residuals(predictions, target)}
    return {
        "confusion": plots.confusion(predictions, target, snapshot.classes),
        "reliability": plots.reliability(predictions, target),
    }


def report_skipped(job: TuningJob, reason: str) -> str:
    """Say in Prefect why a night did nothing; returns the reason."""
    create_markdown_artifact(
        f"# {job.name}: skipped\n\n{escaped(reason[0].upper() + reason[1:])}.\n",
        key=artifact_key("report", job.name),
        description="skipped",
    )
    return reason
