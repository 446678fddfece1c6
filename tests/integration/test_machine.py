"""Machines that are not ours alone, or not as usual: other users, proxies, odd homes, rights and loopbacks."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.records import LOOPBACK
from tests.conftest import Stack, require, small_disk
from tests.hosts import IP, hosts_cannot_be_made
from tests.servers import wait_for
from tests.users import as_other_user, give_to_other_user, other_user_cannot_be

NIGHTLY = str(Path(sys.executable).parent / "nightly")
Nightly = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def usual_ports_taken() -> Iterator[list[int]]:
    """By whoever has them, else by this test."""
    taken = []
    for port in (4200, 5001):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
            listener.listen()
        except OSError:
            listener.close()
        else:
            taken.append(listener)
    yield [4200, 5001]
    for listener in taken:
        listener.close()


@pytest.fixture
def other_user() -> Nightly:
    """Runs `nightly` as another user with the environment that is given, and nothing beside it."""
    if reason := other_user_cannot_be():
        require(reason)

    def nightly(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": os.environ["PATH"], **environment}
        command = as_other_user(NIGHTLY, *arguments, environment=variables)
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, umask=0o077)

    return nightly


def test_a_second_user_behind_a_proxy_in_an_odd_home_gets_a_night(
    tmp_path: Path, other_user: Nightly, usual_ports_taken: list[int]
) -> None:
    """All at once: the usual ports and Prefect's folder for temporary files are another user's; a proxy that nobody
    runs is set; the home lies on another file system, behind a link, its path has blanks, umlauts and a #; the user
    has no home folder and no name, umask 077, and LANG is C."""
    shared = tmp_path / "shared temporary files"
    (shared / "runner_storage").mkdir(parents=True)
    shared.chmod(0o1777)
    proxy = f"http://{LOOPBACK}:9"
    with small_disk(tmp_path / "disk", "600m") as disk:
        (folder := disk / "my home #1 für Prüfer").mkdir()
        give_to_other_user(folder)
        (link := tmp_path / "link").symlink_to(folder)
        environment = {
            "NIGHTLY_HOME": str(link / ".nightly"), "TMPDIR": str(shared), "LANG": "C",
            "HTTP_PROXY": proxy, "https_proxy": proxy, "ALL_PROXY": proxy, "NO_PROXY": "example.org",
        }  # fmt: skip
        try:
            up = other_user("up", **environment)
            assert up.returncode == 0, up.stdout + up.stderr
            status = other_user("status", "--json", **environment)
            parts = {part["service"]: part for part in json.loads(status.stdout)}
            assert {part["state"] for part in parts.values()} == {"running"}
            pages = [parts[name]["page"] for name in ("prefect", "mlflow")]
            assert not {int(page.rpartition(":")[2]) for page in pages} & set(usual_ports_taken)
            night = other_user("run", "digits-mlp", "--trials", "1", **environment)
            assert night.returncode == 0, night.stdout + night.stderr
            assert "promoted" in night.stdout
            assert list((shared / "runner_storage").iterdir()) == []
        finally:
            other_user("down", **environment)


def test_a_worker_that_dies_as_it_starts_is_not_up(breakable_stack: Stack) -> None:
    """`up` says the last line that it wrote, and the next one starts it."""
    stack = breakable_stack
    (worker,) = [part for part in json.loads(stack.nightly("status", "--json").stdout) if part["service"] == "worker"]
    os.kill(worker["pid"], signal.SIGTERM)
    wait_for(lambda: not Path(f"/proc/{worker['pid']}/cmdline").exists(), 60, "the worker to end")
    in_the_way = stack.home / "tmp/runner_storage"
    in_the_way.rename(aside := in_the_way.with_name("aside"))
    in_the_way.touch()
    try:
        finished = stack.nightly("up", ok=False)
        assert finished.returncode == 1
        assert "nightly: worker ended while it started: NotADirectoryError: [Errno 20]" in finished.stderr
        assert finished.stderr.count("\n") == 1
    finally:
        in_the_way.unlink()
        aside.rename(in_the_way)
    assert "worker is up" in stack.nightly("up").stdout


@pytest.mark.parametrize("part", [".", "logs", "studies"])
def test_a_part_of_the_home_that_cannot_be_written_is_named(tmp_path: Path, other_user: Nightly, part: str) -> None:
    home = tmp_path / "home"
    for folder in (home, home / "logs", home / "studies"):
        folder.mkdir()
        give_to_other_user(folder)
    os.chown(home / part, 0, 0)
    finished = other_user("ls", NIGHTLY_HOME=str(home))
    assert finished.returncode == 1
    assert f"found {(home / part).resolve()} (Permission denied); name another folder" in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_a_user_without_a_home_folder_is_told_what_a_tilde_means(other_user: Nightly) -> None:
    finished = other_user("ls", NIGHTLY_HOME="~/nightly")
    assert finished.stderr.startswith("nightly: NIGHTLY_HOME: must be a path without ~")
    assert finished.stderr.count("\n") == 1


def test_a_loopback_of_ipv6_alone_is_named(tmp_path: Path) -> None:
    if reason := hosts_cannot_be_made():
        require(reason)
    namespace = f"nightly{os.getpid() % 10_000}v6"
    environment = {**os.environ, "NIGHTLY_HOME": str(tmp_path / "home")}

    def ip(*arguments: str) -> None:
        subprocess.run([IP, *arguments], check=True, capture_output=True, timeout=30)

    def nightly(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [IP, "netns", "exec", namespace, NIGHTLY, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    ip("netns", "add", namespace)
    try:
        ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", namespace, "address", "delete", f"{LOOPBACK}/8", "dev", "lo")
        up = nightly("up")
        assert up.returncode == 1
        assert f"ip address add {LOOPBACK}/8 dev lo" in up.stderr
        assert up.stderr.count("\n") == 1
        (check,) = [look for look in json.loads(nightly("doctor", "--json").stdout) if look["name"] == "loopback"]
        assert check["state"] == "fail"
    finally:
        ip("netns", "delete", namespace)
