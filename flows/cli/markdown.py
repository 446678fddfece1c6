"""Show the Markdown of reports and data cards as people read it: on a terminal in bold and colour, in a pipe as plain
text, the same words in the same lines.

Paragraphs and lists are wrapped at words, tables are aligned, links keep their labels, and an address is never broken.
What stands in data, such as a class named [/b], is printed as it is.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

WIDEST_TEXT = 100


def show(markdown: str, console: Console) -> None:
    """Print a document that our own reports are made of: headings, paragraphs, lists and tables."""
    tree = SyntaxTreeNode(MarkdownIt("commonmark", {"html": False}).enable("table").parse(markdown))
    for number, block in enumerate(tree.children):
        if number:
            console.print()
        for renderable in _rendered(block):
            console.print(renderable, soft_wrap=isinstance(renderable, Text), crop=False)


def _rendered(block: SyntaxTreeNode) -> Iterator["_Words | Table | Text"]:
    if block.type == "table":
        yield _table(block)
    elif block.type == "bullet_list":
        yield from _list(block)
    elif block.children:
        text = _inline(block.children)
        if block.type == "heading":
            text.stylize("bold")
        yield _Words(text)
    else:
        yield Text(textwrap.indent(block.content.rstrip("\n"), "    "), no_wrap=True, overflow="ignore")


class _Words:
    """A text wrapped at words, behind a label where it has one; all lines but the first are indented as far. A label
    that takes more than half of the width stands above its text."""

    def __init__(self, text: Text, label: Text | None = None, indent: int = 0) -> None:
        self._text, self._label, self._indent = text, label or Text(), indent

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, WIDEST_TEXT)
        indent, label = self._indent, self._label.copy()
        if indent > width / 2:
            yield label
            indent, label = 4, Text()
        label.pad_right(indent - label.cell_len)
        for line in _wrapped(self._text, width - indent):
            yield Text.assemble(label, line, overflow="ignore", no_wrap=True)
            label = Text(" " * indent)


def _wrapped(text: Text, width: int) -> Iterator[Text]:
    """Unlike rich's, which breaks a word that is longer than a line, as an address is."""
    ends, line = [], 0
    for word in re.finditer(r"\S+\s*", text.plain):
        if line and line + cell_len(word[0].rstrip()) > width:
            ends.append(word.start())
            line = 0
        line += cell_len(word[0])
    for part in text.divide(ends):
        part.rstrip()
        yield part


def _list(block: SyntaxTreeNode) -> Iterator[_Words]:
    """Items that begin with a name in bold, or are a link, stand in two columns; any other behind a dash."""
    items = [_label_and_text(item) for item in block.children]
    longest = max(len(label) for label, _ in items)
    for label, text in items:
        yield _Words(text, label, longest + 2)


def _label_and_text(item: SyntaxTreeNode) -> tuple[Text, Text]:
    (inline,) = item.children[0].children
    first, *rest = [child for child in inline.children if child.children or child.content]
    if first.type == "link" and not rest:
        return _spans(first.children), Text(str(first.attrs["href"]), style="blue")
    if first.type != "strong":
        return Text("-"), _spans(inline.children)
    text = _spans(rest)
    return Text.assemble(_spans(first.children), style="bold"), text[2:] if text.plain.startswith(": ") else text


def _table(block: SyntaxTreeNode) -> Table:
    head, *body = [
        [_inline(cell.children) for cell in row.children] for part in block.children for row in part.children
    ]
    table = Table(box=None, pad_edge=False, show_header=any(cell.plain for cell in head), header_style="bold")
    for cell in head:
        table.add_column(cell, overflow="fold")
    for row in body:
        table.add_row(*row)
    return table


def _inline(children: Sequence[SyntaxTreeNode]) -> Text:
    return _spans(children[0].children) if children else Text()


def _spans(children: Sequence[SyntaxTreeNode]) -> Text:
    text = Text()
    for child in children:
        if child.type == "link":
            text.append_text(_spans(child.children)).append(f": {child.attrs['href']}", style="blue")
        elif child.type in ("softbreak", "hardbreak"):
            text.append(" ")
        elif child.children:
            inner = _spans(child.children)
            inner.stylize("bold" if child.type == "strong" else "italic")
            text.append_text(inner)
        else:
            text.append(child.content)
    return text
