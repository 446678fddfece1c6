"""The promotion log: an append-only list of entries, the highest of which names the champion.

    models/<job>/promotions/<number>.json

Entry N+1 is created only where none is, so of two promoters exactly one wins, and nothing is ever overwritten: a
rollback is one more entry that names an earlier version. Knows nothing of what a version holds.
"""

import hashlib
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra.errors import ExpectedError
from infra.store.protocol import AlreadyExists, Store, StoreError


class DamagedLog(StoreError):
    """An entry in the store is not what was written."""


class StaleJudgement(ExpectedError):
    """The champion changed after the challenger was compared with it."""


class Promotion(BaseModel):
    """One entry. `judged` is the number of the entry that was champion when the gate compared, or that a rollback
    took back: the one before. `previous` is that one's SHA-256, which chains the log. `run` is the MLflow run or the
    command that made the entry, by which a retry finds its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    version: str = Field(pattern=r"^[a-z0-9]{1,64}$")
    judged: int
    previous: str | None = None
    run: str
    reason: str
    promoted_at: datetime
    kind: Literal["promotion", "rollback"] = "promotion"


def latest_promotion(store: Store, job: str) -> Promotion | None:
    """The entry with the highest number; None before the first. Raises DamagedLog where it cannot be read."""
    numbers = _numbers(store, job)
    return _read(store, job, max(numbers)) if numbers else None


def history(store: Store, job: str) -> list[Promotion]:
    """Every entry, the newest first. Raises DamagedLog where one cannot be read, is missing, or is not the one that the
    entry after it names."""
    numbers = sorted(_numbers(store, job), reverse=True)
    if numbers and numbers != list(range(len(numbers), 0, -1)):
        raise DamagedLog(
            f"the promotion log of {job} in {store.url} must have every number from 1 to {numbers[0]}, found "
            f"{len(numbers)} entries; restore the missing ones from a backup of the store"
        )
    contents = [store.read(_key(job, number)) for number in numbers]
    entries = [_parse(store, job, number, content) for number, content in zip(numbers, contents, strict=True)]
    for entry, content in zip(entries, contents[1:], strict=False):
        if entry.previous is not None and entry.previous != hashlib.sha256(content).hexdigest():
            raise DamagedLog(
                f"promotion {entry.judged} of {job} in {store.url} was altered after promotion {entry.number} "
                "was made; restore it from a backup of the store"
            )
    return entries


def append_promotion(
    store: Store,
    job: str,
    *,
    version: str,
    judged: int,
    run: str,
    reason: str,
    now: datetime,
    kind: Literal["promotion", "rollback"] = "promotion",
) -> Promotion:
    """Make a version champion by one more entry, whose number is the judged entry's plus one.

    A retry finds its own entry and returns it. Raises StaleJudgement where somebody else's stands in its place: of
    two promoters that judged the same champion exactly one wins.
    """
    entry = Promotion(
        number=judged + 1,
        version=version,
        judged=judged,
        previous=hashlib.sha256(store.read(_key(job, judged))).hexdigest() if judged else None,
        run=run,
        reason=reason,
        promoted_at=now,
        kind=kind,
    )
    try:
        store.create(_key(job, entry.number), entry.model_dump_json(indent=2).encode())
    except AlreadyExists:
        found = _read(store, job, entry.number)
        if (found.run, found.version) != (run, version):
            raise StaleJudgement(
                f"the champion of {job} changed after it was compared: promotion {found.number} made {found.version} "
                "champion; compare with that one, then decide again"
            ) from None
        return found
    return entry


def taken_back(store: Store, job: str, latest: Promotion) -> Iterator[str]:
    """The versions that the rollbacks at the top of the log took back; none once another promotion followed."""
    entry = latest
    while entry.kind == "rollback":
        entry = _read(store, job, entry.judged)
        yield entry.version


def _read(store: Store, job: str, number: int) -> Promotion:
    return _parse(store, job, number, store.read(_key(job, number)))


def _parse(store: Store, job: str, number: int, content: bytes) -> Promotion:
    key = _key(job, number)
    try:
        promotion = Promotion.model_validate_json(content)
    except ValidationError as error:
        raise DamagedLog(f"{store.url}/{key} is no promotion; restore it from a backup of the store") from error
    if promotion.number != number:
        raise DamagedLog(f"{store.url}/{key} says that it is promotion {promotion.number}; restore it")
    return promotion


def _numbers(store: Store, job: str) -> list[int]:
    names = (key.rpartition("/")[2] for key in store.created(f"models/{job}/promotions/"))
    return [int(match[1]) for name in names if (match := re.fullmatch(r"(\d{6})\.json", name))]


def _key(job: str, number: int) -> str:
    return f"models/{job}/promotions/{number:06}.json"
