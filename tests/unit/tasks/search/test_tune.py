"""The search: its budget, its failures, and an interruption that changes nothing."""

import itertools
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

import optuna
import pytest
import torch
from optuna.trial import TrialState

import models.fused.group
import models.train
import tasks.search.worker
import tasks.trainer.local
from models.evaluation.evaluate import parameter_count
from models.fused.train import OnEpoch, Outcome
from models.hyperparameters.declared import Hyperparameters
from models.training.loop import train
from models.training.terms import Diverged, Epoch, Setting, Training
from tasks.data.prepared import Prepared
from tasks.job import TuningJob
from tasks.promotion.confirm import Challenger, confirm
from tasks.search.candidate import trained_seconds
from tasks.search.tune import TuningFailed, forecast, tune
from tasks.study.samplers import NUMBER
from tasks.study.studies import COSTS, ENDED, FAILURE, QUEUE, WAVE, is_interrupted, last_study, open_study, ranked
from tasks.tracking.trials import CURVE, DIAGNOSIS, SECONDS, TRACEBACK
from tasks.trainer.local import LocalTrainer
from tests.conftest import CPU, make_job
from tests.unit.models.test_families import NET, write_net

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
    tuned = tune(study, job, LocalTrainer(job, prepared), tmp_path)
    assert (tuned.complete + tuned.pruned, tuned.failed, tuned.ended_by) == (4, 0, "trials")
    assert tuned.best.number == study.best_trial.number


