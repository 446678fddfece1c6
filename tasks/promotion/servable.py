"""What makes a version servable without us: an ONNX program from raw rows to outputs, inside an MLflow model.

ONNX and not a torch.export program: it runs without torch and in other languages, and it is data, where torch's archive
may hold pickles. Preprocessing is part of the program, so whoever serves it cannot forget it. Knows nothing of stores.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version as package_version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pandas as pd
import torch
import yaml
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from mlflow.types.schema import AnyType
from torch import Tensor, nn

from models.evaluation.evaluate import EVALUATION_BATCH
from models.rows.column import Column
from models.rows.table import DAY_MICROSECONDS, EPOCH, UNSEEN, encode

SERVABLE = "mlflow"
PROGRAM = f"{SERVABLE}/artifacts/model.onnx"
TABLE_CODE = Path(__file__).parents[2] / "models/rows/table.py"
CODE = Path(__file__).with_name("onnx_model.py")
OPSET = 20
SERVING_PACKAGES = ("mlflow", "numpy", "onnxruntime", "pandas")

_logger = logging.getLogger(__name__)


def write_servable(
    folder: Path,
    served: nn.Module,
    example: Tensor,
    classes: tuple[str, ...],
    columns: tuple[Column, ...],
    now: datetime,
) -> bool:
    """Write `mlflow/` into the folder: MLmodel with the signature, an input example, and the ONNX program.

    `served` maps raw features (rows, ...), of a table its matrix, to outputs; `example` are a few such rows. With
    `columns` the model reads tables, by a copy of our own code for them. The same model gives the same
    bytes. Returns False, with a warning that says why, where a user's model cannot be exported: such a version is
    loaded through us only.
    """
    program = folder / "model.onnx"
    if columns:
        example = example.double()  # as table.py reads them
    try:
        export_onnx(served, example, program)
        for rows in (example[:1], torch.cat([example, example])):  # it may hold a number of rows as a constant
            run_onnx(program, rows)
    except Exception as error:  # noqa: BLE001 torch raises whatever the user's model raises
        program.unlink(missing_ok=True)
        _logger.warning("the version holds no ONNX program: %s", str(error).strip().partition("\n")[0])
        return False
    with _without_warnings():  # about type hints, its own and ours, already as it is imported
        import mlflow.pyfunc

        mlflow.pyfunc.save_model(
            folder / SERVABLE,
            python_model=str(CODE),
            artifacts={"onnx": str(program), **({"table": str(TABLE_CODE)} if columns else {})},
            model_config={"classes": list(classes), "columns": [asdict(column) for column in columns]},
            signature=signature_of(example, classes, columns),
            input_example=_frame_of(example, columns) if columns else example.numpy(),
            pip_requirements=[f"{name}=={package_version(name)}" for name in SERVING_PACKAGES],
        )
    program.unlink()
    _settle(folder / SERVABLE, now)
    return True


def export_onnx(served: nn.Module, example: Tensor, path: Path) -> None:
    """Write an ONNX program with the input `features` (any number of rows) and the output `outputs`.

    The exporter does not optimize it: it leaves out an addition of less than 1e-8 as one of 0, and with it the mean of
    a target of 1e-23. ONNX Runtime optimizes what it loads, and keeps such an addition.
    """
    with _without_warnings():
        program = torch.onnx.export(
            served.eval(),
            (example,),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=["features"],
            output_names=["outputs"],
            dynamic_shapes=({0: torch.export.Dim("rows")},),
        )
    assert program is not None
    program.save(str(path))


def run_onnx(program: Path, features: Tensor) -> Tensor:
    """What an ONNX program gives for raw features (rows, ...), or a table's matrix, of any type. Raises whatever ONNX
    Runtime does."""
    session = onnxruntime.InferenceSession(str(program), providers=["CPUExecutionProvider"])
    features = features.double() if session.get_inputs()[0].type == "tensor(double)" else features.float()
    pieces = (
        session.run(None, {"features": rows.numpy()})[0] for rows in torch.split(features, EVALUATION_BATCH["cpu"])
    )
    return torch.cat([torch.from_numpy(outputs) for outputs in pieces])


def mlflow_predictions(
    folder: Path, features: Tensor, classes: tuple[str, ...], columns: tuple[Column, ...]
) -> npt.NDArray[np.float64]:
    """What MLflow's model of a version's folder predicts for such features, a table's as a table: probabilities (rows,
    classes), or a regression's values (rows,)."""
    with _without_warnings():  # about our class's type hints, as where it is saved
        import mlflow.pyfunc

        model = mlflow.pyfunc.load_model(str(folder / SERVABLE))
        table = model.predict(_frame_of(features, columns) if columns else features.numpy())
    wanted = [f"probability of {name}" for name in classes]
    return np.array(table[wanted] if classes else table["prediction"], dtype=np.float64)


def read_as_table(matrix: Tensor, columns: tuple[Column, ...]) -> Tensor:
    """A matrix's rows, written as a table and read again."""
    return torch.from_numpy(encode(_frame_of(matrix, columns), columns))


def signature_of(example: Tensor, classes: tuple[str, ...], columns: tuple[Column, ...]) -> ModelSignature:
    """Inputs by type and shape, or a table's columns, each of which may be left out; outputs as `onnx_model` returns
    them."""
    outputs: list[ColSpec | TensorSpec] = [ColSpec(DataType.string if classes else DataType.double, "prediction")]
    outputs += [ColSpec(DataType.double, f"probability of {name}") for name in classes]
    inputs = Schema([TensorSpec(example.numpy().dtype, (-1, *example.shape[1:]))])
    if columns:  # of any type: MLflow would refuse whole numbers for a column of numbers, where our reader does not
        inputs = Schema([ColSpec(AnyType(), column.name, required=False) for column in columns])  # type: ignore[no-untyped-call]
    return ModelSignature(inputs=inputs, outputs=Schema(outputs))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Ignore warnings, and record instead of showing those for which MLflow sets the filters anew."""
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("ignore")
        yield


def _frame_of(matrix: Tensor, columns: tuple[Column, ...]) -> pd.DataFrame:
    """Rows of a matrix as a table that a person could have written."""
    return pd.DataFrame(
        {
            column.name: [None if math.isnan(value) else _written(value, column) for value in values]
            for column, values in zip(columns, matrix.T.tolist(), strict=True)
        }
    )


def _written(value: float, column: Column) -> float | str:
    match column.role:
        case "categorical":
            unseen = max(column.categories, key=len, default="") + "?"
            return unseen if value == UNSEEN else column.categories[int(value)]
        case "boolean":
            return "true" if value else "false"
        case "datetime":
            moment = np.datetime64(EPOCH.date(), "us") + np.timedelta64(round(value * DAY_MICROSECONDS), "us")
            return f"{moment}Z"
        case _:
            return value


def _settle(folder: Path, now: datetime) -> None:
    """MLflow writes a new identity, the time and this machine's paths into each model; what is published must be the
    same when a promotion is repeated."""
    path = folder / "MLmodel"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["model_uuid"] = None
    content["utc_time_created"] = f"{now:%Y-%m-%d %H:%M:%S.%f}"
    flavor = content["flavors"]["python_function"]
    flavor["model_code_path"] = CODE.name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
