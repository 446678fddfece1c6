"""What lies in S3 as files of this machine, fetched once: an object is copied again only when it has changed.

Endpoint and credentials are those of an artifact store. Knows nothing of what is in a file.
"""

import hashlib
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from infra.settings import S3Options
from infra.store.protocol import StoreError
from infra.store.s3 import S3Store

INDEX = "index.json"
_PATTERN = re.compile(r"[*?\[]")


def is_in_s3(url: str) -> bool:
    """Whether this is the place of something in S3."""
    return url.startswith("s3://")


def object_tags(url: str) -> dict[str, str]:
    """Of every object that the URL means, by its name below it, a text that changes whenever its bytes do.

    The URL names an object, a pattern such as s3://bucket/day-*.csv, or everything below a folder. Raises StoreError:
    nothing is there, a name leads out of the folder, or S3 refuses or does not answer.
    """
    return _look(*_open(url), url)[0]


def download(url: str, folder: Path) -> str:
    """The local path, or pattern of paths, of what the URL means, copied below the folder.

    A file appears whole or not at all, compared with what lies in S3. Raises StoreError, also where an object changes
    while it is read.
    """
    store, key = _open(url)
    place = folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    index = place / INDEX
    known: dict[str, str] = json.loads(index.read_text()) if index.exists() else {}
    wanted, is_folder = _look(store, key, url)
    files = place / "files"
    for name in known.keys() - wanted.keys():
        (files / name).unlink(missing_ok=True)
    prefix = key.rstrip("/") + "/" if is_folder else key[: key.rfind("/") + 1]
    for name, tag in wanted.items():
        path = files / name
        if known.get(name) == tag and path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        store.download(prefix + name, partial)
        if not store.holds(prefix + name, partial):
            partial.unlink()
            raise StoreError(f"{url}: {name} must arrive as it lies there, found other bytes; run again")
        partial.replace(path)
        known[name] = tag
        index.write_text(json.dumps({name: tag for name, tag in known.items() if name in wanted}))
    if object_tags(url) != wanted:
        raise StoreError(f"{url} must stay as it is while it is read, found that it changed; run again")
    return str(files if is_folder else files / PurePosixPath(key).name)


def _look(store: S3Store, key: str, url: str) -> tuple[dict[str, str], bool]:
    """The objects that a key means, by their names below it, each with its tag; and whether it means a folder. A name
    such as data[1].csv is one before it is a pattern."""
    below, prefix = store.tags(key), key.rstrip("/") + "/"
    found = {PurePosixPath(key).name: below[key]} if key in below else {}
    is_folder = not found and any(name.startswith(prefix) for name in below)
    if is_folder:
        found = {name.removeprefix(prefix): tag for name, tag in below.items() if name.startswith(prefix)}
    elif not found and _PATTERN.search(key):
        folder = key[: key.rfind("/") + 1]
        found = {
            name.removeprefix(folder): tag
            for name, tag in store.tags(folder).items()
            if fnmatchcase(name, key) and name.count("/") == key.count("/")
        }
    if not found:
        raise StoreError(f"{url} must name an object, a pattern or a folder of objects, found none; correct it")
    for name in found:
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            raise StoreError(f"{url}: an object's name must lead to a file below it, found {name!r}; rename it")
    return {name: tag for name, tag in found.items() if not name.endswith("/")}, is_folder


def _open(url: str) -> tuple[S3Store, str]:
    parts = urlsplit(url.replace("?", "%3F").replace("#", "%23"))
    key = parts.path.lstrip("/").replace("%3F", "?").replace("%23", "#")
    if not parts.netloc or not key:
        raise StoreError(f"data.source must be s3://bucket/key, found {url!r}; add what is missing")
    return S3Store(parts.netloc, "", S3Options.read(), role="data.source"), key
