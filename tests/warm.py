"""A program in the fork of a process that has imported what a night needs, which takes five seconds of a core.

The fork is a process of its own: with an environment, a standard output and a death of its own. Knows nothing of what
the program does.
"""

import atexit
import multiprocessing
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import prefect.context

SECONDS = 480

_forks = multiprocessing.get_context("forkserver")


def run_warm(script: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What `python -c script` would give."""
    _forks.set_forkserver_preload(["tests.warmed"])
    with tempfile.TemporaryDirectory() as name:
        stdout, stderr = Path(name) / "stdout", Path(name) / "stderr"
        process = _forks.Process(target=_run, args=(script, dict(environment), stdout, stderr))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(script, SECONDS, stdout.read_bytes(), stderr.read_bytes())
        return subprocess.CompletedProcess(script, process.exitcode, stdout.read_text(), stderr.read_text())


def _run(script: str, environment: Mapping[str, str], stdout: Path, stderr: Path) -> None:
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which forks of multiprocessing's server ignore
    prefect.context.refresh_global_settings_context()  # which were read as Prefect was imported
    exec(script, {"__name__": "__main__"})  # noqa: S102 our own program
    atexit._run_exitfuncs()  # which such a fork leaves out
