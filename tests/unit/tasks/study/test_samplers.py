"""Samplers and pruners by name: seeded, never twice the same point side by side, and a grid that ends."""

import statistics
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from tasks.job import PrunerName, SamplerName, TuningJob
from tasks.study.leases import free_trials
from tasks.study.samplers import GRID_EXHAUSTED, MOST_TPE_TRIALS, STARTUP_TRIALS, BoundedTPESampler, build_pruner
from tasks.study.studies import FAILURE, Asking, finished_trials, open_study
from tests.conftest import make_job

NOW = datetime(2026, 11, 23, 2, 0, tzinfo=UTC)
SPACE: dict[str, Any] = {
    "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True, "points": 3},
    "weight_decay": {"low": 1e-6, "high": 1e-2, "log": True, "points": 2},
    "dropout": {"low": 0.0, "high": 0.5, "points": 2},
    "optimizer": ["momentum", "adam"],
    "momentum": [0.8, 0.9],
    "schedule": "constant",
    "batch_size": 64,
    "depth": 1,
    "width": 16,
}


def job_with(sampler: str, **content: Any) -> TuningJob:
    return make_job(search={"sampler": sampler, "space": SPACE, "pruner": "none"}, **content)


def pretend(study: optuna.Study, job: TuningJob) -> FrozenTrial:
    """A trial from ask to tell whose value is best at learning rate 0.01 without dropout."""
    trial = Asking(study, job).ask()
    drawn = job.family.draw(trial, job.space).model_dump()
    return study.tell(trial, 1 - abs(drawn["learning_rate"] - 0.01) - 0.1 * drawn["dropout"])


def proposals(folder: Path, job: TuningJob, count: int) -> list[dict[str, Any]]:
    study = open_study(job, "f", folder, NOW)
    return [pretend(study, job).params for _ in range(count)]


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_a_seed_gives_its_trials_and_another_seed_others(sampler: str, tmp_path: Path) -> None:
    count = 18 if sampler == "grid" else 14
    first = proposals(tmp_path / "1", job_with(sampler), count)
    assert proposals(tmp_path / "2", job_with(sampler), count) == first
    assert proposals(tmp_path / "3", job_with(sampler, seed=1), count) != first


def test_auto_begins_near_the_middle_of_each_range_and_then_learns(tmp_path: Path) -> None:
    study = open_study(job := job_with("auto"), "f", tmp_path, NOW)
    rates = [pretend(study, job).params["learning_rate"] for _ in range(40)]
    first = rates[:STARTUP_TRIALS]
    # Three standard deviations of a sixth of the range each reach from end to end; half of one holds a third of them.
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert len(set(first)) == STARTUP_TRIALS
    assert sum(1e-3 < rate < 1e-2 for rate in first) >= 5
    assert max(pretend(study, job).value or 0 for _ in range(5)) > 0.95


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_trials_that_run_side_by_side_are_distinct(sampler: str, tmp_path: Path) -> None:
    """Four at a time, none of which knows the others' values."""
    job = job_with(sampler)
    study = open_study(job, "f", tmp_path, NOW)
    for _ in range(4):
        running = []
        for _ in range(4):
            trial = Asking(study, job).ask()
            job.family.draw(trial, job.space)
            running.append(trial)
        points = [tuple(sorted(trial.params.items())) for trial in running]
        assert len(set(points)) == 4
        for trial in running:
            study.tell(trial, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["auto", "tpe", "gp", "cmaes"])
def test_a_sampler_that_learns_beats_the_random_one(sampler: str, tmp_path: Path) -> None:
    def median_of_last(name: str) -> Any:
        study = open_study(job_with(name), "f", tmp_path / name, NOW)
        return statistics.median([pretend(study, job_with(name)).values[0] for _ in range(40)][-10:])

    assert median_of_last(sampler) > median_of_last("random")


def grown_study(trials: int) -> optuna.Study:
    """In memory, of made-up trials: every third has a momentum, every seventh is pruned."""
    study = optuna.create_study(direction="maximize")
    random = np.random.default_rng(0)
    for number in range(trials):
        chosen: dict[str, BaseDistribution] = {"rate": FloatDistribution(1e-4, 1e-1, log=True)}
        params: dict[str, Any] = {"rate": 10 ** random.uniform(-4, -1)}
        if number % 3 == 0:
            chosen["momentum"], params["momentum"] = FloatDistribution(0, 1), random.uniform()
        state = TrialState.PRUNED if number % 7 == 0 else TrialState.COMPLETE
        values = None if state == TrialState.PRUNED else [-abs(np.log10(params["rate"]) + 2)]
        study.add_trial(create_trial(state=state, values=values, params=params, distributions=chosen))
    return study


