"""Published versions and the promotion log, over the artifact store.

    models/<job>/versions/<version>/<file>       immutable; the manifest, with every file's SHA-256, is written last
    models/<job>/promotions/<number>.json        append-only; the champion is what the highest number names

A version is named by the hash of its manifest, so nothing in it can change unseen. Knows nothing of how a version
was trained or judged.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors.torch import load
from torch import Tensor, nn

from infra.errors import ExpectedError
from infra.settings import Settings
from infra.store import AlreadyExists, NotFound, Store, StoreError, open_store
from models.evaluate import predict_outputs
from models.families import DataShape, ModelError, Problem, build_model, family_named
from models.preprocessing import Standardization

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
PREPROCESSING = "preprocessing.safetensors"
FORMAT = 1


class DamagedVersion(StoreError):
    """What lies in the store is not what was published."""


class StaleJudgement(ExpectedError):
    """The champion changed after the challenger was compared with it."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class File(_Record):
    """One file of a version, relative to it."""

    sha256: str
    bytes: int


class Lineage(_Record):
    """Where a version comes from: enough to find its data, its study and its run, and to train it again.

    `model_code` is the SHA-256 of the file of a user's own model: code is named, not shipped.
    """

    snapshot: str
    source: str
    study: str
    trial: int
    seed: int
    device: str
    mlflow_run_id: str
    prefect_flow_run_id: str | None
    git_commit: str | None
    model_code: str | None = None
    python: str
    packages: dict[str, str]


class Manifest(_Record):
    """Everything about a version but its tensors. `metrics` are by split, then by name."""

    format: int = FORMAT
    job: str
    model: str
    hyperparameters: dict[str, JsonValue]
    features: tuple[int, ...]
    problem: Problem = "classification"
    classes: tuple[str, ...]
    metrics: dict[str, dict[str, float]]
    lineage: Lineage
    files: dict[str, File]

    @property
    def shape(self) -> DataShape:
        return DataShape(features=self.features, outputs=max(1, len(self.classes)), problem=self.problem)

    def to_bytes(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True).encode()

    @property
    def version(self) -> str:
        """The version's name: the first 16 hexadecimal digits of the manifest's SHA-256."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:16]


class Promotion(_Record):
    """One entry of the promotion log. `judged` is the number of the entry that was champion when the gate compared;
    `run` is the MLflow run that made the entry, by which a retry finds its own."""

    number: int
    version: str
    judged: int
    run: str
    reason: str
    promoted_at: datetime


@dataclass(frozen=True, kw_only=True)
class Champion:
    """A promoted model, ready to use: the module in evaluation mode and the preprocessing that belongs to it."""

    promotion: Promotion
    manifest: Manifest
    model: nn.Module
    preprocessing: Standardization

    def outputs(self, features: Tensor) -> Tensor:
        """Raw features (rows, ...) to logits (rows, classes), or to a regression's values (rows,)."""
        return predict_outputs(nn.Sequential(self.preprocessing, self.model), features)

    def predict(self, features: Tensor) -> list[str] | list[float]:
        """Raw features (rows, ...) to the name of each row's class, or to a regression's values."""
        outputs = self.outputs(features)
        if self.manifest.problem == "regression":
            values: list[float] = outputs.tolist()
            return values
        return [self.manifest.classes[index] for index in outputs.argmax(dim=1).tolist()]


def load_champion(job: str, store_url: str | None = None) -> Champion:
    """The job's champion, every checksum verified; the store is the environment's unless one is named.

    Raises StoreError: the job never promoted, the store cannot be read, or the version is damaged (DamagedVersion).
    """
    store = open_store(store_url or Settings.read().store_url)
    champion = read_champion(store, job, torch.device("cpu"))
    if champion is None:
        raise StoreError(f"job {job!r} has no champion in {store.url}; run a night of it first")
    return champion


def read_champion(store: Store, job: str, device: torch.device) -> Champion | None:
    """The champion, verified and on the device; None before the first promotion. Raises StoreError."""
    promotion = latest_promotion(store, job)
    if promotion is None:
        return None
    manifest = read_manifest(store, job, promotion.version)
    tensors = {name: _read_tensors(store, manifest, promotion.version, name) for name in (WEIGHTS, PREPROCESSING)}
    try:
        family = family_named(manifest.model)
    except ModelError as error:
        raise StoreError(f"version {promotion.version} of job {job} needs its model's code, but {error}") from error
    try:
        hyperparameters = family.hyperparameters.model_validate(manifest.hyperparameters)
        model = build_model(family, hyperparameters, manifest.shape)
        model.load_state_dict(tensors[WEIGHTS])
        preprocessing = Standardization.from_tensors(tensors[PREPROCESSING])
    except (ValidationError, KeyError, RuntimeError) as error:
        if family.code != manifest.lineage.model_code:
            raise StoreError(
                f"version {promotion.version} of job {job} does not fit {family.name}, whose code has changed since; "
                "put the earlier code back, or give the job a new name"
            ) from error
        raise _damaged(store, job, promotion.version, f"does not make a {manifest.model}: {error}") from error
    return Champion(
        promotion=promotion,
        manifest=manifest,
        model=model.to(device).eval(),
        preprocessing=preprocessing.to(device),
    )


