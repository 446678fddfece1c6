"""`nightly workers`: the workers of this machine's devices, one each."""

import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from flows.cli.console import console, readable_jobs
from infra.settings import Settings, enter
from infra.stack.services import device_workers, worker
from infra.stack.supervisor import is_prefect_ours, one_at_a_time, recorded_device_workers, start, stop

if TYPE_CHECKING:
    from tasks.job import TuningJob

app = typer.Typer(no_args_is_help=True, help="Workers of this machine's devices, one each.")
PoolOption = Annotated[str | None, typer.Option(help="Work pool to take runs from; else NIGHTLY_WORK_POOL's.")]
DevicesOption = Annotated[
    str,
    typer.Option(help="auto: every GPU that is visible, else the CPU; 0,1: these; cpu:2: the CPU in two parts."),
]


@app.command("start")
def start_workers(
    pool: PoolOption = None,
    devices: DevicesOption = "auto",
    foreground: Annotated[bool, typer.Option(help="Be the worker of one device, as in a container.")] = False,
) -> None:
    """Start a worker for each device; they stand in for the local stack's own worker."""
    settings = enter()
    import torch
    from prefect.client.orchestration import get_client

    from flows.cli.follow import prefect_answers
    from infra.deployments import apply_work_pool

    name = pool or settings.work_pool
    services = device_workers(name, devices, torch.cuda.device_count())
    if foreground and len(services) != 1:
        raise typer.BadParameter(f"--foreground is for one device, found {len(services)}; name one with --devices")
    with prefect_answers(settings, name), get_client(sync_client=True) as client:
        apply_work_pool(client, name, on_own_server=is_prefect_ours(settings), runs_here=True)
    if foreground:
        os.execve(sys.executable, services[0].command, {**os.environ, **services[0].environment})  # noqa: S606
    with one_at_a_time(settings), console.status("Starting the workers"):
        stop(settings, worker(settings))
        start(settings, services, console.print)


@app.command("stop")
def stop_workers() -> None:
    """Stop the workers of this machine; what they train is asked for again by others, or in the next night."""
    settings = enter()
    with one_at_a_time(settings), console.status("Stopping"):
        stopped = [service.name for service in recorded_device_workers(settings) if stop(settings, service)]
    console.print(f"stopped {', '.join(stopped)}" if stopped else "no worker was running here")


@app.command("ls")
def list_workers(as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False) -> None:
    """Who is there, on this machine and elsewhere, and what they train."""
    settings = enter()
    with readable_jobs(settings) as jobs:
        _show([*_waiting(settings), *_training(settings, jobs)], as_json)


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(rows))
        return
    table = Table("worker", "device", "state", "study", "trials", box=None)
    for row in rows:
        table.add_row(*(str(row[column] or "") for column in ("worker", "device", "state", "study", "trials")))
    console.print(table if rows else "no worker is known; start some with `nightly workers start`, or `nightly up`")


def _waiting(settings: Settings) -> Iterator[dict[str, Any]]:
    """The workers that Prefect knows in this pool."""
    from prefect.client.orchestration import get_client

    from flows.cli.follow import prefect_answers

    with prefect_answers(settings, settings.work_pool), get_client(sync_client=True) as client:
        for known in client.read_workers_for_work_pool(settings.work_pool):
            state = str(known.status.value).lower() if known.status is not None else "unknown"
            yield {"worker": known.name, "device": "", "state": state, "study": "", "trials": ""}


def _training(settings: Settings, jobs: "list[TuningJob]") -> Iterator[dict[str, Any]]:
    """Those that work on the last study of a job."""
    from optuna.trial import TrialState

    from tasks.study.leases import workers_of
    from tasks.study.studies import ENDED, WORKER, last_study, number_of, tonights_trials

    for job in jobs:
        study = last_study(job.name, settings.studies)
        if study is None or ENDED in study.user_attrs:
            continue
        running = tonights_trials(study, TrialState.RUNNING)
        for name, record in workers_of(study.user_attrs).items():
            numbers = [str(number_of(trial)) for trial in running if trial.user_attrs.get(WORKER) == name]
            yield {
                "worker": name,
                "device": record["device"],
                "state": "trains",
                "study": study.study_name,
                "trials": ", ".join(numbers),
            }
