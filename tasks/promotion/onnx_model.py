"""The code of a version's MLflow model. MLflow copies this file beside the ONNX program, so it imports nothing of ours
and needs neither torch nor a pickle; MLflow runs it where the model is loaded or served.
"""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class OnnxModel(PythonModel):
    """Raw rows to predictions: a class's name and each class's probability, or a regression's value."""

    def load_context(self, context: PythonModelContext) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(context.artifacts["onnx"], providers=["CPUExecutionProvider"])
        self._type = np.float64 if self._session.get_inputs()[0].type == "tensor(double)" else np.float32
        self._classes: list[str] = context.model_config["classes"]
        self._columns = []
        if columns := context.model_config.get("columns"):
            spec = importlib.util.spec_from_file_location("nightly_tuner_table", context.artifacts["table"])
            assert spec is not None
            assert spec.loader is not None
            self._table = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self._table)
            self._columns = [SimpleNamespace(**column) for column in columns]

    # Without type hints: MLflow takes those for a schema of its own, beside the signature that the model has.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        """Raw features (rows, ...), or a table, to a table: `prediction` and, for classes, `probability of NAME`."""
        if self._columns:
            features = self._table.encode(pd.DataFrame(model_input), self._columns)
        else:
            features = np.asarray(model_input, dtype=self._type)
        outputs = self._session.run(None, {"features": features})[0]
        if not self._classes:
            return pd.DataFrame({"prediction": outputs.astype(np.float64)})
        powers = np.exp(outputs.astype(np.float64) - outputs.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        columns = {f"probability of {name}": probabilities[:, index] for index, name in enumerate(self._classes)}
        best = outputs.argmax(axis=1)
        return pd.DataFrame({"prediction": [self._classes[index] for index in best], **columns})


set_model(OnnxModel())
