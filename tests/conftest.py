"""Real services for the tests: S3 servers, and a local stack with a home of its own.

Everything listens on loopback, on a port that was free a moment before, and is stopped by the process that started it.
A service that this machine lacks skips its tests with the reason; with NIGHTLY_REQUIRE_ALL=1 they fail instead.
"""

import fcntl
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import httpx
import optuna
import pytest
import torch
from filelock import FileLock

from models.evaluation.metrics import MetricName
from models.families.family import family_named
from models.rows.shapes import DataShape
from models.training.loop import train
from models.training.terms import Epoch, Resumable, Trained, Training
from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.data.snapshots import Snapshot
from tasks.job import DataConfig, TuningJob, parse_job
from tests.distribution import pytest_collection_modifyitems, pytest_xdist_make_scheduler  # noqa: F401 pytest's hooks
from tests.servers import (
    PostgresServer,
    S3Server,
    ceph_gateway,
    free_port,
    has_ceph,
    ministack_server,
    postgres_programs,
    postgres_server,
)

CPU = torch.device("cpu")
# What trains is tested on each kind of device that this machine has.
DEVICES = [CPU, *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]

collect_ignore = [] if torch.cuda.is_available() else ["unit/models/test_gpu.py"]
pytest_plugins = ["pytester"]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without looking for garbage: what is imported stays, and looking through it takes 2.5 of 11 s of a core
    now, and its share of each test later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def require(reason: str) -> NoReturn:
    """Skip the test, or fail it where everything is required to be there."""
    if os.environ.get("NIGHTLY_REQUIRE_ALL") == "1":
        pytest.fail(f"required, but {reason}")
    pytest.skip(reason)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of so many megabytes (`2m`), which `fill` fills."""
    if os.geteuid() != 0:
        require("only root can mount a small disk")
    folder.mkdir()
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["/usr/bin/umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def fill(disk: Path) -> Path:
    """Leave not a byte of a disk free; returns the file that is to be deleted for room."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        for size in (2**20, 4096, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler


# --- a job and its data ---------------------------------------------------------------------------------------------


def make_job(**content: object) -> TuningJob:
    """A small job on the digits; sections are replaced by what is given."""
    base: dict[str, object] = {
        "name": "small",
        "data": {"source": "sklearn://digits"},
        "search": {"space": {"epochs": 3, "batch_size": [64, 256], "width": [16, 32]}},
        "budget": {"trials": 4},
    }
    return parse_job({**base, **content}, Path("small.yaml"))


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return prepare(make_job().data, "classification", tmp_path_factory.mktemp("snapshots"))


@pytest.fixture(scope="session", params=DEVICES, ids=lambda device: device.type)
def device(request: pytest.FixtureRequest) -> torch.device:
    chosen: torch.device = request.param
    return chosen


@pytest.fixture(scope="session")
def prepared(snapshot: Snapshot, device: torch.device) -> Prepared:
    return Prepared.load(snapshot, device)


