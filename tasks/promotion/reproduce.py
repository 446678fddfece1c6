"""Train a version again from its manifest alone, and say whether the same came out.

The manifest names the data, the split, the hyperparameters and the seeds. Changes nothing in the store.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from infra.device import describe_device
from infra.store.protocol import Store, StoreError
from models.evaluation.evaluate import evaluate
from models.evaluation.metrics import METRICS
from models.families.errors import ModelError
from models.families.family import family_named
from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.data.snapshots import Snapshot, fetch_snapshot
from tasks.job import DataConfig
from tasks.promotion.confirm import assemble, train_seeds
from tasks.registry.champion import read_version
from tasks.registry.versions import Manifest

TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What a second training came to. `metrics` are on the test rows, published and again, by name. A metric is near
    where it moved by at most 0.01, or by one per cent where it is above 1."""

    version: str
    bit_equal: bool
    published_on: str
    trained_on: str
    metrics: dict[str, tuple[float, float]]

    @property
    def near(self) -> bool:
        return all(abs(again - was) <= TOLERANCE * max(1.0, abs(was)) for was, again in self.metrics.values())


def reproduce(store: Store, job: str, version: str, snapshots: Path, device: torch.device) -> Reproduction:
    """Retrain a version of a job on the device.

    The snapshot is the one of that fingerprint, here or in the store, else the source is read again. Raises StoreError:
    the version cannot be read, its data is gone or has changed, its code has changed, or it is of an earlier format
    that did not record enough; DataError where the source cannot be read.
    """
    published = read_version(store, job, version, device)
    manifest, lineage = published.manifest, published.manifest.lineage
    objective = next((name for name in METRICS if name == lineage.objective), None)
    if objective is None or lineage.validation_fraction is None or lineage.test_fraction is None:
        raise StoreError(f"version {version} of job {job} was published before versions could be reproduced")
    try:
        family = family_named(manifest.model)
    except ModelError as error:
        raise StoreError(f"version {version} of job {job} needs its model's code, but {error}") from error
    if family.code != lineage.model_code:
        raise StoreError(f"the code of {manifest.model} has changed since version {version}; put the earlier one back")
    snapshot = _snapshot(store, manifest, snapshots)
    prepared = Prepared.load(snapshot, device, _data(manifest).raw)
    hyperparameters = family.hyperparameters.from_values(manifest.hyperparameters)
    together = [lineage.trained_with] if lineage.trained_with else [(seed,) for seed in lineage.seeds]
    trained = {
        seed: outcome
        for seeds in together
        for seed, outcome in zip(seeds, train_seeds(family, objective, hyperparameters, prepared, seeds), strict=True)
    }
    models = []
    for outcome in (trained[seed] for seed in lineage.seeds):
        if isinstance(outcome, Exception):
            raise StoreError(f"version {version} of job {job} cannot be trained here: {outcome}") from outcome
        models.append(outcome.model)
    model = assemble(models)
    features, target = snapshot.features("test", device), snapshot.target("test", device)
    again = evaluate(nn.Sequential(prepared.preprocessing, model), features, target)
    was = evaluate(nn.Sequential(published.preprocessing, published.model), features, target)
    weights, weights_again = published.model.state_dict(), model.state_dict()
    return Reproduction(
        version=version,
        bit_equal=all(torch.equal(weights[name], weights_again[name]) for name in weights),
        published_on=lineage.device,
        trained_on=describe_device(device),
        metrics={name: (was[name], again[name]) for name in was},
    )


def _snapshot(store: Store, manifest: Manifest, snapshots: Path) -> Snapshot:
    lineage = manifest.lineage
    kept = fetch_snapshot(store, snapshots, lineage.snapshot)
    if kept is not None:
        return kept
    snapshot = prepare(_data(manifest), manifest.problem, snapshots)
    if snapshot.fingerprint != lineage.snapshot:
        raise StoreError(
            f"snapshot {lineage.snapshot} is neither in {snapshots} nor in {store.url}, and {lineage.source} has "
            f"changed since (it gives {snapshot.fingerprint} now); copy the snapshot from the machine that made it"
        )
    return snapshot


def _data(manifest: Manifest) -> DataConfig:
    """How a version's source was read and split."""
    lineage = manifest.lineage
    fractions = {"validation_fraction": lineage.validation_fraction, "test_fraction": lineage.test_fraction}
    return DataConfig.model_validate({**lineage.data, "source": lineage.source, **fractions})
