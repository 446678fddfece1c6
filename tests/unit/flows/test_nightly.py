"""What the night does when another promoter came first (the steps are stand-ins: only their order is looked at here),
and the form that Prefect shows for it."""

import json
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

import flows.nightly
from flows.deployments import deployment_of
from flows.nightly import JUDGEMENTS, _judge_and_promote, _missed, nightly_tuning
from flows.rollback import rollback
from infra.deployments import form_schema
from infra.settings import Settings
from infra.store.opening import open_store
from tasks.job import load_jobs
from tasks.registry.log import StaleJudgement
from tests.conftest import CPU, make_job
from tests.promoting import promote


def test_the_run_form_is_as_it_was() -> None:
    """Flat, each field with a help text, bounds and a default: a change of it should be meant."""
    (job,) = (job for job in load_jobs(None)[0] if job.name == "digits-mlp")
    form = form_schema(nightly_tuning.parameters.model_dump(), deployment_of(job).form_defaults)
    assert form == json.loads(Path(__file__).with_name("run_form.json").read_text())
    assert all("description" in field for field in form["properties"].values())


@pytest.mark.parametrize(
    ("missed", "hours", "is_scheduled", "says"),
    [
        ("once", 30, True, None),
        ("skip", 30, True, "and missed; schedule.missed: once would make up for it"),
        ("skip", 0.5, True, None),
        ("skip", 30, False, None),
    ],
)
def test_a_night_that_begins_late_is_skipped_where_the_job_says_so(
    missed: str, hours: float, is_scheduled: bool, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect's client is a stand-in: a real schedule cannot be made to be late by a day."""
    due = datetime.now(UTC) - timedelta(hours=hours)
    run = SimpleNamespace(auto_scheduled=is_scheduled, expected_start_time=due)
    client = nullcontext(SimpleNamespace(read_flow_run=lambda _: run))
    monkeypatch.setattr(flows.nightly, "get_client", lambda **_: client)
    monkeypatch.setattr(flows.nightly, "later_due_run", lambda *_: None)
    monkeypatch.setattr(flows.nightly, "runtime", SimpleNamespace(flow_run=SimpleNamespace(id=str(uuid4()))))
    reason = _missed(make_job(schedule={"missed": missed}))
    assert reason is None if says is None else str(reason).endswith(says)


@pytest.mark.parametrize("lost", [0, 1, JUDGEMENTS])
def test_who_comes_second_compares_with_who_came_first(
    lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[Any] = []
    monkeypatch.setattr(flows.nightly, "gate_step", lambda *arguments: judged.append(arguments[2]))
    monkeypatch.setattr(flows.nightly, "ask", lambda _, verdict: verdict)
    monkeypatch.setattr(flows.nightly, "read_champion", lambda *_: f"champion {len(judged)}")

    def promote(*_: object) -> None:
        if len(judged) <= lost:
            raise StaleJudgement("the champion changed")

    monkeypatch.setattr(flows.nightly, "promote_step", promote)
    store = open_store(tmp_path.as_uri())
    settings = Settings(home=tmp_path)
    study = SimpleNamespace(user_attrs={})
    arguments: Any = (make_job(), study, None, None, "champion 0", store, CPU, settings, None)
    if lost == JUDGEMENTS:
        with pytest.raises(StaleJudgement):
            _judge_and_promote(*arguments)
    else:
        _judge_and_promote(*arguments)
    assert judged == [f"champion {number}" for number in range(min(lost + 1, JUDGEMENTS))]


def test_a_rollback_needs_no_job_file_and_says_what_mlflow_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NIGHTLY_HOME", str(tmp_path))
    monkeypatch.delenv("NIGHTLY_STORE", raising=False)
    store = open_store(Settings.read().store_url)
    first = promote(store, tmp_path / "first", 1, judged=0, run="first")
    promote(store, tmp_path / "second", 2, judged=1, run="second")
    assert rollback.fn("job", "it disappoints") == f"version {first} is champion of job again"
    assert "MLflow misses the champion's alias until the next night: no job is named 'job'" in caplog.text
