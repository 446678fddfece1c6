"""The child's side: what a process that trains does, until whoever started it is gone."""

import logging
import os
import pickle
import signal
import threading
from collections.abc import Collection, Mapping
from multiprocessing.connection import Connection
from typing import Any

import optuna
import torch

from infra.settings import OUR_LOGGERS
from models.training.terms import Epoch
from tasks.data.prepared import Prepared
from tasks.job import TuningJob
from tasks.trainer.fresh import end_with_the_other_end, stay_fresh
from tasks.trainer.local import LocalTrainer, failed

# On a CPU whatever the training waits for goes first: what asks for its trials, and the servers that these are told to.
# A night of 200 digits MLPs on two cores takes 0.95 of the time.
NICENESS = 10


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
