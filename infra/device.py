"""The device that this process trains on. Knows nothing of what is trained."""

import logging
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout

from infra.settings import CPU_PART

POLL_SECONDS = 0.2
MEMORY_SECONDS = 30
MEMORY_TOLERANCE_BYTES = 64 * 2**20
# Not the folder for temporary files that the environment names: that may be each user's own.
DEVICES_OF_THE_HOST = Path("/tmp/nightly-tuner-devices")  # noqa: S108

# What a process has used of them by now, by psutil's names.
_MEMORY_LIMITS = {resource.RLIMIT_AS: "vms", resource.RLIMIT_DATA: "data"}

_logger = logging.getLogger(__name__)


class NotNeeded(Exception):
    """Nobody needs the device any more."""


def choose_device() -> torch.device:
    """The first CUDA device that is visible (CUDA_VISIBLE_DEVICES is a mask), else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def describe_device(device: torch.device) -> str:
    """What a person reads: `cuda:0 NVIDIA H100` or `cpu, 2 threads`."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    part = f" {os.environ[CPU_PART]}" if CPU_PART in os.environ else ""
    return f"cpu{part}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def device_use(device: torch.device) -> str:
    """How busy the device is, with whatever it does: a GPU's memory, or the CPU's time since this was last asked."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{used_bytes(device) / 1e9:.1f} of {total / 1e9:.0f} GB of {device}"
    return f"CPU {psutil.cpu_percent():.0f} %"


def memory_bytes(device: torch.device) -> int:
    """How much memory the device has: a GPU's own, else the machine's, or as much as a limit leaves this process."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [psutil.virtual_memory().total]
    used = psutil.Process().memory_info()
    for kind, name in _MEMORY_LIMITS.items():
        if (limit := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY:
            # Libraries alone may take most of it, torch's with CUDA above all. Only Linux counts `data`.
            limits.append(max(0, limit - getattr(used, name, 0)))
    with suppress(OSError, ValueError):  # "max" where there is none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def used_bytes(device: torch.device) -> int:
    """How much of a GPU's memory is in use, by whomever; 0 of a CPU. Asks the driver, and makes no context."""
    return int(torch.cuda.device_memory_used(device)) if device.type == "cuda" else 0


def wait_for_memory(device: torch.device, used_before: int) -> None:
    """Wait until a process that was killed has given back what it had of a GPU, or for half a minute at most: the
    driver may take its time, and somebody else may have taken it."""
    deadline = time.monotonic() + MEMORY_SECONDS
    while (kept := used_bytes(device) - used_before) > MEMORY_TOLERANCE_BYTES:
        if time.monotonic() > deadline:
            _logger.warning(
                "%.1f GB of %s are still in use %d s after a training ended", kept / 1e9, device, MEMORY_SECONDS
            )
            return
        time.sleep(POLL_SECONDS)


@contextmanager
def hold_device(
    device: torch.device, home: Path, rank: int = 0, is_needed: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Have the device to oneself: a second night waits here, and of those that wait the one of the lowest rank is next.
    The kernel frees a lock when its holder dies. Raises NotNeeded where `is_needed` says so while one waits."""
    # A GPU is one for the whole host and all its users; a CPU, which the system divides, for one home.
    of_all_users = device.type == "cuda"
    locks = _folder(DEVICES_OF_THE_HOST if of_all_users else home / "locks", of_all_users=of_all_users)
    waiting = _folder(locks / f"waiting-{_identity(device)}", of_all_users=of_all_users)
    lock = _file_lock(locks / f"device-{_identity(device)}.lock", of_all_users=of_all_users)
    place = _file_lock(waiting / f"{rank}-{os.getpid()}", of_all_users=of_all_users)
    with place:
        if not _is_next(lock, waiting, rank):
            _logger.info("waiting for %s, which another night holds", device)
            while not _is_next(lock, waiting, rank):
                if not is_needed():
                    raise NotNeeded
                time.sleep(POLL_SECONDS)
    Path(place.lock_file).unlink(missing_ok=True)
    try:
        yield
    finally:
        lock.release()


def _identity(device: torch.device) -> str:
    """A GPU by its own identity, whatever number a mask gives it; of a CPU that is divided, the part."""
    if device.type == "cuda":
        return f"cuda-{torch.cuda.get_device_properties(device).uuid}"
    return f"cpu-{os.environ.get(CPU_PART, 'whole').replace(' ', '-')}"


def _folder(folder: Path, *, of_all_users: bool) -> Path:
    """Without the sticky bit, under which Linux lets no one open a file for writing that another user made
    (fs.protected_regular)."""
    with suppress(FileExistsError):
        folder.mkdir(parents=True)
        if of_all_users:
            folder.chmod(0o777)
    return folder


def _file_lock(path: Path, *, of_all_users: bool) -> FileLock:
    return FileLock(path, mode=0o666) if of_all_users else FileLock(path)


def _is_next(lock: FileLock, waiting: Path, rank: int) -> bool:
    """Take the lock unless somebody of a lower rank waits for it."""
    for file in waiting.iterdir():
        if int(file.name.split("-")[0]) < rank:
            try:
                with FileLock(file, timeout=0):
                    file.unlink(missing_ok=True)  # whoever waited died
            except Timeout:
                return False
    with suppress(Timeout):
        lock.acquire(timeout=0)
        return True
    return False
