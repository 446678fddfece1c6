"""Who gets the device, and when."""

import os
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from infra import device
from infra.device import NotNeeded, describe_device, hold_device, wait_for_memory
from infra.settings import CPU_PART
from tests.conftest import CPU, require
from tests.servers import wait_for
from tests.users import as_other_user, other_user_cannot_be


def test_the_lowest_rank_that_waits_is_next_and_a_dead_one_holds_nobody_up(tmp_path: Path) -> None:
    waiting = tmp_path / "locks/waiting-cpu-whole"
    dead = waiting / "0-999999"
    got: list[int] = []

    def wait(rank: int) -> None:
        with hold_device(CPU, tmp_path, rank):
            got.append(rank)

    def stands(many: int) -> bool:
        return len([place for place in waiting.iterdir() if place != dead]) == many

    with hold_device(CPU, tmp_path):
        dead.touch()  # of a process that died while it waited
        threads = [threading.Thread(target=wait, args=(rank,)) for rank in (2, 1, 0)]
        for standing, thread in enumerate(threads, start=1):
            thread.start()
            wait_for(partial(stands, standing), 10, "it to stand in line")
    for thread in threads:
        thread.join(timeout=30)
    assert got == [0, 1, 2]
    assert list(waiting.iterdir()) == []


def test_parts_of_a_cpu_are_devices_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold_device(CPU, tmp_path):
        monkeypatch.setenv(CPU_PART, "part 1 of 2")
        with hold_device(CPU, tmp_path), pytest.raises(NotNeeded), hold_device(CPU, tmp_path, is_needed=lambda: False):
            pass
    assert "cpu part 1 of 2" in describe_device(CPU)


@pytest.mark.process
def test_a_gpu_is_shared_by_the_users_of_a_host_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a fake of the GPU's identity; the locks, and the two users, are real. Whoever was there first made the files
    that the other one needs."""
    if reason := other_user_cannot_be():
        require(reason)
    script = (
        "import sys, torch; from pathlib import Path; from infra import device\n"
        "device.DEVICES_OF_THE_HOST, device._identity = Path(sys.argv[1]), lambda _: 'cuda-fake'\n"
        "def needed(): raise SystemExit('held')\n"
        "with device.hold_device(torch.device('cuda', 0), Path(), is_needed=needed): print('free')\n"
    )
    locks = tmp_path / "locks"
    theirs = as_other_user(sys.executable, "-c", script, str(locks), environment={"PYTHONPATH": str(Path.cwd())})

    def they_ask() -> str:
        finished = subprocess.run(theirs, capture_output=True, text=True, timeout=120, check=False, umask=0o077)
        return finished.stdout + finished.stderr

    def we_hold() -> AbstractContextManager[None]:
        return hold_device(torch.device("cuda", 0), Path(), is_needed=partial(pytest.fail, "it is held"))

    monkeypatch.setattr(device, "DEVICES_OF_THE_HOST", locks)
    monkeypatch.setattr(device, "_identity", lambda _: "cuda-fake")
    umask = os.umask(0o077)
    try:
        with we_hold():
            pass
        assert they_ask() == "free\n"
        with we_hold():
            assert they_ask() == "held\n"
    finally:
        os.umask(umask)


@pytest.mark.parametrize(("gigabytes", "looks", "warns"), [([9, 5, 1, 1], 3, False), ([9] * 10, 10, True)])
def test_memory_of_a_killed_training_is_waited_for(
    gigabytes: list[int], looks: int, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By fakes of the driver, which says what a GPU has in use each time that it is asked, and of the clock, which only
    waiting moves."""
    said = iter(gigabytes)
    asked = []
    slept = [0.0]

    def fake_used_bytes(_: torch.device) -> int:
        asked.append(next(said) * 10**9)
        return asked[-1]

    monkeypatch.setattr(device, "used_bytes", fake_used_bytes)
    monkeypatch.setattr(device, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append))
    monkeypatch.setattr(device, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(device, "MEMORY_SECONDS", 0.85)
    wait_for_memory(torch.device("cuda", 0), 10**9)
    assert len(asked) == looks
    assert ("8.0 GB of cuda:0 are still in use" in caplog.text) is warns
