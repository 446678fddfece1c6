"""What a night does while MLflow is unavailable: it goes on, says so, and leaves the rest to the next night."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.exceptions import MlflowException

from infra.errors import NotOurs

_logger = logging.getLogger(__name__)


@contextmanager
def mlflow_may_be_unavailable(what: str) -> Iterator[None]:
    """Whatever MLflow misses here, the next night's reconcile makes up for: it must cost no trial and no promotion."""
    try:
        yield
    except (MlflowException, NotOurs) as error:
        reason = error.message if isinstance(error, MlflowException) else error
        _logger.warning("MLflow misses %s until the next night: %s", what, reason)
