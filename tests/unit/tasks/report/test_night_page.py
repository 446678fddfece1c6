"""The night on one page: whole without a network, safe whatever stands in data and errors, and useful on odd nights."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from models.evaluation.evaluate import predict_outputs, predictions_of
from tasks.data.drift import Change
from tasks.data.prepared import Prepared
from tasks.job import BudgetConfig, TuningJob
from tasks.promotion.confirm import Confirmed, confirm
from tasks.promotion.verdict import Verdict
from tasks.report import plots
from tasks.report.explore import explore
from tasks.report.page import advices_of, costs_of, night_page, regions_of
from tasks.search.candidate import trained_seconds
from tasks.search.tune import Tuned, tune
from tasks.study.samplers import NUMBER
from tasks.study.studies import FAILURE, open_study
from tasks.trainer.local import LocalTrainer
from tests.conftest import CPU, make_job
from tests.unit.tasks.promotion.test_gate import make_challenger, verdict_of
from tests.unit.tasks.search.test_tune import NOW

MOST_BYTES = 3_000_000


class Tags(HTMLParser):
    """Every tag with its attributes, and that each is closed again."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def night(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuningJob, optuna.Study, Verdict]:
    space = {"epochs": 3, "batch_size": [64, 256], "width": [16, 32]}
    job = make_job(
        budget={"trials": 12}, confirm={"candidates": 1, "seeds": 1}, search={"pruner": "none", "space": space}
    )
    study = open_study(job, prepared.snapshot.fingerprint, tmp_path_factory.mktemp("night"), NOW)
    tune(study, job, LocalTrainer(job, prepared), tmp_path_factory.mktemp("checkpoints"))
    challenger = confirm(study, job, prepared).challenger
    return job, study, verdict_of(challenger, None, prepared.snapshot, job, make_challenger(prepared, 1))


@pytest.fixture(scope="module")
def rows_judged(night: tuple[TuningJob, optuna.Study, Verdict], prepared: Prepared) -> tuple[Any, Any]:
    """What the challenger makes of them, and what they are."""
    _, _, verdict = night
    served = torch.nn.Sequential(verdict.challenger.preprocessing, verdict.challenger.model)
    predictions = predictions_of(predict_outputs(served, prepared.snapshot.features("test", CPU)))
    return predictions, prepared.snapshot.target("test", CPU).numpy()


BEST = create_trial(value=1.0)
TUNED = Tuned(best=BEST, baseline=None, complete=12, pruned=0, failed=0, ended_by="trials", idle_seconds=36)


def page_of(
    night: tuple[TuningJob, optuna.Study, Verdict], summary: str = "# a night", moved: tuple[Change, ...] = ()
) -> str:
    job, study, verdict = night
    found = plots.importance(study, job)
    drawn = {
        "history": plots.history(study, job), "importance": plots.importances(found),
        "slices": plots.slices(study, job, found), "curves": plots.curves(study, job),
        "contour": plots.contour(study, job, found), "parallel": plots.parallel(study, job, found),
        "intermediate": plots.intermediate(study, job),
    }  # fmt: skip
    costs = costs_of(job, study, TUNED, Confirmed(challenger=verdict.challenger, baseline=None, seconds=720))
    kept = {name: plots.as_svg(figure) for name, figure in drawn.items() if figure is not None}
    return night_page(job, study, summary, verdict, moved, found, kept, costs)


def test_the_page_needs_no_network_is_small_and_well_formed(night: tuple[TuningJob, optuna.Study, Verdict]) -> None:
    page = page_of(
        night, "# a night\n\n| a | b |\n| --- | --- |\n| 1 | [MLflow](http://127.0.0.1:5001/#/experiments/1) |\n"
    )
    assert len(page.encode()) < MOST_BYTES
    tags = Tags(page)
    assert tags.open == []
    names = [tag for tag, _ in tags.found]
    assert names.count("img") == 7
    assert {"script", "link", "iframe"}.isdisjoint(names)
    for tag, attributes in tags.found:
        if tag == "img":
            assert str(attributes["src"]).startswith("data:image/svg+xml;base64,")
            assert attributes["alt"]
    assert names.count("h1") == 1
    assert {"What to do next", "What the search learned", "What it cost"} <= set(re.findall(r"<h2>(.*?)</h2>", page))


def test_the_devices_hours_are_counted_by_what_they_went_into_and_in_money(
    night: tuple[TuningJob, optuna.Study, Verdict],
) -> None:
    job, study, verdict = night
    costs = costs_of(job, study, TUNED, Confirmed(challenger=verdict.challenger, baseline=None, seconds=720))
    hours = {cost.outcome: cost.hours for cost in costs}
    assert (hours["confirmed"], hours["idle"]) == (0.2, 0.01)
    assert hours["useful"] == pytest.approx(trained_seconds(study) / 3600)
    assert hours["all"] == pytest.approx(sum(value for name, value in hours.items() if name != "all"))
    assert "An hour costs" not in page_of(night)
    priced = job.model_copy(update={"budget": BudgetConfig(price_per_hour=2.5, max_cost=4)})
    page = page_of((priced, study, verdict))
    assert "An hour costs 2.5; the search may cost 4.0 at most." in page
    assert "<td>0.200</td>\n<td>0.50</td>" in page


