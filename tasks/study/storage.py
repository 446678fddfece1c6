"""Where studies lie: a journal each in a folder of this machine, or all of them in one PostgreSQL database.

A journal is safe for several processes of one machine, takes 20 reports in 0.02 s where SQLite takes 0.12, and a
growing history slows nothing down; SQLite is not made for several writers, as Optuna's documentation warns. Several
machines need PostgreSQL. Knows nothing of jobs and trials.
"""

import fcntl
import json
import logging
import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from io import FileIO
from pathlib import Path
from typing import Any

import sqlalchemy
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._storage import JournalOperation
from sqlalchemy.exc import OperationalError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from infra.errors import ExpectedError

# A folder of journals, or the URL of a PostgreSQL database.
Studies = Path | str

STORAGE_IS_AWAY = (StorageInternalError, OperationalError)
PATIENCE_SECONDS = 600
# What a journal says of a trial that has not ended.
LOST_WITH_ITS_TRIAL = frozenset(
    {
        JournalOperation.CREATE_TRIAL,
        JournalOperation.SET_TRIAL_PARAM,
        JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE,
        JournalOperation.SET_TRIAL_USER_ATTR,
        JournalOperation.SET_TRIAL_SYSTEM_ATTR,
    }
)
# By these a host that is gone without a word is noticed: it does not accept a connection, or does not acknowledge.
CONNECTING = {"connect_timeout": 5, "tcp_user_timeout": 10_000}
# Of RDBStorage, by the cache that Optuna lays over it.
CALLED_BY_THE_CACHE = {
    "_create_new_trial",
    "_get_best_trial_id",
    "_get_trials",
    "_set_trial_param",
    "get_trial_id_from_study_id_trial_number",
}

_logger = logging.getLogger(__name__)


class StudiesUnavailable(ExpectedError):
    """The studies could not be written or read for as long as that is waited for."""

    @classmethod
    def after(cls, error: BaseException) -> "StudiesUnavailable":
        """Says what the database, the way to it, or the disk said; its first line names neither user nor password."""
        return cls(
            f"the studies could not be used for {PATIENCE_SECONDS} s ({_reason(error)}); start their database or set "
            "NIGHTLY_OPTUNA_URL right, or where they are files make room for them; the next night continues the study"
        )


class ClaimLost(Exception):
    """Somebody else may have asked for trials at the same time: whatever was asked for is to be given back."""


def study_names(studies: Studies, job_name: str) -> list[str]:
    """The names of a job's studies, the newest first: each ends in the moment in which its night began."""
    if isinstance(studies, Path):
        names = [journal.stem for journal in (studies / job_name).glob("*.journal")]
    else:
        of_the_job = re.compile(re.escape(job_name) + r"-\d{8}-\d{6}")
        found = (study.study_name for study in _Database.at(studies).get_all_studies())
        names = [name for name in found if of_the_job.fullmatch(name)]
    return sorted(names, reverse=True)


def storage_of(studies: Studies, job_name: str, study_name: str) -> BaseStorage:
    """The storage that holds a study, or is to hold it."""
    if isinstance(studies, str):
        return _Database.at(studies)
    journal = studies / job_name / f"{study_name}.journal"
    journal.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(_Journal(journal))


def check_database(url: str) -> None:
    """Raises StudiesUnavailable where the database does not answer at once."""
    try:
        engine = sqlalchemy.create_engine(_with_driver(url), connect_args=CONNECTING, poolclass=sqlalchemy.NullPool)
        engine.connect().close()
    except OperationalError as error:
        raise StudiesUnavailable(
            f"the database of the studies does not answer ({_reason(error)}); start it or set NIGHTLY_OPTUNA_URL right"
        ) from error


