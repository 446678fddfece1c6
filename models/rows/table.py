"""A table's rows as a matrix of numbers: one column each, whatever is in it, nothing fitted and nothing scaled.

The same code runs where rows are prepared and where a model is served: a version ships a copy of this file, without the
rest of ours. So it imports nothing of ours and no torch, and all that it knows is in the columns that it is given. What
is fitted on training rows (means, which categories are rare) is preprocessing.py's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

if TYPE_CHECKING:
    from models.rows.column import Column

Number = TypeVar("Number", np.float64, np.int64)

TRUE_WORDS, FALSE_WORDS = ("true", "yes", "t", "y"), ("false", "no", "f", "n")
EPOCH = pd.Timestamp("2000-01-01", tz="UTC")
DAY_MICROSECONDS = 86_400_000_000
NO_MOMENT = np.iinfo(np.int64).min
UNSEEN = -1.0
# The squares of larger numbers are infinite, and sums of these; what is larger is a mark for a missing value.
LARGEST = 1e150
BLANKS = " \u00a0\u2009\u202f"
MARKS = {" ": f"[{BLANKS}]", "'": "['\u2019]", ",": ",", ".": r"\."}
CURRENCY = (
    r"[A-Z]{0,3}[$\u00a2-\u00a5\u0e3f\u20a0-\u20cf]|(?:Rs|kr|Fr|AED|AUD|BRL|CAD|CHF|CNY|CZK|DKK|EUR|GBP|HKD|HUF|IDR|ILS|"
    r"INR|JPY|KRW|MXN|NOK|NZD|PLN|RMB|RUB|SAR|SEK|SGD|THB|TRY|USD|ZAR)\.?"
)
# -$ 1,234.50 or (12 kg) or 5e3-: at most one sign, at most one unit; digits and marks are looked at afterwards.
_NUMBER = re.compile(
    rf"(?P<open>\()?[{BLANKS}]*(?P<first>[-+\u2212])?[{BLANKS}]*(?P<before>{CURRENCY})?[{BLANKS}]*(?P<second>[-+\u2212])?"
    rf"(?P<digits>[0-9.,](?:[0-9.,'\u2019{BLANKS}]*[0-9.,])?)(?P<power>[eE][-+\u2212]?[0-9]+)?"
    rf"[{BLANKS}]*(?P<after>[^\W\d_][^\d(){{}}\-+]{{0,11}}|[%\u2030\u00b0$\u00a2-\u00a5\u0e3f\u20a0-\u20cf][^\d()\-+]{{0,3}}|)"
    rf"[{BLANKS}]*(?P<last>[-\u2212])?(?P<close>\))?"
)

_YEAR_FIRST = (
    r"(?:\d{4}|\d{4}-\d{1,2}|\d{4}-\d{1,2}-\d{1,2}|\d{4}/\d{1,2}/\d{1,2}|\d{4}\.\d{1,2}\.\d{1,2}|\d{8})(?:[T ].*)?"
)


class WrittenNumber(NamedTuple):
    """What a text says of a number: digits with their marks, as `1.234,5`, a power of ten as `e3`, and the unit beside
    it; None where there is nothing but a sign before the digits."""

    digits: str
    power: str
    is_negative: bool
    unit: str | None


Form = Literal["number", "truth", "moment"]
FORMS: tuple[Form, ...] = ("number", "truth", "moment")
# With a needless zero in front (007) it is a code.
_DECIMAL = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_SHORTEST = re.compile(r"0|-?[1-9][0-9]*|-?(?:0|[1-9][0-9]*)\.[0-9]*[1-9]")
_MOMENT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}([ T][0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]+)?)?(Z|[+-][0-9]{2}:?[0-9]{2})?)?"
)


def encode(frame: pd.DataFrame, columns: Sequence[Column]) -> npt.NDArray[np.float64]:
    """Raw rows to a matrix (rows, columns) float64, NaN where a value is missing.

    numeric: the number. boolean: 0 or 1. categorical: the category's place in the list, -1 where it is not in it.
    datetime: days since 2000-01-01 00:00 UTC; a time without a zone counts as UTC. A column that the frame lacks is
    missing in every row; columns that nobody asked for are left out. Raises ValueError where a value cannot be read as
    its column's role: the message names the column, the row by the frame's index, and the value.
    """
    matrix = np.full((len(frame), len(columns)), np.nan)
    held = {column_name(name): name for name in frame.columns}
    for place, column in enumerate(columns):
        if column.name in held:
            matrix[:, place] = _read(frame[held[column.name]], column)
    return matrix


def recode(
    matrix: npt.NDArray[np.floating[Any]], known: Sequence[Column], wanted: Sequence[Column]
) -> npt.NDArray[np.floating[Any]]:
    """A matrix of `known` columns as one of `wanted` columns of the same names and roles, whose categories may be
    others: one that is not wanted becomes unseen."""
    places = {column.name: place for place, column in enumerate(known)}
    recoded = np.empty((len(matrix), len(wanted)), dtype=matrix.dtype)
    for place, column in enumerate(wanted):
        values = matrix[:, places[column.name]]
        if column.role == "categorical":
            codes = {category: code for code, category in enumerate(column.categories)}
            before = known[places[column.name]].categories
            table = np.array([*(codes.get(category, UNSEEN) for category in before), UNSEEN])
            there = np.isfinite(values)
            values = np.where(there, table[np.where(there, values, UNSEEN).astype(np.int64)], np.nan)
        recoded[:, place] = values
    return recoded


def microseconds(frame: pd.DataFrame, column: Column) -> npt.NDArray[np.int64]:
    """Each row's moment (rows,) in a column of dates, in microseconds since 2000-01-01 00:00 UTC, rounded down;
    NO_MOMENT where it is missing. Raises ValueError as `encode` does."""
    return _each_distinct(_moments, frame[column.name], column, NO_MOMENT)


def column_name(name: object) -> str:
    """Give a column's name as a text, in the Unicode form that is usual (NFC)."""
    return unicodedata.normalize("NFC", str(name))


