"""fresh: load a version as its user will, in a process that has never seen its model, and bring back its outputs.

A process that has imported what a version needs, and nothing of the user's, waits; each version is loaded in a fork of
it, which knows no more than the version's files and has no credentials. What comes back is tensors or a sentence, never
a pickle. Knows nothing of what the outputs should be.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import optuna
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor

from infra.settings import without_secrets
from infra.store.opening import open_store
from infra.store.protocol import Store, StoreError
from models.families.family import family_named
from models.training.weights import metadata_of
from tasks.data.snapshots import Snapshot, SplitName, read_snapshot
from tasks.registry.champion import Version, read_version

MOST_ROWS = 4096
ROWS_AGAIN = 256
ROWS_ALONE = 8
ANSWER_SECONDS = 900.0
_CPU = torch.device("cpu")


class NotLoaded(Exception):
    """A version could not be loaded, or gave no outputs; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a version gave once it was loaded: `outputs` of all rows, of the first ROWS_AGAIN once more, and of each of
    the first ROWS_ALONE by itself; `code_changed` says whether the file of a user's model is another by now."""

    outputs: Tensor
    again: Tensor
    alone: Tensor
    code_changed: bool


class FreshProcess:
    """The process that waits. It is a fork of one that trains, begun before that one saw anything of the user's
    (`offer`), or else is started when it is first needed, which takes 1.6 s of a core."""

    def __init__(self) -> None:
        self._connection: Connection | None = None
        self._own: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "FreshProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def offer(self) -> socket.socket | None:
        """The other end for a process that is to become this one (`stay_fresh`); None where there is one."""
        if self._connection is not None:
            return None
        ours, other_end = socket.socketpair()
        self._connection = Connection(ours.detach())
        return other_end

    def load(
        self, store_url: str, job: str, version: str, snapshot: Snapshot, split: SplitName, most_rows: int = MOST_ROWS
    ) -> Loaded:
        """What a version gives for the first rows of a split, on the CPU. Raises NotLoaded."""
        question = {
            "store": store_url,
            "job": job,
            "version": version,
            "snapshots": str(snapshot.path.parent),
            "fingerprint": snapshot.fingerprint,
            "split": split,
            "most_rows": most_rows,
        }
        for _ in range(2):  # one that was offered may have been killed in the night
            with suppress(EOFError, OSError):
                answer = self._ask(question)
                break
            self.close()
        else:
            raise NotLoaded("the process that was to load it ended by itself twice")
        tensors = load_tensors(answer)
        if not tensors:
            raise NotLoaded(metadata_of(answer)["error"])
        return Loaded(code_changed=bool(tensors.pop("code_changed")), **tensors)

    def close(self) -> None:
        """End it, and whatever it is doing."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._own is not None:
            self._own.wait()
            self._own = None

    def _ask(self, question: dict[str, Any]) -> bytes:
        if (other_end := self.offer()) is not None:
            with other_end:
                self._own = start_python("tasks.trainer.fresh:stay_fresh", other_end.fileno())
        assert self._connection is not None
        self._connection.send_bytes(json.dumps(question).encode())
        if not self._connection.poll(ANSWER_SECONDS):
            self.close()
            raise NotLoaded(f"nothing was heard of it for {ANSWER_SECONDS:.0f} s, so its process was killed")
        return self._connection.recv_bytes()


def start_python(entry: str, *file_descriptors: int) -> subprocess.Popen[bytes]:
    """Start `module:function` with the descriptors, -1 for one that is not there, in a Python without our
    credentials and in a process group of its own, which the terminal's Ctrl-C is not for."""
    module, _, function = entry.partition(":")
    program = (
        "import json, sys; sys.path[:], ends = json.loads(sys.argv[1]); "
        f"from {module} import {function}; {function}(*ends)"
    )
    return subprocess.Popen(  # noqa: S603 our own program
        [sys.executable, "-c", program, json.dumps([sys.path, file_descriptors])],
        pass_fds=[descriptor for descriptor in file_descriptors if descriptor >= 0],
        stdin=subprocess.DEVNULL,
        # NumPy would start threads as it is imported, with which no process should fork.
        env=without_secrets(os.environ) | {"OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
    )


def stay_fresh(file_descriptor: int) -> NoReturn:
    """Answer each question in a fork, until whoever asks is gone."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    connection = Connection(file_descriptor)
    while True:
        try:
            question = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        fork = os.fork()
        if fork == 0:
            connection.send_bytes(_answer(connection, question))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
        if code:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            connection.send_bytes(_failure(f"the process that loaded it ended by itself ({how})"))


def end_with_the_other_end(connection: Connection) -> None:
    """Kill this process and its group when whoever holds the other end is gone, also in the middle of a computation."""

    def watch() -> None:
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLRDHUP)
        poll.poll()
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _answer(connection: Connection, question: dict[str, Any]) -> bytes:
    end_with_the_other_end(connection)
    try:
        return save(_tensors(**question))
    except BaseException as error:  # noqa: BLE001 whatever a user's code raises, sys.exit too, is told
        return _failure(str(error) if isinstance(error, NotLoaded) else f"{type(error).__name__}: {error}")


def _tensors(
    store: str, job: str, version: str, snapshots: str, fingerprint: str, split: SplitName, most_rows: int
) -> dict[str, Tensor]:
    loaded = _read(open_store(store), job, version)
    snapshot = read_snapshot(Path(snapshots), fingerprint)
    if snapshot is None:
        raise NotLoaded(f"snapshot {fingerprint} is no longer in {snapshots}")
    rows = snapshot.features(split, _CPU)[:most_rows]
    outputs = loaded.outputs(rows)
    code = family_named(loaded.manifest.model).code
    return {
        "outputs": outputs,
        "again": loaded.outputs(rows[:ROWS_AGAIN]),
        "alone": _alone(loaded, rows[:ROWS_ALONE]),
        "code_changed": torch.tensor(code != loaded.manifest.lineage.model_code),
    }


def _read(store: Store, job: str, version: str) -> Version:
    try:
        return read_version(store, job, version, _CPU)
    except StoreError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
        why = " ".join(str(error.__cause__).split())
        raise NotLoaded(
            f"its weights do not fit a model that was just built ({why}); make all parameters, buffers and layers in "
            "__init__, and none in forward"
        ) from error


def _alone(loaded: Version, rows: Tensor) -> Tensor:
    try:
        return torch.cat([loaded.outputs(row) for row in torch.split(rows, 1)])
    except Exception as error:
        raise NotLoaded(f"it predicts a batch, but not one row alone ({error})") from error


def _failure(sentence: str) -> bytes:
    return save({}, metadata={"error": sentence})
