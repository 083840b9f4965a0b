"""A saved model, served from its ONNX file without torch."""

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
    """A saved model, checked against its manifest and ready to answer."""

    schema: Schema
    session: onnxruntime.InferenceSession

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> "Model":
        """Read the manifest, compare every file with it, start the ONNX session."""
        document = manifest.read(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        options.log_severity_level = 3
        try:
            schema = Schema.from_json(document["schema"])
            session = onnxruntime.InferenceSession(
                folder / "model.onnx", options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's have no common class
            raise UserError(
                f"{folder} is no model that this code can read: {str(error)[:200]}"
            ) from None
        return cls(schema, session)

    def probabilities(self, table: Mapping[str, Sequence[Any] | np.ndarray]) -> np.ndarray:
        """Probabilities, float32 (rows, classes), for columns of values."""
        features = self.schema.encode(table)
        return np.asarray(self.session.run(["probabilities"], {"features": features})[0])
