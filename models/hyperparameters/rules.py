"""Rules in words: what a declared field accepts, and what is wrong with a value that it does not.

The one idea: the sentence comes from the field's own declaration (its type, limits and default), not from pydantic's
words, so that it says what to write instead of how a parser failed. Knows nothing of which fields there are.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from difflib import get_close_matches
from typing import Any

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
