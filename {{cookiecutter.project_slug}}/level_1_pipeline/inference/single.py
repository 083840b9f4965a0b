"""Predict one row.

single.py '{"width": 3.1, "colour": "red"}'     or an array, in the columns' order
single.py --csv new.csv --row 3                 the third row of a file
"""

import argparse
import json
from pathlib import Path
from typing import Any

from core.errors import UserError, run_command
from core.schema import Schema
from level_0_manual.predict import parse_row, read_csv, show_row
from predictor import client
from predictor.client import Server


def read_row(arguments: argparse.Namespace, schema: Schema) -> dict[str, list[Any]]:
    """Column name → the row's value, in a list."""
    if arguments.csv:
        table = read_csv(arguments.csv)
        rows = len(next(iter(table.values())))
        if not 1 <= arguments.row <= rows:
            raise UserError(
                f"--row {arguments.row}: the rows of {arguments.csv} are numbered 1 to {rows}."
            )
        return {name: [cells[arguments.row - 1]] for name, cells in table.items()}
    if not arguments.instance.lstrip().startswith("["):
        return parse_row(arguments.instance, schema)
    names = [column.name for column in schema.columns]
    try:
        values = json.loads(arguments.instance)
    except ValueError as error:
        raise UserError(f"ROW is not JSON ({error}): {arguments.instance[:80]!r}.") from None
    if len(values) != len(names):
        raise UserError(
            f"ROW has {len(values)} values; the model has {len(names)} columns: {', '.join(names[:10])}."
        )
    return {name: [value] for name, value in zip(names, values, strict=True)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Predict one row.")
    parser.add_argument(
        "instance", nargs="?", metavar="ROW", help="the row as a JSON object or array"
    )
    parser.add_argument("--csv", type=Path, help="a CSV file with a header")
    parser.add_argument("--row", type=int, default=1, metavar="N", help="number of its row, from 1")
    parser.add_argument("--json", action="store_true", help="print the prediction as JSON")
    client.add_arguments(parser)
    arguments = parser.parse_args()
    if (arguments.instance is None) == (arguments.csv is None):
        raise UserError("give a row, '{\"column\": value, …}', or --csv FILE --row N.")
    server = Server.open(arguments.endpoint, arguments.wait)
    row = read_row(arguments, server.schema)
    if arguments.json:
        print(json.dumps(server.predict(row)[0], ensure_ascii=False))
    else:
        print(
            show_row(
                server,
                row,
                f"Row {arguments.row} of {arguments.csv}" if arguments.csv else "Your row",
            )
        )


if __name__ == "__main__":
    run_command(main)
