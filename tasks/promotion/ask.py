"""ask: let a person decide about a promotion that the gate allows, in the Prefect UI.

The night pauses by Prefect's own means, shows the comparison above a form, and goes on when the form is sent, or when
nobody answered in time. Knows nothing of how a version is published.
"""

import logging
from dataclasses import replace

from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from pydantic import Field

from models.evaluation.metrics import in_figures
from tasks.job import TuningJob
from tasks.promotion.verdict import Verdict

POLL_SECONDS = 5

_logger = logging.getLogger(__name__)


class Answer(RunInput):
    """What a person says of a promotion."""

    promote: bool = Field(default=False, description="Make the challenger the champion.")
    note: str = Field(default="", description="Why; it is kept in the promotion log.")


def ask(job: TuningJob, verdict: Verdict) -> Verdict:
    """The verdict as it is where nobody needs to be asked; else as the person decided: PROMOTE, or HOLD.

    To be called in the flow itself. Nobody's answer within `promotion.ask_minutes` is HOLD.
    """
    if job.promotion.mode != "ask" or verdict.decision != "PROMOTE":
        return verdict
    form = Answer.with_initial_data(description=question(job, verdict))
    _logger.info("waiting %g minutes for a person's answer in the Prefect UI", job.promotion.ask_minutes)
    try:
        answer = pause_flow_run(
            wait_for_input=form, timeout=int(job.promotion.ask_minutes * 60), poll_interval=POLL_SECONDS
        )
    except FlowPauseTimeout:
        waited = f"nobody answered within {job.promotion.ask_minutes:g} minutes"
        return replace(verdict, decision="HOLD", reason=f"{waited}, though {verdict.reason}")
    said = f" ({answer.note})" if answer.note else ""
    if not answer.promote:
        return replace(verdict, decision="HOLD", reason=f"a person said no{said}, though {verdict.reason}")
    return replace(verdict, reason=f"a person said yes{said}: {verdict.reason}")


def question(job: TuningJob, verdict: Verdict) -> str:
    """The comparison as Markdown, as it stands above the form."""
    theirs = verdict.opponent_test or {}
    rows = "\n".join(
        f"| {name} | {in_figures(value)} | {in_figures(theirs[name]) if name in theirs else ''} |"
        for name, value in verdict.challenger_test.items()
    )
    rails = "\n".join(f"- {rail.name}: {rail.evidence}" for rail in verdict.guard_rails)
    return f"""\
# Promote tonight's winner of {job.name}?

{verdict.reason[0].upper()}{verdict.reason[1:]}.

| on the test rows | winner | {"" if verdict.opponent == "nobody" else verdict.opponent} |
| --- | --- | --- |
{rows}

{rails}
"""
