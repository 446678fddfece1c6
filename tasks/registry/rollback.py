"""Put an earlier champion back: one more entry in the promotion log, nothing trained and nothing deleted.

Knows nothing of nights; the next one finds the champion that the log names.
"""

import uuid
from datetime import datetime

from infra.store.protocol import Store, StoreError
from tasks.registry.log import Promotion, append_promotion, history
from tasks.registry.versions import Manifest, choose_version, verify_version


def roll_back(store: Store, job: str, *, to: str | None, reason: str, now: datetime) -> tuple[Promotion, Manifest]:
    """Make `to` champion again, or the version that the present champion once replaced; every checksum is verified
    first.

    Raises StoreError: the job never promoted, there is no earlier champion, or the version is unknown, damaged or
    champion already; StaleJudgement where another entry was made meanwhile: look at it, then decide again.
    """
    if not reason.strip():
        raise StoreError("a rollback needs a reason, found none; say why with --reason TEXT")
    choose_version(store, job, to)
    entries = history(store, job)
    version = to or _replaced_by(entries)
    if version is None:
        raise StoreError(f"job {job} has no champion before {entries[0].version} to go back to; run a night of it")
    if version == entries[0].version:
        raise StoreError(f"version {version} is the champion of {job} already; name an earlier one with --to VERSION")
    manifest = verify_version(store, job, version)
    promotion = append_promotion(
        store,
        job,
        version=version,
        judged=entries[0].number,
        run=f"rollback-{uuid.uuid4().hex}",
        reason=reason,
        now=now,
        kind="rollback",
    )
    return promotion, manifest


def _replaced_by(entries: list[Promotion]) -> str | None:
    """The champion that the present one was compared with when a night promoted it; entries come newest first."""
    champion = entries[0].version
    promoted = next(entry for entry in entries if entry.version == champion and entry.kind == "promotion")
    return next((entry.version for entry in entries if entry.number == promoted.judged), None)
