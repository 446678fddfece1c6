"""Job files: found by name, read, merged with a night's overrides, and validated before anything starts.

One bad file is an error of its own job only.
"""

from pathlib import Path

from models.hyperparameters.rules import Refused, nearest
from tasks.job.parse import JobError, parse_text
from tasks.job.schema import TuningJob
from tasks.job.sections import MOST_MINUTES, MOST_TRIALS, PresetName
from tasks.job.yaml_text import Text, read_text

OWN_JOBS = Path(__file__).parents[2] / "flows" / "jobs"
SUFFIXES = (".yaml", ".yml")
SMOKE_TRIALS, SMOKE_MINUTES, SMOKE_SEEDS = 8, 5, 2
DEEP = 4  # times the budget of the job's file


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
        near = nearest(name, files)
        raise JobError(f"no job is named {name!r}; {f'write {near}; ' if near else ''}known are {', '.join(files)}")
    text, path = _read(files[name])
    written = parse_text(text, path)
    given: dict[tuple[str, str], object] = {
        ("budget", "trials"): trials,
        ("budget", "minutes"): minutes,
        ("search", "sampler"): sampler,
        ("promotion", "mode"): promotion,
    }
    # Prefect's form sends every field, changed or not.
    changed = {
        (section, field): value
        for (section, field), value in given.items()
        if value is not None and value != getattr(getattr(written, section), field)
    }
    overrides = changed if preset == "nightly" else _preset(preset, written) | changed
    return parse_text(text, path, overrides) if overrides else written


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


def load_jobs(extra_folder: Path | None) -> tuple[list[TuningJob], list[JobError]]:
    """Every job whose file is right, those that come with us and those in the extra folder; and what is wrong with the
    others. Raises JobError where the extra folder is none."""
    jobs, errors = [], []
    for name in job_files(extra_folder):
        try:
            jobs.append(load_job(name, extra_folder))
        except JobError as error:
            errors.append(error)
    return jobs, errors


def job_files(extra_folder: Path | None) -> dict[str, list[Path]]:
    """The files of each job by its name, more than one where it is not known which counts; a job in the extra folder
    hides one of ours with the same name. Raises JobError where the extra folder is none."""
    if extra_folder is not None and not extra_folder.is_dir():
        raise JobError(f"NIGHTLY_JOBS must be a folder of job files, found {extra_folder}; create it or unset it")
    files: dict[str, list[Path]] = {}
    for folder in [OWN_JOBS] if extra_folder is None else [OWN_JOBS, extra_folder]:
        here: dict[str, list[Path]] = {}
        # Hidden files are an editor's, or a Mac's.
        for path in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.name[0] != "."):
            here.setdefault(path.stem, []).append(path)
        files |= here
    return files


def _read(paths: list[Path]) -> tuple[Text, Path]:
    """Raises JobError: the job has two files, or its file is none that can be read."""
    path, *others = paths
    if others:
        raise JobError(f"{path}: a job must have one file, found {others[0].name} too; rename or remove one of them")
    try:
        return read_text(path), path
    except Refused as error:
        raise JobError.of(path, list(error.mistakes)) from error
