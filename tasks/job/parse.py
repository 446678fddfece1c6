"""From what a job file holds to a TuningJob, with all that is wrong said at once, a line each.

The one idea: what is wrong is taken out and the rest is validated again, so that no mistake hides another. Knows
nothing of where job files lie.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from infra.errors import ExpectedError
from models.hyperparameters.mistakes import mistakes_of
from models.hyperparameters.rules import IS_MISSING, IS_NOT, Mistake, Place
from models.rows.shapes import DataShape
from tasks.job.schema import TuningJob
from tasks.job.together import contradictions, contradictions_of_shape, without_effect
from tasks.job.yaml_text import Text

# What the rest is validated with, where a source is wrong: of a function nothing is known.
UNKNOWN_SOURCE = "unknown.py:rows"

# Of base 60 and of base 8.
_ODD_NUMBER = re.compile(r"[-+]?([0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|0[0-7_]+)")

Overrides = Mapping[tuple[str, str], object]


class JobError(ExpectedError):
    """A job is wrong; each line of the message names the file, the field, the rule, the value found and the remedy."""

    @classmethod
    def of(cls, path: Path, mistakes: list[Mistake], after: str = "") -> "JobError":
        return cls("\n".join(f"{path}: {mistake.sentence}{after}" for mistake in mistakes))


def parse_job(content: Mapping[str, Any], path: Path) -> TuningJob:
    """The job that a file of this content would be. Raises JobError with every mistake."""
    return parse_text(Text(content=content), path)


def parse_text(text: Text, path: Path, overrides: Overrides | None = None) -> TuningJob:
    """The job of a file, with a night's overrides by section and field merged in. Raises JobError with every mistake.

    A field that has no effect is a mistake in a file, but not where an override is why.
    """
    content = copy.deepcopy(dict(text.content))
    for (section, field), value in (overrides or {}).items():
        content.setdefault(section, {})[field] = value
    written = {place: letters for place, letters in text.written.items() if place not in (overrides or {})}
    mistakes, unread = list(text.mistakes), {mistake.field for mistake in text.mistakes}
    if isinstance(name := content.get("name"), str) and name != path.stem:
        rule, remedy = f"must equal the file's name {path.stem!r}", "rename one of them"
        mistakes.append(Mistake(field=("name",), rule=rule, found=name, remedy=remedy))
        content["name"] = path.stem
    content = _anchored(content, path)
    job = None
    while job is None:
        try:
            job = TuningJob.model_validate(content)
        except ValidationError as error:
            found = [each for each in mistakes_of(TuningJob, error, written) if each not in mistakes]
            if not found:  # which would go on for ever
                break
            # A misspelt name is one mistake, though the field that was meant is missing.
            meant = {place for mistake in found if mistake.rule.startswith(IS_NOT) for place in mistake.beside}
            known = unread | {
                mistake.field for mistake in found if mistake.rule == IS_MISSING and mistake.field in meant
            }
            mistakes += [mistake for mistake in found if mistake.field not in known]
            _take_out(content, [mistake.field for mistake in found])
            content.setdefault("name", "job")
            content.setdefault("data", {}).setdefault("source", UNKNOWN_SOURCE)
    if job is not None:
        mistakes += _odd_numbers(content, written)
        wrong = {mistake.field for mistake in mistakes}
        if job.data.source == UNKNOWN_SOURCE:
            wrong.add(("data", "source"))
        together = [*contradictions(job), *([] if overrides else without_effect(job))]
        mistakes += [mistake for mistake in together if not wrong & {mistake.field, *mistake.beside}]
    if job is None or mistakes:
        after = ", ".join(f"{section}.{field} {value}" for (section, field), value in (overrides or {}).items())
        raise JobError.of(path, mistakes, f" (the file was overridden with {after})" if after else "")
    return job


def check_shape(job: TuningJob, shape: DataShape) -> None:
    """Refuse a job that cannot be trained on rows of this shape, before anything is. Raises JobError."""
    if sentences := [mistake.sentence for mistake in contradictions_of_shape(job, shape)]:
        raise JobError("\n".join(sentences))


def _take_out(content: dict[str, Any], places: Iterable[Place]) -> None:
    """Remove what lies at each place; where nothing does, what it would lie in."""
    for place in sorted({_nearest(content, place) for place in places}, key=len, reverse=True):
        inner: Any = content
        for part in place[:-1]:
            inner = inner[part]
        inner.pop(place[-1], None)


def _nearest(content: Mapping[str, Any], place: Place) -> Place:
    """The place, if every part of it is there and lies in a mapping; else as much of it as does."""
    inner: Any = content
    for length, part in enumerate(place):
        if not isinstance(inner, dict) or part not in inner:
            return place[: max(1, length)]
        inner = inner[part]
    return place


def _odd_numbers(content: Mapping[str, Any], written: Mapping[Place, str]) -> Iterator[Mistake]:
    """Numbers of which YAML made others than stand there: 1:30 is 90 to it, and 010 is 8."""
    for place, letters in written.items():
        if _ODD_NUMBER.fullmatch(letters) and _nearest(content, place) == place:
            value: Any = content
            for part in place:
                value = value[part]
            rule, remedy = "must be a decimal number", f"write {value} if that is meant"
            yield Mistake(field=place, rule=rule, found=value, written=letters, remedy=remedy)


def _anchored(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """With paths that mean the same wherever the night runs: relative ones are relative to the job's file, and ~ is the
    home of whoever reads it."""
    data, model = content.get("data"), content.get("model")
    if isinstance(data, dict):
        places = {
            name: str(_path(path, place))
            for name in ("source", "labels")
            if isinstance(place := data.get(name), str) and place and "://" not in place
        }
        if str(data.get("source")).startswith("sqlite:///"):
            places["source"] = f"sqlite:///{_path(path, data['source'].removeprefix('sqlite:///')).absolute()}"
        content = {**content, "data": {**data, **places}}
    if isinstance(model, str) and ".py:" in model:
        content = {**content, "model": str(_path(path, model))}
    return content


def _path(file: Path, place: str) -> Path:
    try:
        return file.parent / Path(place).expanduser()
    except RuntimeError:  # no such user; the path as it stands is not there either
        return file.parent / place
