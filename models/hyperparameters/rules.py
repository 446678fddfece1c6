"""Rules in words: what a declared field accepts, and what is wrong with a value that it does not.

The one idea: the sentence comes from the field's own declaration (its type, limits and default), not from pydantic's
words, so that it says what to write instead of how a parser failed. Knows nothing of which fields there are.
"""

import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticKnownError

MOST_LETTERS = 80
IS_MISSING, IS_NOT = "is missing", "is not"
NOTHING: Any = object()

# A field below a model: the names of sections and fields, and the places in a list.
Place = tuple[str | int, ...]

_SECRET_NAME = re.compile(r"pass|secret|token|key|credential", re.IGNORECASE)
_PASSWORD = re.compile(r"(://[^:/@\s]*):[^@/\s]+@")
# A rule that begins so goes on after the field's name; before any other stands a colon.
_VERBS = ("must", "is", "has", "needs", "matters", "fixes")


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """What is wrong with a field: the rule that it breaks ("must be ..."), the value found, and what to do about it.

    `written` is what stands in the file, where YAML made something else of it; `beside` are other fields that the rule
    is about.
    """

    field: Place = ()
    rule: str
    found: Any = NOTHING
    written: str | None = None
    remedy: str
    beside: tuple[Place, ...] = ()

    @property
    def sentence(self) -> str:
        """The mistake in one line."""
        name = ".".join(str(part) for part in self.field)
        joint = " " if self.rule.partition(" ")[0] in _VERBS else ": "
        found = "" if self.found is NOTHING else f", found {in_yaml(self.found)}"
        if found and self.written and self.written != in_yaml(self.found):
            found += f", which is what YAML makes of {self.written}"
        text = f"{name}{joint if name else ''}{self.rule}{found}; {self.remedy}"
        return re.sub(r"\s*\n\s*", " ", text)

    def below(self, *place: str | int) -> "Mistake":
        """The same mistake, said of a field that lies below another."""
        return replace(self, field=(*place, *self.field), beside=tuple((*place, *other) for other in self.beside))


class Refused(ValueError):
    """A value is not accepted. The mistakes name fields below whatever is validated; the message says all of them."""

    def __init__(self, *mistakes: Mistake) -> None:
        super().__init__("; ".join(mistake.sentence for mistake in mistakes))
        self.mistakes = mistakes


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
        kinds = _Rule(kind=cls.model_fields[info.field_name].annotation).kinds
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise PydanticKnownError("float_type")
        may_be_a_list = tuple in kinds and isinstance(value, list | tuple)
        if bool in kinds and not isinstance(value, bool) and not may_be_a_list:
            raise PydanticKnownError("bool_type")
        return value


def mistakes_of(
    model: type[BaseModel], error: ValidationError, written: Mapping[Place, str] | None = None
) -> list[Mistake]:
    """Every mistake that pydantic found in what should have been this model, one of each kind for a field.

    `written` says what stands in the file where YAML made something else than a text of it.
    """
    mistakes: dict[tuple[Place, str], Mistake] = {}
    for problem in error.errors():
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, Refused):
            found = [mistake.below(*problem["loc"]) for mistake in cause.mistakes]
        elif isinstance(cause, Exception):
            found = [_in_its_own_words(problem["loc"], str(cause), problem["input"])]
        else:
            found = [_mistake(model, problem["loc"], problem["type"], problem["input"], written or {})]
        for mistake in found:
            mistakes.setdefault((mistake.field, mistake.rule), mistake)
    return list(mistakes.values())


