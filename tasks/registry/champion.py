"""The champion, and any other version, as a model that is ready to use.

Knows nothing of how a version was trained or judged.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from infra.settings import Settings
from infra.store.opening import open_store
from infra.store.protocol import Store, StoreError
from models.evaluation.evaluate import predict_outputs
from models.families.errors import ModelError
from models.families.family import family_named
from models.families.networks import build_model
from models.rows.batches import DiskRows
from models.rows.column import Column
from models.rows.preprocessing import Preprocessing, preprocessing_of
from models.training.weights import read_tensors
from tasks.registry.log import Promotion, latest_promotion, taken_back
from tasks.registry.versions import (
    PREPROCESSING,
    WEIGHTS,
    Manifest,
    champion_entry,
    check_names,
    damaged,
    read_file,
    read_manifest,
)

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Version:
    """A published model, ready to use: the module in evaluation mode and the preprocessing that belongs to it."""

    manifest: Manifest
    model: nn.Module
    preprocessing: Preprocessing

    @property
    def columns(self) -> tuple[Column, ...]:
        """What is read of a table; none where the rows are arrays."""
        return tuple(Column(**column.model_dump()) for column in self.manifest.columns)

    def outputs(self, features: Tensor | DiskRows) -> Tensor:
        """Raw features (rows, ...) of any type of numbers, or a table's matrix, to logits (rows, classes), or to a
        regression's values (rows,) in float64."""
        return predict_outputs(nn.Sequential(self.preprocessing, self.model), features)

    def predict(self, rows: "Tensor | pd.DataFrame") -> list[str] | list[float]:
        """Raw rows to the name of each one's class, or to a regression's values: features (rows, ...), or a DataFrame
        where the model was trained on a table, with columns in any order. Raises ValueError where a value cannot be
        read as its column was in training."""
        if not isinstance(rows, Tensor):
            from models.rows.table import encode  # with pandas, which takes its time to import and only tables need

            rows = torch.from_numpy(encode(rows, self.columns)).to(self.preprocessing.mean.device)
        outputs = self.outputs(rows)
        if self.manifest.problem == "regression":
            values: list[float] = outputs.tolist()
            return values
        return [self.manifest.classes[index] for index in outputs.argmax(dim=1).tolist()]


@dataclass(frozen=True, kw_only=True)
class Champion(Version):
    """The promoted version. `taken_back` are the manifests of versions that a rollback replaced by this one."""

    promotion: Promotion
    taken_back: tuple[Manifest, ...] = ()


def load_champion(job: str, store_url: str | None = None) -> Champion:
    """The job's champion, every checksum verified; the store is the environment's unless one is named.

    Raises StoreError: the job never promoted, the store cannot be read, or the version is damaged (DamagedVersion).
    """
    store = open_store(store_url or Settings.read().store_url)
    return _read(store, job, champion_entry(store, job), torch.device("cpu"))


def read_champion(store: Store, job: str, device: torch.device) -> Champion | None:
    """The champion, verified and on the device; None before the first promotion. Raises StoreError."""
    promotion = latest_promotion(store, job)
    return None if promotion is None else _read(store, job, promotion, device)


def _read(store: Store, job: str, promotion: Promotion, device: torch.device) -> Champion:
    found = read_version(store, job, promotion.version, device)
    return Champion(
        promotion=promotion,
        manifest=found.manifest,
        model=found.model,
        preprocessing=found.preprocessing,
        taken_back=tuple(read_manifest(store, job, version) for version in taken_back(store, job, promotion)),
    )


def read_version(store: Store, job: str, version: str, device: torch.device) -> Version:
    """A version, verified and on the device. Raises StoreError: it is unknown, damaged (DamagedVersion), or needs
    code that is not there."""
    manifest = read_manifest(store, job, version)
    check_names(store, manifest, version)
    tensors = {name: _read_tensors(store, manifest, version, name) for name in (WEIGHTS, PREPROCESSING)}
    try:
        family = family_named(manifest.model)
    except ModelError as error:
        raise StoreError(f"version {version} of job {job} needs its model's code, but {error}") from error
    try:
        hyperparameters = family.hyperparameters.model_validate(manifest.hyperparameters)
        preprocessing = preprocessing_of(tensors[PREPROCESSING])
        shape = replace(manifest.shape, features=preprocessing.shape_of(manifest.features))
        model = build_model(family, hyperparameters, shape, manifest.members)
        model.load_state_dict(tensors[WEIGHTS])
    except (ValidationError, KeyError, RuntimeError) as error:
        if family.code != manifest.lineage.model_code:
            raise StoreError(
                f"version {version} of job {job} does not fit {family.name}, whose code has changed since; "
                "put the earlier code back, or give the job a new name"
            ) from error
        raise damaged(store, job, version, f"does not make a {manifest.model}: {error}") from error
    return Version(manifest=manifest, model=model.to(device).eval(), preprocessing=preprocessing.to(device))


def _read_tensors(store: Store, manifest: Manifest, version: str, name: str) -> dict[str, Tensor]:
    try:
        return read_tensors(read_file(store, manifest, version, name))
    except (SafetensorError, KeyError) as error:
        raise damaged(store, manifest.job, version, f"{name} is no safetensors file") from error
