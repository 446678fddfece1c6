"""The job: one YAML file that says what is tuned, on which data, with what budget, and when it is promoted."""

from tasks.job.files import JobError, job_files, load_job, load_jobs, parse_job
from tasks.job.schema import NAME_PATTERN, TuningJob
from tasks.job.sections import (
    BudgetConfig,
    CheckName,
    DataConfig,
    Minutes,
    PresetName,
    Priority,
    PromotionConfig,
    PromotionMode,
    PrunerName,
    SamplerName,
    Severity,
    Trials,
)

__all__ = [
    "NAME_PATTERN",
    "BudgetConfig",
    "CheckName",
    "DataConfig",
    "JobError",
    "Minutes",
    "PresetName",
    "Priority",
    "PromotionConfig",
    "PromotionMode",
    "PrunerName",
    "SamplerName",
    "Severity",
    "Trials",
    "TuningJob",
    "job_files",
    "load_job",
    "load_jobs",
    "parse_job",
]