def without_missing(values: pd.Series[Any], missing: Sequence[str]) -> pd.Series[Any]:
    """Texts without blanks around them, NaN for those that mean that there is no value; numbers and dates as they
    are."""
    if isinstance(values.dtype, pd.StringDtype):
        stripped = values.str.strip()
    elif values.dtype == object:
        # Left to itself pandas would make floats of whole numbers beside a gap.
        plain = [value.strip() if isinstance(value, str) else value for value in values]
        stripped = pd.Series(plain, index=values.index, dtype=object)
    else:
        return values
    written = [unicodedata.normalize(form, text) for text in missing for form in ("NFC", "NFD")]
    return stripped.mask(stripped.isin(written))


def text_of(values: pd.Series[Any]) -> pd.Series[Any]:
    """Values as texts, each by itself whatever the column's type and its other values: texts without blanks around
    them, a number as its shortest decimal (1 and 1.0 are `1`), a truth as `true` or `false`, a moment in UTC as
    `2026-11-23` or `2026-11-23 02:00:00`."""
    if pd.api.types.is_bool_dtype(values):
        return values.map({True: "true", False: "false"}).astype("string")
    if values.dtype == object or pd.api.types.is_datetime64_any_dtype(values):
        return values.map(_text_of_object, na_action="ignore").astype("string")
    texts = values.astype("string").str.strip()
    return texts.map(_shortened, na_action="ignore").astype("string") if pd.api.types.is_float_dtype(values) else texts


def forms_of(texts: Collection[str]) -> tuple[Form, ...]:
    """The form that all texts of a column have in common, by which `by_value` names them; none where they are texts.

    Numbers: `1`, `1.0`, `+1` and `1e0` are one value. Truths: `true` and `false` in any case, and 1 and 0 beside them.
    Moments: ISO dates, with a time or without; without a zone they are UTC. A single text of another kind makes the
    whole column one of texts, in which `1.0` and `1` differ, as they do beside `1.0.1`; so does `007` beside `7`.
    """
    return next(((form,) for form in FORMS if all(_NAMED[form](text) is not None for text in texts)), ())


def by_value(texts: pd.Series[Any], *forms: Form) -> pd.Series[Any]:
    """Texts as the names of their values: in the usual Unicode form (NFC), and where they have one of the forms, by it.

    Labels and categories take the form that their whole column has. What only tells rows apart, as ids do, may take
    all forms, each value by itself: that does not change as a column grows, and to hold two ids for one hurts no split.
    """

    def named(text: str) -> str:
        usual = unicodedata.normalize("NFC", text)
        return next((name for form in forms if (name := _NAMED[form](usual)) is not None), usual)

    return texts.map(named, na_action="ignore").astype("string")


