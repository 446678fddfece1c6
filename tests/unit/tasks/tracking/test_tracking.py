"""Where trials are written: into the server's own database where it lies here, and into no other's."""

import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState

from tasks.study.samplers import NUMBER
from tasks.study.studies import JOB, OBJECTIVE
from tasks.tracking.trials import CURVE, TrialTracker, nested_runs, track_missing_trials

Begun = tuple[MlflowClient, str, optuna.Study]


@pytest.fixture
def begun(tmp_path: Path, empty_mlflow: Path) -> Begun:
    """A server, a night's run there, and the night's study."""
    shutil.copy(empty_mlflow, tmp_path / "server.db")
    server = MlflowClient(f"sqlite:///{tmp_path / 'server.db'}")
    night = server.create_run(server.create_experiment("job")).info.run_id
    study = optuna.create_study()
    study.set_user_attr(JOB, "job")
    study.set_user_attr(OBJECTIVE, ["accuracy", "none"])
    return server, night, study


@pytest.mark.parametrize("holds_the_night", [True, False])
def test_a_database_is_written_to_if_it_holds_the_night(
    begun: Begun, empty_mlflow: Path, tmp_path: Path, holds_the_night: bool
) -> None:
    server, night, study = begun
    files = [tmp_path / "server.db", tmp_path / "other.db"]
    shutil.copy(empty_mlflow, files[1])
    other = MlflowClient(f"sqlite:///{files[1]}")
    other.create_experiment("job")
    trial = study.ask({"learning_rate": optuna.distributions.FloatDistribution(0.1, 1)})
    trial.set_user_attr(NUMBER, 0)
    trial.set_user_attr(CURVE, [[1, 0.5, 0.4, 0.9], [2, 0.3, 0.3, 0.95]])
    finished = study.tell(trial, 0.95)
    with TrialTracker(server, night, files[0] if holds_the_night else files[1]) as tracker:
        tracker.track(study, finished)
    (run,) = nested_runs(server, night)
    assert tracker.run_ids == {0: run.info.run_id}
    assert run.info.status == "FINISHED"
    assert [point.value for point in server.get_metric_history(run.info.run_id, "val_accuracy")] == [0.9, 0.95]
    assert run.data.params == {"learning_rate": str(finished.params["learning_rate"])}
    assert other.search_runs(["1"]) == []


def test_while_it_is_paused_no_trial_is_begun_to_be_written(begun: Begun, tmp_path: Path) -> None:
    server, night, study = begun
    with TrialTracker(server, night, tmp_path / "none.db") as tracker, tracker.paused(nullcontext()):
        for number in range(2):
            trial = study.ask()
            trial.set_user_attr(NUMBER, number)
            tracker.track(study, study.tell(trial, 0.5))
        time.sleep(0.5)
        assert list(nested_runs(server, night)) == []
    assert sorted(tracker.run_ids) == [0, 1]
    assert len(list(nested_runs(server, night))) == 2


def test_mlflow_is_not_asked_for_what_has_been_written(begun: Begun, tmp_path: Path) -> None:
    server, night, study = begun
    for number, state in ((0, TrialState.FAIL), (0, TrialState.COMPLETE), (1, TrialState.COMPLETE)):
        trial = study.ask()
        trial.set_user_attr(NUMBER, number)
        study.tell(trial, 0.5 if state == TrialState.COMPLETE else None, state)
    nowhere = MlflowClient(f"sqlite:///{tmp_path / 'no' / 'such.db'}")
    assert track_missing_trials(nowhere, night, study, written=[1, 2]) == 0
    assert track_missing_trials(server, night, study, written=[2]) == 2
    assert track_missing_trials(server, night, study) == 0


def test_where_there_is_no_database_none_is_made(begun: Begun, tmp_path: Path) -> None:
    server, night, _ = begun
    with TrialTracker(server, night, tmp_path / "none.db"):
        pass
    assert not (tmp_path / "none.db").exists()
