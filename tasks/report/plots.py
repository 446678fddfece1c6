"""The plots of a night, drawn by matplotlib: readable in grey and by colour-blind readers, as colours come from Okabe
and Ito's palette and are never alone in telling things apart.

Each function returns a figure, or None where there is nothing to draw. Knows nothing of files and pages.
"""

import io
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from models.hyperparameters.domains import Domain, Range
from tasks.job import TuningJob
from tasks.study.studies import number_of, ranked, tonights_trials
from tasks.tracking.trials import CURVE

# jfly.uni-koeln.de/color: told apart with any common kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#767676"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, GREY)
LINES = ("-", "--", "-.", ":", (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v")
LEAST_TRIALS = 8  # of fewer a forest explains nothing
MOST_SLICES = 6
MOST_CURVES = 5
MOST_CLASSES_SHOWN = 20
BINS = 10


def importance(study: optuna.Study, job: TuningJob) -> dict[str, float]:
    """How much of the objective's variation each hyperparameter explains, the most first; by fANOVA over the complete
    trials, and nothing where they are too few or all alike."""
    complete = tonights_trials(study, TrialState.COMPLETE)
    if len(complete) < LEAST_TRIALS or len({trial.values[0] for trial in complete}) < 2:
        return {}
    try:
        found = optuna.importance.get_param_importances(
            study,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=job.seed),
            target=lambda trial: trial.values[0],
        )
    except (ValueError, RuntimeError):  # no hyperparameter that all of them have varies
        return {}
    return dict(found)


def history(study: optuna.Study, job: TuningJob) -> Figure | None:
    """Each complete trial's objective in the order of the night, and the best so far."""
    trials = sorted(tonights_trials(study, TrialState.COMPLETE), key=number_of)
    if not trials:
        return None
    figure, axes = _figure("trial", f"validation {job.search.objective}")
    numbers, values = [number_of(trial) for trial in trials], np.array([trial.values[0] for trial in trials])
    best = np.maximum.accumulate if job.objective.direction == "maximize" else np.minimum.accumulate
    axes.plot(numbers, values, linestyle="", marker="o", color=BLUE, markersize=4, label="a complete trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.step(numbers, best(values), where="post", color=VERMILION, label="the best so far")
    others = [number_of(trial) for trial in tonights_trials(study, TrialState.PRUNED, TrialState.FAIL)]
    if others:
        axes.plot(
            others, np.full(len(others), values.min()), linestyle="", marker="x", color=GREY, label="pruned or failed"
        )
    axes.legend()
    return figure


def importances(found: dict[str, float]) -> Figure | None:
    """A bar for each hyperparameter."""
    if not found:
        return None
    figure, axes = _figure("share of what explains the objective", "")
    names = list(found)[::-1]
    axes.barh(names, [found[name] for name in names], color=BLUE)
    return figure


def slices(study: optuna.Study, job: TuningJob, found: dict[str, float]) -> Figure | None:
    """The objective over each of the most important hyperparameters."""
    trials = tonights_trials(study, TrialState.COMPLETE)
    names = [name for name in found if sum(name in trial.params for trial in trials) > 1][:MOST_SLICES]
    if not names:
        return None
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(8, 2.4 * rows), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, 2, place + 1)
        some = [trial for trial in trials if name in trial.params]
        values: Any = [trial.params[name] for trial in some]
        if not isinstance(job.space.get(name), Range):
            values = [str(value) for value in values]
        axes.plot(values, [trial.values[0] for trial in some], linestyle="", marker="o", color=BLUE, markersize=4)
        if _is_log(job.space.get(name)):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())  # whose labels overlap
        axes.set_xlabel(name)
        axes.set_ylabel(job.search.objective)
        axes.grid(alpha=0.3)
    return figure


def best_with_curves(study: optuna.Study, job: TuningJob) -> list[FrozenTrial]:
    """Of the best trials those that have a curve: what was imported or infeasible has none."""
    best = ranked(tonights_trials(study, TrialState.COMPLETE), job)[:MOST_CURVES]
    return [trial for trial in best if trial.user_attrs.get(CURVE)]


