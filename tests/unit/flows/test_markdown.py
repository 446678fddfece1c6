"""What a person reads on a terminal and in a pipe is the report's Markdown without its marks, and data as it is."""

import io
import re

import pytest
from rich.console import Console

from flows.cli.console import console
from flows.cli.markdown import show
from tasks.data.findings import escaped

URL = "http://127.0.0.1:5001/#/experiments/1/runs/0123456789abcdef0123456789abcdef/artifacts/report.html?workflowType=x"
REPORT = f"""\
# digits: version 6b1c promoted

The best on validation rows is **proven** better than the textbook on the test rows, which nothing was chosen by.

- **Tried**: 200 configurations, 139 of them stopped early, and the best three again with five fresh seeds each
- **Won**: trial 7, with `label smoothing` 0.1

**Where to look**

- [The report with plots]({URL})

| class | rows |
| --- | --- |
| one | 12 |
| eleven | 7 |

    load_champion("digits").predict(rows)
"""


def shown(markdown: str, width: int = 80, *, terminal: bool = False) -> str:
    out = io.StringIO()
    kept = {name: getattr(console, f"_{name}") for name in ("highlight", "markup", "emoji")}
    show(markdown, Console(file=out, width=width, soft_wrap=True, force_terminal=terminal, **kept))
    return out.getvalue()


def test_a_pipe_gets_plain_text_without_a_mark_of_markdown() -> None:
    assert [line.rstrip() for line in shown(REPORT).splitlines()] == (
        "digits: version 6b1c promoted\n\n"
        "The best on validation rows is proven better than the textbook on the test rows,\n"
        "which nothing was chosen by.\n\n"
        "Tried  200 configurations, 139 of them stopped early, and the best three again\n"
        "       with five fresh seeds each\n"
        "Won    trial 7, with label smoothing 0.1\n\n"
        "Where to look\n\n"
        f"The report with plots  {URL}\n\n"
        "class   rows\n"
        "one     12\n"
        "eleven  7\n\n"
        '    load_champion("digits").predict(rows)'
    ).splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_terminal_gets_the_same_words_and_no_address_is_broken(width: int) -> None:
    plain, coloured = (shown(REPORT, width, terminal=terminal) for terminal in (False, True))
    assert "\x1b[1m" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    assert URL in plain
    whole = (URL, '    load_champion("digits").predict(rows)')
    assert all(len(line) <= min(width, 100) for line in plain.splitlines() if not line.endswith(whole))
    assert plain.split() == shown(REPORT).split()


def test_a_label_that_leaves_no_room_stands_above_its_text() -> None:
    assert shown("- **nightly champion digits-mlp**: what it is worth\n", 40) == (
        "nightly champion digits-mlp\n    what it is worth\n"
    )


@pytest.mark.parametrize(
    "name", ["[/b]", "[red]x", ":x:", "*a*", "_a_", "a_b", "`c`", "[a](b)", "<b>", "a|b", "a\\b", "&lt;", "~~d~~", "**"]
)
def test_what_stands_in_data_is_printed_as_it_is(name: str) -> None:
    markdown = f"# {escaped(name)}\n\nthe class {escaped(name)}.\n\n- **Won**: {escaped(name)}\n\n"
    markdown += f"| class | rows |\n| --- | --- |\n| {escaped(name)} | 1 |\n"
    lines = [line.split() for line in shown(markdown).splitlines() if line]
    assert lines == [[name], ["the", "class", f"{name}."], ["Won", name], ["class", "rows"], [name, "1"]]
