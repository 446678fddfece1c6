"""What the night does when another promoter came first (the steps are stand-ins: only their order is looked at here),
and the form that Prefect shows for it."""

import json
from pathlib import Path
from typing import Any

import pytest

import flows.nightly
from flows.cli import deployment_of
from flows.nightly import JUDGEMENTS, _judge_and_promote, nightly_tuning
from infra.deploy import form_schema
from infra.settings import Settings
from infra.store import open_store
from tasks.job import load_jobs
from tasks.promotions import StaleJudgement
from tests.conftest import CPU, make_job


def test_the_run_form_is_as_it_was() -> None:
    """Flat, each field with a help text, bounds and a default: a change of it should be meant."""
    (job,) = (job for job in load_jobs(None) if job.name == "digits-mlp")
    form = form_schema(nightly_tuning.parameters.model_dump(), deployment_of(job).form_defaults)
    assert form == json.loads(Path(__file__).with_name("run_form.json").read_text())
    assert all("description" in field for field in form["properties"].values())


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
    arguments: Any = (make_job(), None, None, None, "champion 0", store, CPU, settings)
    if lost == JUDGEMENTS:
        with pytest.raises(StaleJudgement):
            _judge_and_promote(*arguments)
    else:
        _judge_and_promote(*arguments)
    assert judged == [f"champion {number}" for number in range(min(lost + 1, JUDGEMENTS))]
