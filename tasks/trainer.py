"""What trials need of a device, by a trainer in processes of its own, which can be killed for certain.

A training that hangs in a kernel or a library can be stopped by nothing else, one that the system kills for its memory
takes no night with it, and what a dead process held of the device is free again. The process gets none of our
credentials: a user's model runs in it. Imported by that process, so it knows neither MLflow nor the study.
"""

import itertools
import logging
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import optuna
import torch

from infra.device import used_bytes, wait_for_memory
from infra.errors import stopped_by
from infra.settings import OUR_LOGGERS, without_secrets
from models.diagnosis import Diagnosis, diagnose
from models.evaluate import MetricName, latency_ms, parameter_count
from models.families import build_model
from models.fused import OnEpoch, Stopped
from models.hyperparameters import Hyperparameters
from models.solo import Diverged, Epoch, Trained, Training
from models.training import fusion_for, train_all
from tasks.job import TuningJob
from tasks.prepared import Prepared
from tasks.snapshots import Snapshot

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

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a trial's training was worth: the epoch that its weights are from, every metric on the validation rows, and
    how it learned."""

    kept: Epoch
    validation: dict[MetricName, float]
    diagnosis: Diagnosis


class Failed(Exception):
    """A training raised what nobody expects; carries the sentence, and the traceback as text."""

    def __init__(self, sentence: str, trace: str) -> None:
        super().__init__(sentence, trace)
        self.sentence, self.trace = sentence, trace


class TrainerDied(Exception):
    """The process that trained is gone, by itself or because nothing was heard of it for too long."""


Ended = Scored | Diverged | Stopped | Failed


class Trainer(Protocol):
    """What trials need of a device."""

    device: torch.device

    def members(self, training: Training) -> int:
        """How many trainings of this structure are one computation. Raises what is wrong with the model."""

    def costs(self, hyperparameters: Hyperparameters, needed: Collection[str]) -> dict[str, float]:
        """The model's `parameters`, and its `latency` in milliseconds, if needed. Raises what is wrong with it."""

    def train(self, trainings: Sequence[Training], on_epoch: OnEpoch) -> Iterator[tuple[int, Ended]]:
        """Train each; yields its place and how it ended. Raises what `on_epoch` raises, and TrainerDied."""


class LocalTrainer:
    """Trains in this process."""

    def __init__(self, job: TuningJob, prepared: Prepared) -> None:
        self._prepared = prepared
        self._setting = prepared.setting(job.family, job.search.objective)
        self.device = self._setting.device

    def members(self, training: Training) -> int:
        return fusion_for(self._setting, training).members

    def costs(self, hyperparameters: Hyperparameters, needed: Collection[str]) -> dict[str, float]:
        model = build_model(self._setting.family, hyperparameters, self._setting.shape).to(self.device)
        costs = {}
        if "parameters" in needed:
            costs["parameters"] = float(parameter_count(model))
        if "latency" in needed:
            costs["latency"] = latency_ms(model, self._prepared.training.features[:1])
        return costs

    def train(self, trainings: Sequence[Training], on_epoch: OnEpoch) -> Iterator[tuple[int, Ended]]:
        for place, outcome in train_all(self._setting, trainings, on_epoch):
            yield place, self._ended(outcome)

    def _ended(self, outcome: Trained | Exception) -> Ended:
        match outcome:
            case Trained():
                diagnosis = diagnose(outcome.epochs, self._prepared.prior_loss)
                return Scored(kept=outcome.kept, validation=outcome.validation, diagnosis=diagnosis)
            case Diverged() | Stopped():
                return outcome
            case _:
                return failed(outcome)


