"""Checkpoints that outlive the machine they were written on."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

import tasks.search.checkpoints
import tasks.search.worker
from infra.store.opening import open_store
from infra.store.protocol import Store, StoreUnavailable
from models.fused.train import OnEpoch
from models.training.checkpoints import Checkpoint
from models.training.terms import Epoch, Training
from tasks.data.prepared import Prepared
from tasks.search.checkpoints import TrialCheckpoints, drop_old_checkpoints
from tasks.search.tune import tune
from tasks.study.studies import finished_trials, open_study
from tasks.tracking.trials import CURVE
from tasks.trainer.local import Ended, LocalTrainer
from tests.conftest import make_job

NOW = datetime(2026, 11, 27, 2, 0, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


@pytest.fixture(autouse=True)
def _share_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.search.checkpoints, "SHARE_SECONDS", 0.0)


def shared(store: Store) -> list[str]:
    return sorted(store.created("checkpoints/"))


def write(kept: TrialCheckpoints, epochs: int, key: str = "training") -> None:
    content = {"weight": torch.full((3,), float(epochs))}
    curve = [{"number": number + 1} for number in range(epochs)]
    Checkpoint(key=key, curve=curve, weights=content, best={}, optimizer={}, generators={}).write(kept.path(0))


def share(kept: TrialCheckpoints, epochs: int, key: str = "training") -> None:
    """Of a checkpoint after so many epochs, as it is called: when the next epoch is over."""
    write(kept, epochs, key)
    kept.share(0, epochs + 1)
    kept._sharing[0].result()


def epochs_of(kept: TrialCheckpoints) -> int:
    found = Checkpoint.read(kept.path(0), "training")
    return len(found.curve) if found else 0


class MachineGone(BaseException):
    pass


def test_a_trial_whose_machine_is_gone_goes_on_elsewhere_and_ends_as_it_would_have(
    prepared: Prepared, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.search.candidate, "CHECKPOINT_SECONDS", 0)
    space = {"epochs": 8, "batch_size": 256, "width": 16, "depth": 1}
    job = make_job(search={"pruner": "none", "space": space}, budget={"trials": 2})

    def open_for(name: str) -> optuna.Study:
        return open_study(job, prepared.snapshot.fingerprint, tmp_path / name, NOW)

    undisturbed = open_for("undisturbed")
    tune(undisturbed, job, LocalTrainer(job, prepared), tmp_path / "one machine")

    class Lost(LocalTrainer):
        def train(self, trainings: Sequence[Training], on_epoch: OnEpoch) -> Iterator[tuple[int, Ended]]:
            def until_shared(epochs: dict[int, Epoch]) -> object:
                stopped = on_epoch(epochs)
                if epochs[0].number == 5:
                    deadline = time.monotonic() + 30
                    while not shared(store) and time.monotonic() < deadline:
                        time.sleep(0.01)
                    raise MachineGone
                return stopped

            return super().train(trainings, until_shared)  # type: ignore[arg-type]

    study = open_for("lost")
    with pytest.raises(MachineGone):
        tune(study, job, Lost(job, prepared), tmp_path / "one machine", store=store)
    assert shared(store)
    reported: list[int] = []
    trained: list[int] = []

    class Counting(LocalTrainer):
        def train(self, trainings: Sequence[Training], on_epoch: OnEpoch) -> Iterator[tuple[int, Ended]]:
            resumable = trainings[0].resumable
            assert resumable is not None
            checkpoint = Checkpoint.read(resumable.path, resumable.key)
            trained.append(8 - (len(checkpoint.curve) if checkpoint else 0))

            def count(epochs: dict[int, Epoch]) -> object:
                reported.extend(epoch.number for epoch in epochs.values())
                return on_epoch(epochs)

            return super().train(trainings, count)  # type: ignore[arg-type]

    tune(study, job, Counting(job, prepared), tmp_path / "another machine", store=store)
    assert trained[0] < 8
    assert trained[1:] == [8]
    assert reported == [*range(1, 9), *range(1, 9)]

    def curves(of: optuna.Study) -> list[object]:
        return [(trial.values, trial.params, trial.user_attrs[CURVE]) for trial in finished_trials(of)]

    assert curves(study) == curves(undisturbed)
    assert shared(store) == []
    assert not list((tmp_path / "another machine").rglob("*.safetensors"))


def test_a_trial_that_ends_while_its_checkpoint_is_shared_leaves_none(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was the last one, and nothing comes after it but the end."""
    begun, may_end = threading.Event(), threading.Event()
    upload = store.upload

    def slow(*arguments: Any) -> None:
        begun.set()
        may_end.wait(30)
        upload(*arguments)

    monkeypatch.setattr(store, "upload", slow)
    with TrialCheckpoints(tmp_path, "study", store) as kept:
        write(kept, 1)
        kept.share(0, 2)
        assert begun.wait(30)
        kept.drop(0)
        threading.Timer(0.1, may_end.set).start()
    assert shared(store) == []


