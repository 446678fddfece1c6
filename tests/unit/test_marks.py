"""`make check` starts no process: a unit test that does is marked, or fails."""

import pytest

# Ways to start a process, and what the guard names.
STARTS = {
    "subprocess.run(['true'], check=True)": "true",
    "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)": "true",
    "os.waitpid(os.fork() or os._exit(0), 0)": "os.fork",
    "os.system('true')": "true",
}
STARTS_NONE = ["subprocess.run(['git', 'version'], check=True)", "os.getpid()"]  # libraries ask git for the commit


@pytest.mark.process
def test_a_test_that_starts_a_process_fails_unless_it_is_marked(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("from tests.unit.conftest import pytest_runtest_call, pytest_runtest_setup")
    pytester.makeini("[pytest]\nmarkers = process")
    tests = ["import os, subprocess, pytest"]
    for number, start in enumerate([*STARTS, *STARTS_NONE]):
        tests += [
            f"@pytest.fixture(scope='session')\ndef begun_{number}():\n    {start}",
            f"def test_{number}():\n    {start}",
            f"def test_by_a_fixture_{number}(begun_{number}):\n    pass",
            f"@pytest.mark.process\ndef test_marked_{number}():\n    {start}",
        ]
    pytester.makepyfile("\n".join(tests))
    ended = pytester.runpytest_inprocess()
    ended.assert_outcomes(failed=len(STARTS), errors=len(STARTS), passed=len(STARTS) + 3 * len(STARTS_NONE))
    for program in STARTS.values():
        ended.stdout.fnmatch_lines([f"*it starts a process ({program}) and is not marked: add @pytest.mark.process"])
