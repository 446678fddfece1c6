"""A Python function of the user's own that returns rows: called where it lies, as in its own repository.

A DataFrame is a table; a pair is features and labels, whatever holds them (lists, tensors, Series). Knows nothing of
what is in them, and of splits.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterable
from contextlib import redirect_stdout
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from tasks.data.rows import DataError, first_repeated

MODULE = "nightly_user_source"
REMEDY = "return a DataFrame, or features (rows, ...) and labels (rows,)"
# What a cell may be, beside nothing: whatever has a text that is always the same.
PLAIN = (str, bytes, bool, int, float, np.generic, Decimal, date, time, UUID, type(None), type(pd.NA), type(pd.NaT))


def rows_of(source: str) -> pd.DataFrame | tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """What the function `path/to/load.py:name` returns. Raises DataError: there is none, it fails, or what it returns
    makes no rows."""
    found = _call(source)
    if isinstance(found, pd.DataFrame):
        return _frame(source, found)
    if not isinstance(found, tuple | list) or len(found) != 2:
        count = f" of {len(found)}" if isinstance(found, tuple | list) else ""
        hint = ", whose rows it must return instead of yielding them" if inspect.isgenerator(found) else ""
        raise DataError(
            f"data.source: {source} must return features and labels, or a DataFrame, found {type(found).__name__}"
            f"{count}{hint}; {REMEDY}"
        )
    return _array(source, "features", found[0], None), _array(source, "labels", found[1], object)


def _call(source: str) -> Any:
    """What it prints goes to stderr: a command's own output may be for a program."""
    path, _, name = source.rpartition(":")
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise DataError(f"data.source: {path} is not a Python file; correct the path")
    module = importlib.util.module_from_spec(spec)
    folder = str(Path(path).resolve().parent)
    sys.path.insert(0, folder)  # as Python does for a file that it is called with: files beside it can be imported
    sys.modules[MODULE] = module  # where dataclasses, typing and pickling look for it
    try:
        with redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
            function = _function(source, module, name)
            return function()
    except DataError:
        raise
    except BaseException as error:
        # Ctrl-C and signals pass: what else is no Exception is sys.exit, or a class of the user's own.
        if not isinstance(error, Exception | SystemExit) and type(error).__module__ != MODULE:
            raise
        raise DataError(
            f"data.source: {source} must return features and labels, or a DataFrame, but {_in_words(error, path)}"
        ) from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _function(source: str, module: ModuleType, name: str) -> Any:
    found = getattr(module, name, None)
    if inspect.isclass(found) or not callable(found):
        kind = "none" if found is None else "a class" if inspect.isclass(found) else f"{type(found).__name__} {name}"
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == MODULE]
        raise DataError(
            f"data.source: {source} must name a function, found {kind}; known are {', '.join(known) or 'no functions'}"
        )
    if inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found):
        raise DataError(f"data.source: {source} must be a plain function, found an async one; write it without async")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise DataError(
            f"data.source: {source} must need no argument, but it is {error}; give its parameters defaults"
        ) from error
    except ValueError:  # a function in C that does not say what it takes
        pass
    return found


def _in_words(error: BaseException, path: str) -> str:
    """What an error of the user's code says, where in the file it came up, and the remedy."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == Path(path)]
    said = str(error).strip().partition("\n")[0][:300]
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r}) in line {lines[-1]}; let it return or raise instead"
    if isinstance(error, SyntaxError):
        return f"it holds a SyntaxError in line {error.lineno}: {error.msg}; correct it"
    where = f" (line {lines[-1]})" if lines else ""
    remedy = "correct it"
    if isinstance(error, ModuleNotFoundError):
        remedy = f"install it beside Nightly Tuner, or put it beside {path}"
    elif isinstance(error, ImportError) and "relative import" in said:
        remedy = "import a file beside it by its name, without a dot"
    elif isinstance(error, RecursionError):
        remedy = "end the recursion"
    return f"raised {type(error).__name__}: {said or 'without a word'}{where}; {remedy}"


def _frame(source: str, frame: pd.DataFrame) -> pd.DataFrame:
    if frame.columns.nlevels > 1:
        raise DataError(
            f"data.source: {source} must return columns with plain names, found a MultiIndex of "
            f"{frame.columns.nlevels} levels; join each name into one text"
        )
    if (repeated := first_repeated(frame.columns)) is not None:
        raise DataError(
            f"data.source: {source} must return columns with names of their own, found {repeated!r} twice; rename one"
        )
    stored: dict[Any, Any] = {}
    for name, dtype in frame.dtypes.items():
        if pd.api.types.is_object_dtype(dtype):
            _check_plain(source, f"column {name}", frame[name])
        if isinstance(dtype, pd.SparseDtype):
            stored[name] = dtype.subtype
        elif isinstance(dtype, np.dtype) and not dtype.isnative:
            stored[name] = dtype.newbyteorder("=")
    return frame.astype(stored)


def _array(source: str, what: str, value: Any, dtype: type | None) -> npt.NDArray[Any]:
    """Features or labels as an array. A list of labels keeps what is in it: NumPy makes 'None' of None among texts."""
    if hasattr(value, "toarray"):
        raise DataError(
            f"data.source: {source} must return {what} as a dense array, found {type(value).__name__}; return its "
            "toarray()"
        )
    try:
        if isinstance(value, list | tuple) and value and all(isinstance(part, torch.Tensor) for part in value):
            value = torch.stack(list(value))
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().to_dense()
            value = value.double() if value.dtype.is_floating_point else value.resolve_conj()
        if np.ma.isMaskedArray(value):
            value = np.ma.filled(value.astype(dtype or np.float64), None if dtype else np.nan)
        array = np.asarray(value, dtype if isinstance(value, list | tuple) else None)
    except Exception as error:
        said = str(error).strip().partition("\n")[0][:300]
        raise DataError(
            f"data.source: {source} must return {what} as an array, or rows of one length, found "
            f"{type(value).__name__}, of which NumPy says {said!r}; {REMEDY}"
        ) from error
    if array.dtype == object:
        _check_plain(source, what, array.flat, max(1, array.size // max(1, len(array))))
    return array


def _check_plain(source: str, what: str, cells: Iterable[Any], each: int = 1) -> None:
    """`each` is how many cells a row has."""
    for place, cell in enumerate(cells):
        if (odd := _odd(cell)) is not None:
            raise DataError(
                f"data.source: {source} must return numbers, texts, truths or dates, found {odd} in row "
                f"{place // each} of {what}; turn it into one of them"
            )


def _odd(cell: Any) -> str | None:
    """What a cell is that has no place in a table or an array."""
    if not isinstance(cell, PLAIN):
        return type(cell).__name__
    if type(cell) is int and cell.bit_length() > sys.float_info.max_exp:
        return f"a whole number of {cell.bit_length()} bits"
    if type(cell) is str and not cell.isascii() and any("\ud800" <= letter <= "\udfff" for letter in cell):
        return f"{cell!r}, which is no text in Unicode"
    return None
