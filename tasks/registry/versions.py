"""Published versions over the artifact store.

    models/<job>/versions/<version>/<file>       immutable; the manifest, with every file's SHA-256, is written last

A version is named by the hash of its manifest, so nothing in it can change unseen. Knows nothing of torch, which keeps
the commands about versions quick; `champion.py` makes models of them.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from infra.store.protocol import AlreadyExists, NotFound, Store, StoreError, UploadProgress
from models.rows.column import DateOrder
from models.rows.shapes import DataShape, Problem
from tasks.registry.log import Promotion, history, latest_promotion

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
PREPROCESSING = "preprocessing.safetensors"
FORMAT = 5
# Before, features and moments were rounded to float32 before rows were split by them.
FORMAT_OF_EXACT_ROWS = 5
YOUNG = timedelta(days=1)

_logger = logging.getLogger(__name__)


# Relative, below the version, nothing hidden, and no kind of file that is run or unpickled when it is read.
FileName = Annotated[
    str, Field(pattern=r"^(?:[a-z0-9_]+/)*(?:MLmodel|[A-Za-z0-9_]+\.(?:safetensors|json|md|onnx|py|txt|yaml))$")
]


class DamagedVersion(StoreError):
    """What lies in the store is not what was published."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class File(_Record):
    """One file of a version."""

    sha256: str
    bytes: int


class Lineage(_Record):
    """Where a version comes from: enough to find its data, its study and its run, and to train it again.

    `data` is how the source was read and split. `seed` is that of the first model in it, `seeds` are those of all;
    `trained_with` are the seeds that were trained as one computation with these, empty where each was trained by
    itself. `model_code` is the SHA-256 of the file of a user's own model: code is named, not shipped.
    """

    snapshot: str
    source: str
    validation_fraction: float | None = None
    test_fraction: float | None = None
    data: dict[str, JsonValue] = {}
    objective: str | None = None
    study: str
    trial: int
    seed: int
    seeds: tuple[int, ...] = ()
    trained_with: tuple[int, ...] = ()
    device: str
    mlflow_run_id: str
    prefect_flow_run_id: str | None
    git_commit: str | None
    model_code: str | None = None
    python: str
    packages: dict[str, str]


class TableColumn(_Record):
    """A feature of the table that a version reads: `models.rows.column.Column`."""

    name: str
    role: Literal["numeric", "boolean", "categorical", "datetime"]
    categories: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    decimal: str = "."
    thousands: str = ""
    unit: str | None = None
    dates: DateOrder = "year_first"


class Manifest(_Record):
    """Everything about a version but its tensors. `metrics` are by split, then by name; `intervals` bound the test
    metrics; `columns` are those of a table; `gate` is the evidence that it was promoted on. `members` are the models of
    an ensemble."""

    format: int = FORMAT
    job: str
    model: str
    members: int = 1
    hyperparameters: dict[str, JsonValue]
    features: tuple[int, ...]
    problem: Problem = "classification"
    classes: tuple[str, ...]
    columns: tuple[TableColumn, ...] = ()
    metrics: dict[str, dict[str, float]]
    intervals: dict[str, tuple[float, float]] = {}
    gate: dict[str, JsonValue] = {}
    lineage: Lineage
    files: dict[FileName, File]

    @property
    def shape(self) -> DataShape:
        return DataShape(features=self.features, outputs=max(1, len(self.classes)), problem=self.problem)

    def to_bytes(self) -> bytes:
        """What was not set is left out, so a manifest of an earlier format comes back as it was."""
        content = self.model_dump(mode="json", exclude_unset=True) | {"format": self.format}
        return json.dumps(content, indent=2, sort_keys=True).encode()

    @property
    def version(self) -> str:
        """The version's name: the first 16 hexadecimal digits of the manifest's SHA-256."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:16]


def read_manifest(store: Store, job: str, version: str) -> Manifest:
    """A version's manifest, verified against the version's name. Raises StoreError where it is of a newer format,
    DamagedVersion."""
    try:
        content = store.read(_version_key(job, version, MANIFEST))
    except NotFound as error:
        raise damaged(store, job, version, f"{MANIFEST} is missing") from error
    if hashlib.sha256(content).hexdigest()[:16] != version:
        raise damaged(store, job, version, f"{MANIFEST} was altered")
    try:
        if (found := json.loads(content).get("format", FORMAT)) > FORMAT:
            raise StoreError(
                f"version {version} of job {job} in {store.url} was published by a newer Nightly Tuner "
                f"(format {found}, this one reads up to {FORMAT}); upgrade to read it"
            )
        return Manifest.model_validate_json(content)
    except (ValidationError, ValueError, AttributeError, TypeError) as error:
        raise damaged(store, job, version, f"{MANIFEST} is not of format {FORMAT}") from error


def champion_entry(store: Store, job: str) -> Promotion:
    """Return the promotion that made the champion. Raises StoreError where the job never promoted."""
    latest = latest_promotion(store, job)
    if latest is None:
        raise StoreError(f"job {job!r} has no champion in {store.url}; run a night of it first")
    return latest


def choose_version(store: Store, job: str, version: str | None) -> str:
    """The version of that name, else the champion's. Raises StoreError: the job never promoted, or no version of it
    is named so."""
    latest = champion_entry(store, job)
    if version is None:
        return latest.version
    known = list(dict.fromkeys(entry.version for entry in history(store, job)))
    if version not in known:
        raise StoreError(f"job {job} never promoted a version {version!r}; known are {', '.join(known)}")
    return version


def pull_version(store: Store, job: str, version: str, folder: Path) -> Manifest:
    """Download a version's files into a new folder, verified; the folder appears complete or not at all.

    Raises StoreError: the folder exists, or the version is damaged.
    """
    if folder.exists():
        raise StoreError(f"{folder} exists already; name a folder that does not")
    manifest = read_manifest(store, job, version)
    check_names(store, manifest, version)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, expected in manifest.files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                store.download(_version_key(job, version, name), path)
            except NotFound as error:
                raise damaged(store, job, version, f"{name} is missing") from error
            if describe_file(path) != expected:
                raise damaged(store, job, version, f"{name} was altered")
        (partial / MANIFEST).write_bytes(manifest.to_bytes())
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def version_folder(root: Path, job: str, version: str) -> Path:
    """Where a directory store keeps a version's files."""
    return root / _version_key(job, version, "")