def failed(error: Exception) -> Failed:
    """A configuration's fault, told in words. Raises the signal or Ctrl-C that the error came of, if it came of one."""
    if (interruption := stopped_by(error)) is not None:
        raise interruption from error
    return Failed(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


@contextmanager
def started_ahead(processes: int) -> Iterator[list["TrainerProcess"]]:
    """Processes that import what a training needs while the night finds out what it is to train on. They end with the
    block, if they have not before."""
    started = [TrainerProcess() for _ in range(processes)]
    try:
        for process in started:
            process.start()
        yield started
    finally:
        for process in started:
            process.close()


def worthwhile_processes(device: torch.device, rows_bytes: int) -> int:
    """How many processes use the device best for training on rows of such a size."""
    if device.type != "cpu" or rows_bytes > MOST_ROWS_BYTES:
        return 1
    return min(CPU_PROCESSES, torch.get_num_threads())


class TrainerProcesses:
    """Trains in processes of their own, which are started where there are none, and end with this one or with `close`.

    What is to be trained is divided among them, and they keep step: nobody begins an epoch before all have ended the
    last, so that what is reported, and what a pruner makes of it, never depends on which of them is faster. Those that
    were `started` ahead are used first, and ended where there are more than wanted.
    """

    def __init__(
        self,
        job: TuningJob,
        snapshot: Snapshot,
        device: torch.device,
        processes: int = 1,
        started: Sequence["TrainerProcess"] = (),
    ) -> None:
        self.device = device
        self._used_before = used_bytes(device)
        content = job.model_dump(mode="json", exclude={"schedule"})
        for process in started[processes:]:
            process.close()
        self._processes = [*started[:processes], *(TrainerProcess() for _ in range(processes - len(started)))]
        for place, process in enumerate(self._processes):
            # The first one's lines stand for all: it says of a model what the others would.
            level = logging.WARNING if place else logging.INFO
            process.load(pickle.dumps((content, snapshot, str(device), level)))

    def __enter__(self) -> "TrainerProcesses":
        for process in self._processes:
            if process.process_id is None:
                process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes and all that they started; what they held of the device is seen to be free again."""
        for process in self._processes:
            process.close()
        wait_for_memory(self.device, self._used_before)

    @property
    def process_ids(self) -> list[int]:
        """Of those that live."""
        return [process.process_id for process in self._processes if process.process_id is not None]

    def members(self, training: Training) -> int:
        return int(self._processes[0].ask("members", training))

    def costs(self, hyperparameters: Hyperparameters, needed: Collection[str]) -> dict[str, float]:
        return dict(self._processes[0].ask("costs", (hyperparameters, tuple(needed))))

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


class TrainerProcess:
    """One of them, and what is said to it and heard of it. What it trains on is told it once that is known: what it
    must import takes it longer to start than all the rest."""

    def __init__(self) -> None:
        self._content: bytes | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._longest = 0.0
        self._limit = FIRST_EPOCH_SECONDS
        self._answered = 0.0

    @property
    def process_id(self) -> int | None:
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._connection.close()
            self._process = None

    def load(self, content: bytes) -> None:
        """Tell it the job, the snapshot, the device and the level of its log lines, pickled."""
        self._content = content
        if self._process is not None:
            with suppress(OSError):  # it died, which shows in what is asked of it next
                self._connection.send_bytes(content)

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
        if self._process is None:
            self.start()
        self._deliver((kind, content))

    def _deliver(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise self._died() from error

    def _receive(self, seconds: float) -> tuple[str, Any]:
        """The next message; what is not heard within the seconds, once the process is ready, is taken for hung."""
        if not self._is_ready:
            self._next(START_SECONDS)
            self._is_ready = True
        return self._next(seconds)

    def _next(self, seconds: float) -> tuple[str, Any]:
        """The next message that is no log line."""
        deadline = time.monotonic() + seconds
        try:
            while self._connection.poll(max(0.0, deadline - time.monotonic())):
                kind, content = self._connection.recv()
                if kind != "log":
                    return kind, content
                logging.getLogger(content.name).handle(content)
        except (EOFError, OSError) as error:
            raise self._died() from error
        self.close()
        raise TrainerDied(f"nothing was heard of the training for {seconds:.0f} s, so its process was killed")

    def _died(self) -> TrainerDied:
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.returncode
        self.close()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return TrainerDied(f"the process that trained ended by itself ({how})")

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        program = "import sys; sys.path[:] = sys.argv[2:]; from tasks.trainer import serve; serve(int(sys.argv[1]))"
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 our own program
                [sys.executable, "-c", program, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=without_secrets(os.environ),
                start_new_session=True,  # a group of its own, which the terminal's Ctrl-C is not for
            )
        self._is_ready = False
        self._connection = Connection(ours.detach())
        if self._content is not None:
            self._connection.send_bytes(self._content)


def serve(file_descriptor: int) -> None:
    """What the process does: train for whoever holds the other end, and end when that end is gone."""
    threading.Thread(target=_end_with_the_other_end, args=(file_descriptor,), daemon=True).start()
    connection = Connection(file_descriptor)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    content, snapshot, device, level = pickle.loads(connection.recv_bytes())  # noqa: S301 from the process that started this one
    for name in OUR_LOGGERS:
        logging.getLogger(name).addHandler(_LogLines(connection))
        logging.getLogger(name).setLevel(level)
    threads = torch.get_num_threads()
    trainer = LocalTrainer(TuningJob.model_validate(content), Prepared.load(snapshot, torch.device(device)))

    connection.send(("ready", None))

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
            value: Any = trainer.members(content) if kind == "members" else trainer.costs(*content)
        except Exception as error:  # noqa: BLE001 whatever a user's model raises is told
            connection.send(("error", failed(error)))
        else:
            connection.send(("value", value))


def _end_with_the_other_end(file_descriptor: int) -> None:
    """Also in the middle of a training: a device must not be held for nobody."""
    poll = select.poll()
    poll.register(file_descriptor, select.POLLRDHUP)
    poll.poll()
    os.killpg(os.getpid(), signal.SIGKILL)


class _LogLines(logging.Handler):
    """Sends what is logged to whoever started the process."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self._connection.send(("log", record))