def curves(study: optuna.Study, job: TuningJob) -> Figure | None:
    """How the best trials learned: the objective on validation rows after each epoch."""
    best = best_with_curves(study, job)
    if not best:
        return None
    figure, axes = _figure("epoch", f"validation {job.search.objective}")
    for place, trial in enumerate(best):
        epochs = [point[0] for point in trial.user_attrs[CURVE]]
        axes.plot(
            epochs, [point[3] for point in trial.user_attrs[CURVE]], linestyle=LINES[place], marker=MARKERS[place],
            markersize=3, color=COLOURS[place], label=f"trial {number_of(trial)}",
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def intermediate(study: optuna.Study, job: TuningJob) -> Figure | None:
    """Every trial's curve; those that were cut short end in a cross."""
    trials = [trial for trial in tonights_trials(study) if len(trial.user_attrs.get(CURVE, ())) > 0]
    if not trials:
        return None
    figure, axes = _figure("epoch", f"validation {job.search.objective}")
    shown = set()
    for trial in trials:
        is_whole = trial.state == TrialState.COMPLETE
        label = "complete" if is_whole else "pruned or failed"
        epochs, values = zip(*((point[0], point[3]) for point in trial.user_attrs[CURVE]), strict=True)
        axes.plot(
            epochs, values, color=BLUE if is_whole else VERMILION, alpha=0.4, linestyle="-" if is_whole else "--",
            marker="" if is_whole else "x", markevery=[-1], label=None if label in shown else label,
        )  # fmt: skip
        shown.add(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def contour(study: optuna.Study, job: TuningJob, found: dict[str, float]) -> Figure | None:
    """The objective over the two numbers that explain the most, between the trials interpolated on a plane."""
    names = [name for name in found if isinstance(job.space.get(name), Range)][:2]
    trials = [trial for trial in tonights_trials(study, TrialState.COMPLETE) if set(names) <= trial.params.keys()]
    if len(names) < 2 or len(trials) < LEAST_TRIALS:
        return None
    x, y = (_scaled([trial.params[name] for trial in trials], job.space[name]) for name in names)
    values = np.array([trial.values[0] for trial in trials])
    # Outliers, such as losses that nearly diverged, would leave one colour for all that matters.
    low, high = (
        np.quantile(values, [0.1, 1]) if job.objective.direction == "maximize" else np.quantile(values, [0, 0.9])
    )
    if low == high:
        return None
    colours = "cividis_r" if job.objective.direction == "maximize" else "cividis"
    figure, axes = _figure(*(_axis_name(name, job.space[name]) for name in names))
    with suppress(ValueError, RuntimeError):  # trials on one line make no plane
        axes.tricontourf(x, y, np.clip(values, low, high), levels=10, cmap=colours)
    points = axes.scatter(x, y, c=values, cmap=colours, vmin=low, vmax=high, edgecolors="white", s=36)
    figure.colorbar(points, ax=axes, label=f"validation {job.search.objective}")
    return figure


def parallel(study: optuna.Study, job: TuningJob, found: dict[str, float]) -> Figure | None:
    """A line a complete trial through its hyperparameters, each from the low to the high end of what was searched."""
    trials = ranked(tonights_trials(study, TrialState.COMPLETE), job)
    # Whoever lacks a hyperparameter, as a trial with sgd lacks a momentum, has no place on its axis.
    names = [name for name in found if name in job.space and all(name in trial.params for trial in trials)]
    if len(names) < 2 or len(trials) < LEAST_TRIALS:
        return None
    figure, axes = _figure("", "")
    axes.set_ylim(-0.05, 1.05)
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set_yticks([0, 1], ["low", "high"])
    best = max(1, len(trials) // 10)
    for place in reversed(range(len(trials))):
        is_best = place < best
        axes.plot(
            [_share(trials[place].params[name], job.space[name]) for name in names],
            color=VERMILION if is_best else GREY, alpha=1 if is_best else 0.25, linewidth=2 if is_best else 1,
            label="the best tenth" if place == 0 else "all others" if place == best else None,
        )  # fmt: skip
    axes.legend()
    return figure


def best_of_nights(earlier: Sequence[optuna.Study], job: TuningJob) -> tuple[list[str], list[float]]:
    """The nights' dates, and the best validation value of each; without those where no trial completed."""
    ranks = ((study, ranked(tonights_trials(study, TrialState.COMPLETE), job)) for study in earlier)
    found = [(study.study_name.removeprefix(f"{job.name}-"), best[0].values[0]) for study, best in ranks if best]
    return [date for date, _ in found], [value for _, value in found]


def nights(earlier: Sequence[optuna.Study], job: TuningJob) -> Figure | None:
    """The best validation value of each night of the same objective, the oldest first."""
    dates, values = best_of_nights(earlier, job)
    if len(dates) < 2:
        return None
    figure, axes = _figure("night", f"best validation {job.search.objective}")
    axes.plot(dates, values, marker="o", color=BLUE)
    axes.tick_params(axis="x", rotation=45)
    return figure


def class_counts(probabilities: NDArray[np.float64], target: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """How many rows of each class (first axis) are taken for each class (second axis)."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (target, probabilities.argmax(axis=1)), 1)
    return counts


def calibration(probabilities: NDArray[np.float64], target: NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """How sure the challenger is, in tenths that hold any row: its mean probability, and the share it is right on."""
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == target
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    there = [place for place in range(BINS) if (bins == place).any()]
    return [float(sure[bins == place].mean()) for place in there], [
        float(right[bins == place].mean()) for place in there
    ]


def confusion(probabilities: NDArray[np.float64], target: NDArray[np.int64], classes: Sequence[str]) -> Figure | None:
    """Of each class's rows the share that the challenger takes for each class."""
    if len(classes) > MOST_CLASSES_SHOWN:
        return None
    counts = class_counts(probabilities, target, len(classes))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = _figure("taken for", "is")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.grid(visible=False)
    for row in range(len(classes)):
        for column in range(len(classes)):
            if counts[row, column]:
                dark = shares[row, column] > 0.5
                text = str(counts[row, column])
                axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    return figure


def reliability(probabilities: NDArray[np.float64], target: NDArray[np.int64]) -> Figure:
    """How often the challenger is right where it is so sure."""
    figure, axes = _figure("how sure the challenger is", "share of rows that it is right on")
    axes.plot([0, 1], [0, 1], linestyle="--", color=GREY, label="as sure as right")
    axes.plot(*calibration(probabilities, target), marker="o", color=BLUE, label="the challenger")
    axes.legend()
    return figure


def residuals(values: NDArray[np.float64], target: NDArray[np.float32]) -> Figure:
    """What the challenger predicts beside what is."""
    figure, axes = _figure("predicted", "is")
    axes.plot(values, target, linestyle="", marker="o", markersize=3, color=BLUE, alpha=0.4)
    ends = [float(min(values.min(), target.min())), float(max(values.max(), target.max()))]
    axes.plot(ends, ends, linestyle="--", color=GREY)
    return figure


def as_svg(figure: Figure) -> bytes:
    """Draw a figure; the same one gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _scaled(values: list[float], domain: Domain) -> NDArray[np.float64]:
    """Powers of ten where the range is a logarithmic one."""
    return np.log10(values) if _is_log(domain) else np.asarray(values, dtype=np.float64)


def _axis_name(name: str, domain: Domain) -> str:
    return f"{name}, as a power of ten" if _is_log(domain) else name


def _share(value: Any, domain: Domain) -> float:
    """Where on its axis a value lies, from 0 to 1."""
    if isinstance(domain, Range):
        low, high, place = _scaled([domain.low, domain.high, value], domain)
        return float((place - low) / (high - low))
    choices = list(domain) if isinstance(domain, tuple) else [domain]
    return choices.index(value) / max(1, len(choices) - 1)


def _is_log(domain: Domain | None) -> bool:
    return isinstance(domain, Range) and domain.log
