"""The report's second part, for whoever asks why: every figure that the verdict rests on, in tables."""

from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from models.evaluation.metrics import in_figures
from models.hyperparameters.declared import in_words
from tasks.data.drift import Change, drift_table
from tasks.data.findings import escaped
from tasks.data.snapshots import Snapshot, read_snapshot
from tasks.job import TuningJob
from tasks.promotion.confirm import Challenger
from tasks.promotion.verdict import Verdict
from tasks.search.candidate import trained_seconds
from tasks.search.tune import Tuned
from tasks.study.studies import (
    FINGERPRINT,
    HYPERPARAMETERS,
    IMPORTED_FROM,
    OBJECTIVE,
    ROLE,
    SEARCH_DIGEST,
    number_of,
    ranked,
    tonights_trials,
)
from tasks.tracking.trials import DEVICE, DIAGNOSIS

MOST_MOVED = 10


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


def changes_since(
    job: TuningJob, study: optuna.Study, before: optuna.Study, snapshot: Snapshot, snapshots: Path
) -> str:
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
