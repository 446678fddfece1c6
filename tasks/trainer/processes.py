"""A trainer in processes of its own, which can be killed for certain.

A training that hangs in a kernel or a library can be stopped by nothing else, one that the system kills for its memory
takes no night with it, and what a dead process held of the device is free again. The processes get none of our
credentials: a user's model runs in them.
"""

import itertools
import logging
import os
import pickle
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import optuna
import torch

from infra.device import used_bytes, wait_for_memory
from infra.settings import OUR_LOGGERS
from models.fused.train import OnEpoch
from models.hyperparameters.declared import Hyperparameters
from models.training.terms import Epoch, Training
from tasks.data.prepared import Prepared
from tasks.data.snapshots import Snapshot
from tasks.job import TuningJob
from tasks.trainer.fresh import FreshProcess, end_with_the_other_end, start_python, stay_fresh
from tasks.trainer.local import Ended, LocalTrainer, TrainerDied, failed

# How long a wave may go without an epoch: so long at first; later so many times the longest that any epoch took.
FIRST_EPOCH_SECONDS = 600.0
# To start, and to read the rows.
START_SECONDS = 900.0
LEAST_EPOCH_SECONDS = 60.0
HUNG_AFTER_EPOCHS = 20
# A core is used better by a process of its own than by a thread that waits for the other at each operation: 16 digits
# MLPs take 0.5 to 0.7 of the time in two processes. Each holds the rows, so not where these are many.
CPU_PROCESSES = 2
MOST_ROWS_BYTES = 2**28
# On a CPU whatever the training waits for goes first: what asks for its trials, and the servers that these are told to.
# A night of 200 digits MLPs on two cores takes 0.95 of the time.
NICENESS = 10


@contextmanager
def started_ahead(processes: int, fresh: FreshProcess | None = None) -> Iterator["ProcessGroup"]:
    """Processes that import what a training needs while the night finds out what it is to train on. They end with the
    block, if they have not before."""
    started = ProcessGroup(processes, fresh)
    try:
        started.start()
        yield started
    finally:
        started.close()


def worthwhile_processes(device: torch.device, rows_bytes: int) -> int:
    """How many processes use the device best for training on rows of such a size."""
    if device.type != "cpu" or rows_bytes > MOST_ROWS_BYTES:
        return 1
    return min(CPU_PROCESSES, torch.get_num_threads())


