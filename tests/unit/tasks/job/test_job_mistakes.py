"""One mistake a job file: of every field each kind of wrong value, and what people write by mistake. Each is refused in
one line that names the file, the field, the rule, the value and what to write, in words of ours."""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.hyperparameters.declared import CNNHyperparameters, MLPHyperparameters
from models.hyperparameters.rules import in_yaml
from tasks.job import JobError, TuningJob, hints, load_job
from tests.unit.models.test_families import write_net

FOREIGN = re.compile(
    r"Input should|type=|validation error|errors\.pydantic|Value error|Extra inputs|Field required|\n$"
)
GOOD: Mapping[str, Any] = {"name": "bad", "data": {"source": "rows.csv"}}
# Of each JSON type what is none of it; a text may be a number, as YAML reads 1e-4.
WRONG: Mapping[str, list[Any]] = {
    "integer": ["some", True, 2.5, [1], {"a": 1}, date(2026, 10, 1)],
    "number": ["some", True, [1], {"a": 1}, float("nan"), float("inf")],
    "boolean": ["on", 1, 0.5, [True], {"a": 1}],
    "string": [12, 1.5, False, ["a"], {"a": "b"}, date(2026, 10, 1)],
    "array": ["some", 12, True, {"a": 1}, [1], [None]],
    "object": ["some", 12, True, ["a"]],
}


def refused(text: str | bytes, folder: Path, name: str = "bad.yaml") -> list[str]:
    """What is said of a file, line by line, without the path that each begins with."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(JobError) as error:
        load_job("bad", folder)
    lines = str(error.value).splitlines()
    assert lines
    for line in lines:
        assert line.startswith(f"{path}: ")
        assert FOREIGN.search(line) is None
        assert line.rpartition("; ")[2], f"{line} says no remedy"
    return [line.removeprefix(f"{path}: ") for line in lines]


def wrong_values(schema: Mapping[str, Any]) -> Iterator[Any]:
    """By a field's JSON schema; pydantic's schema is not what the sentences are made of."""
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    if len(kinds) == len(schema.get("anyOf", [schema])):
        yield None
    for kind in kinds[:1]:
        yield from WRONG["object" if "$ref" in kind else kind.get("type", "string")]
        if "enum" in kind or "const" in kind:
            yield "nothing-of-these"
        if "minimum" in kind:
            yield kind["minimum"] - 1
        if "exclusiveMinimum" in kind:
            yield kind["exclusiveMinimum"]
        if "maximum" in kind:
            yield kind["maximum"] + 1
        if "exclusiveMaximum" in kind:
            yield kind["exclusiveMaximum"]
        if "minLength" in kind:
            yield ""


def every_field() -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    schema = TuningJob.model_json_schema()
    for name, field in schema["properties"].items():
        yield (name,), field
        reference = field.get("$ref")
        if reference is not None:
            for inner, own in schema["$defs"][reference.rpartition("/")[2]]["properties"].items():
                yield (name, inner), own
    cnn, mlp = (family.model_json_schema()["properties"] for family in (CNNHyperparameters, MLPHyperparameters))
    for name, field in (cnn | mlp).items():
        yield ("search", "space", name), field


def with_value(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(GOOD))
    if place[-1] in CNNHyperparameters.model_fields.keys() - MLPHyperparameters.model_fields:
        content |= {"model": "cnn", "data": {"source": "pictures"}}
    inner = content
    for part in place[:-1]:
        inner = inner.setdefault(part, {})
    inner[place[-1]] = value
    return content


SINGLE = [
    pytest.param(place, value, id=f"{'.'.join(place)}={in_yaml(value)}")
    for place, schema in every_field()
    for value in wrong_values(schema)
    # A date is one of test_from's values; lists and ranges are values of a space, and have tests of their own.
    if not (place[-1] == "test_from" and isinstance(value, date))
    if not ("space" in place[:-1] and isinstance(value, list | dict))
]


def test_there_are_many_of_them() -> None:
    assert len(SINGLE) > 300


@pytest.mark.parametrize(("place", "value"), SINGLE)
def test_a_wrong_value_of_any_field_is_one_line(place: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    (line,) = refused(yaml.safe_dump(with_value(place, value)), tmp_path)
    assert line.startswith(".".join(place))
    if place != ("name",) or not isinstance(value, str):
        inner = value[0] if isinstance(value, list) and f", found {in_yaml(value)}" not in line else value
        assert f", found {in_yaml(inner)}" in line


@pytest.mark.parametrize("place", [place for place, _ in every_field()], ids=".".join)
def test_a_misspelt_field_is_named_with_the_right_one(place: tuple[str, ...], tmp_path: Path) -> None:
    letters = place[-1]
    misspelt = (*place[:-1], f"{letters[:2]}{letters[3:]}x" if len(letters) > 4 else f"{letters}z")
    content = with_value(place, None)
    inner = content
    for part in place[:-1]:
        inner = inner[part]
    del inner[place[-1]]
    inner[misspelt[-1]] = {}
    (line,) = refused(yaml.safe_dump(content), tmp_path)
    assert line.startswith(".".join(misspelt))
    assert re.search(rf" is not a (field|hyperparameter) of .*write {letters} ", line)


def written(text: str) -> str:
    """A file of a name, a source and whatever else; a line of data replaces the source's."""
    lines = ["name: bad", *(["data: {source: rows.csv}"] if "data:" not in text else []), text]
    return "\n".join(lines) + "\n"