@contextmanager
def one_claims(studies: Studies, job_name: str, study_name: str) -> Iterator[None]:
    """Have the study to oneself while trials are asked for: the next must see what was asked before.

    Raises ClaimLost at the end of a block during which the database freed the lock.
    """
    if isinstance(studies, Path):
        with FileLock(studies / job_name / f"{study_name}.claim"):
            yield
        return
    connection = _patiently(_claim, _Database.at(studies).engine, study_name)
    try:
        yield
        _check_claim(connection)
    finally:
        with suppress(OperationalError):
            connection.close()


def _claim(engine: sqlalchemy.Engine, study_name: str) -> sqlalchemy.Connection:
    """A transaction that holds the study's lock. A connection that broke is of no use for a second attempt."""
    connection = engine.connect()
    try:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": study_name})
    except BaseException:
        connection.invalidate()
        raise
    return connection


def _check_claim(connection: sqlalchemy.Connection) -> None:
    """The lock is held for as long as its transaction lives."""
    try:
        connection.execute(sqlalchemy.text("SELECT 1"))
    except OperationalError as error:
        raise ClaimLost("the database was restarted while trials were asked for") from error


class _Journal(JournalFileBackend):
    """Locked by the kernel, which frees the lock when its holder dies: Optuna's own locks are files, which a killed
    process leaves behind and others then wait for. What was cut off in the middle of a line, by a full disk or a power
    cut, is dropped.

    Waits for the disk where a result must outlast a power cut, not at each of the twenty lines before it: what a
    cut takes is the end of a journal, and a trial that has not ended begins again anyway."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        super().__init__(str(journal))

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """What others wrote, and this process, since it read last: mostly nothing, for which no file is opened."""
        if self._journal.stat().st_size != self._log_number_offset.get(log_number_from):
            yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Waits for room where the disk is full: no trial is lost by it."""
        try:
            self._append(logs)
        except StorageInternalError:
            _patiently(self._append, logs)

    def _append(self, logs: list[dict[str, Any]]) -> None:
        try:
            self._write(logs)
        except OSError as error:
            raise StorageInternalError(f"{self._journal} cannot be written") from error

    def _write(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(f"{json.dumps(log, separators=(',', ':'))}\n" for log in logs)
        with FileIO(str(self._journal), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = _drop_cut_line(file)
            rest = memoryview(lines.encode())
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                if any(log["op_code"] not in LOST_WITH_ITS_TRIAL for log in logs):
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(end)  # or a second attempt would say it twice
                raise


def _drop_cut_line(journal: FileIO) -> int:
    """Go to the end of the last whole line; returns where that is."""
    end = journal.seek(0, os.SEEK_END)
    if end and os.pread(journal.fileno(), 1, end - 1) != b"\n":
        journal.seek(0)
        end = journal.seek(journal.read().rfind(b"\n") + 1)
        journal.truncate()
    return end


class _Database(RDBStorage):
    """A database whose outage is waited for: no trial is lost by it. Reports of epochs are not waited for, or training
    would stand still; whoever reports keeps them."""

    def __init__(self, url: str) -> None:
        engine = {"pool_pre_ping": True, "connect_args": CONNECTING}
        _patiently(partial(super().__init__, _with_driver(url), engine))
        for name in (BaseStorage.__abstractmethods__ | CALLED_BY_THE_CACHE) - {"set_trial_intermediate_value"}:
            setattr(self, name, partial(_patiently, getattr(self, name)))

    @classmethod
    @cache
    def at(cls, url: str) -> "_Database":
        """One of a process, which pools its connections."""
        return cls(url)


def _with_driver(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


def _reason(error: BaseException) -> str:
    return str(error.__cause__ or error).splitlines()[0]


def _say_once(state: RetryCallState) -> None:
    if state.attempt_number == 1:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        _logger.warning(
            "the studies cannot be used (%s); that is waited for up to %d s", _reason(error), PATIENCE_SECONDS
        )


_patiently = Retrying(
    retry=retry_if_exception_type(STORAGE_IS_AWAY),
    wait=wait_random_exponential(max=5),
    stop=stop_after_delay(PATIENCE_SECONDS),
    before_sleep=_say_once,
    reraise=True,
)
