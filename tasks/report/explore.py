"""A night's plots to be turned and zoomed: what plots.py draws as pictures, on one HTML page that needs no network.

By plotly, and by Optuna's own plots where it has one.
"""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from numpy.typing import NDArray
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState, create_trial

from tasks.job import TuningJob
from tasks.report.plots import (
    BLUE,
    COLOURS,
    GREY,
    MOST_CLASSES_SHOWN,
    MOST_SLICES,
    best_of_nights,
    best_with_curves,
    calibration,
    class_counts,
)
from tasks.study.studies import number_of, tonights_trials
from tasks.tracking.trials import CURVE


def explore(
    study: optuna.Study,
    job: TuningJob,
    importance: Mapping[str, float],
    studies: Sequence[optuna.Study],
    predictions: NDArray[np.float64],
    target: NDArray[Any],
    classes: Sequence[str],
) -> str:
    """The page. `predictions` are the challenger's for the test rows, whose `target` is known: probabilities
    [rows, classes], or values [rows] where there are no classes; `studies` are the nights to compare, the oldest first.
    """
    figures = [*_search(study, job, importance), *_nights(studies, job)]
    figures += _classes(predictions, target, classes) if classes else _values(predictions, target)
    parts = [
        figure.update_layout(template="plotly_white", colorway=COLOURS).to_html(
            full_html=False, include_plotlyjs=place == 0
        )
        for place, figure in enumerate(figures)
    ]
    title = html.escape(study.study_name)
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>'
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def _search(study: optuna.Study, job: TuningJob, importance: Mapping[str, float]) -> Iterator[go.Figure]:
    name = f"validation {job.search.objective}"
    tonight = _alone(job, tonights_trials(study, TrialState.COMPLETE, TrialState.PRUNED))
    yield visualization.plot_optimization_history(tonight, target_name=name)
    best = go.Figure(layout_title_text="Learning Curves of the Best Trials")
    for trial in best_with_curves(study, job):
        numbers, values = zip(*((point[0], point[3]) for point in trial.user_attrs[CURVE]), strict=True)
        best.add_scatter(x=numbers, y=values, name=f"trial {number_of(trial)}")
    yield best.update_layout(xaxis_title="epoch", yaxis_title=name)
    yield visualization.plot_intermediate_values(tonight)
    if not importance:
        return
    yield go.Figure(
        go.Bar(x=list(importance.values())[::-1], y=list(importance)[::-1], orientation="h", marker_color=BLUE),
        layout_title_text="Hyperparameter Importances (fANOVA)",
    )
    names = list(importance)
    yield visualization.plot_parallel_coordinate(tonight, params=names, target_name=name)
    yield visualization.plot_slice(tonight, params=names[:MOST_SLICES], target_name=name)
    if len(names) > 1:
        yield visualization.plot_contour(tonight, params=names[:2], target_name=name)


def _alone(job: TuningJob, trials: Iterable[FrozenTrial]) -> optuna.Study:
    """A study of one objective with nothing but these trials: Optuna's plots would show imported ones too."""
    study = optuna.create_study(direction=job.objective.direction)
    study.add_trials(
        create_trial(
            state=trial.state,
            value=trial.values[0] if trial.state == TrialState.COMPLETE else None,
            params=trial.params,
            distributions=trial.distributions,
            intermediate_values={point[0]: point[3] for point in trial.user_attrs.get(CURVE, ())},
        )
        for trial in trials
    )
    return study


def _nights(studies: Sequence[optuna.Study], job: TuningJob) -> Iterator[go.Figure]:
    dates, values = best_of_nights(studies, job)
    if len(dates) > 1:
        figure = go.Figure(layout_title_text="Best Value of Each Night", layout_yaxis_title=job.search.objective)
        yield figure.add_scatter(x=dates, y=values, mode="lines+markers", line_color=BLUE)


def _classes(
    probabilities: NDArray[np.float64], target: NDArray[np.int64], classes: Sequence[str]
) -> Iterator[go.Figure]:
    if len(classes) <= MOST_CLASSES_SHOWN:
        counts = class_counts(probabilities, target, len(classes))
        names = [str(name) for name in classes]
        # Named as categories, or plotly would take digits for numbers.
        axis = {"type": "category"}
        figure = go.Figure(
            go.Heatmap(
                z=counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), x=names, y=names, text=counts,
                texttemplate="%{text}", colorscale="Blues", zmin=0, zmax=1,
            ),
            layout_title_text="Confusion Matrix of the Test Rows",
        )  # fmt: skip
        yield figure.update_layout(
            xaxis={**axis, "title": "taken for"}, yaxis={**axis, "title": "is", "autorange": "reversed"}
        )
    sure, right = calibration(probabilities, target)
    figure = go.Figure(layout_title_text="Reliability on the Test Rows")
    figure.add_scatter(x=[0, 1], y=[0, 1], name="as sure as right", line={"dash": "dash", "color": GREY})
    figure.add_scatter(x=sure, y=right, name="the challenger", mode="lines+markers", line_color=BLUE)
    yield figure.update_layout(xaxis_title="how sure", yaxis_title="share of rows it is right on")


def _values(values: NDArray[np.float64], target: NDArray[np.float64]) -> Iterator[go.Figure]:
    ends = [float(min(values.min(), target.min())), float(max(values.max(), target.max()))]
    figure = go.Figure(layout_title_text="Predicted and True Values of the Test Rows")
    figure.add_scatter(x=values, y=target, name="a row", mode="markers", marker={"color": BLUE, "opacity": 0.4})
    figure.add_scatter(x=ends, y=ends, name="as predicted", line={"dash": "dash", "color": GREY}, mode="lines")
    yield figure.update_layout(xaxis_title="predicted", yaxis_title="is")
