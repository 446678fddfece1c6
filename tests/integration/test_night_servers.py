"""A night that is robbed of its servers."""

from pathlib import Path

from tasks.registry.champion import load_champion
from tasks.study.studies import finished_trials
from tasks.tracking.trials import TRIAL_NUMBER
from tests.commands import nightly
from tests.conftest import Stack
from tests.held import write_held_job
from tests.nights import champion_alias, latest_run, let_trials_end, night_under_way, run_directly, runs_of, service_of
from tests.servers import wait_for

JOB, TRIALS = "robbed", 24


def test_a_night_goes_on_without_prefect_then_without_mlflow_and_the_next_one_makes_up_for_it(
    breakable_stack: Stack,
) -> None:
    stack = breakable_stack
    gate = write_held_job(Path(stack.environment["NIGHTLY_JOBS"]), JOB, trials=TRIALS)
    nightly(stack, "apply")
    study = night_under_way(stack, JOB, gate, trials=1)
    prefect, mlflow = service_of(stack, "prefect"), service_of(stack, "mlflow")

    prefect.kill()
    let_trials_end(study, gate, trials=len(finished_trials(study)) + 1)
    stack.nightly("up")

    for process in (*mlflow.children(recursive=True), mlflow):
        process.kill()
    gate.open()
    wait_for(lambda: latest_run(stack, JOB)["state_type"] != "RUNNING", 300, "the night to end")
    assert latest_run(stack, JOB)["state_type"] == "COMPLETED"
    assert len(finished_trials(study)) == TRIALS
    champion = load_champion(JOB, (stack.home / "store").as_uri())

    stack.nightly("up")
    parent, nested = runs_of(stack, study)
    assert parent.info.status == "RUNNING"
    assert len(nested) == TRIALS  # written without the server
    assert run_directly(stack, JOB, {"trials": 1})[0] == "COMPLETED"
    parent, nested = runs_of(stack, study)
    assert parent.info.status == "FINISHED"
    assert sorted(int(run.data.tags[TRIAL_NUMBER]) for run in nested) == list(range(TRIALS))
    assert champion_alias(stack, JOB).tags["store_version"] == champion.manifest.version
