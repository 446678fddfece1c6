"""Settings: what the environment says, checked as it is read."""

import subprocess
import sys
from pathlib import Path

import pytest

from infra.settings import Settings, SettingsError


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
        ("NIGHTLY_PREFECT_PORT", "0", "NIGHTLY_PREFECT_PORT: Input should be greater than or equal to 1, found '0'"),
        ("NIGHTLY_MLFLOW_PORT", "http", "NIGHTLY_MLFLOW_PORT: Input should be a valid integer"),
        ("NIGHTLY_STORE", "ftp://x", "NIGHTLY_STORE: must start with file:// (a directory) or s3://"),
    ],
)
def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as error:
        Settings.read()
    assert says in str(error.value)


def test_servers_elsewhere_are_used_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example.org/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    settings = Settings.read()
    assert settings.prefect_page == "https://prefect.example.org"
    assert settings.mlflow_url == "https://mlflow.example.org"


def test_importing_our_modules_does_nothing(tmp_path: Path) -> None:
    script = "import flows.cli, infra.stack, infra.store, models.solo, tasks.sources, tasks.versions"
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert (finished.stdout, finished.stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []
