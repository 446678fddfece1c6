"""What is tuned: the hyperparameters, the domain each is searched in, and how a trial's are drawn.

The one idea: a family declares its hyperparameters as a typed class and a default domain for each; a job overrides
domains by name, in the same vocabulary. Knows nothing of training.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import optuna
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

Value = bool | int | float | str
OptimizerName = Literal["sgd", "momentum", "adam", "adamw", "rmsprop"]


class Range(BaseModel):
    """Every value from low to high, both included; with `log`, spread evenly over the orders of magnitude."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _low_below_high(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low must be below high, found low {self.low:g} and high {self.high:g}; swap them")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range must begin above 0, found low {self.low:g}; raise low or drop log")
        return self


Choices = Annotated[tuple[Value, ...], Field(min_length=1)]
Domain = Range | Choices | Value
Space = Mapping[str, Domain]


class Hyperparameters(BaseModel):
    """What every family is trained with. A family adds its own by subclassing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    optimizer: OptimizerName
    weight_decay: float = Field(ge=0)
    epochs: int = Field(ge=1)

    default_space: ClassVar[Space] = {
        "learning_rate": Range(low=1e-4, high=3e-2, log=True),
        "batch_size": (16, 32, 64, 128, 256),
        "optimizer": ("sgd", "momentum", "adam", "adamw", "rmsprop"),
        "weight_decay": Range(low=1e-6, high=1e-2, log=True),
        "epochs": 12,
    }


class MLPHyperparameters(Hyperparameters):
    """Layers of equal width, each followed by ReLU and dropout."""

    depth: int = Field(ge=1)
    width: int = Field(ge=1)
    dropout: float = Field(ge=0, lt=1)

    default_space: ClassVar[Space] = {
        **Hyperparameters.default_space,
        "depth": Range(low=1, high=3),
        "width": (32, 64, 128, 256),
        "dropout": Range(low=0.0, high=0.5),
    }


class CNNHyperparameters(Hyperparameters):
    """Blocks of convolution, ReLU and pooling whose channels double from block to block."""

    depth: int = Field(ge=1, le=4)
    channels: int = Field(ge=1)
    dropout: float = Field(ge=0, lt=1)

    default_space: ClassVar[Space] = {
        **Hyperparameters.default_space,
        "depth": Range(low=1, high=3),
        "channels": (8, 16, 32),
        "dropout": Range(low=0.0, high=0.5),
    }


def search_space(declared: type[Hyperparameters], overrides: Mapping[str, Any]) -> dict[str, Domain]:
    """The family's default domains with a job's overrides by name: a range, a list of choices, or one fixed value.

    Raises ValueError: an unknown name (the known ones are listed), or a value that the hyperparameter cannot take.
    """
    for name in overrides:
        if name not in declared.model_fields:
            known = ", ".join(declared.model_fields)
            raise ValueError(f"{name} is not a hyperparameter of this model; known are {known}")
    return {
        name: _parse_domain(declared, name, overrides[name]) if name in overrides else declared.default_space[name]
        for name in declared.model_fields
    }


def suggest(trial: optuna.Trial, declared: type[Hyperparameters], space: Space) -> Hyperparameters:
    """Draw a trial's hyperparameters; a fixed value takes no part in the search and is not a parameter of the trial."""
    drawn: dict[str, Value] = {}
    for name, domain in space.items():
        if isinstance(domain, Range):
            if declared.model_fields[name].annotation is int:
                drawn[name] = trial.suggest_int(name, int(domain.low), int(domain.high), log=domain.log)
            else:
                drawn[name] = trial.suggest_float(name, domain.low, domain.high, log=domain.log)
        elif isinstance(domain, tuple):
            drawn[name] = cast(Value, trial.suggest_categorical(name, domain))
        else:
            drawn[name] = domain
    return declared.model_validate(drawn)


def complete(declared: type[Hyperparameters], space: Space, params: Mapping[str, Any]) -> Hyperparameters:
    """The hyperparameters of a finished trial: its parameters and the space's fixed values."""
    fixed = {name: domain for name, domain in space.items() if not isinstance(domain, Range | tuple)}
    return declared.model_validate({**fixed, **params})


def _parse_domain(declared: type[Hyperparameters], name: str, domain: Any) -> Domain:
    if isinstance(domain, Mapping):
        try:
            chosen = Range.model_validate(domain)
        except ValidationError as error:
            raise ValueError(f"{name}: {_first_reason(error)}") from error
        for end in (chosen.low, chosen.high):
            _check_value(declared, name, end)
        return chosen
    if isinstance(domain, list | tuple):
        if not domain:
            raise ValueError(f"{name}: choices must not be empty; give one at least")
        return tuple(_check_value(declared, name, value) for value in domain)
    return _check_value(declared, name, domain)


def _check_value(declared: type[Hyperparameters], name: str, value: Any) -> Value:
    field = declared.model_fields[name]
    rule: TypeAdapter[Value] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
    try:
        return rule.validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{name}: {_first_reason(error)}, found {value!r}") from error


def _first_reason(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason
