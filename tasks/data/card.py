"""The data card: what a night's rows are, on one page, for `nightly check`, MLflow and whoever asks in the morning.

Reads a snapshot and decides nothing.
"""

from tasks.data.findings import escaped, in_brief
from tasks.data.snapshots import Snapshot

MOST_CLASSES = 20


def data_card(snapshot: Snapshot, *, brief: bool = False) -> str:
    """In Markdown: rows and splits, classes, columns with their roles, and what the checks warn of: each finding, or
    one line for many of a kind where it is to be brief."""
    counts = ", ".join(f"{rows} {split}" for split, rows in snapshot.row_counts.items())
    lines = [
        f"# {escaped(snapshot.source)}",
        "",
        "| | |",
        "| --- | --- |",
        f"| snapshot | `{snapshot.fingerprint}` |",
        f"| rows | {snapshot.rows}: {counts} |",
        f"| a row | {_row_in_words(snapshot)} |",
        f"| predicted | {_target_in_words(snapshot)} |",
    ]
    if snapshot.classes:
        lines += _classes(snapshot)
    if snapshot.described:
        lines += ["", "| column | used as | missing | values |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {escaped(it.name)} | {it.role} | {it.missing} | {escaped(it.values)} |" for it in snapshot.described
        ]
    if snapshot.findings:
        lines += ["", "| check | warning |", "| --- | --- |"]
        findings = in_brief(snapshot.findings) if brief else snapshot.findings
        lines += [f"| {found.check} | {escaped(found.sentence)} |" for found in findings]
    return "\n".join(lines) + "\n"


def _row_in_words(snapshot: Snapshot) -> str:
    if snapshot.columns:
        return f"{len(snapshot.columns)} columns of a table"
    return f"{snapshot.first('train', 1).dtype} of shape {snapshot.shape.features}"


def _target_in_words(snapshot: Snapshot) -> str:
    if not snapshot.classes:
        return "a number"
    return f"one of {len(snapshot.classes)} classes"


def _classes(snapshot: Snapshot) -> list[str]:
    """How many rows of each class every split has, of the first classes."""
    splits = snapshot.class_rows
    lines = ["", f"| class | {' | '.join(splits)} |", "| --- |" + " --- |" * len(splits)]
    for place, name in enumerate(snapshot.classes[:MOST_CLASSES]):
        cells = [f"{rows[place]} ({rows[place] / sum(rows):.1%})" for rows in splits.values()]
        lines.append(f"| {escaped(name)} | {' | '.join(cells)} |")
    more = len(snapshot.classes) - MOST_CLASSES
    return [*lines, *([f"| and {more} more |" + " |" * len(splits)] if more > 0 else [])]
