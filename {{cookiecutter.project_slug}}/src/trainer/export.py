"""Save and load a model: a folder with weights, ONNX graph, metrics and manifest."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from core import manifest
from core.schema import Schema
from trainer.model import Network

WEIGHTS = "model.safetensors"
ONNX = "model.onnx"
METRICS = "metrics.json"


def save(
    folder: Path,
    network: Network,
    schema: Schema,
    metrics: Mapping[str, Any],
    origin: Mapping[str, Any],
) -> None:
    """Write a saved model; `origin` (data hash, hyperparameters, …) goes into the manifest."""
    network = network.cpu().eval()
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest is removed first and written last: without it, the folder is not a valid model,
    # so an interruption leaves no mixture of two models.
    (folder / manifest.NAME).unlink(missing_ok=True)
    manifest.write_bytes(folder / WEIGHTS, safetensors.torch.save(network.state_dict()))
    manifest.write_bytes(folder / ONNX, to_onnx(network, len(schema.columns)))
    manifest.write_json(folder / METRICS, metrics)
    manifest.write(
        folder, {"architecture": type(network).__name__, "schema": schema.to_json(), **origin}
    )


def load(folder: Path) -> tuple[Network, Schema]:
    """Return the network, on the CPU in evaluation mode, and its schema."""
    # safetensors instead of torch.load: unpickling a file can run code.
    schema = Schema.from_json(manifest.read(folder)["schema"])
    network = Network(schema)
    network.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    return network.eval(), schema


class _Probabilities(nn.Module):
    """The network with a softmax, as it is exported and served."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the probabilities (rows, classes) of raw features."""
        return self.network(features).softmax(dim=1)  # type: ignore[no-any-return]


def to_onnx(network: Network, columns: int) -> bytes:
    """Export the network to ONNX.

    Input: `features`, float64 (batch, columns). Output: `probabilities`, float32 (batch, classes).
    """
    example = torch.zeros(2, columns, dtype=torch.float64)
    dynamic = {"features": {0: torch.export.Dim("batch")}}
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        path = Path(scratch) / ONNX
        model = _Probabilities(network).eval()
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=True,
            dynamic_shapes=dynamic,
            external_data=False,
            input_names=["features"],
            output_names=["probabilities"],
        )
        return path.read_bytes()


@contextlib.contextmanager
def _quiet() -> Any:
    """Silence the exporter's verbose progress output; its errors are still raised."""
    loud = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(loud)
