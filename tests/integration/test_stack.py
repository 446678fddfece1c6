"""The local stack: started twice, stopped twice, killed, blocked; each is handled and said in one sentence."""

import contextlib
import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.commands import nightly
from tests.conftest import Stack, make_stack
from tests.servers import wait_for


@pytest.fixture
def stack(breakable_stack: Stack) -> Stack:
    return breakable_stack


@pytest.fixture
def idle(tmp_path: Path) -> Stack:
    """A stack that was never started."""
    return make_stack(tmp_path)


def status(stack: Stack) -> dict[str, dict[str, Any]]:
    """What `nightly status` says of each service, by its name."""
    return {row["service"]: row for row in json.loads(nightly(stack, "status", "--json", ok=False).stdout)}


def pids(stack: Stack) -> dict[str, int]:
    return {name: row["pid"] for name, row in status(stack).items()}


def test_down_with_nothing_running_is_said(idle: Stack) -> None:
    assert "nothing was running" in nightly(idle, "down").stdout


def test_status_of_a_stopped_stack_is_exit_code_1(idle: Stack) -> None:
    finished = nightly(idle, "status", ok=False)
    assert finished.returncode == 1
    assert finished.stdout.count("stopped") == 3


def test_a_night_without_a_stack_is_one_sentence(idle: Stack) -> None:
    """Of the tests without a stack this one runs a process of its own, as a person does."""
    finished = idle.nightly("run", "digits-mlp", ok=False)
    assert finished.returncode == 1
    assert "no Prefect server answers at http://127.0.0.1:" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("variable", ["NIGHTLY_PREFECT_PORT", "NIGHTLY_MLFLOW_PORT"])
def test_a_port_that_is_taken_is_named_and_nothing_is_left_running(idle: Stack, variable: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(idle.environment[variable])))
        taken.listen()
        finished = nightly(idle, "up", ok=False)
    assert finished.returncode == 1
    assert f"cannot listen on port {idle.environment[variable]} of 127.0.0.1" in finished.stderr
    assert f"set {variable} to another port" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert nightly(idle, "status", ok=False).stdout.count("stopped") == 3