@pytest.fixture(scope="session")
def prepared_regression(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Prepared:
    data = DataConfig(source="sklearn://diabetes")
    return Prepared.load(prepare(data, "regression", tmp_path_factory.mktemp("snapshots")), device)


def train_on(
    prepared: Prepared,
    model: str = "mlp",
    *,
    seed: int = 0,
    objective: MetricName = "accuracy",
    report: Callable[[Epoch], None] = lambda _: None,
    resumable: Resumable | None = None,
    **hyperparameters: object,
) -> Trained:
    """Train three epochs unless told otherwise, with the textbook's hyperparameters but for those given."""
    family = family_named(model)
    chosen = family.hyperparameters.from_values({"epochs": 3, **hyperparameters})
    training = Training(hyperparameters=chosen, seed=seed, resumable=resumable)
    return train(prepared.setting(family, objective), training, report)


@pytest.fixture
def shape() -> DataShape:
    return DataShape(features=(1, 8, 8), outputs=10)


@pytest.fixture(autouse=True)
def _quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


# --- S3 servers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with ministack_server(tmp_path_factory.mktemp("ministack")) as server:
        yield server


@pytest.fixture(scope="session")
def rgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if not has_ceph():
        require("Ceph's gateway is not installed (Debian: ceph-mon ceph-osd radosgw ceph-common)")
    with ceph_gateway(tmp_path_factory.mktemp("rgw")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    if postgres_programs() is None:
        require("PostgreSQL's server is not installed (Debian: postgresql)")
    with postgres_server() as server:
        yield server


# --- the local stack ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """A local stack with a home of its own, and the `nightly` command against it."""

    home: Path
    environment: dict[str, str]

    @property
    def prefect_api(self) -> str:
        return f"http://127.0.0.1:{self.environment['NIGHTLY_PREFECT_PORT']}/api"

    @property
    def mlflow_url(self) -> str:
        return f"http://127.0.0.1:{self.environment['NIGHTLY_MLFLOW_PORT']}"

    def nightly(self, *arguments: str, ok: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command to its end; unless `ok` is False it must succeed."""
        finished = subprocess.run(
            [str(Path(sys.executable).parent / "nightly"), *arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert not ok or finished.returncode == 0, finished.stdout + finished.stderr
        return finished

    def prefect(self, path: str, **body: object) -> list[dict[str, object]]:
        return list(self.ask_prefect("POST", path, body).json())

    def ask_prefect(self, method: str, path: str, body: object = None) -> httpx.Response:
        """A call that Prefect's own clients would repeat too: its server answers 503 while SQLite is locked."""
        for _ in range(10):
            answer = httpx.request(method, f"{self.prefect_api}/{path}", json=body, timeout=30)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(1)
        return answer.raise_for_status()

    def flow_runs(self, job: str) -> list[dict[str, object]]:
        """The job's flow runs, newest first."""
        return self.prefect("flow_runs/filter", deployments={"name": {"any_": [job]}}, sort="EXPECTED_START_TIME_DESC")


def make_stack(home: Path) -> Stack:
    """An isolated stack's environment: nothing of Prefect's, MLflow's or ours leaks in from outside."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_", "AWS_")) and name not in ("NIGHTLY_HOME", "NIGHTLY_STORE")
    }
    jobs = home / "jobs"
    jobs.mkdir(parents=True)
    return Stack(
        home=home / "home",
        environment={
            **environment,
            "NIGHTLY_HOME": str(home / "home"),
            "NIGHTLY_JOBS": str(jobs),
            "NIGHTLY_PREFECT_PORT": str(free_port()),
            "NIGHTLY_MLFLOW_PORT": str(free_port()),
            "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        },
    )


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running local stack that all processes of a session of tests share. Its servers and its worker are left alone,
    and tests keep apart by the names of their jobs; a job that is new is made known by `apply`."""
    folder = tmp_path_factory.getbasetemp()
    with shared_stack(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) as stack:
        yield stack


@pytest.fixture(scope="session")
def breakable_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running local stack whose servers and worker a test may kill, stop and start with other settings. Whoever uses
    it runs in one process, one test after the other, and leaves it up."""
    with running_stack(tmp_path_factory.mktemp("breakable-stack")) as stack:
        yield stack


@contextmanager
def running_stack(folder: Path) -> Iterator[Stack]:
    stack = start_stack(folder)
    try:
        yield stack
    finally:
        stack.nightly("down")


@contextmanager
def shared_stack(folder: Path) -> Iterator[Stack]:
    """The stack of several processes, which the first one starts and the last one stops; `folder` is common to them.
    Each holds a lock on one file, which the kernel frees when its holder dies."""
    with (folder / "stack.users").open("w") as users, FileLock(folder / "stack.lock") as starting:
        fcntl.flock(users, fcntl.LOCK_SH)
        running = folder / "stack.json"
        if not running.exists():
            started = start_stack(Path(tempfile.mkdtemp(prefix="stack-", dir=folder)))
            running.write_text(json.dumps(started.environment))
        environment = json.loads(running.read_text())
        stack = Stack(home=Path(environment["NIGHTLY_HOME"]), environment=environment)
        starting.release()
        try:
            yield stack
        finally:
            starting.acquire()
            with suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                running.unlink()
                stack.nightly("down")


def start_stack(folder: Path) -> Stack:
    stack = make_stack(folder)
    write_jobs(Path(stack.environment["NIGHTLY_JOBS"]))
    stack.nightly("up")
    return stack


def write_jobs(folder: Path) -> None:
    """Jobs of tiny trials, none of which is due soon: one is in twelve hours, and day by day."""
    yearly = "0 2 1 1 *"
    for name, trials, cron in (
        ("quick", 6, yearly),
        ("quick-s3", 5, yearly),
        ("shadow", 2, yearly),
        ("missed", 2, f"0 {(datetime.now(UTC).hour + 12) % 24} * * *"),
        ("zombie", 400, yearly),
        ("refusing", 2, yearly),
        ("asked-yes", 2, yearly),
        ("asked-no", 2, yearly),
        ("asked-nobody", 2, yearly),
    ):
        minutes = 0.1 if name == "asked-nobody" else 10
        promotion = f"{{mode: ask, ask_minutes: {minutes}}}" if name.startswith("asked") else "{}"
        unchanged = "skip" if name == "quick" else "continue"
        (folder / f"{name}.yaml").write_text(
            f"name: {name}\n"
            f"data: {{source: 'sklearn://digits', unchanged: {unchanged}}}\n"
            f"search: {{pruner: none, space: {{epochs: 2, batch_size: 64, width: [16, 32], depth: 1}}}}\n"
            f"budget: {{trials: {trials}, minutes: 10}}\n"
            "confirm: {candidates: 2, seeds: 2}\n"
            f"promotion: {promotion}\n"
            f"schedule: {{cron: '{cron}', overlap: {'refuse' if name == 'refusing' else 'wait'}}}\n"
        )
    (folder / "slow.py").write_text("import time\ndef rows():\n    time.sleep(600)\n")
    (folder / "cancelled-prepare.yaml").write_text(
        f"name: cancelled-prepare\ndata: {{source: 'slow.py:rows'}}\nschedule: {{cron: '{yearly}'}}\n"
    )
