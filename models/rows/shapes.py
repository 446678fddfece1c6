"""What a model reads and gives. Knows nothing of torch, so that what only describes models is quick to import."""

from dataclasses import dataclass
from typing import Literal

Problem = Literal["classification", "regression"]


@dataclass(frozen=True, kw_only=True)
class DataShape:
    """One row's features, without the batch dimension, and how many outputs a model gives for it: a logit for each
    class, or the one number of a regression."""

    features: tuple[int, ...]
    outputs: int
    problem: Problem = "classification"
