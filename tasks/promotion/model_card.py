"""The model card of a version, in Markdown: what it is, what it was trained on, how good it is, how to load it.

After Mitchell et al., Model Cards for Model Reporting (arXiv 1810.03993). Reads the manifest and decides nothing.
"""

from collections.abc import Mapping

from models.evaluation.metrics import in_figures
from tasks.data.snapshots import Snapshot
from tasks.registry.versions import Manifest


def model_card(manifest: Manifest, snapshot: Snapshot, description: str) -> str:
    """The card of a manifest whose files are not known yet: the card is one of them."""
    lineage = manifest.lineage
    members = f"an ensemble of {manifest.members} models" if manifest.members > 1 else "one model"
    classes = ", ".join(manifest.classes[:20]) + (" ..." if len(manifest.classes) > 20 else "")
    predicts = f"one of {len(manifest.classes)} classes: {classes}" if manifest.classes else "a number"
    rows = snapshot.row_counts
    if manifest.columns:
        reads = "tables with the columns " + ", ".join(f"{column.name} ({column.role})" for column in manifest.columns)
        example = "frame)  # a pandas DataFrame, raw, with the columns above in any order"
    else:
        dtype = snapshot.first("train", 1).dtype
        reads = f"rows of shape {manifest.features}, {dtype}, raw"
        sizes = ", ".join(str(size) for size in manifest.features)
        example = f"features)  # raw rows, {dtype}, of shape (rows, {sizes})"
    return f"""\
# {manifest.job}

{description or "A model that Nightly Tuner found and promoted."}

| | |
| --- | --- |
| model | {manifest.model}, {members} |
| reads | {reads}: the preprocessing is part of the version |
| predicts | {predicts} |
| promoted because | {manifest.gate.get("reason", "")} |

## Data

| | |
| --- | --- |
| source | {lineage.source} |
| snapshot | `{lineage.snapshot}` |
| rows | {rows["train"]} training, {rows["validation"]} validation, {rows["test"]} test; a row's split is decided by a hash of its content |

## How good it is

| metric | test rows | 95 % interval | validation rows |
| --- | --- | --- | --- |
{_metrics(manifest)}

The test rows chose nothing: neither hyperparameters nor epochs nor seeds. Validation rows did, so their numbers flatter.
{_guard_rails(manifest)}
## Hyperparameters

{_table("hyperparameter", manifest.hyperparameters)}
## Where it comes from

{_table("", lineage.model_dump(mode="json", exclude={"packages"}) | lineage.packages)}
## How to load it

In Python, every checksum verified, as a torch module with its preprocessing:

```python
from tasks.registry.champion import load_champion

champion = load_champion("{manifest.job}")
champion.predict({example}
```

Anywhere else, from a copy (`nightly pull {manifest.job} --to FOLDER`): `mlflow/artifacts/model.onnx` with any ONNX
runtime, or `mlflow models serve -m FOLDER/mlflow --env-manager local` where `mlflow` and `uvicorn` are on the PATH.
"""  # noqa: E501 a table's row is one line


def _metrics(manifest: Manifest) -> str:
    lines = []
    for name, value in manifest.metrics["test"].items():
        low, high = manifest.intervals.get(name, (value, value))
        bounds = f"{in_figures(low)} to {in_figures(high)}"
        lines.append(
            f"| {name} | {in_figures(value)} | {bounds} | {in_figures(manifest.metrics['validation'][name])} |"
        )
    return "\n".join(lines)


def _guard_rails(manifest: Manifest) -> str:
    rails = manifest.gate.get("guard_rails")
    if not isinstance(rails, list) or not rails:
        return ""
    lines = [f"| {rail['name']} | {rail['evidence']} |" for rail in rails if isinstance(rail, dict)]
    return "\n".join(["\n| guard rail | kept |", "| --- | --- |", *lines, ""])


def _table(head: str, values: Mapping[str, object]) -> str:
    rows = [f"| {name} | {value} |" for name, value in values.items() if value is not None]
    return "\n".join([f"| {head} | |", "| --- | --- |", *rows, ""])
