"""The `nightly` command.

Prefect and MLflow read their settings when they are imported, so every command first puts ours into the environment
and imports them afterwards; it also keeps `nightly --help` quick.
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from flows.cli import jobs as cli_jobs
from flows.cli import versions as cli_versions
from flows.cli import workers as cli_workers
from flows.cli.console import console, errors, readable_jobs, say, say_hints
from flows.cli.versions import JobArgument, point_champion
from flows.deployments import deployment_of, path_of
from infra.errors import NotOurs
from infra.settings import Settings, enter
from infra.stack.services import servers, worker
from infra.stack.supervisor import find, is_prefect_ours, one_at_a_time, recorded_device_workers, starting, stop

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from tasks.job import TuningJob

app = typer.Typer(
    help="Tune PyTorch models every night and promote what is really better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

NEXT = """\
**What to type next**

- **{nightly} champion {job}**: the champion and what it is worth, every checksum verified
- **{nightly} history {job}**: who was champion when, and why
- **{nightly} logs {job}**: what this night logged
- **{nightly} init**: a job for your own data
- **{nightly} down**: stop the stack, which stays up for these pages and for the schedule

and in Python

    from tasks.registry.champion import load_champion
    load_champion("{job}").predict(rows)
"""


@app.command()
def up() -> None:
    """Start the local stack (Prefect, MLflow, one worker) and apply the deployment of every job."""
    settings = enter()
    with readable_jobs(settings) as jobs, one_at_a_time(settings):  # files are read before anything starts
        with console.status("Starting the servers"), starting(settings, servers(settings), console.print):
            from infra.deployments import load_flows

            load_flows()  # which are to be applied, and take almost as long to import as the servers to start
        are_all_applied = _apply(settings, jobs, runs_here=True)
        console.print(f"Prefect {settings.prefect_page}  MLflow {settings.mlflow_url}  state in {settings.home}")
        if not are_all_applied:
            raise typer.Exit(1)


@app.command()
def apply() -> None:
    """Apply the deployment of every job to the Prefect server that runs already, here or elsewhere."""
    settings = enter()
    with readable_jobs(settings) as jobs:
        if not _apply(settings, jobs, runs_here=False):
            raise typer.Exit(1)


def _apply(settings: Settings, jobs: Sequence["TuningJob"], *, runs_here: bool) -> bool:
    """Apply what all jobs share, and each job's deployment. One whose name is somebody else's is said, and keeps no
    other job from its nights; returns whether there was none. Where runs are to run here, the worker starts meanwhile.
    Raises NotOurs where it is what all of them share."""
    from prefect.client.orchestration import get_client

    from infra.deployments import apply_deployment, apply_shared_deployments, apply_work_pool, check_server

    on_own_server = is_prefect_ours(settings)
    device_workers = recorded_device_workers(settings)  # which are used instead of the stack's own
    no_worker_here = find(settings, worker(settings)) is None and not device_workers
    applied = []
    with console.status("Applying the deployments"), get_client(sync_client=True) as client:
        check_server(client, settings.work_pool, on_own_server=on_own_server)
        apply_work_pool(client, settings.work_pool, on_own_server=on_own_server, runs_here=runs_here)
        for job in jobs:
            say_hints(job)
            # Elsewhere a worker of another machine may run it; there heartbeats tell.
            if no_worker_here and on_own_server:
                _settle_dead_runs(client, job, settings)
        with starting(settings, [worker(settings)] if runs_here and not device_workers else [], console.print):
            for job in jobs:
                try:
                    apply_deployment(client, deployment_of(job), settings.work_pool)
                    applied.append(job)
                except NotOurs as error:
                    say(error)
            apply_shared_deployments(client, settings.work_pool)
    console.print(f"jobs: {', '.join(f'{job.name} ({job.schedule.cron} {job.schedule.timezone})' for job in applied)}")
    return len(applied) == len(jobs)


@app.command()
def down() -> None:
    """Stop the local stack; a night that runs is stopped too, and the next one continues its study."""
    settings = enter()
    with one_at_a_time(settings), console.status("Stopping"):
        services = (worker(settings), *recorded_device_workers(settings), *servers(settings))
        stopped = [service.name for service in services if stop(settings, service)]
    console.print(f"stopped {', '.join(stopped)}; state stays in {settings.home}" if stopped else "nothing was running")


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False) -> None:
    """Say what runs, where and since when. Exit code 1 where a part of the stack does not run."""
    settings = enter()
    rows: list[dict[str, str | int | None]] = []
    for service in (*servers(settings), *(recorded_device_workers(settings) or [worker(settings)])):
        running = find(settings, service)
        rows.append(
            {
                "service": service.name,
                "state": "stopped" if running is None else "running" if running.healthy else "not answering",
                "pid": running.process.pid if running else None,
                "since": running.since.isoformat(sep=" ", timespec="seconds") if running else None,
                "page": service.page,
            }
        )
    if as_json:
        console.print_json(json.dumps(rows))
    else:
        table = Table(*rows[0], box=None)
        for row in rows:
            table.add_row(*(str(value or "") for value in row.values()))
        console.print(table)
    if any(row["state"] != "running" for row in rows):
        raise typer.Exit(1)


@app.command()
def run(
    job: JobArgument,
    preset: Annotated[
        Literal["smoke", "nightly", "deep"],
        typer.Option(
            help="nightly: as the job's file says; smoke: a few trials, nothing is promoted; deep: four times as many."
        ),
    ] = "nightly",
    trials: Annotated[int | None, typer.Option(help="Finished trials that end the tuning.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes after which no further trial begins.")] = None,
    sampler: Annotated[str | None, typer.Option(help="auto, tpe, gp, cmaes, random, qmc or grid.")] = None,
    promotion: Annotated[str | None, typer.Option(help="automatic, ask (a person says yes), or never.")] = None,
    follow: Annotated[bool, typer.Option(help="Wait for the night and show how it goes.")] = True,
) -> None:
    """Run one night of a job now, through its Prefect deployment. Exit code 1 where the night does not complete.

    An option that is left out is as the job's file and the preset say.
    """
    settings = enter()
    from tasks.job import load_job

    given: dict[str, Any] = {
        "preset": preset, "trials": trials, "minutes": minutes, "sampler": sampler, "promotion": promotion,
    }  # fmt: skip
    tuning_job = load_job(job, settings.jobs, **given)
    say_hints(tuning_job)
    from flows.cli.follow import follow_night, submit_night

    overrides = {name: value for name, value in given.items() if value not in (None, "nightly")}
    night = submit_night(settings, path_of(job), {"job": job, **overrides})
    console.print(f"night of {job}: {settings.night_page(night.id)}")
    if follow:
        follow_night(settings, night, job, console)
        from flows.cli.markdown import show

        console.print()
        show(NEXT.format(nightly=sys.argv[0], job=job), console)


@app.command()
def check(
    job: JobArgument, as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False
) -> None:
    """Read a job's data and run its checks alone; print the data card. Exit code 1 where they would stop a night."""
    settings = enter()
    from dataclasses import asdict

    from flows.cli.markdown import show
    from tasks.data.card import data_card
    from tasks.data.prepare import prepare
    from tasks.job import check_shape, load_job
    from tasks.study.studies import last_snapshot

    tuning_job = load_job(job, settings.jobs)
    say_hints(tuning_job)
    snapshots = settings.home / "snapshots"
    with errors.status(f"Reading {tuning_job.data.source}"):
        last = last_snapshot(tuning_job.name, settings.studies, snapshots)
        snapshot = prepare(tuning_job.data, tuning_job.objective.problem, snapshots, last)
        check_shape(tuning_job, snapshot.shape)
    if as_json:
        console.print_json(json.dumps(asdict(snapshot), default=str))
    else:
        show(data_card(snapshot, brief=True), console)


