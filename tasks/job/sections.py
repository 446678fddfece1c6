"""The parts of a job file, each a section with its fields, their rules and what they mean.

Knows nothing of the steps, nor of how a file is read.
"""

import math
import re
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, date, datetime
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from zoneinfo import available_timezones

from pydantic import AfterValidator, AwareDatetime, Field, field_validator, model_validator
from pydantic_core import PydanticKnownError

from models.evaluation.metrics import MetricName
from models.hyperparameters.declarations import Declared
from models.hyperparameters.rules import nearest
from models.rows.column import MISSING, DateOrder, Role
from tasks.job.kinds import kind_of

SamplerName = Literal["auto", "tpe", "gp", "cmaes", "random", "qmc", "grid"]
PrunerName = Literal["none", "median", "halving", "hyperband", "patient", "wilcoxon"]
CostName = Literal["none", "parameters", "latency"]
PromotionMode = Literal["automatic", "ask", "never"]
Shipped = Literal["median", "ensemble"]
PresetName = Literal["smoke", "nightly", "deep"]
Priority = Literal["high", "normal", "low"]
# In the Unicode form in which a table's names are held.
ColumnName = Annotated[str, Field(min_length=1), AfterValidator(lambda name: unicodedata.normalize("NFC", name))]
CheckName = Literal[
    "header_row",
    "empty_column",
    "constant_column",
    "identifier_column",
    "too_many_categories",
    "mixed_values",
    "far_value",
    "rounded_numbers",
    "numbers_as_text",
    "ambiguous_numbers",
    "dates_as_text",
    "dates_as_numbers",
    "labels_alike",
    "missing_target",
    "small_class",
    "leaking_column",
    "duplicate_rows",
    "odd_split",
    "unbalanced_split",
    "changed_column",
    "rows_lost",
    "empty_class",
    "unread_files",
    "several_frames",
]
Severity = Literal["error", "warn", "ignore"]

# What MLflow takes for experiments and models alike, and needs no quotes in its queries.
MLFLOW_NAME = r"[\w.-]([\w. -]{0,198}[\w.-])?"
MOST_TRIALS = 100_000
MOST_MINUTES = 7 * 24 * 60

Text = Annotated[str, Field(min_length=1)]
Trials = Annotated[int, Field(ge=1, le=MOST_TRIALS)]
Minutes = Annotated[float, Field(gt=0, le=MOST_MINUTES)]


class DataConfig(Declared):
    """Where the rows come from, how a table's columns are read, and which share of the rows is held out.

    `target` names a table's column that is predicted (the last, unless it is named); a CSV file without a `header`
    has columns 0, 1, 2, and `delimiter` is the mark between its fields (a comma, or a tab in a .tsv file, unless it
    is said). `labels` is the file of labels beside an IDX file of images, `query` what is selected from a database.
    `missing` are the texts that mean that there is no value. Of numbers in texts `decimal` is the mark before a
    fraction (a point, unless it is said) and `thousands` the one between groups of digits, a blank for any blank;
    `dates` says what comes first in a day that does not begin with its year. `roles` override what is found in a
    column; a number with a unit, such as $25 or 12 kg, is read where its role is numeric. `raw` names the columns
    that reach the model as they are, in this order and before all others, or is true for all of them, as it must be
    where rows are arrays: a number is not standardised, a category is its place among the known ones in
    alphabetical order, from 1 on, or 0, and a missing value is 0. Rows with the same value of `split_by` (an id, a
    customer) stay on one side of the split, and it is no feature; without it a row's whole content decides. With a
    `time_column`, which is no feature either, rows from `test_from` on are the test rows, and all before them are
    split as usual. `tidy_labels` makes one class of labels that differ in blanks, case or a full stop only.
    `checks` says which rule stops a night, warns, or is not looked at; `max_rows_lost` is the share of the last
    snapshot's rows that may be gone. `unchanged` says what a night does that finds the rows and the search of the
    last one: continue from what was learned, or skip.
    """

    source: Text = Field(examples=["rows.csv"])
    target: ColumnName | None = Field(default=None, examples=["price"])
    labels: Text | None = Field(default=None, examples=["labels-idx1-ubyte.gz"])
    query: Text | None = Field(default=None, examples=["SELECT * FROM rows"])
    header: bool = True
    delimiter: str | None = Field(default=None, min_length=1, max_length=1, examples=['";"'])
    missing: tuple[str, ...] = Field(default=MISSING, examples=['["", "?"]'])
    decimal: Literal[".", ","] | None = None
    thousands: Literal[",", ".", " ", "'"] | None = None
    dates: DateOrder = "year_first"
    roles: dict[ColumnName, Role | Literal["ignored"]] = Field(
        default_factory=dict, examples=["{zip_code: categorical}"]
    )
    raw: bool | tuple[ColumnName, ...] = Field(default=False, examples=["[shop, item]"])
    split_by: ColumnName | None = Field(default=None, examples=["customer"])
    time_column: ColumnName | None = Field(default=None, examples=["day"])
    test_from: AwareDatetime | None = Field(default=None, examples=["2026-10-01"])
    tidy_labels: bool = False
    checks: dict[CheckName, Severity] = Field(default_factory=dict, examples=["{small_class: error}"])
    max_rows_lost: float = Field(default=0.2, ge=0, le=1)
    unchanged: Literal["continue", "skip"] = "continue"
    validation_fraction: float = Field(default=0.2, gt=0, lt=0.5)
    test_fraction: float = Field(default=0.2, gt=0, lt=0.5)

    @field_validator("source")
    @classmethod
    def _source_is_of_a_known_kind(cls, source: str) -> str:
        if "://" in source and urlsplit(source).password is not None:
            raise ValueError(
                f"must hold no password, found one for {urlsplit(source).username}; put it into PGPASSWORD or ~/.pgpass"
            )
        kind_of(source)
        return source

    @field_validator("delimiter")
    @classmethod
    def _delimiter_divides(cls, delimiter: str | None) -> str | None:
        if delimiter is not None and (not delimiter.isascii() or delimiter in '"\r\n\0'):
            raise ValueError("must be an ASCII letter that is no quote and ends no line; write for example ';'")
        return delimiter

    @field_validator("test_from", mode="before")
    @classmethod
    def _is_utc_without_a_zone(cls, moment: Any) -> Any:
        """As a table's times are; YAML reads a plain date as one. A number is no date, whatever it counts."""
        if isinstance(moment, str):
            with suppress(ValueError):
                moment = datetime.fromisoformat(moment)
        if isinstance(moment, date) and not isinstance(moment, datetime):
            moment = datetime(moment.year, moment.month, moment.day, tzinfo=UTC)
        if not isinstance(moment, datetime | None):
            raise PydanticKnownError("datetime_type")
        return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment


