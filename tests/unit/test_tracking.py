"""Where trials are written: into the server's own database where it lies here, and into no other's."""

from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient

from tasks.samplers import NUMBER
from tasks.study import JOB, OBJECTIVE
from tasks.tracking import CURVE, TrialTracker, nested_runs


@pytest.mark.parametrize("holds_the_night", [True, False])
def test_a_database_is_written_to_if_it_holds_the_night(tmp_path: Path, holds_the_night: bool) -> None:
    files = [tmp_path / "server.db", tmp_path / "other.db"]
    server, other = (MlflowClient(f"sqlite:///{file}") for file in files)
    for client in (server, other):
        client.create_experiment("job")
    night = server.create_run("1").info.run_id
    study = optuna.create_study()
    study.set_user_attr(JOB, "job")
    study.set_user_attr(OBJECTIVE, ["accuracy", "none"])
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


def test_where_there_is_no_database_none_is_made(tmp_path: Path) -> None:
    server = MlflowClient(f"sqlite:///{tmp_path / 'server.db'}")
    night = server.create_run(server.create_experiment("job")).info.run_id
    with TrialTracker(server, night, tmp_path / "none.db"):
        pass
    assert not (tmp_path / "none.db").exists()
