"""What a person meets in a real browser: Prefect's form, the night in Prefect, its way into MLflow, its own page."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from mlflow import MlflowClient
from playwright.sync_api import Browser, Locator, Page, expect

from tasks.job import load_job
from tests.browser.conftest import open_page
from tests.conftest import Stack
from tests.nights import latest_run, study_of
from tests.servers import wait_for

JOB = "digits-mlp"
TRIALS = 24
NIGHT_SECONDS = 240

Picture = Callable[[Page, str], None]


@pytest.fixture(scope="module")
def night(stack: Stack, browser: Browser, picture: Picture) -> str:
    """The id of a night that was started from Prefect's form with a changed number of trials, and is done."""
    with open_page(browser) as page:
        trials = _run_form(stack, page)
        expect(page.locator("textarea").first).to_have_value(JOB)
        trials.fill(str(TRIALS))
        picture(page, "run-form")
        page.get_by_role("button", name="Submit").click()
        page.wait_for_url(re.compile(r"/deployments/deployment/[\w-]+(\?tab=Runs)?$"))
    wait_for(lambda: latest_run(stack, JOB)["state_type"] in ("COMPLETED", "FAILED"), NIGHT_SECONDS, "the night to end")
    run = latest_run(stack, JOB)
    assert (run["state_type"], run["parameters"]["trials"]) == ("COMPLETED", TRIALS)  # type: ignore[index]
    return str(run["id"])


def test_a_number_out_of_bounds_is_refused_by_the_form(stack: Stack, page: Page) -> None:
    before = len(stack.flow_runs(JOB))
    trials = _run_form(stack, page)
    expect(page.get_by_text("How many finished trials end the tuning: 1 to 100,000.")).to_be_visible()
    trials.fill("200000")
    page.get_by_role("button", name="Submit").click()
    refusal = "Validation failed for field 'trials'. Failure reason: 200000 is greater than the maximum of 100000"
    expect(page.get_by_text(refusal).first).to_be_visible()
    assert len(stack.flow_runs(JOB)) == before


def test_prefect_shows_the_night_and_leads_to_its_trials_in_mlflow(
    stack: Stack, night: str, page: Page, picture: Picture
) -> None:
    page.goto(f"{_prefect(stack)}/runs/flow-run/{night}")
    expect(page.get_by_text(f"{TRIALS} trials", exact=False).first).to_be_visible()
    page.get_by_text("Artifacts", exact=True).click()
    expect(page.get_by_text("Trials, plots and models")).to_be_visible()
    page.get_by_text("Logs", exact=True).click()
    expect(page.get_by_text("this night in MLflow: http", exact=False).first).to_be_visible()
    picture(page, "prefect-night")
    (best,) = stack.prefect("artifacts/filter", artifacts=_of(night, f"nightly-tuner-trials-{JOB}"))
    page.goto(f"{_prefect(stack)}/artifacts/artifact/{best['id']}")
    link = page.locator("table a").first
    number = int(link.inner_text())
    with page.expect_popup() if link.get_attribute("target") == "_blank" else page.expect_navigation():
        link.click()
    opened = page.context.pages[-1]
    expect(opened.get_by_role("heading", name=f"trial {number:03}")).to_be_visible()
    opened.get_by_text("Model metrics", exact=True).click()
    expect(opened.get_by_role("heading", name="train_loss")).to_be_visible()


def test_mlflow_shows_the_trials_the_plots_and_the_champion(
    stack: Stack, night: str, page: Page, picture: Picture
) -> None:
    client = MlflowClient(stack.mlflow_url)
    study = study_of(stack, JOB)
    run_id, experiment_id = study.user_attrs["mlflow_run_id"], study.user_attrs["mlflow_experiment_id"]
    experiment = f"{stack.mlflow_url}/#/experiments/{experiment_id}/runs"
    page.goto(f"{experiment}?workflowType=machine_learning")
    _close_assistant(page)
    page.get_by_text(study.study_name).first.wait_for()
    page.locator("[role=gridcell] button").first.click()  # unfolds the night
    expect(page.get_by_text(f"trial {TRIALS - 1:03}")).to_be_visible()
    picture(page, "mlflow-trials")
    page.goto("about:blank")  # MLflow looks at an address only as it loads
    page.goto(f"{experiment}/{run_id}/artifacts/plots/explore.html?workflowType=machine_learning")
    plot = page.frame_locator("iframe").get_by_text("Parallel Coordinate Plot")
    plot.wait_for()
    page.goto("about:blank")
    page.goto(f"{stack.mlflow_url}/#/models/{JOB}")
    expect(page.get_by_text("champion", exact=False).first).to_be_visible()
    assert client.get_run(run_id).data.metrics["device_hours_useful"] > 0


def test_the_nights_page_is_whole_and_shuts_nobody_out(
    stack: Stack, night: str, page: Page, picture: Picture, tmp_path: Path
) -> None:
    client = MlflowClient(stack.mlflow_url)
    run_id = study_of(stack, JOB).user_attrs["mlflow_run_id"]
    file = Path(client.download_artifacts(run_id, "report.html", str(tmp_path)))
    page.context.set_offline(True)
    page.goto(file.as_uri())
    pictures = page.locator("img")
    assert pictures.count() >= 9
    assert all(image.evaluate("image => image.complete && image.naturalWidth > 0") for image in pictures.all())
    picture(page, "night-page")
    found = Axe().run(page).response["violations"]
    assert [(one["id"], one["impact"]) for one in found if one["impact"] in ("serious", "critical")] == []


def _prefect(stack: Stack) -> str:
    return stack.prefect_api.removesuffix("/api")


def _run_form(stack: Stack, page: Page) -> Locator:
    """Open a job's form as a person does; returns the field for its trials."""
    (deployment,) = stack.prefect("deployments/filter", deployments={"name": {"any_": [JOB]}})
    page.goto(f"{_prefect(stack)}/deployments/deployment/{deployment['id']}")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    trials = page.locator("input[type=number]").first
    expect(trials).to_have_value(str(load_job(JOB, None).budget.trials))
    return trials


def _of(night: str, key: str) -> dict[str, object]:
    return {"flow_run_id": {"any_": [night]}, "key": {"any_": [key]}}


def _close_assistant(page: Page) -> None:
    """MLflow opens it by itself, over a third of the page."""
    panel = "[data-component-id^='mlflow.assistant.chat_panel.']"
    page.locator(f"{panel}[data-component-id$='close']").first.click()
