"""Define and validate the blocks `hyperparameters`, `data` and `gate` of project.yaml.

To add a hyperparameter, add a field to `Hyperparameters` and use it in model.py or train.py.
project.yaml, SET=…, the command line, the pipeline and the cloud jobs pass all of them on as one
dict. A field without a default must be set in project.yaml.
"""

# This module does not import torch, so that the settings load fast and in images without torch.

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from core.config import Block, read_project_file
from core.errors import UserError


def _no_truth_value(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "should be a number")
    return value


# YAML reads `yes` as True, which pydantic would accept as 1.0.
Number = Annotated[float, BeforeValidator(_no_truth_value)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Hyperparameters:
    """Hyperparameters of one training run."""

    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)]
    # CPU threads. Set explicitly, because the results depend on their number.
    threads: Annotated[int, Field(strict=True, ge=1, le=1024)]
    epochs: Annotated[int, Field(strict=True, ge=1)]  # upper limit: training may stop early
    batch_size: Annotated[int, Field(strict=True, ge=1)]  # rows per step, in all ranks together
    learning_rate: Annotated[Number, Field(gt=0, le=10)]
    weight_decay: Annotated[Number, Field(ge=0, le=10)] = 0.01
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    # Fraction of the training rows that selects the best epoch.
    validation_fraction: Annotated[Number, Field(gt=0, lt=0.9)] = 0.15
    # Number of epochs without a lower validation loss after which training stops.
    patience: Annotated[int, Field(strict=True, ge=1)] = 10

    def to_json(self) -> str:
        """Return the JSON that `from_json` parses."""
        return json.dumps(asdict(self))

    @classmethod
    def from_parameter(cls, values: Mapping[str, float]) -> "Hyperparameters":
        """Validate the hyperparameters of a pipeline parameter."""
        # KFP passes all numbers as doubles: 40 arrives as 40.0.
        whole = {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in values.items()
        }
        return cls.from_json(json.dumps(whole))

    @classmethod
    def from_project(cls) -> "Hyperparameters":
        """Read the block `hyperparameters` of project.yaml, with the overrides of SET."""
        return cls.from_json(json.dumps(read_project_file().get("hyperparameters")))

    @classmethod
    def from_json(cls, text: str) -> "Hyperparameters":
        """Parse and validate a JSON object."""
        try:
            return cls(**json.loads(text))
        except ValidationError as error:
            rules = "; ".join(
                f"{e['loc'][0]}: {e['msg']} (got {e['input']!r})" for e in error.errors()
            )
            raise UserError(f"--hyperparameters: {rules}.") from None
        except (ValueError, TypeError) as error:
            raise UserError(
                f"--hyperparameters wants one JSON object such as '{{\"epochs\": 40, …}}': {error}."
            ) from None


SAMPLES = ("digits", "wine", "breast_cancer")


Fraction = Annotated[Number, Field(ge=0, le=1)]


class Data(Block):
    """The data source and the use of its columns."""

    source: Annotated[str, Field(strict=True, min_length=1)]
    label: Annotated[str, Field(strict=True, min_length=1)]
    ignore: tuple[Annotated[str, Field(strict=True)], ...] = ()
    categorical: tuple[Annotated[str, Field(strict=True)], ...] = ()
    test_fraction: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    split_seed: Annotated[int, Field(strict=True, ge=0)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> "Data":
        if self.source.startswith("sample:") and self.source.removeprefix("sample:") not in SAMPLES:
            raise ValueError(
                f"source: the samples are {', '.join('sample:' + name for name in SAMPLES)}"
            )
        if self.label in self.ignore:
            raise ValueError(f"ignore: holds the label '{self.label}'")
        return self


class Gate(Block):
    """Conditions for a new model to replace the champion."""

    metric: Literal["accuracy", "macro_f1"]
    threshold: Fraction
    max_regression: Fraction
