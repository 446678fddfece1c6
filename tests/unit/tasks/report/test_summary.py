"""The summary tells a stranger what won, by how much and how sure that is, in words that say no more than is known."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import create_trial

from models.evaluation.comparison import Comparison
from tasks.data.prepared import Prepared
from tasks.data.snapshots import Snapshot
from tasks.promotion.confirm import Challenger, Confirmed
from tasks.promotion.verdict import Verdict
from tasks.registry.log import Promotion
from tasks.report.summary import summary
from tasks.search.tune import Tuned
from tasks.study.memory import BASELINE
from tasks.study.samplers import NUMBER
from tasks.study.studies import ROLE, open_study
from tasks.tracking.trials import DEVICE, SECONDS
from tests.conftest import make_job
from tests.unit.tasks.promotion.test_gate import make_challenger, verdict_of
from tests.unit.tasks.search.test_tune import NOW

LINKS = {"The night in Prefect": "http://127.0.0.1:4200/runs/flow-run/1"}
PROMOTED = Promotion(number=1, version="6b1c", judged=0, run="r", reason="", promoted_at=NOW)
PROVEN = Comparison(
    metric="accuracy", ours=0.99, theirs=0.97, gain=0.02, low=0.01, high=0.03, better=True, worse=False,
    detectable=0.018, rows=300, groups=300, method="exact McNemar test (6 rows won, 0 lost)",
)  # fmt: skip


@pytest.fixture(scope="module")
def challenger(prepared: Prepared) -> Challenger:
    trial = create_trial(value=0.5, user_attrs={NUMBER: 7, DEVICE: "cpu"})
    return replace(make_challenger(prepared, epochs=2), trial=trial)


@pytest.fixture(scope="module")
def verdict(challenger: Challenger, prepared: Prepared, snapshot: Snapshot) -> Verdict:
    return verdict_of(challenger, None, snapshot, baseline=make_challenger(prepared, epochs=1))


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    study = open_study(make_job(), "f" * 32, tmp_path, NOW)
    study.add_trial(create_trial(value=0.5, user_attrs={NUMBER: 0, SECONDS: 5.0}))
    return study


def in_words(study: optuna.Study, verdict: Verdict, promotion: Promotion | None = PROMOTED) -> str:
    tuned = Tuned(
        best=verdict.challenger.trial, baseline=None, complete=60, pruned=138, failed=2, ended_by="trials",
        idle_seconds=1.0,
    )  # fmt: skip
    confirmed = Confirmed(challenger=verdict.challenger, baseline=verdict.challenger, seconds=120)
    return summary(make_job(), study, tuned, confirmed, verdict, promotion, LINKS)


def test_a_proven_gain_is_told_in_figures_and_in_rows(study: optuna.Study, verdict: Verdict) -> None:
    assert in_words(study, replace(verdict, comparison=PROVEN, reason="there was none: test accuracy")) == (
        "# small: version 6b1c promoted\n\nThere was none.\n\n"
        "- **Tried**: 200 configurations of mlp, 2,000 a minute: 60 trained to the end, 138 stopped early, 2 failed; "
        "then the best of them and the textbook's again with 5 fresh seeds each\n"
        "- **Won**: trial 7, with epochs 2 instead of 10, learning rate 0.003 instead of 0.01, width 32 instead of 50\n"
        "- **Result**: accuracy 0.9900 against the textbook's 0.9700 on 300 test rows that nothing was trained or "
        "chosen by, that is 3 wrong instead of 9: better by 0.0200\n"
        "- **Certainty**: proven better: the gain lies between 0.0100 and 0.0300, each bound with 95 % confidence; "
        "exact McNemar test (6 rows won, 0 lost)\n"
        "- **Cost**: 6 s of searching and 2.0 minutes of confirming on cpu\n\n"
        "**Where to look**\n\n- [The night in Prefect](http://127.0.0.1:4200/runs/flow-run/1)\n"
    )


@pytest.mark.parametrize(
    ("gain", "worse", "words"),
    [
        (0.009, False, "takes about 1,200 test rows"),
        (0.0, False, "not proven: the gain lies between -0.0100 and 0.0300, each bound with 95 % confidence\n"),
        (-0.02, True, "proven worse: the gain lies between"),
    ],
)
def test_what_is_not_proven_says_what_it_would_take(
    study: optuna.Study, verdict: Verdict, gain: float, worse: bool, words: str
) -> None:
    comparison = replace(PROVEN, gain=gain, low=-0.01, better=False, worse=worse)
    text = in_words(study, replace(verdict, comparison=comparison))
    assert words in text
    assert f": {'better' if gain >= 0 else 'worse'} by {abs(gain):.4f}\n" in text


def test_the_textbook_that_wins_is_called_by_its_name(
    study: optuna.Study, verdict: Verdict, challenger: Challenger, snapshot: Snapshot
) -> None:
    trial = create_trial(value=0.5, user_attrs={NUMBER: 0, ROLE: BASELINE})
    textbook = replace(challenger, trial=trial)
    text = in_words(study, verdict_of(textbook, None, snapshot, baseline=textbook))
    assert "- **Won**: the textbook's configuration itself\n" in text
    assert "Certainty" not in text
    assert " on test rows that nothing was trained or chosen by (between 0." in text


def test_a_night_without_a_promotion_says_so(study: optuna.Study, verdict: Verdict) -> None:
    """A class named in Markdown's own letters stands there as it is."""
    hold = replace(verdict, decision="REJECT", reason="a guard rail is broken (worst slice: class [/b] *x*)", judged=3)
    text = in_words(study, hold, None)
    assert text.startswith(
        "# small: champion stays (REJECT)\n\nA guard rail is broken (worst slice: class \\[/b\\] \\*x\\*)."
    )
    assert in_words(study, replace(hold, judged=0), None).startswith("# small: no champion yet (REJECT)\n")
    assert "against the champion's 0.9" in in_words(study, replace(hold, opponent="champion", comparison=PROVEN), None)
