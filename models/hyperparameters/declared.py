"""What is tuned: the hyperparameters of training and of each family, with the default domain of each.

A field's default is the textbook's: a class without arguments is the baseline of every night. A job may
search, choose from or fix each of them by name. Knows nothing of how they are used.
"""

import json
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, JsonValue

from models.hyperparameters.domains import Range, Searchable, Space, When

OptimizerName = Literal["sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "adagrad"]
ScheduleName = Literal["constant", "step", "exponential", "cosine", "one_cycle", "plateau"]
ActivationName = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh"]
InitialisationName = Literal["pytorch", "kaiming", "xavier", "orthogonal"]

MAX_DEPTH = 10
# Above these no machine has the memory, or no night the time.
MOST_EPOCHS, MOST_BATCH, MOST_WIDTH, MOST_CHANNELS = 100_000, 2**20, 2**16, 2**12


class Hyperparameters(Searchable):
    """What every model is trained with, the user's own too.

    Durations within a training are shares of it, so that they keep their meaning when `epochs` changes.
    """

    epochs: int = Field(default=10, ge=1, le=MOST_EPOCHS)
    batch_size: int = Field(default=64, ge=1, le=MOST_BATCH)
    learning_rate: float = Field(default=0.01, gt=0)
    # linear: learning_rate is meant for a batch of 256 and grows with the batch (Goyal et al., arXiv 1706.02677).
    learning_rate_scaling: Literal["none", "linear"] = "none"
    schedule: ScheduleName = "constant"
    warmup: float = Field(default=0.0, ge=0, le=0.5)
    step_every: float = Field(default=0.3, gt=0, lt=1)
    step_factor: float = Field(default=0.1, gt=0, lt=1)
    exponential_final: float = Field(default=0.01, gt=0, le=1)
    cosine_final: float = Field(default=0.0, ge=0, le=1)
    one_cycle_peak: float = Field(default=0.3, gt=0, lt=1)
    plateau_factor: float = Field(default=0.5, gt=0, lt=1)
    plateau_patience: int = Field(default=2, ge=1)
    optimizer: OptimizerName = "adam"
    momentum: float = Field(default=0.9, gt=0, lt=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    rmsprop_alpha: float = Field(default=0.99, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    l1: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    gradient_clip_norm: float = Field(default=0.0, ge=0)
    early_stopping_patience: int = Field(default=0, ge=0)

    # What a model's shape, a batch's size and the number of steps depend on: trainings that are equal in it can be
    # fused. Epochs need not be equal for that, but those that end early leave the others a device half used.
    structure: ClassVar[tuple[str, ...]] = ("epochs", "batch_size")
    default_space: ClassVar[Space] = {
        "epochs": 20,
        "batch_size": (16, 32, 64, 128, 256),
        "learning_rate": Range(low=3e-4, high=1e-1, log=True, points=4),
        "learning_rate_scaling": "none",
        "schedule": ("constant", "cosine", "one_cycle"),
        "warmup": 0.0,
        "step_every": 0.3,
        "step_factor": 0.1,
        "exponential_final": 0.01,
        "cosine_final": 0.0,
        "one_cycle_peak": 0.3,
        "plateau_factor": 0.5,
        "plateau_patience": 2,
        "optimizer": ("sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "adagrad"),
        "momentum": 0.9,
        "beta1": 0.9,
        "beta2": 0.999,
        "rmsprop_alpha": 0.99,
        "eps": 1e-8,
        "l1": 0.0,
        "weight_decay": Range(low=1e-6, high=1e-2, log=True, points=3),
        "label_smoothing": 0.0,
        "gradient_clip_norm": 0.0,
        "early_stopping_patience": 0,
    }
    conditions: ClassVar[Mapping[str, When]] = {
        # One-cycle has a rise of its own.
        "warmup": When("schedule", ("constant", "step", "exponential", "cosine", "plateau")),
        "step_every": When("schedule", ("step",)),
        "step_factor": When("schedule", ("step",)),
        "exponential_final": When("schedule", ("exponential",)),
        "cosine_final": When("schedule", ("cosine",)),
        "one_cycle_peak": When("schedule", ("one_cycle",)),
        "plateau_factor": When("schedule", ("plateau",)),
        "plateau_patience": When("schedule", ("plateau",)),
        "momentum": When("optimizer", ("momentum", "nesterov")),
        "beta1": When("optimizer", ("adam", "adamw")),
        "beta2": When("optimizer", ("adam", "adamw")),
        "rmsprop_alpha": When("optimizer", ("rmsprop",)),
        "eps": When("optimizer", ("adam", "adamw", "rmsprop", "adagrad")),
    }


class MLPHyperparameters(Hyperparameters):
    """Hidden layers that are equally wide, or taper: each has `taper` times the width of the one before (width 512,
    depth 3 and taper 0.5 make 512-256-128)."""

    depth: int = Field(default=1, ge=1, le=MAX_DEPTH)
    width: int = Field(default=50, ge=1, le=MOST_WIDTH)
    taper: float = Field(default=1.0, gt=0, le=1)
    activation: ActivationName = "relu"
    initialisation: InitialisationName = "pytorch"
    dropout: float = Field(default=0.0, ge=0, lt=1)

    structure: ClassVar[tuple[str, ...]] = (*Hyperparameters.structure, "depth", "width", "taper", "activation")
    default_space: ClassVar[Space] = {
        **Hyperparameters.default_space,
        "depth": Range(low=1, high=3, points=3),
        "width": Range(low=16, high=256, log=True, points=3),
        "taper": (1.0, 0.5),
        "activation": "relu",
        "initialisation": "pytorch",
        "dropout": Range(low=0.0, high=0.5, points=3),
    }
    conditions: ClassVar[Mapping[str, When]] = {
        **Hyperparameters.conditions,
        "taper": When("depth", range(2, MAX_DEPTH + 1)),
    }


class CNNHyperparameters(Hyperparameters):
    """Blocks of convolution, activation and pooling whose channels double from block to block (64-128-256)."""

    depth: int = Field(default=2, ge=1, le=4)
    channels: int = Field(default=32, ge=1, le=MOST_CHANNELS)
    batch_norm: bool = False
    activation: ActivationName = "relu"
    initialisation: InitialisationName = "pytorch"
    dropout: float = Field(default=0.0, ge=0, lt=1)

    structure: ClassVar[tuple[str, ...]] = (*Hyperparameters.structure, "depth", "channels", "batch_norm", "activation")
    default_space: ClassVar[Space] = {
        **Hyperparameters.default_space,
        "depth": Range(low=1, high=3, points=3),
        "channels": (8, 16, 32),
        "batch_norm": (False, True),
        "activation": "relu",
        "initialisation": "pytorch",
        "dropout": Range(low=0.0, high=0.5, points=3),
    }


class OwnHyperparameters(Hyperparameters):
    """Training as for every model, and in `own` whatever the user's `suggest` returned."""

    own: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def built_from(self) -> str:
        """All that the user's constructor gets, beside the shape of the rows."""
        return json.dumps(self.own, sort_keys=True)


def in_words(values: Mapping[str, object]) -> str:
    """`learning_rate 0.00298, batch_size 32`: names and values for a table, numbers to four digits."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
