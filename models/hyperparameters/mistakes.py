"""What pydantic refused, as mistakes in our words: the rule of the field's declaration, the value, and the remedy."""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ValidationError

from models.hyperparameters.declarations import Rule, accepts, fields_of, is_model, rule_at
from models.hyperparameters.rules import IS_MISSING, NOTHING, Mistake, Place, Refused, in_yaml, nearest, unknown_name


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


def _in_its_own_words(place: Place, message: str, found: Any) -> Mistake:
    """The sentence of a validator that says rule, value and remedy by itself, or leaves out some of them."""
    rule, _, remedy = message.rpartition("; ")
    rule, remedy = (rule, remedy) if rule else (remedy, "correct it")
    return Mistake(field=place, rule=rule, found=NOTHING if not place or "found " in message else found, remedy=remedy)


def _mistake(model: type[BaseModel], place: Place, problem: str, found: Any, written: Mapping[Place, str]) -> Mistake:
    if problem in ("extra_forbidden", "invalid_key"):
        section = rule_at(model, place[:-1]).kind
        homes = [name for name, field in model.model_fields.items() if place[-1] in fields_of(field.annotation)]
        return unknown_name(place, f"a field of {section.noun}", fields_of(section), found, *homes[:1])
    rule = rule_at(model, place)
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


def _remedy(rule: Rule, found: Any, written: str | None) -> str:
    """What to write instead of the value found."""
    kinds, example = rule.kinds, rule.example
    or_not = "" if rule.field is not None and rule.field.is_required() else "leave it out, or "
    if any(is_model(kind) for kind in kinds):
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


def _remedy_of_number(rule: Rule, found: Any) -> str:
    low, high = rule.ends
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return f"write a number, such as {rule.example}"
    if found >= high:
        is_share = high <= 1 < found <= 100
        return f"write {found / 100:g} for {found:g} %" if is_share else f"lower it, for example to {rule.example}"
    return f"{'raise' if found <= low else 'round'} it, for example to {rule.example}"
