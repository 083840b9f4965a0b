"""Rows from a CSV file or from JSON lines, one at a time: what is wrong with one is kept in its place.

A row has a key and a hash of its text. They begin its line in the output, so that a second run sees how far the first came,
and that the output belongs to the input.
"""

import csv
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from core.errors import UserError
from core.schema import BLANKS, Schema
from predictor.client import json_values, require

ROW_BYTES = 1_000_000  # a CSV row that is longer has a quotation mark that nobody closed


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the input.

    Attributes:
        start: how the row's line in the output begins: its key and its hash.
        text: as the row stands in the input.
        instance: the row as the server takes it, in JSON; none when there is a problem.
        problem: what is wrong with it, as far as can be said without the server.
    """

    start: str
    text: str
    instance: str = ""
    problem: str = ""

    def line(self, outcome: dict[str, Any]) -> str:
        """The row's line in the output."""
        return f"{self.start}, {json.dumps(outcome)[1:]}\n"


@contextmanager
def open_input(path: Path | None) -> Iterator[TextIO]:
    """A file, or standard input. What is not UTF-8 is kept for the moment, so that its row can be named.

    Raises:
        UserError: it cannot be opened.
    """
    if path is None:
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="")  # type: ignore[union-attr]
        yield sys.stdin
        return
    try:
        stream = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    with stream:
        yield stream


def read_rows(
    stream: TextIO, name: str, schema: Schema, *, is_csv: bool, key: str | None = None
) -> Iterator[Row]:
    """The rows of a CSV file or of JSON lines; blank lines are none.

    Args:
        stream: where they are read.
        name: what messages call it.
        schema: of the model that is to be asked.
        is_csv: CSV with a header, otherwise JSON lines.
        key: the column that tells rows apart; otherwise their number does, from 1.

    Raises:
        UserError: it cannot be read, or the CSV file lacks a column.
    """
    texts = _records(stream, name, is_csv)
    form = _CSV(name, next(texts, ""), schema, key) if is_csv else _JSON(schema, key)
    for number, text in enumerate(texts, start=1):
        row_key, instance, problem = number, "", ""
        try:
            values = form.parse(text)
            row_key = number if key is None else _key(values, key)
            instance = form.instance(text, values)
        except UnicodeEncodeError:
            problem = "the row is not UTF-8."
        except ValueError as error:
            problem = str(error)
        digest = zlib.crc32(text.encode(errors="surrogateescape"))
        yield Row(
            json.dumps({"key": row_key, "hash": f"{digest:08x}"})[:-1], text, instance, problem
        )


def _records(stream: TextIO, name: str, is_csv: bool) -> Iterator[str]:
    """The text of each row. In CSV, a row goes on in the next line while a quotation mark is open."""
    text = ""
    try:
        for line in stream:
            text += line
            if is_csv and text.count('"') % 2 and len(text) < ROW_BYTES:
                continue
            if text.strip(BLANKS):
                yield text.strip("\r\n")
            text = ""
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from None
    if text:
        yield text.strip("\r\n")  # the quotation mark was never closed


def _key(values: Any, key: str) -> Any:
    value = values.get(key) if isinstance(values, dict) else None
    if value is None or value == "" or isinstance(value, (dict, list)):
        raise ValueError(f"the row has no key in column '{key}'.")
    return value


class _CSV:
    """Rows under a header. Columns that the model does not know, such as the label's, are left out."""

    def __init__(self, name: str, header: str, schema: Schema, key: str | None) -> None:
        self.columns = schema.columns
        try:
            self.names = [
                cell.strip(BLANKS) for cell in next(csv.reader([header], strict=True), [])
            ]
        except csv.Error as error:
            raise UserError(f"{name}: the header cannot be read as CSV: {error}.") from None
        if not self.names:
            raise UserError(f"{name} is empty: its first line must name the columns.")
        if len(set(self.names)) < len(self.names):
            raise UserError(f"{name}: a column name stands twice.")
        if key is not None and key not in self.names:
            raise UserError(
                f"{name} has no column '{key}' for --key. Found: {', '.join(self.names[:10])}."
            )
        require(self.columns, self.names)

    def parse(self, text: str) -> dict[str, str]:
        """Column name → cell."""
        text.encode()
        try:
            cells = next(csv.reader([text], strict=True))
        except csv.Error as error:
            raise ValueError(f"the row cannot be read as CSV: {error}.") from None
        if len(cells) != len(self.names):
            raise ValueError(
                f"the row has {len(cells)} cells, but the header has {len(self.names)}."
            )
        return dict(zip(self.names, cells, strict=True))

    def instance(self, _: str, values: dict[str, str]) -> str:
        """The row as the server takes it."""
        return json.dumps(json_values(self.columns, values))


class _JSON:
    """One object or array in each line, which the server is to judge; only a key that is no column is taken out."""

    def __init__(self, schema: Schema, key: str | None) -> None:
        self.extra_key = None if key in {column.name for column in schema.columns} else key

    def parse(self, text: str) -> Any:
        """The JSON value."""
        text.encode()
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the row is not JSON: {error}.") from None
        if not isinstance(values, (dict, list)):
            raise ValueError("the row is neither a JSON object nor an array.")
        return values

    def instance(self, text: str, values: Any) -> str:
        """The row as the server takes it."""
        if self.extra_key is None:
            return text
        return json.dumps({name: value for name, value in values.items() if name != self.extra_key})
