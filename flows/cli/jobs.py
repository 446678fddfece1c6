"""The commands about jobs: init, ls, logs, doctor.

Each prints a table for people, or JSON for programs; `flows/cli/main.py` registers them.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from flows.cli.console import console, readable_jobs
from flows.cli.versions import AsJson, JobArgument
from flows.deployments import FLOW, path_of
from infra.errors import ExpectedError
from infra.settings import enter

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

LOG_PAGE = 200
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".data", ".txt")
MARKS = {"ok": "✓", "warn": "!", "fail": "✗"}

JOB = """\
# A job of Nightly Tuner. A name and a source are enough; what else there is to say, README.md says.
name: {name}
description: {description}
data:
  source: {source}
{target}model: {model}
search:
  sampler: auto                  # tpe, gp, cmaes, random, qmc, grid
  objective: {objective}
  space: {{}}                      # ranges of your own, such as learning_rate: {{low: 1e-4, high: 1e-1, log: true}}
budget:
  trials: 60                     # whichever is used up first
  minutes: 60
promotion:
  mode: automatic                # or ask: wait for a person's yes; or never
schedule:
  cron: "0 2 * * *"
  timezone: UTC
"""

MODEL = '''\
"""The model of the job {name}."""

import torch
from torch import nn


class Net(nn.Module):
    """One hidden layer. Learning rate, optimizer, batch size and whatever else trains it are searched by themselves."""

    @staticmethod
    def suggest(trial):
        return {{"units": trial.suggest_int("units", 8, 256, log=True)}}

    def __init__(self, hyperparameters, shape):  # shape.features: one row's shape; shape.outputs: how many outputs
        super().__init__()
        inputs = torch.Size(shape.features).numel()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, hyperparameters["units"]),
            nn.ReLU(),
            nn.Linear(hyperparameters["units"], shape.outputs),
        )

    def forward(self, features):  # (rows, *shape.features) to (rows, shape.outputs)
        return self.layers(features)
'''


class NotWritten(ExpectedError):
    """The job's file is there already, or a question has no answer."""


