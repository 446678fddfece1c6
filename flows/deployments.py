"""The deployment of a job in Prefect: how its nights are called there, and what its file says of them.

Imported by the command line, so Prefect is imported only where it is needed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infra.deployments import Deployment
    from tasks.job import TuningJob

FLOW = "nightly_tuning"


def path_of(job_name: str) -> str:
    """The deployment's name in Prefect."""
    return f"{FLOW}/{job_name}"


def deployment_of(job: "TuningJob") -> "Deployment":
    """What Prefect is told of a job."""
    from infra.deployments import Deployment

    return Deployment(
        flow=FLOW,
        name=job.name,
        description=job.description,
        tags=(job.family.name, f"{job.schedule.priority} priority"),
        cron=job.schedule.cron,
        timezone=job.schedule.timezone,
        overlap=job.schedule.overlap,
        parameters={"job": job.name},
        form_defaults={
            "trials": job.budget.trials,
            "minutes": job.budget.minutes,
            "sampler": job.search.sampler,
            "promotion": job.promotion.mode,
        },
    )
