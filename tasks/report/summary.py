"""summary: the night in a few sentences that a stranger understands: what was tried, what won, by how much and how sure
that is, and what it cost.

In Markdown, which Prefect and MLflow show as it is and `cli/markdown.py` on a terminal. Reads what the steps returned
and decides nothing.
"""

import math
from collections.abc import Mapping

import optuna

from models.evaluation.comparison import Comparison
from models.evaluation.metrics import in_figures
from tasks.data.findings import escaped
from tasks.job import TuningJob
from tasks.promotion.confirm import Challenger, Confirmed
from tasks.promotion.verdict import Verdict
from tasks.registry.log import Promotion
from tasks.search.candidate import trained_seconds
from tasks.search.tune import Tuned
from tasks.study.memory import BASELINE
from tasks.study.studies import ROLE, number_of
from tasks.tracking.trials import DEVICE


def summary(
    job: TuningJob,
    study: optuna.Study,
    tuned: Tuned,
    confirmed: Confirmed,
    verdict: Verdict,
    promotion: Promotion | None,
    links: Mapping[str, str],
) -> str:
    """What stands above the report's first section; `links` are pages by their names."""
    points = {
        "Tried": _tried(job, study, tuned, confirmed),
        "Won": _won(verdict.challenger, job),
        "Result": _result(verdict, job),
        "Certainty": _certainty(verdict, job),
        "Cost": _cost(job, study, tuned, confirmed),
    }
    lines = [f"- **{name}**: {sentence}" for name, sentence in points.items() if sentence]
    pages = [f"- [{name}]({page})" for name, page in links.items()]
    return "\n".join(
        [
            f"# {job.name}: {_outcome(job, verdict, promotion)}",
            "",
            _headline(verdict),
            "",
            *lines,
            "",
            "**Where to look**",
            "",
            *pages,
            "",
        ]
    )


def _outcome(job: TuningJob, verdict: Verdict, promotion: Promotion | None) -> str:
    if promotion is not None:
        return f"version {promotion.version} promoted"
    if verdict.decision == "PROMOTE":
        return f"not promoted, because promotion.mode is {job.promotion.mode}"
    return f"champion stays ({verdict.decision})" if verdict.judged else f"no champion yet ({verdict.decision})"


def _headline(verdict: Verdict) -> str:
    """The verdict without the numbers, which stand below."""
    reason = verdict.reason.partition(": test ")[0]
    return f"{escaped(reason[0].upper() + reason[1:])}."


def _tried(job: TuningJob, study: optuna.Study, tuned: Tuned, confirmed: Confirmed) -> str:
    count = tuned.complete + tuned.pruned + tuned.failed
    seconds = trained_seconds(study) + tuned.idle_seconds
    pace = f", {60 * count / seconds:,.0f} a minute" if seconds > 0 else ""
    competitors = "the best of them"
    if confirmed.baseline is not None:
        competitors += " and the textbook's"
    return (
        f"{count:,} configurations of {escaped(job.family.name)}{pace}: {tuned.complete:,} trained to the end, "
        f"{tuned.pruned:,} stopped early, {tuned.failed:,} failed; then {competitors} again with "
        f"{job.confirm.seeds} fresh seeds each"
    )


def _won(challenger: Challenger, job: TuningJob) -> str:
    """How the configuration differs from the textbook's, which is what its class has without arguments."""
    if challenger.trial.user_attrs.get(ROLE) == BASELINE:
        return "the textbook's configuration itself"
    values, textbook = (each.model_dump() for each in (challenger.hyperparameters, job.family.hyperparameters()))
    own, _ = values.pop("own", {}), textbook.pop("own", {})
    changes = [f"{_name(name)} {_value(value)} instead of {_value(textbook[name])}"
               for name, value in values.items() if value != textbook[name]]  # fmt: skip
    changes += [f"{_name(name)} {_value(value)}" for name, value in own.items()]
    return f"trial {number_of(challenger.trial)}, with {', '.join(changes) or 'the same values as the textbook'}"


def _name(name: str) -> str:
    return escaped(name.replace("_", " "))


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else escaped(str(value).replace("_", " "))


def _result(verdict: Verdict, job: TuningJob) -> str:
    """On the test rows; an accuracy also in rows, which everybody can count."""
    name, comparison = job.search.objective, verdict.comparison
    ours = verdict.challenger_test[name]
    label = name.replace("_", " ")
    if comparison is None:
        low, high = verdict.intervals[name]
        return f"{label} {in_figures(ours)} on test rows that nothing was trained or chosen by " + (
            f"(between {in_figures(low)} and {in_figures(high)})"
        )
    errors = ""
    if name == "accuracy":
        wrong, before = (round((1 - value) * comparison.rows) for value in (comparison.ours, comparison.theirs))
        errors = f", that is {wrong} wrong instead of {before}"
    way = "better" if comparison.gain >= 0 else "worse"
    return (
        f"{label} {in_figures(comparison.ours)} against {_opponent(verdict)} {in_figures(comparison.theirs)} on "
        f"{comparison.rows:,} test rows that nothing was trained or chosen by{errors}: {way} by "
        f"{in_figures(abs(comparison.gain))}"
    )


def _opponent(verdict: Verdict) -> str:
    return "the textbook's" if verdict.opponent == "baseline" else "the champion's"


def _certainty(verdict: Verdict, job: TuningJob) -> str:
    comparison = verdict.comparison
    if comparison is None:
        return ""
    bounds = f"the gain lies between {in_figures(comparison.low)} and {in_figures(comparison.high)}"
    sure = f"each bound with {100 * job.promotion.confidence:.4g} % confidence"
    if comparison.better or comparison.worse:
        return f"proven {'better' if comparison.better else 'worse'}: {bounds}, {sure}; {comparison.method}"
    return f"not proven: {bounds}, {sure}{_what_it_takes(comparison)}"


def _what_it_takes(comparison: Comparison) -> str:
    """Bounds close in with the root of the number of rows."""
    if comparison.gain <= 0 or comparison.detectable <= 0:
        return ""
    rows = math.ceil(comparison.rows * (comparison.detectable / comparison.gain) ** 2)
    return f"; to prove a gain of {in_figures(comparison.gain)} four times in five takes about {rows:,} test rows"


def _cost(job: TuningJob, study: optuna.Study, tuned: Tuned, confirmed: Confirmed) -> str:
    searched, again = trained_seconds(study) + tuned.idle_seconds, confirmed.seconds
    price = job.budget.price_per_hour
    money = "" if price is None else f", which cost {(searched + again) / 3600 * price:.2f}"
    device = confirmed.challenger.trial.user_attrs.get(DEVICE, "")
    return f"{_time(searched)} of searching and {_time(again)} of confirming{f' on {device}' if device else ''}{money}"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} s"
