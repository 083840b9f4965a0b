"""Run a saved model from its ONNX file, without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from core import manifest
from core.errors import UserError
from core.schema import Schema


@dataclass(frozen=True)
class Model:
    """A saved model, verified against its manifest and loaded."""

    schema: Schema
    session: onnxruntime.InferenceSession

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> "Model":
        """Load a saved model after checking every file against the manifest."""
        document = manifest.read(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        options.log_severity_level = 3  # errors only
        try:
            schema = Schema.from_json(document["schema"])
            session = onnxruntime.InferenceSession(
                folder / "model.onnx", options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise UserError(
                f"{folder} is no model that this code can read: {str(error)[:200]}"
            ) from None
        return cls(schema, session)

    def probabilities(self, table: Mapping[str, Sequence[Any] | np.ndarray]) -> np.ndarray:
        """Return probabilities, float32 (rows, classes), for columns of values."""
        features = self.schema.encode(table)
        return np.asarray(self.session.run(["probabilities"], {"features": features})[0])
