"""Whole nights of models that are others once they are loaded: one ends before its search, one rejects its winner."""

from pathlib import Path

from infra.store.opening import open_store
from tasks.registry.log import history
from tasks.study.studies import finished_trials
from tests.conftest import Stack
from tests.nights import reports_of, run_directly, runs_of, study_of
from tests.unit.models.test_families import write_net
from tests.unit.tasks.promotion.test_loaded_back import COUNTER, LATE

JOB = """
name: {name}
data: {{source: 'sklearn://digits'}}
model: {model}
search: {{pruner: none, space: {{epochs: 2, batch_size: 64}}}}
budget: {{trials: 3, minutes: 10}}
confirm: {{candidates: 1, seeds: 2}}
schedule: {{cron: '0 2 1 1 *'}}
"""


def write_job(stack: Stack, name: str, folder: Path, net: str) -> None:
    jobs = Path(stack.environment["NIGHTLY_JOBS"])
    (jobs / f"{name}.yaml").write_text(JOB.format(name=name, model=write_net(folder, net)))


def test_a_model_that_would_not_ship_costs_no_trial(stack: Stack, tmp_path: Path) -> None:
    write_job(stack, "unshippable", tmp_path, COUNTER)
    kind, message = run_directly(stack, "unshippable")
    assert kind == "FAILED"
    assert "cannot be published as it is trained, so the night stops before its search" in message
    assert "state outside its state_dict" in message
    study = study_of(stack, "unshippable")
    assert study.trials == []
    assert runs_of(stack, study)[0].info.status == "FAILED"


def test_what_is_another_model_once_it_is_loaded_is_rejected_everywhere(stack: Stack, tmp_path: Path) -> None:
    write_job(stack, "otherwise", tmp_path, LATE)
    assert run_directly(stack, "otherwise")[0] == "COMPLETED"
    assert history(open_store((stack.home / "store").as_uri()), "otherwise") == []
    study = study_of(stack, "otherwise")
    assert len(finished_trials(study)) == 3
    night = runs_of(stack, study)[0]
    assert (night.data.tags["verdict"], night.data.tags["promoted"]) == ("REJECT", "no")
    assert "loaded in a fresh process, the model gives other outputs" in night.data.tags["mlflow.note.content"]
    (report,) = reports_of(stack, "otherwise")
    assert report.startswith("# otherwise: no champion yet (REJECT)")
