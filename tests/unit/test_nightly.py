"""What the night does when another promoter came first. The steps are stand-ins: only their order is looked at here."""

from pathlib import Path
from typing import Any

import pytest

import flows.nightly
from flows.nightly import JUDGEMENTS, _judge_and_promote
from infra.settings import Settings
from infra.store import open_store
from tasks.promotions import StaleJudgement
from tests.conftest import CPU, make_job


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
