"""The job as a whole: what is tuned, on which data, with what budget, and when it is promoted.

A name and a data source are enough. Knows nothing of the steps, nor of how a file is read.
"""

import hashlib
import re
from functools import cached_property
from typing import Self

from pydantic import Field, field_validator, model_validator

from models.evaluation.metrics import METRICS, Metric
from models.families.family import Family, family_named
from models.hyperparameters.declarations import Declared
from models.hyperparameters.domains import Domain, Range
from models.hyperparameters.rules import Refused
from tasks.job.sections import (
    BudgetConfig,
    ConfirmConfig,
    CostName,
    DataConfig,
    PromotionConfig,
    ScheduleConfig,
    SearchConfig,
    Text,
    TrackingConfig,
)

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"


class TuningJob(Declared):
    """A named tuning set-up. One YAML file, one Prefect deployment and one MLflow experiment each."""

    name: str = Field(examples=["my-job"])
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**32)
    data: DataConfig
    model: Text = "mlp"
    search: SearchConfig = SearchConfig()
    budget: BudgetConfig = BudgetConfig()
    confirm: ConfirmConfig = ConfirmConfig()
    promotion: PromotionConfig = PromotionConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("name")
    @classmethod
    def _name_is_one_of_files(cls, name: str) -> str:
        if re.fullmatch(NAME_PATTERN, name) is None:
            rule = "must be of small letters, digits, dots, dashes and underscores, 64 at most, a letter or digit first"
            raise ValueError(f"{rule}; rename the job and its file")
        return name

    @field_validator("model")
    @classmethod
    def _model_is_known(cls, model: str) -> str:
        family_named(model)
        return model

    @model_validator(mode="after")
    def _space_fits_the_model(self) -> Self:
        try:
            _ = self.space
        except Refused as error:
            raise Refused(*(mistake.below("search", "space") for mistake in error.mistakes)) from error
        return self

    @cached_property
    def family(self) -> Family:
        """Loaded with the job, so that a night keeps to the code it began with."""
        return family_named(self.model)

    @cached_property
    def space(self) -> dict[str, Domain]:
        """What the study searches: with sampler grid each range is its points."""
        overrides = self.search.space
        return (
            self.family.grid_space(overrides) if self.search.sampler == "grid" else self.family.search_space(overrides)
        )

    @property
    def limits(self) -> dict[CostName, tuple[str, float]]:
        """What a model may cost at most: the field that says so, and its value."""
        limits: dict[CostName, tuple[str, float | None]] = {
            "parameters": ("search.max_parameters", self.search.max_parameters),
            "latency": ("search.max_latency_ms", self.search.max_latency_ms),
        }
        return {name: (field, limit) for name, (field, limit) in limits.items() if limit is not None}

    @property
    def experiment(self) -> str:
        """What its experiment in MLflow is called."""
        return self.tracking.experiment or self.name

    @property
    def registered_model(self) -> str:
        """What its registered model in MLflow is called."""
        return self.tracking.model or self.name

    @property
    def most_epochs(self) -> int:
        domain = self.space["epochs"]
        ends = (domain.high,) if isinstance(domain, Range) else domain if isinstance(domain, tuple) else (domain,)
        return max(int(end) for end in ends)

    @property
    def objective(self) -> Metric:
        return METRICS[self.search.objective]

    @property
    def search_digest(self) -> str:
        """Equal for two jobs whose studies mean the same: what is drawn and how it is scored, whatever the budget."""
        content = self.model_dump_json(include={"seed", "data", "model", "search"}) + (self.family.code or "")
        return hashlib.sha256(content.encode()).hexdigest()[:16]