def test_the_plots_to_explore_hold_the_night_and_need_no_network(
    night: tuple[TuningJob, optuna.Study, Verdict], rows_judged: tuple[Any, Any], prepared: Prepared, tmp_path: Path
) -> None:
    job, study, _ = night
    predictions, target = rows_judged
    classes = prepared.snapshot.classes
    page = explore(study, job, plots.importance(study, job), [study, study], predictions, target, classes)
    assert "plotly.js v" in page
    assert re.search(r"<script[^>]* src=", page) is None
    for title in (
        "Optimization History", "Intermediate Values", "Parallel Coordinate", "Slice", "Contour", "Importances",
        "Learning Curves", "Confusion Matrix", "Reliability", "Best Value of Each Night",
    ):  # fmt: skip
        assert title in page, title
    empty = open_study(job, "f" * 32, tmp_path, NOW)
    page = explore(empty, job, plots.importance(empty, job), [], predictions[:, 0], target.astype("float32"), [])
    assert "Predicted and True Values" in page
    assert "Importances" not in page


def test_what_stands_in_data_and_errors_is_shown_and_not_run(
    night: tuple[TuningJob, optuna.Study, Verdict], tmp_path: Path
) -> None:
    job, _, verdict = night
    evil = "<script>alert(1)</script>"
    study = open_study(job, "f" * 32, tmp_path, NOW)
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={FAILURE: evil, NUMBER: 0}))
    moved = (Change(column=evil, stability_index=1.0, missing_before=0, missing_now=0),)
    page = page_of((job, study, verdict), f"# {evil}\n\n| a |\n| --- |\n| {evil} |\n", moved)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 4
    assert "Too few trials completed to tell." in page


def test_a_range_whose_end_is_best_is_to_be_widened(
    night: tuple[TuningJob, optuna.Study, Verdict], tmp_path: Path
) -> None:
    _, _, verdict = night
    space = {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
    job = make_job(search={"space": space}, budget={"trials": 60})
    study = open_study(job, "f" * 32, tmp_path, NOW)
    rates = FloatDistribution(1e-4, 1e-1, log=True)
    for number in range(30):
        rate = 1e-4 * 10 ** (number / 10)
        study.add_trial(
            create_trial(
                value=1 - number / 100, params={"learning_rate": rate}, distributions={"learning_rate": rates},
                user_attrs={NUMBER: number},
            )
        )  # fmt: skip
    (region,) = regions_of(study, job, {})
    assert (region.name, region.edge, region.searched) == ("learning_rate", "low", "0.0001 to 0.1")
    advices = advices_of(job, study, replace(verdict, decision="PROMOTE"), (), [region])
    assert "Widen search.space.learning_rate: the best trials lie at its low end (0.0001)." in advices
    assert "The budget's 60 trials were not reached: give it more minutes." in advices
    assert plots.importance(study, job) == {"learning_rate": 1.0}


def test_what_cannot_go_lower_is_not_to_be_widened(
    night: tuple[TuningJob, optuna.Study, Verdict], tmp_path: Path
) -> None:
    job = make_job(search={"space": {"dropout": {"low": 0.0, "high": 0.5}}}, budget={"trials": 60})
    study = open_study(job, "f" * 32, tmp_path, NOW)
    dropouts = FloatDistribution(0.0, 0.5)
    for number in range(30):
        study.add_trial(
            create_trial(
                value=1 - number / 100, params={"dropout": number / 60}, distributions={"dropout": dropouts},
                user_attrs={NUMBER: number},
            )
        )  # fmt: skip
    (region,) = regions_of(study, job, {})
    assert (region.best, region.edge) == ("0 to 0.0333", None)


def test_the_test_rows_are_drawn_for_classes_and_for_numbers(
    night: tuple[TuningJob, optuna.Study, Verdict], rows_judged: tuple[Any, Any], prepared: Prepared
) -> None:
    predictions, target = rows_judged
    assert plots.confusion(predictions, target, prepared.snapshot.classes) is not None
    counts = plots.class_counts(predictions, target, 10)
    assert counts.sum() == len(target)
    assert counts.trace() == (predictions.argmax(axis=1) == target).sum()
    assert plots.confusion(predictions, target, [str(number) for number in range(30)]) is None
    assert plots.reliability(predictions, target).axes
    assert plots.residuals(predictions[:, 0], target.astype("float32")).axes
    study = night[1]
    assert plots.nights([study], night[0]) is None
    assert plots.nights([study, study], night[0]) is not None
