"""The local stack, started and stopped: its services (services.py) as processes of this machine.

Each service leaves a record (process id and start time) below the home; a record counts only while that very process
lives, so a stale one is harmless. Knows nothing of jobs.
"""

import contextlib
import errno
import hashlib
import os
import re
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
from filelock import FileLock, Timeout

from infra.prefect_api import certificates, is_polling
from infra.records import LOOPBACK, left_behind, read_record, recorded_process, why_not_free, write_record
from infra.settings import Settings
from infra.stack.services import Service, StackError, servers, worker

START_SECONDS = 180
STOP_SECONDS = 20
MOST_LETTERS = 300

_ERROR = re.compile(r"[\w.]*(Error|Exception)\b")


@dataclass(frozen=True, kw_only=True)
class Running:
    """A service whose process lives."""

    settings: Settings
    service: Service
    process: psutil.Process

    @property
    def since(self) -> datetime:
        return datetime.fromtimestamp(self.process.create_time(), UTC)

    @property
    def healthy(self) -> bool:
        """Whether a server answers; whether a worker has told Prefect, since it started, that it waits for runs."""
        if self.service.polls is not None:
            return is_polling(self.settings, *self.service.polls, running_for=datetime.now(UTC) - self.since)
        return not self.service.health_url or _answers(self.service.health_url)


def recorded_device_workers(settings: Settings) -> list[Service]:
    """The workers of single devices that run here, by what their records say."""
    names = sorted(record.stem for record in (settings.home / "run").glob("worker-*.json"))
    found = (Service(name=name, command=()) for name in names)
    return [service for service in found if find(settings, service) is not None]


@contextlib.contextmanager
def one_at_a_time(settings: Settings) -> Iterator[None]:
    """Two commands must not start or stop the same stack at once. Raises StackError."""
    try:
        with FileLock(settings.home / "stack.lock", timeout=0):
            yield
    except Timeout:
        raise StackError(
            f"another command is starting or stopping the stack in {settings.home}; wait until it is done"
        ) from None


def start(settings: Settings, services: list[Service], say: Callable[[str], None]) -> None:
    """Start the services and wait until each is healthy, as `starting` does."""
    with starting(settings, services, say):
        pass


@contextlib.contextmanager
def starting(settings: Settings, services: list[Service], say: Callable[[str], None]) -> Iterator[None]:
    """Start the services that do not run yet, or not with these settings; wait behind the block, which has other things
    to do meanwhile, until each is healthy.

    Raises StackError: a port is taken, or a service ended or stayed silent. What this call started is stopped again
    then, and where the block raises anything, as Ctrl-C does.
    """
    missing = []
    for service in services:
        running = find(settings, service)
        if running and not (changed := _changed_settings(settings, service)):
            say(f"{service.name} runs already since {running.since:%Y-%m-%d %H:%M:%S} UTC")
            continue
        if running and night_runs(settings):
            say(
                f"{service.name} keeps its old settings ({', '.join(changed)} changed) while a night runs; "
                "repeat `nightly up` after it"
            )
            continue
        stop(settings, service)
        _require_free_port(service)
        missing.append(service)
    started: list[Running] = []
    try:
        for service in missing:
            started.append(_spawn(settings, service))  # noqa: PERF401 what was started so far must be known on error
        yield
        for running in started:
            _wait_until_healthy(settings, running)
            say(f"{running.service.name} is up" + (f" at {running.service.page}" if running.service.page else ""))
    except BaseException:
        for running in started:
            stop(settings, running.service)
        raise


def stop(settings: Settings, service: Service) -> bool:
    """Stop a service and every process it started; returns whether it ran."""
    running = find(settings, service)
    if running is not None:
        # The children too, and while the servers still answer: a night then tells that it was stopped.
        family = [*running.process.children(recursive=True), running.process]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
        _kill(alive)
    _kill(left_behind(_record(settings, service)))
    _record(settings, service).unlink(missing_ok=True)
    return running is not None