class SearchConfig(Declared):
    """How the study looks for good hyperparameters; `space` overrides the model's domains by name.

    The first trial is the baseline: the textbook's hyperparameters, as near as the space allows. With `memory` the
    study begins from what earlier nights learned. A `cost` makes the search trade the objective against the number of
    parameters, or the milliseconds that one row takes: of all trials whose objective is within `cost_tolerance` of the
    best the cheapest wins. A configuration above `max_parameters` or `max_latency_ms` is never trained.
    """

    sampler: SamplerName = "auto"
    pruner: PrunerName = "median"
    objective: MetricName = "accuracy"
    baseline: bool = True
    memory: bool = True
    cost: CostName = "none"
    cost_tolerance: float = Field(default=0.005, ge=0)
    max_parameters: int | None = Field(default=None, ge=1, examples=[100_000])
    max_latency_ms: float | None = Field(default=None, gt=0, examples=[5])
    space: dict[str, Any] = Field(
        default_factory=dict, examples=["{learning_rate: {low: 0.001, high: 0.1, log: true}}"]
    )

    @model_validator(mode="before")
    @classmethod
    def _what_learns_from_complete_trials_only_prunes_none(cls, content: Any) -> Any:
        if not isinstance(content, Mapping) or "pruner" in content:
            return content
        takes_none = content.get("sampler") == "gp" or content.get("cost", "none") != "none"
        return {**content, "pruner": "none"} if takes_none else content


class BudgetConfig(Declared):
    """Whichever is used up first ends the tuning; minutes are tested between trials.

    `finish_by` is a time of day in the schedule's time zone: the search ends early enough that the whole night is done
    by then, and trials that are under way are cut off. `workers` is how many devices a night may use at once, its own
    included; `device_hours` are of all of them. `price_per_hour` is what an hour of the device costs, in a currency of
    your choice; the report then counts money too. The search may use `device_hours`, or cost `max_cost`, at most:
    trials that are under way then are cut off at their next epoch. What comes after the search (confirm, gate) is not.
    """

    trials: Trials = 60
    minutes: Minutes = 60
    finish_by: str | None = Field(default=None, examples=['"06:00"'])
    workers: int = Field(default=1, ge=1, le=256)
    device_hours: float | None = Field(default=None, gt=0, examples=[8])
    price_per_hour: float | None = Field(default=None, gt=0, examples=[2.5])
    max_cost: float | None = Field(default=None, gt=0, examples=[4])

    @field_validator("finish_by")
    @classmethod
    def _finish_by_is_a_time_of_day(cls, finish_by: str | None) -> str | None:
        if finish_by is not None and re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", finish_by) is None:
            raise ValueError('must be a time of day from 00:00 to 23:59; write it as "06:00"')
        return finish_by

    @property
    def most_device_seconds(self) -> float:
        """What `device_hours`, and what `max_cost` buys, leave of the device's time; without either there is no end."""
        return 3600 * min(self._hours.values(), default=math.inf)

    @property
    def hours_limit(self) -> str:
        """Which of the two it is."""
        return min(self._hours, key=lambda name: self._hours[name], default="")

    @property
    def _hours(self) -> dict[str, float]:
        hours = {} if self.device_hours is None else {"device_hours": self.device_hours}
        if self.max_cost is not None and self.price_per_hour is not None:
            hours["max_cost"] = self.max_cost / self.price_per_hour
        return hours


