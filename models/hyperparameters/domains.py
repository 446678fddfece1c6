"""What a hyperparameter may be: a range, a list of choices, or one fixed value; and how a trial draws from that.

The one idea: every hyperparameter has a domain, and some are drawn only when another has a given value (`When`).
A job overrides domains by name, in the same vocabulary. Knows nothing of which hyperparameters there are.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, cast

import numpy as np
from pydantic import Field, ValidationError, model_validator

from models.hyperparameters.declarations import Declared
from models.hyperparameters.mistakes import mistakes_of
from models.hyperparameters.rules import Mistake, Refused

if TYPE_CHECKING:
    import optuna

MOST_POINTS = 1000

Value = bool | int | float | str


class Range(Declared):
    """Every value from low to high, both included; with `log`, spread evenly over the orders of magnitude.

    `points` is how many of them a grid takes, the ends among them.
    """

    noun: ClassVar[str] = "a range"

    low: float
    high: float
    log: bool = False
    points: int | None = Field(default=None, ge=2, le=MOST_POINTS, examples=[5])

    @model_validator(mode="after")
    def _low_below_high(self) -> "Range":
        if self.low == self.high:
            raise ValueError(f"low must be below high, found {self.low:g} for both; write that value alone to fix it")
        if self.low > self.high:
            raise ValueError(f"low must be below high, found low {self.low:g} and high {self.high:g}; swap them")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range must begin above 0, found low {self.low:g}; raise low or drop log")
        if not math.isfinite(self.high - self.low):
            raise ValueError(f"high less low must be finite, found {self.low:g} to {self.high:g}; narrow the range")
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


class Searchable(Declared):
    """Hyperparameters with a domain each. A field's default is its value where it does not matter, and in the
    baseline."""

    default_space: ClassVar[Space] = {}
    conditions: ClassVar[Mapping[str, When]] = {}

    @classmethod
    def search_space(cls, overrides: Mapping[str, Any]) -> dict[str, Domain]:
        """The default domains with a job's overrides by name.

        Raises Refused, with every mistake: a value that the hyperparameter cannot take, or an override that could never
        matter.
        """
        space: dict[str, Domain] = dict(cls.default_space)
        mistakes: list[Mistake] = []
        for name, domain in overrides.items():
            try:
                space[name] = cls._parse_domain(name, domain)
            except Refused as error:
                mistakes += error.mistakes
        wrong = {mistake.field[0] for mistake in mistakes}
        for name, domain in overrides.items():
            when = cls.conditions.get(name)
            if (
                when is None
                or wrong & {name, when.parent}
                or any(value in when.values for value in _values(space[when.parent]))
            ):
                continue
            fitting = " or ".join(str(value) for value in when.values)
            mistakes.append(
                Mistake(
                    field=(name,),
                    rule=f"matters only where {when.parent} is {fitting}, which it never is here",
                    found=domain,
                    remedy=f"remove {name} or widen {when.parent}",
                )
            )
        if mistakes:
            raise Refused(*mistakes)
        return space

    @classmethod
    def searched(cls, space: Space) -> list[str]:
        """The names that a trial may draw: with several values, where the hyperparameter can matter."""
        names = []
        for name, domain in space.items():
            when = cls.conditions.get(name)
            matters = when is None or any(value in when.values for value in _values(space[when.parent]))
            if matters and (isinstance(domain, Range) or (isinstance(domain, tuple) and len(domain) > 1)):
                names.append(name)
        return names

    @classmethod
    def draw(cls, trial: "optuna.Trial", space: Space) -> dict[str, Value]:
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
        """The space with each range cut into its points. Raises Refused where ranges do not say how many."""
        missing = [name for name, domain in space.items() if isinstance(domain, Range) and domain.points is None]
        if missing:
            raise Refused(
                *(
                    Mistake(
                        field=(name,), rule="a grid takes points of a range, found none",
                        remedy="add for example `points: 5`",
                    )
                    for name in missing
                )
            )  # fmt: skip
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
        """Validate values by name. Raises Refused, which is a ValueError, with every mistake."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise Refused(*mistakes_of(cls, error)) from error

    @classmethod
    def _is_whole(cls, name: str) -> bool:
        field = cls.model_fields.get(name)
        return field is not None and field.annotation is int

    @classmethod
    def _parse_domain(cls, name: str, domain: Any) -> Domain:
        if not isinstance(domain, Mapping | list | tuple):
            return cls._check_value(name, domain)
        parsed = parse_domain(name, domain)
        if isinstance(parsed, Range):
            for end in (parsed.low, parsed.high):
                cls._check_value(name, end)
            return parsed
        assert isinstance(parsed, tuple)
        return tuple(cls._check_value(name, value) for value in parsed)

    @classmethod
    def _check_value(cls, name: str, value: Any) -> Value:
        return cast(Value, getattr(cls.from_values({name: value}), name))


def parse_domain(name: str, domain: Any) -> Domain:
    """A domain as a job writes it: `{low, high}`, a list, or one value. Raises Refused with the rule it breaks."""
    if isinstance(domain, Mapping):
        try:
            return Range.model_validate(dict(domain))
        except ValidationError as error:
            raise Refused(*(mistake.below(name) for mistake in mistakes_of(Range, error))) from error
    values = tuple(domain) if isinstance(domain, list | tuple) else (domain,)
    if not values:
        raise Refused(
            Mistake(
                field=(name,), rule="choices must not be empty", found=domain, remedy="give two at least, or one value"
            )
        )
    for place, value in enumerate(values):
        if not isinstance(value, Value) or (isinstance(value, float) and not math.isfinite(value)):
            rule = "must be a number, text, true or false, a list of these, or {low, high}"
            raise Refused(Mistake(field=(name,), rule=rule, found=value, remedy="write one of them"))
        if value in values[:place]:
            rule = "choices must differ"
            raise Refused(Mistake(field=(name,), rule=rule, found=value, remedy="name it once"))
    return values if isinstance(domain, list | tuple) else values[0]


def draw(trial: "optuna.Trial", name: str, domain: Domain, *, whole: bool) -> Value:
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