class TrainerProcesses:
    """Trains in processes of their own, which are started where there are none, and end with this one or with `close`.

    What is to be trained is divided among them, and they keep step: nobody begins an epoch before all have ended the
    last, so that what is reported, and what a pruner makes of it, never depends on which of them is faster. Those that
    were `started` ahead are used; of them no more begin than are wanted.
    """

    def __init__(
        self,
        job: TuningJob,
        snapshot: Snapshot,
        device: torch.device,
        processes: int = 1,
        started: "ProcessGroup | None" = None,
    ) -> None:
        self.device = device
        self._used_before = used_bytes(device)
        self._group = started or ProcessGroup(processes)
        content = job.model_dump(mode="json", exclude={"schedule"})
        self._group.load(pickle.dumps((processes, content, snapshot, str(device))))
        self._processes = self._group.processes[:processes]

    def __enter__(self) -> "TrainerProcesses":
        self._group.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes and all that they started; what they held of the device is seen to be free again."""
        self._group.close()
        wait_for_memory(self.device, self._used_before)

    @property
    def process_ids(self) -> list[int]:
        """Of those that live, once all of them are ready."""
        return [process.wait_until_ready() for process in self._processes] if self._group.is_started else []

    def members(self, training: Training) -> int:
        return int(self._processes[0].ask("members", training))

    def costs(self, hyperparameters: Hyperparameters, needed: Collection[str]) -> dict[str, float]:
        return dict(self._processes[0].ask("costs", (hyperparameters, tuple(needed))))

    def rehearse(self, training: Training, folder: Path) -> str | None:
        unsaved: str | None = self._processes[0].ask("rehearse", (training, folder))
        return unsaved

    def train(self, trainings: Sequence[Training], on_epoch: OnEpoch) -> Iterator[tuple[int, Ended]]:
        if not trainings:
            return
        parts = min(len(self._processes), len(trainings))
        bounds = [len(trainings) * part // parts for part in range(parts + 1)]
        training: dict[int, TrainerProcess] = {}
        done = False
        try:
            for process, (begin, end) in zip(self._processes, itertools.pairwise(bounds), strict=False):
                process.begin(trainings[begin:end], parts)
                training[begin] = process
            while training:
                heard: dict[int, Mapping[int, Epoch]] = {}
                for first, process in list(training.items()):
                    while (message := process.hear())[0] == "ended":
                        place, ended = message[1]
                        yield first + place, ended
                    if message[0] == "done":
                        del training[first]
                    else:
                        heard[first] = message[1]
                if heard:
                    stopped = on_epoch(
                        {first + place: epoch for first, epochs in heard.items() for place, epoch in epochs.items()}
                    )
                    for first, epochs in heard.items():
                        training[first].answer([place for place in epochs if first + place in stopped])
            done = True
        finally:
            if not done:  # they wait for an answer, or still train
                self.close()


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
            self._first = start_python("tasks.trainer.processes:serve", *file_descriptors)
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


def serve(fresh: int, *file_descriptors: int) -> None:
    """What the first process does: become as many as are wanted, each of which trains for whoever holds the other end,
    and ends when that is gone; and one that stays fresh, unless its descriptor is -1."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ends = [Connection(descriptor) for descriptor in file_descriptors]
    if fresh >= 0:
        if os.fork() == 0:
            os.setpgid(0, 0)  # the others' group is killed when the search is over
            for end in ends:
                end.close()
            stay_fresh(fresh)
        os.close(fresh)
    try:
        wanted, content, snapshot, device = pickle.loads(ends[0].recv_bytes())  # noqa: S301 from whoever started this process
    except EOFError:
        return
    if device == "cpu":
        os.nice(NICENESS)
    place = _fork(wanted)
    connection = ends[place]
    for end in ends[:place] + ends[place + 1 :]:
        end.close()
    end_with_the_other_end(connection)
    for name in OUR_LOGGERS:
        logging.getLogger(name).addHandler(_LogLines(connection))
        # The first one's lines stand for all: it says of a model what the others would.
        logging.getLogger(name).setLevel(logging.WARNING if place else logging.INFO)
    threads = torch.get_num_threads()
    job = TuningJob.model_validate(content)
    trainer = LocalTrainer(job, Prepared.load(snapshot, torch.device(device), job.data.raw))

    connection.send(("ready", os.getpid()))

    def on_epoch(epochs: Mapping[int, Epoch]) -> Collection[int]:
        connection.send(("epochs", dict(epochs)))
        return list(connection.recv())

    while True:
        kind, content = connection.recv()
        if kind == "train":
            trainings, processes = content
            torch.set_num_threads(max(1, threads // processes))
            for ended in trainer.train(trainings, on_epoch):
                connection.send(("ended", ended))
            connection.send(("done", None))
            continue
        try:
            value: Any = trainer.members(content) if kind == "members" else getattr(trainer, kind)(*content)
        except Exception as error:  # noqa: BLE001 whatever a user's model raises is told
            connection.send(("error", failed(error)))
        else:
            connection.send(("value", value))


def _fork(processes: int) -> int:
    """This process's place among so many. No thread and no device has been used yet, which no fork would outlive."""
    forks = []
    for place in range(1, processes):
        fork = os.fork()
        if fork == 0:
            return place
        forks.append(fork)
    for fork in forks:
        threading.Thread(target=_end_as, args=(fork,), daemon=True).start()
    return 0


def _end_as(fork: int) -> None:
    """Also of the same signal, which whoever started this process is told."""
    code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
    if code < 0:
        signal.raise_signal(-code)
    os._exit(code)


class _LogLines(logging.Handler):
    """Sends what is logged to whoever started the process."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self._connection.send(("log", record))
