"""The test rows that a night is judged on, which the champion did not see either, and what both models give there."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.evaluation.comparison import Comparison, calibration_error, compare, interval, slice_gains
from models.evaluation.evaluate import latency_ms, predict_outputs, score
from models.evaluation.metrics import MetricName, in_figures, metrics_of
from models.rows.batches import DiskRows
from models.rows.table import recode
from tasks.data.prepare import first_test_moment, names_and_roles
from tasks.data.snapshots import Snapshot
from tasks.job import DataConfig, TuningJob
from tasks.promotion.confirm import Challenger
from tasks.promotion.verdict import GuardRail, Verdict
from tasks.registry.champion import Champion
from tasks.registry.versions import FORMAT_OF_EXACT_ROWS
from tasks.study.studies import derived_seed
from tasks.trainer.fresh import MOST_ROWS

MEGABYTE = 1_000_000
# How far a moment could be rounded where it was kept as days in float32.
ROUNDED_MICROSECONDS = 84_375_000


@dataclass(frozen=True)
class JudgedRows:
    """The rows that a job's models are judged on, and what is measured there."""

    job: TuningJob
    snapshot: Snapshot
    features: DiskRows
    all_targets: Tensor
    all_groups: Tensor
    chosen: Tensor

    @property
    def target(self) -> Tensor:
        return self.all_targets[self.chosen]

    @property
    def groups(self) -> Tensor:
        """Copies of a row, and rows of one value of `data.split_by`, are one observation."""
        return self.all_groups[self.chosen.cpu()]

    def outputs(self, found: Challenger) -> Tensor:
        return self._all_outputs(found)[self.chosen]

    def _all_outputs(self, found: Challenger) -> Tensor:
        return predict_outputs(nn.Sequential(found.preprocessing, found.model), self.features)

    def recoded_for(self, champion: Champion) -> DiskRows:
        """The features, all of them, with the champion's own columns and list of categories."""
        known, wanted = self.snapshot.columns, champion.columns
        if not known or known == wanted:
            return self.features

        def recoded(rows: Tensor) -> Tensor:
            return torch.from_numpy(recode(rows.cpu().numpy(), known, wanted)).to(rows.device)

        return replace(self.features, transform=recoded)

    def metrics(self, outputs: Tensor) -> dict[MetricName, float]:
        return score(outputs, self.target, metrics_of(self.job.objective.problem))

    def verdict(self, challenger: Challenger, **found: Any) -> Verdict:
        outputs = self._all_outputs(challenger)
        judged = outputs[self.chosen]
        names = metrics_of(self.job.objective.problem)
        seed = derived_seed(self.job.seed, "interval", 0)
        return Verdict(
            challenger=challenger,
            challenger_test=self.metrics(judged),
            intervals={name: interval(judged, self.target, name, seed=seed, groups=self.groups) for name in names},
            outputs=outputs[:MOST_ROWS].cpu(),
            **found,
        )

    def compare(self, ours: Tensor, theirs: Tensor, judged: int) -> Comparison:
        return compare(
            ours,
            theirs,
            self.target,
            self.job.search.objective,
            confidence=self.job.promotion.confidence,
            seed=derived_seed(self.job.seed, "gate", judged),
            groups=self.groups,
        )

    def slice_rail(self, ours: Tensor, theirs: Tensor) -> tuple[GuardRail, ...]:
        """The slice that surely fell the most; none where the job sets no limit."""
        most = self.job.promotion.max_slice_fall
        if most is None:
            return ()
        gains = slice_gains(
            ours,
            theirs,
            self.target,
            self.snapshot.classes,
            confidence=self.job.promotion.confidence,
            seed=derived_seed(self.job.seed, "slices", 0),
            groups=self.groups,
        )
        worst = min(gains, key=lambda found: (found.high, found.gain))
        change = "falls" if worst.gain < 0 else "rises"
        evidence = (
            f"{worst.name} {change} by {in_figures(abs(worst.gain))} on {worst.rows} rows, surely falls by "
            f"{in_figures(max(0.0, -worst.high))} of max_slice_fall {most:g}"
        )
        return (GuardRail(name="worst slice", holds=worst.high >= -most, evidence=evidence),)

    def limits(self, found: Challenger, outputs: Tensor) -> tuple[GuardRail, ...]:
        """The guard rails that speak of one model alone, where the job sets their limits."""
        served = nn.Sequential(found.preprocessing, found.model)
        promotion = self.job.promotion
        limits: list[tuple[str, str, float | None, Callable[[], float]]] = [
            ("latency", "max_latency_ms", promotion.max_latency_ms, lambda: latency_ms(served, self.features[:1])),
            ("size", "max_megabytes", promotion.max_megabytes, lambda: _megabytes(served)),
        ]
        if outputs.ndim == 2:
            calibration = promotion.max_calibration_error
            limits.append(
                (
                    "calibration error",
                    "max_calibration_error",
                    calibration,
                    lambda: calibration_error(outputs, self.target),
                )
            )
        rails = []
        for name, job_field, limit, measure in limits:
            if limit is not None:
                value = measure()
                rails.append(
                    GuardRail(name=name, holds=value <= limit, evidence=f"{value:.4g} of {job_field} {limit:g}")
                )
        return tuple(rails)


