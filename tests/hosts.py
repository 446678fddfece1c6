"""Several hosts on one machine: a network namespace each, joined by a bridge, with an address, a name and a process
tree of their own. Made by root only, reached from elsewhere only through `lead_to`, and gone with the block that made
them."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.servers import free_port

BRIDGE = "bridge"
IP = shutil.which("ip") or "ip"


def hosts_cannot_be_made() -> str:
    """Why not; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces are made by root only"
    missing = [name for name in ("ip", "unshare", "socat") if shutil.which(name) is None]
    return f"{', '.join(missing)} not installed (Debian: iproute2 util-linux socat)" if missing else ""


@dataclass
class Host:
    """A host on the network of the block that made it; the first one has the bridge."""

    namespace: str
    address: str
    folder: Path
    doors: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """What its processes write."""
        return self.folder / f"{self.namespace}.log"

    def command(self, *command: str) -> list[str]:
        return [IP, "netns", "exec", self.namespace, *command]

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """A process with a name and process tree of its own; with it everything that it started ends."""
        inside = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "sh", "-c"]
        script = f'hostname {self.namespace}; exec "$@"'
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command(*inside, script, "sh", *command),
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def run(self, *command: str, **environment: str) -> str:
        finished = subprocess.run(
            self.command(*command), env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    def lead_to(self, port: int) -> int:
        """Open a port of this machine's own loopback that leads to one of the host's, by way of a socket file: the
        hosts' network stays their own."""
        door, here = self.doors / str(port), free_port()
        self.start("socat", f"UNIX-LISTEN:{door},fork", f"TCP:{self.address}:{port}")
        outside = ["socat", f"TCP-LISTEN:{here},bind=127.0.0.1,fork,reuseaddr", f"UNIX-CONNECT:{door}"]
        self.processes.append(subprocess.Popen(outside, stderr=subprocess.DEVNULL, start_new_session=True))
        return here

    def lose_power(self) -> None:
        """Every process at once, without a word."""
        for process in self.processes:
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                with contextlib.suppress(psutil.NoSuchProcess):  # a trainer ends with whoever started it
                    child.kill()
            process.send_signal(signal.SIGKILL)
            process.wait()
        self.processes.clear()

    def cut_network(self, *, cut: bool) -> None:
        _ip("-n", self.namespace, "link", "set", "eth0", "down" if cut else "up")


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """That many hosts, whose logs lie in the folder; the first of them has the address 10.77.0.1."""
    prefix = f"nightly{os.getpid() % 10_000}x"
    with tempfile.TemporaryDirectory(prefix="nightly-") as doors:  # the path of a socket has 107 letters at most
        made = [Host(f"{prefix}{number}", f"10.77.0.{number + 1}", folder, Path(doors)) for number in range(count)]
        try:
            _join(made)
            yield made
        finally:
            for host in reversed(made):
                host.lose_power()
                subprocess.run([IP, "netns", "delete", host.namespace], capture_output=True, check=False)


def _join(made: list[Host]) -> None:
    first = made[0].namespace
    for host in made:
        _ip("netns", "add", host.namespace)
        _ip("-n", host.namespace, "link", "set", "lo", "up")
    _ip("-n", first, "link", "add", BRIDGE, "type", "bridge")
    _ip("-n", first, "address", "add", f"{made[0].address}/24", "dev", BRIDGE)
    _ip("-n", first, "link", "set", BRIDGE, "up")
    for number, host in enumerate(made[1:], start=1):
        port = f"port{number}"
        _ip("-n", first, "link", "add", port, "type", "veth", "peer", "eth0", "netns", host.namespace)
        _ip("-n", first, "link", "set", port, "master", BRIDGE, "up")
        _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.namespace, "link", "set", "eth0", "up")


def _ip(*arguments: str) -> None:
    subprocess.run([IP, *arguments], check=True, capture_output=True, timeout=30)
