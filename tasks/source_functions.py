"""A Python function of the user's own that returns rows.

Knows nothing of what is in them, and of splits.
"""

import importlib.util
from pathlib import Path
from typing import Any

from tasks.rows import DataError


def call(source: str) -> Any:
    path, _, function = source.rpartition(":")
    spec = importlib.util.spec_from_file_location("nightly_user_source", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise DataError(f"data.source: {path} is not a Python file; correct the path")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, function)()
    except Exception as error:
        raise DataError(
            f"data.source: {source} must return features and labels, but raised {type(error).__name__}: {error}"
        ) from error


def pair(source: str, found: Any) -> tuple[Any, Any]:
    try:
        features, labels = found
    except (TypeError, ValueError) as error:
        raise DataError(
            f"data.source: {source} must return features and labels, or a DataFrame, found {type(found).__name__}"
        ) from error
    return features, labels
