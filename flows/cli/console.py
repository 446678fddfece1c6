"""What commands share on the terminal: where words and errors go, and the jobs that can be worked on though another's
file is wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from infra.settings import Settings

if TYPE_CHECKING:
    from tasks.job import TuningJob

# What stands in data, such as a class named [/b] or :x:, is printed as it is.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(error: object) -> None:
    """Print each sentence of an error on a line of standard error."""
    for sentence in str(error).splitlines():
        errors.print(f"nightly: {sentence}")


def say_hints(job: "TuningJob") -> None:
    """Print what a job's file allows but hardly means."""
    from tasks.job import hints

    for hint in hints(job):
        say(f"hint for {job.name}: {hint}")


@contextmanager
def readable_jobs(settings: Settings) -> Iterator[list["TuningJob"]]:
    """The jobs whose files are right. What is wrong with the others is said first; the command works for these, and
    then ends with exit code 1."""
    from tasks.job import load_jobs

    jobs, wrong = load_jobs(settings.jobs)
    for error in wrong:
        say(error)
    yield jobs
    if wrong:
        raise typer.Exit(1)
