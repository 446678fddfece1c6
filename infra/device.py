"""The device that this process trains on. Knows nothing of what is trained."""

import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout

_MEMORY_LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA)

_logger = logging.getLogger(__name__)


def choose_device() -> torch.device:
    """The first CUDA device that is visible (CUDA_VISIBLE_DEVICES is a mask), else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def describe_device(device: torch.device) -> str:
    """What a person reads: `cuda:0 NVIDIA H100` or `cpu, 2 threads`."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.get_num_threads()} of {os.cpu_count()} threads"


def memory_bytes(device: torch.device) -> int:
    """How much memory the device has: a GPU's own, else the machine's, or as much as a limit leaves this process."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [psutil.virtual_memory().total]
    limits += [limit for kind in _MEMORY_LIMITS if (limit := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY]
    with suppress(OSError, ValueError):  # "max" where there is none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


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
