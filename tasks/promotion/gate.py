"""gate: compare the challenger with the champion on the same held-out test rows, and answer with a verdict.

The test rows took part in no training and no choice of either. A challenger is promoted when it is proven better, not
when it looks better: a tie keeps the champion. On a job's first night there is no champion to protect: the best on
validation rows becomes the first, and the test rows tell how sure it is that it beats the textbook. Knows nothing of
how either was trained.
"""

from dataclasses import replace
from typing import Any

import torch

from models.evaluation.comparison import Comparison
from models.evaluation.metrics import in_figures
from tasks.data.snapshots import Snapshot
from tasks.job import PromotionConfig, TuningJob
from tasks.promotion.confirm import Challenger, Confirmed
from tasks.promotion.judged_rows import JudgedRows, reads, seen_in_words, unseen_by
from tasks.promotion.verdict import Decision, GuardRail, Verdict, broken_rails
from tasks.registry.champion import Champion


def gate(
    job: TuningJob, confirmed: Confirmed, champion: Champion | None, snapshot: Snapshot, device: torch.device
) -> Verdict:
    """Judge on the snapshot's test rows, each model behind its own preprocessing.

    1. On a job's first night: PROMOTE, unless a limit that speaks of one model alone is broken. 2. The champion reads
    rows of another shape, or of columns that tonight's table lacks: HOLD, nothing can be compared. 3. The challenger is
    compared with the champion (`judge`). 4. What a rollback took back is not promoted again on the same rows: HOLD.

    Test rows that the champion may have been trained or chosen on, because rows were split otherwise then, are left
    out. Rows that the split drew as one, such as copies, count as one observation: what was drawn by chance is the
    group, so a model that is lucky with it is lucky with all its rows.
    """
    everything = torch.ones(snapshot.row_counts["test"], dtype=torch.bool, device=device)
    rows = JudgedRows(
        job,
        snapshot,
        snapshot.features("test", device),
        snapshot.target("test", device),
        snapshot.test_groups(),
        everything,
    )
    if champion is None:
        return _first_night(confirmed, rows)
    challenger = confirmed.challenger
    if not reads(champion, snapshot):
        return rows.verdict(
            challenger,
            decision="HOLD",
            reason=f"the champion reads rows for a {champion.manifest.problem}, of shape {champion.manifest.features} "
            f"in {len(champion.manifest.classes)} classes, tonight's are for a {snapshot.shape.problem}, of shape "
            f"{snapshot.shape.features} in {len(snapshot.classes)}, or of other columns: give the job a new name",
            judged=champion.promotion.number,
        )
    unseen = unseen_by(champion, snapshot, job).to(device)
    left_out = int((~unseen).sum())
    if not unseen.any():
        return rows.verdict(
            challenger,
            decision="HOLD",
            reason=seen_in_words(champion),
            judged=champion.promotion.number,
            rows_left_out=left_out,
        )
    rows = replace(rows, chosen=unseen)
    ours, theirs = rows.outputs(challenger), champion.outputs(rows.recoded_for(champion))[unseen]
    comparison = rows.compare(ours, theirs, champion.promotion.number)
    rails = (*rows.slice_rail(ours, theirs), *rows.limits(challenger, ours))
    decision, outcome = judge(comparison, rails, job.promotion)
    if decision == "PROMOTE" and (again := _taken_back(challenger, snapshot, champion)):
        decision, outcome = "HOLD", again
    return rows.verdict(
        challenger,
        decision=decision,
        reason=f"{outcome}: {in_words(comparison, 'the champion')}",
        judged=champion.promotion.number,
        opponent="champion",
        opponent_test=rows.metrics(theirs),
        comparison=comparison,
        guard_rails=rails,
        rows_left_out=left_out,
    )


