"""What the environment says: where state lies, which servers and which store to use.

Settings are the machine's, configuration is the job's. Every process that we start gets its environment from
`Settings.environment`, so that a laptop and a cluster differ in URLs only. Knows nothing of tuning.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.errors import ExpectedError
from infra.records import LOOPBACK, port_of

LOOPBACK_NAMES = (LOOPBACK, "localhost", "::1")
# Which part of the CPU a worker has, where it is divided; set by whoever starts the worker.
CPU_PART = "NIGHTLY_CPU_PART"
TEMPORARY = "tmp"
# What everything of ours on a server that others may use carries: a tag, or a word of a description.
MARK = "nightly-tuner"
OUR_LOGGERS = ("flows", "tasks", "models", "infra")

_SECRET = re.compile(
    r"AWS_.*|PG.*|PREFECT_.*(KEY|AUTH_STRING|CONNECTION_URL)|NIGHTLY_(WEBHOOK|OPTUNA_URL)"
    r"|MLFLOW_(TRACKING_(USERNAME|PASSWORD|TOKEN)|BACKEND_STORE_URI)"
)


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError("must be a path without ~ where the user has no home folder") from error


# A description is the rule that a sentence states.
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Port = Annotated[int, Field(ge=1, le=65535, description="a port from 1 to 65535")]


class SettingsError(ExpectedError):
    """A setting of the environment is wrong; the message names the variable, the value and the remedy."""


class S3Options(BaseSettings):
    """What each object in an S3 store is given. Each is read from NIGHTLY_S3_<NAME>; none is needed."""

    model_config = SettingsConfigDict(env_prefix="NIGHTLY_S3_", env_ignore_empty=True, frozen=True, extra="ignore")

    encryption: Literal["AES256", "aws:kms"] | None = Field(default=None, description="AES256 or aws:kms")
    kms_key: str | None = None
    tags: str | None = Field(
        default=None, pattern=r"^[^&=]+=[^&=]*(&[^&=]+=[^&=]*)*$", description="tags such as team=vision&env=prod"
    )
    lock_days: int | None = Field(default=None, ge=1, description="a whole number of days, 1 or more")

    @classmethod
    def read(cls) -> Self:
        """Read the environment. Raises SettingsError where a variable does not parse."""
        try:
            return cls()
        except ValidationError as error:
            raise _sentence(cls, error, "NIGHTLY_S3_") from error

    def for_object(self, now: datetime) -> dict[str, Any]:
        """The arguments of a PUT, by S3's names. A lock is in governance mode: special rights can lift it."""
        wanted = {
            "ServerSideEncryption": self.encryption,
            "SSEKMSKeyId": self.kms_key,
            "Tagging": self.tags,
            "ObjectLockMode": self.lock_days and "GOVERNANCE",
            "ChecksumAlgorithm": self.lock_days and "SHA256",  # S3 asks for one with a lock
            "ObjectLockRetainUntilDate": self.lock_days and now + timedelta(days=self.lock_days),
        }
        return {name: value for name, value in wanted.items() if value is not None}


