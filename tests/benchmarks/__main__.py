"""`make bench`: every measurement, printed as tables and written as JSON; `make bench ONLY=search` for one suite.

Measurements run side by side, each on one thread of a process; what is timed is CPU seconds, which mean the same on a
machine that has other work. Those of a suite that times the machine as a whole run one after the other. The JSON is
written anew after each of them, so that a run cut short is not lost.
"""

import json
import multiprocessing
import os
import platform
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

from infra.device import choose_device, describe_device
from infra.settings import Settings
from tests.benchmarks import prepare, publish, search, throughput, workers

SUITES = {"search": search, "prepare": prepare, "publish": publish, "throughput": throughput, "workers": workers}

console = Console(highlight=False, soft_wrap=True)


def main(
    only: Annotated[
        Literal["all", "search", "prepare", "publish", "throughput", "workers"], typer.Option(help="The suite to run.")
    ] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="How often whatever depends on luck is repeated.")] = 5,
) -> None:
    """Measure, print tables, and write one JSON file a suite into the home's folder bench."""
    folder = Settings.read().home / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    for name, suite in SUITES.items():
        if only in ("all", name):
            records = _measure(suite, seeds, folder / f"{name}.json")
            for table in suite.tables(records):
                console.print(table)


def _measure(suite: Any, seeds: int, file: Path) -> list[dict[str, Any]]:
    measurements = suite.measurements(seeds)
    records: list[dict[str, Any]] = []
    cores = os.cpu_count() or 1
    processes, threads = (1, cores) if hasattr(suite, "ALONE") else (cores, 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (threads,), max_tasks_per_child=1) as pool:
        running = {pool.submit(function, *arguments): arguments for function, arguments in measurements}
        for done in as_completed(running):
            records.append(done.result())
            ratios = suite.summary(records) if hasattr(suite, "summary") else {}
            content = {**ratios, "machine": _machine(), "records": records}
            file.write_text(json.dumps(content, indent=1))
            console.print(f"{len(records)} of {len(measurements)}: {' '.join(str(part) for part in running[done])}")
    return records


def _machine() -> dict[str, Any]:
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "device": describe_device(choose_device()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    typer.run(main)