def distinct(values: pd.Series[Any], missing: Sequence[str]) -> tuple[npt.NDArray[np.int64], pd.Series[Any]]:
    """Each row's place among the distinct values, -1 where it has none, and those."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.cat.remove_unused_categories()
        codes, found = pd.factorize(without_missing(pd.Series(values.cat.categories), missing))
        return np.append(codes, -1)[values.cat.codes], pd.Series(found)
    codes, found = pd.factorize(without_missing(values, missing))
    return codes, pd.Series(found)


def read_numbers(values: pd.Series[Any], column: Column) -> npt.NDArray[np.float64]:
    """Numbers (rows,), NaN where there is none written as the column says; what is a number already is left as it
    is, and a date is none."""
    if pd.api.types.is_numeric_dtype(values):
        return _floats(values)
    if pd.api.types.is_datetime64_any_dtype(values):  # which pandas counts in nanoseconds, NaT as well
        return np.full(len(values), np.nan)
    is_plain = (column.decimal, column.thousands, column.unit) == (".", "", None)
    numbers = _floats(pd.to_numeric(values, errors="coerce")).copy() if is_plain else np.full(len(values), np.nan)
    unread = np.isnan(numbers) & values.notna().to_numpy(dtype=bool)
    if is_plain and unread.any():  # all else that is a plain number pandas reads, a hundred times as fast
        unread[unread] = values[unread].astype("string").str.contains("^[-+]|\u2212").to_numpy(dtype=bool)
    if unread.any():
        plain = [_plain(value, column) if isinstance(value, str) else value for value in values[unread]]
        numbers[unread] = _floats(pd.to_numeric(pd.Series(plain, dtype=object), errors="coerce"))
    return numbers


def written_number(text: str) -> WrittenNumber | None:
    """Take a text apart that may be a number, whatever its marks and its unit; None where it is none."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict(default="")
    signs = [sign for sign in (part["first"], part["second"], part["last"], part["open"]) if sign]
    units = [unit for unit in (part["before"], part["after"].strip()) if unit]
    if len(signs) > 1 or len(units) > 1 or bool(part["open"]) != bool(part["close"]):
        return None
    is_plain = not (units or part["open"] or part["last"])
    return WrittenNumber(
        digits=part["digits"],
        power=part["power"].replace("\u2212", "-"),
        is_negative=bool(signs) and signs[0] != "+",
        unit=None if is_plain else "".join(units),
    )


def plain_digits(digits: str, decimal: str, thousands: str) -> str | None:
    """Digits with a point and without other marks; None where the marks are not so, such as 1,5 with thousands."""
    whole, point, fraction = digits.partition(decimal)
    if thousands:
        first, *groups = re.split(MARKS[thousands], whole)
        if groups:
            # 1,234,567 and, in India, 12,34,567.
            sizes = {len(group) for group in groups[:-1]}
            if (
                not 1 <= len(first) <= 3
                or first[0] == "0"
                or len(groups[-1]) != 3
                or not (sizes <= {3} or sizes <= {2})
            ):
                return None
            whole = "".join([first, *groups])
    found = whole + fraction
    return whole + (point and ".") + fraction if found.isascii() and found.isdigit() else None


def read_moments(values: pd.Series[Any], column: Column) -> pd.Series[Any]:
    """Moments in UTC to the microsecond, NaT where there is none: a day with its year first, as 2026-11-23, 2026/11/23
    or 20261123, or as `column.dates` says, and a time behind it. What pandas reads else, such as `today`, is none."""
    if pd.api.types.is_datetime64_any_dtype(values):
        return pd.to_datetime(values, utc=True).dt.as_unit("us")
    texts = text_of(values).str.replace(r" ?(?:UTC|GMT)$", "Z", regex=True)
    if column.dates != "year_first":
        order = r"\3-\2-\1\4" if column.dates == "day_first" else r"\3-\1-\2\4"
        for mark in "-./":
            texts = texts.str.replace(
                rf"^(\d{{1,2}})[{mark}](\d{{1,2}})[{mark}](\d{{4}})((?:\D.*)?)$", order, regex=True
            )
    is_date = texts.str.fullmatch(_YEAR_FIRST).fillna(False).astype(bool)
    texts = texts.where(is_date)
    moments = _iso_moments(texts)
    # A nanosecond in one text makes pandas lose those outside of 1677 to 2262 in all.
    lost = moments.isna() & is_date
    if lost.any():
        moments[lost] = _iso_moments(texts[lost])
    return moments


def _iso_moments(texts: pd.Series[Any]) -> pd.Series[Any]:
    return pd.to_datetime(texts, errors="coerce", format="ISO8601", utc=True).dt.as_unit("us")


def _plain(text: str, column: Column) -> str | None:
    written = written_number(text)
    # Brackets, and a minus behind, are written for some numbers of a column only.
    if written is None or written.unit not in ((None, "") if column.unit == "" else (column.unit,)):
        return None
    digits = plain_digits(written.digits, column.decimal, column.thousands)
    return None if digits is None else "-" * written.is_negative + digits + written.power


