"""gate: compare the challenger with the champion on the same held-out test rows, and answer with a verdict.

The test rows took part in no training and no choice of either. A challenger is promoted when it is proven better, not
when it looks better: a tie keeps the champion. On a job's first night there is no champion to protect: the best on
validation rows becomes the first, and the test rows tell how sure it is that it beats the textbook. Knows nothing of
how either was trained.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.evaluation.comparison import Comparison, calibration_error, compare, interval, slice_gains
from models.evaluation.evaluate import latency_ms, predict_outputs, score
from models.evaluation.metrics import MetricName, in_figures, metrics_of
from models.rows.batches import DiskRows
from models.rows.table import recode
from tasks.data.prepare import first_test_moment, names_and_roles
from tasks.data.snapshots import Snapshot
from tasks.job import DataConfig, PromotionConfig, TuningJob
from tasks.promotion.confirm import Challenger, Confirmed
from tasks.registry.champion import Champion
from tasks.registry.versions import FORMAT_OF_EXACT_ROWS
from tasks.study.studies import derived_seed
from tasks.trainer.fresh import MOST_ROWS

Decision = Literal["PROMOTE", "HOLD", "REJECT"]
MEGABYTE = 1_000_000
# How far a moment could be rounded where it was kept as days in float32.
ROUNDED_MICROSECONDS = 84_375_000


@dataclass(frozen=True, kw_only=True)
class GuardRail:
    """A rule that no gain outweighs, whether the challenger keeps to it, and the numbers."""

    name: str
    holds: bool
    evidence: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """PROMOTE, HOLD (no difference is proven) or REJECT (worse, or a guard rail is broken), with the reason in words
    and the evidence.

    `opponent` says whom the challenger was compared with: on a job's first night the baseline, which decides nothing,
    and "nobody" where that is the challenger itself. `judged` is the number of the promotion that made the champion, 0
    before the first. `intervals` are of `challenger_test`, with 95 % confidence; `outputs` are what the challenger gave
    for the first test rows, 4,096 at most, on the CPU.
    """

    decision: Decision
    reason: str
    judged: int
    challenger: Challenger
    challenger_test: dict[MetricName, float]
    intervals: dict[MetricName, tuple[float, float]]
    outputs: Tensor = field(repr=False, compare=False)
    opponent: Literal["champion", "baseline", "nobody"] = "nobody"
    opponent_test: dict[MetricName, float] | None = None
    comparison: Comparison | None = None
    guard_rails: tuple[GuardRail, ...] = ()
    rows_left_out: int = 0

    def __post_init__(self) -> None:
        for metrics in (self.challenger_test, self.opponent_test or {}):
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise ValueError(f"a verdict needs finite metrics, found {name} {value}")

    def evidence(self) -> dict[str, Any]:
        """Everything that the decision rests on, as JSON can hold it."""
        return {
            "decision": self.decision,
            "reason": self.reason,
            "opponent": self.opponent,
            "challenger_test": self.challenger_test,
            "opponent_test": self.opponent_test,
            "comparison": None if self.comparison is None else asdict(self.comparison),
            "guard_rails": [asdict(rail) for rail in self.guard_rails],
            "rows_left_out": self.rows_left_out,
        }


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
    rows = _TestRows(
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
    if not _reads(champion, snapshot):
        return rows.verdict(
            challenger,
            decision="HOLD",
            reason=f"the champion reads rows for a {champion.manifest.problem}, of shape {champion.manifest.features} "
            f"in {len(champion.manifest.classes)} classes, tonight's are for a {snapshot.shape.problem}, of shape "
            f"{snapshot.shape.features} in {len(snapshot.classes)}, or of other columns: give the job a new name",
            judged=champion.promotion.number,
        )
    unseen = _unseen_by(champion, snapshot, job).to(device)
    left_out = int((~unseen).sum())
    if not unseen.any():
        return rows.verdict(
            challenger,
            decision="HOLD",
            reason=_seen_in_words(champion),
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
    if broken := _broken(guard_rails):
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


def with_rail(verdict: Verdict, rail: GuardRail) -> Verdict:
    """The verdict with one guard rail more, which rejects what breaks it."""
    verdict = replace(verdict, guard_rails=(*verdict.guard_rails, rail))
    if rail.holds:
        return verdict
    return replace(verdict, decision="REJECT", reason=f"a guard rail is broken ({_broken((rail,))})")


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


def _first_night(confirmed: Confirmed, rows: "_TestRows") -> Verdict:
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
    broken = _broken(limits)
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


@dataclass(frozen=True)
class _TestRows:
    """The rows that a job's models are judged on, and what is measured there."""

    job: TuningJob
    snapshot: Snapshot
    features: DiskRows
    all_targets: Tensor
    all_groups: Tensor
    chosen: Tensor

    @property
    def target(self) -> Tensor:
        return self.all_targets[self.chosen]

    @property
    def groups(self) -> Tensor:
        """Copies of a row, and rows of one value of `data.split_by`, are one observation."""
        return self.all_groups[self.chosen.cpu()]

    def outputs(self, found: Challenger) -> Tensor:
        return self._all_outputs(found)[self.chosen]

    def _all_outputs(self, found: Challenger) -> Tensor:
        return predict_outputs(nn.Sequential(found.preprocessing, found.model), self.features)

    def recoded_for(self, champion: Champion) -> DiskRows:
        """The features, all of them, with the champion's own columns and list of categories."""
        known, wanted = self.snapshot.columns, champion.columns
        if not known or known == wanted:
            return self.features

        def recoded(rows: Tensor) -> Tensor:
            return torch.from_numpy(recode(rows.cpu().numpy(), known, wanted)).to(rows.device)

        return replace(self.features, transform=recoded)

    def metrics(self, outputs: Tensor) -> dict[MetricName, float]:
        return score(outputs, self.target, metrics_of(self.job.objective.problem))

    def verdict(self, challenger: Challenger, **found: Any) -> Verdict:
        outputs = self._all_outputs(challenger)
        judged = outputs[self.chosen]
        names = metrics_of(self.job.objective.problem)
        seed = derived_seed(self.job.seed, "interval", 0)
        return Verdict(
            challenger=challenger,
            challenger_test=self.metrics(judged),
            intervals={name: interval(judged, self.target, name, seed=seed, groups=self.groups) for name in names},
            outputs=outputs[:MOST_ROWS].cpu(),
            **found,
        )

    def compare(self, ours: Tensor, theirs: Tensor, judged: int) -> Comparison:
        return compare(
            ours,
            theirs,
            self.target,
            self.job.search.objective,
            confidence=self.job.promotion.confidence,
            seed=derived_seed(self.job.seed, "gate", judged),
            groups=self.groups,
        )

    def slice_rail(self, ours: Tensor, theirs: Tensor) -> tuple[GuardRail, ...]:
        """The slice that surely fell the most; none where the job sets no limit."""
        most = self.job.promotion.max_slice_fall
        if most is None:
            return ()
        gains = slice_gains(
            ours,
            theirs,
            self.target,
            self.snapshot.classes,
            confidence=self.job.promotion.confidence,
            seed=derived_seed(self.job.seed, "slices", 0),
            groups=self.groups,
        )
        worst = min(gains, key=lambda found: (found.high, found.gain))
        change = "falls" if worst.gain < 0 else "rises"
        evidence = (
            f"{worst.name} {change} by {in_figures(abs(worst.gain))} on {worst.rows} rows, surely falls by "
            f"{in_figures(max(0.0, -worst.high))} of max_slice_fall {most:g}"
        )
        return (GuardRail(name="worst slice", holds=worst.high >= -most, evidence=evidence),)

    def limits(self, found: Challenger, outputs: Tensor) -> tuple[GuardRail, ...]:
        """The guard rails that speak of one model alone, where the job sets their limits."""
        served = nn.Sequential(found.preprocessing, found.model)
        promotion = self.job.promotion
        limits: list[tuple[str, str, float | None, Callable[[], float]]] = [
            ("latency", "max_latency_ms", promotion.max_latency_ms, lambda: latency_ms(served, self.features[:1])),
            ("size", "max_megabytes", promotion.max_megabytes, lambda: _megabytes(served)),
        ]
        if outputs.ndim == 2:
            calibration = promotion.max_calibration_error
            limits.append(
                (
                    "calibration error",
                    "max_calibration_error",
                    calibration,
                    lambda: calibration_error(outputs, self.target),
                )
            )
        rails = []
        for name, job_field, limit, measure in limits:
            if limit is not None:
                value = measure()
                rails.append(
                    GuardRail(name=name, holds=value <= limit, evidence=f"{value:.4g} of {job_field} {limit:g}")
                )
        return tuple(rails)


