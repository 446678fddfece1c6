"""What fields must not say together: what can only fail, and what has no effect beside the rest.

Each field is right by itself by then. Knows nothing of how a file is read.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from models.families.family import FAMILIES
from models.hyperparameters.rules import NOTHING, Mistake, nearest
from models.rows.shapes import DataShape
from tasks.job.kinds import IN_WORDS, SKLEARN_SETS, TABLES, UNREAD, Kind, kind_of
from tasks.job.schema import TuningJob
from tasks.job.sections import DataConfig

# Of all rows; fewer cannot teach what the others are to judge.
LEAST_TRAINING_SHARE = 0.2
SMALLEST_SHAPES = {"mlp": (1,), "cnn": (1, 1, 1)}


def contradictions(job: TuningJob) -> Iterator[Mistake]:
    """What no night of this job could do."""
    yield from _of_data(job)
    yield from _of_search(job)
    budget, promotion = job.budget, job.promotion
    if budget.max_cost is not None and budget.price_per_hour is None:
        yield _mistake(
            "budget.max_cost",
            "needs a price_per_hour beside it",
            budget.max_cost,
            "add the price",
            "budget.price_per_hour",
        )
    is_share = job.objective.problem == "classification" and job.objective.direction == "maximize"
    if is_share and promotion.min_improvement >= 1:
        rule = f"must be below 1, because {job.search.objective} lies between 0 and 1"
        remedy = f"write {promotion.min_improvement / 100:g} for {promotion.min_improvement:g} points of a hundred"
        yield _mistake("promotion.min_improvement", rule, promotion.min_improvement, remedy, "search.objective")


def without_effect(job: TuningJob) -> Iterator[Mistake]:
    """What a job file says in vain: a field whose value differs from its default, and which nothing looks at."""
    data, kind = job.data, kind_of(job.data.source)
    here = f"where the source is {IN_WORDS[kind]}"
    is_csv, is_table, is_classification = kind == "csv", kind in TABLES, job.objective.problem == "classification"
    no_features = {data.split_by: "data.split_by", data.time_column: "data.time_column", data.target: "data.target"}
    # A field, the one beside which it is in vain, whether it is not, and why it would be.
    for field, beside, has_effect, why in (
        ("data.labels", "data.source", kind == "idx", f"{here}: only IDX files of images have one beside them"),
        ("data.query", "data.source", kind == "database", f"{here}: only a database is asked"),
        ("data.header", "data.source", is_csv, f"{here}: only CSV files have one"),
        ("data.delimiter", "data.source", is_csv, f"{here}: only CSV files have one"),
        ("data.missing", "data.source", is_table or kind == "npz", f"{here}, which holds no texts"),
        *(
            (f"data.{name}", "data.source", is_table, f"{here}, which has no columns")
            for name in ("target", "decimal", "thousands", "dates", "roles", "split_by", "time_column")
        ),
        *(
            (f"data.roles.{name}", column, False, f"on the column of {column}, which is no feature")
            for name, role in data.roles.items()
            # A target with a unit, such as 25 EUR, is read where its role is numeric.
            if (column := no_features.get(name)) is not None and (column, role) != ("data.target", "numeric")
        ),
        ("data.tidy_labels", "search.objective", is_classification, "where the target is a number"),
        ("data.test_fraction", "data.time_column", data.time_column is None, "where rows are tested from test_from on"),
        ("data.max_rows_lost", "data.checks", data.checks.get("rows_lost") != "ignore", "where rows_lost is ignored"),
        ("search.cost_tolerance", "search.cost", job.search.cost != "none", "where search.cost is none"),
        ("confirm.ship", "confirm.seeds", job.confirm.seeds > 1, "where confirm.seeds is 1: one model is no ensemble"),
        ("promotion.ask_minutes", "promotion.mode", job.promotion.mode == "ask", "where promotion.mode is not ask"),
        (
            "promotion.max_calibration_error", "search.objective", is_classification,
            f"for the objective {job.search.objective}: only probabilities of classes are calibrated",
        ),
    ):  # fmt: skip
        value, default = _value_of(job, field)
        if not has_effect and value != default:
            yield _mistake(field, f"has no effect {why}", value, "remove it", beside)


def hints(job: TuningJob) -> Iterator[str]:
    """What is allowed, but is probably not what was meant."""
    for name, domain in job.search.space.items():
        field = job.family.hyperparameters.model_fields.get(name)
        match domain:
            case [float() | int() as low, float() | int() as high] if (
                low < high and field and field.annotation is float
            ):
                yield (
                    f"search.space.{name} is two choices, {low:g} and {high:g}; for all values between them write "
                    f"{name}: {{low: {low:g}, high: {high:g}{', log: true' if low > 0 else ''}}}"
                )


def contradictions_of_shape(job: TuningJob, shape: DataShape) -> Iterator[Mistake]:
    """What cannot be trained on rows of this shape."""
    if job.model == "cnn" and len(shape.features) != 3:
        yield _no_images(f"the rows have the shape {shape.features}")
    elif (mistake := _too_small_a_limit(job, shape)) is not None:
        yield mistake


def _of_data(job: TuningJob) -> Iterator[Mistake]:
    data, kind = job.data, kind_of(job.data.source)
    if kind == "built_in" and (name := data.source.removeprefix("sklearn://")) not in SKLEARN_SETS:
        rule = f"must be one of sklearn://{', sklearn://'.join(SKLEARN_SETS)}"
        near = nearest(name, SKLEARN_SETS)
        yield _mistake("data.source", rule, data.source, f"write sklearn://{near}" if near else "choose one of them")
    if kind == "images" and data.source.lower().endswith(UNREAD):
        rule = "must be a file that is read (CSV, Parquet, NumPy, IDX)"
        yield _mistake("data.source", rule, data.source, "save it as one")
    if kind == "database" and data.query is None:
        yield _mistake(
            "data.query", "is missing: it says what to select from the database", NOTHING, "add it", "data.source"
        )
    if kind == "idx" and data.labels is None:
        yield _mistake(
            "data.labels", "is missing: it names the file of labels beside the images", NOTHING, "add it", "data.source"
        )
    if kind in ("csv", "parquet", "database") and job.model == "cnn":
        yield _no_images(f"the source is {IN_WORDS[kind]}")
    pair: dict[str, Any] = {"time_column": data.time_column, "test_from": data.test_from}
    for (field, value), (other, missing) in (pair.items(), reversed(pair.items())):
        if value is not None and missing is None:
            yield _mistake(f"data.{field}", f"needs {other} beside it", value, "give both or neither", f"data.{other}")
    if data.time_column is not None and data.split_by is not None:
        rule = f"must be left out beside time_column, which puts rows of one {data.split_by} on two sides"
        yield _mistake("data.split_by", rule, data.split_by, "leave out one of them", "data.time_column")
    for field in ("split_by", "time_column"):
        if data.target is not None and getattr(data, field) == data.target:
            yield _mistake(
                f"data.{field}", "must be another column than the target", data.target, "name another", "data.target"
            )
    if not isinstance(data.raw, bool):
        yield from _of_raw(data, data.raw, kind)
    if data.thousands == (data.decimal or "."):
        rule = f"decimal and thousands must be two marks, found {data.thousands!r} for both"
        rule += "" if data.decimal else " (decimal is a point unless it is said)"
        yield _mistake("data.thousands", rule, NOTHING, "correct one of them")
    held_out = data.validation_fraction + (data.test_fraction if data.time_column is None else 0)
    if held_out > 1 - LEAST_TRAINING_SHARE:
        rule = f"must leave {LEAST_TRAINING_SHARE:.0%} of the rows to train on, found {1 - held_out:.0%} left by"
        rule += f" test_fraction {data.test_fraction:g} and validation_fraction {data.validation_fraction:g}"
        yield _mistake("data.test_fraction", rule, NOTHING, "lower one of them", "data.validation_fraction")


def _of_raw(data: DataConfig, names: tuple[str, ...], kind: Kind) -> Iterator[Mistake]:
    if kind not in TABLES:
        rule = f"must be true or false where the source is {IN_WORDS[kind]}, which has no columns"
        yield _mistake("data.raw", rule, list(names), "set true")
    for name in names:
        if name in (data.target, data.split_by, data.time_column) or data.roles.get(name) == "ignored":
            yield _mistake("data.raw", "must name features", name, "leave it out")
    if len(set(names)) < len(names):
        yield _mistake("data.raw", "must name each column once", list(names), "leave out the second")


def _of_search(job: TuningJob) -> Iterator[Mistake]:
    search = job.search
    if search.cost != "none" and search.pruner != "none":
        rule = f"must be none where cost is {search.cost}, because Optuna prunes by a single objective"
        yield _mistake("search.pruner", rule, search.pruner, "set pruner: none", "search.cost")
    elif search.sampler == "gp" and search.pruner != "none":
        rule = "must be none where sampler is gp, because it learns from trials that were trained to their end only"
        yield _mistake(
            "search.pruner", rule, search.pruner, "set pruner: none, or choose sampler tpe", "search.sampler"
        )
    if search.cost != "none" and search.sampler == "cmaes":
        rule = f"must be another where cost is {search.cost}, because cmaes knows a single objective"
        yield _mistake("search.sampler", rule, search.sampler, "choose tpe or gp", "search.cost")
    if not job.family.searched(job.space):
        rule = "fixes every hyperparameter, so that there is nothing to search"
        yield _mistake("search.space", rule, search.space, "leave one out, or give it choices or {low, high}")
    shape = SMALLEST_SHAPES.get(job.model)
    if shape is not None:
        outputs = 2 if job.objective.problem == "classification" else 1
        least = DataShape(features=shape, outputs=outputs, problem=job.objective.problem)
        if (mistake := _too_small_a_limit(job, least)) is not None:
            yield mistake


def _too_small_a_limit(job: TuningJob, shape: DataShape) -> Mistake | None:
    limit = job.search.max_parameters
    if limit is None or job.model not in FAMILIES:
        return None
    from models.families.networks import least_parameters  # with torch, which other jobs need not wait for

    least = least_parameters(job.family, job.space, shape)
    if limit >= least:
        return None
    rule = f"must be at least {least}, the size of the smallest model of search.space"
    return _mistake("search.max_parameters", rule, limit, "raise it, or allow a smaller width and depth")


def _no_images(why: str) -> Mistake:
    rule = f"must be another than cnn where {why}, because that needs images of shape (channels, height, width)"
    return _mistake("model", rule, "cnn", "choose mlp, or another source", "data.source")


def _value_of(job: TuningJob, field: str) -> tuple[Any, Any]:
    """A field's value, and what it is where nothing is said."""
    section, name, *rest = field.split(".", maxsplit=2)
    part: BaseModel = getattr(job, section)
    value = getattr(part, name)
    return (
        (value[rest[0]], None)
        if rest
        else (value, part.__class__.model_fields[name].get_default(call_default_factory=True))
    )


def _mistake(field: str, rule: str, found: Any, remedy: str, *beside: str) -> Mistake:
    """`beside` are the other fields that the rule is about."""
    place, *others = (tuple(name.split(".", maxsplit=2)) for name in (field, *beside))
    return Mistake(field=place, rule=rule, found=found, remedy=remedy, beside=tuple(others))
