"""A unit test that starts a process says so: it is marked `process`, or it fails. What Hypothesis draws is the same
each time, and may take as long as a busy machine takes."""

import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("nightly", derandomize=True, database=None, deadline=None)
settings.load_profile("nightly")

STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.exec", "os.system"}
# Libraries ask git for the commit of what they write, and file for the machine as they are imported: no test means to.
UNNOTICED = {"git", "file"}
_started: list[str] = []


def _notice(event: str, arguments: tuple[object, ...]) -> None:
    if event in STARTS:
        program = Path(str(arguments[0])).name if arguments else event
        if program not in UNNOTICED:
            _started.append(program)


# For as long as this process lives: Python takes no audit hook back.
sys.addaudithook(_notice)


@contextmanager
def _no_unmarked_process(item: pytest.Item) -> Iterator[None]:
    _started.clear()
    yield
    if _started and item.get_closest_marker("process") is None:
        pytest.fail(f"it starts a process ({_started[0]}) and is not marked: add @pytest.mark.process", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    with _no_unmarked_process(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    with _no_unmarked_process(item):
        return (yield)


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database before anything is in it, to be copied: to make its tables takes 0.6 s of a core."""
    from mlflow import MlflowClient  # which takes 2 s of a core, also in a process that only hands out tests

    database = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    return database