def _reads(champion: Champion, snapshot: Snapshot) -> bool:
    """Whether the champion can answer tonight's rows: a table may have more columns than it reads."""
    manifest = champion.manifest
    if (manifest.problem, manifest.classes) != (snapshot.shape.problem, snapshot.classes):
        return False
    if bool(champion.columns) != bool(snapshot.columns):
        return False
    if not champion.columns:
        return manifest.features == snapshot.shape.features
    return set(names_and_roles(champion.columns)) <= set(names_and_roles(snapshot.columns))


def _unseen_by(champion: Champion, snapshot: Snapshot, job: TuningJob) -> Tensor:
    """Of each test row, whether it was a test row too when the champion was made."""
    lineage, positions = champion.manifest.lineage, snapshot.test_positions()
    split_otherwise = any(lineage.data.get(name) != getattr(job.data, name) for name in ("split_by", "time_column"))
    # With a column more each row has another hash, and may be on another side.
    by_content = job.data.split_by is None and job.data.time_column is None
    if split_otherwise or (by_content and names_and_roles(champion.columns) != names_and_roles(snapshot.columns)):
        return torch.zeros_like(positions, dtype=torch.bool)
    was_exact = champion.manifest.format >= FORMAT_OF_EXACT_ROWS
    if job.data.time_column is not None:
        begin = first_test_moment(DataConfig.model_validate({**lineage.data, "source": lineage.source}))
        return positions >= (begin if was_exact else begin + ROUNDED_MICROSECONDS)
    if lineage.test_fraction is None:
        return torch.ones_like(positions, dtype=torch.bool)
    unseen = positions < lineage.test_fraction
    return unseen if was_exact or not by_content else unseen & _is_narrow(snapshot)