def proposed(study: optuna.Study, kind: type[TPESampler], seed: int) -> dict[str, Any]:
    study.sampler = kind(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, group=True)
    trial = study.ask()
    trial.suggest_float("rate", 1e-4, 1e-1, log=True)
    trial.suggest_float("momentum", 0, 1)
    return trial.params


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_until_there_are_many_trials_tpe_is_optunas() -> None:
    for trials in (5, 40, MOST_TPE_TRIALS - 10):
        ours, theirs = grown_study(trials), grown_study(trials)
        for seed in range(5):  # each leaves a trial that runs
            assert proposed(ours, BoundedTPESampler, seed) == proposed(theirs, TPESampler, seed)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_of_many_trials_tpe_reads_the_best_those_that_run_and_some_others(monkeypatch: pytest.MonkeyPatch) -> None:
    study = grown_study(3 * MOST_TPE_TRIALS)
    running = study.ask()
    best = sorted(study.get_trials(states=[TrialState.COMPLETE]), key=lambda trial: -(trial.value or 0))
    read: list[list[FrozenTrial]] = []
    sample = TPESampler._sample

    def see(sampler: TPESampler, part: optuna.Study, *rest: Any) -> Any:
        read.append(part._get_trials(deepcopy=False))
        return sample(sampler, part, *rest)

    monkeypatch.setattr(TPESampler, "_sample", see)
    rates = [proposed(study, BoundedTPESampler, seed)["rate"] for seed in range(9)]
    assert 3e-3 < statistics.median(rates) < 3e-2  # the best is 0.01
    for trials in read:
        numbers = {trial.number for trial in trials}
        assert {trial.number for trial in best[:25]} | {running.number} <= numbers
        assert MOST_TPE_TRIALS - 25 <= len(numbers) <= MOST_TPE_TRIALS + 10
        assert max(np.diff(sorted(numbers))) <= 6


def test_a_grid_takes_each_point_once_and_ends(tmp_path: Path) -> None:
    """Three rates, two decays and two dropouts, for adam and for momentum's two momenta."""
    job = job_with("grid")
    study = open_study(job, "f", tmp_path, NOW)
    points = []
    while GRID_EXHAUSTED not in study.user_attrs:
        points.append(tuple(sorted(pretend(study, job).params.items())))
    assert len(points) == len(set(points)) == 3 * 2 * 2 * (1 + 2)
    rates = {dict(point)["learning_rate"] for point in points}
    assert rates == set(job.space["learning_rate"])  # type: ignore[arg-type]


def test_a_grid_gives_an_interrupted_point_again(tmp_path: Path) -> None:
    job = job_with("grid")
    study = open_study(job, "f", tmp_path, NOW)
    pretend(study, job)
    interrupted = Asking(study, job).ask()
    job.family.draw(interrupted, job.space)
    free_trials(study, lambda _: True)
    assert pretend(study, job).params == interrupted.params
    while GRID_EXHAUSTED not in study.user_attrs:
        pretend(study, job)
    assert len(finished_trials(study)) == 36


def test_a_failed_point_of_a_grid_is_not_tried_again(tmp_path: Path) -> None:
    job = job_with("grid")
    study = open_study(job, "f", tmp_path, NOW)
    trial = Asking(study, job).ask()
    job.family.draw(trial, job.space)
    trial.set_user_attr(FAILURE, "diverged at epoch 1")
    study.tell(trial, state=TrialState.FAIL)
    others = []
    while GRID_EXHAUSTED not in study.user_attrs:
        others.append(pretend(study, job).params)
    assert trial.params not in others
    assert len(others) == 35


@pytest.mark.parametrize(("name", "hopeless"), list(product(get_args(PrunerName), [True, False])))
def test_a_pruner_stops_the_hopeless_and_spares_the_good(name: PrunerName, hopeless: bool) -> None:
    """Twelve trials, each a little better than the one before, then the one in question."""
    epochs = 27
    study = optuna.create_study(direction="maximize", study_name="a", pruner=build_pruner(name, epochs))

    def pruned_at(start: float, slope: float) -> int | None:
        trial = study.ask()
        for epoch in range(1, epochs + 1):
            trial.report(start + slope * epoch, epoch)
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                return epoch
        study.tell(trial, start + slope * epochs)
        return None

    assert [pruned_at(0.5 + better / 1000, 1 / (70 - better)) for better in range(12)] == [None] * 12
    stopped = [
        pruned_at(0.1, -1 / 1000) if hopeless else pruned_at(0.6 + better, 1 / (50 - better)) for better in range(6)
    ]
    assert any(stopped) == (hopeless and name != "none")


@pytest.mark.parametrize("pruner", get_args(PrunerName))
def test_a_pruner_stops_the_same_trials_on_another_date(pruner: str, tmp_path: Path) -> None:
    """Also after an interruption, and Hyperband too, though Optuna gives brackets by a study's name."""
    job = make_job(search={"sampler": "random", "space": SPACE | {"epochs": 27}, "pruner": pruner})

    def pruned(now: datetime, interrupted: bool) -> list[tuple[int, int]]:
        study = open_study(job, "f", tmp_path / str(interrupted), now)
        if interrupted:
            Asking(study, job).ask()
            free_trials(study, lambda _: True)
        stopped = []
        for number in range(20):
            trial = Asking(study, job).ask()
            for epoch in range(1, 28):
                trial.report(number * 7 % 20 - epoch**0.5 / (10 + number), epoch)
                if trial.should_prune():
                    stopped.append((number, epoch))
                    study.tell(trial, state=TrialState.PRUNED)
                    break
            else:
                study.tell(trial, number * 7 % 20)
        return stopped

    stopped = pruned(NOW, interrupted=False)
    assert pruned(NOW.replace(day=25), interrupted=True) == stopped
    assert bool(stopped) == (pruner != "none")
