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
from optuna.trial import FrozenTrial, TrialState
from prefect.artifacts import create_markdown_artifact
from torch import nn

from infra.deployments import artifact_key
from infra.settings import Settings
from models.evaluation.evaluate import predict_outputs, predictions_of
from models.evaluation.metrics import in_figures
from models.hyperparameters.declared import in_words
from tasks.data.drift import Change, drift_table
from tasks.data.findings import escaped
from tasks.data.snapshots import Snapshot, read_snapshot
from tasks.job import TuningJob
from tasks.promotion.confirm import Challenger, Confirmed
from tasks.promotion.verdict import Verdict
from tasks.registry.log import Promotion
from tasks.report import plots
from tasks.report.explore import explore
from tasks.report.page import Cost, costs_of, night_page
from tasks.report.summary import summary
from tasks.search.candidate import trained_seconds
from tasks.search.tune import Tuned
from tasks.study.studies import (
    ENDED,
    FINGERPRINT,
    FLOW_RUN,
    HYPERPARAMETERS,
    IMPORTED_FROM,
    MLFLOW_EXPERIMENT,
    MLFLOW_RUN,
    OBJECTIVE,
    ROLE,
    SEARCH_DIGEST,
    earlier_studies,
    number_of,
    ranked,
    tonights_trials,
)
from tasks.tracking.trials import DEVICE, DIAGNOSIS
from tasks.tracking.unavailable import mlflow_may_be_unavailable

PAGE = "report.html"
MOST_MOVED = 10
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
    changed = "" if before is None else _changed(job, study, before, snapshot, settings.home / "snapshots")
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


def details(
    job: TuningJob,
    study: optuna.Study,
    snapshot: Snapshot,
    moved: tuple[Change, ...],
    tuned: Tuned,
    verdict: Verdict,
    changed: str,
) -> str:
    """All that stands below the summary, in Markdown: the numbers and the best trials. `changed` says what is other
    than in the last night."""
    name = job.search.objective
    rows = snapshot.row_counts
    challenger = verdict.challenger
    theirs = "" if verdict.opponent_test is None else f", {verdict.opponent} {in_figures(verdict.opponent_test[name])}"
    trials = ranked(tonights_trials(study, TrialState.COMPLETE), job)
    best = "\n".join(_trial_row(trial, job) for trial in trials[:5])
    return f"""\

## Details

- **verdict**: {escaped(verdict.reason)}
- **data**: {escaped(snapshot.source)}, snapshot `{snapshot.fingerprint[:12]}`: {rows["train"]} training, {rows["validation"]} validation and {rows["test"]} test rows
{changed}{_drift_in_words(moved)}- **search**: {tuned.complete} trials complete, {tuned.pruned} pruned, {tuned.failed} failed in {trained_seconds(study):.0f} s of training; ended by {tuned.ended_by}
{_mishaps(tuned)}{_remark(challenger, job)}- **baseline**: {_baseline_in_words(job, tuned)}
- **challenger**: trial {number_of(challenger.trial)}, validation {name} {in_figures(challenger.trial.values[0])} in the search, {in_figures(challenger.mean)} ± {in_figures(challenger.spread)} confirmed with {len(challenger.seeds)} seeds ({_curse(challenger)}); generalization gap {in_figures(challenger.generalization_gap)}, sharpness {in_figures(challenger.sharpness)}
- **on the test rows**: challenger {name} {in_figures(verdict.challenger_test[name])}{theirs}{_left_out(verdict)}
{_guard_rails(verdict)}- **trained on**: {challenger.trial.user_attrs[DEVICE]}

| trial | validation {name} |{_cost_head(job)} diagnosis | hyperparameters |
| --- | --- |{" --- |" if _cost_head(job) else ""} --- | --- |
{best}
{_pareto_in_words(study, job)}{_moved_in_a_table(moved)}"""  # noqa: E501 a table's row is one line


