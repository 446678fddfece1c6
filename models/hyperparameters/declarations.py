"""What a declared field accepts, in words: read from its annotation, its limits and its default.

Knows nothing of which fields there are, nor of what is wrong with a value.
"""

import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticKnownError

from models.hyperparameters.rules import Place, in_yaml


class Declared(BaseModel):
    """Fields with rules. A truth value is no number and a number no truth value, whatever Python makes of them; a
    number may be a text, as YAML reads 1e-4."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # What the fields are of, in a sentence.
    noun: ClassVar[str] = "a job"

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        kinds = Rule(kind=cls.model_fields[info.field_name].annotation).kinds
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise PydanticKnownError("float_type")
        may_be_a_list = tuple in kinds and isinstance(value, list | tuple)
        if bool in kinds and not isinstance(value, bool) and not may_be_a_list:
            raise PydanticKnownError("bool_type")
        return value


def accepts(kind: Any, limits: Iterable[Any] = ()) -> str:
    """What a value of this annotation may be, in words: "a whole number from 1 to 20", "one of none, median or gp"."""
    parts: dict[str, None] = {}
    choices: dict[str, None] = {}
    for plain, own in alternatives(kind, limits):
        if get_origin(plain) is Literal:
            choices |= {_choice(choice): None for choice in get_args(plain)}
        elif plain is not type(None):
            parts[_accepts_one(plain, own)] = None
    if choices:
        *most, last = choices
        parts = {f"{'one of ' if len(most) > 1 else ''}{', '.join(most)}{' or ' if most else ''}{last}": None, **parts}
    return " or ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is declared at a place: the annotation, its limits, and the field that says so, if it is one."""

    place: Place = ()
    kind: Any
    limits: tuple[Any, ...] = ()
    field: FieldInfo | None = None

    @property
    def kinds(self) -> set[Any]:
        return {get_origin(plain) or plain for plain, _ in alternatives(self.kind)} - {type(None)}

    @property
    def choices(self) -> list[str]:
        literals = [plain for plain, _ in alternatives(self.kind) if get_origin(plain) is Literal]
        return [str(choice) for literal in literals for choice in get_args(literal)]

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest number, infinite where there is none."""
        limits = [limit for _, own in alternatives(self.kind, self.limits) for limit in own]
        low: list[Any] = [
            limit.ge if isinstance(limit, Ge) else limit.gt for limit in limits if isinstance(limit, Ge | Gt)
        ]
        high: list[Any] = [
            limit.le if isinstance(limit, Le) else limit.lt for limit in limits if isinstance(limit, Le | Lt)
        ]
        return max(low, default=-math.inf), min(high, default=math.inf)

    @property
    def example(self) -> str:
        """A value that is accepted, as a job file holds it."""
        if self.field is not None and self.field.examples:
            return str(self.field.examples[0])
        default = None if self.field is None else self.field.default
        if isinstance(default, bool | int | float):
            return in_yaml(default)
        if isinstance(default, str) and default:
            return default if default.isidentifier() else f'"{default}"'
        if self.choices:
            return self.choices[0]
        if self.kinds & {int, float}:
            low, high = self.ends
            return in_yaml(high / 2 if high <= 1 else max(low, 0) + 1)
        kind = next(iter(self.kinds))
        if is_model(kind):
            inner = {name: rule_at(kind, (name,)) for name, field in kind.model_fields.items() if field.is_required()}
            return "{" + ", ".join(f"{name}: {rule.example}" for name, rule in inner.items()) + "}"
        if kind in (dict, tuple):
            item = Rule(kind=get_args(self.kind)[kind is dict]).example
            return f"{{name: {item}}}" if kind is dict else f"[{item}]"
        return "true" if kind is bool else "2026-10-01" if kind is datetime else '"text"'


def rule_at(model: type[BaseModel], place: Place) -> Rule:
    """What is declared at a place below a model, or as near to it as declarations go: pydantic appends to a place which
    alternative of several it tried."""
    outer = rule = Rule(kind=model)
    for part in place:
        if part == "[key]":
            return Rule(place=rule.place, kind=get_args(outer.kind)[0])
        inner = next((step for plain, _ in alternatives(rule.kind) if (step := _step(plain, part)) is not None), None)
        if inner is None:
            break
        outer, rule = rule, replace(inner, place=(*rule.place, part))
    return rule


def _step(kind: Any, part: str | int) -> Rule | None:
    """What is declared of a field, of a mapping's value, or of a list's item."""
    if part in fields_of(kind):
        field = fields_of(kind)[str(part)]
        return Rule(kind=field.annotation, limits=tuple(field.metadata), field=field)
    if get_origin(kind) is dict:
        return Rule(kind=get_args(kind)[1])
    return Rule(kind=get_args(kind)[0]) if get_origin(kind) is tuple and isinstance(part, int) else None


def alternatives(kind: Any, limits: Iterable[Any] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Each plain annotation of a union, with the limits that hold for it."""
    if get_origin(kind) is Annotated:
        inner, *own = get_args(kind)
        said = [limit for some in own for limit in (some.metadata if isinstance(some, FieldInfo) else [some])]
        yield from alternatives(inner, (*limits, *said))
    elif get_origin(kind) in (Union, types.UnionType):
        for plain in get_args(kind):
            yield from alternatives(plain, limits)
    else:
        yield (datetime if kind is AwareDatetime else kind), tuple(limits)


def _accepts_one(kind: Any, limits: tuple[Any, ...]) -> str:
    origin = get_origin(kind) or kind
    if origin in (int, float):
        return f"a {'whole ' if origin is int else ''}number{_in_limits(limits)}"
    if origin is tuple:
        return f"a list, each {accepts(get_args(kind)[0])}"
    if origin is dict:
        return f"names, each with {accepts(get_args(kind)[1])}"
    if origin is str:
        most = [limit.max_length for limit in limits if isinstance(limit, MaxLen)]
        return "one letter" if most == [1] else "text"
    if is_model(origin):
        return "a section of fields"
    named = {bool: "true or false", datetime: "a date", Any: "a value"}
    return named.get(origin, "a finite number, text, true, false, or a list or names of these")


def _in_limits(limits: tuple[Any, ...]) -> str:
    """The limits of a number: " from 1 to 20", " above 0 and below 1"."""
    low, high = "", ""
    for limit in limits:
        match limit:
            case Ge():
                low = f"of at least {in_yaml(limit.ge)}"
            case Gt():
                low = f"above {in_yaml(limit.gt)}"
            case Le():
                high = f"{'' if low else 'of '}at most {in_yaml(limit.le)}"
            case Lt():
                high = f"below {in_yaml(limit.lt)}"
    text = f"{low} and {high}" if low and high else low or high
    text = re.sub(r"^of at least ([^ ]+) and at most", r"from \1 to", text)
    return text and f" {text}"


def _choice(value: object) -> str:
    return str(value) if str(value).replace("_", "").isalnum() else f'"{value}"'


def is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def fields_of(kind: Any) -> Mapping[str, FieldInfo]:
    return kind.model_fields if is_model(kind) else {}