IN_WORDS = [
    # What YAML makes of plain words.
    (
        "budget: {finish_by: 22:30}",
        'budget.finish_by must be text, found 1350, which is what YAML makes of 22:30; quote it: "22:30"',
    ),
    (
        "data: {source: a.csv, time_column: day, test_from: 20261001}",
        "data.test_from must be a date, found 20261001; quote it",
    ),
    ("data: {source: a.csv, time_column: day, test_from: 2026-13-45}", "found '2026-13-45'; quote it"),
    (
        "data: {source: a.csv, time_column: day, test_from: '1790000000'}",
        "data.test_from must be a date, found '1790000000'",
    ),
    ("data: {source: a.csv, target: 1}", 'data.target must be text, found 1; quote it: "1"'),
    (
        "data: {source: a.csv, missing: [no]}",
        'data.missing.0 must be text, found false, which is what YAML makes of no; quote it: "no"',
    ),
    (
        "data: {source: a.csv, roles: {yes: ignored}}",
        'data.roles.yes must be a name, found true, which is what YAML makes of yes; quote it: "yes"',
    ),
    ("data: {source: a.csv, roles: {2026: ignored}}", 'data.roles.2026 must be a name, found 2026; quote it: "2026"'),
    ("description: 1.10", "found 1.1, which is what YAML makes of 1.10; quote it"),
    ("description: 2026-10-01", "description must be text, found 2026-10-01; quote it"),
    ("description: off", "found false, which is what YAML makes of off; quote it"),
    ("description: 0x1F", "found 31, which is what YAML makes of 0x1F; quote it"),
    (
        "budget: {trials: yes}",
        "budget.trials must be a whole number from 1 to 100000, found true, which is what YAML makes of yes",
    ),
    ("search: {pruner: no}", "search.pruner must be one of none, median"),
    (
        "search: {memory: 'off'}",
        "search.memory must be true or false, found 'off'; write true or false, without quotes",
    ),
    ("budget:", "budget must be a section of fields, found null; leave it out, or write its fields below it"),
    # Numbers.
    ("seed: 010", "seed must be a decimal number, found 8, which is what YAML makes of 010; write 8 if that is meant"),
    ("budget: {minutes: 1:30}", "budget.minutes must be a decimal number, found 90, which is what YAML makes of 1:30"),
    ("search: {space: {width: 1:00}}", "search.space.width must be a decimal number, found 60"),
    ("budget: {minutes: 30 min}", "budget.minutes must be a number above 0 and at most 10080, found '30 min'"),
    ("promotion: {confidence: '0,95'}", "must be a number of at least 0.5 and below 1, found '0,95'"),
    ("budget: {trials: 1e3}", "budget.trials must be a whole number from 1 to 100000, found '1e3'; write a number"),
    ("promotion: {confidence: 95}", "found 95; write 0.95 for 95 %"),
    (
        "promotion: {max_slice_fall: 10}",
        "promotion.max_slice_fall must be a number from 0 to 1, found 10; write 0.1 for 10 %",
    ),
    ("seed: 99999999999", "seed must be a whole number of at least 0 and below 4294967296"),
    # Names.
    ("trials: 5", "trials is not a field of a job, found 5; write it below budget"),
    ("serach: {}", "serach is not a field of a job, found {}; write search"),
    ("password: hunter2", "password is not a field of a job; remove it"),
    ("search: {sampler: TPE}", "found 'TPE'; write tpe"),
    ("data: {source: a.csv, checks: {smal_class: warn}}", "write small_class"),
    ("schedule: {timezone: europe/berlin}", "write Europe/Berlin"),
    ("schedule: {timezone: UTC+1}", "schedule.timezone must be an IANA time zone"),
    # Times that never come, or are none.
    ("schedule: {cron: 0 0 30 2 *}", "schedule.cron must come at some time"),
    ("schedule: {cron: '0 0 31 4,6 *'}", "schedule.cron must come at some time"),
    ("schedule: {cron: R R * * *}", "schedule.cron must be five cron fields"),
    ("schedule: {cron: 0 0 2 * * *}", "schedule.cron must be five cron fields"),
    ("budget: {finish_by: '24:00'}", "budget.finish_by must be a time of day from 00:00 to 23:59, found '24:00'"),
    # Sources.
    ("data: {source: https://example.org/a.csv}", "fetch the file first and name its path"),
    ("data: {source: 'gs://bucket/a.csv'}", "data.source must be a path, s3://"),
    (
        "data: {source: 'postgresql://me:secret@db/x', query: SELECT 1}",
        "data.source must hold no password, found one for me",
    ),
    ("data: {source: load.py}", "data.source must name a function of the file"),
    ("data: {source: 'sqlite:///a.db'}", "data.query is missing"),
    ("data: {source: images-idx3-ubyte.gz}", "data.labels is missing"),
    ("data: {source: a.csv, delimiter: ';;'}", "data.delimiter must be one letter, found ';;'"),
    ("data: {source: a.csv, delimiter: '\"'}", "data.delimiter must be an ASCII letter that is no quote"),
    ("data: {source: rows.xlsx}", "data.source must be a file that is read (CSV, Parquet, NumPy, IDX), found"),
    ("data: {source: 'sklearn://moons'}", "data.source must be one of sklearn://digits"),
    ("data: {source: 'sklearn://irs'}", "write sklearn://iris"),
    ("data: {source: 's3://'}", "data.source must be s3://bucket/key, found 's3://'; add what is missing"),
    ("data: {source: 'S3://bucket/a.csv'}", "data.source must be a path, s3://"),
    ("data: {source: ''}", "data.source must not be empty, found ''; write for example rows.csv"),
    ("data: {source: ~}", "data.source must be text, found null, which is what YAML makes of ~; write a"),
    ("data:", "data must be a section of fields, found null; write its fields below it, such as {source: rows.csv}"),
    # The space.
    (
        "search: {space: {width: 100000000000}}",
        "search.space.width must be a whole number from 1 to 65536, found 100000000000",
    ),
    (
        "search: {space: {learning_rate: {low: 0.1, high: 0.001}}}",
        "low must be below high, found low 0.1 and high 0.001; swap them",
    ),
    ("search: {space: {learning_rate: {low: 0.1, high: 0.1}}}", "write that value alone to fix it"),
    (
        "search: {space: {learning_rate: {lo: 0.1, high: 0.2}}}",
        "search.space.learning_rate.lo is not a field of a range, found 0.1; write low",
    ),
    ("search: {space: {learning_rate: {low: 0.1}}}", "search.space.learning_rate.high is missing"),
    ("search: {space: {optimizer: [adam, adam]}}", "search.space.optimizer: choices must differ, found 'adam'"),
    ("search: {space: {optimizer: {low: 1, high: 2}}}", "search.space.optimizer must be one of sgd"),
    ("search: {space: {batch_size: [16, yes]}}", "search.space.batch_size must be a whole number"),
    ("search: {space: {batch_size: [[16, 32]]}}", "search.space.batch_size must be a number, text, true or false"),
    (
        "search: {space: {depth: {low: 1, high: 3, points: 1000000000}}}",
        "search.space.depth.points must be a whole number from 2 to 1000",
    ),
    (
        "search: {space: {lerning_rate: 0.1}}",
        "search.space.lerning_rate is not a hyperparameter of mlp, found 0.1; write learning_rate",
    ),
    # What can only fail.
    ("model: cnn", "model must be another than cnn where the source is a CSV file"),
    ("model: net.py:Net", "net.py is not a Python file that can be read"),
    ("model: mpl", "model must be a known model"),
    ("search: {max_parameters: 1}", "search.max_parameters must be at least 66, the size of the smallest model"),
    ("search: {sampler: gp, pruner: median}", "search.pruner must be none where sampler is gp"),
    ("search: {cost: latency, pruner: median}", "search.pruner must be none where cost is latency"),
    (
        "data: {source: a.csv, test_fraction: 0.45, validation_fraction: 0.45}",
        "data.test_fraction must leave 20% of the rows",
    ),
    ("data: {source: a.csv, time_column: day}", "data.time_column needs test_from beside it, found 'day'"),
    ("data: {source: a.csv, target: id, split_by: id}", "data.split_by must be another column than the target"),
    (
        "promotion: {min_improvement: 5}",
        "promotion.min_improvement must be below 1, because accuracy lies between 0 and 1, found 5",
    ),
    ("budget: {max_cost: 4}", "budget.max_cost needs a price_per_hour beside it, found 4"),
    # What has no effect.
    ("data: {source: a.csv, labels: b.csv}", "data.labels has no effect where the source is a CSV file"),
    ("data: {source: a.csv, query: SELECT 1}", "data.query has no effect where the source is a CSV file"),
    ("data: {source: a.parquet, delimiter: ';'}", "data.delimiter has no effect where the source is a Parquet file"),
    ("data: {source: a.npz, header: false}", "data.header has no effect where the source is a NumPy file"),
    ("data: {source: pictures, missing: ['?']}", "data.missing has no effect where the source is a folder of images"),
    (
        "data: {source: 'sklearn://iris', target: kind}",
        "data.target has no effect where the source is a scikit-learn set",
    ),
    ("data: {source: a.npz, roles: {a: numeric}}", "data.roles has no effect where the source is a NumPy file"),
    ("data: {source: pictures, thousands: ','}", "data.thousands has no effect where the source is a folder of images"),
    (
        "data: {source: a.csv, target: y, roles: {y: categorical}}",
        "data.roles.y has no effect on the column of data.target",
    ),
    (
        "data: {source: a.csv, time_column: t, test_from: 2026-10-01, test_fraction: 0.3}",
        "data.test_fraction has no effect where rows are tested from test_from on",
    ),
    ("data: {source: a.csv, max_rows_lost: 0.5, checks: {rows_lost: ignore}}", "data.max_rows_lost has no effect"),
    ("search: {cost_tolerance: 0.1}", "search.cost_tolerance has no effect where search.cost is none"),
    ("confirm: {ship: ensemble, seeds: 1}", "confirm.ship has no effect where confirm.seeds is 1"),
    ("promotion: {ask_minutes: 30}", "promotion.ask_minutes has no effect where promotion.mode is not ask"),
    (
        "search: {objective: rmse}\npromotion: {max_calibration_error: 0.1}",
        "promotion.max_calibration_error has no effect for the objective rmse",
    ),
    (
        "search: {objective: rmse}\ndata: {source: a.csv, tidy_labels: true}",
        "data.tidy_labels has no effect where the target is a number",
    ),
    # What YAML would do behind one's back.
    ("seed: 1\nseed: 2", "seed must stand once, found it in lines 3 and 4; keep one of them"),
    ("seed: 1\nseed: 1\nseed: 1", "seed must stand once, found it in lines 3, 4 and 5"),
    ("search: {space: {epochs: 3, epochs: 4}}", "search.space.epochs must stand once, found it in line 3, 2 times"),
    ('seed: 1\n"seed": 2', "seed must stand once, found it in lines 3 and 4"),
    ("budget: {<<: {trials: 3}, minutes: 3}", "budget.<< is a merge key, which is not read"),
    ("description: &text a", "found the anchor &text in line 3; remove it"),
    ("description: !!str 12", "found the tag !!str in line 3; remove it"),
    ("description: !secret 12", "found the tag !secret in line 3"),
    ("---\nname: bad", "found a second document in line 3"),
    ("? [a, b]\n: 3", "must be a name, found a list or a mapping"),
    ("\tseed: 3", "indent by blanks, not tabs"),
    ("description: a: b", "quote a text that holds a colon"),
    ("description: @home", "quote a text that begins with such a letter"),
    ("description: 'a", "close the quotes"),
    ("search: [tpe", "close what was opened with [ or {"),
    ("search: " + "[" * 2000, "may be nested 8 deep at most"),
    ("description: \x07", "must be YAML"),
    ("description: " + "a" * 70_000, "may have 65536 bytes at most"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), IN_WORDS)
