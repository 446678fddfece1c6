"""How pytest's processes (`-n`) divide the tests: file by file, but for the files of tests that break the stack which
they share. Those stay in one process, which begins with them, since together they take the longest.
"""

from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

BREAKERS = frozenset({"test_machine", "test_night_faults", "test_night_servers", "test_stack", "test_workers"})


class OneProcessForBreakers(LoadFileScheduling):  # type: ignore[misc]
    """What `--dist loadgroup` is for, which in pytest-xdist 3.8 finds no group under pytest 9.2."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "breakers" if Path(file).stem in BREAKERS else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneProcessForBreakers:
    return OneProcessForBreakers(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    breaking = {item.path.stem for item in items if "breakable_stack" in getattr(item, "fixturenames", ())}
    assert breaking <= BREAKERS, f"BREAKERS must name {breaking - BREAKERS}, whose tests use the breakable stack"
    items.sort(key=lambda item: item.path.stem not in BREAKERS)
