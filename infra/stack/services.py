"""The services of a local stack: which processes they are, where they listen, and how to see that they work.

Knows nothing of how a service is started and stopped.
"""

import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from infra.errors import ExpectedError
from infra.records import LOOPBACK
from infra.settings import CPU_PART, Settings

# Of a machine without a GPU; a small model gains little from more.
CORES_A_WORKER = 4


class StackError(ExpectedError):
    """The stack cannot be started or stopped; the message names the service, the reason and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """One process of the stack, and how to see that it is healthy."""

    name: str
    command: tuple[str, ...]
    reads: str = ""  # the prefix of the settings that it depends on
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None
    port_variable: str = ""
    health_url: str = ""
    polls: tuple[str, str] | None = None  # the work pool that a worker takes runs from, and its name there
    database: Path | None = None  # a SQLite file that others use beside it

    @property
    def page(self) -> str | None:
        return None if self.port is None else f"http://{LOOPBACK}:{self.port}"


def servers(settings: Settings) -> list[Service]:
    """The servers that this machine runs: none that the environment places elsewhere by its own URL."""
    here = f"{LOOPBACK}:{settings.mlflow_port},localhost:{settings.mlflow_port}"
    prefect = Service(
        name="prefect",
        reads="PREFECT_",
        command=(
            sys.executable, "-m", "prefect", "server", "start",
            "--host", LOOPBACK, "--port", str(settings.prefect_port),
        ),
        port=settings.prefect_port,
        port_variable="NIGHTLY_PREFECT_PORT",
        health_url=f"http://{LOOPBACK}:{settings.prefect_port}/api/health",
    )  # fmt: skip
    mlflow = Service(
        name="mlflow",
        reads="MLFLOW_",
        command=(
            sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(settings.mlflow_port),
            # With several workers uvicorn opens the socket itself, without TCP_NODELAY, and each call takes 40 ms more.
            "--workers", "1", "--allowed-hosts", here,
            "--backend-store-uri", f"sqlite:///{settings.mlflow_database}",
            "--artifacts-destination", (settings.home / "mlflow/artifacts").as_uri(),
        ),
        port=settings.mlflow_port,
        port_variable="NIGHTLY_MLFLOW_PORT",
        health_url=f"http://{LOOPBACK}:{settings.mlflow_port}/health",
        database=settings.mlflow_database,
    )  # fmt: skip
    return [
        service
        for service, elsewhere in ((prefect, settings.external_prefect_url), (mlflow, settings.external_mlflow_url))
        if elsewhere is None
    ]


def worker(settings: Settings) -> Service:
    """The worker. It takes every night that is due; a deployment runs once at a time, and nights share the device one
    after the other (device.py)."""
    return _worker("worker", settings.work_pool, "local")


def device_workers(pool: str, devices: str, cuda_devices: int) -> list[Service]:
    """A worker for each device, which takes one run at a time and sees no other device. `devices` are `auto`, GPUs by
    their numbers as `0,1`, or `cpu:2`, the CPU in two parts; `cuda_devices` is how many GPUs are visible. Raises
    StackError where they are none of these."""
    if devices == "auto":
        devices = ",".join(map(str, range(cuda_devices))) or f"cpu:{max(1, (os.cpu_count() or 1) // CORES_A_WORKER)}"
    if found := re.fullmatch(r"cpu:([1-9]\d*)", devices):
        parts = int(found[1])
        threads = str(max(1, (os.cpu_count() or 1) // parts))
        return [
            _device_worker(
                pool, f"cpu-{part}", {CPU_PART: f"part {part} of {parts}", "OMP_NUM_THREADS": threads,
                                      "CUDA_VISIBLE_DEVICES": ""}
            )
            for part in range(1, parts + 1)
        ]  # fmt: skip
    numbers = devices.split(",")
    wrong = [number for number in numbers if not number.isdigit() or int(number) >= cuda_devices]
    if wrong:
        raise StackError(
            f"--devices must be auto, cpu:N, or numbers below {cuda_devices} (the GPUs that are visible here), "
            f"found {devices!r}; name others"
        )
    mask = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    visible = mask or [str(number) for number in range(cuda_devices)]
    return [
        _device_worker(pool, f"cuda-{number}", {"CUDA_VISIBLE_DEVICES": visible[int(number)]}) for number in numbers
    ]


def _device_worker(pool: str, device: str, environment: Mapping[str, str]) -> Service:
    return _worker(f"worker-{device}", pool, device, "--limit", "1", environment=environment)


def _worker(
    service: str, pool: str, part: str, *options: str, environment: Mapping[str, str] = MappingProxyType({})
) -> Service:
    name = f"{socket.gethostname()}-{part}"
    return Service(
        name=service,
        command=(
            sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", name,
            *options,
        ),
        environment=environment,
        polls=(pool, name),
    )  # fmt: skip
