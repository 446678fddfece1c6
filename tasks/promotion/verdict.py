"""What the gate says: PROMOTE, HOLD or REJECT, why, and the figures behind it."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from models.evaluation.comparison import Comparison
from models.evaluation.metrics import MetricName
from tasks.promotion.confirm import Challenger

Decision = Literal["PROMOTE", "HOLD", "REJECT"]


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


def with_rail(verdict: Verdict, rail: GuardRail) -> Verdict:
    """The verdict with one guard rail more, which rejects what breaks it."""
    verdict = replace(verdict, guard_rails=(*verdict.guard_rails, rail))
    if rail.holds:
        return verdict
    return replace(verdict, decision="REJECT", reason=f"a guard rail is broken ({broken_rails((rail,))})")


def broken_rails(rails: tuple[GuardRail, ...]) -> str:
    return "; ".join(f"{rail.name}: {rail.evidence}" for rail in rails if not rail.holds)
