"""What only a GPU can show; collected where there is one. What trains is tested on each device by the other files."""

from collections.abc import Callable

import pynvml
import pytest
import torch

import models.fused.fusion
import models.fused.replay
import models.fused.train
from infra.device import MEMORY_TOLERANCE_BYTES, used_bytes
from models.families.family import family_named
from models.train import train_all
from models.training.terms import Setting, Trained, Training
from tasks.data.prepared import Prepared
from tasks.data.snapshots import Snapshot
from tasks.trainer.processes import TrainerProcesses
from tests.conftest import make_job

GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def on_gpu(snapshot: Snapshot) -> Setting:
    return Prepared.load(snapshot, GPU).setting(family_named("mlp"), "accuracy")


def some_trainings(setting: Setting, count: int, **chosen: object) -> list[Training]:
    read = setting.family.hyperparameters.from_values
    values = {"epochs": 4, "batch_size": 32, "optimizer": "momentum", "dropout": 0.2, **chosen}
    return [Training(hyperparameters=read(values), seed=seed) for seed in range(count)]


def trained(setting: Setting, trainings: list[Training]) -> list[Trained]:
    outcomes = dict(train_all(setting, trainings))
    return [outcomes[place] for place in range(len(trainings))]  # type: ignore[misc]


@pytest.mark.parametrize("members", [1, 4])
def test_steps_are_recorded_once_and_replayed_to_the_same_result(
    on_gpu: Setting, members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = []
    record = models.fused.replay.Replay._recorded

    def keep(replay: models.fused.replay.Replay, function: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        recorded.append(record(replay, function))
        return recorded[-1]

    monkeypatch.setattr(models.fused.replay.Replay, "_recorded", keep)
    replayed = trained(on_gpu, some_trainings(on_gpu, members))
    assert len(recorded) == 1
    assert recorded[0] is not None
    monkeypatch.setattr(models.fused.replay, "WARM_UP_CALLS", 10**9)
    launched = trained(on_gpu, some_trainings(on_gpu, members))
    assert [one.epochs for one in replayed] == [one.epochs for one in launched]


def test_what_cannot_be_recorded_is_launched_kernel_by_kernel(caplog: pytest.LogCaptureFixture) -> None:
    """A copy from the host's memory is something that a graph cannot hold."""
    replay = models.fused.replay.Replay(GPU)
    total = torch.zeros((), device=GPU)

    def add() -> None:
        total.add_(torch.tensor([1.0, 2.0]).to(GPU).sum())

    with caplog.at_level("INFO"):
        for _ in range(6):
            replay(add)
    assert total.item() == 18
    assert caplog.text.count("kernel by kernel") == 1


def test_a_group_too_large_for_the_memory_is_halved_and_ends_as_it_would(
    on_gpu: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The process is allowed half of what sixteen large models took as one, and no model is kept meanwhile."""
    some = dict(enumerate(some_trainings(on_gpu, 16, width=2048, depth=3, epochs=1)))
    monkeypatch.setattr(models.fused.fusion, "MEMORY_SHARE", 100.0)

    def objectives() -> dict[int, float]:
        outcomes = models.fused.train.train_fused(on_gpu, some, lambda _: ())
        return {place: outcome.kept.objective for place, outcome in outcomes if isinstance(outcome, Trained)}

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(GPU)
    expected = objectives()
    peak = torch.cuda.max_memory_reserved(GPU)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5 * peak / torch.cuda.get_device_properties(GPU).total_memory)
    try:
        with caplog.at_level("WARNING"):
            found = objectives()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "do not fit into memory; going on with halves" in caplog.text
    assert found == pytest.approx(expected, abs=0.02)


def processes_on_the_gpu() -> set[int]:
    pynvml.nvmlInit()
    try:
        return {one.pid for one in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))}
    finally:
        pynvml.nvmlShutdown()


def test_a_trainer_that_is_killed_leaves_the_gpu_before_the_next_one_starts(
    snapshot: Snapshot, on_gpu: Setting
) -> None:
    seen = []
    before = used_bytes(GPU)

    def look(_: object) -> list[int]:
        seen.append(processes_on_the_gpu())
        return []

    with TrainerProcesses(make_job(), snapshot, GPU) as trainer:
        assert len(list(trainer.train(some_trainings(on_gpu, 4), look))) == 4
        (killed,) = trainer.process_ids
        trainer.close()
        assert killed in seen[0]
        assert killed not in processes_on_the_gpu()
        assert used_bytes(GPU) - before <= MEMORY_TOLERANCE_BYTES
