"""A trainer in processes of its own, which can be killed for certain.

A training that hangs in a kernel or a library can be stopped by nothing else, one that the system kills for its memory
takes no night with it, and what a dead process held of the device is free again. The processes get none of our
credentials: a user's model runs in them.
"""

import itertools
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from infra.device import used_bytes, wait_for_memory
from models.fused.train import OnEpoch
from models.hyperparameters.declared import Hyperparameters
from models.training.terms import Epoch, Training
from tasks.data.snapshots import Snapshot
from tasks.job import TuningJob
from tasks.trainer.connection import ProcessGroup, TrainerProcess
from tasks.trainer.fresh import FreshProcess
from tasks.trainer.local import Ended

# A core is used better by a process of its own than by a thread that waits for the other at each operation: 16 digits
# MLPs take 0.5 to 0.7 of the time in two processes. Each holds the rows, so not where these are many.
CPU_PROCESSES = 2
MOST_ROWS_BYTES = 2**28


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
