"""What a hyperparameter may be: a range, a list of choices, or one fixed value; and how a trial draws from that.

The one idea: every hyperparameter has a domain, and some are drawn only when another has a given value (`When`).
A job overrides domains by name, in the same vocabulary. Knows nothing of which hyperparameters there are.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, cast

import numpy as np
import optuna
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

Value = bool | int | float | str


class Range(BaseModel):
    """Every value from low to high, both included; with `log`, spread evenly over the orders of magnitude.

    `points` is how many of them a grid takes, the ends among them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    low: float
    high: float
    log: bool = False
    points: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _low_below_high(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low must be below high, found low {self.low:g} and high {self.high:g}; swap them")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range must begin above 0, found low {self.low:g}; raise low or drop log")
        return self

    def spread(self, points: int, *, whole: bool) -> tuple[float, ...]:
        """Points at equal distances, whole numbers where asked for (fewer, where two would round to the same)."""
        values = (np.geomspace if self.log else np.linspace)(self.low, self.high, points)
        if whole:
            return tuple(dict.fromkeys(round(value) for value in values.tolist()))
        return tuple(values.tolist())


Choices = Annotated[tuple[Value, ...], Field(min_length=1)]
Domain = Range | Choices | Value
Space = Mapping[str, Domain]


@dataclass(frozen=True)
class When:
    """A hyperparameter that matters only where `parent` has one of `values`; elsewhere it keeps its default."""

    parent: str
    values: Collection[Value]


class Searchable(BaseModel):
    """Hyperparameters with a domain each. A field's default is its value where it does not matter, and in the
    baseline."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    default_space: ClassVar[Space] = {}
    conditions: ClassVar[Mapping[str, When]] = {}

    @classmethod
    def search_space(cls, overrides: Mapping[str, Any]) -> dict[str, Domain]:
        """The default domains with a job's overrides by name.

        Raises ValueError: a value that the hyperparameter cannot take, or an override that could never matter.
        """
        space = {
            name: cls._parse_domain(name, overrides[name]) if name in overrides else cls.default_space[name]
            for name in cls.default_space
        }
        for name in overrides:
            when = cls.conditions.get(name)
            if when is not None and not any(value in when.values for value in _values(space[when.parent])):
                raise ValueError(
                    f"{name} matters only where {when.parent} is {' or '.join(str(value) for value in when.values)}, "
                    f"found {when.parent} {space[when.parent]}; remove {name} or widen {when.parent}"
                )
        return space

    @classmethod
    def draw(cls, trial: optuna.Trial, space: Space) -> dict[str, Value]:
        """Draw what matters; a fixed value takes no part in the search and is not a parameter of the trial."""
        drawn: dict[str, Value] = {}
        for name, domain in space.items():
            when = cls.conditions.get(name)
            if when is None or drawn[when.parent] in when.values:
                drawn[name] = draw(trial, name, domain, whole=cls._is_whole(name))
            else:
                drawn[name] = cls.default_of(name)
        return drawn

    @classmethod
    def nearest(cls, wished: Mapping[str, Any], space: Space) -> dict[str, Value]:
        """The parameters of a trial that comes as near to the wished values as the space allows: a number is moved
        into its range, a choice that is missing becomes the first (for numbers, the nearest)."""
        drawn: dict[str, Value] = {}
        searched: dict[str, Value] = {}
        for name, domain in space.items():
            when = cls.conditions.get(name)
            if when is not None and drawn[when.parent] not in when.values:
                drawn[name] = cls.default_of(name)
                continue
            drawn[name] = _nearest(domain, wished.get(name, cls.default_of(name)))
            if isinstance(domain, Range | tuple):
                searched[name] = drawn[name]
        return searched

    @classmethod
    def grid_space(cls, space: Space) -> dict[str, Domain]:
        """The space with each range cut into its points. Raises ValueError where a range does not say how many."""
        missing = [name for name, domain in space.items() if isinstance(domain, Range) and domain.points is None]
        if missing:
            raise ValueError(
                f"{missing[0]}: a grid takes points of a range, found none; add for example `points: 5`"
                + (f", and to {', '.join(missing[1:])} too" if missing[1:] else "")
            )
        return {
            name: domain.spread(domain.points, whole=cls._is_whole(name))
            if isinstance(domain, Range) and domain.points is not None
            else domain
            for name, domain in space.items()
        }

    @classmethod
    def default_of(cls, name: str) -> Value:
        return cast(Value, cls.model_fields[name].default)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Validate values by name. Raises ValueError that names the field, the rule and the value found."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ValueError(f"{_first_reason(error)}, found {error.errors()[0]['input']!r}") from error

    @classmethod
    def _is_whole(cls, name: str) -> bool:
        field = cls.model_fields.get(name)
        return field is not None and field.annotation is int

    @classmethod
    def _parse_domain(cls, name: str, domain: Any) -> Domain:
        parsed = parse_domain(name, domain)
        if isinstance(parsed, Range):
            for end in (parsed.low, parsed.high):
                cls._check_value(name, end)
            return parsed
        if isinstance(parsed, tuple):
            return tuple(cls._check_value(name, value) for value in parsed)
        return cls._check_value(name, parsed)

    @classmethod
    def _check_value(cls, name: str, value: Value) -> Value:
        field = cls.model_fields[name]
        rule: TypeAdapter[Value] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
        try:
            return rule.validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{name}: {_first_reason(error)}, found {value!r}") from error


def parse_domain(name: str, domain: Any) -> Domain:
    """A domain as a job writes it: `{low, high}`, a list, or one value. Raises ValueError with the rule it breaks."""
    if isinstance(domain, Mapping):
        try:
            return Range.model_validate(dict(domain))
        except ValidationError as error:
            raise ValueError(f"{name}: {_first_reason(error)}") from error
    if isinstance(domain, list | tuple):
        if not domain:
            raise ValueError(f"{name}: choices must not be empty; give one at least")
        return tuple(domain)
    return cast(Value, domain)


def draw(trial: optuna.Trial, name: str, domain: Domain, *, whole: bool) -> Value:
    """Draw one value from its domain."""
    if isinstance(domain, Range):
        if whole:
            return trial.suggest_int(name, int(domain.low), int(domain.high), log=domain.log)
        return trial.suggest_float(name, domain.low, domain.high, log=domain.log)
    if isinstance(domain, tuple):
        return cast(Value, trial.suggest_categorical(name, domain))
    return domain


def contains(domain: Domain, value: object) -> bool:
    """Whether the value could be drawn from the domain."""
    if isinstance(domain, Range):
        return isinstance(value, int | float) and domain.low <= value <= domain.high
    return value in _values(domain)


def _values(domain: Domain) -> tuple[Value, ...]:
    """The values of a domain that a condition could ask for; a range of whole numbers counts with all of them."""
    if isinstance(domain, Range):
        return tuple(range(int(domain.low), int(domain.high) + 1))
    return domain if isinstance(domain, tuple) else (domain,)


def _nearest(domain: Domain, wished: Any) -> Value:
    if isinstance(domain, Range):
        return type(wished)(min(max(wished, domain.low), domain.high))  # type: ignore[no-any-return]
    if not isinstance(domain, tuple):
        return domain
    if wished in domain:
        return cast(Value, wished)
    numbers = [value for value in domain if isinstance(value, int | float) and not isinstance(value, bool)]
    if numbers and isinstance(wished, int | float):
        return min(numbers, key=lambda value: abs(value - wished))
    return domain[0]


def _first_reason(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason
