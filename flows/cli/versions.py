"""The commands about what was promoted: champion, history, rollback, pull, reproduce, reconcile, gc.

Each prints a table for people, or JSON for programs. What they do is in tasks; `flows/cli/main.py` registers them.
"""

import json
import logging
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from flows.cli.console import console, readable_jobs, say
from infra.errors import NotOurs
from infra.settings import OUR_LOGGERS, Settings, enter

JobArgument = Annotated[str, typer.Argument(help="Name of a job, as its YAML file is called.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def champion(job: JobArgument, as_json: AsJson = False) -> None:
    """Print a job's champion, every checksum verified."""
    from models.hyperparameters.declared import in_words
    from tasks.registry.versions import champion_entry, verify_version

    store = _store()
    promotion = champion_entry(store, job)
    manifest = verify_version(store, job, promotion.version)
    lineage = manifest.lineage
    _show(
        {
            "version": promotion.version,
            "promotion": promotion.model_dump(mode="json"),
            "manifest": manifest.model_dump(mode="json"),
        },
        [
            ("version", f"{promotion.version}, {promotion.kind} {promotion.number}"),
            ("promoted", f"{promotion.promoted_at:%Y-%m-%d %H:%M} UTC: {promotion.reason}"),
            ("model", f"{manifest.model}: {in_words(manifest.hyperparameters)}"),
            *((split, in_words(metrics)) for split, metrics in manifest.metrics.items()),
            ("from", f"study {lineage.study}, trial {lineage.trial}, snapshot {lineage.snapshot}"),
        ],
        as_json,
    )


def history(job: JobArgument, as_json: AsJson = False) -> None:
    """Print who was champion when, why, and what changed from one to the next."""
    from flows.cli.markdown import show
    from models.hyperparameters.declared import in_words
    from tasks.data.findings import escaped
    from tasks.registry.log import history as read_history
    from tasks.registry.versions import champion_entry, read_manifest

    store = _store()
    champion_entry(store, job)
    entries = read_history(store, job)
    manifests = {version: read_manifest(store, job, version) for version in {entry.version for entry in entries}}
    rows: list[dict[str, Any]] = []
    for entry, before in zip(entries, [*entries[1:], None], strict=True):
        now = manifests[entry.version]
        then = manifests[before.version].hyperparameters if before else {}
        changed = {name: value for name, value in now.hyperparameters.items() if then.get(name) != value}
        rows.append(
            {**entry.model_dump(mode="json"), "changed": changed if before else {}, "test": now.metrics["test"]}
        )
    if as_json:
        console.print_json(json.dumps(rows))
        return
    objectives = {version: manifest.lineage.objective for version, manifest in manifests.items()}
    lines = []
    for entry, row in zip(entries, rows, strict=True):
        # A version of an early format does not say its objective.
        test = {name: value for name, value in row["test"].items() if name == objectives[entry.version]}
        parts = [
            f"{entry.kind} of version {entry.version}",
            f"test {in_words(test)}" if test else "",
            # The numbers behind it stand in the version's manifest.
            entry.reason.partition(": test ")[0],
            f"changed: {in_words(row['changed'])}" if row["changed"] else "",
        ]
        sentence = escaped("; ".join(part for part in parts if part))
        lines.append(f"- **{entry.number}  {entry.promoted_at:%Y-%m-%d %H:%M}**: {sentence}")
    show("\n".join(lines), console)


def rollback(
    job: JobArgument,
    reason: Annotated[str, typer.Option(help="Why; it is kept in the promotion log.")],
    to: Annotated[str | None, typer.Option(help="The version; else the one that the champion replaced.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an earlier version champion again, by one more entry in the promotion log. Nothing is deleted."""
    settings = enter()
    from datetime import UTC, datetime

    from infra.store.opening import open_store
    from tasks.registry.rollback import roll_back

    promotion, _ = roll_back(open_store(settings.store_url), job, to=to, reason=reason, now=datetime.now(UTC))
    _show(
        promotion.model_dump(mode="json"),
        [("champion", f"version {promotion.version} of {job} again, as promotion {promotion.number}")],
        as_json,
    )
    # In a process of its own: MLflow takes longer to import than the rollback takes, and follows anyhow.
    arguments = [sys.executable, "-c", "from flows.cli.main import main; main()", point_champion.__name__, job]
    logs = settings.home / "logs"
    logs.mkdir(exist_ok=True)
    with (logs / "champion.log").open("ab") as log:
        subprocess.Popen(  # noqa: S603 ourselves
            arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def point_champion(job: JobArgument) -> None:
    """Let MLflow's alias `champion` name the champion of the store."""
    settings = enter()
    from mlflow import MlflowClient

    from infra.store.opening import open_store
    from tasks.job import load_job
    from tasks.registry.versions import choose_version, read_manifest
    from tasks.tracking import aliases
    from tasks.tracking.unavailable import mlflow_may_be_unavailable

    store = open_store(settings.store_url)
    version = choose_version(store, job, None)
    model = load_job(job, settings.jobs).registered_model
    with mlflow_may_be_unavailable("the champion's alias"):
        aliases.point_champion(MlflowClient(settings.mlflow_url), model, read_manifest(store, job, version), version)


def pull(
    job: JobArgument,
    to: Annotated[Path, typer.Option(help="A folder that does not exist yet.")],
    version: Annotated[str | None, typer.Option(help="The version; else the champion.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download a version, every checksum verified; the folder appears complete or not at all."""
    from tasks.registry.versions import choose_version, pull_version

    store = _store()
    chosen = choose_version(store, job, version)
    with console.status(f"Downloading version {chosen}"):
        manifest = pull_version(store, job, chosen, to.absolute())
    size = sum(file.bytes for file in manifest.files.values())
    _show(
        {"version": chosen, "folder": str(to.absolute()), "files": sorted(manifest.files), "bytes": size},
        [("version", chosen), ("folder", f"{to.absolute()} ({len(manifest.files)} files, {size / 1e6:.1f} MB)")],
        as_json,
    )


def reproduce(
    job: JobArgument,
    version: Annotated[str, typer.Argument(help="A version that was champion once (see `nightly history`).")],
    as_json: AsJson = False,
) -> None:
    """Train a version again from its manifest alone. Exit code 1 where not even its metrics come out the same."""
    settings = enter()
    _log_to_the_terminal(quiet=as_json)
    from infra.device import choose_device
    from infra.store.opening import open_store
    from tasks.promotion.reproduce import reproduce as train_again
    from tasks.registry.versions import choose_version

    store = open_store(settings.store_url)
    choose_version(store, job, version)
    found = train_again(store, job, version, settings.home / "snapshots", choose_device())
    outcome = (
        "the weights are equal bit by bit"
        if found.bit_equal
        else f"the weights differ, the metrics are {'within' if found.near else 'NOT within'} tolerance"
    )
    _show(
        {
            "version": version,
            "bit_equal": found.bit_equal,
            "within_tolerance": found.near,
            "published_on": found.published_on,
            "trained_on": found.trained_on,
            "metrics": {name: {"published": was, "again": again} for name, (was, again) in found.metrics.items()},
        },
        [
            ("outcome", outcome),
            ("published on", found.published_on),
            ("trained on", found.trained_on),
            *((name, f"{was:.6g} published, {again:.6g} again") for name, (was, again) in found.metrics.items()),
        ],
        as_json,
    )
    if not found.bit_equal and not found.near:
        raise typer.Exit(1)


def reconcile(
    job: Annotated[str | None, typer.Argument(help="Name of a job; all of them where none is named.")] = None,
) -> None:
    """Settle what interrupted nights left open in Optuna and MLflow, and let MLflow's alias follow the store."""
    settings = enter()
    _log_to_the_terminal(quiet=False)
    import torch
    from mlflow import MlflowClient

    from infra.store.opening import open_store
    from tasks.job import load_job
    from tasks.reconcile import only_night_of
    from tasks.reconcile import reconcile as settle

    store = open_store(settings.store_url)
    with nullcontext([load_job(job, settings.jobs)]) if job else readable_jobs(settings) as jobs:
        refused = False
        for each in jobs:
            try:
                with only_night_of(each.name, settings.home):
                    client = MlflowClient(settings.mlflow_url)
                    found = settle(each, store, client, settings.studies, torch.device("cpu"))
                console.print(f"{each.name}: champion {found.promotion.version if found else 'none yet'}")
            except NotOurs as error:  # which keeps no other job from being settled
                say(error)
                refused = True
        if refused:
            raise typer.Exit(1)


def gc(as_json: AsJson = False) -> None:
    """Delete what nobody needs: versions that no promotion names, if older than a day, and if older than a month
    snapshots that no promoted version was made of and no night used, and checkpoints of trials that nobody goes on
    with."""
    from datetime import UTC, datetime

    from tasks.data.snapshots import drop_old_snapshots
    from tasks.registry.versions import collect_garbage, promoted_snapshots
    from tasks.search.checkpoints import drop_old_checkpoints

    settings: Settings = enter()
    store, now = _store(), datetime.now(UTC)
    gone = collect_garbage(store, now)
    gone += drop_old_snapshots(store, settings.home / "snapshots", promoted_snapshots(store), now)
    gone += drop_old_checkpoints(store, settings.home / "checkpoints", now)
    _show({"deleted": gone}, [("deleted", f"{len(gone)} files"), *(("", key) for key in gone)], as_json)


COMMANDS = (champion, history, rollback, pull, reproduce, reconcile, gc)


def _store() -> Any:
    settings: Settings = enter()
    from infra.store.opening import open_store

    return open_store(settings.store_url)


def _show(content: dict[str, Any], rows: list[tuple[str, str]], as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(content))
        return
    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _log_to_the_terminal(*, quiet: bool) -> None:
    for name in OUR_LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
        logger.addHandler(RichHandler(console=Console(stderr=True), show_path=False, show_level=False))
