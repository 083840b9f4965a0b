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
A small network for tables: numbers are standardised, categories are embedded, two hidden layers do the rest.
It is shaped by the data, so it needs no change when they do. To use another model, change this file (or its notebook) and nothing else.
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
## From a row to numbers that a network likes
A network learns best from inputs around zero with a standard deviation of about one. The medians, means and standard deviations are taken from the training rows
alone, and live inside the model: whoever serves it cannot forget them or use others.

Where training saw missing values, the median stands in, and a flag beside it says that it does.
"""


# %%
class Standardizer(nn.Module):
    """Raw float64 features (rows, columns) → standardised float32 inputs (rows, numbers + missing indicators + categories)."""

    LIMIT = 10.0  # standard deviations; further out a number says nothing new, and cannot upset the sums

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
        numbers = np.where(
            np.isnan(numbers).all(axis=0), 0.0, numbers
        )  # all values of a rare column may lie in other rows
        # Halved first: the median of an even number of values adds the middle two.
        median = (
            np.nanmedian(numbers / 2, axis=0) * 2 if numbers.size else np.zeros(len(self.numeric))
        )
        filled = np.where(np.isnan(numbers), median, numbers)
        size = np.maximum(
            np.abs(filled).max(axis=0, initial=0), 1e-288
        )  # torch and ONNX round the smallest numbers differently
        mean = (filled / size).mean(
            axis=0
        ) * size  # divided first: the sum of large numbers would overflow
        std = (filled / size).std(axis=0) * size
        tiny = std <= 1e-12 * size  # rounding, not variation
        self.median.copy_(torch.from_numpy(median))
        self.mean.copy_(torch.from_numpy(mean))
        self.std.copy_(torch.from_numpy(np.where(tiny, 1.0, std)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Impute, standardise, flag; pass category codes through."""
        numbers = features[:, self.numeric]
        numbers = torch.where(torch.isnan(numbers), self.median, numbers)
        # Halved first, because the difference of two huge numbers may overflow.
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
Each category becomes a short vector that training places: similar categories end up near each other. Code 0 (unknown) starts at zero, which
means "no opinion". The width of the hidden layers grows with the number of inputs, within limits.
"""


# %%
class Network(nn.Module):
    """Features (rows, columns) → one logit for each class (rows, classes)."""

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
        """Raw features in, logits out: what is saved and served."""
        return self.from_scaled(self.standardizer(features))

    def from_scaled(self, inputs: torch.Tensor) -> torch.Tensor:
        """The part that learns: training scales its rows once and then calls this at every step."""
        if not self.embeddings:
            return self.layers(inputs)  # type: ignore[no-any-return]
        parts = [inputs[:, : self.numbers]]
        for position, embedding in enumerate(self.embeddings):
            parts.append(embedding(inputs[:, self.numbers + position].long()))
        return self.layers(torch.cat(parts, dim=1))  # type: ignore[no-any-return]


def embedding_width(categories: int) -> int:
    """Numbers per category: about the square root of how many there are, 50 at most."""
    return min(50, math.ceil(math.sqrt(categories)))


def hidden_width(inputs: int) -> int:
    """Twice the inputs, as a power of two between 32 and 256."""
    return int(2 ** min(8, max(5, math.ceil(math.log2(2 * inputs)))))


# %% [markdown]
"""
## Look at it
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
Before it has learned anything it should be undecided: about the same probability for each class. If it is not, something is wrong with the
scaling or the initial weights.
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
What comes out of the standardizer has a mean of 0 and a standard deviation of 1, whatever the columns' units were.
"""

# %% tags=["active-ipynb"]
"""
from trainer import plots

plots.standardized(features[:, network.standardizer.numeric], network.standardizer(torch.from_numpy(features))[:, : len(network.standardizer.numeric)])
"""