def test_what_people_write_by_mistake_is_one_line_that_says_what_to_write(text: str, says: str, tmp_path: Path) -> None:
    (line,) = refused(written(text), tmp_path)
    assert says in line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "must be a mapping of fields such as `name: ...`, found nothing"),
        (b"# name: bad\n", "found nothing"),
        (b"- name: bad\n", "found a list"),
        (b"bad\n", "found a text"),
        ("name: bad\n".encode("utf-16"), "must be text in UTF-8, found the byte 0xff at 0; save it as UTF-8"),
        (b"name: b\xe4d\n", "must be text in UTF-8, found the byte 0xe4 at 7"),
        (b"\x00\x01\x02", "must be YAML"),
        (
            b"name: other\ndata: {source: rows.csv}\n",
            "name must equal the file's name 'bad', found 'other'; rename one",
        ),
        (b"a: &a [x, x]\nb: *a\n", "found the alias *a in line 2; write out what it stands for"),
    ],
)
def test_a_file_that_is_no_job_is_said_in_words(content: bytes, says: str, tmp_path: Path) -> None:
    assert any(says in line for line in refused(content, tmp_path))


def test_all_mistakes_of_a_file_are_said_at_once_a_line_each(tmp_path: Path) -> None:
    """Of each kind one: YAML's, a field's type, its limits, its name, the space's, and what fits nothing beside it."""
    text = """\
name: worse
data: {source: rows.csv, labels: x, target: 1, validation_fraction: 2, checks: {small_class: loud}}
search: {pruner: maybe, space: {momentun: 1, depth: 0, step_every: 0.5}, cost_tolerance: 0.1}
budget: {trials: yes, trails: 3, minutes: 0, finish_by: 22:30, max_cost: 3}
promotion: {mode: never, mode: ask, confidence: 95}
schedule: {cron: 0 0 30 2 *, timezone: Mars}
"""
    lines = refused(text, tmp_path)
    fields = [
        "name", "data.labels", "data.target", "data.validation_fraction", "data.checks.small_class", "search.pruner",
        "search.space.momentun", "search.space.depth", "search.space.step_every", "search.cost_tolerance",
        "budget.trials", "budget.trails", "budget.minutes", "budget.finish_by", "budget.max_cost", "promotion.mode",
        "promotion.confidence", "schedule.cron", "schedule.timezone",
    ]  # fmt: skip
    assert sorted(line.partition(" ")[0] for line in lines) == sorted(fields)


