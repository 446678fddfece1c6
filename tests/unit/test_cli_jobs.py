"""The commands about jobs that need no servers: a job file written after a few questions, and what a machine lacks."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.job import load_job
from tests.conftest import Stack, make_stack


@pytest.fixture
def alone(tmp_path: Path) -> Stack:
    """A home whose servers do not run."""
    return make_stack(tmp_path)


def jobs_of(stack: Stack) -> Path:
    return Path(stack.environment["NIGHTLY_JOBS"])


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
    alone: Stack, arguments: tuple[str, ...], expected: dict[str, Any]
) -> None:
    shown = alone.nightly("init", "my-job", *arguments).stdout
    assert "nightly check my-job\nnightly up\nnightly run my-job" in shown
    job = load_job("my-job", jobs_of(alone))
    assert job.data.source.endswith(arguments[1])
    assert job.data.target == expected.get("target")
    assert job.search.objective == ("rmse" if "--regression" in arguments else "accuracy")
    assert (jobs_of(alone) / "my_job.py").exists() == ("own" in arguments)


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
    alone: Stack, arguments: tuple[str, ...], says: str
) -> None:
    (jobs_of(alone) / "there.yaml").write_text("mine")
    refused = alone.nightly("init", *arguments, ok=False)
    assert refused.returncode == 1
    assert says in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [(path.name, path.read_text()) for path in jobs_of(alone).iterdir()] == [("there.yaml", "mine")]


def test_without_servers_jobs_are_listed_and_the_doctor_says_what_to_do(alone: Stack) -> None:
    rows = json.loads(alone.nightly("ls", "--json").stdout)
    assert {(row["job"], row["champion"], row["last night"]) for row in rows} == {
        ("digits-cnn", None, None), ("digits-mlp", None, None),
    }  # fmt: skip
    assert "no Prefect server answers" in alone.nightly("ls").stdout
    found = alone.nightly("doctor", "--json", ok=False)
    checks = {check["name"]: check for check in json.loads(found.stdout)}
    assert found.returncode == 1
    assert [checks[name]["state"] for name in ("packages", "device", "jobs", "store")] == ["ok"] * 4
    for name in ("prefect", "mlflow", "worker", "deployments"):
        assert (checks[name]["state"], checks[name]["remedy"]) == ("fail", "run `nightly up`")
    (jobs_of(alone) / "bad.yaml").write_text("name: bad\nbudget: {trials: 0}\n")
    shown = alone.nightly("doctor", ok=False).stdout
    assert "✗ jobs" in shown
    assert "budget.trials" in shown
    refused = alone.nightly("logs", "digits-mlp", ok=False)
    assert "no Prefect server answers" in refused.stderr
