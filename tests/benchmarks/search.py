"""The suite `search`: how soon each search method reaches a target, how good a whole night's model is, and what the
memory of earlier nights is worth."""

import math
import statistics
from collections.abc import Callable
from typing import Any

from rich.table import Table

from tests.benchmarks import accuracy, memory, reach
from tests.benchmarks.datasets import has_shared_data

Record = dict[str, Any]
Measurement = tuple[Callable[..., Record], tuple[Any, ...]]


def measurements(seeds: int) -> list[Measurement]:
    """Functions with their arguments, the longest first. What needs NIGHTLY_SHARED_DATA is left out without it."""
    nights = [name for name in accuracy.NIGHTS if has_shared_data() or name.startswith("digits")]
    datasets = [name for name in reach.SETTINGS if has_shared_data() or name == "digits"]
    return [
        *((accuracy.night, (name,)) for name in nights),
        *(
            (reach.search, (dataset, method, pruner, seed))
            for dataset in datasets
            for method, pruner in reach.METHODS
            for seed in range(seeds)
        ),
        *((memory.five_nights, (on, seed)) for on in (True, False) for seed in range(seeds)),
    ]


def tables(records: list[Record]) -> list[Table]:
    """One table for each kind of record."""
    return [
        _reached([record for record in records if record["measured"] == "reach"]),
        _nights([record for record in records if record["measured"] == "night"]),
        _memory([record for record in records if record["measured"] == "memory"]),
    ]


def _reached(records: list[Record]) -> Table:
    table = Table("method", "pruner", title="Until the target: median trials, CPU seconds (seeds that reached it)")
    for dataset, setting in reach.SETTINGS.items():
        table.add_column(f"{dataset}, {setting.target:.1%} within {setting.trials}")
    for method, pruner in reach.METHODS:
        cells = []
        for dataset in reach.SETTINGS:
            runs = [
                record
                for record in records
                if (record["dataset"], record["method"], record["pruner"]) == (dataset, method, pruner)
            ]
            cells.append(_median(runs))
        table.add_row(method, pruner, *cells)
    return table


def _median(runs: list[Record]) -> str:
    """A run that missed the target counts as longer than any other."""
    if not runs:
        return "not measured"
    trials = statistics.median_high([run["trials"] or math.inf for run in runs])
    seconds = statistics.median_high([run["seconds"] if run["trials"] else math.inf for run in runs])
    reached = f"({sum(run['trials'] is not None for run in runs)} of {len(runs)})"
    return f"not reached {reached}" if trials == math.inf else f"{trials}, {seconds:.0f} s {reached}"


def _nights(records: list[Record]) -> Table:
    table = Table(
        "night", "test metric", "night", "textbook", "scikit-learn", "CPU s",
        title="A night with defaults (60 trials), on rows that nobody trained on or chose by",
    )  # fmt: skip
    for record in records:
        peers = ", ".join(f"{peer} {value:.4f}" for peer, value in record["peers"].items())
        table.add_row(
            record["night"],
            record["objective"],
            f"{record['test']:.4f}",
            f"{record['textbook_test']:.4f}",
            peers,
            f"{record['seconds']:.0f}",
        )
    return table


def _memory(records: list[Record]) -> Table:
    table = Table("memory", title=f"Median trials until {memory.TARGET:.1%} on each night of growing digits")
    for night in memory.NIGHTS:
        table.add_column(f"night {night}")
    for on in (True, False):
        runs = [record["trials"] for record in records if record["memory"] is on]
        if runs:
            medians = [statistics.median_high([run[str(night)] for run in runs]) for night in memory.NIGHTS]
            table.add_row("on" if on else "off", *(f"{trials:g}" for trials in medians))
    return table