def test_a_space_with_nothing_to_search_is_refused(tmp_path: Path) -> None:
    fixed = {name: field.default for name, field in MLPHyperparameters.model_fields.items()}
    alone = ("optimizer", "schedule", "learning_rate", "batch_size", "weight_decay", "depth", "width", "dropout")
    space = {name: fixed[name] for name in alone}
    (line,) = refused(yaml.safe_dump({**GOOD, "search": {"space": space}}), tmp_path)
    assert line.startswith("search.space fixes every hyperparameter, so that there is nothing to search, found {")
    # A model of one's own that draws something itself may have all else fixed, but not that too.
    write_net(tmp_path)
    others = {name: space[name] for name in space if name not in ("depth", "width", "dropout")}
    own = {**GOOD, "name": "own", "model": "net.py:Net"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**own, "search": {"space": others}}))
    assert load_job("own", tmp_path).family.own_names
    fixed_too = others | {"kind": "wide", "units_wide": 8, "units_narrow": 4, "slope": 0.1}
    (line,) = refused(yaml.safe_dump({**own, "name": "bad", "search": {"space": fixed_too}}), tmp_path)
    assert line.startswith("search.space fixes every hyperparameter")


def test_two_numbers_in_a_list_are_two_choices_and_a_hint_says_so(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(written("search: {space: {learning_rate: [0.001, 0.1], batch_size: [16, 32]}}"))
    job = load_job("bad", tmp_path)
    assert job.space["learning_rate"] == (0.001, 0.1)
    assert list(hints(job)) == [
        "search.space.learning_rate is two choices, 0.001 and 0.1; for all values between them write learning_rate: "
        "{low: 0.001, high: 0.1, log: true}"
    ]