def latest_promotion(store: Store, job: str) -> Promotion | None:
    """The entry with the highest number; None before the first. Raises DamagedVersion where it cannot be read."""
    numbers = _promotion_numbers(store, job)
    return _read_promotion(store, job, max(numbers)) if numbers else None


def read_manifest(store: Store, job: str, version: str) -> Manifest:
    """A version's manifest, verified against the version's name. Raises DamagedVersion."""
    try:
        content = store.read(_version_key(job, version, MANIFEST))
    except NotFound as error:
        raise _damaged(store, job, version, f"{MANIFEST} is missing") from error
    if hashlib.sha256(content).hexdigest()[:16] != version:
        raise _damaged(store, job, version, f"{MANIFEST} was altered")
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise _damaged(store, job, version, f"{MANIFEST} is not of format {FORMAT}") from error


def publish_version(store: Store, manifest: Manifest, files: dict[str, bytes]) -> str:
    """Write a version's files, read each back, then write the manifest; returns the version's name.

    Repeating it is harmless: the same content has the same name. Raises StoreError.
    """
    version = manifest.version
    for name, content in (*files.items(), (MANIFEST, manifest.to_bytes())):
        key = _version_key(manifest.job, version, name)
        try:
            store.create(key, content)
        except AlreadyExists as error:
            raise _damaged(store, manifest.job, version, f"{name} holds other content") from error
        if store.read(key) != content:
            raise _damaged(store, manifest.job, version, f"{name} came back altered")
    return version


def append_promotion(
    store: Store, job: str, *, version: str, judged: int, run: str, reason: str, now: datetime
) -> Promotion:
    """Make a version champion by one more entry, whose number is the judged entry's plus one.

    A retry finds its own entry and returns it. Raises StaleJudgement where somebody else's stands in its place: of
    two promoters that judged the same champion exactly one wins.
    """
    entry = Promotion(number=judged + 1, version=version, judged=judged, run=run, reason=reason, promoted_at=now)
    try:
        store.create(_promotion_key(job, entry.number), entry.model_dump_json(indent=2).encode())
    except AlreadyExists:
        found = _read_promotion(store, job, entry.number)
        if (found.run, found.version) != (run, version):
            raise StaleJudgement(
                f"the champion of {job} changed after it was compared: promotion {found.number} made {found.version} "
                "champion; run the night again to compare with that one"
            ) from None
        return found
    return entry


def describe_file(content: bytes) -> File:
    """What the manifest says of a file."""
    return File(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def _read_tensors(store: Store, manifest: Manifest, version: str, name: str) -> dict[str, Tensor]:
    if name not in manifest.files:
        raise _damaged(store, manifest.job, version, f"{MANIFEST} names no {name}")
    try:
        content = store.read(_version_key(manifest.job, version, name))
    except NotFound as error:
        raise _damaged(store, manifest.job, version, f"{name} is missing") from error
    if describe_file(content) != manifest.files[name]:
        raise _damaged(store, manifest.job, version, f"{name} was altered")
    try:
        return load(content)
    except safetensors.SafetensorError as error:
        raise _damaged(store, manifest.job, version, f"{name} is no safetensors file") from error


def _read_promotion(store: Store, job: str, number: int) -> Promotion:
    key = _promotion_key(job, number)
    try:
        promotion = Promotion.model_validate_json(store.read(key))
    except ValidationError as error:
        raise DamagedVersion(f"{store.url}/{key} is no promotion; restore it from a backup of the store") from error
    if promotion.number != number:
        raise DamagedVersion(f"{store.url}/{key} says that it is promotion {promotion.number}; restore it")
    return promotion


def _promotion_numbers(store: Store, job: str) -> list[int]:
    names = (key.rpartition("/")[2] for key in store.keys(f"models/{job}/promotions/"))
    return [int(match[1]) for name in names if (match := re.fullmatch(r"(\d{6})\.json", name))]


def _promotion_key(job: str, number: int) -> str:
    return f"models/{job}/promotions/{number:06}.json"


def _version_key(job: str, version: str, name: str) -> str:
    return f"models/{job}/versions/{version}/{name}"


def _damaged(store: Store, job: str, version: str, what: str) -> DamagedVersion:
    return DamagedVersion(
        f"version {version} of job {job} in {store.url} is damaged: {what}; "
        "restore the store from a backup, nothing was changed"
    )
