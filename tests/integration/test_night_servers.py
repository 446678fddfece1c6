"""Nights that are robbed of their servers, or of their worker."""

import pytest

from tasks.champion import load_champion
from tasks.study import finished_trials
from tasks.tracking import TRIAL_NUMBER
from tests.conftest import Stack
from tests.nights import (
    assert_the_ledgers_agree,
    champion_alias,
    engine_of,
    latest_run,
    night_under_way,
    runs_of,
    service_of,
)
from tests.servers import wait_for


@pytest.fixture
def stack(breakable_stack: Stack) -> Stack:
    return breakable_stack


def test_a_night_goes_on_without_mlflow_and_the_next_one_makes_up_for_it(stack: Stack) -> None:
    study = night_under_way(stack, "untracked", trials=3)
    mlflow = service_of(stack, "mlflow")
    for process in (*mlflow.children(recursive=True), mlflow):
        process.kill()
    wait_for(lambda: latest_run(stack, "untracked")["state_type"] != "RUNNING", 240, "the night to end")
    assert latest_run(stack, "untracked")["state_type"] == "COMPLETED"
    assert len(finished_trials(study)) == 200
    champion = load_champion("untracked", (stack.home / "store").as_uri())
    stack.nightly("up")
    parent, nested = runs_of(stack, study)
    assert parent.info.status == "RUNNING"
    assert len(nested) == 200  # written without the server
    stack.nightly("run", "untracked", "--trials", "1")
    parent, nested = runs_of(stack, study)
    assert parent.info.status == "FINISHED"
    assert sorted(int(run.data.tags[TRIAL_NUMBER]) for run in nested) == list(range(200))
    assert champion_alias(stack, "untracked").tags["store_version"] == champion.manifest.version


def test_a_night_goes_on_without_prefect(stack: Stack) -> None:
    study = night_under_way(stack, "unwatched", trials=10)
    service_of(stack, "prefect").kill()
    before = len(finished_trials(study))
    wait_for(lambda: len(finished_trials(study)) >= before + 10, 180, "trials while Prefect is away")
    stack.nightly("up")
    wait_for(lambda: latest_run(stack, "unwatched")["state_type"] == "COMPLETED", 240, "the night to complete")
    assert len(finished_trials(study)) == 400
    assert_the_ledgers_agree(stack, "unwatched")


def test_a_night_that_dies_with_its_worker_is_marked_crashed(stack: Stack) -> None:
    """The automation on missing heartbeats does it; nothing else is left alive that could."""
    stack.nightly("run", "zombie", "--no-follow")
    wait_for(lambda: (stack.home / "studies/zombie").exists(), 180, "the night to begin")
    engine = engine_of(stack, "zombie")
    for process in (service_of(stack, "worker"), engine):
        process.kill()
    assert latest_run(stack, "zombie")["state_type"] == "RUNNING"
    wait_for(lambda: latest_run(stack, "zombie")["state_type"] == "CRASHED", 200, "the automation")
    stack.nightly("up")
