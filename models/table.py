"""A table's rows as a matrix of numbers: one column each, whatever is in it, nothing fitted and nothing scaled.

The same code runs where rows are prepared and where a model is served: a version ships a copy of this file, without the
rest of ours. So it imports nothing of ours and no torch, and all that it knows is in the columns that it is given. What
is fitted on training rows (means, which categories are rare) is preprocessing.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

if TYPE_CHECKING:
    from models.column import Column

TRUE_WORDS, FALSE_WORDS = ("true", "yes", "t", "y"), ("false", "no", "f", "n")
EPOCH = pd.Timestamp("2000-01-01", tz="UTC")
UNSEEN = -1.0


def encode(frame: pd.DataFrame, columns: Sequence[Column]) -> npt.NDArray[np.float32]:
    """Raw rows to a matrix (rows, columns) float32, NaN where a value is missing.

    numeric: the number. boolean: 0 or 1. categorical: the category's place in the list, -1 where it is not in it.
    datetime: days since 2000-01-01 00:00 UTC; a time without a zone counts as UTC. A column that the frame lacks is
    missing in every row; columns that nobody asked for are left out. Raises ValueError where a value cannot be read as
    its column's role: the message names the column, the row by the frame's index, and the value.
    """
    matrix = np.full((len(frame), len(columns)), np.nan, dtype=np.float32)
    for place, column in enumerate(columns):
        if column.name in frame.columns:
            matrix[:, place] = _read(frame[column.name], column)
    return matrix


def recode(
    matrix: npt.NDArray[np.float32], known: Sequence[Column], wanted: Sequence[Column]
) -> npt.NDArray[np.float32]:
    """A matrix of `known` columns as one of `wanted` columns of the same names and roles, whose categories may be
    others: one that is not wanted becomes unseen."""
    places = {column.name: place for place, column in enumerate(known)}
    recoded = np.empty((len(matrix), len(wanted)), dtype=np.float32)
    for place, column in enumerate(wanted):
        values = matrix[:, places[column.name]]
        if column.role == "categorical":
            codes = {category: code for code, category in enumerate(column.categories)}
            before = known[places[column.name]].categories
            table = np.array([*(codes.get(category, UNSEEN) for category in before), UNSEEN], dtype=np.float32)
            there = np.isfinite(values)
            values = np.where(there, table[np.where(there, values, UNSEEN).astype(np.int64)], np.nan)
        recoded[:, place] = values
    return recoded


def without_missing(values: pd.Series[Any], missing: Sequence[str]) -> pd.Series[Any]:
    """Texts without blanks around them, NaN for those that mean that there is no value; numbers and dates as they
    are."""
    if isinstance(values.dtype, pd.StringDtype):
        stripped = values.str.strip()
    elif values.dtype == object:
        stripped = values.map(lambda value: value.strip() if isinstance(value, str) else value)
    else:
        return values
    return stripped.mask(stripped.isin(missing))


def text_of(values: pd.Series[Any]) -> pd.Series[Any]:
    """Values as the texts that name their categories: without blanks around them, and a whole number without `.0`, as
    it is read where a column has gaps and where it has none."""
    if pd.api.types.is_bool_dtype(values):
        return values.map({True: "true", False: "false"})
    texts = values.astype("string").str.strip()
    return texts.str.removesuffix(".0") if pd.api.types.is_float_dtype(values) else texts


def distinct(values: pd.Series[Any], missing: Sequence[str]) -> tuple[npt.NDArray[np.int64], pd.Series[Any]]:
    """Each row's place among the distinct values, -1 where it has none, and those."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.cat.remove_unused_categories()
        codes, found = pd.factorize(without_missing(pd.Series(values.cat.categories), missing))
        return np.append(codes, -1)[values.cat.codes], pd.Series(found)
    codes, found = pd.factorize(without_missing(values, missing))
    return codes, pd.Series(found)


def _read(values: pd.Series[Any], column: Column) -> npt.NDArray[np.float64]:
    """Each distinct value is read once, where they are known: a text costs a hundred times what a number does."""
    read = _READERS[column.role]
    if isinstance(values.dtype, pd.CategoricalDtype):
        try:
            read_once = read(without_missing(pd.Series(values.cat.categories), column.missing), column)
        except ValueError:
            values = values.astype(values.cat.categories.dtype)  # the rows say where it stands, if anywhere
        else:
            numbers: npt.NDArray[np.float64] = np.append(read_once, np.nan)[values.cat.codes]
            return numbers
    return read(without_missing(values, column.missing), column)


def _numbers(values: pd.Series[Any], column: Column) -> npt.NDArray[np.float64]:
    is_number = pd.api.types.is_numeric_dtype(values)
    numbers = _floats(values if is_number else pd.to_numeric(values, errors="coerce"))
    _refuse(values, np.isinf(numbers) if is_number else ~np.isfinite(numbers), column, "a finite number")
    return numbers


def _truths(values: pd.Series[Any], column: Column) -> npt.NDArray[np.float64]:
    words = {"1": 1.0, "0": 0.0} | dict.fromkeys(TRUE_WORDS, 1.0) | dict.fromkeys(FALSE_WORDS, 0.0)
    truths = text_of(values).str.casefold().map(words).astype("float64")
    _refuse(values, truths.isna().to_numpy(), column, "true or false")
    return _floats(truths)


def _codes(values: pd.Series[Any], column: Column) -> npt.NDArray[np.float64]:
    texts = text_of(values)
    codes: npt.NDArray[np.float64] = pd.Index(column.categories, dtype="string").get_indexer(texts).astype(np.float64)
    codes[texts.isna().to_numpy()] = np.nan
    return codes


def _days(values: pd.Series[Any], column: Column) -> npt.NDArray[np.float64]:
    moments = pd.to_datetime(values, errors="coerce", format="ISO8601", utc=True)
    _refuse(values, moments.isna().to_numpy(), column, "a date such as 2026-11-23 or 2026-11-23T02:00:00Z")
    return _floats((moments - EPOCH) / pd.Timedelta(days=1))


def _floats(values: pd.Series[Any]) -> npt.NDArray[np.float64]:
    floats: npt.NDArray[np.float64] = values.to_numpy(dtype=np.float64, na_value=np.nan)
    return floats


def _refuse(values: pd.Series[Any], unread: Any, column: Column, rule: str) -> None:
    if not unread.any():
        return
    bad = np.flatnonzero(unread & values.notna().to_numpy())
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"column {column.name} must hold {rule}, found {values.iloc[row]!r} in row {values.index[row]}"
        )


_READERS = {"numeric": _numbers, "boolean": _truths, "categorical": _codes, "datetime": _days}
