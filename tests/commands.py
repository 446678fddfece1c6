"""The `nightly` command within this process: what a person sees of it, without the seconds that a process takes to
import what this one has. What starts a service is run as a process of its own (`Stack.nightly`)."""

import contextlib
import io
import os
import subprocess
import sys
from unittest.mock import patch

from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.cli.main import main
from tests.conftest import Stack


def nightly(stack: Stack, *arguments: str, ok: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, with the stack's environment; unless `ok` is False it must succeed."""
    command = ["nightly", *arguments]
    written, wrong = io.StringIO(), io.StringIO()
    variables = {**stack.environment, **environment}
    with (
        patch.dict(os.environ, variables, clear=True),
        patch.object(sys, "argv", command),
        # Which Prefect reads only once in a process.
        temporary_settings({PREFECT_API_URL: variables.get("PREFECT_API_URL", stack.prefect_api)}),
        contextlib.redirect_stdout(written),
        contextlib.redirect_stderr(wrong),
    ):
        try:
            main()
            code = 0
        except SystemExit as exited:
            code = int(exited.code or 0)
    finished = subprocess.CompletedProcess(command, code, written.getvalue(), wrong.getvalue())
    assert not ok or code == 0, finished.stdout + finished.stderr
    return finished
