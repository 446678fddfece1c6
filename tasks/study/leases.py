"""Who works on a study: each worker's sign of life in the study itself, and what becomes of a dead one's trials.

Optuna's own heartbeat is only recorded within `study.optimize`; with ask and tell nobody would ever be found dead. A
worker counts a number up in the study. Whoever watches sees by a clock of its own for how long the number has stood
still, so no two machines' clocks need agree, and waits longer where the storage itself was away. A trial that is taken
from a worker is told FAIL, and Optuna's storages refuse whatever is said of a finished trial: that fences off a worker
that was declared dead and comes back. Knows nothing of training.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import copy_context
from itertools import count
from typing import Any

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from infra.errors import ExpectedError
from tasks.study.storage import STORAGE_IS_AWAY, ClaimLost
from tasks.study.studies import FINISH_BY, FLOW_RUN, SEARCH_ENDED_BY, STOPPED, WORKER, number_of, tonights_trials

BEAT_SECONDS = 5.0
LEASE_SECONDS = 30.0
# A night that died is begun again by Prefect, or by hand; its workers go on for as long, and then leave.
NIGHT_PATIENCE_SECONDS = 600.0
NIGHT = "night"
LEFT = -1

_WORKER_RECORD, _LOST, _BROKEN = "worker ", "lost worker ", "broken worker "

Claims = Callable[[], AbstractContextManager[object]]

_count = count()
_logger = logging.getLogger(__name__)


class NightSuperseded(ExpectedError):
    """Another night has taken up the study: this one may neither search on nor promote."""


class Lease:
    """A worker's place in a study for the time of the block. It beats on a thread of its own, which also notices that
    the worker is to stop at once (the night was stopped, or another night has taken up the study), or to cut off what
    it trains (the night's time is over)."""

    def __init__(self, study: optuna.Study, device: str, flow_run_id: str | None, *, is_night: bool = False) -> None:
        self._study = study
        self._record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_began": psutil.Process().create_time(),
            "device": device,
            "flow_run": flow_run_id,
            NIGHT: is_night,
        }
        self._left = threading.Event()
        self._writing = threading.Lock()
        # In this thread's context, so that Prefect knows whose log lines they are.
        self._thread = threading.Thread(target=copy_context().run, args=(self._beat,), name="lease", daemon=True)
        self.name = ""
        self.must_stop = self.must_cut_off = False

    def renew(self) -> None:
        """Go on as another worker: what was declared dead stays dead."""
        with self._writing:
            if self.name:
                self._write(LEFT)
            self.name = f"{self._record['host']}-{self._record['pid']}-{next(_count)}"
            self._write(0)

    def __enter__(self) -> "Lease":
        self.renew()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._left.set()
        if kind is None or not issubclass(kind, STORAGE_IS_AWAY):  # which was waited for long enough
            with suppress(*STORAGE_IS_AWAY), self._writing:
                self._write(LEFT)

    def _beat(self) -> None:
        for beats in count(1):
            if self._left.wait(BEAT_SECONDS):
                return
            try:
                with self._writing:
                    if not self._left.is_set():
                        self._write(beats)
                attributes = self._study.user_attrs
            except STORAGE_IS_AWAY as error:
                _logger.warning("%s could not give a sign of life: %s", self.name, error)
                continue
            is_superseded = bool(self._record[NIGHT]) and attributes.get(FLOW_RUN) != self._record["flow_run"]
            self.must_stop = is_superseded or attributes.get(SEARCH_ENDED_BY) == STOPPED
            self.must_cut_off = attributes.get(SEARCH_ENDED_BY) == FINISH_BY

    def give_up(self, why: str) -> None:
        """Say why this worker takes no further trials tonight."""
        self._study.set_user_attr(_BROKEN + self.name, why)
        _logger.error("%s %s", self._record["device"], why)

    def _write(self, beats: int) -> None:
        self._study.set_user_attr(_WORKER_RECORD + self.name, {**self._record, "beats": beats})


class NightSign:
    """The night's own sign of life, for its workers."""

    def __init__(self, study: optuna.Study, clock: Callable[[], float] = time.monotonic) -> None:
        self._study, self._clock = study, clock
        self._beats, self._since = -1, clock()

    def is_gone(self) -> bool:
        """Whether the search has ended, or no night has been heard of for so long that none will take it up again."""
        attributes = self._study.user_attrs
        if attributes.get(SEARCH_ENDED_BY):
            return True
        beats = sum(record["beats"] for record in workers_of(attributes).values() if record[NIGHT])
        if beats != self._beats:
            self._beats, self._since = beats, self._clock()
        return self._clock() - self._since > NIGHT_PATIENCE_SECONDS


