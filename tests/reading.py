"""Sources read whole, for tests that look at what their rows became."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.rows.shapes import Problem
from tasks.data.rows import Rows
from tasks.data.sources import read_rows
from tasks.job import DataConfig

ROWS = 60


@dataclass(frozen=True)
class Read:
    """All rows of a source."""

    known: Rows
    features: NDArray[np.float32]
    target: NDArray[Any]


def read(source: Path | str, problem: Problem = "classification", **data: Any) -> Read:
    with tempfile.TemporaryDirectory() as scratch:
        known = read_rows(DataConfig(source=str(source), **data), problem, Path(scratch), Path(scratch))
        chunks = list(known.chunks())
    return Read(known, *(np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("features", "target")))


def roles_of(rows: Rows) -> dict[str, str]:
    return {described.name: described.role for described in rows.described}


def a_column(folder: Path, texts: list[str]) -> Path:
    """A CSV file with the texts, over and over, in column v, beside whole numbers and a target."""
    draw = np.random.default_rng(0)
    column = [texts[row % len(texts)] for row in range(ROWS)]
    frame = pd.DataFrame({"v": column, "u": draw.integers(0, 9, ROWS), "y": draw.choice(["a", "b"], ROWS)})
    frame.to_csv(folder / "rows.csv", index=False)
    return folder / "rows.csv"


def values_of(rows: Read, texts: list[str]) -> list[float]:
    """What the first of the texts in column v were read as."""
    place = [column.name for column in rows.known.columns].index("v")
    return [float(value) for value in rows.features[: len(texts), place]]
