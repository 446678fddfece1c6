"""The device that this process trains on. Knows nothing of what is trained."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

_logger = logging.getLogger(__name__)


def choose_device() -> torch.device:
    """The first CUDA device that is visible (CUDA_VISIBLE_DEVICES is a mask), else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def describe_device(device: torch.device) -> str:
    """What a person reads: `cuda:0 NVIDIA H100` or `cpu, 2 threads`."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.get_num_threads()} of {os.cpu_count()} threads"


@contextmanager
def hold_device(device: torch.device, locks: Path) -> Iterator[None]:
    """Have the device to oneself: a second night waits here. The kernel frees the lock when its holder dies."""
    locks.mkdir(exist_ok=True)
    lock = FileLock(locks / f"device-{device.type}-{device.index or 0}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _logger.info("waiting for %s, which another night holds", device)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