def read_file(store: Store, manifest: Manifest, version: str, name: str) -> bytes:
    """One of a version's files, verified. Raises DamagedVersion."""
    if name not in manifest.files:
        raise damaged(store, manifest.job, version, f"{MANIFEST} names no {name}")
    try:
        content = store.read(_version_key(manifest.job, version, name))
    except NotFound as error:
        raise damaged(store, manifest.job, version, f"{name} is missing") from error
    if File(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content)) != manifest.files[name]:
        raise damaged(store, manifest.job, version, f"{name} was altered")
    return content


def verify_version(store: Store, job: str, version: str) -> Manifest:
    """The manifest of a version whose every file is as it was published. Raises StoreError."""
    manifest = read_manifest(store, job, version)
    check_names(store, manifest, version)
    for name in manifest.files:
        read_file(store, manifest, version, name)
    return manifest


def publish_version(store: Store, manifest: Manifest, folder: Path) -> str:
    """Write a version's files from a folder, each seen to be whole in the store, then the manifest; returns the
    version's name.

    Repeating it is harmless: the same content has the same name. Raises StoreError.
    """
    version = manifest.version
    progress = UploadProgress(f"version {version}", sum(file.bytes for file in manifest.files.values()))
    try:
        for name in manifest.files:
            store.upload(_version_key(manifest.job, version, name), folder / name, progress)
        key = _version_key(manifest.job, version, MANIFEST)
        store.create(key, manifest.to_bytes())
    except AlreadyExists as error:
        raise damaged(store, manifest.job, version, f"it holds other content ({error})") from error
    if store.read(key) != manifest.to_bytes():
        raise damaged(store, manifest.job, version, f"{MANIFEST} came back altered")
    return version


def collect_garbage(store: Store, now: datetime) -> list[str]:
    """Delete what a killed promotion left behind: versions that no entry of a promotion log names, and unfinished
    uploads. Returns the keys that are gone.

    Whatever is younger than a day stays, because a promotion may be on its way to naming it. A job whose log cannot be
    read keeps everything: raises DamagedLog.
    """
    oldest = now - YOUNG
    created = store.created("models/")
    named = _promoted(store, created)
    versions: dict[tuple[str, str], list[str]] = {}
    for key in created:
        _, job, kind, *rest = key.split("/")
        if kind == "versions" and len(rest) > 1:
            versions.setdefault((job, rest[0]), []).append(key)
    gone = []
    for identity, keys in versions.items():
        if identity not in named and all(created[key] < oldest for key in keys):
            # The manifest goes first: without it nobody takes what is left for a version.
            for key in sorted(keys, key=lambda key: not key.endswith(f"/{MANIFEST}")):
                store.delete(key)
                gone.append(key)
    if dropped := store.drop_unfinished(oldest):
        _logger.info("%d unfinished uploads were dropped", dropped)
    return gone


def promoted_snapshots(store: Store) -> set[str]:
    """The fingerprints of the snapshots that promoted versions were made of. Raises StoreError, DamagedLog."""
    named = _promoted(store, store.created("models/"))
    return {read_manifest(store, job, version).lineage.snapshot for job, version in named}


def _promoted(store: Store, keys: Iterable[str]) -> set[tuple[str, str]]:
    """Job and version of every entry in the promotion logs, of the jobs that the keys below models/ are of."""
    jobs = {key.split("/")[1] for key in keys}
    return {(job, entry.version) for job in jobs for entry in history(store, job)}


def describe_file(path: Path) -> File:
    """What the manifest says of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return File(sha256=digest.hexdigest(), bytes=path.stat().st_size)


def check_names(store: Store, manifest: Manifest, version: str) -> None:
    """What lies beside a version's own files was not published with it."""
    prefix = _version_key(manifest.job, version, "")
    added = {key.removeprefix(prefix) for key in store.created(prefix)} - {*manifest.files, MANIFEST}
    if added:
        raise damaged(store, manifest.job, version, f"{min(added)} was added to it")


def _version_key(job: str, version: str, name: str) -> str:
    return f"models/{job}/versions/{version}/{name}"


def damaged(store: Store, job: str, version: str, what: str) -> DamagedVersion:
    return DamagedVersion(
        f"version {version} of job {job} in {store.url} is damaged: {what}; "
        "restore the store from a backup, nothing was changed"
    )
