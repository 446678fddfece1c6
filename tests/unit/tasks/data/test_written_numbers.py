"""Numbers as people write them: read as the job says, or named with what would read them, and never categories in
silence."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from models.rows.column import Column
from models.rows.table import encode
from tasks.data.prepare import prepare
from tasks.data.rows import DataError
from tasks.data.snapshots import read_snapshot
from tasks.job import DataConfig, JobError, parse_job
from tasks.registry.versions import TableColumn
from tests.reading import ROWS, a_column, read, roles_of, values_of


@pytest.mark.parametrize(
    ("texts", "data", "values"),
    [
        (["−5", "+3", "2.5e-1"], {}, [-5, 3, 0.25]),  # noqa: RUF001
        (["20,4", "-19,6", "1001"], {"decimal": ","}, [20.4, -19.6, 1001]),
        (["1,5e3", ",5"], {"decimal": ","}, [1500, 0.5]),
        (["1,234", "999", "1,234,567.5"], {"thousands": ","}, [1234, 999, 1234567.5]),
        (["12,34,567", "1,000"], {"thousands": ","}, [1234567, 1000]),
        (["1.234", "1.234.567,5", "7"], {"decimal": ",", "thousands": "."}, [1234, 1234567.5, 7]),
        (["1 234", "1\u202f234,5", "1\u00a0234"], {"decimal": ",", "thousands": " "}, [1234, 1234.5, 1234]),
        (["1'234.5", "1’234"], {"thousands": "'"}, [1234.5, 1234]),  # noqa: RUF001
        (["$25", "$ 3.50", "-$4", "$-5", "($6)", "$7-"], {"roles": {"v": "numeric"}}, [25, 3.5, -4, -5, -6, -7]),
        (["25 €", "3,5€"], {"decimal": ",", "roles": {"v": "numeric"}}, [25, 3.5]),
        (["USD 25", "25 USD"], {"roles": {"v": "numeric"}}, [25, 25]),
        (["12 %", "3%"], {"roles": {"v": "numeric"}}, [12, 3]),
        (["12 kg", "5.3kg"], {"roles": {"v": "numeric"}}, [12, 5.3]),
        (["999", "(1,234)", "5-"], {"thousands": ",", "roles": {"v": "numeric"}}, [999, -1234, -5]),
    ],
)
def test_numbers_are_read_as_the_job_says_and_served_by_the_same_columns(
    texts: list[str], data: dict[str, Any], values: list[float], tmp_path: Path
) -> None:
    path = a_column(tmp_path, texts)
    rows = read(path, **data)
    assert roles_of(rows.known)["v"] == "numeric"
    assert values_of(rows, texts) == pytest.approx(values)
    # What ships: through the manifest's JSON, as the champion and MLflow's model read rows.
    shipped = [
        TableColumn.model_validate_json(TableColumn(**asdict(it)).model_dump_json()) for it in rows.known.columns
    ]
    served = encode(pd.DataFrame({"v": texts}), [Column(**column.model_dump()) for column in shipped])
    assert [float(value) for value in served[:, 1]] == pytest.approx(values)
    snapshot = prepare(DataConfig(source=str(path), **data), "classification", tmp_path / "snapshots")
    again = read_snapshot(tmp_path / "snapshots", snapshot.fingerprint)
    assert again is not None
    assert again.columns == rows.known.columns


@pytest.mark.parametrize(
    ("texts", "data", "says"),
    [
        (["20,4", "19,6"], {}, "found '20,4' in row 0, '19,6' in row 1 (60 of 60 rows); set data.decimal: \",\" to"),
        (["1,234", "999"], {}, 'set data.thousands: "," if \'1,234\' is 1234, or data.decimal: "," if \'1,234\' is 1'),
        (["1,234,567", "1,234"], {}, 'set data.thousands: "," to read them'),
        (["1.234.567", "3"], {}, 'set data.decimal: "," and data.thousands: "." to read them'),
        (["1.234", "3"], {"decimal": ","}, 'set data.thousands: "." to read them'),
        (["1 234", "12"], {}, 'set data.thousands: " " to read them'),
        (["1’234", "12"], {}, "set data.thousands: \"'\" to read them"),  # noqa: RUF001
        (["1,23", "4,567"], {"thousands": ","}, 'set data.decimal: "," and no data.thousands to read them'),
        (["1,5", "1.234.567", "1,234.5"], {}, "write all of them with the same marks"),
        (["$25", "$24"], {}, "set data.roles.v: numeric to read them, or set data.roles.v: categorical to keep"),
        (["1.234,50 €", "2 €"], {}, 'set data.decimal: "," and data.thousands: "." and data.roles.v: numeric to read'),
        (["12 kg", "300 g"], {}, "write all of them in one unit, where now some have 'g' and some 'kg'"),
        (["$25", "30"], {}, "write all of them in one unit, where now some have none and some '$'"),
        (["12 kg", "300 g"], {"roles": {"v": "numeric"}}, "some have 'g' and some 'kg'"),
        (["25", "$30"], {"roles": {"v": "numeric"}}, "where now some have none and some '$', or"),
        (["(1,234)", "5"], {"decimal": "."}, "set data.thousands: \",\" and data.roles.v: numeric to read them"),
        (["5-", "3"], {}, "set data.roles.v: numeric to read them"),
        (["$1,234.5", "$3"], {"roles": {"v": "numeric"}}, 'set data.thousands: "," to read them, or set data'),
        (["1.234,5", "3"], {"roles": {"v": "numeric"}}, 'set data.decimal: "," and data.thousands: "." to read them'),
        (["3", "none of them"], {"roles": {"v": "numeric"}}, "must hold a finite number, found 'none of them' in row"),
        (["5.3km", "4km", "n.a."], {}, "(40 of 60 rows); set data.roles.v: numeric to read them"),
    ],
)  # fmt: skip
def test_numbers_that_are_not_read_are_named_with_what_would_read_them(
    texts: list[str], data: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = a_column(tmp_path, texts)
    with pytest.raises(DataError, match=re.escape(says)):
        read(path, **data)
    kept = read(path, **(data | {"roles": {"v": "categorical"}}))
    assert roles_of(kept.known)["v"] == "categorical"


@pytest.mark.parametrize(
    "texts",
    [
        ["A1", "A2", "B3"],
        ["1st", "2nd", "3rd", "4th"],
        ["1a", "2b", "3a", "4b"],
        ["12 Main St", "13 Elm Rd", "14 Oak Av", "15 Park Ln"],
        ["10-20", "20-30"],
        ["12:30", "13:45"],
        ["10.0.0.1", "192.168.1.2"],
        ["+49 30 1234-5", "+49 40 555-7"],
        ["small", "12 kg", "large", "huge"],
    ],
)
def test_codes_and_words_are_no_numbers(texts: list[str], tmp_path: Path) -> None:
    rows = read(a_column(tmp_path, texts))
    assert (roles_of(rows.known)["v"], rows.known.findings) == ("categorical", ())


def test_a_number_that_may_be_another_is_a_finding_until_the_job_says_which(tmp_path: Path) -> None:
    path = a_column(tmp_path, ["1.234", "999", "12.500"])
    (found,) = read(path).known.findings
    assert (found.check, found.severity) == ("ambiguous_numbers", "warn")
    assert "found '1.234' and the like, which are read as 1.234 and may be 1234" in found.sentence
    assert read(path, decimal=".").known.findings == ()
    assert values_of(read(path, decimal=",", thousands="."), ["1.234", "999"]) == [1234, 999]
    for measured in (["0.123", "1.234"], ["1.234", "1.5"]):
        assert read(a_column(tmp_path, measured)).known.findings == ()
    (found,) = read(a_column(tmp_path, ["01067", "80331"])).known.findings
    assert "found '01067', which is read as 1067 and may be a code; set data.roles.v: categorical" in found.sentence


MARKS = ((".", ""), (".", ","), (",", ""), (",", "."), (",", " "), (".", "'"))
STYLES = [  # every pair of marks and unit, and of each with a way to write a negative number
    (*marks, unit, ("-", "−", "()")[(place + other) % 3])  # noqa: RUF001
    for place, marks in enumerate(MARKS)
    for other, unit in enumerate(("", "$", " €", "%", " km/h"))
]


def written(value: float, style: tuple[str, str, str, str]) -> str:
    decimal, thousands, unit, negative = style
    digits = "".join({",": thousands, ".": decimal}.get(letter, letter) for letter in f"{abs(value):,.2f}")
    text = f"${digits}" if unit == "$" else digits + unit
    return text if value >= 0 else f"({text})" if negative == "()" else negative + text


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_what_a_finding_advises_reads_every_number(style: tuple[str, str, str, str], tmp_path: Path) -> None:
    draw = np.random.default_rng(STYLES.index(style))
    values = np.round(draw.uniform(-3e6, 3e6, ROWS), 2).tolist()
    texts = [written(value, style) for value in values]
    path = a_column(tmp_path, texts)
    try:
        rows = read(path)
    except DataError as error:
        advice = str(error).partition("; set ")[2].partition(" to read them")[0]
        settings: dict[str, Any] = {}
        for setting in advice.split(" and "):
            key, value = yaml.safe_load(f"{{{setting}}}").popitem()
            _, field, *column = key.split(".")
            settings[field] = {column[0]: value} if column else value
        rows = read(path, **settings)
    assert roles_of(rows.known)["v"] == "numeric"
    assert values_of(rows, texts) == pytest.approx(values, rel=1e-6)


def test_a_target_is_read_as_features_are(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"u": draw.normal(size=ROWS), "price": [f"{value} €" for value in range(ROWS)]})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    says = "finite numbers, found '0 €' in row 0; set data.roles.price: numeric to read them, or choose"
    with pytest.raises(DataError, match=re.escape(says)):
        read(tmp_path / "rows.csv", "regression")
    assert read(tmp_path / "rows.csv", "regression", roles={"price": "numeric"}).target.tolist() == list(range(ROWS))
    frame.assign(price=[f"{value},5" for value in range(ROWS)]).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(DataError, match=r'set data\.decimal: "," to read them, or choose'):
        read(tmp_path / "rows.csv", "regression")
    frame.assign(u=frame["u"].map(str).str.replace(".", ","), price=[f"{value},5" for value in range(ROWS)]).to_csv(
        tmp_path / "rows.csv", index=False
    )
    found = read(tmp_path / "rows.csv", "regression", decimal=",")
    assert found.target.tolist() == [value + 0.5 for value in range(ROWS)]


def test_the_data_card_says_how_numbers_were_read(tmp_path: Path) -> None:
    path = a_column(tmp_path, ["$1.234,50", "$7"])
    rows = read(path, decimal=",", thousands=".", roles={"v": "numeric"})
    assert rows.known.described[0].values == "7 to 1234.5 $, mean 620.8, read with decimal , and thousands '.'"


def test_marks_must_differ_and_an_old_manifest_reads_plain_numbers(tmp_path: Path) -> None:
    content = {"name": "rows", "data": {"source": "rows.csv", "thousands": "."}}
    with pytest.raises(JobError, match=r"decimal and thousands must be two marks, found '\.' for both"):
        parse_job(content, tmp_path / "rows.yaml")
    old = TableColumn.model_validate_json(json.dumps({"name": "v", "role": "numeric", "missing": [""]}))
    column = Column(**old.model_dump())
    assert encode(pd.DataFrame({"v": ["1.5", "−2"]}), [column])[:, 0].tolist() == [1.5, -2]  # noqa: RUF001
    with pytest.raises(ValueError, match="must hold a finite number, found '1,5' in row 0"):
        encode(pd.DataFrame({"v": ["1,5"]}), [column])
