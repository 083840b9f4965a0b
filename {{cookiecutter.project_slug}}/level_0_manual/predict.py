"""Predict with the local server if it is running, else with a saved model's ONNX file.

python -m level_0_manual.predict --row 3              the third test row
python -m level_0_manual.predict --row '{"age": 41}'  your own row
python -m level_0_manual.predict --csv new.csv        all rows of a file; prints CSV
"""

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.errors import UserError, run_command
from core.onnx_model import Model
from core.schema import BLANKS, Schema

if TYPE_CHECKING:
    from predictor.client import Server


def read_csv(path: Path) -> dict[str, list[str]]:
    """Read a CSV file as column name → cells as text."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, strict=True)
            names = [name.strip(BLANKS) for name in next(reader, [])]
            if not names:
                raise UserError(f"{path} is empty: its first line must name the columns.")
            if len(set(names)) < len(names):
                raise UserError(f"{path}: a column name stands twice.")
            rows = []
            for row in reader:
                # csv.reader returns [] for a blank line, which is skipped.
                if row and len(row) != len(names):
                    raise UserError(
                        f"{path}, line {reader.line_num}: has {len(row)} cells, but the header has {len(names)}."
                    )
                if row:
                    rows.append(row)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8: {error}.") from None
    if not rows:
        raise UserError(f"{path} has a header but no rows.")
    return {name: [row[position] for row in rows] for position, name in enumerate(names)}


def parse_row(text: str, schema: Schema) -> dict[str, list[Any]]:
    """Parse one row from a JSON object, as a table."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"ROW is neither a row's number nor JSON ({error}): {text[:80]!r}."
        ) from None
    if not isinstance(row, dict):
        raise UserError("ROW wants one JSON object with a value for each column.")
    # The label is allowed: `show_row` then compares it with the prediction.
    known = {column.name for column in schema.columns} | {schema.label}
    unknown = [name for name in row if name not in known]
    if unknown:
        raise UserError(f"ROW: the model has no column {', '.join(unknown[:10])}.")
    return {name: [value] for name, value in row.items()}


def show_row(model: "Model | Server", table: Mapping[str, Sequence[Any]], title: str) -> str:
    """Format one prediction: top classes with scores, the truth if known, the image if any."""
    schema = model.schema
    scores = model.probabilities(table)[0]
    best = np.argsort(-scores, kind="stable")[:3]
    lines = [title, "", f"  prediction  {schema.classes[best[0]]}"]
    if schema.label in table:
        truth = str(table[schema.label][0])
        lines.append(
            f"  truth       {truth}   {'right' if truth == str(schema.classes[best[0]]) else 'WRONG'}"
        )
    lines.append("")
    for position in best:
        lines.append(
            f"  {str(schema.classes[position])[:20]:<11} {'█' * round(20 * scores[position]):<20} {scores[position]:7.2%}"
        )
    if schema.image_shape is None:
        return "\n".join(lines)
    picture = draw(
        [float(table[column.name][0] or 0) for column in schema.columns], schema.image_shape
    )
    lines = [title, "", *_side_by_side(picture, lines[2:])]
    return "\n".join(lines)


def draw(pixels: Sequence[float], shape: tuple[int, int]) -> list[str]:
    """Draw a grey image as lines of text; two characters per pixel make it look square."""
    shades = " ░▒▓█"
    height, width = shape
    most = max([*pixels, 1e-9])  # not 0, which a black image would divide by
    cells = [shades[min(4, max(0, round(4 * value / most)))] * 2 for value in pixels]
    return ["".join(cells[row * width : (row + 1) * width]) for row in range(height)]


def _side_by_side(left: list[str], right: list[str]) -> list[str]:
    """Join two blocks of text side by side, the right one centered vertically."""
    width = max(map(len, left))
    right = [""] * max(0, (len(left) - len(right)) // 2) + right
    height = max(len(left), len(right))
    left, right = left + [""] * (height - len(left)), right + [""] * (height - len(right))
    return [f"  {a:<{width}}  {b}".rstrip() for a, b in zip(left, right, strict=True)]


def write_answers(model: "Model | Server", table: Mapping[str, Sequence[Any]]) -> None:
    """Print predictions as CSV: row number, prediction, score."""
    probabilities = model.probabilities(table)
    best = probabilities.argmax(axis=1)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["row", "prediction", "score"])
    for row, position in enumerate(best):
        writer.writerow(
            [row + 1, model.schema.classes[position], f"{probabilities[row, position]:.6f}"]
        )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m level_0_manual.predict", description="Ask a saved model."
    )
    parser.add_argument(
        "--model-dir", type=Path, help="a saved model's folder, asked without a server"
    )
    parser.add_argument("--run", help="a run's id, whose model is asked without a server")
    parser.add_argument("--port", type=int, default=8080, help="where the server may be")
    parser.add_argument("--row", help="a test row's number from 1, or a JSON object")
    parser.add_argument("--csv", type=Path, help="a CSV file with a header")
    arguments = parser.parse_args()
    if (arguments.row is None) == (arguments.csv is None):
        raise UserError(
            "give ROW=NUMBER, ROW='{\"column\": value, …}' or CSV=FILE; for example: make predict ROW=1"
        )
    # Read the file first: an invalid one is reported before a model is loaded.
    table = read_csv(arguments.csv) if arguments.csv else {}
    model, test_data = choose(arguments)
    if arguments.csv:
        write_answers(model, table)
    elif arguments.row.strip().isdecimal():
        number = int(arguments.row)
        print(show_row(model, test_row(test_data, number), f"Test row {number}"))
    else:
        print(show_row(model, parse_row(arguments.row, model.schema), "Your row"))


def choose(arguments: argparse.Namespace) -> "tuple[Model | Server, Path]":
    """Return the server or model, and the path of its test rows; print the choice to stderr."""
    from core.registry import LocalRegistry
    from predictor.client import Server
    from project import runs

    if arguments.model_dir:
        return Model.load(arguments.model_dir), arguments.model_dir.parent / "test.parquet"
    registry = LocalRegistry(runs.registry_folder())
    server = None if arguments.run else Server.find(arguments.port, registry)
    if server and server.version:  # `find` returns only servers with a version
        print(f"Asking the server at {server.address}, version {server.version}.", file=sys.stderr)
        return server, runs.Run(runs.runs_folder() / registry.version(server.version).run).test_data
    run = runs.find(arguments.run)
    why = (
        "no server was asked"
        if arguments.run
        else f"no server of this registry answers on port {arguments.port}"
    )
    print(f"Asking the model of run {run.name} ({why}).", file=sys.stderr)
    return Model.load(run.model), run.test_data


def test_row(path: Path, number: int) -> dict[str, list[Any]]:
    """Return one row of the test data by its number, from 1."""
    import duckdb

    if not path.is_file():
        raise UserError(
            f"{path} is not there: give a row of your own, ROW='{{\"column\": value, …}}', or CSV=FILE."
        )
    table = duckdb.execute(
        "SELECT * FROM read_parquet(?) LIMIT 1 OFFSET ?", [str(path), max(0, number - 1)]
    )
    names, row = [column[0] for column in table.description or []], table.fetchone()
    if row is None or number < 1:
        (rows,) = duckdb.execute(
            "SELECT count(*) FROM read_parquet(?)", [str(path)]
        ).fetchone() or (0,)
        raise UserError(f"ROW={number}: the test rows are numbered 1 to {rows}.")
    return {name: [value] for name, value in zip(names, row, strict=True)}


if __name__ == "__main__":
    run_command(main)
