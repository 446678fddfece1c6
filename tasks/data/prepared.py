"""A snapshot made ready for training. Imported by the process that trains, so it knows neither MLflow nor the study."""

import logging
import math
from dataclasses import dataclass, replace

import torch

from infra.device import memory_bytes
from models.evaluation.metrics import MetricName
from models.families.family import Family
from models.rows.batches import DiskRows, Split
from models.rows.preprocessing import Preprocessing, Standardization, TablePreprocessing
from models.rows.shapes import DataShape
from models.training.terms import Setting
from tasks.data.snapshots import Snapshot, SplitName

# Of the memory of the whole device; beside the rows lie their raw form for a moment, models, and other processes.
MEMORY_SHARE = 0.25

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A snapshot, standardised by its own training rows: what trials train on. On the device, or streamed from the disk
    where the device's memory does not hold it."""

    snapshot: Snapshot
    preprocessing: Preprocessing
    training: Split
    validation: Split

    @property
    def prior_loss(self) -> float:
        """The training loss of the best constant prediction: the entropy of the classes in nats, or 1."""
        if self.snapshot.shape.problem == "regression":
            return 1.0
        shares = torch.bincount(self.training.target, minlength=self.snapshot.shape.outputs) / len(self.training)
        return float(torch.special.entr(shares).sum())

    @property
    def shape(self) -> DataShape:
        """What a model reads: the rows as they are preprocessed."""
        raw = self.snapshot.shape
        return replace(raw, features=self.preprocessing.shape_of(raw.features))

    def setting(self, family: Family, objective: MetricName) -> Setting:
        """For trainings of a family on these rows."""
        return Setting(
            family=family,
            shape=self.shape,
            training=self.training,
            validation=self.validation,
            objective=objective,
        )

    @classmethod
    def load(cls, snapshot: Snapshot, device: torch.device, raw: bool | tuple[str, ...] = False) -> "Prepared":
        """Fit the preprocessing, but for the columns that are `raw` (DataConfig)."""
        preprocessing = _fitted(snapshot, snapshot.features("train", device), raw)
        row_bytes = 4 * math.prod(preprocessing.shape_of(snapshot.shape.features))
        needed = row_bytes * (snapshot.row_counts["train"] + snapshot.row_counts["validation"])
        is_streamed = needed > MEMORY_SHARE * memory_bytes(device)
        if is_streamed:
            _logger.info("the rows take %.1f GB and are streamed from %s", needed / 1e9, snapshot.path)

        def split(name: SplitName) -> Split:
            rows = replace(snapshot.features(name, device), transform=preprocessing)
            return Split(features=rows if is_streamed else rows[:], target=snapshot.target(name, device))

        return cls(
            snapshot=snapshot, preprocessing=preprocessing, training=split("train"), validation=split("validation")
        )


def _fitted(snapshot: Snapshot, features: DiskRows, raw: bool | tuple[str, ...]) -> Preprocessing:
    if not snapshot.columns:
        return Standardization.unchanged(features) if raw else Standardization.fit(features)
    every = tuple(column.name for column in snapshot.columns)
    return TablePreprocessing.fit(features, snapshot.columns, every if raw is True else raw or ())