app.add_typer(cli_workers.app, name="workers")
for command in (*cli_jobs.COMMANDS, *cli_versions.COMMANDS):
    app.command()(command)
app.command(point_champion.__name__, hidden=True)(point_champion)


def main() -> None:
    """Run the command line; an error that a person can mend is one sentence and exit code 1, and so is any other, whose
    traceback is kept in a file."""
    from infra.errors import ExpectedError

    try:
        app()
    except ExpectedError as error:
        say(error)
        sys.exit(1)
    except Exception as error:  # noqa: BLE001  (a person can do nothing with its traceback but report it)
        with tempfile.NamedTemporaryFile("w", prefix="nightly-fault-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        errors.print(
            f"nightly: this is a fault of Nightly Tuner's own, found {reason}; report it with the traceback in "
            f"{file.name}",
            markup=False,
        )
        sys.exit(1)


def _settle_dead_runs(client: "SyncPrefectClient", job: "TuningJob", settings: Settings) -> None:
    """Without a worker nothing that Prefect shows as under way can be, unless a worker was killed and left its night
    behind; that night holds the job's lock."""
    from prefect.client.schemas.objects import StateType

    from infra.deployments import crash_dead_runs
    from tasks.reconcile import NightRuns, only_night_of

    try:
        with only_night_of(job.name, settings.home):
            states = (StateType.RUNNING, StateType.PENDING, StateType.CANCELLING)
            for name in crash_dead_runs(client, path_of(job.name), states=states):
                console.print(f"night {name} was left running and is marked crashed; the next one continues its study")
    except NightRuns:
        console.print(f"a night of {job.name} that lost its worker is still running")
