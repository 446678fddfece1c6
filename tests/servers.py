"""Real S3 and PostgreSQL servers on loopback, on ports that were free a moment before, stopped by the process that
started them; and what else the tests ask of the machine."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import httpx

ACCESS_KEY, SECRET_KEY = "nightlytests", "a-secret-that-only-these-tests-know"


@dataclass(frozen=True)
class S3Server:
    """Where an S3 server listens, and how a process is told to use it."""

    endpoint: str
    ceph: Path | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def make_user(self, name: str) -> dict[str, str]:
        """Another user of Ceph's gateway; returns the environment with its credentials."""
        secret = f"the-secret-of-{name}"
        self._administer(
            "user", "create", f"--uid={name}", f"--display-name={name}", f"--access-key={name}", f"--secret={secret}"
        )
        return self.environment | {"AWS_ACCESS_KEY_ID": name, "AWS_SECRET_ACCESS_KEY": secret}

    def rotate_key(self, name: str) -> dict[str, str]:
        """Give a user a new key and take the old one away; returns the environment with the new one."""
        key, secret = f"{name}-new", f"the-new-secret-of-{name}"
        self._administer("key", "create", f"--uid={name}", f"--access-key={key}", f"--secret={secret}")
        self._administer("key", "rm", f"--uid={name}", f"--access-key={name}")
        return self.environment | {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}

    def _administer(self, *arguments: str) -> None:
        assert self.ceph is not None
        environment = {**os.environ, "CEPH_CONF": str(self.ceph / "ceph.conf")}
        command = [shutil.which("radosgw-admin") or "", *arguments]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)

    def start_gateway(self, port: int) -> subprocess.Popen[bytes]:
        """Another gateway before the same Ceph cluster; whoever starts it stops it."""
        assert self.ceph is not None
        command = [
            shutil.which("radosgw") or "", "-f", "-n", "client.rgw",
            f"--rgw-frontends=beast endpoint=127.0.0.1:{port}",
        ]  # fmt: skip
        environment = {**os.environ, "CEPH_CONF": str(self.ceph / "ceph.conf")}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: _listens(port), 60, "the second gateway")
        return process

    @cached_property
    def client(self) -> Any:
        """boto3's client with the rights of the buckets' owner."""
        return boto3.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )

    def make_bucket(self, name: str) -> None:
        self.client.create_bucket(Bucket=name)


@contextmanager
def ministack_server(folder: Path) -> Iterator[S3Server]:
    """A quick S3 emulator. It knows no authentication, and says nothing of durability."""
    port = free_port()
    environment = {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "SERVICES": "s3"}
    with background([sys.executable, "-m", "ministack"], folder / "log", **environment):
        wait_for(lambda: _listens(port), 60, "MiniStack")
        yield S3Server(f"http://127.0.0.1:{port}")


def has_ceph() -> bool:
    return shutil.which("radosgw") is not None


@contextmanager
def ceph_gateway(folder: Path) -> Iterator[S3Server]:
    """Ceph's RADOS gateway: a real S3 server with authentication and durability."""
    port = free_pair_of_ports()
    script = str(Path(__file__).parent / "rgw.sh")
    command = ["/bin/bash", script, str(folder), str(port), ACCESS_KEY, SECRET_KEY]
    with background(command, folder / "log") as process:
        wait_for(lambda: (folder / "ready").exists() or process.poll() is not None, 120, "Ceph's gateway")
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        yield S3Server(f"http://127.0.0.1:{port}", ceph=folder)


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's server programs, as Debian lays them, or wherever they are on the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


class PostgresServer:
    """A PostgreSQL server that asks its user `nightly` for a password. It refuses to run as root, so root runs it as
    `postgres`. It listens on one address, of whatever host the commands `within` lead to, for that host's network."""

    password = "a password that only these tests know"  # noqa: S105

    def __init__(self, folder: Path, address: str = "127.0.0.1", within: Sequence[str] = ()) -> None:
        programs = postgres_programs()
        assert programs is not None
        self._programs, self._folder, self._address, self._within = programs, folder, address, within
        self._as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        self._as_postgres = self._as_postgres if os.geteuid() == 0 else []
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        (folder / "password").write_text(self.password)
        if self._as_postgres:
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres", "postgres")
        initdb = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", "nightly", "-A", "scram-sha-256"]
        subprocess.run(
            [*self._as_postgres, *initdb, "-N", f"--pwfile={folder / 'password'}"],
            check=True, capture_output=True, cwd=folder,
        )  # fmt: skip
        with (folder / "data/pg_hba.conf").open("a") as rights:
            rights.write(f"host all all {address}/24 scram-sha-256\n")

    @property
    def place(self) -> str:
        return f"nightly@{self._address}:{self.port}"

    @property
    def url(self) -> str:
        return f"postgresql://{self.place}/postgres"

    def start(self) -> None:
        command = [
            str(self._programs / "postgres"), "-D", str(self._folder / "data"), "-p", str(self.port),
            "-h", self._address, "-k", str(self._folder), "-F",
        ]  # fmt: skip
        log = self._folder / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*self._within, *self._as_postgres, *command], stdout=output, stderr=subprocess.STDOUT, cwd=self._folder
            )
        process = self._process
        wait_for(lambda: self._is_ready() or process.poll() is not None, 60, "PostgreSQL")
        assert process.poll() is None, log.read_text()[-2000:]

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # its fast shutdown
            self._process.wait(30)

    def ask(self, database: str, query: str) -> list[str]:
        """The rows that a query gives, as text."""
        command = [
            str(self._programs / "psql"), "-h", self._address, "-p", str(self.port), "-U", "nightly", "-d", database,
            "-A", "-t", "-c", query,
        ]  # fmt: skip
        asked = subprocess.run(
            [*self._within, *command], env={**os.environ, "PGPASSWORD": self.password}, capture_output=True, text=True,
            check=True, timeout=60,
        )  # fmt: skip
        return asked.stdout.splitlines()

    def _is_ready(self) -> bool:
        command = [str(self._programs / "pg_isready"), "-h", self._address, "-p", str(self.port)]
        return subprocess.run([*self._within, *command], capture_output=True, check=False).returncode == 0


@contextmanager
def postgres_server(address: str = "127.0.0.1", within: Sequence[str] = ()) -> Iterator[PostgresServer]:
    with tempfile.TemporaryDirectory(prefix="nightly-postgres-", ignore_cleanup_errors=True) as name:
        server = PostgresServer(Path(name), address, within)
        try:
            server.start()
            yield server
        finally:
            server.stop()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def free_pair_of_ports() -> int:
    """The first of two free ports in a row, below those that the kernel gives to connections of its own accord."""
    for port in random.sample(range(20_000, 32_000, 2), 100):
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port
    raise OSError("no two free ports in a row were found")


def private_bytes() -> int:
    """What RLIMIT_DATA counts of this process: its memory that is no file's and no other process's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmData")).split()[1])


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.2)


@contextmanager
def background(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the time of the block: TERM at its end, KILL where that is not enough."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
