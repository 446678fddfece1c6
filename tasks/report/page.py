"""The night on one HTML page that needs no network: what came out, what the search learned, what it cost, and what to
do next.

Reads what the steps left and decides nothing; for people who have neither Prefect nor MLflow at hand.
"""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import optuna
from markdown_it import MarkdownIt
from markupsafe import Markup
from optuna.trial import FrozenTrial, TrialState

from models.evaluation.metrics import in_figures
from models.hyperparameters.domains import Range
from models.training.diagnosis import Diagnosis
from tasks.data.drift import Change
from tasks.job import TuningJob
from tasks.promotion.confirm import Confirmed
from tasks.promotion.verdict import Verdict
from tasks.search.candidate import trained_seconds
from tasks.search.tune import Tuned
from tasks.study.studies import FAILURE, number_of, ranked, tonights_trials
from tasks.tracking.trials import DIAGNOSIS

BEST_SHARE = 0.1
LEAST_BEST = 3
# So near to an end of its range, on the range's own scale, that what lies beyond may be better.
EDGE = 0.05
MUCH = 0.3
MOST_FAILURES = 20

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #c8c8c8; padding: .3rem .7rem; text-align: left; vertical-align: top; }
h2 { margin-top: 2.5rem; border-bottom: 2px solid #0072b2; }
figure { margin: 1.5rem 0; } figcaption { color: #454545; }
img { max-width: 100%; height: auto; }
a { color: #00558a; }
</style>
</head>
<body>
<main>
{{ summary }}
<h2>What to do next</h2>
<ul>
{% for advice in advices %}<li>{{ advice }}</li>
{% endfor %}</ul>
<h2>What the search learned</h2>
{% if regions %}<table>
<caption>Where the best tenth of the trials lies</caption>
<thead><tr><th scope="col">hyperparameter</th><th scope="col">explains</th><th scope="col">the best tenth</th>
<th scope="col">searched</th></tr></thead>
<tbody>
{% for region in regions %}<tr><th scope="row">{{ region.name }}</th><td>{{ region.explains }}</td>
<td>{{ region.best }}</td><td>{{ region.searched }}</td></tr>
{% endfor %}</tbody>
</table>{% else %}<p>Too few trials completed to tell.</p>{% endif %}
{% for plot in plots %}<figure>
<img src="data:image/svg+xml;base64,{{ plot.image }}" alt="{{ plot.caption }}">
<figcaption>{{ plot.caption }}</figcaption>
</figure>
{% endfor %}
<h2>What it cost</h2>
<table>
<thead><tr><th scope="col">what the device did</th><th scope="col">trials</th><th scope="col">hours</th>
{% if price %}<th scope="col">cost</th>{% endif %}</tr></thead>
<tbody>
{% for cost in costs %}<tr><th scope="row">{{ cost.meaning }}</th>
<td>{% if cost.trials is not none %}{{ cost.trials }}{% endif %}</td><td>{{ "%.3f" % cost.hours }}</td>
{% if price %}<td>{{ "%.2f" % (cost.hours * price) }}</td>{% endif %}</tr>
{% endfor %}</tbody>
</table>
{% if price %}<p>An hour costs {{ price }}{% if max_cost %}; the search may cost {{ max_cost }} at most{% endif %}.</p>
{% endif %}
{% if failures %}<h2>Trials that failed</h2>
<table>
<thead><tr><th scope="col">trial</th><th scope="col">why</th></tr></thead>
<tbody>
{% for failure in failures %}<tr><th scope="row">{{ failure.trial }}</th><td>{{ failure.why }}</td></tr>
{% endfor %}</tbody>
</table>{% endif %}
</main>
</body>
</html>
"""


@dataclass(frozen=True, kw_only=True)
class Region:
    """Where the best tenth of the trials has a hyperparameter; `edge` is the end of its range that it lies at."""

    name: str
    explains: str
    best: str
    searched: str
    edge: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Hours of the device that went into one outcome; `trials` is None where none are counted."""

    outcome: str
    meaning: str
    trials: int | None
    hours: float


def night_page(
    job: TuningJob,
    study: optuna.Study,
    summary: str,
    verdict: Verdict,
    moved: Sequence[Change],
    importance: Mapping[str, float],
    plots: Mapping[str, bytes],
    costs: Sequence[Cost],
) -> str:
    """The page. `summary` is the report in Markdown; `plots` are figures by their captions."""
    regions = regions_of(study, job, importance)
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(PAGE).render(
        title=f"{study.study_name}: {verdict.decision}",
        # What looks like HTML in it was escaped by its own renderer.
        summary=Markup(markdown.render(summary)),  # noqa: S704
        advices=advices_of(job, study, verdict, moved, regions),
        regions=regions,
        plots=[{"image": base64.b64encode(svg).decode(), "caption": caption} for caption, svg in plots.items()],
        costs=costs,
        price=job.budget.price_per_hour,
        max_cost=job.budget.max_cost,
        failures=_failures(study),
    )


def regions_of(study: optuna.Study, job: TuningJob, importance: Mapping[str, float]) -> list[Region]:
    """Of each searched hyperparameter, those that explain the most first."""
    complete = ranked(tonights_trials(study, TrialState.COMPLETE), job)
    best = complete[: max(LEAST_BEST, round(BEST_SHARE * len(complete)))]
    if len(complete) < 2 * LEAST_BEST:
        return []
    searched = [name for name, domain in job.space.items() if isinstance(domain, Range | tuple)]
    names = [*importance, *(name for name in searched if name not in importance)]
    return [
        _region(name, [trial for trial in best if name in trial.params], job, importance.get(name))
        for name in names
        if name in job.space and any(name in trial.params for trial in best)
    ]


def _region(name: str, best: list[FrozenTrial], job: TuningJob, explains: float | None) -> Region:
    values = [trial.params[name] for trial in best]
    domain = job.space[name]
    share = "" if explains is None else f"{explains:.0%}"
    if not isinstance(domain, Range):
        counted = ", ".join(f"{value} ({count})" for value, count in Counter(map(str, values)).most_common(3))
        choices = ", ".join(map(str, domain)) if isinstance(domain, tuple) else str(domain)
        return Region(name=name, explains=share, best=counted, searched=choices)
    scale = np.log if domain.log else float
    low, high = scale(domain.low), scale(domain.high)
    place = (scale(float(np.median(values))) - low) / (high - low)
    edge = "high" if place >= 1 - EDGE else "low" if place <= EDGE and domain.low != _least(name, job) else None
    return Region(
        name=name,
        explains=share,
        best=f"{min(values):.3g} to {max(values):.3g}",
        searched=f"{domain.low:g} to {domain.high:g}",
        edge=edge,
    )


def _least(name: str, job: TuningJob) -> float | None:
    """Below which a hyperparameter makes no sense: there is no dropout below 0, and no depth below 1."""
    field = job.family.hyperparameters.model_fields.get(name)
    bounds = [] if field is None else [getattr(bound, "ge", None) for bound in field.metadata]
    return next((float(bound) for bound in bounds if bound is not None), None)


def advices_of(
    job: TuningJob, study: optuna.Study, verdict: Verdict, moved: Sequence[Change], regions: Sequence[Region]
) -> list[str]:
    """What a person should look at or change, in the order of how much it may matter."""
    advices = []
    if large := [change.column for change in moved if change.is_large]:
        advices.append(f"Look at the data: {', '.join(large[:5])} moved much since the champion was trained.")
    for region in regions:
        if region.edge is not None:
            end = region.searched.split(" to ")[0 if region.edge == "low" else 1]
            advices.append(f"Widen search.space.{region.name}: the best trials lie at its {region.edge} end ({end}).")
    trials = tonights_trials(study)
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    if len(failed) > MUCH * max(1, len(trials)):
        advices.append(f"{len(failed)} of {len(trials)} trials failed: the reasons stand below.")
    diagnosed = Counter(trial.user_attrs.get(DIAGNOSIS) for trial in trials if trial.state == TrialState.COMPLETE)
    for name, remedy in _REMEDIES.items():
        if diagnosed[name] > MUCH * max(1, sum(diagnosed.values())):
            advices.append(f"{diagnosed[name]} of {sum(diagnosed.values())} complete trials are {name}: {remedy}.")
    comparison = verdict.comparison
    if verdict.decision == "HOLD" and comparison is not None and comparison.detectable:
        advices.append(
            f"A gain below {in_figures(comparison.detectable)} is hard to prove on {comparison.rows} test rows: more "
            "test rows would show smaller ones."
        )
    if len(trials) < job.budget.trials:
        advices.append(f"The budget's {job.budget.trials} trials were not reached: give it more minutes.")
    return advices or ["Nothing: the night went as it should."]


_REMEDIES: dict[Diagnosis, str] = {
    "underfit": "give them more epochs, or wider and deeper models",
    "overfit": "search stronger dropout and weight_decay, or get more rows",
}


def costs_of(job: TuningJob, study: optuna.Study, tuned: Tuned, confirmed: Confirmed) -> list[Cost]:
    """What the device's time went into; the last row is their sum."""
    states = {
        "useful": ("trials that completed", TrialState.COMPLETE),
        "pruned": ("trials that were cut short", TrialState.PRUNED),
        "failed": ("trials that failed or were interrupted", TrialState.FAIL),
    }
    costs = []
    for outcome, (meaning, state) in states.items():
        trials, hours = len(tonights_trials(study, state)), trained_seconds(study, state) / 3600
        costs.append(Cost(outcome=outcome, meaning=meaning, trials=trials, hours=hours))
    again = f"the best {job.confirm.candidates} and a baseline, trained again with {job.confirm.seeds} seeds"
    costs.append(Cost(outcome="confirmed", meaning=again, trials=None, hours=confirmed.seconds / 3600))
    costs.append(Cost(outcome="idle", meaning="idle between trials", trials=None, hours=tuned.idle_seconds / 3600))
    return [*costs, Cost(outcome="all", meaning="all", trials=None, hours=sum(cost.hours for cost in costs))]


def _failures(study: optuna.Study) -> list[dict[str, Any]]:
    failed = [trial for trial in tonights_trials(study) if FAILURE in trial.user_attrs]
    return [{"trial": number_of(trial), "why": trial.user_attrs[FAILURE]} for trial in failed[:MOST_FAILURES]]
