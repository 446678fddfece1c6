"""The artifact store: a directory (file:///path) or S3 (s3://bucket/prefix, any endpoint).

The one idea: a key is created once and never overwritten. `create` returns only when the key holds exactly these
bytes and raises AlreadyExists when it holds others, so a retry after a lost answer is harmless and of two racing
writers exactly one wins. Knows nothing of models or promotions.
"""

import logging
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Protocol

from infra.errors import ExpectedError

PROGRESS_SECONDS = 5.0

_logger = logging.getLogger(__name__)


class StoreError(ExpectedError):
    """The store cannot do what was asked; the message names the store, the reason and the remedy."""


class StoreUnavailable(StoreError):
    """The store did not answer, or not clearly; asking again may help."""


class AlreadyExists(StoreError):
    """The key holds other bytes."""


class NotFound(StoreError):
    """Nothing lies under the key."""


class Store(Protocol):
    """Where versions and the promotion log live. Keys are relative, with forward slashes."""

    url: str

    def create(self, key: str, content: bytes) -> None:
        """Create the key, once and for all. Raises AlreadyExists where it holds other bytes, StoreUnavailable."""

    def upload(self, key: str, path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Create a key from a file of any size; `on_bytes` hears how many more bytes are on their way.

        Only for a key that is named after its content, so that nobody ever uploads another file to it: what is larger
        than a part is sent in parts, which no condition guards on every server. Returns when the store is seen to hold
        these bytes. Raises AlreadyExists where it holds others, StoreUnavailable.
        """

    def read(self, key: str) -> bytes:
        """The bytes under the key. Raises NotFound, StoreUnavailable."""

    def download(self, key: str, path: Path) -> None:
        """Write the bytes under the key to a file. Raises NotFound, StoreUnavailable."""

    def created(self, prefix: str) -> dict[str, datetime]:
        """Every key that begins with the prefix, sorted, and when it was created. Raises StoreUnavailable."""

    def delete(self, key: str) -> None:
        """Remove a key, if it is there. Raises StoreUnavailable."""

    def drop_unfinished(self, before: datetime) -> int:
        """Remove what uploads that began before then and never ended left behind; returns how many."""


class UploadProgress:
    """A line every few seconds, where an upload takes longer than that; for `Store.upload` to call."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._sent = 0
        self._said_at = time.monotonic()

    def __call__(self, sent: int) -> None:
        self._sent += sent
        if time.monotonic() - self._said_at >= PROGRESS_SECONDS:
            self._said_at = time.monotonic()
            _logger.info("%s: %.0f of %.0f MB uploaded", self._what, self._sent / 1e6, self._total / 1e6)