class Watch:
    """Finds workers that died, and frees their trials. `look` is to be called every few seconds."""

    def __init__(self, study: optuna.Study, claims: Claims, clock: Callable[[], float] = time.monotonic) -> None:
        self._study, self._claims, self._clock = study, claims, clock
        self._seen: dict[str, tuple[int, float]] = {}
        self._looked_at: float | None = None
        self._looking = threading.Lock()

    def look(self) -> dict[str, Any]:
        """Declare dead whoever has not beaten for the time of a lease; returns the records of those that live."""
        with self._looking:
            return self._look()

    def _look(self) -> dict[str, Any]:
        attributes = self._study.user_attrs
        now = self._clock()
        silence = 0.0 if self._looked_at is None else now - self._looked_at
        if silence > 2 * BEAT_SECONDS:  # the storage was away, for the workers as well
            self._seen = {name: (beats, since + silence) for name, (beats, since) in self._seen.items()}
        self._looked_at = now
        living = workers_of(attributes)
        for name, record in list(living.items()):
            beats, since = self._seen.get(name, (-1, now))
            if beats != record["beats"]:
                self._seen[name] = (record["beats"], now)
            elif now - since > LEASE_SECONDS:
                self._lose(name, record, f"has not been heard of for {LEASE_SECONDS:.0f} s")
                del living[name]
            if _died_here(record):
                self._lose(name, record, "is dead")
                living.pop(name, None)
        if any(
            trial.user_attrs.get(WORKER) not in living for trial in tonights_trials(self._study, TrialState.RUNNING)
        ):
            with suppress(ClaimLost), self._claims():  # or somebody who just joined might be asking
                known = workers_of(self._study.user_attrs)
                free_trials(self._study, lambda trial: trial.user_attrs.get(WORKER) not in known)
        return living

    def _lose(self, name: str, record: Mapping[str, Any], how: str) -> None:
        self._study.set_user_attr(_LOST + name, how)
        _logger.warning(
            "the worker on %s of %s %s; its trials are asked for again", record["device"], record["host"], how
        )


def workers_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The records of a study's workers that neither left nor were declared dead, by their names."""
    return {
        name: record
        for key, record in attributes.items()
        if key.startswith(_WORKER_RECORD)
        and record["beats"] != LEFT
        and _LOST + (name := key.removeprefix(_WORKER_RECORD)) not in attributes
    }


def mishaps_of(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence for each worker that was declared dead or taken out of the night."""
    found = []
    for key, how in attributes.items():
        for kind in (_LOST, _BROKEN):
            if key.startswith(kind):
                record = attributes[_WORKER_RECORD + key.removeprefix(kind)]
                found.append(f"{record['device']} of {record['host']} {how}")
    return tuple(found)


def lost_flow_runs(attributes: Mapping[str, Any]) -> set[str]:
    """The flow runs of workers that were declared dead."""
    names = (key.removeprefix(_LOST) for key in attributes if key.startswith(_LOST))
    return {str(attributes[_WORKER_RECORD + name]["flow_run"]) for name in names}


def free_trials(study: optuna.Study, is_lost: Callable[[FrozenTrial], bool]) -> None:
    """Tell FAIL for RUNNING trials that nobody trains any more; only right while nobody asks for trials."""
    lost = [trial for trial in study.get_trials(states=(TrialState.RUNNING,)) if is_lost(trial)]
    for trial in lost:
        with suppress(UpdateFinishedTrialError, ValueError):  # its worker came first
            study.tell(trial.number, state=TrialState.FAIL)
            _logger.info("trial %d was interrupted", number_of(trial))


def settle(study: optuna.Study, claims: Claims) -> dict[str, Any]:
    """Free the trials of every worker that is dead, as a night begins; returns the records of those that live, which
    takes the time of a lease where a worker of another machine might."""
    watch = Watch(study, claims)
    began = time.monotonic()
    before = workers_of(study.user_attrs)
    living = watch.look()
    while any(record["beats"] == before[name]["beats"] for name, record in living.items() if name in before):
        if time.monotonic() - began > LEASE_SECONDS + 2 * BEAT_SECONDS:
            break
        time.sleep(BEAT_SECONDS / 5)
        living = watch.look()
    return living


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Look on a thread for the time of the block, while this one trains."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(BEAT_SECONDS):
            try:
                watch.look()
            except STORAGE_IS_AWAY as error:
                _logger.warning("nobody watches the workers while the studies are away: %s", error)

    thread = threading.Thread(target=copy_context().run, args=(look,), name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def check_still_ours(study: optuna.Study, flow_run_id: str | None) -> None:
    """Raises NightSuperseded where another night has taken up the study since this one did."""
    owner = study.user_attrs.get(FLOW_RUN)
    if owner != flow_run_id:
        raise NightSuperseded(
            f"the night {owner} has taken up {study.study_name}, so this one stops and promotes nothing"
        )


def _died_here(record: Mapping[str, Any]) -> bool:
    if record["host"] != socket.gethostname():
        return False
    try:
        process = psutil.Process(record["pid"])
        return process.create_time() != record["process_began"] or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
