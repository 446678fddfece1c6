"""Dates as people write them: read as the job says, or named with what would read them; codes are no dates."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from models.rows.column import Column
from models.rows.table import encode
from tasks.data.rows import DataError
from tasks.registry.versions import TableColumn
from tests.reading import a_column, read, roles_of, values_of

DAY = (pd.Timestamp("2026-12-31") - pd.Timestamp("2000-01-01")).days


@pytest.mark.parametrize(
    ("texts", "data", "days"),
    [
        (["2026-12-31", "2026/12/31", "2026.12.31", "2026-12-31T12:00"], {}, [DAY, DAY, DAY, DAY + 0.5]),
        (["2026-12-31T02:00:00+02:00", "2026-12-30 22:00:00 -0200"], {}, [DAY, DAY]),
        (["2026-12-31 12:00:00 UTC", "2026-12-31 00:00:00.000000 UTC"], {}, [DAY + 0.5, DAY]),
        (["31.12.2026", "1.12.2026", "2026-12-31"], {"dates": "day_first"}, [DAY, DAY - 30, DAY]),
        (["31/12/2026 12:00", "01-12-2026"], {"dates": "day_first"}, [DAY + 0.5, DAY - 30]),
        (["12/31/2026", "12/1/2026 12:00:00Z"], {"dates": "month_first"}, [DAY, DAY - 29.5]),
        (["20261231", "20261201"], {"roles": {"v": "datetime"}}, [DAY, DAY - 30]),
        (["2026-12-31", "2026-12"], {"roles": {"v": "datetime"}}, [DAY, DAY - 30]),
    ],
)
def test_dates_are_read_as_the_job_says_and_served_by_the_same_columns(
    texts: list[str], data: dict[str, Any], days: list[float], tmp_path: Path
) -> None:
    rows = read(a_column(tmp_path, texts), **data)
    assert roles_of(rows.known)["v"] == "datetime"
    assert values_of(rows, texts) == pytest.approx(days, abs=1e-3)
    shipped = [
        TableColumn.model_validate_json(TableColumn(**asdict(it)).model_dump_json()) for it in rows.known.columns
    ]
    served = encode(pd.DataFrame({"v": texts}), [Column(**column.model_dump()) for column in shipped])
    assert [float(value) for value in served[:, 1]] == pytest.approx(days, abs=1e-3)


@pytest.mark.parametrize(
    ("texts", "data", "says"),
    [
        (["31.12.2026", "01.12.2026"], {}, "hold dates with the day first); set data.dates: day_first to read them"),
        (["12/31/2026", "12/01/2026"], {}, "dates with the month first); set data.dates: month_first to read them"),
        (["01/02/2026", "03/04/2026"], {}, "the day first or the month first); set data.dates: day_first or month"),
        (["12/31/2026 10:00"], {"dates": "day_first"}, "set data.dates: month_first to read them"),
        (["2026-12-31"] * 5 + ["31.12.2026"], {}, "found '31.12.2026' in row 5"),
        (["31.12.26", "01.02.26"], {}, "hold what may be dates with two digits for the year); write four"),
        (["23 Nov 2026", "1 December 2026"], {}, "hold dates with the name of a month); write its number"),
        (["Nov 23, 2026", "Dec 1st 2026"], {}, "hold dates with the name of a month); write its number"),
        (["12/31/2026 11:59 PM", "1/2/2026 3:00 AM"], {}, "another time than 14:05:00 or 14:05:00Z); write it so"),
        (["2026-12-31 10:00 CET", "2026-12-31 11:00 PST"], {}, "another time than 14:05:00 or 14:05:00Z); write it so"),
        (["31.12.2026", "01.12.2026"], {"roles": {"v": "datetime"}}, "set data.dates: day_first to read them"),
        (["1760000000", "1760003600"], {"roles": {"v": "datetime"}}, "must hold a date such as 2026-11-23 or"),
        (["today", "now"], {"roles": {"v": "datetime"}}, "must hold a date such as 2026-11-23 or"),
    ],
)  # fmt: skip
def test_dates_that_are_not_read_are_named_with_what_would_read_them(
    texts: list[str], data: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = a_column(tmp_path, texts)
    with pytest.raises(DataError, match=re.escape(says)):
        read(path, **data)
    assert roles_of(read(path, **data | {"roles": {"v": "categorical"}}).known)["v"] == "categorical"


@pytest.mark.parametrize(
    "texts",
    [
        ["00-00-00", "11-11-11", "99-99-99"],
        ["2026-W05", "2026-W06"],
        ["2026Q1", "2026Q2"],
        ["A1", "A2"],
        ["1.2.3", "1.2.4"],
        ["978-3-16", "979-0-26"],
        ["today", "now"],
        ["may be", "march on"],
        ["10.0.0.1", "10.0.0.2"],
        ["2026-13-45", "2026-00-00"],
    ],
)
def test_codes_and_words_are_no_dates(texts: list[str], tmp_path: Path) -> None:
    rows = read(a_column(tmp_path, texts))
    assert (roles_of(rows.known)["v"], rows.known.findings) == ("categorical", ())


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        (
            [20261231, 20260101],
            "found 20260101 to 20261231, which are days, and is used as a number; write them so, or",
        ),
        ([1760000000, 1770000000], "which may be moments, 2025-10-09 to 2026-02-02 in seconds since 1970"),
        ([1760000000123, 1770000000456], "2025-10-09 to 2026-02-02 in milliseconds since 1970"),
        ([20261231, 20261332], None),
        ([1760000000, 3], None),
        ([1760000000.5, 1770000000], None),
    ],
)
def test_numbers_that_may_be_dates_are_a_finding(numbers: list[float], says: str | None, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"v": numbers * 30, "y": draw.choice(["a", "b"], 60)})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.parquet"):
        rows = read(tmp_path / name)
        assert roles_of(rows.known)["v"] == "numeric"
        assert [found.check for found in rows.known.findings] == ([] if says is None else ["dates_as_numbers"])
        assert says is None or says in rows.known.findings[0].sentence
        assert read(tmp_path / name, roles={"v": "numeric"}).known.findings == ()


def test_rows_are_split_by_days_that_begin_with_the_day(tmp_path: Path) -> None:
    path = a_column(tmp_path, ["30.09.2026", "01.10.2026", "02.10.2026"])
    cut: dict[str, Any] = {"time_column": "v", "test_from": "2026-10-01"}
    with pytest.raises(DataError, match=r"found '30\.09\.2026' in row 0; correct it, set data\.dates where days or"):
        read(path, **cut)
    assert read(path, dates="day_first", **cut).features.shape == (60, 1)