def test_a_stale_record_is_harmless_and_its_process_id_is_spared(idle: Stack) -> None:
    """The record names a process id that somebody else has got since: ours."""
    (idle.home / "run").mkdir(parents=True)
    record = {"pid": os.getpid(), "create_time": psutil.Process().create_time() - 1000}
    (idle.home / "run" / "prefect.json").write_text(json.dumps(record))
    assert status(idle)["prefect"]["state"] == "stopped"
    assert "nothing was running" in nightly(idle, "down").stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (("run", "digit-mlp"), {}, "no job is named 'digit-mlp'; write digits-mlp; known are"),
        (
            ("run", "digits-mlp", "--trials", "0"),
            {},
            "budget.trials must be a whole number from 1 to 100000, found 0",
        ),
        (
            ("run", "digits-mlp", "--sampler", "magic"),
            {},
            "search.sampler must be one of auto, tpe, gp, cmaes, random, qmc or grid, found 'magic'",
        ),
        (("up",), {"NIGHTLY_HOME": "/dev/null/home"}, "NIGHTLY_HOME must be a folder that can be written"),
        (("up",), {"NIGHTLY_JOBS": "/nowhere"}, "NIGHTLY_JOBS must be a folder of job files, found /nowhere"),
        (("champion", "digits-mlp"), {}, "job 'digits-mlp' has no champion in file://"),
        (("champion", "digits-mlp"), {"NIGHTLY_STORE": "ftp://x"}, "NIGHTLY_STORE: must start with file://"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_1(
    idle: Stack, arguments: tuple[str, ...], environment: dict[str, str], says: str
) -> None:
    finished = nightly(idle, *arguments, ok=False, **environment)
    assert finished.returncode == 1
    assert says in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_a_second_up_says_since_when_it_runs(stack: Stack) -> None:
    before = pids(stack)
    assert stack.nightly("up").stdout.count("runs already since") == 3
    assert pids(stack) == before


def test_a_changed_setting_restarts_what_reads_it_and_a_bad_job_file_keeps_no_other_job_from_it(
    stack: Stack, tmp_path: Path
) -> None:
    """Otherwise the worker would go on with the job folder that it was started with."""
    (tmp_path / "bad.yaml").write_text("name: bad\ndata: {source: 'sklearn://digits'}\nmodel: transformer\n")
    (tmp_path / "good.yaml").write_text("name: good\ndata: {source: 'sklearn://iris'}\n")
    before = pids(stack)
    up = stack.nightly("up", ok=False, NIGHTLY_JOBS=str(tmp_path))
    others = [nightly(stack, command, ok=False, NIGHTLY_JOBS=str(tmp_path)) for command in ("apply", "ls")]
    for finished in (up, *others):
        assert finished.returncode == 1
        assert "bad.yaml: model must be a known model or path/to/net.py:Net, found 'transformer'" in finished.stderr
        assert finished.stderr.count("\n") == 1
        assert "good" in finished.stdout
    assert "worker is up" in up.stdout
    after = pids(stack)
    assert {name for name in before if before[name] != after[name]} == {"worker"}
    # Which it hands on to the nights that it starts.
    assert psutil.Process(after["worker"]).environ()["NIGHTLY_JOBS"] == str(tmp_path)
    stack.nightly("up")
    assert psutil.Process(pids(stack)["worker"]).environ()["NIGHTLY_JOBS"] == stack.environment["NIGHTLY_JOBS"]


def test_every_service_listens_on_loopback_only(stack: Stack) -> None:
    processes = [psutil.Process(pid) for pid in pids(stack).values()]
    assert len(processes) == 3
    family = [relative for process in processes for relative in (process, *process.children(recursive=True))]
    listening = {
        connection.laddr.ip
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_a_killed_server_is_seen_and_started_again(stack: Stack) -> None:
    """Its children outlive it and hold its port; `up` clears them away."""
    pid = pids(stack)["mlflow"]
    children = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: status(stack)["mlflow"]["state"] == "stopped", 60, "the kill to be seen")
    assert "mlflow is up" in stack.nightly("up").stdout
    assert status(stack)["mlflow"]["state"] == "running"
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_a_tick_that_two_schedulers_see_makes_one_night(stack: Stack) -> None:
    """Thirty ticks, laid ahead by two requests at the same moment, and once more by one that is sure to see them."""
    (deployment,) = stack.prefect("deployments/filter", deployments={"name": {"any_": ["missed"]}})
    began = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=400)
    days = [began + timedelta(days=number) for number in range(30)]
    ended = days[-1] + timedelta(days=1)
    body = {"start_time": began.isoformat(), "end_time": ended.isoformat(), "min_runs": 30, "max_runs": 30}
    start = threading.Barrier(2)

    def is_laid_ahead() -> bool:
        """Prefect reads before it writes here, which SQLite refuses at once where another has written meanwhile."""
        with contextlib.suppress(httpx.TimeoutException):
            url = f"{stack.prefect_api}/deployments/{deployment['id']}/schedule"
            return httpx.post(url, json=body, timeout=60).is_success
        return False

    def lay_ahead(_: int) -> None:
        start.wait(60)
        wait_for(is_laid_ahead, 180, "the ticks to be laid ahead")

    with ThreadPoolExecutor(2) as both:
        list(both.map(lay_ahead, range(2)))
    wait_for(is_laid_ahead, 180, "the ticks to be laid ahead again")
    after = {"expected_start_time": {"after_": began.isoformat()}}
    nights = stack.prefect("flow_runs/filter", flow_runs=after, deployments={"id": {"any_": [deployment["id"]]}})
    due = [str(night["expected_start_time"])[:10] for night in nights]
    assert sorted(due) == [f"{day:%Y-%m-%d}" for day in days]
    for night in nights:
        stack.ask_prefect("DELETE", f"flow_runs/{night['id']}")