def _read(values: pd.Series[Any], column: Column) -> npt.NDArray[np.float64]:
    return _each_distinct(_READERS[column.role], values, column, np.nan)


def _each_distinct(
    read: Callable[[pd.Series[Any], Column], npt.NDArray[Number]], values: pd.Series[Any], column: Column, nothing: Any
) -> npt.NDArray[Number]:
    """Each distinct value is read once, where they are known: a text costs a hundred times what a number does."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        try:
            read_once = read(without_missing(pd.Series(values.cat.categories), column.missing), column)
        except ValueError:
            values = values.astype(values.cat.categories.dtype)  # the rows say where it stands, if anywhere
        else:
            numbers: npt.NDArray[Number] = np.append(read_once, nothing)[values.cat.codes]
            return numbers
    return read(without_missing(values, column.missing), column)


def _numbers(values: pd.Series[Any], column: Column) -> npt.NDArray[np.float64]:
    numbers = read_numbers(values, column)
    is_number = pd.api.types.is_numeric_dtype(values)
    rule = "a finite number" + (f" with {column.unit}" if column.unit else "")
    _refuse(values, np.isinf(numbers) if is_number else ~np.isfinite(numbers), column, rule)
    _refuse(values, np.abs(numbers) > LARGEST, column, f"a number of at most {LARGEST:g}")
    return numbers


def _truths(values: pd.Series[Any], column: Column) -> npt.NDArray[np.float64]:
    words = {"1": 1.0, "0": 0.0} | dict.fromkeys(TRUE_WORDS, 1.0) | dict.fromkeys(FALSE_WORDS, 0.0)
    truths = by_value(text_of(values), "number").str.casefold().map(words).astype("float64")
    _refuse(values, truths.isna().to_numpy(), column, "true or false")
    return _floats(truths)


def _codes(values: pd.Series[Any], column: Column) -> npt.NDArray[np.float64]:
    names = by_value(text_of(values), *forms_of(column.categories))
    codes: npt.NDArray[np.float64] = pd.Index(column.categories, dtype="string").get_indexer(names).astype(np.float64)
    codes[names.isna().to_numpy()] = np.nan
    return codes


def _days(values: pd.Series[Any], column: Column) -> npt.NDArray[np.float64]:
    moments = _moments(values, column)
    return np.where(moments == NO_MOMENT, np.nan, moments / DAY_MICROSECONDS)


def _moments(values: pd.Series[Any], column: Column) -> npt.NDArray[np.int64]:
    moments = read_moments(values, column)
    example = {"day_first": ", 23.11.2026", "month_first": ", 11/23/2026"}.get(column.dates, "")
    rule = f"a date such as 2026-11-23{example} or 2026-11-23T02:00:00Z"
    _refuse(values, moments.isna().to_numpy(), column, rule)
    counted = moments.to_numpy(dtype="datetime64[us]").astype(np.int64)
    return np.where(counted == NO_MOMENT, NO_MOMENT, counted - EPOCH.value // 1000)


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
            f"column {column.name} must hold {rule}, found {values.iloc[[row]].tolist()[0]!r} in row "
            f"{values.index[row]}"
        )


def _text_of_object(value: object) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, datetime):
        moment = pd.Timestamp(value)
        in_utc = moment if moment.tzinfo is None else moment.tz_convert("UTC").tz_localize(None)
        return str(in_utc).removesuffix(" 00:00:00")
    return _shortened(str(value))


def _shortened(text: str) -> str:
    """A number as its shortest decimal, whatever is none as it is."""
    return _as_number(text) or text


def _as_number(text: str) -> str | None:
    if _SHORTEST.fullmatch(text):
        return text
    if not _DECIMAL.fullmatch(text):
        return None
    decimals = f"{Decimal(text):f}"
    shortest = decimals.rstrip("0").rstrip(".") if "." in decimals else decimals
    return "0" if shortest == "-0" else shortest


def _as_truth(text: str) -> str | None:
    return {"true": "true", "false": "false", "1": "true", "0": "false"}.get(_shortened(text).casefold())


def _as_moment(text: str) -> str | None:
    if not _MOMENT.fullmatch(text):
        return None
    try:
        return _text_of_object(pd.Timestamp(text))
    except ValueError:  # the 31st of February
        return None


_NAMED: dict[Form, Callable[[str], str | None]] = {"number": _as_number, "truth": _as_truth, "moment": _as_moment}
_READERS = {"numeric": _numbers, "boolean": _truths, "categorical": _codes, "datetime": _days}