def _seen_in_words(champion: Champion) -> str:
    seen, lineage = "the champion may have been trained on each of tonight's test rows", champion.manifest.lineage
    if champion.manifest.format < FORMAT_OF_EXACT_ROWS:
        return f"{seen}: it is of a time when rows were split by rounded numbers; give the job a new name"
    return (
        f"{seen}: put data.test_fraction back to {lineage.test_fraction}, and data.split_by and data.time_column to "
        f"{lineage.data.get('split_by')} and {lineage.data.get('time_column')}, or give the job a new name"
    )


def _is_narrow(snapshot: Snapshot) -> Tensor:
    """Of each test row, whether float32 holds its features, so that it has the hash that it always had."""
    features = snapshot.features("test", torch.device("cpu"))
    narrow = replace(features, transform=lambda rows: ((rows.float() == rows) | rows.isnan()).flatten(1).all(dim=1))
    return narrow[:]


def _taken_back(challenger: Challenger, snapshot: Snapshot, champion: Champion) -> str | None:
    for manifest in champion.taken_back:
        known = (manifest.hyperparameters, manifest.lineage.snapshot)
        if known == (challenger.hyperparameters.model_dump(mode="json"), snapshot.fingerprint):
            return f"version {manifest.version} of the same hyperparameters was rolled back, and no row is new since"
    return None


def _broken(rails: tuple[GuardRail, ...]) -> str:
    return "; ".join(f"{rail.name}: {rail.evidence}" for rail in rails if not rail.holds)


def _megabytes(model: nn.Module) -> float:
    return float(sum(tensor.nbytes for tensor in model.state_dict().values())) / MEGABYTE
