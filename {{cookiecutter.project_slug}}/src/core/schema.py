"""Data schema: the contract between trainer, saved model and predictor.

It is inferred from the training rows and saved in the model's manifest. It encodes rows as the
feature matrix that the network and its ONNX file take.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from types import NoneType
from typing import Any, Literal

import numpy as np

from core.errors import UserError

# Missing values of a numeric column, in lower case. In a categorical column only a blank cell is
# missing, because "NA" and "None" are sensible categories.
MISSING = ("", "na", "n/a", "nan", "null", "none", "?")
BLANKS = " \t\r\n"  # stripped from both ends of every cell

UNKNOWN = 0  # code of a missing category and of one not in the training rows


def parse_number(value: object) -> float:
    """Parse a CSV cell or JSON value as a finite number; NaN if missing, else ValueError."""
    if isinstance(value, str):
        text = value.strip(BLANKS)
        if text.lower() in MISSING:
            return math.nan
        # float() accepts "1_000" and non-ASCII digits; DuckDB's cast and other readers do not.
        if "_" in text or not text.isascii():
            raise ValueError(value)
        number = float(text)
    elif value is None:
        return math.nan
    elif isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer of JSON may be too large for a float
            raise ValueError(value) from None
        if math.isnan(number):
            return number
    else:
        raise ValueError(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


@dataclass(frozen=True)
class Column:
    """One input column.

    Attributes:
        values: the categories of the training rows in the order of their codes, from 1.
        optional: some training rows have no value, so requests may omit it.
    """

    name: str
    kind: Literal["numeric", "categorical"]
    optional: bool = False
    values: tuple[str, ...] = ()
    _codes: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Index the categories for encoding."""
        object.__setattr__(
            self, "_codes", {value: code for code, value in enumerate(self.values, start=1)}
        )

    def encode(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Encode values as float64 of the same length: numbers (NaN: missing) or category codes."""
        # A float64 array needs no parsing, only the check for infinity.
        if isinstance(values, np.ndarray) and values.dtype == np.float64 and self.kind == "numeric":
            encoded = values
            if np.isinf(encoded).any():
                self._refuse(int(np.isinf(encoded).argmax()), "inf", "is not a finite number")
        else:
            encoded = np.fromiter(
                (self._code(row, v) for row, v in enumerate(values)), np.float64, len(values)
            )
        missing = np.isnan(encoded) if self.kind == "numeric" else encoded < 0
        if missing.any() and not self.optional:
            self._refuse(
                int(missing.argmax()),
                "",
                "is missing, and training never saw this column without a value",
            )
        return np.where(missing, math.nan if self.kind == "numeric" else UNKNOWN, encoded)

    def _code(self, row: int, value: object) -> float:
        """Encode one value; a missing category is -1, distinct from UNKNOWN."""
        if self.kind == "numeric":
            try:
                return parse_number(value)
            except ValueError:
                self._refuse(row, value, "is not a finite number")
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return -1
        if not isinstance(value, (str, int, float)):
            self._refuse(row, value, "is neither text nor a number")
        # JSON has one number type: the category 7 of the CSV file may arrive as 7.0.
        text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip(
            BLANKS
        )
        return self._codes.get(text, UNKNOWN) if text else -1

    def _refuse(self, row: int, value: object, rule: str) -> Any:
        """Raise the error for a value; `row` counts from 0, the message from 1."""
        shown = repr(value if not isinstance(value, str) else value[:60])
        raise UserError(f"row {row + 1}, column '{self.name}': {shown} {rule}.")


@dataclass(frozen=True)
class Schema:
    """Input columns in file order, the label, and classes in the order of the model's scores."""

    label: str
    columns: tuple[Column, ...]
    classes: tuple[int, ...] | tuple[str, ...]

    def encode(self, table: Mapping[str, Sequence[Any] | np.ndarray]) -> np.ndarray:
        """Encode a table as float64 (rows, columns); columns outside the schema are ignored."""
        absent = [
            column.name
            for column in self.columns
            if column.name not in table and not column.optional
        ]
        if absent:
            raise UserError(
                f"{len(absent)} column(s) of the model are not in the data: {', '.join(absent[:10])}. "
                f"Found: {', '.join(list(table)[:10]) or 'none'}."
            )
        rows = len(next(iter(table.values()))) if table else 0
        columns = [table.get(column.name, [None] * rows) for column in self.columns]
        features = np.empty((rows, len(self.columns)))
        numbers = self._numbers([columns[position] for position in self._numeric])
        if numbers is not None:
            features[:, self._numeric] = numbers.T
        for position in self._categorical if numbers is not None else range(len(columns)):
            features[:, position] = self.columns[position].encode(columns[position])
        return features

    @cached_property
    def _numeric(self) -> list[int]:
        """Positions of the numeric columns."""
        return [
            position for position, column in enumerate(self.columns) if column.kind == "numeric"
        ]

    @cached_property
    def _categorical(self) -> list[int]:
        """Positions of the categorical columns."""
        return [
            position for position, column in enumerate(self.columns) if column.kind == "categorical"
        ]

    def _numbers(self, columns: list[Sequence[Any] | np.ndarray]) -> np.ndarray | None:
        """Encode all numeric columns at once as (columns, rows); None if a cell needs parsing.

        Most requests have plain numbers, and this is seven times as fast as one column at a time.
        After None, `Column.encode` parses text and reports the invalid value.
        """
        if not {int, float, NoneType}.issuperset(map(type, chain.from_iterable(columns))):
            return None
        try:
            numbers = np.array(columns, dtype=np.float64)  # None becomes NaN
        except OverflowError:
            return None
        if np.isfinite(numbers).all():
            return numbers
        required = [not self.columns[position].optional for position in self._numeric]
        return None if np.isinf(numbers).any() or np.isnan(numbers[required]).any() else numbers

    def encode_labels(self, labels: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Encode labels as int64 positions in `classes`."""
        positions = {str(name): position for position, name in enumerate(self.classes)}
        encoded = np.empty(len(labels), dtype=np.int64)
        for row, label in enumerate(labels):
            position = positions.get(str(label).strip(BLANKS))
            if position is None:
                raise UserError(
                    f"row {row + 1}, label '{self.label}': {str(label)[:60]!r} is none of the {len(positions)} classes "
                    f"that the model knows ({', '.join(list(positions)[:10])}{', …' if len(positions) > 10 else ''})."
                )
            encoded[row] = position
        return encoded

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """(height, width) if the columns are pixel_ROW_COLUMN, row by row; else None."""
        places = [re.fullmatch(r"pixel_(\d+)_(\d+)", column.name) for column in self.columns]
        if not places or not all(places):
            return None
        grid = [(int(place[1]), int(place[2])) for place in places if place]
        height, width = max(row for row, _ in grid) + 1, max(column for _, column in grid) + 1
        in_order = grid == [(row, column) for row in range(height) for column in range(width)]
        return (height, width) if in_order else None

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and dicts for the manifest."""
        columns = [{k: v for k, v in asdict(c).items() if k != "_codes"} for c in self.columns]
        return {"label": self.label, "classes": list(self.classes), "columns": columns}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Schema":
        """Create a schema from the output of `to_json`."""
        columns = tuple(
            Column(c["name"], c["kind"], c["optional"], tuple(c["values"]))
            for c in document["columns"]
        )
        return cls(document["label"], columns, tuple(document["classes"]))
