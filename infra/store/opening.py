"""A store by its URL, and the proof that it can be used."""

import contextlib
import uuid
from pathlib import Path
from urllib.parse import unquote, urlsplit

from infra.settings import S3Options
from infra.store.protocol import AlreadyExists, Store, StoreError

PROBE_KEY = "probe/conditional-create"
PROBE_CONTENT = b"Nightly Tuner created this to learn whether the store refuses to create a key twice.\n"


def open_store(url: str) -> Store:
    """The store at a URL. Raises StoreError for a URL that names none, or plain HTTP to another machine."""
    # Each store knows this module; and a directory needs no boto3, which takes its time to import.
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        raise StoreError(f"NIGHTLY_STORE must hold no ? and #, found {url!r}; write %3F and %23 in a folder's path")
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        from infra.store.directory import DirectoryStore

        return DirectoryStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        from infra.store.s3 import S3Store

        return S3Store(parts.netloc, parts.path.strip("/"), S3Options.read())
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