def init(
    name: Annotated[str | None, typer.Argument(help="The new job's name.")] = None,
    source: Annotated[str | None, typer.Option(help="A file, s3://..., a database, or load.py:function.")] = None,
    target: Annotated[
        str | None, typer.Option(help="The column that is predicted; of a table the last, if empty.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="mlp, cnn, or own: an example of a class of your own.")] = None,
    regression: Annotated[bool, typer.Option(help="The target is a number, not a class.")] = False,
) -> None:
    """Write a commented job file, and an example of a model if you like, into the folder that NIGHTLY_JOBS names."""
    settings = enter()
    from tasks.job import NAME_PATTERN, JobError, load_job

    folder = settings.jobs or Path("jobs").absolute()
    name = name or _ask("name", "What is the job called?", "my-job")
    source = source or _ask("source", "Where is the data (a file, s3://..., a database, load.py:function)?", "rows.csv")
    if target is None and Path(source).name.lower().endswith(TABLE_SUFFIXES):
        target = _ask("target", "Which column is predicted (empty: the last)?", "")
    model = model or _ask("model", "Which model (mlp, cnn for images, own for a class of your own)?", "mlp")
    if model not in ("mlp", "cnn", "own"):
        raise NotWritten(f"--model must be mlp, cnn or own, found {model!r}; name one of them")
    files = {folder / f"{name}.yaml": _job_text(name, source, target, model, regression=regression)}
    if model == "own":
        files[folder / f"{name.replace('-', '_')}.py"] = MODEL.format(name=name)
    for path in files:
        if path.exists():
            raise NotWritten(f"{path} exists already and was left as it is; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    try:
        load_job(name, folder)
    except JobError as error:
        for path in files:
            path.unlink()
        raise NotWritten(f"nothing was written: {error} (a name must match {NAME_PATTERN})") from error
    console.print(f"wrote {', '.join(str(path) for path in files)}")
    where = "" if settings.jobs == folder else f"export NIGHTLY_JOBS={folder}\n"
    console.print(f"Next:\n{where}nightly check {name}\nnightly up\nnightly run {name}")


def ls(as_json: AsJson = False) -> None:
    """List the jobs: schedule, champion, how the last night ended, and when the next begins."""
    settings = enter()
    from infra.prefect_api import read_nights
    from infra.store.opening import open_store
    from tasks.registry.log import latest_promotion

    store = open_store(settings.store_url)
    nights = read_nights(settings, FLOW)
    with readable_jobs(settings) as jobs:
        rows = []
        for job in jobs:
            promotion = latest_promotion(store, job.name)
            rows.append(
                {
                    "job": job.name,
                    "model": job.model if ".py:" not in job.model else Path(job.model).name,
                    "schedule": f"{job.schedule.cron} {job.schedule.timezone}",
                    "champion": promotion.version if promotion else None,
                    **nights.get(job.name, dict.fromkeys(("last night", "began", "next night"))),
                }
            )
        if as_json:
            console.print_json(json.dumps(rows))
            return
        table = Table(*rows[0], box=None)
        for row in rows:
            table.add_row(*(str(value or "") for value in row.values()))
        console.print(table)
        if not nights:
            console.print(f"no Prefect server answers at {settings.prefect_api_url}, so nothing is known of nights")


def logs(job: JobArgument, as_json: AsJson = False) -> None:
    """Print what a job's last night logged."""
    settings = enter()
    from prefect.client.orchestration import get_client

    from flows.cli.follow import NightFailed, prefect_answers
    from tasks.job import load_job

    load_job(job, settings.jobs)
    with prefect_answers(settings, path_of(job)), get_client(sync_client=True) as client:
        night = _last_night(client, job)
        if night is None:
            raise NightFailed(f"no night of {job} has begun; start one with `nightly run {job}`")
        for line in _log_lines(client, night):
            if as_json:
                console.print_json(json.dumps(line), indent=None)
            else:
                console.print(f"{line['at']} {line['level']:<8}{line['message']}")


def doctor(as_json: AsJson = False) -> None:
    """Check everything that a night needs, and say what to do about each failure. Exit code 1 where one fails."""
    settings = enter()
    from flows.cli.diagnosis import diagnose

    found = []
    with console.status("Looking"):
        for check in diagnose(settings):
            found.append(check)
            if not as_json:
                remedy = f"; {check.remedy}" if check.remedy else ""
                console.print(f"{MARKS[check.state]} {check.name:<10} {check.found}{remedy}")
    if as_json:
        console.print_json(json.dumps([vars(check) for check in found]))
    if any(check.state == "fail" for check in found):
        raise typer.Exit(1)


def pause(job: JobArgument) -> None:
    """Pause a job's schedule; it can still be run by hand. What the Prefect UI's switch does."""
    _pause(job, paused=True)
    console.print(f"the schedule of {job} is paused; let it go on with: nightly resume {job}")


def resume(job: JobArgument) -> None:
    """Let a job's paused schedule go on."""
    _pause(job, paused=False)
    console.print(f"the schedule of {job} goes on")


COMMANDS = (init, ls, logs, doctor, pause, resume)


def _pause(job: str, *, paused: bool) -> None:
    settings = enter()
    from prefect.client.orchestration import get_client

    from flows.cli.follow import prefect_answers
    from infra import deployments as deploy
    from tasks.job import load_job

    load_job(job, settings.jobs)
    with prefect_answers(settings, path_of(job)), get_client(sync_client=True) as client:
        deploy.pause(client, path_of(job), paused=paused)


def _ask(option: str, question: str, default: str) -> str:
    """Raises NotWritten where nobody can answer."""
    if not sys.stdin.isatty():
        wanted = "NAME" if option == "name" else f"--{option}"
        raise NotWritten(f"{wanted} must be given where nobody can be asked, found none; add it")
    return str(typer.prompt(question, default=default, show_default=bool(default)))


def _job_text(name: str, source: str, target: str | None, model: str, *, regression: bool) -> str:
    said = f"  target: {json.dumps(target)}\n" if target else ""
    return JOB.format(
        name=json.dumps(name),
        description=json.dumps(f"Made by nightly init for {source}."),
        source=json.dumps(source),
        target=said,
        model=f"{name.replace('-', '_')}.py:Net" if model == "own" else model,
        objective="rmse                # or mae, r2"
        if regression
        else "accuracy            # or log_loss, f1_macro, roc_auc",
    )


def _last_night(client: "SyncPrefectClient", job: str) -> "FlowRun | None":
    from prefect.client.schemas.filters import DeploymentFilter, FlowFilter, FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    begun = client.read_flow_runs(
        flow_filter=FlowFilter.model_validate({"name": {"any_": [FLOW]}}),
        deployment_filter=DeploymentFilter.model_validate({"name": {"any_": [job]}}),
        flow_run_filter=FlowRunFilter.model_validate({"start_time": {"is_null_": False}}),
        sort=FlowRunSort.START_TIME_DESC,
        limit=1,
    )
    return begun[0] if begun else None


def _log_lines(client: "SyncPrefectClient", night: "FlowRun") -> Iterator[dict[str, Any]]:
    import logging

    from prefect.client.schemas.filters import LogFilter
    from prefect.client.schemas.sorting import LogSort

    wanted = LogFilter.model_validate({"flow_run_id": {"any_": [night.id]}})
    begin = 0
    while page := client.read_logs(wanted, limit=LOG_PAGE, offset=begin, sort=LogSort.TIMESTAMP_ASC):
        for line in page:
            yield {
                "at": f"{line.timestamp:%Y-%m-%d %H:%M:%S}",
                "level": logging.getLevelName(line.level),
                "message": line.message,
            }
        begin += len(page)