def reads(champion: Champion, snapshot: Snapshot) -> bool:
    """Whether the champion can answer tonight's rows: a table may have more columns than it reads."""
    manifest = champion.manifest
    if (manifest.problem, manifest.classes) != (snapshot.shape.problem, snapshot.classes):
        return False
    if bool(champion.columns) != bool(snapshot.columns):
        return False
    if not champion.columns:
        return manifest.features == snapshot.shape.features
    return set(names_and_roles(champion.columns)) <= set(names_and_roles(snapshot.columns))


def unseen_by(champion: Champion, snapshot: Snapshot, job: TuningJob) -> Tensor:
    """Of each test row, whether it was a test row too when the champion was made."""
    lineage, positions = champion.manifest.lineage, snapshot.test_positions()
    split_otherwise = any(lineage.data.get(name) != getattr(job.data, name) for name in ("split_by", "time_column"))
    # With a column more each row has another hash, and may be on another side.
    by_content = job.data.split_by is None and job.data.time_column is None
    if split_otherwise or (by_content and names_and_roles(champion.columns) != names_and_roles(snapshot.columns)):
        return torch.zeros_like(positions, dtype=torch.bool)
    was_exact = champion.manifest.format >= FORMAT_OF_EXACT_ROWS
    if job.data.time_column is not None:
        begin = first_test_moment(DataConfig.model_validate({**lineage.data, "source": lineage.source}))
        return positions >= (begin if was_exact else begin + ROUNDED_MICROSECONDS)
    if lineage.test_fraction is None:
        return torch.ones_like(positions, dtype=torch.bool)
    unseen = positions < lineage.test_fraction
    return unseen if was_exact or not by_content else unseen & _is_narrow(snapshot)


def seen_in_words(champion: Champion) -> str:
    seen, lineage = "the champion may have been trained on each of tonight's test rows", champion.manifest.lineage
    if champion.manifest.format < FORMAT_OF_EXACT_ROWS:
        return f"{seen}: it is of a time when rows were split by rounded numbers; give the job a new name"
    return (
        f"{seen}: put data.test_fraction back to {lineage.test_fraction}, and data.split_by and data.time_column to "
        f"{lineage.data.get('split_by')} and {lineage.data.get('time_column')}, or give the job a new name"
    )


def _is_narrow(snapshot: Snapshot) -> Tensor:
    """Of each test row, whether float32 holds its features, so that it has the hash that it always had."""
    features = snapshot.features("test", torch.device("cpu"))
    narrow = replace(features, transform=lambda rows: ((rows.float() == rows) | rows.isnan()).flatten(1).all(dim=1))
    return narrow[:]


def _megabytes(model: nn.Module) -> float:
    return float(sum(tensor.nbytes for tensor in model.state_dict().values())) / MEGABYTE
