"""How far the tuning is, for whoever watches in Prefect: a bar, and a table of the best trials so far with links to
their runs in MLflow.

Written on a thread of its own, seldom: while its server is away Prefect's client tries again for a minute, and a bar is
worth no trial.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import cast
from uuid import UUID

import httpx
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from infra.deployments import artifact_key
from infra.device import device_use
from models.evaluation.metrics import in_figures
from models.hyperparameters.declared import in_words
from tasks.job import TuningJob
from tasks.study.studies import finished_trials, number_of, ranked, tonights_trials
from tasks.tracking.trials import DIAGNOSIS

BAR_SECONDS = 1
TABLE_SECONDS = 5
BEST_TRIALS = 10

_logger = logging.getLogger(__name__)


class Progress:
    """The two artifacts of the task run that makes it; `trial_page` gives a trial's page in MLflow, None where it is
    not there yet."""

    def __init__(
        self,
        study: optuna.Study,
        job: TuningJob,
        device: torch.device,
        trial_page: Callable[[FrozenTrial], str | None],
    ) -> None:
        self._study, self._job, self._device = study, job, device
        self._trial_page = trial_page
        self._began = self._bar_at = self._table_at = time.monotonic()
        self._done_before = len(finished_trials(study))
        bar = create_progress_artifact(
            self.percent(), key=artifact_key("progress", job.name), description=self.sentence()
        )
        table = create_markdown_artifact(
            self.table(), key=artifact_key("trials", job.name), description="The best trials so far"
        )
        self._bar, self._table = cast(UUID, bar), cast(UUID, table)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="progress")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._submit(self.table())
        self._thread.shutdown(wait=True)

    def update(self) -> None:
        """To be called after each trial."""
        is_free = self._writing is None or self._writing.done()
        now = time.monotonic()
        if is_free and now - self._bar_at >= BAR_SECONDS:
            is_due = now - self._table_at >= TABLE_SECONDS
            self._submit(self.table() if is_due else None)

    def percent(self) -> float:
        return min(100.0, 100 * len(finished_trials(self._study)) / self._job.budget.trials)

    def sentence(self) -> str:
        """`12 of 60 trials, best 0.9786, about 40 s left, CPU 97 %`."""
        complete = ranked(tonights_trials(self._study, TrialState.COMPLETE), self._job)
        parts = [f"{len(finished_trials(self._study))} of {self._job.budget.trials} trials"]
        if complete:
            parts.append(f"best {in_figures(complete[0].values[0])}")
        left = self._seconds_left()
        if left:
            parts.append(f"about {f'{left / 60:.0f} minutes' if left >= 120 else f'{left:.0f} s'} left")
        return ", ".join([*parts, device_use(self._device)])

    def table(self) -> str:
        """The best trials in Markdown, whose tables have links."""
        name = self._job.search.objective
        best = ranked(tonights_trials(self._study, TrialState.COMPLETE), self._job)[:BEST_TRIALS]
        rows = "\n".join(
            f"| {self._linked(trial)} | {in_figures(trial.values[0])} | {trial.user_attrs.get(DIAGNOSIS, '')} | "
            f"{in_words(trial.params)} |"
            for trial in best
        )
        return f"""\
# {self._study.study_name}: {len(finished_trials(self._study))} of {self._job.budget.trials} trials

| trial | validation {name} | diagnosis | hyperparameters |
| --- | --- | --- | --- |
{rows}
"""

    def _linked(self, trial: FrozenTrial) -> str:
        page = self._trial_page(trial)
        return str(number_of(trial)) if page is None else f"[{number_of(trial)}]({page})"

    def _seconds_left(self) -> float | None:
        """At the pace of this process; None before its first trial and after the last."""
        done = len(finished_trials(self._study))
        if done == self._done_before:
            return None
        elapsed = time.monotonic() - self._began
        by_trials = (self._job.budget.trials - done) * elapsed / (done - self._done_before)
        return max(0.0, min(by_trials, 60 * self._job.budget.minutes - elapsed))

    def _submit(self, table: str | None) -> None:
        self._bar_at = time.monotonic()
        if table is not None:
            self._table_at = self._bar_at
        # In this thread's context, so that Prefect knows whose artifacts they are.
        self._writing = self._thread.submit(copy_context().run, self._write, self.percent(), self.sentence(), table)

    def _write(self, percent: float, sentence: str, table: str | None) -> None:
        try:
            update_progress_artifact(self._bar, percent, description=sentence)
            if table is not None:
                with get_client(sync_client=True) as client:
                    client.update_artifact(self._table, ArtifactUpdate(data=table))
        except httpx.HTTPError as error:
            _logger.warning("Prefect does not show how far the tuning is: %s", error)
