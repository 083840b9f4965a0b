# ---
# jupyter:
#   jupytext:
#     cell_markers: '"""'
#     cell_metadata_filter: tags,-all
#     formats: level_0_manual///ipynb,src/trainer///py:percent
#     notebook_metadata_filter: jupytext,-jupytext.text_representation.jupytext_version,-kernelspec,-language_info
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
# ---

# %% [markdown]
"""
# Model
A small neural network for tabular data: standardised numbers, embedded categories and two hidden layers.
Its size follows from the data, so new data need no change of the code. To use another model, edit only this file
or its notebook.
"""

# %% tags=["active-ipynb"]
"""
import notebooks

notebooks.require_in_sync()
"""

# %%
import math

import numpy as np
import torch
from torch import nn

from core.schema import Schema

# %% [markdown]
"""
## Feature preprocessing
A network trains best on inputs with a mean near 0 and a standard deviation near 1. The medians, means and standard
deviations come from the training rows only. They are stored in the model, so training and serving always apply
the same preprocessing.

Missing numbers are replaced by the median. A column with missing values in the training rows also gets an indicator:
1 where the value is missing, otherwise 0.
"""


# %%
class Standardizer(nn.Module):
    """Impute and standardise raw features.

    Input: float64 (rows, columns). Output: float32 (rows, numbers + missing indicators + category
    codes).
    """

    LIMIT = 10.0  # standard deviations: clips outliers, which would dominate the layers' sums

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        kinds = [(position, c) for position, c in enumerate(schema.columns)]
        self.numeric = [position for position, c in kinds if c.kind == "numeric"]
        self.missing_indicators = [
            position for position, c in kinds if c.kind == "numeric" and c.optional
        ]
        self.categorical = [position for position, c in kinds if c.kind == "categorical"]
        for name in ("median", "mean", "std"):
            self.register_buffer(name, torch.zeros(len(self.numeric), dtype=torch.float64))
        self.median: torch.Tensor
        self.mean: torch.Tensor
        self.std: torch.Tensor

    def fit(self, features: np.ndarray) -> None:
        """Take median, mean and standard deviation (1 for a constant) from training rows."""
        numbers = features[:, self.numeric]
        # All values of a sparse column may be in the validation rows.
        numbers = np.where(np.isnan(numbers).all(axis=0), 0.0, numbers)
        # Halve first: the median of an even number of values adds two, which may overflow.
        median = (
            np.nanmedian(numbers / 2, axis=0) * 2 if numbers.size else np.zeros(len(self.numeric))
        )
        filled = np.where(np.isnan(numbers), median, numbers)
        # The lower bound, because PyTorch and ONNX Runtime round the smallest numbers differently.
        size = np.maximum(np.abs(filled).max(axis=0, initial=0), 1e-288)
        # Divide first: the sum of large numbers would overflow.
        mean = (filled / size).mean(axis=0) * size
        std = (filled / size).std(axis=0) * size
        tiny = std <= 1e-12 * size  # a rounding error, not variation
        self.median.copy_(torch.from_numpy(median))
        self.mean.copy_(torch.from_numpy(mean))
        self.std.copy_(torch.from_numpy(np.where(tiny, 1.0, std)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Impute, standardise, add missing indicators; pass category codes through."""
        numbers = features[:, self.numeric]
        numbers = torch.where(torch.isnan(numbers), self.median, numbers)
        # Halve first: the difference of two huge numbers may overflow.
        standard = (numbers / 2 - self.mean / 2) / self.std * 2
        parts = [standard.clamp(-self.LIMIT, self.LIMIT)]
        if self.missing_indicators:
            parts.append(torch.isnan(features[:, self.missing_indicators]).to(features.dtype))
        if self.categorical:
            parts.append(features[:, self.categorical])
        return torch.cat(parts, dim=1).float()


# %% [markdown]
"""
## The network
Each category becomes an embedding: a short vector that is learned, so similar categories get similar vectors. Code 0
(unknown) starts as a vector of zeros, which is neutral. The width of the hidden layers grows with the number of
inputs, within limits.
"""


# %%
class Network(nn.Module):
    """Map raw features (rows, columns) to logits (rows, classes)."""

    def __init__(self, schema: Schema, dropout: float = 0.0) -> None:
        super().__init__()
        self.standardizer = Standardizer(schema)
        self.numbers = len(self.standardizer.numeric) + len(self.standardizer.missing_indicators)
        sizes = [
            len(schema.columns[position].values) + 1 for position in self.standardizer.categorical
        ]
        self.embeddings = nn.ModuleList(nn.Embedding(size, embedding_width(size)) for size in sizes)
        for embedding in self.embeddings:
            nn.init.zeros_(embedding.weight[0])  # type: ignore[index]
        inputs = self.numbers + sum(embedding_width(size) for size in sizes)
        hidden = hidden_width(inputs)
        self.layers = nn.Sequential(
            *(nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(hidden, hidden // 2), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(hidden // 2, len(schema.classes)),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits of raw features; this is the graph that is exported and served."""
        return self.from_scaled(self.standardizer(features))

    def from_scaled(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits of standardised inputs."""
        # A method of its own, because training standardises the rows once, not at every step.
        if not self.embeddings:
            return self.layers(inputs)  # type: ignore[no-any-return]
        parts = [inputs[:, : self.numbers]]
        for position, embedding in enumerate(self.embeddings):
            parts.append(embedding(inputs[:, self.numbers + position].long()))
        return self.layers(torch.cat(parts, dim=1))  # type: ignore[no-any-return]


def embedding_width(categories: int) -> int:
    """Return the embedding size: the square root of the number of categories, at most 50."""
    return min(50, math.ceil(math.sqrt(categories)))


def hidden_width(inputs: int) -> int:
    """Return twice the number of inputs, rounded up to a power of two between 32 and 256."""
    return int(2 ** min(8, max(5, math.ceil(math.log2(2 * inputs)))))


# %% [markdown]
"""
## Try it
"""

# %% tags=["active-ipynb"]
r"""
from project import runs
from trainer.data import read_rows, read_schema

run = runs.current()
schema = read_schema(run.require(run.train_data, "data"))
network = Network(schema)
print(network)
print(f"\n{sum(weights.numel() for weights in network.parameters()):,} weights")
"""

# %% [markdown]
"""
Before training, the network should predict about the same probability for each class. If it does not, check the scaling
and the initial weights.
"""

# %% tags=["active-ipynb"]
"""
features = schema.encode(read_rows(run.train_data))
network.standardizer.fit(features)
with torch.inference_mode():
    probabilities = network(torch.from_numpy(features)).softmax(dim=1)
print(f"mean probability for each class, untrained (even would be {1 / len(schema.classes):.3f}):")
for name, probability in zip(schema.classes, probabilities.mean(dim=0).tolist(), strict=True):
    print(f"  {name}: {probability:.3f}")
"""

# %% [markdown]
"""
The standardizer's outputs have a mean near 0 and a standard deviation near 1, whatever the units of the columns are.
"""

# %% tags=["active-ipynb"]
"""
from trainer import plots

plots.standardized(features[:, network.standardizer.numeric], network.standardizer(torch.from_numpy(features))[:, : len(network.standardizer.numeric)])
"""
