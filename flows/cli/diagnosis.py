"""What a night needs, looked at piece by piece: machine, packages, servers, store, jobs.

Changes nothing but one small key in the store, which tells whether it refuses to create a key twice.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import httpx
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from packaging.requirements import Requirement
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from flows.deployments import path_of
from infra.device import choose_device, describe_device, memory_bytes
from infra.errors import ExpectedError
from infra.ours import our_deployment, our_work_pool
from infra.records import LOOPBACK, why_not_free
from infra.settings import Settings
from infra.stack.supervisor import is_prefect_ours
from infra.store.opening import check_store, open_store
from tasks.job import load_jobs
from tasks.study.storage import check_database
from tasks.tracking.ownership import check_tracking

LEAST_FREE, LITTLE_FREE = 1e9, 10e9
MOST_SECONDS_APART = 5.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at: what was found, and what to do about it where that is not well."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def diagnose(settings: Settings) -> Iterator[Check]:
    """Each check as soon as it is made. One that raises an ExpectedError has failed, and its sentence says why."""
    checks: tuple[Callable[[Settings], Check], ...] = (
        _disk,
        _loopback,
        _packages,
        _device,
        _jobs,
        _prefect,
        _mlflow,
        _tracking,
        _clock,
        _worker,
        _deployments,
        _studies,
        _store,
    )
    for look in checks:
        name = look.__name__.strip("_")
        try:
            yield look(settings)
        except ExpectedError as error:
            yield Check(name=name, state="fail", found=str(error))
        except httpx.HTTPError:
            yield Check(
                name=name, state="fail", found=f"{settings.prefect_api_url} does not answer", remedy="run `nightly up`"
            )


def _disk(settings: Settings) -> Check:
    free = shutil.disk_usage(settings.home).free
    state: Literal["ok", "warn", "fail"] = "fail" if free < LEAST_FREE else "warn" if free < LITTLE_FREE else "ok"
    return Check(
        name="disk",
        state=state,
        found=f"{free / 1e9:.1f} GB are free in {settings.home}",
        remedy="" if state == "ok" else "free some: `nightly gc` deletes old snapshots",
    )


def _loopback(_: Settings) -> Check:
    """An address that listens needs no free port of the usual ones: 0 is any."""
    if (error := why_not_free(0)) is not None:
        return Check(
            name="loopback", state="fail",
            found=f"no server can listen on {LOOPBACK}: {error.strerror}",
            remedy=f"give the loopback that address: ip address add {LOOPBACK}/8 dev lo (::1 alone is not enough)",
        )  # fmt: skip
    return Check(name="loopback", state="ok", found=f"servers can listen on {LOOPBACK}")


def _studies(settings: Settings) -> Check:
    if isinstance(settings.studies, Path):
        return Check(name="studies", state="ok", found=f"journals below {settings.studies}, for this machine alone")
    check_database(settings.studies)
    return Check(name="studies", state="ok", found="the database that NIGHTLY_OPTUNA_URL names answers")


def _packages(_: Settings) -> Check:
    wrong = []
    for text in requires("nightly-tuner") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found} (wanted {wanted.specifier})")
    if wrong:
        return Check(
            name="packages",
            state="fail",
            found=", ".join(wrong),
            remedy="install what requirements.lock names: make .venv/run.stamp",
        )
    found = ", ".join(f"{name} {version(name)}" for name in ("prefect", "mlflow", "optuna", "torch"))
    return Check(name="packages", state="ok", found=found)


def _device(_: Settings) -> Check:
    device = choose_device()
    found = f"{describe_device(device)}, {memory_bytes(device) / 1e9:.0f} GB"
    if device.type == "cpu" and shutil.which("nvidia-smi") is not None:
        build = torch.version.cuda or "none"
        return Check(
            name="device", state="warn",
            found=f"{found}, though this machine has an NVIDIA driver (torch's CUDA: {build})",
            remedy="install torch's CUDA build, or unset CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    return Check(name="device", state="ok", found=found)


def _jobs(settings: Settings) -> Check:
    jobs, wrong = load_jobs(settings.jobs)
    names = ", ".join(job.name for job in jobs)
    if not wrong:
        return Check(name="jobs", state="ok", found=names)
    sentences = [sentence for error in wrong for sentence in str(error).splitlines()]
    return Check(
        name="jobs",
        state="fail",
        found=f"{names} are right, {len(wrong)} more are not: {' | '.join(sentences)}",
        remedy="they are left out until their files are corrected",
    )


def _prefect(settings: Settings) -> Check:
    found = str(httpx.get(f"{settings.prefect_api_url}/admin/version", timeout=10).raise_for_status().json())
    here = version("prefect")
    if found.split(".")[:2] != here.split(".")[:2]:
        return Check(
            name="prefect",
            state="warn",
            found=f"the server is {found}, this machine has {here}",
            remedy="use one version",
        )
    return Check(name="prefect", state="ok", found=f"{settings.prefect_page} answers, version {found}")


def _mlflow(settings: Settings) -> Check:
    try:
        found = httpx.get(f"{settings.mlflow_url}/version", timeout=10).raise_for_status().text
    except httpx.HTTPError:
        return Check(
            name="mlflow", state="fail", found=f"{settings.mlflow_url} does not answer", remedy="run `nightly up`"
        )
    return Check(name="mlflow", state="ok", found=f"{settings.mlflow_url} answers, version {found}")


def _tracking(settings: Settings) -> Check:
    """Whether the jobs' experiments and registered models are ours."""
    client = MlflowClient(settings.mlflow_url)
    try:
        for job in load_jobs(settings.jobs)[0]:
            check_tracking(client, job)
    except MlflowException as error:
        return Check(name="tracking", state="fail", found=error.message, remedy="run `nightly up`")
    return Check(name="tracking", state="ok", found="the jobs' experiments and registered models are ours")