def unknown_name(place: Place, noun: str, known: Iterable[str], found: Any = NOTHING, home: str = "") -> Mistake:
    """A name that nothing has: the remedy proposes the known name that was probably meant, or the section that has such
    a field, and lists all names. `beside` is what was meant."""
    known = tuple(known)
    near = nearest(str(place[-1]), known)
    if _SECRET_NAME.search(str(place[-1])):
        found = NOTHING
    remedy = f"write {near}" if near else f"write it below {home}" if home else "remove it"
    meant = near or home
    return Mistake(
        field=place,
        rule=f"{IS_NOT} {noun}",
        found=found,
        remedy=f"{remedy} (known are {', '.join(known)})",
        beside=((*place[:-1], meant),) if meant else (),
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, whatever its case."""
    by_case = {each.lower(): each for each in known}
    near = get_close_matches(name.lower(), by_case, n=1)
    return by_case[near[0]] if near else None


def accepts(kind: Any, limits: Iterable[Any] = ()) -> str:
    """What a value of this annotation may be, in words: "a whole number from 1 to 20", "one of none, median or gp"."""
    parts: dict[str, None] = {}
    choices: dict[str, None] = {}
    for plain, own in _alternatives(kind, limits):
        if get_origin(plain) is Literal:
            choices |= {_choice(choice): None for choice in get_args(plain)}
        elif plain is not type(None):
            parts[_accepts_one(plain, own)] = None
    if choices:
        *most, last = choices
        parts = {f"{'one of ' if len(most) > 1 else ''}{', '.join(most)}{' or ' if most else ''}{last}": None, **parts}
    return " or ".join(parts)


def in_yaml(value: Any) -> str:
    """A value as a job file would hold it, shortened, without passwords."""
    match value:
        case None:
            text = "null"
        case bool():
            text = str(value).lower()
        case float() if not math.isfinite(value):
            text = f"{'-' if value < 0 else ''}.{abs(value)}"
        case float():
            text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
        case date():
            text = value.isoformat()
        case _:
            text = repr(value)
    text = _PASSWORD.sub(r"\1:***@", text)
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"


def _in_its_own_words(place: Place, message: str, found: Any) -> Mistake:
    """The sentence of a validator that says rule, value and remedy by itself, or leaves out some of them."""
    rule, _, remedy = message.rpartition("; ")
    rule, remedy = (rule, remedy) if rule else (remedy, "correct it")
    return Mistake(field=place, rule=rule, found=NOTHING if not place or "found " in message else found, remedy=remedy)


def _mistake(model: type[BaseModel], place: Place, problem: str, found: Any, written: Mapping[Place, str]) -> Mistake:
    if problem in ("extra_forbidden", "invalid_key"):
        section = _rule_at(model, place[:-1]).kind
        homes = [name for name, field in model.model_fields.items() if place[-1] in _fields_of(field.annotation)]
        return unknown_name(place, f"a field of {section.noun}", _fields_of(section), found, *homes[:1])
    rule = _rule_at(model, place)
    if problem == "missing":
        return Mistake(field=place, rule=IS_MISSING, remedy=f"add it, such as {place[-1]}: {rule.example}")
    text = written.get(rule.place)
    return Mistake(
        field=rule.place,
        rule="must not be empty" if found == "" else f"must be {accepts(rule.kind, rule.limits)}",
        found=found,
        written=text,
        remedy=_remedy(rule, found, text),
    )


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """What is declared at a place: the annotation, its limits, and the field that says so, if it is one."""

    place: Place = ()
    kind: Any
    limits: tuple[Any, ...] = ()
    field: FieldInfo | None = None

    @property
    def kinds(self) -> set[Any]:
        return {get_origin(plain) or plain for plain, _ in _alternatives(self.kind)} - {type(None)}

    @property
    def choices(self) -> list[str]:
        literals = [plain for plain, _ in _alternatives(self.kind) if get_origin(plain) is Literal]
        return [str(choice) for literal in literals for choice in get_args(literal)]

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest number, infinite where there is none."""
        limits = [limit for _, own in _alternatives(self.kind, self.limits) for limit in own]
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
        if _is_model(kind):
            inner = {name: _rule_at(kind, (name,)) for name, field in kind.model_fields.items() if field.is_required()}
            return "{" + ", ".join(f"{name}: {rule.example}" for name, rule in inner.items()) + "}"
        if kind in (dict, tuple):
            item = _Rule(kind=get_args(self.kind)[kind is dict]).example
            return f"{{name: {item}}}" if kind is dict else f"[{item}]"
        return "true" if kind is bool else "2026-10-01" if kind is datetime else '"text"'


def _remedy(rule: _Rule, found: Any, written: str | None) -> str:
    """What to write instead of the value found."""
    kinds, example = rule.kinds, rule.example
    or_not = "" if rule.field is not None and rule.field.is_required() else "leave it out, or "
    if any(_is_model(kind) for kind in kinds):
        return f"{or_not}write its fields below it{'' if example == '{}' else f', such as {example}'}"
    if found is None:
        return f"{or_not}write a value such as {example}"
    if kinds & {tuple, dict}:
        return f"write {'a list' if tuple in kinds else 'names with values'}, such as {example}"
    if isinstance(found, Mapping | list | tuple):
        return f"write one value, such as {example}"
    if rule.choices:
        near = nearest(str(found) if written is None else written, rule.choices)
        return f"write {near}" if near else "choose one of them"
    if bool in kinds:
        return "write true or false, without quotes"
    if kinds & {int, float}:
        return _remedy_of_number(rule, found)
    if isinstance(found, str) or not kinds & {str, datetime}:
        return f"write for example {example}"
    quoted = f'quote it: "{in_yaml(found) if written is None else written}"'
    return quoted if str in kinds else f"{quoted}, or write it as {example}"


def _remedy_of_number(rule: _Rule, found: Any) -> str:
    low, high = rule.ends
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return f"write a number, such as {rule.example}"
    if found >= high:
        is_share = high <= 1 < found <= 100
        return f"write {found / 100:g} for {found:g} %" if is_share else f"lower it, for example to {rule.example}"
    return f"{'raise' if found <= low else 'round'} it, for example to {rule.example}"


def _rule_at(model: type[BaseModel], place: Place) -> _Rule:
    """What is declared at a place below a model, or as near to it as declarations go: pydantic appends to a place which
    alternative of several it tried."""
    outer = rule = _Rule(kind=model)
    for part in place:
        if part == "[key]":
            return _Rule(place=rule.place, kind=get_args(outer.kind)[0])
        inner = next((step for plain, _ in _alternatives(rule.kind) if (step := _step(plain, part)) is not None), None)
        if inner is None:
            break
        outer, rule = rule, replace(inner, place=(*rule.place, part))
    return rule


def _step(kind: Any, part: str | int) -> _Rule | None:
    """What is declared of a field, of a mapping's value, or of a list's item."""
    if part in _fields_of(kind):
        field = _fields_of(kind)[str(part)]
        return _Rule(kind=field.annotation, limits=tuple(field.metadata), field=field)
    if get_origin(kind) is dict:
        return _Rule(kind=get_args(kind)[1])
    return _Rule(kind=get_args(kind)[0]) if get_origin(kind) is tuple and isinstance(part, int) else None


def _alternatives(kind: Any, limits: Iterable[Any] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Each plain annotation of a union, with the limits that hold for it."""
    if get_origin(kind) is Annotated:
        inner, *own = get_args(kind)
        said = [limit for some in own for limit in (some.metadata if isinstance(some, FieldInfo) else [some])]
        yield from _alternatives(inner, (*limits, *said))
    elif get_origin(kind) in (Union, types.UnionType):
        for plain in get_args(kind):
            yield from _alternatives(plain, limits)
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
    if _is_model(origin):
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


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _fields_of(kind: Any) -> Mapping[str, FieldInfo]:
    return kind.model_fields if _is_model(kind) else {}
