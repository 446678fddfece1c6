"""What checks advise is right: followed, it does what it says; and many findings of one kind are said once."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from models.rows.preprocessing import TablePreprocessing
from tasks.data.card import data_card
from tasks.data.findings import in_brief
from tasks.data.prepare import prepare
from tasks.data.rows import DataError
from tasks.job import DataConfig
from tests.reading import Read, read, roles_of

ROWS = 80


def a_table(folder: Path, **columns: Any) -> Path:
    """A CSV file with one honest column, those that are given, and a target."""
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"x": draw.normal(size=ROWS), **columns, "y": draw.choice(["a", "b"], ROWS)})
    frame.to_csv(folder / "rows.csv", index=False)
    return folder / "rows.csv"


def seen_by_a_model(rows: Read) -> torch.Tensor:
    features = torch.from_numpy(rows.features)
    seen: torch.Tensor = TablePreprocessing.fit(features, rows.known.columns)(features)
    return seen


@pytest.mark.parametrize("value", ["t", "bought", "1", "2026-11-23"])
def test_a_column_of_one_value_and_gaps_is_no_constant_and_a_model_sees_its_gaps(value: str, tmp_path: Path) -> None:
    """A shopping basket: what was bought has a mark, and all else nothing."""
    draw = np.random.default_rng(1)
    items = {f"item {number}": np.where(draw.random(ROWS) < 0.3, value, "?") for number in range(30)}
    rows = read(a_table(tmp_path, **items))
    assert rows.known.findings == ()
    seen = seen_by_a_model(rows)
    for item in items.values():
        assert any(np.array_equal(column > column.mean(), item == value) for column in (-seen).numpy().T)


def test_a_constant_is_named_and_nothing_is_lost_without_it(tmp_path: Path) -> None:
    path = a_table(tmp_path, always=["t"] * ROWS)
    (found,) = read(path).known.findings
    assert found.sentence == "column always must vary, found 't' only; set data.roles.always: ignored"
    assert read(path, roles={"always": "ignored"}).known.findings == ()
    assert [column.name for column in read(path, roles={"always": "ignored"}).known.columns] == ["x"]


def test_a_column_that_tells_rows_apart_is_kept_as_its_finding_says(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    path = a_table(tmp_path, number=draw.permutation(ROWS), code=[f"c-{row:03}" for row in draw.permutation(ROWS)])
    number, code = read(path).known.findings
    assert (number.check, code.check) == ("identifier_column", "identifier_column")
    assert "set data.split_by: number to keep a row on its side of the split" in number.sentence
    assert "or data.roles.number: numeric if the order of the numbers means something" in number.sentence
    assert code.sentence.endswith("set data.split_by: code to keep a row on its side of the split when its other "
                                  "columns change")  # fmt: skip
    kept = read(path, roles={"number": "numeric"}, split_by="code").known
    assert (roles_of(kept)["number"], roles_of(kept)["code"], kept.findings) == ("numeric", "split by", ())


def test_an_empty_column_and_one_of_too_many_words_are_left_out_as_their_findings_say(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    words = [*draw.choice(["red", "blue"], 1000).tolist(), *(f"word {word}" for word in range(1001))]
    rows = len(words)
    frame = pd.DataFrame({"x": draw.normal(size=rows), "gone": [None] * rows, "words": words})
    frame.assign(y=draw.choice(["a", "b"], rows)).to_csv(tmp_path / "rows.csv", index=False)
    empty, many = read(tmp_path / "rows.csv").known.findings
    assert empty.sentence.endswith("found none in 2001 rows, and is left out; fill it, or set data.roles.gone: ignored")
    assert many.sentence.endswith("categorical to keep those that ten training rows or more have")
    kept = read(tmp_path / "rows.csv", roles={"gone": "ignored", "words": "categorical"})
    assert kept.known.findings == ()
    # Beside x: red, blue, and one column for all words that are rare.
    assert seen_by_a_model(kept).shape == (rows, 4)


def test_many_findings_of_one_kind_are_one_line_and_a_list_in_the_card(tmp_path: Path) -> None:
    path = a_table(tmp_path, **{f"always {number}": ["t"] * ROWS for number in range(30)}, row=range(ROWS))
    snapshot = prepare(DataConfig(source=str(path)), "classification", tmp_path / "snapshots")
    constants, number = in_brief(snapshot.findings)
    assert constants.sentence == (
        "column always 0 must vary, found 't' only; set data.roles.always 0: ignored; the same of 29 more columns "
        "(always 1, always 2, always 3, always 4, always 5, ...)"
    )
    assert number.check == "identifier_column"
    assert data_card(snapshot).count("| constant_column |") == 30
    assert data_card(snapshot, brief=True).count("| constant_column |") == 1


def test_many_errors_of_one_kind_are_one_sentence(tmp_path: Path) -> None:
    path = a_table(tmp_path, **{f"price {number}": ["$5", "$6"] * (ROWS // 2) for number in range(40)})
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).count("must hold plain numbers") == 1
    assert "the same of 39 more columns (price 1, price 2, price 3, price 4, price 5, ...)" in str(error.value)
