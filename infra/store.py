"""The artifact store: a directory (file:///path) or S3 (s3://bucket/prefix, any endpoint).

The one idea: a key is created once and never overwritten. `create` returns only when the key holds exactly these
bytes and raises AlreadyExists when it holds others, so a retry after a lost answer is harmless and of two racing
writers exactly one wins. Knows nothing of models or promotions.
"""

import contextlib
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.errors import ExpectedError
from infra.settings import LOOPBACK_NAMES

PROBE_KEY = "probe/conditional-create"
PROBE_CONTENT = b"Nightly Tuner created this to learn whether the store refuses to create a key twice.\n"


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

    def read(self, key: str) -> bytes:
        """The bytes under the key. Raises NotFound, StoreUnavailable."""

    def keys(self, prefix: str) -> list[str]:
        """Every key that begins with the prefix, sorted. Raises StoreUnavailable."""


def open_store(url: str) -> Store:
    """The store at a URL. Raises StoreError for a URL that names none, or plain HTTP to another machine."""
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return DirectoryStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        return S3Store(parts.netloc, parts.path.strip("/"))
    raise StoreError(
        f"NIGHTLY_STORE must be file:///folder or s3://bucket/prefix, found {url!r}; name one of the two kinds"
    )


def check_store(store: Store) -> None:
    """Prove that the store can be written, read, and honours conditional create.

    The second create uses fresh bytes, so a store that ignores the condition accepts it and is found out. One small
    key is left behind and used again by every later check. Raises StoreError.
    """
    # Other bytes are there only after a check of a store that ignored the condition; the next line tells whether it
    # still does.
    with contextlib.suppress(AlreadyExists):
        store.create(PROBE_KEY, PROBE_CONTENT)
    try:
        store.create(PROBE_KEY, PROBE_CONTENT + uuid.uuid4().bytes)
    except AlreadyExists:
        return
    raise StoreError(
        f"the artifact store {store.url} must refuse to create a key twice (If-None-Match: *), but it overwrote "
        f"{PROBE_KEY}; use a store that honours conditional writes, and on Ceph a bucket without versioning"
    )


class DirectoryStore:
    """Keys are files below a directory. A key appears complete or not at all, and survives a power cut."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = root.as_uri()

    def create(self, key: str, content: bytes) -> None:
        path = self.root / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".partial") as partial:
                partial.write(content)
                partial.flush()
                os.fsync(partial.fileno())
                # link(2) is the filesystem's conditional create: it fails where the name exists, and the name
                # never shows a file that is half written.
                os.link(partial.name, path)
            self._fsync_directory(path.parent)
        except FileExistsError:
            if path.is_dir() or self.read(key) != content:
                raise AlreadyExists(f"{self.url}/{key} exists with other content") from None
        except OSError as error:
            raise self._unavailable(error) from error

    def read(self, key: str) -> bytes:
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"{self.url}/{key} does not exist") from None
        except OSError as error:
            raise self._unavailable(error) from error

    def keys(self, prefix: str) -> list[str]:
        folder = self.root / prefix.rpartition("/")[0]
        try:
            files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        except OSError as error:
            raise self._unavailable(error) from error
        return sorted(key for path in files if (key := path.relative_to(self.root).as_posix()).startswith(prefix))

    def _unavailable(self, error: OSError) -> StoreUnavailable:
        return StoreUnavailable(
            f"the artifact store {self.url} cannot be used ({error.strerror}: {error.filename}); "
            "mend the folder or name another with NIGHTLY_STORE"
        )

    @staticmethod
    def _fsync_directory(folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class S3Store:
    """Keys are objects below a prefix of a bucket. Credentials, region and endpoint come from boto3's own chain
    (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL_S3 and so on)."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client = self._connect(attempts=4)
        # botocore repeats a PUT whose answer was lost; on a conditional PUT the repeat meets our own object and
        # reports 412, a race lost that was won. So: one attempt, and what happened is read back.
        self._client_once = self._connect(attempts=1)

    def create(self, key: str, content: bytes) -> None:
        try:
            self._client_once.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=content, IfNoneMatch="*")
        except (ClientError, BotoCoreError) as error:
            self._settle(key, content, error)

    def _settle(self, key: str, content: bytes, error: Exception) -> None:
        """After an error nobody knows what the server did, so the key itself is asked (a 412 may be our own)."""
        if _error_code(error) in REFUSALS:
            raise self._refused(error) from error
        try:
            found = self.read(key)
        except NotFound:
            raise self._unavailable(error) from error
        if found != content:
            raise AlreadyExists(f"{self.url}/{key} exists with other content") from None

    def read(self, key: str) -> bytes:
        try:
            response = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key)
            content: bytes = response["Body"].read()
        except (ClientError, BotoCoreError) as error:
            if _error_code(error) in ("NoSuchKey", "404"):
                raise NotFound(f"{self.url}/{key} does not exist") from None
            raise self._translated(error) from error
        return content

    def keys(self, prefix: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
        try:
            return sorted(item["Key"].removeprefix(self.prefix) for page in pages for item in page.get("Contents", []))
        except (ClientError, BotoCoreError) as error:
            raise self._translated(error) from error

    def _connect(self, attempts: int) -> Any:
        try:
            # A session of our own: boto3's shared one keeps the credentials that it found first.
            client = boto3.Session().client(
                "s3",
                config=Config(
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    connect_timeout=5,
                    read_timeout=60,
                    # Servers other than Amazon's often serve buckets by path only.
                    s3={"addressing_style": "path"} if _has_own_endpoint() else {},
                    # boto3's default checksum trailers are refused over HTTPS by Ceph (411 MissingContentLength).
                    request_checksum_calculation="when_required",
                ),
            )
        except (BotoCoreError, ValueError) as error:
            raise StoreError(f"the artifact store {self.url} cannot be opened: {error}") from error
        endpoint = urlsplit(client.meta.endpoint_url)
        if endpoint.scheme == "http" and endpoint.hostname not in LOOPBACK_NAMES:
            raise StoreError(
                f"the endpoint of the artifact store must be https:// unless it is on this machine, found "
                f"{client.meta.endpoint_url}; put TLS before it"
            )
        return client

    def _translated(self, error: Exception) -> StoreError:
        return self._refused(error) if _error_code(error) in REFUSALS else self._unavailable(error)

    def _refused(self, error: Exception) -> StoreError:
        return StoreError(f"the artifact store {self.url} refused: {_reason(error)}; {REFUSALS[_error_code(error)]}")

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(
            f"the artifact store {self.url} cannot be reached ({_reason(error)}); "
            "check that it runs and that AWS_ENDPOINT_URL_S3 and the network are right"
        )


_CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile or role that boto3 finds"
_RIGHTS = "allow these credentials to list, get and put in the bucket"
REFUSALS = {
    "NoCredentialsError": _CREDENTIALS,
    "PartialCredentialsError": _CREDENTIALS,
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "AccessDenied": _RIGHTS,
    "403": _RIGHTS,
    "NoSuchBucket": "create the bucket or name another with NIGHTLY_STORE",
}


def _error_code(error: Exception) -> str:
    if isinstance(error, ClientError):
        return str(error.response["Error"]["Code"])
    return type(error).__name__


def _reason(error: Exception) -> str:
    if isinstance(error, ClientError):
        code, message = _error_code(error), error.response["Error"].get("Message")
        return f"{code}, {message}" if message else code
    return str(error).rstrip(".")


def _has_own_endpoint() -> bool:
    return bool(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