def judge(
    comparison: Comparison, guard_rails: tuple[GuardRail, ...], promotion: PromotionConfig
) -> tuple[Decision, str]:
    """The decision, from evidence alone.

    1. A broken guard rail: REJECT. 2. Proven worse: REJECT. 3. Proven better, unless the gain is as surely below
    `promotion.min_improvement`: PROMOTE. 4. Else HOLD, ties too. A guard rail that speaks of a difference breaks on
    proof only, so that bad luck with a few rows cannot keep out every challenger for ever; and a gain as large as
    `comparison.detectable` is found on four nights in five.
    """
    if broken := broken_rails(guard_rails):
        return "REJECT", f"a guard rail is broken ({broken})"
    if comparison.worse:
        return "REJECT", "the challenger is worse"
    if not comparison.better:
        return "HOLD", "no difference is proven"
    if comparison.high < promotion.min_improvement:
        return (
            "HOLD",
            f"the challenger is better by less than promotion.min_improvement ({promotion.min_improvement:g})",
        )
    return "PROMOTE", "the challenger is better"


def in_words(comparison: Comparison, opponent: str) -> str:
    """`test accuracy 0.9750 against the champion's 0.9583 on 360 rows, a gain of 0.0167 (0.0028 to 0.0306; ...)`."""
    provable = comparison.detectable
    power = f"; so many rows prove a gain of {in_figures(provable)} four times in five" if provable else ""
    groups = f" in {comparison.groups} independent groups" if comparison.groups < comparison.rows else ""
    return (
        f"test {comparison.metric} {in_figures(comparison.ours)} against {opponent}'s "
        f"{in_figures(comparison.theirs)} on "
        f"{comparison.rows} rows{groups}, a gain of {in_figures(comparison.gain)} ({in_figures(comparison.low)} to "
        f"{in_figures(comparison.high)}; "
        f"{comparison.method}{power})"
    )


def _first_night(confirmed: Confirmed, rows: JudgedRows) -> Verdict:
    """Nothing has to be proven where no champion is at stake: what confirm found best on validation rows is promoted.
    How it compares with the baseline on the test rows is said, and decides nothing."""
    challenger, baseline = confirmed.challenger, confirmed.baseline
    ours = rows.outputs(challenger)
    limits = rows.limits(challenger, ours)
    found: dict[str, Any] = {}
    if baseline is None:
        outcome = "there was no champion yet, and no baseline"
    elif baseline is challenger:
        outcome = (
            "there was no champion yet; nothing that was tried is better on validation rows than the textbook's "
            f"configuration ({challenger.objective} {in_figures(challenger.mean)}, {_seeds(challenger)})"
        )
    else:
        theirs = rows.outputs(baseline)
        comparison = rows.compare(ours, theirs, judged=0)
        found = {"opponent": "baseline", "opponent_test": rows.metrics(theirs), "comparison": comparison}
        outcome = (
            f"there was no champion yet; the best on validation rows ({challenger.objective} "
            f"{in_figures(challenger.mean)} against the textbook's {in_figures(baseline.mean)}, {_seeds(challenger)}) "
            f"is {_standing(comparison)} than the textbook on the test rows: {in_words(comparison, 'the textbook')}"
        )
    broken = broken_rails(limits)
    return rows.verdict(
        challenger,
        decision="REJECT" if broken else "PROMOTE",
        reason=f"a guard rail is broken ({broken})" if broken else outcome,
        judged=0,
        guard_rails=limits,
        **found,
    )


def _seeds(challenger: Challenger) -> str:
    return f"means of {len(challenger.values)} seeds" if len(challenger.values) > 1 else "of a single seed"


def _standing(comparison: Comparison) -> str:
    return "proven better" if comparison.better else "proven worse" if comparison.worse else "not proven better"


def _taken_back(challenger: Challenger, snapshot: Snapshot, champion: Champion) -> str | None:
    for manifest in champion.taken_back:
        known = (manifest.hyperparameters, manifest.lineage.snapshot)
        if known == (challenger.hyperparameters.model_dump(mode="json"), snapshot.fingerprint):
            return f"version {manifest.version} of the same hyperparameters was rolled back, and no row is new since"
    return None
