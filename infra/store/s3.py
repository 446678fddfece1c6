"""The artifact store in S3: Amazon's, or any server that speaks its protocol and honours conditional create."""

import filecmp
import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from s3transfer.exceptions import RetriesExceededError

from infra.settings import LOOPBACK_NAMES, S3Options
from infra.store.protocol import AlreadyExists, NotFound, StoreError, StoreUnavailable

PART_BYTES = 16 * 1024 * 1024


class S3Store:
    """Keys are objects below a prefix of a bucket. Credentials, region and endpoint come from boto3's own chain
    (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL_S3 and so on). `role` is what errors call it."""

    def __init__(self, bucket: str, prefix: str, options: S3Options, role: str = "the artifact store") -> None:
        self._options = options
        self._role = role
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        # botocore repeats a PUT whose answer was lost; on a conditional PUT the repeat meets our own object and
        # reports 412, a race lost that was won. So: one attempt, and what happened is read back.
        self._client, self._client_once = self._connect(attempts=(4, 1))

    def create(self, key: str, content: bytes) -> None:
        try:
            self._client_once.put_object(
                Bucket=self.bucket, Key=self.prefix + key, Body=content, IfNoneMatch="*", **self._object_options()
            )
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

    def upload(self, key: str, path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        if path.stat().st_size <= PART_BYTES:
            content = path.read_bytes()
            self.create(key, content)
            if self.read(key) != content:
                raise AlreadyExists(f"{self.url}/{key} exists with other content")
            on_bytes(len(content))
            return
        with ThreadPoolExecutor(1) as other_thread:
            expected = other_thread.submit(_etag_of_parts, path)
            found = self._head(key)
            if found is None:
                self._upload_parts(key, path, on_bytes)
                found = self._head(key)
            if found is None or not self._holds(key, found, path, expected.result()):
                raise AlreadyExists(f"{self.url}/{key} exists with other content")

    def _upload_parts(self, key: str, path: Path, on_bytes: Callable[[int], None]) -> None:
        parts = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)
        try:
            self._client.upload_file(
                str(path), self.bucket, self.prefix + key,
                Config=parts, Callback=on_bytes, ExtraArgs=self._object_options(),
            )  # fmt: skip
        except S3UploadFailedError as error:
            cause = error.__context__
            raise self._translated(cause if isinstance(cause, Exception) else error) from error
        except (ClientError, BotoCoreError) as error:
            raise self._translated(error) from error

    def _holds(self, key: str, head: Any, path: Path, etag: str) -> bool:
        """The server's ETag of an upload in parts is made of the MD5 of each part as it arrived; where it is something
        else, as under a KMS key, the bytes themselves are read back."""
        if head["ContentLength"] != path.stat().st_size:
            return False
        return head["ETag"].strip('"') == etag or self._reads(key, path)

    def holds(self, key: str, path: Path) -> bool:
        """Whether a file is what lies under the key. What was sent in parts of a size that nobody knows is compared by
        length only."""
        head = self._head(key)
        if head is None or head["ContentLength"] != path.stat().st_size:
            return False
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        etag = head["ETag"].strip('"')
        return "-" in etag or etag == found or self._reads(key, path)

    def _reads(self, key: str, path: Path) -> bool:
        with tempfile.NamedTemporaryFile() as copy:
            self.download(key, Path(copy.name))
            return filecmp.cmp(path, copy.name, shallow=False)

    def _head(self, key: str) -> Any:
        try:
            return self._client.head_object(Bucket=self.bucket, Key=self.prefix + key)
        except (ClientError, BotoCoreError) as error:
            if _error_code(error) in MISSING:
                return None
            raise self._translated(error) from error

    def read(self, key: str) -> bytes:
        content = io.BytesIO()
        self._fetch(key, content)
        return content.getvalue()

    def download(self, key: str, path: Path) -> None:
        with path.open("wb") as file:
            self._fetch(key, file)

    def _fetch(self, key: str, file: Any) -> None:
        """By the transfer manager, which asks again for what a broken connection cut off."""
        try:
            self._client.download_fileobj(self.bucket, self.prefix + key, file)
        except (ClientError, BotoCoreError, RetriesExceededError) as error:
            if _error_code(error) in MISSING:
                raise NotFound(f"{self.url}/{key} does not exist") from None
            raise self._translated(error) from error

    def created(self, prefix: str) -> dict[str, datetime]:
        return {key: item["LastModified"] for key, item in self._list(prefix)}

    def tags(self, prefix: str) -> dict[str, str]:
        """Of every key that begins with the prefix, sorted, a text that changes whenever its bytes do."""
        return {key: f"{item['ETag']} {item['Size']}" for key, item in self._list(prefix)}

    def _list(self, prefix: str) -> list[tuple[str, Any]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
        try:
            found = [
                (item["Key"].removeprefix(self.prefix), item) for page in pages for item in page.get("Contents", [])
            ]
        except (ClientError, BotoCoreError) as error:
            raise self._translated(error) from error
        return sorted(found, key=lambda one: one[0])

    def delete(self, key: str) -> None:
        try:
            self._client.delete_object(Bucket=self.bucket, Key=self.prefix + key)
        except (ClientError, BotoCoreError) as error:
            raise self._translated(error) from error

    def drop_unfinished(self, before: datetime) -> int:
        dropped = 0
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self.prefix)
        try:
            for page in pages:
                for upload in page.get("Uploads", []):
                    if upload["Initiated"] < before:
                        self._client.abort_multipart_upload(
                            Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                        dropped += 1
        except (ClientError, BotoCoreError) as error:
            raise self._translated(error) from error
        return dropped

    def _object_options(self) -> dict[str, Any]:
        """What the settings ask for each object: encryption, tags, a lock."""
        return self._options.for_object(datetime.now(UTC))

    def _connect(self, attempts: tuple[int, int]) -> tuple[Any, Any]:
        """A client for each number of attempts. They share what boto3 reads of files, which takes it 0.1 s."""
        try:
            # A session of our own: boto3's shared one keeps the credentials that it found first.
            session = boto3.Session()
            client, other = (
                session.client(
                    "s3",
                    config=Config(
                        retries={"mode": "standard", "total_max_attempts": most},
                        connect_timeout=5,
                        read_timeout=60,
                        # Servers other than Amazon's often serve buckets by path only.
                        s3={"addressing_style": "path"} if _has_own_endpoint() else {},
                        # boto3's default checksum trailers are refused over HTTPS by Ceph (411 MissingContentLength).
                        request_checksum_calculation="when_required",
                    ),
                )
                for most in attempts
            )
        except (BotoCoreError, ValueError) as error:
            raise StoreError(f"{self._role} {self.url} cannot be opened: {error}") from error
        endpoint = urlsplit(client.meta.endpoint_url)
        if endpoint.scheme == "http" and endpoint.hostname not in LOOPBACK_NAMES:
            raise StoreError(
                f"the endpoint of {self._role} must be https:// unless it is on this machine, found "
                f"{client.meta.endpoint_url}; put TLS before it"
            )
        return client, other

    def _translated(self, error: Exception) -> StoreError:
        return self._refused(error) if _error_code(error) in REFUSALS else self._unavailable(error)

    def _refused(self, error: Exception) -> StoreError:
        return StoreError(f"{self._role} {self.url} refused: {_reason(error)}; {REFUSALS[_error_code(error)]}")

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(
            f"{self._role} {self.url} cannot be reached ({_reason(error)}); "
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
    "403": f"{_CREDENTIALS}, and {_RIGHTS}",  # an answer to HEAD does not say more
    "RequestTimeTooSkewed": "set this machine's clock right",
    "NoSuchBucket": "create the bucket or name another",
}


MISSING = ("NoSuchKey", "404")


def _error_code(error: Exception) -> str:
    if isinstance(error, ClientError):
        return str(error.response["Error"]["Code"])
    return type(error).__name__


def _reason(error: Exception) -> str:
    if isinstance(error, ClientError):
        code, message = _error_code(error), error.response["Error"].get("Message")
        return f"{code}, {message}" if message else code
    return str(error).rstrip(".")


def _etag_of_parts(path: Path) -> str:
    """What S3 calls the ETag of an upload in parts: the MD5 of the parts' MD5s, and how many there are."""
    digests = []
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            digests.append(hashlib.md5(part, usedforsecurity=False).digest())
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def _has_own_endpoint() -> bool:
    return bool(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
