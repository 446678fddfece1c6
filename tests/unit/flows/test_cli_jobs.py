"""The commands about jobs that need no servers: a job file written after a few questions, and what a machine lacks."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flows.cli.main import app
from infra.errors import ExpectedError
from tasks.job import load_job
from tests.conftest import make_stack
from tests.servers import free_port


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of jobs, and an environment that commands may change."""
    before = dict(os.environ)
    monkeypatch.setenv("NIGHTLY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NIGHTLY_JOBS", str(tmp_path / "jobs"))
    (tmp_path / "jobs").mkdir()
    yield tmp_path / "jobs"
    os.environ.clear()
    os.environ.update(before)


def nightly(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--source", "people.csv", "--target", "bought", "--model", "mlp"), {"target": "bought"}),
        (("--source", "s3://bucket/day-*.parquet", "--target", "", "--model", "mlp", "--regression"), {}),
        (("--source", "sklearn://digits", "--model", "cnn"), {}),
        (("--source", "sklearn://digits", "--model", "own"), {}),
    ],
)
def test_init_writes_a_job_that_is_valid_and_says_how_to_go_on(
    jobs: Path, arguments: tuple[str, ...], expected: dict[str, Any]
) -> None:
    shown = nightly("init", "my-job", *arguments).output
    assert "nightly check my-job\nnightly up\nnightly run my-job" in shown
    job = load_job("my-job", jobs)
    assert job.data.source.endswith(arguments[1])
    assert job.data.target == expected.get("target")
    assert job.search.objective == ("rmse" if "--regression" in arguments else "accuracy")
    assert (jobs / "my_job.py").exists() == ("own" in arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("my-job", "--source", "rows.npz"), "--model must be given where nobody can be asked"),
        ((), "NAME must be given where nobody can be asked"),
        (("my-job", "--source", "rows.csv", "--model", "mlp"), "--target must be given where nobody can be asked"),
        (("my-job", "--source", "rows.npz", "--model", "gpt"), "--model must be mlp, cnn or own, found 'gpt'"),
        (("My Job", "--source", "rows.npz", "--model", "mlp"), "nothing was written: "),
        (("there", "--source", "rows.npz", "--model", "mlp"), "there.yaml exists already and was left as it is"),
    ],
)
def test_init_refuses_in_one_sentence_and_leaves_what_was_there(
    jobs: Path, arguments: tuple[str, ...], says: str
) -> None:
    (jobs / "there.yaml").write_text("mine")
    refused = nightly("init", *arguments).exception
    assert isinstance(refused, ExpectedError)
    assert says in str(refused)
    assert [(path.name, path.read_text()) for path in jobs.iterdir()] == [("there.yaml", "mine")]


@pytest.mark.process
def test_without_servers_jobs_are_listed_and_the_doctor_says_what_to_do(tmp_path: Path) -> None:
    alone = make_stack(tmp_path)
    (Path(alone.environment["NIGHTLY_JOBS"]) / "bad.yaml").write_text("name: bad\nbudget: {trials: 0}\n")
    listed = alone.nightly("ls", "--json", ok=False)
    # A bad file keeps no other job from anything; it is named, and the exit code says so.
    assert listed.returncode == 1
    assert [line.split("bad.yaml: ")[1].split()[0] for line in listed.stderr.splitlines()] == ["data", "budget.trials"]
    assert {(row["job"], row["champion"], row["last night"]) for row in json.loads(listed.stdout)} == {
        ("digits-cnn", None, None), ("digits-mlp", None, None),
    }  # fmt: skip
    alone.environment["NIGHTLY_OPTUNA_URL"] = f"postgresql://nightly@127.0.0.1:{free_port()}/optuna"
    found = alone.nightly("doctor", ok=False)
    assert found.returncode == 1
    marks = {line.split()[1]: line for line in found.stdout.splitlines()}
    assert [marks[name][0] for name in ("packages", "device", "store")] == ["✓"] * 3
    for name in ("prefect", "mlflow", "worker", "clock"):
        assert marks[name].startswith("✗")
        assert marks[name].endswith("; run `nightly up`")
    assert marks["jobs"].startswith("✗ jobs       digits-cnn, digits-mlp are right, 1 more are not: ")
    assert "budget.trials must be" in marks["jobs"]
    assert marks["studies"].startswith("✗")
    assert marks["studies"].endswith("start it or set NIGHTLY_OPTUNA_URL right")
