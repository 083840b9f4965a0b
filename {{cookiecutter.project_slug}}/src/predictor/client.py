"""Asks a running server; answers as a `Model` in this process does."""

import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from project import manifest
from project.errors import UserError
from project.registry import LocalRegistry
from project.schema import Schema, parse_number

CELLS = 50_000  # in one request: about 2 MB, where the server takes 10
HEALTH_SECONDS = 1.0
ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class Server:
    """A server of a version in this machine's registry."""

    address: str
    version: int
    schema: Schema

    @classmethod
    def find(cls, port: int, registry: LocalRegistry) -> "Server | None":
        """The server on this machine's port, if one answers and serves a version of this very registry."""
        address = f"http://127.0.0.1:{port}"
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=HEALTH_SECONDS) as response:
                health = json.load(response)
            number, saved = health["version"], registry.version(health["version"]).model / manifest.NAME
            if manifest.sha256(saved) != health["manifest_sha256"]:
                return None  # another project's
            document = json.loads(saved.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None
        return cls(address, number, Schema.from_json(document["schema"]))

    def probabilities(self, table: Mapping[str, Sequence[Any] | np.ndarray]) -> np.ndarray:
        """Probabilities, float64 (rows, classes), for columns of values.

        Raises:
            UserError: what the server says of a wrong row, or that it does not answer.
        """
        absent = [column.name for column in self.schema.columns if column.name not in table and not column.optional]
        if absent:
            raise UserError(f"{len(absent)} column(s) of the model are not in the data: {', '.join(absent[:10])}.")
        rows = len(next(iter(table.values())))
        size = max(1, CELLS // len(self.schema.columns))
        answers = [
            prediction for start in range(0, rows, size) for prediction in self._ask(table, start, min(start + size, rows))
        ]
        scores = [[answer["scores"][str(name)] for name in self.schema.classes] for answer in answers]
        return np.array(scores)

    def _ask(self, table: Mapping[str, Sequence[Any] | np.ndarray], start: int, end: int) -> list[dict[str, Any]]:
        instances = [dict(self._fields(table, row)) for row in range(start, end)]
        body = {"instances": instances, "parameters": {"top": len(self.schema.classes)}}
        request = urllib.request.Request(
            f"{self.address}/predict", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                answers: list[dict[str, Any]] = json.load(response)["predictions"]
                return answers
        except urllib.error.HTTPError as error:
            raise UserError(f"the server refuses rows {start + 1} to {end}: {json.load(error).get('error', error)}") from None
        except OSError as error:
            raise UserError(f"{self.address} does not answer: {error}.") from None

    def _fields(self, table: Mapping[str, Sequence[Any] | np.ndarray], row: int) -> Iterator[tuple[str, Any]]:
        """The row's values as JSON has them: a number for a cell's text, null for a missing one."""
        for column in self.schema.columns:
            if column.name not in table:
                continue
            value: Any = table[column.name][row]
            if column.kind == "numeric":
                try:
                    number = parse_number(value)
                except ValueError:
                    raise UserError(f"row {row + 1}, column '{column.name}': {value!r} is not a finite number.") from None
                yield column.name, None if math.isnan(number) else number
            else:
                yield column.name, value or None
