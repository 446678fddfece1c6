"""Other devices that help with a night: a run of the worker flow each, replaced where it crashes."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context

import httpx
import optuna
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.deployments import run_deployment
from prefect.states import Cancelled, Crashed

from infra.deployments import WORKER, worker_runs
from infra.ours import our_deployment
from tasks.job import TuningJob
from tasks.study.leases import lost_flow_runs, workers_of

MOST_REPLACEMENTS = 3
REPLACEMENT_SECONDS = 5

_logger = logging.getLogger(__name__)


@contextmanager
def extra_workers(study: optuna.Study, job: TuningJob) -> Iterator[None]:
    """Runs of the worker flow for the other devices that the job may use. Those that a night before this one started
    count too; one that crashes is replaced, three times a night; those that nobody took are cancelled as the search
    ends, those whose process is gone are crashed."""
    if job.budget.workers == 1:
        yield
        return
    with get_client(sync_client=True) as prefect:
        waiting = worker_runs(prefect, study.study_name, StateType.SCHEDULED, StateType.PENDING)
        crashed = len(worker_runs(prefect, study.study_name, StateType.CRASHED))
    for _ in range(job.budget.workers - 1 - len(waiting) - len(workers_of(study.user_attrs))):
        _start_worker(study, job)
    ended = threading.Event()

    def replace() -> None:
        for known in range(crashed, crashed + MOST_REPLACEMENTS):
            while not _has_crashed(study, known):
                if ended.wait(REPLACEMENT_SECONDS):
                    return
            _logger.warning("a worker's run crashed; another is started in its place")
            with suppress(httpx.HTTPError):
                _start_worker(study, job)

    # In this thread's context, so that Prefect knows whose runs they are.
    replacing = threading.Thread(target=copy_context().run, args=(replace,), name="replace", daemon=True)
    replacing.start()
    try:
        yield
    finally:
        ended.set()
        replacing.join()
        with get_client(sync_client=True) as prefect:
            for run in worker_runs(prefect, study.study_name, StateType.SCHEDULED, StateType.PENDING):
                prefect.set_flow_run_state(run.id, Cancelled(message="The search is over."), force=True)
            for run in worker_runs(prefect, study.study_name, StateType.RUNNING):
                if str(run.id) in lost_flow_runs(study.user_attrs):
                    prefect.set_flow_run_state(run.id, Crashed(message="Its process is gone."), force=True)


def _start_worker(study: optuna.Study, job: TuningJob) -> None:
    parameters = {"job": job.name, "study": study.study_name}
    with get_client(sync_client=True) as prefect:
        worker = our_deployment(prefect, WORKER.path).id
    run_deployment(worker, parameters=parameters, timeout=0, tags=[study.study_name])


def _has_crashed(study: optuna.Study, known: int) -> bool:
    """Whether more of the study's worker runs have crashed than are known of; not while Prefect is away."""
    try:
        with get_client(sync_client=True) as prefect:
            return len(worker_runs(prefect, study.study_name, StateType.CRASHED)) > known
    except httpx.HTTPError:
        return False