def test_a_newer_one_takes_the_place_of_the_one_before(store: Store, tmp_path: Path) -> None:
    with TrialCheckpoints(tmp_path / "here", "study", store) as here:
        for epochs in (2, 5):
            share(here, epochs)
        assert [key.split("/")[-1][:6] for key in shared(store)] == ["000006"]
        with TrialCheckpoints(tmp_path / "there", "study", store) as there:
            there.fetch(0, "training")
            assert epochs_of(there) == 5
            there.drop(0)
        assert shared(store) == []


def test_it_is_shared_now_and_then_only(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.search.checkpoints, "SHARE_SECONDS", 3600.0)
    with TrialCheckpoints(tmp_path, "study", store) as kept:
        kept.share(0, 1)
        assert kept._sharing == {}  # there is none yet
        share(kept, 1)
        share(kept, 9)
    assert [key.split("/")[-1][:6] for key in shared(store)] == ["000002"]
    assert sorted(file.name for file in (tmp_path / "study").iterdir()) == ["0.previous", "0.safetensors"]


@pytest.mark.parametrize("local", [0, 3, 5, 7])
def test_what_is_further_is_taken(store: Store, tmp_path: Path, local: int) -> None:
    with TrialCheckpoints(tmp_path / "there", "study", store) as there:
        share(there, 5)
    with TrialCheckpoints(tmp_path / "here", "study", store) as here:
        if local:
            write(here, local)
        here.fetch(0, "training")
        assert epochs_of(here) == max(5, local)
        assert not list((tmp_path / "here").rglob("*.fetched"))


@pytest.mark.parametrize("what", ["damaged", "of another training"])
def test_what_is_no_good_is_left(store: Store, tmp_path: Path, what: str) -> None:
    with TrialCheckpoints(tmp_path / "there", "study", store) as there:
        share(there, 5, "training" if what == "damaged" else "another")
    if what == "damaged":
        file = tmp_path / "store" / shared(store)[0]
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with TrialCheckpoints(tmp_path / "here", "study", store) as here:
        write(here, 2)
        here.fetch(0, "training")
        assert epochs_of(here) == 2


def test_a_store_that_is_away_is_left_alone_for_a_while_and_costs_no_trial(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    def away(*arguments: object) -> None:
        calls.append(str(arguments[0]))
        raise StoreUnavailable("the store does not answer")

    with TrialCheckpoints(tmp_path, "study", store) as kept:
        for name in ("upload", "created"):
            monkeypatch.setattr(store, name, away)
        for epochs in (1, 2, 3):
            share(kept, epochs)
        assert len(calls) == 1
        kept.fetch(0, "training")
        assert epochs_of(kept) == 3
        kept._paused_until = time.monotonic()
        share(kept, 4)
        assert len(calls) == 3
    assert caplog.text.count("checkpoints stay on this machine until the store can be had") == 1


def test_those_that_nobody_goes_on_with_are_dropped_after_a_month(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("old", "young"):
        with TrialCheckpoints(folder, name, store) as kept:
            share(kept, 1)
    now = datetime.now(UTC)
    ago = (now - timedelta(days=40)).timestamp()
    for path in (*(folder / "old").iterdir(), folder / "old", *(tmp_path / "store/checkpoints/old").rglob("*")):
        os.utime(path, (ago, ago))
    gone = drop_old_checkpoints(store, folder, now)
    assert len(gone) == 2
    assert all("checkpoints/old" in name for name in gone)
    assert [path.name for path in folder.iterdir()] == ["young"]
    assert len(shared(store)) == 1
    assert drop_old_checkpoints(store, folder, now) == []
