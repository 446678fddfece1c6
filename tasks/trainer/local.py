"""What trials need of a device, and a trainer that trains them in this process. Imported by the processes that train
(processes.py), so it knows neither MLflow nor the study.
"""

import traceback
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from infra.errors import stopped_by
from models.evaluation.evaluate import latency_ms, parameter_count, predict_outputs
from models.evaluation.metrics import MetricName
from models.families.networks import build_model
from models.fused.train import OnEpoch, Stopped
from models.hyperparameters.declared import Hyperparameters
from models.train import fusion_for, train_all
from models.training.diagnosis import Diagnosis, diagnose
from models.training.terms import Diverged, Epoch, Trained, Training
from models.training.weights import NotKept, write_tensors
from tasks.data.prepared import Prepared
from tasks.job import TuningJob
from tasks.registry.versions import PREPROCESSING, WEIGHTS

REHEARSED_ROWS = 64
OUTPUTS = "outputs.safetensors"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a trial's training was worth: the epoch that its weights are from, every metric on the validation rows, and
    how it learned."""

    kept: Epoch
    validation: dict[MetricName, float]
    diagnosis: Diagnosis


class Failed(Exception):
    """A training raised what nobody expects; carries the sentence, and the traceback as text."""

    def __init__(self, sentence: str, trace: str) -> None:
        super().__init__(sentence, trace)
        self.sentence, self.trace = sentence, trace


class TrainerDied(Exception):
    """The process that trained is gone, by itself or because nothing was heard of it for too long."""


Ended = Scored | Diverged | Stopped | Failed


class Trainer(Protocol):
    """What trials need of a device."""

    device: torch.device

    def members(self, training: Training) -> int:
        """How many trainings of this structure are one computation. Raises what is wrong with the model."""

    def costs(self, hyperparameters: Hyperparameters, needed: Collection[str]) -> dict[str, float]:
        """The model's `parameters`, and its `latency` in milliseconds, if needed. Raises what is wrong with it."""

    def train(self, trainings: Sequence[Training], on_epoch: OnEpoch) -> Iterator[tuple[int, Ended]]:
        """Train each; yields its place and how it ended. Raises what `on_epoch` raises, and TrainerDied."""


class LocalTrainer:
    """Trains in this process."""

    def __init__(self, job: TuningJob, prepared: Prepared) -> None:
        self._prepared = prepared
        self._setting = prepared.setting(job.family, job.search.objective)
        self.device = self._setting.device

    def members(self, training: Training) -> int:
        return fusion_for(self._setting, training).members

    def costs(self, hyperparameters: Hyperparameters, needed: Collection[str]) -> dict[str, float]:
        model = build_model(self._setting.family, hyperparameters, self._setting.shape).to(self.device)
        costs = {}
        if "parameters" in needed:
            costs["parameters"] = float(parameter_count(model))
        if "latency" in needed:
            costs["latency"] = latency_ms(model, self._prepared.training.features[:1])
        return costs

    def rehearse(self, training: Training, folder: Path) -> str | None:
        """Train one step, and write into the folder what a version holds of the model, and its outputs for the first
        raw validation rows. Returns why the model cannot be saved, if so; raises what else is wrong with it."""
        brief = training.hyperparameters.model_copy(update={"epochs": 1, "batch_size": REHEARSED_ROWS})
        some = replace(
            self._setting,
            training=self._prepared.training.first(REHEARSED_ROWS),
            validation=self._prepared.validation.first(REHEARSED_ROWS),
        )
        # Two, which are one computation where trials will be; and alone torch's optimizer imports a second's worth.
        seeds = (training.seed, training.seed + 1)
        trained = dict(train_all(some, [Training(hyperparameters=brief, seed=seed) for seed in seeds]))[0]
        if isinstance(trained, Exception):
            raise trained
        model, preprocessing = trained.model, self._prepared.preprocessing
        rows = self._prepared.snapshot.features("validation", self.device)[:REHEARSED_ROWS]
        outputs = predict_outputs(nn.Sequential(preprocessing, model), rows)
        try:
            write_tensors(model.state_dict(), folder / WEIGHTS)
        except NotKept as error:
            return str(error)
        write_tensors(preprocessing.state_dict(), folder / PREPROCESSING)
        write_tensors({"outputs": outputs}, folder / OUTPUTS)
        return None

    def train(self, trainings: Sequence[Training], on_epoch: OnEpoch) -> Iterator[tuple[int, Ended]]:
        for place, outcome in train_all(self._setting, trainings, on_epoch):
            yield place, self._ended(outcome)

    def _ended(self, outcome: Trained | Exception) -> Ended:
        match outcome:
            case Trained():
                diagnosis = diagnose(outcome.epochs, self._prepared.prior_loss)
                return Scored(kept=outcome.kept, validation=outcome.validation, diagnosis=diagnosis)
            case Diverged() | Stopped():
                return outcome
            case _:
                return failed(outcome)


def failed(error: Exception) -> Failed:
    """A configuration's fault, told in words. Raises the signal or Ctrl-C that the error came of, if it came of one."""
    if (interruption := stopped_by(error)) is not None:
        raise interruption from error
    return Failed(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))