def test_a_night_says_what_it_will_cost_by_what_the_last_one_did(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job(budget={"trials": 6, "minutes": 5})
    assert forecast(job, tmp_path, CPU).startswith("6 trials, 5 minutes at most, on cpu, ")
    assert forecast(job, tmp_path, CPU).endswith("; no earlier night tells how long a trial takes")
    study = open_for(job, prepared, tmp_path)
    tune(study, job, LocalTrainer(job, prepared), tmp_path)
    each = fmean(trial.user_attrs[SECONDS] for trial in study.trials)  # to the last digit, or it rounds otherwise
    twice = forecast(make_job(budget={"trials": 600}), tmp_path, CPU)
    assert f"at {each:.2f} s a trial, as in {study.study_name}, that is {10 * each:.1f} minutes" in twice
    dear = make_job(budget={"trials": 600, "price_per_hour": 600})
    assert forecast(dear, tmp_path, CPU).endswith(f" of training, which cost {100 * each:.2f}")


def test_the_budget_of_minutes_is_kept(prepared: Prepared, tmp_path: Path) -> None:
    """After the second wave: of four trials on a CPU, of six on a GPU."""
    job = make_job(budget={"trials": 50, "minutes": 1})
    clock = itertools.count(0, 25.0)
    trainer = LocalTrainer(job, prepared)
    tuned = tune(open_for(job, prepared, tmp_path), job, trainer, tmp_path, clock=lambda: next(clock))
    trials = 8 if trainer.device.type == "cpu" else 12
    assert (tuned.complete + tuned.pruned, tuned.ended_by) == (trials, "minutes")


def test_the_budget_of_money_cuts_off_what_is_under_way(prepared: Prepared, tmp_path: Path) -> None:
    space = {"epochs": 2000, "batch_size": 64, "width": 16, "depth": 1, "early_stopping_patience": 0}
    first = {"epochs": 1}
    job = make_job(
        search={"pruner": "none", "space": space | first}, budget={"trials": 1, "price_per_hour": 3600, "max_cost": 9}
    )
    study = open_for(job, prepared, tmp_path / "cheap")
    assert tune(study, job, LocalTrainer(job, prepared), tmp_path).ended_by == "trials"
    job = make_job(
        search={"pruner": "none", "baseline": False, "space": space},
        budget={"trials": 40, "price_per_hour": 3600, "max_cost": 0.5},
    )
    study = open_for(job, prepared, tmp_path / "dear")
    with pytest.raises(TuningFailed, match="give the budget more max_cost"):
        tune(study, job, LocalTrainer(job, prepared), tmp_path)
    assert {trial.state for trial in study.trials} == {TrialState.PRUNED}
    assert 0 < min(len(trial.user_attrs[CURVE]) for trial in study.trials) < 2000
    assert 0.5 <= trained_seconds(study) < 5


def test_the_same_job_on_the_same_data_gives_the_same_trials(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job(budget={"trials": 14})
    studies = [open_for(job, prepared, tmp_path / name) for name in ("one", "two")]
    for study in studies:
        tune(study, job, LocalTrainer(job, prepared), tmp_path)
    assert outcomes(studies[0]) == outcomes(studies[1])
    one, two = (confirm(study, job, prepared).challenger for study in studies)
    assert (one.trial.number, one.seeds, one.values) == (two.trial.number, two.seeds, two.values)


def test_a_wave_shares_a_structure_and_nothing_else(prepared: Prepared, tmp_path: Path) -> None:
    space = {"epochs": 1, "depth": {"low": 1, "high": 3}, "width": {"low": 8, "high": 64}}
    job = make_job(search={"space": space, "sampler": "random", "pruner": "none"}, budget={"trials": 26})
    study = open_for(job, prepared, tmp_path)
    study.set_user_attr(QUEUE, [{"params": {"depth": 2}, "attributes": {}}])
    tune(study, job, LocalTrainer(job, prepared), tmp_path)
    waves = [trial.user_attrs[WAVE] for trial in study.trials]
    assert waves == [[0, 1]] + [[first, 3] for first in range(1, 25, 3) for _ in range(3)] + [[25, 3]]
    structures = {
        first: {tuple(trial.params.get(name) for name in job.family.structure) for trial in wave}
        for first, wave in itertools.groupby(study.trials, lambda trial: trial.user_attrs[WAVE][0])
    }
    assert all(len(some) == 1 for some in structures.values())
    assert len(set().union(*structures.values())) > 5
    assert len({trial.params["learning_rate"] for trial in study.trials}) == 26


def test_waves_grow_with_what_the_search_knows(prepared: Prepared, tmp_path: Path) -> None:
    """On a CPU; on a GPU they are as large as the budget lets them be from the first."""
    space = {"epochs": 1, "batch_size": 256, "depth": 1, "width": {"low": 8, "high": 64}}
    job = make_job(search={"space": space, "sampler": "random", "pruner": "none"}, budget={"trials": 64})
    study, trainer = open_for(job, prepared, tmp_path), LocalTrainer(job, prepared)
    tune(study, job, trainer, tmp_path)
    waves = [size for _, size in dict.fromkeys(tuple(trial.user_attrs[WAVE]) for trial in study.trials)]
    assert waves == ([4, 4, 4, 6, 8, 8, 8, 8, 8, 8] if trainer.device.type == "cpu" else [8] * 8)


@pytest.mark.parametrize("sampler", ["grid", "qmc", "cmaes"])
def test_a_sampler_whose_points_are_given_is_asked_one_by_one(prepared: Prepared, tmp_path: Path, sampler: str) -> None:
    space = {"epochs": 1, "batch_size": 256, "optimizer": ["sgd", "adam"], "learning_rate": [0.01, 0.1]}
    fixed = {"depth": 1, "width": 16, "schedule": "constant", "dropout": 0.0, "weight_decay": 0.0}
    job = make_job(search={"space": space | fixed, "sampler": sampler}, budget={"trials": 16})
    study = open_for(job, prepared, tmp_path)
    tune(study, job, LocalTrainer(job, prepared), tmp_path)
    assert {trial.user_attrs[WAVE][1] for trial in study.trials} == {1}
    assert len(study.trials) == (4 if sampler == "grid" else 16)


def test_an_interrupted_night_ends_as_one_that_was_not(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped three times, each time in the middle of another wave of three."""
    job = make_job(budget={"trials": 24})
    undisturbed = open_for(job, prepared, tmp_path / "undisturbed")
    tune(undisturbed, job, LocalTrainer(job, prepared), tmp_path)

    class Stop(BaseException):
        pass

    def stop_at_report(count: int) -> None:
        reports = itertools.count(1)
        report = tasks.search.candidate.Candidate.report

        def report_and_stop(candidate: tasks.search.candidate.Candidate, epoch: Epoch, seconds: float) -> None:
            report(candidate, epoch, seconds)
            if next(reports) == count:
                raise Stop

        study = open_for(job, prepared, tmp_path / "disturbed")
        with monkeypatch.context() as patch:
            patch.setattr(tasks.search.candidate.Candidate, "report", report_and_stop)
            with pytest.raises(Stop):
                tune(study, job, LocalTrainer(job, prepared), tmp_path)

    for count in (1, 14, 14):
        stop_at_report(count)
    resumed = open_for(job, prepared, tmp_path / "disturbed")
    tune(resumed, job, LocalTrainer(job, prepared), tmp_path)
    assert sorted(outcomes(resumed), key=str) == sorted(outcomes(undisturbed), key=str)
    assert len([trial for trial in resumed.trials if is_interrupted(trial)]) >= 6
    assert not resumed.get_trials(states=(TrialState.RUNNING,))


def test_an_interruption_in_the_middle_of_a_trial_is_told(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    study = open_for(job, prepared, tmp_path)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks.trainer.local, "train_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(study, job, LocalTrainer(job, prepared), tmp_path)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]
    assert is_interrupted(study.trials[0])


def test_a_signal_that_surfaces_as_another_error_stops_the_night_and_is_no_fault_of_a_trial(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from Optuna's journal, which a signal finds with its lock released halfway."""
    drawn = []
    draw = tasks.search.candidate._draw

    def interrupted(trial: optuna.Trial, job: TuningJob) -> Hyperparameters:
        drawn.append(trial)
        if len(drawn) < 3:
            return draw(trial, job)
        try:
            raise KeyboardInterrupt
        finally:
            (tmp_path / "lock").unlink()

    job = make_job()
    study = open_for(job, prepared, tmp_path)
    monkeypatch.setattr(tasks.search.candidate, "_draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(study, job, LocalTrainer(job, prepared), tmp_path)
    assert is_interrupted(study.trials[-1])
    assert all(FAILURE not in trial.user_attrs for trial in study.trials)


def test_a_configuration_that_kills_its_process_is_given_up_and_takes_no_other_with_it(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third trial kills whatever process trains it: its wave of three twice, then itself alone."""
    job = make_job(search={"pruner": "none", "space": {"epochs": 1, "batch_size": 256}}, budget={"trials": 24})
    together: list[list[int]] = []

    class Killed(BaseException):
        pass

    def train_or_die(setting: Setting, trainings: list[Training], on_epoch: OnEpoch) -> Iterator[tuple[int, Outcome]]:
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        together.append([trial.user_attrs[NUMBER] for trial in running])
        if 2 in together[-1]:
            raise Killed
        yield from models.train.train_all(setting, trainings, on_epoch)

    monkeypatch.setattr(tasks.trainer.local, "train_all", train_or_die)
    for _ in range(3):
        study = open_for(job, prepared, tmp_path)
        with pytest.raises(Killed):
            tune(study, job, LocalTrainer(job, prepared), tmp_path)
    study = open_for(job, prepared, tmp_path)
    tuned = tune(study, job, LocalTrainer(job, prepared), tmp_path)
    assert together[:5] == [[0, 1, 2], [0, 1, 2], [0], [1], [2]]
    assert (tuned.failed, tuned.complete) == (1, 23)


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
    tuned = tune(study, job, LocalTrainer(job, prepared), tmp_path)
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
    with pytest.raises(TuningFailed, match="none of 2 trials of small completed; the first ended with: diverged"):
        tune(open_for(job, prepared, tmp_path), job, LocalTrainer(job, prepared), tmp_path)


def test_a_broken_model_costs_its_trial_and_not_the_night(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(model=write_net(tmp_path, NET), search={})
    honest, calls = train, itertools.count()

    def broken_once(*args: object, **options: object) -> object:
        if next(calls) == 0:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return honest(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(models.train, "train", broken_once)
    study = open_for(job, prepared, tmp_path)
    assert tune(study, job, LocalTrainer(job, prepared), tmp_path).failed == 1
    assert study.trials[0].user_attrs[FAILURE] == "RuntimeError: mat1 and mat2 shapes cannot be multiplied"


def test_a_night_whose_first_three_trials_fail_stops_with_the_cause(prepared: Prepared, tmp_path: Path) -> None:
    net = write_net(tmp_path, NET.replace("return self.layers(features)", "raise RuntimeError('no such kernel')"))
    job = make_job(model=net, search={}, budget={"trials": 50})
    study = open_for(job, prepared, tmp_path)
    says = "the first 3 trials of small all failed, so the night stops: RuntimeError: no such kernel"
    with pytest.raises(TuningFailed, match=says):
        tune(study, job, LocalTrainer(job, prepared), tmp_path)
    assert len(study.trials) == 3
    assert "raise RuntimeError('no such kernel')" in study.trials[0].user_attrs[TRACEBACK]


MOODY = """
import torch

MOODS = ["fine", "unbuildable", "raising", "shapeless", "nan", "exploding"]
CALLS = []


class Net(torch.nn.Module):
    @staticmethod
    def suggest(trial):
        CALLS.append(trial)
        if len(CALLS) == 30:  # a job is loaded with 20
            raise KeyError("a name")
        mood = trial.suggest_categorical("mood", MOODS)
        return {"mood": mood, "scale": float("nan") if mood == "nan" else 1.0}

    def __init__(self, hyperparameters, shape):
        super().__init__()
        if hyperparameters["mood"] == "unbuildable":
            raise ValueError("cannot be built")
        self.mood = hyperparameters["mood"]
        self.layer = torch.nn.Linear(64, shape.outputs)

    def forward(self, features):
        if self.mood == "raising":
            raise RuntimeError("in the middle")
        outputs = self.layer(features.flatten(1))
        return outputs[:, :3] if self.mood == "shapeless" else outputs / 0 if self.mood == "exploding" else outputs
"""


def test_whatever_a_users_model_does_costs_its_trial_only(prepared: Prepared, tmp_path: Path) -> None:
    search = {"space": {"epochs": 1, "batch_size": 256}, "sampler": "random", "pruner": "none"}
    job = make_job(model=write_net(tmp_path, MOODY), search=search, budget={"trials": 30})
    study = open_for(job, prepared, tmp_path)
    study.set_user_attr(QUEUE, [{"params": {"mood": "fine"}, "attributes": {}}])
    tuned = tune(study, job, LocalTrainer(job, prepared), tmp_path)
    assert tuned.complete + tuned.failed == 30
    reasons = {
        str(trial.params.get("mood")): trial.user_attrs[FAILURE]
        for trial in study.trials
        if trial.state == TrialState.FAIL
    }
    assert reasons == {
        "None": "KeyError: 'a name'",
        "unbuildable": "ValueError: cannot be built",
        "raising": "RuntimeError: in the middle",
        "shapeless": "ModelError: net.py:Net must return outputs of shape (8, 10), found (8, 3); fix its forward",
        "nan": reasons["nan"],
        "exploding": "diverged at epoch 1: the loss is not finite",
    }
    assert (
        "own.scale must be a finite number, text, true, false, or a list or names of these, found .nan"
        in reasons["nan"]
    )
    broken = [trial for trial in study.trials if trial.params.get("mood") == "raising"]
    assert "net.py" in broken[0].user_attrs[TRACEBACK]


def test_a_configuration_above_a_limit_is_never_trained(prepared: Prepared, tmp_path: Path) -> None:
    """An MLP of width w has 64 w + w + 10 w + 10 parameters: 1,210 for 16 and 2,410 for 32."""
    space = {"epochs": 1, "batch_size": 256, "depth": 1, "width": [16, 32], "optimizer": "adam"}
    job = make_job(search={"space": space, "max_parameters": 2000, "sampler": "random"}, budget={"trials": 10})
    study = open_for(job, prepared, tmp_path)
    tuned = tune(study, job, LocalTrainer(job, prepared), tmp_path)
    assert tuned.best.params["width"] == 16
    for trial in study.trials:
        if trial.params["width"] == 32:
            assert trial.state == TrialState.PRUNED
            assert trial.user_attrs[FAILURE] == "parameters 2410 is above search.max_parameters 2000"
            assert trial.user_attrs[CURVE] == []
        else:
            assert trial.user_attrs[COSTS] == {"parameters": 1210}
    assert {trial.params["width"] for trial in study.trials} == {16, 32}


def test_a_night_in_which_nothing_keeps_the_limits_says_so(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job(search={"max_latency_ms": 1e-9}, budget={"trials": 3})
    with pytest.raises(TuningFailed, match=r"latency .* is above search\.max_latency_ms 1e-09"):
        tune(open_for(job, prepared, tmp_path), job, LocalTrainer(job, prepared), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["auto", "tpe", "gp", "random", "qmc"])
def test_a_search_with_a_cost_trades_the_objective_against_it(prepared: Prepared, tmp_path: Path, sampler: str) -> None:
    space = {"epochs": 2, "batch_size": 64, "depth": 1, "width": [16, 128], "optimizer": "adam", "learning_rate": 0.01}
    search = {"space": space, "sampler": sampler, "pruner": "none", "cost": "parameters", "cost_tolerance": 1.0}
    job = make_job(search=search, budget={"trials": 14})
    study = open_for(job, prepared, tmp_path)
    best = tune(study, job, LocalTrainer(job, prepared), tmp_path).best
    assert best.values[1] == min(trial.values[1] for trial in study.trials) == 1210
    strict = make_job(search=search | {"cost_tolerance": 0.0})
    assert ranked(study.trials, strict)[0].values[0] == max(trial.values[0] for trial in study.trials)
    challenger = confirm(study, job, prepared).challenger
    assert parameter_count(challenger.model) == 1210


def test_a_regression_is_tuned_and_confirmed(prepared_regression: Prepared, tmp_path: Path) -> None:
    search = {"objective": "rmse", "space": {"epochs": 5, "batch_size": 32, "optimizer": "adam"}}
    job = make_job(data={"source": "sklearn://diabetes"}, search=search, budget={"trials": 6})
    study = open_for(job, prepared_regression, tmp_path)
    tuned = tune(study, job, LocalTrainer(job, prepared_regression), tmp_path)
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert tuned.best.values == min(trial.values for trial in complete)
    challenger = confirm(study, job, prepared_regression).challenger
    assert set(challenger.validation) == {"rmse", "mae", "r2"}
    assert challenger.validation["rmse"] < prepared_regression.training.target.std()


def test_a_killed_trial_goes_on_from_its_checkpoint(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.search.candidate, "CHECKPOINT_SECONDS", 0)
    job = make_job(search={"pruner": "none", "space": {"epochs": 6, "batch_size": 64}}, budget={"trials": 1})
    untouched = open_for(job, prepared, tmp_path / "untouched")
    tune(untouched, job, LocalTrainer(job, prepared), tmp_path / "untouched")

    study = open_for(job, prepared, tmp_path)
    trained: list[int] = []
    train_epoch = models.fused.group.Group.train_epoch
    kills = iter([KeyboardInterrupt])

    def kill_after_four(group: models.fused.group.Group) -> dict[int, Diverged]:
        if group.epochs_done == 4 and (kill := next(kills, None)):
            raise kill
        diverged = train_epoch(group)
        trained.append(group.epochs_done)
        return diverged

    monkeypatch.setattr(models.fused.group.Group, "train_epoch", kill_after_four)
    with pytest.raises(KeyboardInterrupt):
        tune(study, job, LocalTrainer(job, prepared), tmp_path)
    resumed = open_for(job, prepared, tmp_path)
    tune(resumed, job, LocalTrainer(job, prepared), tmp_path)
    assert trained == [1, 2, 3, 4, 5, 6]
    assert outcomes(resumed) == outcomes(untouched)
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_every_finished_trial_has_its_diagnosis(prepared: Prepared, tmp_path: Path) -> None:
    space = {"learning_rate": [1e30, 1e-7, 1e-2], "optimizer": "sgd", "epochs": 8, "batch_size": 64, "width": 16}
    job = make_job(search={"space": space, "sampler": "random"}, budget={"trials": 20})
    study = open_for(job, prepared, tmp_path)
    tune(study, job, LocalTrainer(job, prepared), tmp_path)
    found = {(trial.state.name, trial.params["learning_rate"]): trial.user_attrs[DIAGNOSIS] for trial in study.trials}
    assert found["FAIL", 1e30] == "diverged"
    assert found["COMPLETE", 1e-7] == "underfit"
    assert {value for (state, _), value in found.items() if state == "PRUNED"} == {"unfinished"}


def test_confirm_measures_gap_and_sharpness_of_each_candidate(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job()
    study = open_for(job, prepared, tmp_path)
    tune(study, job, LocalTrainer(job, prepared), tmp_path)
    seen: list[Challenger] = []
    chosen = confirm(study, job, prepared, on_candidate=seen.append).challenger
    assert len(seen) == 3
    assert chosen in seen
    for candidate in seen:
        training, validation = (
            torch.nn.functional.cross_entropy(candidate.model(split.features), split.target).item()
            for split in (prepared.training, prepared.validation)
        )
        assert candidate.generalization_gap == pytest.approx(validation - training, rel=1e-4)
        assert candidate.sharpness > 0


def test_confirm_never_sees_a_test_row_and_trains_with_a_fresh_seed(prepared: Prepared, tmp_path: Path) -> None:
    job = make_job()
    study = open_for(job, prepared, tmp_path)
    tune(study, job, LocalTrainer(job, prepared), tmp_path)
    challenger = confirm(study, job, prepared).challenger
    assert challenger.trial.state == TrialState.COMPLETE
    assert challenger.hyperparameters.model_dump().items() >= challenger.trial.params.items()
    assert set(vars(prepared)) == {"snapshot", "preprocessing", "training", "validation"}
