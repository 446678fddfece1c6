"""Settings: what the environment says, checked as it is read."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from infra.records import LOOPBACK, port_of, write_record
from infra.settings import Settings, SettingsError
from tests.servers import free_port


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "NIGHTLY_STORE", "NIGHTLY_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NIGHTLY_HOME", str(tmp_path / "home"))


def test_the_embedded_default_is_loopback_and_below_the_home(tmp_path: Path) -> None:
    settings = Settings.read()
    assert settings.store_url == (tmp_path / "home" / "store").as_uri()
    environment = settings.environment()
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5001"


def test_telemetry_is_off_and_pickles_are_refused() -> None:
    environment = Settings.read().environment()
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == environment["DO_NOT_TRACK"] == "true"
    assert environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("NIGHTLY_HOME", "/dev/null/home", "NIGHTLY_HOME must be a folder that can be written, found /dev/null/home"),
        ("NIGHTLY_PREFECT_PORT", "0", "NIGHTLY_PREFECT_PORT: must be a port from 1 to 65535, found '0'"),
        ("NIGHTLY_MLFLOW_PORT", "http", "NIGHTLY_MLFLOW_PORT: must be a port from 1 to 65535, found 'http'"),
        ("NIGHTLY_HOME", "/data/what?", "NIGHTLY_HOME: must be a path without ? and %, found '/data/what?'"),
        ("NIGHTLY_HOME", "/data/100%", "NIGHTLY_HOME: must be a path without ? and %, found '/data/100%'"),
        ("ALL_PROXY", "socks5://10.0.0.1:1080", "ALL_PROXY must start with http:// or https://, found socks5://; name"),
        ("https_proxy", "socks://proxy:1", "HTTPS_PROXY must start with http:// or https://, found socks://; name"),
        ("NIGHTLY_STORE", "file:///data/a#b", "NIGHTLY_STORE: must hold no ? and #"),
        ("NIGHTLY_STORE", "s3://bucket/a?versions", "NIGHTLY_STORE: must hold no ? and #"),
        (
            "NIGHTLY_JOBS",
            "~no-such-user/jobs",
            "NIGHTLY_JOBS: must be a path without ~ where the user has no home folder",
        ),
        ("NIGHTLY_STORE", "ftp://x", "NIGHTLY_STORE: must start with file:// (a directory) or s3://"),
    ],
)
def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as error:
        Settings.read()
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("excepted", "loopback_too"),
    [
        (None, "127.0.0.1,localhost,::1"),
        ("", "127.0.0.1,localhost,::1"),
        ("*", "*"),
        (".example.org, 10.0.0.0/8", ".example.org,10.0.0.0/8,127.0.0.1,localhost,::1"),
        ("localhost", "localhost,127.0.0.1,::1"),
    ],
)
def test_loopback_is_reached_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch, excepted: str | None, loopback_too: str
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    if excepted is not None:
        monkeypatch.setenv("no_proxy", excepted)
    environment = Settings.read().environment()
    assert environment["NO_PROXY"] == environment["no_proxy"] == loopback_too


def test_two_homes_have_ports_of_their_own(tmp_path: Path) -> None:
    """Also where the other one's server runs at this one's usual port."""
    usual = free_port()
    record = tmp_path / "record.json"
    with socket.socket() as theirs:
        theirs.bind((LOOPBACK, usual))
        theirs.listen()
        assert usual < port_of(record, usual) < usual + 100
        write_record(record, psutil.Process(), port=usual)  # a server of ours: this process
        assert port_of(record, usual) == usual
    record.write_text(json.dumps({"pid": os.getpid(), "create_time": 0.0, "port": usual}))
    assert port_of(record, usual + 1) == usual, "where it is free, the port of before is kept"


def test_servers_elsewhere_are_used_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example.org/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    settings = Settings.read()
    assert settings.prefect_page == "https://prefect.example.org"
    assert settings.mlflow_url == "https://mlflow.example.org"


@pytest.mark.process
def test_importing_our_modules_does_nothing(tmp_path: Path) -> None:
    """Nor does a thread run when the processes that train fork: a fork has none, but all the locks that they held."""
    script = (
        "import os, tasks.trainer.processes\n"
        "assert len(os.listdir('/proc/self/task')) == 1\n"
        "import flows.cli.main, infra.stack.supervisor, infra.store.protocol, models.training.loop, "
        "tasks.data.sources, tasks.registry.versions"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_commands_that_only_look_load_no_package_that_takes_long_to_import(tmp_path: Path) -> None:
    script = """
import sys
from typer import Exit
from flows.cli.main import app
from infra.errors import ExpectedError
ended = []
for command in ("--help", "ls --json", "status --json", "champion digits-mlp", "history digits-mlp"):
    try:
        ended.append(app(command.split(), standalone_mode=False))
    except (Exit, ExpectedError) as error:
        ended.append(error)
heavy = {"boto3", "matplotlib", "mlflow", "onnx", "optuna", "pandas", "plotly", "prefect", "scipy", "sklearn", "torch"}
print("loaded", sorted(heavy & sys.modules.keys()), len(ended))
"""
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "NIGHTLY_PREFECT_PORT": str(free_port())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert finished.stdout.splitlines()[-1] == "loaded [] 5"
    for said in ('"job": "digits-mlp"', '"service": "worker"'):
        assert said in finished.stdout
