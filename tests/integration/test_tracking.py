"""What becomes of a night's trials while MLflow's server is away."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient

from tasks.study.samplers import NUMBER
from tasks.study.studies import JOB, MLFLOW_RUN, OBJECTIVE
from tasks.tracking.trials import TRIAL_NUMBER, TrialTracker, nested_runs, track_missing_trials
from tests.servers import answers, background, free_port, wait_for


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[MlflowClient]:
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with background([*command, "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"], folder / "log"):
        wait_for(lambda: answers(f"{url}/health"), 60, "MLflow")
        yield MlflowClient(url)


def test_trials_that_a_server_missed_are_written_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    port = free_port()
    study = optuna.create_study()
    study.set_user_attr(JOB, "job")
    study.set_user_attr(OBJECTIVE, ["accuracy", "none"])

    def track(tracker: TrialTracker, number: int) -> None:
        trial = study.ask()
        trial.set_user_attr(NUMBER, number)
        tracker.track(study, study.tell(trial, 0.5))

    with mlflow_server(tmp_path, port) as client:
        night = client.create_run(client.create_experiment("job")).info.run_id
        study.set_user_attr(MLFLOW_RUN, night)
        tracker = TrialTracker(client, night, tmp_path / "none.db")
        track(tracker, 0)
        wait_for(lambda: tracker.run_ids, 30, "the first trial's run")
    with tracker:
        for number in (1, 2):
            track(tracker, number)
    assert "MLflow misses trial 1 and those after it until the next night" in caplog.text
    assert list(tracker.run_ids) == [0]
    with mlflow_server(tmp_path, port) as client:
        assert track_missing_trials(client, night, study) == 2
        assert track_missing_trials(client, night, study) == 0
        runs = list(nested_runs(client, night))
    assert sorted(run.data.tags[TRIAL_NUMBER] for run in runs) == ["0", "1", "2"]
    assert {run.info.status for run in runs} == {"FINISHED"}
