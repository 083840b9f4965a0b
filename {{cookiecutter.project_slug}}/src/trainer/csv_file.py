"""A CSV file, read as text and checked before anything is learned from it: header, label, what each column holds.

DuckDB reads it in pieces, so it may be larger than memory. Every mistake is one UserError that names row, column and value.
"""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import duckdb

from project.errors import UserError
from project.schema import BLANKS, MISSING


def read_header(path: Path) -> list[str]:
    """The names in the CSV's first line.

    Raises:
        UserError: there is no such file, it is empty, or names are blank or stand twice.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            names = [name.strip(BLANKS) for name in next(csv.reader(stream), [])]
    except FileNotFoundError:
        raise UserError(f"there is no file {path}. Set data.source in project.yaml.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8: {error}.") from None
    if not any(names):
        raise UserError(f"{path} is empty: its first line must name the columns.")
    if len(names) == 1 and re.search(r"[;\t|]", names[0]):
        raise UserError(f"{path}: the columns seem to be separated by something other than a comma: {names[0][:60]!r}.")
    for position, name in enumerate(names, start=1):
        if not name:
            raise UserError(f"{path}: column {position} has no name in the first line.")
    folded = [name.casefold() for name in names]  # SQL engines do not tell A from a
    twice = sorted({name for name in names if folded.count(name.casefold()) > 1})
    if twice:
        raise UserError(f"{path}: these column names stand more than once: {', '.join(twice)} (A and a count as the same).")
    return names


def check_header(path: Path, label: str, ignore: Iterable[str] = (), categorical: Iterable[str] = ()) -> None:
    """What can be told of a file in no time; the rows are not read. Raises UserError as the functions around it do."""
    choose_features(read_header(path), label, ignore, categorical)


def choose_features(names: Sequence[str], label: str, ignore: Iterable[str], categorical: Iterable[str]) -> list[str]:
    """The columns that the model sees.

    Raises:
        UserError: a column that project.yaml names is not in the file, or no column is left.
    """
    shown = ", ".join(names if len(names) <= 12 else [*names[:6], "…", *names[-3:]])  # a label is often the last column
    if label not in names:
        raise UserError(f"there is no label column '{label}'. Set data.label in project.yaml to one of: {shown}.")
    for key, wanted in (("ignore", ignore), ("categorical", categorical)):
        absent = [name for name in wanted if name not in names]
        if absent:
            raise UserError(f"data.{key} names columns that are not there: {', '.join(absent)}. There are: {shown}.")
    features = [name for name in names if name != label and name not in set(ignore)]
    if not features:
        raise UserError("no column is left to learn from: data.ignore holds all but the label.")
    return features


def open_csv(path: Path, names: Sequence[str]) -> duckdb.DuckDBPyConnection:
    """A connection with the view `cells`: the file's rows as text, blanks cut off, empty cells null."""
    database = duckdb.connect(config={"memory_limit": "400MB"})
    types = ", ".join(f"{text_in_sql(name)}: 'VARCHAR'" for name in names)
    cut = ", ".join(f"nullif(trim({name_in_sql(name)}, {text_in_sql(BLANKS)}), '') AS {name_in_sql(name)}" for name in names)
    database.execute(f"""
        CREATE VIEW cells AS SELECT {cut} FROM read_csv({text_in_sql(str(path))}, auto_detect=false, header=true,
            columns={{{types}}}, delim=',', quote='"', escape='"', strict_mode=true)
    """)
    return database


