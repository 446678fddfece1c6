"""A job file's text: YAML without anchors, aliases, merge keys, tags and second documents, and with each key once.

The one idea: what YAML would do behind a reader's back is refused, by line, and what it makes of plain words is kept
beside them (22:30 is 1350, no is false), so that a sentence can name both. Knows nothing of a job's fields.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from models.hyperparameters.rules import Mistake, Place, Refused

MOST_BYTES = 64 * 1024
# A job's own fields are four deep.
MOST_DEPTH = 8
PLAIN = "must be YAML without anchors, aliases, tags and further documents"
YAML_TAG = "tag:yaml.org,2002:"
TEXT, MERGE, VALUE = (f"{YAML_TAG}{kind}" for kind in ("str", "merge", "value"))
# By what is in PyYAML's words of a mistake.
REMEDIES = {
    "\\t": "indent by blanks, not tabs",
    "mapping values are not allowed": "quote a text that holds a colon, and write a blank after each field's colon",
    "block mapping": "indent the fields of a section alike",
    "expected ',' or": "close what was opened with [ or {, and quote a text that holds one of them",
    "cannot start any token": "quote a text that begins with such a letter",
    "while scanning a quoted scalar": "close the quotes",
}


@dataclass(frozen=True, kw_only=True)
class Text:
    """The content of a job file as plain values; where YAML made no text of what is `written`, its letters, by place;
    and the mistakes that leave the rest readable."""

    content: Mapping[str, Any]
    written: dict[Place, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)


def read_text(path: Path) -> Text:
    """Read a job file. Raises Refused, with every reason, where nothing in it can be relied on."""
    try:
        if not path.is_file():
            raise _refused("must be a file", "something else" if path.exists() else "none", "put a file there")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise _refused(f"a job file may have {MOST_BYTES} bytes at most", str(size), "shorten it")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"the byte 0x{error.object[error.start]:02x} at {error.start}"
        raise _refused("must be text in UTF-8", byte, "save it as UTF-8") from error
    except OSError as error:
        raise _refused("must be readable", str(error.strerror), "correct its rights") from error
    try:
        if mistakes := list(_hidden(text)):
            raise Refused(*mistakes)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise Refused(_in_words(error)) from error
    if not isinstance(node, yaml.MappingNode):
        kinds = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a text", type(None): "nothing"}
        remedy = "write name and data.source at least"
        raise _refused("must be a mapping of fields such as `name: ...`", kinds[type(node)], remedy)
    read = Text(content={})
    return replace(read, content=_values(loader, node, (), read))


def _hidden(text: str) -> Iterator[Mistake]:
    """What would put something else into a file than what stands there, or is nested beyond reason."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = "in line ?" if event.start_mark is None else f"in line {event.start_mark.line + 1}"
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise _refused(f"may be nested {MOST_DEPTH} deep at most", f"more {line}", "write fewer brackets")
        if isinstance(event, yaml.DocumentStartEvent) and documents > 1:
            yield _mistake(PLAIN, f"a second document {line}", "make it a file of its own, or remove the line of ---")
        if isinstance(event, yaml.AliasEvent):
            yield _mistake(PLAIN, f"the alias *{event.anchor} {line}", "write out what it stands for")
        elif isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            yield _mistake(PLAIN, f"the anchor &{event.anchor} {line}", "remove it, or quote a text that begins with &")
        if (tag := getattr(event, "tag", None)) is not None:
            tag = tag.replace(YAML_TAG, "!!")
            yield _mistake(PLAIN, f"the tag {tag} {line}", "remove it, or quote a text that begins with !")


def _values(loader: yaml.SafeLoader, node: yaml.Node, place: Place, read: Text) -> Any:
    """What a node means; the letters of what is no text, and mistakes, are added to what was read."""
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, place, read)
    if isinstance(node, yaml.SequenceNode):
        return [_values(loader, item, (*place, number), read) for number, item in enumerate(node.value)]
    try:
        value = _scalar(loader, node)
    except ValueError:
        rule, remedy = "must be a date, time or number that exists", f'quote it: "{node.value}"'
        read.mistakes.append(Mistake(field=place, rule=rule, found=node.value, remedy=remedy))
        return node.value
    if not isinstance(value, str):
        read.written[place] = node.value
    return value


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, place: Place, read: Text) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, list[int]] = {}
    for key, inner in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        lines.setdefault(name, []).append(key.start_mark.line + 1)
        if (mistake := _wrong_key(loader, key)) is not None:
            read.mistakes.append(mistake.below(*place, name))
        elif name not in values:
            values[name] = _values(loader, inner, (*place, name), read)
    for name, numbers in lines.items():
        if len(numbers) > 1:
            where = f"lines {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
            if len(set(numbers)) == 1:
                where = f"line {numbers[0]}, {len(numbers)} times"
            rule = f"must stand once, found it in {where}"
            read.mistakes.append(Mistake(field=(*place, name), rule=rule, remedy="keep one of them"))
    return values


def _wrong_key(loader: yaml.SafeLoader, key: yaml.Node) -> Mistake | None:
    if not isinstance(key, yaml.ScalarNode):
        return Mistake(rule="must be a name, found a list or a mapping", remedy="write a name before the colon")
    if key.tag == MERGE:
        return Mistake(rule="is a merge key, which is not read", remedy="write out the fields that it brings")
    try:
        name = _scalar(loader, key)
    except ValueError:
        name = None
    remedy = f'quote it: "{key.value}"'
    return (
        None if isinstance(name, str) else Mistake(rule="must be a name", found=name, written=key.value, remedy=remedy)
    )


def _scalar(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """Raises ValueError for a date or a number that there is not."""
    return node.value if node.tag in (TEXT, MERGE, VALUE) else loader.construct_object(node)


def _in_words(error: yaml.YAMLError) -> Mistake:
    mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", None) or error)
    said = re.sub(r"\s+", " ", f"{getattr(error, 'context', None) or ''} {problem}").strip()
    remedy = next((remedy for part, remedy in REMEDIES.items() if part in said), "correct it, or quote the text")
    return _mistake("must be YAML", f"in line {mark.line + 1}: {said}" if mark is not None else said, remedy)


def _refused(rule: str, found: str, remedy: str) -> Refused:
    return Refused(_mistake(rule, found, remedy))


def _mistake(rule: str, found: str, remedy: str) -> Mistake:
    """Of the file as a whole; what was found is said in words."""
    return Mistake(rule=f"{rule}, found {found}", remedy=remedy)