class ConfirmConfig(Declared):
    """How many of the best trials are trained again, each with how many fresh seeds, and what of the winner ships: the
    model of the median seed, or all seeds' models as one ensemble."""

    candidates: int = Field(default=3, ge=1, le=20)
    seeds: int = Field(default=5, ge=1, le=50)
    ship: Shipped = "median"


class PromotionConfig(Declared):
    """What the gate asks of a challenger, and whether a winner is promoted.

    It is promoted where it is better with `confidence`, unless it is as surely better by less than `min_improvement`
    (in the objective's unit). Guard rails: no slice may surely fall by more than `max_slice_fall` (a class's recall,
    or the mean absolute error of a quarter of a regression's rows, as a share of the champion's), and the calibration
    error, the latency of one row and the size have limits where they are given. Without a champion the best on
    validation rows is promoted, and only those three limits can reject it. Mode `ask` waits `ask_minutes` for a
    person's answer.
    """

    mode: PromotionMode = "automatic"
    min_improvement: float = Field(default=0.0, ge=0)
    confidence: float = Field(default=0.95, ge=0.5, lt=1)
    max_slice_fall: float | None = Field(default=0.1, ge=0, le=1)
    max_calibration_error: float | None = Field(default=None, gt=0, le=1, examples=[0.05])
    max_latency_ms: float | None = Field(default=None, gt=0, examples=[5])
    max_megabytes: float | None = Field(default=None, gt=0, examples=[100])
    ask_minutes: Minutes = 8 * 60


class TrackingConfig(Declared):
    """Where MLflow shows the job: the `experiment` of its nights and trials, which jobs may share, and the registered
    `model` whose alias `champion` follows the store, which is this job's alone. Each is called as the job is unless it
    is named here, as where somebody else has one of that name already."""

    experiment: str | None = Field(default=None, examples=["Vision nights"])
    model: str | None = Field(default=None, examples=["digits"])

    @field_validator("experiment", "model")
    @classmethod
    def _can_be_a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(MLFLOW_NAME, name):
            rule = "must be of letters, digits, dots, dashes, underscores, and blanks in between, 200 at most"
            raise ValueError(f"{rule}; name it otherwise")
        return name


class ScheduleConfig(Declared):
    """When a night starts, and what a second one does while the first still runs: wait for it, or be refused.

    Of nights that were `missed`, because the machine or its worker was off, the last one is made up for `once`, or all
    are left out (skip). Where jobs wait for one device, the one of the higher `priority` gets it first.
    """

    cron: str = "0 2 * * *"
    timezone: str = "UTC"
    overlap: Literal["wait", "refuse"] = "wait"
    missed: Literal["once", "skip"] = "once"
    priority: Priority = "normal"

    @field_validator("cron")
    @classmethod
    def _cron_comes(cls, cron: str) -> str:
        rule = "must be five cron fields such as '0 2 * * *'"
        if len(cron.split()) != 5:  # Prefect's parser also takes six, with seconds, and @daily
            raise ValueError(f"{rule}; write minute, hour, day, month and weekday")
        croniter = _prefects_croniter()
        if not croniter.is_valid(cron) or {"r", "h"} & set(cron.casefold().split()):  # which Prefect does not draw
            raise ValueError(f"{rule}; see crontab(5), and write * for any")
        try:
            croniter(cron, datetime.now(UTC)).get_next()
        except ValueError as error:
            raise ValueError("must come at some time, but no month has such a day; write another day") from error
        return cron

    @field_validator("timezone")
    @classmethod
    def _timezone_exists(cls, timezone: str) -> str:
        if timezone not in (known := _timezones()):
            near = nearest(timezone, sorted(known)) or "UTC"
            raise ValueError(f"must be an IANA time zone such as Europe/Berlin; write {near}")
        return timezone


@cache
def _prefects_croniter() -> Any:
    """Prefect's own copy of croniter, which is what will fire the schedule. Read from its file, because Prefect takes a
    second of a core to import."""
    prefect = find_spec("prefect")
    assert prefect is not None
    assert prefect.origin is not None
    file = Path(prefect.origin).parent / "_vendor/croniter/croniter.py"
    spec = spec_from_file_location("prefects_croniter", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.croniter


# 50 ms of a core, which a folder of jobs takes once.
_timezones = cache(available_timezones)
