"""The artifact store in a directory, which every process and machine that shares it may use."""

import contextlib
import filecmp
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.store.protocol import AlreadyExists, NotFound, StoreError, StoreUnavailable

PARTIAL = ".partial"
COPIED_BYTES = 16 * 1024 * 1024


class DirectoryStore:
    """Keys are files below a directory. A key appears complete or not at all, and survives a power cut."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = root.as_uri()

    def create(self, key: str, content: bytes) -> None:
        path = self._path(key)
        try:
            with self._partial(path) as partial:
                partial.write(content)
        except FileExistsError:
            if path.is_dir() or self.read(key) != content:
                raise AlreadyExists(f"{self.url}/{key} exists with other content") from None
        except OSError as error:
            raise self._unavailable(error) from error

    def upload(self, key: str, path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        kept = self._path(key)
        try:
            with self._partial(kept) as partial, path.open("rb") as file:
                while chunk := file.read(COPIED_BYTES):
                    partial.write(chunk)
                    on_bytes(len(chunk))
        except FileExistsError:
            pass
        except OSError as error:
            raise self._unavailable(error) from error
        if kept.is_dir() or not filecmp.cmp(path, kept, shallow=False):
            raise AlreadyExists(f"{self.url}/{key} exists with other content")

    def read(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"{self.url}/{key} does not exist") from None
        except OSError as error:
            raise self._unavailable(error) from error

    def download(self, key: str, path: Path) -> None:
        try:
            shutil.copyfile(self._path(key), path)
        except FileNotFoundError:
            raise NotFound(f"{self.url}/{key} does not exist") from None
        except OSError as error:
            raise self._unavailable(error) from error

    def created(self, prefix: str) -> dict[str, datetime]:
        folder = self._path(prefix.rpartition("/")[0])
        try:
            found = {
                path.relative_to(self.root).as_posix(): datetime.fromtimestamp(modified, UTC)
                for path, modified in _files(folder, "*")
                if not path.name.endswith(PARTIAL)
            }
        except OSError as error:
            raise self._unavailable(error) from error
        return {key: found[key] for key in sorted(found) if key.startswith(prefix)}

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # as long as it is not empty
                path.parent.rmdir()
        except OSError as error:
            raise self._unavailable(error) from error

    def drop_unfinished(self, before: datetime) -> int:
        old = [path for path, modified in _files(self.root, f"*{PARTIAL}") if modified < before.timestamp()]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)

    def _path(self, key: str) -> Path:
        """Raises StoreError for a key that would lead out of the store."""
        if ".." in key.split("/") or key.startswith("/"):
            raise StoreError(f"a key of the artifact store must stay inside it, found {key!r}; correct the name")
        return self.root / key

    def _unavailable(self, error: OSError) -> StoreUnavailable:
        return StoreUnavailable(
            f"the artifact store {self.url} cannot be used ({error.strerror}: {error.filename}); "
            "mend the folder or name another with NIGHTLY_STORE"
        )

    @contextlib.contextmanager
    def _partial(self, path: Path) -> Iterator[Any]:
        """A file to write, which becomes the path at the end of the block. Raises FileExistsError where one is."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=PARTIAL) as partial:
            yield partial
            partial.flush()
            os.fsync(partial.fileno())
            # link(2) is the filesystem's conditional create: it fails where the name exists, and the name
            # never shows a file that is half written.
            os.link(partial.name, path)
        self._fsync_directory(path.parent)

    @staticmethod
    def _fsync_directory(folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _files(folder: Path, pattern: str) -> Iterator[tuple[Path, float]]:
    """Files below a folder and when each was modified; one that vanishes meanwhile is none."""
    for path in folder.rglob(pattern):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                yield path, path.stat().st_mtime