def _changed(job: TuningJob, study: optuna.Study, before: optuna.Study, snapshot: Snapshot, snapshots: Path) -> str:
    """A line of the summary: rows, search and best value beside those of the last night."""
    parts = []
    if snapshot.fingerprint == before.user_attrs[FINGERPRINT]:
        parts.append("the same rows")
    elif (known := read_snapshot(snapshots, before.user_attrs[FINGERPRINT])) is not None:
        parts.append(f"{snapshot.rows} rows instead of {known.rows}")
    else:
        parts.append("other rows")
    is_same = study.user_attrs[SEARCH_DIGEST] == before.user_attrs.get(SEARCH_DIGEST)
    parts.append("the same search" if is_same else "another search")
    best, best_before = (
        ranked(tonights_trials(one, TrialState.COMPLETE), job) if one.directions == study.directions else []
        for one in (study, before)
    )
    if best and best_before and before.user_attrs[OBJECTIVE] == study.user_attrs[OBJECTIVE]:
        gain = job.objective.gain(best[0].values[0], best_before[0].values[0])
        how = "as good" if gain == 0 else f"{in_figures(abs(gain))} {'better' if gain > 0 else 'worse'}"
        parts.append(f"the best validation {job.search.objective} is {how}")
    return f"- **since {before.study_name}**: {'; '.join(parts)}\n"


def _drift_in_words(moved: tuple[Change, ...]) -> str:
    if not moved:
        return ""
    large = [change for change in moved if change.is_large]
    farthest = f"the farthest is {escaped(moved[0].column)} with a stability index of {moved[0].stability_index:.2f}"
    return f"- **since the champion's snapshot**: {len(large)} of {len(moved)} columns moved much; {farthest}\n"


def _moved_in_a_table(moved: tuple[Change, ...]) -> str:
    """Only where something moved so far that somebody should look."""
    large = tuple(change for change in moved if change.is_large)
    return f"\n{drift_table(large[:MOST_MOVED]).replace('# What', '## What', 1)}" if large else ""


def _mishaps(tuned: Tuned) -> str:
    return f"- **workers**: {'; '.join(tuned.mishaps)}\n" if tuned.mishaps else ""


def _remark(challenger: Challenger, job: TuningJob) -> str:
    return f"- **{job.family.name}**: {challenger.remark}\n" if challenger.remark else ""


def _guard_rails(verdict: Verdict) -> str:
    return "".join(
        f"- **guard rail {rail.name}**: {'kept' if rail.holds else 'broken'}: {escaped(rail.evidence)}\n"
        for rail in verdict.guard_rails
    )


def _curse(challenger: Challenger) -> str:
    curse = challenger.winners_curse
    return (
        f"the search's value was better by {in_figures(curse)}: the winner's curse"
        if curse > 0
        else "no winner's curse"
    )


def _left_out(verdict: Verdict) -> str:
    if not verdict.rows_left_out:
        return ""
    return f"; {verdict.rows_left_out} rows were left out, because the champion may have been trained on them"


def _trial_row(trial: FrozenTrial, job: TuningJob) -> str:
    cost = "" if job.search.cost == "none" else f" {trial.values[1]:.4g} |"
    role = f"{trial.user_attrs[ROLE]}: " if ROLE in trial.user_attrs else ""
    return (
        f"| {number_of(trial)} | {in_figures(trial.values[0])} |{cost} {trial.user_attrs.get(DIAGNOSIS, '')} | "
        f"{role}{escaped(in_words(trial.params))} |"
    )


def _cost_head(job: TuningJob) -> str:
    return {"none": "", "parameters": " parameters |", "latency": " latency in ms |"}[job.search.cost]


def _baseline_in_words(job: TuningJob, tuned: Tuned) -> str:
    if tuned.baseline is None:
        return "none completed"
    gain = job.objective.gain(tuned.best.values[0], tuned.baseline.values[0])
    chosen = tuned.baseline.user_attrs[HYPERPARAMETERS]
    described = {
        name: chosen[name]
        for name in ("optimizer", "learning_rate", "batch_size", "epochs", "depth", "width")
        if name in chosen
    }
    outcome = f"the search found {in_figures(abs(gain))} better" if gain > 0 else "the search found nothing better"
    return f"{in_words(described)}: validation {job.search.objective} {in_figures(tuned.baseline.values[0])}; {outcome}"


def _pareto_in_words(study: optuna.Study, job: TuningJob) -> str:
    """Every trial that no other beats in both, and the rule by which one of them is picked."""
    if job.search.cost == "none":
        return ""
    rows = "\n".join(
        _trial_row(trial, job)
        for trial in sorted(study.best_trials, key=lambda trial: trial.values[1])
        if IMPORTED_FROM not in trial.user_attrs
    )
    return f"""
Best at its {job.search.cost} (Pareto set). The pick is the cheapest trial within {job.search.cost_tolerance:g} of the best {job.search.objective}.

| trial | validation {job.search.objective} |{_cost_head(job)} diagnosis | hyperparameters |
| --- | --- | --- | --- | --- |
{rows}
"""  # noqa: E501 a table's row is one line