def name_in_sql(name: str) -> str:
    """The name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def text_in_sql(value: str) -> str:
    """The value as SQL writes it."""
    return "'" + value.replace("'", "''") + "'"


def first_row(database: duckdb.DuckDBPyConnection, name: str, condition: str) -> tuple[int, str]:
    """Number (from 1, the header not counted) and text of the first cell of a column that meets a condition."""
    database.execute("SET threads = 1")  # keeps the rows in the file's order
    row = database.execute(f"""
        SELECT row, cell FROM (SELECT row_number() OVER () AS row, {name_in_sql(name)} AS cell FROM cells)
        WHERE {condition} ORDER BY row LIMIT 1
    """).fetchone()
    if row is None:
        raise LookupError(condition)
    number, cell = row
    return number, cell


# Conditions on a cell, as SQL. A column of numbers stays numbers; anything else is a category. One in which nearly every
# cell is a number is more likely a number with a typing mistake, so it is refused and the cell is named. Numbers with
# leading zeros (00420) are codes, hence categories.
IS_NUMBER = "coalesce(isfinite(TRY_CAST({0} AS DOUBLE)) AND NOT contains({0}, '_'), false)"
IS_MISSING = "(lower({0}) IN (" + ", ".join(text_in_sql(token) for token in MISSING) + "))"
NEARLY_ALL = 0.9


def infer_kinds(database: duckdb.DuckDBPyConnection, features: Sequence[str], categorical: Iterable[str] = ()) -> dict[str, str]:
    """For each feature "numeric" or "categorical".

    Raises:
        UserError: names a column without any value, or a cell that is no number among numbers.
    """
    counts = ", ".join(
        f"count(*) FILTER (NOT {IS_MISSING.format(cell)}), count(*) FILTER ({IS_NUMBER.format(cell)}), "
        f"count(*) FILTER (regexp_matches({cell}, '^[+-]?0[0-9]'))"
        for cell in map(name_in_sql, features)
    )
    flat = database.execute(f"SELECT {counts} FROM cells").fetchone() or ()
    kinds = {}
    for position, name in enumerate(features):
        values, numbers, padded = flat[3 * position : 3 * position + 3]
        if not values:
            raise UserError(f"column '{name}' holds no value in any row. Put it into data.ignore in project.yaml.")
        if name in set(categorical) or padded or numbers < NEARLY_ALL * values:
            kinds[name] = "categorical"
        elif numbers == values:
            kinds[name] = "numeric"
        else:
            wrong = f"NOT {IS_NUMBER.format('cell')} AND NOT {IS_MISSING.format('cell')}"
            row, cell = first_row(database, name, wrong)
            raise UserError(
                f"row {row}, column '{name}': {cell[:60]!r} is not a finite number, but {numbers:,} of the column's {values:,} "
                "values are. Correct the cell, leave it blank, or name the column in data.categorical in project.yaml."
            )
    return kinds


MOST_CLASSES = 1000


def check_label(database: duckdb.DuckDBPyConnection, label: str) -> None:
    """Raises UserError when there is nothing to learn: no rows, a blank label, one class, a class seen once."""
    name = name_in_sql(label)
    found = database.execute(f"SELECT {name}, count(*) FROM cells GROUP BY 1 ORDER BY 2, 1").fetchall()
    if not found:
        raise UserError("the file has a header but no rows.")
    counts = dict(found)
    if None in counts:
        row, _ = first_row(database, label, "cell IS NULL")
        raise UserError(f"row {row}, label '{label}': is blank ({counts[None]} such rows). Label them, or remove them.")
    if len(counts) == 1:
        raise UserError(f"label '{label}': every row says {next(iter(counts))!r}; two classes at least are needed.")
    rare, count = next(iter(counts.items()))
    if len(counts) > MOST_CLASSES:
        raise UserError(
            f"label '{label}' has {len(counts):,} different values; {MOST_CLASSES:,} at most. Is it a quantity? "
            "This template classifies: group the values into classes first."
        )
    if count == 1:
        row, _ = first_row(database, label, f"cell = {text_in_sql(rare)}")
        raise UserError(
            f"row {row}, label '{label}': {rare[:60]!r} occurs only once; each class needs two rows at least. "
            "Add rows of that class, or remove this one."
        )


def explain(message: str) -> str:
    """DuckDB's message about a malformed file, in the words of someone who edits it."""
    line = re.search(r"CSV Error on Line: (\d+)", message)
    found = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", message)
    where = f"line {line[1]}: " if line else ""
    if found:
        return f"{where}has {found[2]} cells, but the header has {found[1]}. A cell that holds a comma wants quotes around it."
    if "invalid state" in message:  # what DuckDB says of mixed line ends; reading on would drop surplus cells silently
        return r"some lines end with CRLF and some with LF. Make them alike, for example with: sed -i 's/\r$//' FILE"
    if "unterminated quote" in message:
        return f"{where}a quote is opened and never closed."
    if "unicode" in message:
        return f"{where}holds bytes that are not UTF-8. Save the file as UTF-8."
    return where + message.splitlines()[0]
