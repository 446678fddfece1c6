"""The benchmarks' data, as functions that a job's `data.source` can name.

scikit-learn's digits are always there; MNIST's 10,000 test images, the census and the wines lie in the folder that
NIGHTLY_SHARED_DATA names.
"""

import csv
import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

DATASETS = Path(__file__)
Rows = tuple[npt.NDArray[Any], npt.NDArray[Any]]

ADULT_NUMBERS = (0, 2, 4, 10, 11, 12)  # age, fnlwgt, education-num, capital-gain, capital-loss, hours-per-week


def has_shared_data() -> bool:
    return "NIGHTLY_SHARED_DATA" in os.environ


def shared(name: str) -> Path:
    return Path(os.environ["NIGHTLY_SHARED_DATA"]) / name


def mnist() -> Rows:
    """10,000 images (1, 28, 28) of handwritten digits."""
    folder = shared("mnist")
    images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    return (
        np.frombuffer(images, dtype=np.uint8, offset=16).reshape(-1, 1, 28, 28) / np.float32(255),
        np.frombuffer(labels, dtype=np.uint8, offset=8),
    )


def adult() -> Rows:
    """48,842 people: six numbers and eight categories, one-hot; whether they earn above 50,000 dollars."""
    rows = []
    for name in ("adult-train.csv", "adult-test.csv"):
        with shared(f"adult/{name}").open(newline="") as file:
            rows += [[cell.strip() for cell in row] for row in csv.reader(file) if len(row) == 15]
    table = np.array(rows)
    columns = [table[:, [column]].astype(np.float32) for column in ADULT_NUMBERS]
    for column in range(14):
        if column not in ADULT_NUMBERS:
            names, codes = np.unique(table[:, column], return_inverse=True)
            columns.append(np.eye(len(names), dtype=np.float32)[codes])
    return np.concatenate(columns, axis=1), np.char.rstrip(table[:, 14], ".")


def wine_quality() -> Rows:
    """4,898 white wines: eleven measurements; a score from 3 to 9, here as a number to predict."""
    table = np.loadtxt(shared("winequality/winequality-white.csv"), delimiter=",", dtype=np.float32)
    return table[:, :11], table[:, 11]


def _digits_of_night(night: int) -> Rows:
    """The digits as they would have grown: night 1 has 60 % of the rows, night 5 all."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[: int(len(labels) * (0.5 + 0.1 * night))]
    return images[order], labels[order]


def digits_of_night_1() -> Rows:
    return _digits_of_night(1)


def digits_of_night_2() -> Rows:
    return _digits_of_night(2)


def digits_of_night_3() -> Rows:
    return _digits_of_night(3)


def digits_of_night_4() -> Rows:
    return _digits_of_night(4)


def digits_of_night_5() -> Rows:
    return _digits_of_night(5)