def find(settings: Settings, service: Service) -> Running | None:
    """The service's process, if the one that its record names still lives."""
    process = recorded_process(_record(settings, service))
    return None if process is None else Running(settings=settings, service=service, process=process)


def is_prefect_ours(settings: Settings) -> bool:
    """Whether the Prefect server is one that `nightly up` started from this home: not somebody else's, on the same port
    or elsewhere."""
    return any(service.name == "prefect" and find(settings, service) is not None for service in servers(settings))


def night_runs(settings: Settings) -> bool:
    """Whether a worker of this machine has a flow run under way."""
    workers = (worker(settings), *recorded_device_workers(settings))
    return any((running := find(settings, one)) is not None and running.process.children() for one in workers)


def log_file(settings: Settings, service: Service) -> Path:
    return settings.home / "logs" / f"{service.name}.log"


def _spawn(settings: Settings, service: Service) -> Running:
    for folder in ("logs", "run", "mlflow", "prefect"):
        (settings.home / folder).mkdir(exist_ok=True)
    if service.database is not None:
        # Nobody waits for another to read or write, and a commit waits for the disk once. SQLite keeps it in the file.
        with contextlib.closing(sqlite3.connect(service.database)) as database:
            database.execute("PRAGMA journal_mode = WAL")
    with log_file(settings, service).open("ab") as log:
        log_begins = log.tell()
        spawned = subprocess.Popen(
            service.command,
            env={**os.environ, **settings.environment(), **service.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C is not for a server
        )
    process = psutil.Process(spawned.pid)
    write_record(
        _record(settings, service), process, settings=_read_settings(settings, service), port=service.port,
        log_begins=log_begins,
    )  # fmt: skip
    return Running(settings=settings, service=service, process=process)


def _read_settings(settings: Settings, service: Service) -> dict[str, str]:
    """By their digests: some are secrets, which no file is to hold."""
    return {
        name: hashlib.sha256(value.encode()).hexdigest()
        for name, value in settings.environment().items()
        if name.startswith(service.reads)
    }


def _changed_settings(settings: Settings, service: Service) -> list[str]:
    """The variables that the running service was started with and that are others now."""
    began_with = (read_record(_record(settings, service)) or {}).get("settings", {})
    now = _read_settings(settings, service)
    return sorted(name for name in began_with.keys() | now.keys() if began_with.get(name) != now.get(name))


def _wait_until_healthy(settings: Settings, running: Running) -> None:
    """Until it works: a server answers, a worker asks for runs."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if find(settings, running.service) is None:
            raise StackError(f"{running.service.name} ended while it started: {_last_words(settings, running.service)}")
        if running.healthy:
            return
        time.sleep(0.2)
    raise StackError(
        f"{running.service.name} did not answer within {START_SECONDS} s: {_last_words(settings, running.service)}"
    )


def _last_words(settings: Settings, service: Service) -> str:
    """The last line that names an error among those that a service wrote since it started, else the last of them, and
    where the rest stands."""
    log = log_file(settings, service)
    with log.open("rb") as file:
        file.seek((read_record(_record(settings, service)) or {}).get("log_begins", 0))
        text = file.read().decode(errors="replace")
    lines = ["".join(filter(str.isprintable, line)).strip() for line in text.splitlines()]
    said = [line for line in lines if line] or ["it wrote nothing"]
    named = next((line for line in reversed(said) if _ERROR.match(line)), said[-1])
    return f"{named[:MOST_LETTERS]} (the whole log: {log})"


def _require_free_port(service: Service) -> None:
    if service.port is None or (error := why_not_free(service.port)) is None:
        return
    remedy = f"stop what uses it or set {service.port_variable} to another port"
    if error.errno == errno.EADDRNOTAVAIL:
        remedy = f"give this machine's loopback that address (ip address add {LOOPBACK}/8 dev lo)"
    raise StackError(
        f"{service.name} cannot listen on port {service.port} of {LOOPBACK} ({error.strerror}): {remedy}"
    ) from error


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=STOP_SECONDS)


def _record(settings: Settings, service: Service) -> Path:
    return settings.home / "run" / f"{service.name}.json"


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, verify=certificates()).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