def _clock(settings: Settings) -> Check:
    """Signatures of S3 requests, schedules and the order of nights go by it."""
    there = parsedate_to_datetime(httpx.get(f"{settings.prefect_api_url}/health", timeout=10).headers["date"])
    apart = abs((datetime.now(UTC) - there).total_seconds())
    if apart > MOST_SECONDS_APART:
        return Check(
            name="clock", state="warn", found=f"this machine's is {apart:.0f} s from Prefect's", remedy="set it right"
        )
    return Check(name="clock", state="ok", found="as Prefect's")


def _worker(settings: Settings) -> Check:
    with get_client(sync_client=True) as client:
        our_work_pool(client, settings.work_pool, on_own_server=is_prefect_ours(settings))
        answer = client.request(
            "POST",
            "/work_pools/{work_pool_name}/workers/filter",
            path_params={"work_pool_name": settings.work_pool},
            json={},
        )
    online = [worker["name"] for worker in answer.json() if worker["status"] == "ONLINE"]
    if not online:
        return Check(
            name="worker", state="fail", found=f"none waits for nights of the pool {settings.work_pool}",
            remedy="run `nightly up`",
        )  # fmt: skip
    return Check(name="worker", state="ok", found=", ".join(online))


def _deployments(settings: Settings) -> Check:
    missing = []
    with get_client(sync_client=True) as client:
        for job in load_jobs(settings.jobs)[0]:
            try:
                our_deployment(client, path_of(job.name))
            except ObjectNotFound:
                missing.append(job.name)
    if missing:
        return Check(
            name="deployments",
            state="fail",
            found=f"Prefect knows none of {', '.join(missing)}",
            remedy="run `nightly up`",
        )
    return Check(name="deployments", state="ok", found="one for each job")


def _store(settings: Settings) -> Check:
    store = open_store(settings.store_url)
    check_store(store)
    return Check(name="store", state="ok", found=f"{store.url} can be written, and refuses to create a key twice")
