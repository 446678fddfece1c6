"""The job: one YAML file that says what is tuned, on which data, with what budget, and when it is promoted."""

from tasks.job.files import job_files, load_job, load_jobs
from tasks.job.parse import JobError, check_shape, parse_job
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
from tasks.job.together import hints

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
    "check_shape",
    "hints",
    "job_files",
    "load_job",
    "load_jobs",
    "parse_job",
]