class Settings(BaseSettings):
    """The environment's settings. Each is read from NIGHTLY_<NAME>, or from the variable named beside it."""

    model_config = SettingsConfigDict(env_prefix="NIGHTLY_", env_ignore_empty=True, frozen=True, extra="ignore")

    home: AbsolutePath = Field(default=Path(".nightly"), validate_default=True)
    jobs: AbsolutePath | None = None
    store: str | None = None
    webhook: SecretStr | None = None
    optuna_url: SecretStr | None = None
    work_pool: str = "local"
    prefect_port: Port = 4200
    # Not MLflow's usual 5000: on a Mac the AirPlay receiver sits there.
    mlflow_port: Port = 5001
    external_prefect_url: str | None = Field(default=None, validation_alias="PREFECT_API_URL")
    external_mlflow_url: str | None = Field(default=None, validation_alias="MLFLOW_TRACKING_URI")

    @field_validator("home")
    @classmethod
    def _home_is_no_query(cls, home: Path) -> Path:
        """Prefect and MLflow write a folder into URLs as it stands, in which these mean something."""
        if set("?%") & set(str(home)):
            raise ValueError("must be a path without ? and %")
        return home

    @field_validator("store")
    @classmethod
    def _store_is_known(cls, store: str | None) -> str | None:
        if store is not None and urlsplit(store).scheme not in ("file", "s3"):
            raise ValueError("must start with file:// (a directory) or s3:// (a bucket)")
        if store is not None and set("?#") & set(store):  # whatever follows them would be left out in silence
            raise ValueError(
                "must hold no ? and #, which end the path of a URL (write %3F and %23 in that of a folder)"
            )
        return store

    @field_validator("optuna_url")
    @classmethod
    def _optuna_url_is_known(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and urlsplit(url.get_secret_value()).scheme != "postgresql":
            raise ValueError("must start with postgresql:// (without it, studies are journals in the home)")
        return url

    @field_validator("webhook")
    @classmethod
    def _webhook_is_a_url(cls, webhook: SecretStr | None) -> SecretStr | None:
        if webhook is not None and urlsplit(webhook.get_secret_value()).scheme not in ("http", "https"):
            raise ValueError("must start with https:// or http://")
        return webhook

    @classmethod
    def read(cls) -> Self:
        """Read the environment.

        Raises SettingsError: a variable does not parse, or the home cannot be written.
        """
        try:
            settings = cls()
        except ValidationError as error:
            raise _sentence(cls, error, "NIGHTLY_") from error
        _check_home(settings.home)
        _check_proxies()
        return settings._with_ports_of_its_own()

    def _with_ports_of_its_own(self) -> Self:
        """A server that this home runs keeps its port; one that is to be started takes the usual one, or where another
        user has that, the next. What the environment says counts as it is."""
        servers = {"prefect": self.external_prefect_url, "mlflow": self.external_mlflow_url}
        ports = {
            f"{name}_port": port_of(self.home / f"run/{name}.json", getattr(self, f"{name}_port"))
            for name, elsewhere in servers.items()
            if elsewhere is None and f"{name}_port" not in self.model_fields_set
        }
        return self.model_copy(update=ports)

    @property
    def store_url(self) -> str:
        return self.store or (self.home / "store").as_uri()

    @property
    def studies(self) -> Path | str:
        """Where studies lie: a folder of the home, or the URL of a database."""
        return self.home / "studies" if self.optuna_url is None else self.optuna_url.get_secret_value()

    @property
    def are_studies_shared(self) -> bool:
        """Whether workers of other machines may train trials of a study."""
        return self.optuna_url is not None

    @property
    def prefect_page(self) -> str:
        return self.prefect_api_url.removesuffix("/api")

    @property
    def prefect_api_url(self) -> str:
        return self.external_prefect_url or f"http://{LOOPBACK}:{self.prefect_port}/api"

    @property
    def mlflow_url(self) -> str:
        return self.external_mlflow_url or f"http://{LOOPBACK}:{self.mlflow_port}"

    @property
    def mlflow_database(self) -> Path:
        """The embedded server's, a SQLite file; there is none where MLflow has always been elsewhere."""
        return self.home / "mlflow/mlflow.db"

    def night_page(self, flow_run_id: object) -> str:
        """A night's page in Prefect."""
        return f"{self.prefect_page}/runs/flow-run/{flow_run_id}"

    def mlflow_page(self, experiment_id: str, run_id: str = "", artifact: str = "") -> str:
        """The page of a job's nights and trials, of one run, or of an artifact of it."""
        runs = f"{self.mlflow_url}/#/experiments/{experiment_id}/runs"
        place = f"{'/' if run_id else ''}{run_id}{'/artifacts/' if artifact else ''}{artifact}"
        # Without the workflow type MLflow opens its pages for language models.
        return f"{runs}{place}?workflowType=machine_learning"

    def environment(self) -> dict[str, str]:
        """The variables for each of our processes: the same home, servers and store, and no telemetry."""
        return {
            "NIGHTLY_HOME": str(self.home),
            # Prefect and others keep files in the folder for temporary ones under names that two users share.
            "TMPDIR": str(self.home / TEMPORARY),
            **dict.fromkeys(("NO_PROXY", "no_proxy"), _reached_without_proxy(os.environ)),
            **({} if _has_home_folder() else {"HOME": str(self.home)}),
            "NIGHTLY_STORE": self.store_url,
            "NIGHTLY_WORK_POOL": self.work_pool,
            **({"NIGHTLY_JOBS": str(self.jobs)} if self.jobs else {}),
            **({"NIGHTLY_OPTUNA_URL": self.optuna_url.get_secret_value()} if self.optuna_url else {}),
            **({"NIGHTLY_WEBHOOK": self.webhook.get_secret_value()} if self.webhook else {}),
            # Threads that spin while they wait for each other keep the core from whoever they wait for: beside other
            # work 600 steps of a small model took 67 s on two threads, and take 2.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_API_URL": self.prefect_api_url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # In memory, as by default, a restarted server has forgotten them, and Prefect then kills each night that
            # holds one, four minutes later at most.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_LOGGING_EXTRA_LOGGERS": ",".join(OUR_LOGGERS),
            # Prefect's 10 s are spent at every start of a night.
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            "DO_NOT_TRACK": "true",
            # Prefect's least; a run that is silent for three of these is dead (deployments.py).
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            # MLflow's own default blocks a caller for four minutes when its server is away.
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }


def _check_home(home: Path) -> None:
    """Raises SettingsError where the home, or a folder in it, cannot be written."""
    unwritable = home
    try:
        (home / TEMPORARY).mkdir(mode=0o700, parents=True, exist_ok=True)
        for unwritable in (home, *(path for path in home.iterdir() if path.is_dir())):
            # Without a name where the system can, since others list these folders at the same time.
            with tempfile.TemporaryFile(dir=unwritable):
                pass
    except OSError as error:
        raise SettingsError(
            f"NIGHTLY_HOME must be a folder that can be written, found {unwritable} ({error.strerror}); "
            "name another folder or correct its rights"
        ) from error


def _check_proxies() -> None:
    """Raises SettingsError for a proxy that Prefect's client cannot use, which it refuses for every address."""
    for scheme, url in getproxies_environment().items():
        kind = url.partition("://")[0].lower() if "://" in url else "http"
        if scheme in ("http", "https", "all") and kind not in ("http", "https"):
            raise SettingsError(
                f"{scheme.upper()}_PROXY must start with http:// or https://, found {kind}://; name another or unset it"
            )


def _reached_without_proxy(environment: Mapping[str, str]) -> str:
    """What the environment excepts from its proxies, and loopback, on which our servers listen."""
    excepted = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if excepted.strip() == "*":
        return "*"
    names = [name.strip() for name in excepted.split(",") if name.strip()]
    return ",".join([*names, *(name for name in LOOPBACK_NAMES if name not in names)])


def _has_home_folder() -> bool:
    try:
        Path.home()
    except RuntimeError:  # neither HOME nor an entry among the system's users
        return False
    return True


def _sentence(settings: type[BaseSettings], error: ValidationError, prefix: str) -> SettingsError:
    problem = error.errors()[0]
    field = str(problem["loc"][0])
    variable = field if field.isupper() else f"{prefix}{field.upper()}"
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] != "value_error":
        reason = f"must be {settings.model_fields[field].description}"
    found = "" if variable in ("NIGHTLY_WEBHOOK", "NIGHTLY_OPTUNA_URL") else f", found {problem['input']!r}"
    return SettingsError(f"{variable}: {reason}{found}; set it right or unset it")


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for code that is not ours: neither the store's, the servers' nor a database's credentials."""
    return {name: value for name, value in environment.items() if not _SECRET.fullmatch(name)}


def enter() -> Settings:
    """The settings, put into this process's environment too: Prefect and MLflow read theirs when they are imported, so
    a command calls this first and imports them afterwards."""
    settings = Settings.read()
    os.environ.update(settings.environment())
    return settings
