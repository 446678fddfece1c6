"""Where the checkpoints of a study's trials lie: in a folder of this machine, and, where several machines share the
study, in the artifact store too, so that a trial goes on elsewhere when a machine is gone and its folder with it.

What trains has no credentials of the store. It writes files, and who asks for trials shares them, on a thread of its
own: a store that is slow or away costs a copy, never a trial. Knows nothing of studies beyond their names.
"""

import logging
import math
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from infra.store.protocol import Store, StoreError
from models.training.checkpoints import Checkpoint
from tasks.data.snapshots import KEPT, checksum

# What the loss of a machine may cost a trial, beside the work since its last checkpoint.
SHARE_SECONDS = 30.0
PAUSE_SECONDS = 60.0
_SHARED = "checkpoints"

_logger = logging.getLogger(__name__)


class TrialCheckpoints:
    """The checkpoints of one study's trials, by their numbers; shared through a store, where there is one."""

    def __init__(self, folder: Path, study_name: str, store: Store | None = None) -> None:
        self._folder = folder / study_name
        self._prefix = f"{_SHARED}/{study_name}"
        self._store = store
        self._shared_at: dict[int, float] = {}
        self._keys: dict[int, set[str]] = {}
        self._sharing: dict[int, Future[None]] = {}
        self._paused_until = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")

    def __enter__(self) -> "TrialCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        for sharing in self._sharing.values():
            sharing.cancel()  # unless it is under way; what has ended is still deleted
        self._thread.shutdown(wait=True)
        for number in self._sharing:
            self._copy(number).unlink(missing_ok=True)

    @property
    def is_shared(self) -> bool:
        """Whether other machines may have one that this one lacks."""
        return self._store is not None

    def path(self, number: int) -> Path:
        """Where a trial's training writes its checkpoint, on this machine."""
        return self._folder / f"{number}.safetensors"

    def share(self, number: int, epoch: int) -> None:
        """Bring a trial's checkpoint, which an epoch just came after, to the store; not more often than every
        SHARE_SECONDS, and returns at once."""
        now = time.monotonic()
        due = max(self._shared_at.get(number, -math.inf) + SHARE_SECONDS, self._paused_until)
        under_way = self._sharing.get(number)
        if self._store is None or now < due or (under_way is not None and not under_way.done()):
            return
        copy = self._copy(number)
        copy.unlink(missing_ok=True)
        with suppress(OSError):  # a training has none at first, and a file system may know no second names
            os.link(self.path(number), copy)
            self._shared_at[number] = now
            self._sharing[number] = self._thread.submit(self._upload, self._store, number, epoch, copy)

    def fetch(self, number: int, training_key: str) -> None:
        """Have the newest checkpoint of a trial that was interrupted, wherever that was, where its training looks for
        it. What cannot be had, or is of another training, is left."""
        if self._store is None:
            return
        fetched = self.path(number).with_suffix(".fetched")
        try:
            found = sorted(self._store.created(f"{self._prefix}/{number}/"), reverse=True)
            self._keys.setdefault(number, set()).update(found)
            here = Checkpoint.read(self.path(number), training_key)
            epochs = len(here.curve) if here else 0
            for key in found:
                if epochs >= _epoch_of(key) - 1:
                    return
                fetched.parent.mkdir(parents=True, exist_ok=True)
                self._store.download(key, fetched)
                there = Checkpoint.read(fetched, training_key)
                if there is not None and len(there.curve) > epochs:
                    fetched.replace(self.path(number))
                    _logger.info("trial %d goes on after epoch %d, from the store", number, len(there.curve))
                    return
        except StoreError as error:
            _logger.warning("trial %d goes on from what lies here: %s", number, error)
        finally:
            fetched.unlink(missing_ok=True)

    def drop(self, number: int) -> None:
        """Of a trial that has ended, here and in the store."""
        Checkpoint.delete(self.path(number))
        if self._store is not None and (number in self._keys or number in self._sharing):
            self._thread.submit(self._delete, self._store, number)

    def _copy(self, number: int) -> Path:
        """A second name for the file as it is now: the training puts another in its place."""
        return self.path(number).with_suffix(".sharing")

    def _upload(self, store: Store, number: int, epoch: int, copy: Path) -> None:
        try:
            key = f"{self._prefix}/{number}/{epoch:06}-{checksum(copy)[:16]}.safetensors"
            store.upload(key, copy)
            for older in self._keys.get(number, set()) - {key}:
                store.delete(older)
            self._keys[number] = {key}
        except StoreError as error:
            if not self._paused_until:
                _logger.warning("checkpoints stay on this machine until the store can be had: %s", error)
            self._paused_until = time.monotonic() + PAUSE_SECONDS
        finally:
            copy.unlink(missing_ok=True)

    def _delete(self, store: Store, number: int) -> None:
        with suppress(StoreError):  # `nightly gc` deletes it in a month
            for key in self._keys.pop(number, set()):
                store.delete(key)


def drop_old_checkpoints(store: Store, folder: Path, now: datetime) -> list[str]:
    """Delete those of studies that nobody has gone on with for a month, here and in the store; returns the names and
    keys that are gone. Raises StoreError."""
    oldest = now - KEPT
    gone = []
    for study in sorted(folder.iterdir()) if folder.is_dir() else []:
        newest = max((file.stat().st_mtime for file in study.iterdir()), default=0.0)
        if max(newest, study.stat().st_mtime) < oldest.timestamp():
            shutil.rmtree(study)
            gone.append(f"{_SHARED}/{study.name}")
    for key, at in store.created(f"{_SHARED}/").items():
        if at < oldest:
            store.delete(key)
            gone.append(key)
    return gone


def _epoch_of(key: str) -> int:
    return int(key.rpartition("/")[2].partition("-")[0])
