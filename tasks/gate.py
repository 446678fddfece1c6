"""gate: compare the challenger with the champion on the same held-out test rows, and answer with a verdict.

The test rows took part in no training and no choice of tonight's. A tie keeps the champion. Knows nothing of how
either was trained.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from models.evaluate import MetricName, evaluate
from tasks.confirm import Challenger
from tasks.job import TuningJob
from tasks.prepare import Snapshot
from tasks.versions import Champion

Decision = Literal["PROMOTE", "HOLD", "REJECT"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """PROMOTE, HOLD (nothing better was shown) or REJECT (worse), with the reason in words and the numbers behind it.

    `judged` is the number of the promotion that the challenger was compared with, 0 before the first.
    """

    decision: Decision
    reason: str
    judged: int
    challenger_test: dict[MetricName, float]
    champion_test: dict[MetricName, float] | None

    def __post_init__(self) -> None:
        for metrics in (self.challenger_test, self.champion_test or {}):
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise ValueError(f"a verdict needs finite metrics, found {name} {value}")


def gate(
    job: TuningJob, challenger: Challenger, champion: Champion | None, snapshot: Snapshot, device: torch.device
) -> Verdict:
    """Judge on the snapshot's test rows, each model behind its own preprocessing.

    1. No champion yet: PROMOTE. 2. The champion reads rows of another shape: HOLD, nothing can be compared. 3. Better
    by `promotion.min_improvement` and more than nothing: PROMOTE. 4. Worse: REJECT. 5. Else HOLD, ties too.
    """
    features, target = snapshot.load(device)["test"]
    ours = evaluate(nn.Sequential(challenger.preprocessing, challenger.model), features, target)
    if champion is None:
        return Verdict(
            decision="PROMOTE",
            reason="there was no champion yet",
            judged=0,
            challenger_test=ours,
            champion_test=None,
        )
    judged = champion.promotion.number
    if (champion.manifest.shape, champion.manifest.classes) != (snapshot.shape, snapshot.classes):
        return Verdict(
            decision="HOLD",
            reason=f"the champion reads rows for a {champion.manifest.problem}, of shape {champion.manifest.features} "
            f"in {len(champion.manifest.classes)} classes, tonight's are for a {snapshot.shape.problem}, of shape "
            f"{snapshot.shape.features} in {len(snapshot.classes)}: give the job a new name",
            judged=judged,
            challenger_test=ours,
            champion_test=None,
        )
    theirs = evaluate(nn.Sequential(champion.preprocessing, champion.model), features, target)
    name = job.search.objective
    decision, outcome = _decide(job.objective.gain(ours[name], theirs[name]), job.promotion.min_improvement)
    return Verdict(
        decision=decision,
        reason=f"{outcome}: test {name} {ours[name]:.4f} against the champion's {theirs[name]:.4f} "
        f"on {len(target)} rows",
        judged=judged,
        challenger_test=ours,
        champion_test=theirs,
    )


def _decide(gain: float, min_improvement: float) -> tuple[Decision, str]:
    if gain < 0:
        return "REJECT", "the challenger is worse"
    if gain == 0:
        return "HOLD", "the challenger is no better"
    if gain < min_improvement:
        return "HOLD", f"the challenger is better by less than promotion.min_improvement ({min_improvement:g})"
    return "PROMOTE", "the challenger is better"
