"""Job files: found by name, read, merged with a night's overrides, and validated as one TuningJob.

All of that is before anything starts; what is wrong is said in one sentence.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from infra.errors import ExpectedError
from tasks.job.schema import TuningJob
from tasks.job.sections import MOST_MINUTES, MOST_TRIALS, PresetName

OWN_JOBS = Path(__file__).parents[2] / "flows" / "jobs"
MAX_JOB_BYTES = 64 * 1024
SMOKE_TRIALS, SMOKE_MINUTES, SMOKE_SEEDS = 8, 5, 2
DEEP = 4  # times the budget of the job's file


class JobError(ExpectedError):
    """A job is wrong; the message names the file or field, the rule, the value found and the remedy."""


def load_job(
    name: str,
    extra_folder: Path | None,
    *,
    preset: PresetName = "nightly",
    trials: int | None = None,
    minutes: float | None = None,
    sampler: str | None = None,
    promotion: str | None = None,
) -> TuningJob:
    """The job of that name with a night's overrides merged in; None leaves what the file says.

    A preset decides whatever is left as the file says: smoke makes a short night that promotes nothing, deep one of
    four times the budget, and nightly is the file itself. Raises JobError: no job has that name (the known ones are
    listed), or what is merged is no valid job.
    """
    files = job_files(extra_folder)
    if name not in files:
        raise JobError(f"no job is named {name!r}; known are {', '.join(files)}")
    content = _read_mapping(files[name])
    given: dict[tuple[str, str], object] = {
        ("budget", "trials"): trials,
        ("budget", "minutes"): minutes,
        ("search", "sampler"): sampler,
        ("promotion", "mode"): promotion,
    }
    overrides = {place: value for place, value in given.items() if value is not None}
    if preset != "nightly":
        written = parse_job(content, files[name])
        # Prefect's form sends every field, changed or not.
        changed = {
            (section, field): value
            for (section, field), value in overrides.items()
            if value != getattr(getattr(written, section), field)
        }
        overrides = _preset(preset, written) | changed
    for (section, field), value in overrides.items():
        content[section] = {**(content.get(section) or {}), field: value}
    try:
        return parse_job(content, files[name])
    except JobError as error:
        if not overrides:
            raise
        chosen = ", ".join(f"{section}.{field} {value}" for (section, field), value in overrides.items())
        raise JobError(f"{error} (the file was overridden with {chosen})") from error


def _preset(preset: PresetName, job: TuningJob) -> dict[tuple[str, str], object]:
    if preset == "smoke":
        return {
            ("budget", "trials"): min(job.budget.trials, SMOKE_TRIALS),
            ("budget", "minutes"): min(job.budget.minutes, SMOKE_MINUTES),
            ("confirm", "candidates"): 1,
            ("confirm", "seeds"): min(job.confirm.seeds, SMOKE_SEEDS),
            ("promotion", "mode"): "never",
        }
    return {
        ("budget", "trials"): min(DEEP * job.budget.trials, MOST_TRIALS),
        ("budget", "minutes"): min(DEEP * job.budget.minutes, MOST_MINUTES),
    }


def load_jobs(extra_folder: Path | None) -> list[TuningJob]:
    """Every job: those that come with us and those in the extra folder. Raises JobError for the first bad file."""
    return [load_job(name, extra_folder) for name in job_files(extra_folder)]


def job_files(extra_folder: Path | None) -> dict[str, Path]:
    """Job files by name; a job in the extra folder hides one of ours with the same name.

    Raises JobError where the extra folder is none.
    """
    if extra_folder is not None and not extra_folder.is_dir():
        raise JobError(f"NIGHTLY_JOBS must be a folder of job files, found {extra_folder}; create it or unset it")
    folders = [OWN_JOBS] if extra_folder is None else [OWN_JOBS, extra_folder]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def parse_job(content: Mapping[str, Any], path: Path) -> TuningJob:
    """Validate a job file's content. Raises JobError with every problem in one sentence each."""
    if content.get("name") != path.stem:
        raise JobError(f"{path}: name must equal the file's name {path.stem!r}, found {content.get('name')!r}")
    # A path in a job file means the same wherever the night runs.
    data, model = content.get("data"), content.get("model")
    if isinstance(data, dict):
        places = {
            name: str(path.parent / place)
            for name in ("source", "labels")
            if isinstance(place := data.get(name), str) and "://" not in place
        }
        if str(data.get("source")).startswith("sqlite:///"):
            database = data["source"].removeprefix("sqlite:///")
            places["source"] = f"sqlite:///{(path.parent / database).absolute()}"
        content = {**content, "data": {**data, **places}}
    if isinstance(model, str) and ".py:" in model:
        content = {**content, "model": str(path.parent / model)}
    try:
        return TuningJob.model_validate(content)
    except ValidationError as error:
        raise JobError("; ".join(_sentence(path, problem) for problem in error.errors())) from error


def _read_mapping(path: Path) -> dict[str, Any]:
    if (size := path.stat().st_size) > MAX_JOB_BYTES:
        raise JobError(f"{path}: a job file may have {MAX_JOB_BYTES} bytes at most, found {size}; shorten it")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)  # noqa: S506 a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = re.sub(r"\s+", " ", str(error))
        raise JobError(f"{path}: must be YAML without anchors or tags, but {reason}; mend it") from error
    if not isinstance(content, dict):
        raise JobError(f"{path}: must be a mapping of fields such as `name: ...`, found {type(content).__name__}")
    return content


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: nested ones grow a small file without limit (billion laughs)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("an alias (*name) stands in it")
        return super().compose_node(parent, index)


def _sentence(path: Path, problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"{path}: {field} is not a field of a job; remove it or correct its name"
    if problem["type"] == "missing":
        return f"{path}: {field} is missing; add it"
    # A validator of ours across fields names the field and the value by itself, and has no single input.
    found = "" if not field or ", found " in reason else f", found {problem['input']!r}"
    return f"{path}: {field}{': ' if field else ''}{reason}{found}"
