"""The night itself is killed at each of its steps and between them; the next one goes on from there."""

import signal
from collections import Counter
from pathlib import Path

import pytest
from optuna.trial import TrialState

from infra.store.opening import open_store
from tasks.registry.log import history
from tasks.study.studies import finished_trials, is_interrupted, last_study
from tests.conftest import Stack
from tests.nights import assert_the_ledgers_agree, run_directly, run_script, study_of

JOB = """
name: {name}
data: {{source: 'sklearn://iris'}}
search: {{pruner: none, space: {{epochs: 2, batch_size: 64, width: [16, 32], depth: 1}}}}
budget: {{trials: 6, minutes: 10}}
confirm: {{candidates: 2, seeds: 2}}
schedule: {{cron: '0 2 1 1 *'}}
"""
KILLER = """
import os, signal
import flows.nightly as night
import flows.steps as steps

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

{moment}
night.nightly_tuning({name!r}, return_state=True)
"""
# Each night is killed at the next moment of its list, so that it first goes on from where the one before it died.
MOMENTS = {
    "outside of the search": {
        "before prepare": "night.prepare_step = kill",
        "before tune": "night.tune_step = kill",
        "before confirm": "night.confirm_step = kill",
        "before gate": "night.gate_step = kill",
        "after promote": "night._notify = kill",
    },
    "within a step": {
        "in tune": "import tasks.search.candidate; tasks.search.candidate.Candidate.tell = lambda *_: kill()",
        "between trials": "steps.TrialTracker.track = kill",
        "in confirm": "steps.track_confirmed = kill",
        "before promote": "night.promote_step = kill",
        "before report": "night.report_step = kill",
    },
}


@pytest.fixture(scope="module")
def undisturbed(stack: Stack) -> dict[str, object]:
    write_job(stack, "undisturbed")
    assert run_directly(stack, "undisturbed")[0] == "COMPLETED"
    return outcome_of(stack, "undisturbed")


def write_job(stack: Stack, name: str) -> None:
    (Path(stack.environment["NIGHTLY_JOBS"]) / f"{name}.yaml").write_text(JOB.format(name=name))


def outcome_of(stack: Stack, job: str) -> dict[str, object]:
    study = study_of(stack, job)
    promotions = history(open_store((stack.home / "store").as_uri()), job)
    best = max(study.get_trials(states=(TrialState.COMPLETE,)), key=lambda trial: trial.values[0])
    return {
        "finished": len(finished_trials(study)),
        "numbers": sorted(trial.user_attrs["number"] for trial in finished_trials(study)),
        "best": (best.params, best.values),
        "promotions": len(promotions),
        "states": Counter(trial.state.name for trial in finished_trials(study)),
    }


@pytest.mark.parametrize("where", MOMENTS)
def test_a_night_that_is_killed_anywhere_ends_as_one_that_was_not(
    stack: Stack, undisturbed: dict[str, object], where: str
) -> None:
    job = f"killed-{where.replace(' ', '-')}"
    write_job(stack, job)
    finished: dict[int, dict[str, object]] = {}
    for moment, killer in MOMENTS[where].items():
        killed = run_script(stack, KILLER.format(moment=killer, name=job))
        assert killed.returncode == -signal.SIGKILL, f"{moment}: {killed.stdout}{killed.stderr}"
        before, finished = finished, finished_of(stack, job)
        assert before.items() <= finished.items(), moment
    assert run_directly(stack, job)[0] == "COMPLETED"
    assert outcome_of(stack, job) == undisturbed
    assert_the_ledgers_agree(stack, job)
    interrupted = [trial for trial in study_of(stack, job).trials if is_interrupted(trial)]
    assert bool(interrupted) == ("in tune" in MOMENTS[where])


def finished_of(stack: Stack, job: str) -> dict[int, dict[str, object]]:
    """The hyperparameters of the finished trials by their number; none where a night was killed before its study."""
    study = last_study(job, stack.home / "studies")
    return {} if study is None else {trial.number: trial.params for trial in finished_trials(study)}
