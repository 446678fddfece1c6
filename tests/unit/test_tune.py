"""The search: its budget, its failures, and an interruption that changes nothing."""

import itertools
import math
from datetime import UTC, datetime
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

import tasks.tune
from models.hyperparameters import suggest
from models.solo import train
from tasks.confirm import confirm
from tasks.job import TuningJob
from tasks.study import ENDED, FAILURE, ask, finished_trials, is_interrupted, last_study, open_study
from tasks.tracking import CURVE
from tasks.tune import Prepared, TuningFailed, tune
from tests.conftest import make_job

NOW = datetime(2026, 11, 23, 2, 0, tzinfo=UTC)


def open_for(job: TuningJob, prepared: Prepared, studies: Path, now: datetime = NOW) -> optuna.Study:
    return open_study(job, prepared.snapshot.fingerprint, studies, now)


def outcomes(study: optuna.Study) -> list[tuple[object, ...]]:
    return [
        (trial.state, trial.params, trial.values, trial.user_attrs[CURVE])
        for trial in study.trials
        if not is_interrupted(trial)
    ]


def test_the_budget_of_trials_is_kept(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job()
    study = open_for(job, prepared, tmp_path)
    tuned = tune(study, job, prepared)
    assert (tuned.complete + tuned.pruned, tuned.failed, tuned.ended_by) == (4, 0, "trials")
    assert tuned.best.number == study.best_trial.number


def test_the_budget_of_minutes_is_kept(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job(budget={"trials": 50, "minutes": 1})
    clock = itertools.count(0, 25.0)
    tuned = tune(open_for(job, prepared, tmp_path), job, prepared, clock=lambda: next(clock))
    assert (tuned.complete + tuned.pruned, tuned.ended_by) == (2, "minutes")


def test_the_same_job_on_the_same_data_gives_the_same_trials(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job(budget={"trials": 14})
    studies = [open_for(job, prepared, tmp_path / name) for name in ("one", "two")]
    for study in studies:
        tune(study, job, prepared)
    assert outcomes(studies[0]) == outcomes(studies[1])
    one, two = (confirm(study, job, prepared) for study in studies)
    assert (one.trial.number, one.seed, one.validation) == (two.trial.number, two.seed, two.validation)


def test_an_interrupted_night_ends_as_one_that_was_not(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job(budget={"trials": 14})
    undisturbed = open_for(job, prepared, tmp_path / "undisturbed")
    tune(undisturbed, job, prepared)

    class Stop(BaseException):
        pass

    def stop_after(count: int) -> None:
        study = open_for(job, prepared, tmp_path / "disturbed")
        seen: list[FrozenTrial] = []

        def on_trial(trial: FrozenTrial) -> None:
            seen.append(trial)
            if len(seen) == count:
                ask(study, job)  # a kill leaves a trial RUNNING
                raise Stop

        with pytest.raises(Stop):
            tune(study, job, prepared, on_trial=on_trial)

    stop_after(5)
    stop_after(6)
    resumed = open_for(job, prepared, tmp_path / "disturbed")
    tune(resumed, job, prepared)
    assert outcomes(resumed) == outcomes(undisturbed)
    assert len([trial for trial in resumed.trials if is_interrupted(trial)]) == 2
    assert not resumed.get_trials(states=(TrialState.RUNNING,))


def test_an_interruption_in_the_middle_of_a_trial_is_told(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    study = open_for(job, prepared, tmp_path)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks.tune, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(study, job, prepared)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]
    assert is_interrupted(study.trials[0])


def test_a_configuration_that_kills_its_process_twice_is_given_up(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job(budget={"trials": 3})
    for _ in range(2):
        study = open_for(job, prepared, tmp_path)
        suggest(ask(study, job), job.family.hyperparameters, job.space)
    study = open_for(job, prepared, tmp_path)
    assert len(finished_trials(study)) == 1
    assert tune(study, job, prepared).failed == 1


def test_an_ended_night_is_not_continued(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job()
    open_for(job, prepared, tmp_path).set_user_attr(ENDED, "yes")
    assert open_for(job, prepared, tmp_path, NOW.replace(day=24)).study_name == "small-20261124-020000"


@pytest.mark.parametrize("change", [{"seed": 1}, {"search": {"sampler": "random"}}])
def test_a_night_of_a_changed_job_begins_anew(prepared: Prepared, tmp_path: Path, change: dict[str, object]) -> None:
    first = open_for(make_job(), prepared, tmp_path)
    second = open_for(make_job(**change), prepared, tmp_path, NOW.replace(day=24))
    assert first.study_name != second.study_name


def test_a_journal_without_a_study_is_passed_over(prepared: Prepared, tmp_path: Path) -> None:
    study = open_for(make_job(), prepared, tmp_path)
    (tmp_path / "small" / "small-20991231-000000.journal").touch()
    found = last_study("small", tmp_path)
    assert found is not None
    assert found.study_name == study.study_name


def test_a_diverging_trial_fails_with_its_reason_and_no_number(prepared: Prepared, tmp_path: Path) -> None:
    space = {"learning_rate": [1e30, 1e-3], "optimizer": "sgd", "epochs": 2, "batch_size": 64, "width": 16}
    job = make_job(search={"space": space, "sampler": "random"}, budget={"trials": 8})
    study = open_for(job, prepared, tmp_path)
    tuned = tune(study, job, prepared)
    failed = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert tuned.failed == len(failed) > 0
    for trial in failed:
        assert trial.user_attrs[FAILURE].startswith("diverged at epoch")
        assert trial.values is None
        assert trial.params["learning_rate"] == 1e30
    for trial in study.trials:
        assert all(math.isfinite(value) for value in trial.intermediate_values.values())


def test_a_night_without_a_complete_trial_says_why(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job(search={"space": {"learning_rate": 1e30, "optimizer": "sgd"}}, budget={"trials": 2})
    with pytest.raises(TuningFailed, match="none of 2 trials of small completed; the first failed with: diverged"):
        tune(open_for(job, prepared, tmp_path), job, prepared)


def test_a_broken_model_costs_its_trial_and_not_the_night(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    honest, calls = train, itertools.count()

    def broken_once(*args: object, **options: object) -> object:
        if next(calls) == 0:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return honest(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(tasks.tune, "train", broken_once)
    study = open_for(job, prepared, tmp_path)
    assert tune(study, job, prepared).failed == 1
    assert study.trials[0].user_attrs[FAILURE] == "RuntimeError: mat1 and mat2 shapes cannot be multiplied"


def test_confirm_never_sees_a_test_row_and_trains_with_a_fresh_seed(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job()
    study = open_for(job, prepared, tmp_path)
    tune(study, job, prepared)
    challenger = confirm(study, job, prepared)
    assert challenger.trial.state == TrialState.COMPLETE
    assert challenger.hyperparameters.model_dump().items() >= challenger.trial.params.items()
    assert set(vars(prepared)) == {"snapshot", "preprocessing", "training", "validation"}
