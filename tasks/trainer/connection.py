"""The parent's side of each process that trains: what is said to it and heard of it, and when it counts as hung."""

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any

from models.training.terms import Training
from tasks.trainer.fresh import FreshProcess, start_python
from tasks.trainer.local import TrainerDied

# How long a wave may go without an epoch: so long at first; later so many times the longest that any epoch took.
FIRST_EPOCH_SECONDS = 600.0
# To start, and to read the rows.
START_SECONDS = 900.0
LEAST_EPOCH_SECONDS = 60.0
HUNG_AFTER_EPOCHS = 20


class ProcessGroup:
    """Processes that train, `most` at most. The first imports what all of them need, and the others are its forks: so
    they start in the time that one takes (1.6 s of a core), and share its memory. They live and die together.

    What they train on is told them once that is known: what is to be imported takes longer than all the rest. Before
    that one more is forked from the first, if one is needed that stays `fresh`; it outlives them.
    """

    def __init__(self, most: int, fresh: FreshProcess | None = None) -> None:
        self._fresh = fresh
        self.processes = [TrainerProcess(self) for _ in range(most)]
        self._content: bytes | None = None
        self._first: subprocess.Popen[bytes] | None = None

    @property
    def is_started(self) -> bool:
        return self._first is not None

    def start(self) -> None:
        """Unless it is."""
        if self._first is not None:
            return
        with ExitStack() as theirs:
            spare = self._fresh and self._fresh.offer()
            file_descriptors = [theirs.enter_context(spare).fileno() if spare else -1]
            for process in self.processes:
                ours, other_end = socket.socketpair()
                file_descriptors.append(theirs.enter_context(other_end).fileno())
                process.connect(Connection(ours.detach()))
            self._first = start_python("tasks.trainer.serving:serve", *file_descriptors)
        if self._content is not None:
            self._tell(self._content)

    def load(self, content: bytes) -> None:
        """Tell them how many of them are wanted, the job, the snapshot and the device, pickled."""
        self._content = content
        if self._first is not None:
            self._tell(content)

    def close(self) -> None:
        if self._first is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._first.pid, signal.SIGKILL)
            self._first.wait()
            for process in self.processes:
                process.connection.close()
            self._first = None

    def ended(self) -> str:
        """How it ended, which it just did; what is left of it is killed."""
        assert self._first is not None
        with suppress(subprocess.TimeoutExpired):
            self._first.wait(5)
        code = self._first.returncode
        self.close()
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def _tell(self, content: bytes) -> None:
        with suppress(OSError):  # it died, which shows in what is asked of it next
            self.processes[0].connection.send_bytes(content)


class TrainerProcess:
    """One of them: what is said to it and heard of it."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._longest = 0.0
        self._limit = FIRST_EPOCH_SECONDS
        self._answered = 0.0

    def connect(self, connection: Connection) -> None:
        self.connection = connection
        self._process_id: int | None = None

    def wait_until_ready(self) -> int:
        """Returns its process's id. Raises TrainerDied."""
        if self._process_id is None:
            _, self._process_id = self._next(START_SECONDS)
        return self._process_id

    def ask(self, kind: str, content: object) -> Any:
        """Raises what is wrong with the model, and TrainerDied, as the others do."""
        self._send(kind, content)
        answer, value = self._receive(FIRST_EPOCH_SECONDS)
        if answer == "error":
            raise value
        return value

    def begin(self, trainings: Sequence[Training], processes: int) -> None:
        """Have them trained, beside the other processes that do so at once."""
        self._send("train", (list(trainings), processes))
        self._limit, self._answered = FIRST_EPOCH_SECONDS, time.monotonic()

    def hear(self) -> tuple[str, Any]:
        """`epochs` by their training's place, which is to be answered, `ended` with a place and how, or `done`."""
        kind, content = self._receive(self._limit)
        if kind == "epochs":
            self._longest = max(self._longest, time.monotonic() - self._answered)
            self._limit = max(LEAST_EPOCH_SECONDS, HUNG_AFTER_EPOCHS * self._longest)
        return kind, content

    def answer(self, stopped: list[int]) -> None:
        """Whose training to stop after the epochs that were heard of."""
        self._deliver(stopped)
        self._answered = time.monotonic()

    def _send(self, kind: str, content: object) -> None:
        self._group.start()
        self._deliver((kind, content))

    def _deliver(self, message: object) -> None:
        try:
            self.connection.send(message)
        except OSError as error:
            raise self._died() from error

    def _receive(self, seconds: float) -> tuple[str, Any]:
        """The next message; what is not heard within the seconds, once the process is ready, is taken for hung."""
        self.wait_until_ready()
        return self._next(seconds)

    def _next(self, seconds: float) -> tuple[str, Any]:
        """The next message that is no log line."""
        deadline = time.monotonic() + seconds
        try:
            while self.connection.poll(max(0.0, deadline - time.monotonic())):
                kind, content = self.connection.recv()
                if kind != "log":
                    return kind, content
                logging.getLogger(content.name).handle(content)
        except (EOFError, OSError) as error:
            raise self._died() from error
        self._group.close()
        raise TrainerDied(f"nothing was heard of the training for {seconds:.0f} s, so its process was killed")

    def _died(self) -> TrainerDied:
        return TrainerDied(f"the process that trained ended by itself ({self._group.ended()})")
