"""What a training run can be told: the `train` block of project.yaml, checked.

To add one: a line here, and its use in model.py or train.py. It then travels by itself, as one dict, through
project.yaml, SET=…, the command line, the pipeline and the cloud's jobs. One with a default here need not stand in
project.yaml; those without are given there and nowhere else. (A module of its own because settings must load without torch.)
"""

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


Number = Annotated[float, BeforeValidator(_no_truth_value)]  # pydantic would take "yes" for 1.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Hyperparameters:
    """Raises pydantic's ValidationError for an unknown name or a value outside its range."""

    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)]
    threads: Annotated[
        int, Field(strict=True, ge=1, le=1024)
    ]  # of the CPU; part of what makes a run repeatable
    epochs: Annotated[int, Field(strict=True, ge=1)]  # at most: training stops early
    batch_size: Annotated[int, Field(strict=True, ge=1)]  # rows per step, over all ranks together
    learning_rate: Annotated[Number, Field(gt=0, le=10)]
    weight_decay: Annotated[Number, Field(ge=0, le=10)] = 0.01
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    validation_fraction: Annotated[Number, Field(gt=0, lt=0.9)] = (
        0.15  # of the training rows, to choose the best epoch
    )
    patience: Annotated[int, Field(strict=True, ge=1)] = (
        10  # epochs without a better validation loss before stopping
    )

    def to_json(self) -> str:
        """As `from_json` takes it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_parameter(cls, values: Mapping[str, float]) -> "Hyperparameters":
        """From a pipeline's parameter, whose numbers have all become doubles on their way; checks as `from_json` does."""
        whole = {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in values.items()
        }
        return cls.from_json(json.dumps(whole))

    @classmethod
    def from_project(cls) -> "Hyperparameters":
        """From the block `hyperparameters` of project.yaml, with the overrides of SET."""
        return cls.from_json(json.dumps(read_project_file().get("hyperparameters")))

    @classmethod
    def from_json(cls, text: str) -> "Hyperparameters":
        """Parse and check."""
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
    """Where the rows come from and which columns count."""

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
    """When a new model is good enough to replace the champion."""

    metric: Literal["accuracy", "macro_f1"]
    threshold: Fraction
    max_regression: Fraction
