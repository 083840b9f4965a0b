"""Read a CSV file with DuckDB and check its header, its label and the type of each column.

The file may be larger than memory. An error is a UserError that names row, column and value.
"""

import csv
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb

from core.errors import UserError
from core.paths import in_bucket
from core.schema import BLANKS, MISSING


def read_header(path: Path) -> list[str]:
    """Return the column names in the first line of a CSV file."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block forever
            what = "a folder" if path.is_dir() else "no ordinary file"
            raise UserError(f"{path} is {what}. Set data.source in project.yaml to a CSV file.")
        with path.open(newline="", encoding="utf-8-sig") as stream:
            names = [name.strip(BLANKS) for name in next(csv.reader(stream), [])]
    except FileNotFoundError:
        raise UserError(f"there is no file {path}. Set data.source in project.yaml.") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}. `ls -l {path}` shows who may read it."
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8: {error}.") from None
    if not any(names):
        raise UserError(f"{path} is empty: its first line must name the columns.")
    if len(names) == 1 and re.search(r"[;\t|]", names[0]):
        raise UserError(
            f"{path}: the columns seem to be separated by something other than a comma: {names[0][:60]!r}."
        )
    for position, name in enumerate(names, start=1):
        if not name:
            raise UserError(f"{path}: column {position} has no name in the first line.")
        if "\n" in name or "\r" in name:  # DuckDB would read its second line as a row
            raise UserError(
                f"{path}: the name of column {position} has a line break: {name[:60]!r}. Write it on one line."
            )
    folded = [name.casefold() for name in names]  # SQL names ignore case
    twice = sorted({name for name in names if folded.count(name.casefold()) > 1})
    if twice:
        raise UserError(
            f"{path}: these column names stand more than once: {', '.join(twice)} (A and a count as the same)."
        )
    return names


def check_header(
    path: Path, label: str, ignore: Iterable[str] = (), categorical: Iterable[str] = ()
) -> None:
    """Check the header only, without reading the rows."""
    choose_features(read_header(path), label, ignore, categorical)


def choose_features(
    names: Sequence[str], label: str, ignore: Iterable[str], categorical: Iterable[str]
) -> list[str]:
    """Return the feature columns."""
    # The last columns are included, because the label is often the last one.
    shown = ", ".join(names if len(names) <= 12 else [*names[:6], "…", *names[-3:]])
    if label not in names:
        raise UserError(
            f"there is no label column '{label}'. Set data.label in project.yaml to one of: {shown}."
        )
    for key, wanted in (("ignore", ignore), ("categorical", categorical)):
        absent = [name for name in wanted if name not in names]
        if absent:
            raise UserError(
                f"data.{key} names columns that are not there: {', '.join(absent)}. There are: {shown}."
            )
    features = [name for name in names if name != label and name not in set(ignore)]
    if not features:
        raise UserError("no column is left to learn from: data.ignore holds all but the label.")
    return features


# Internal columns. They cannot clash with a header, whose names never start with a blank.
BLANK, TEST = '" blank"', '" test"'


def open_csv(path: Path, names: Sequence[str], scratch: Path) -> duckdb.DuckDBPyConnection:
    """Connect to DuckDB with the view `cells`: rows as stripped text, empty cells as null.

    DuckDB spills to the folder `scratch` what does not fit into memory.
    """
    # Independent of the number of rows; a chunk of every column is in memory at once.
    memory = f"{400 + len(names)}MB"
    database = duckdb.connect(config={"memory_limit": memory, "temp_directory": str(scratch)})
    # With hundreds of columns, the first optimizer takes most of the time, and the second turns
    # each check for missing words into a join.
    database.execute("SET disabled_optimizers = 'common_subexpressions,in_clause'")
    # The progress bar would clutter a log file.
    if not sys.stdout.isatty():
        # In Jupyter without ipywidgets there is no progress bar, and the setting is an error.
        with suppress(duckdb.InvalidInputException):
            database.execute("SET enable_progress_bar = false")
    types = ", ".join(f"{text_in_sql(name)}: 'VARCHAR'" for name in names)
    # Stripping is slow and few rows need it, so each row is first checked as a whole.
    row = f"concat_ws(chr(31), {', '.join(map(name_in_sql, names))})"
    blank = (
        f"regexp_matches({row}, {text_in_sql(f'(^|{chr(31)})[{BLANKS}]|[{BLANKS}]({chr(31)}|$)')})"
    )
    cut = f"nullif(CASE WHEN {BLANK} THEN trim({{0}}, {text_in_sql(BLANKS)}) ELSE {{0}} END, '') AS {{0}}"
    database.execute(f"""
        CREATE VIEW cells AS SELECT {", ".join(cut.format(name_in_sql(name)) for name in names)}
        FROM (SELECT *, {blank} AS {BLANK} FROM read_csv({file_in_sql(path)}, auto_detect=false, header=true,
            columns={{{types}}}, delim=',', quote='"', escape='"', strict_mode=true))
    """)
    return database


FIRST_ROWS = 10_000


def read_once(
    database: duckdb.DuckDBPyConnection,
    features: Sequence[str],
    label: str,
    categorical: Iterable[str],
    test: str,
    path: Path,
) -> list[str]:
    """Copy the rows to a Parquet file, create the view `rows` of it and return the numeric columns.

    The condition `test` becomes a column.
    """
    # Parsing CSV is slow, so it is done once: the first rows decide which columns are numbers. If a
    # later cell is not a number, the file is read again with that column as text. A wrong guess
    # costs time, but does not change the result.
    candidates = [name for name in features if name not in set(categorical)]
    guess = _only_numbers(
        database,
        candidates,
        f"SELECT {_cells(candidates, candidates)} FROM (FROM cells LIMIT {FIRST_ROWS})",
    )
    columns = [*features, label]
    write_parquet(database, f"SELECT {_cells(columns, guess)}, {test} AS {TEST} FROM cells", path)
    numbers = _only_numbers(database, guess, f"FROM read_parquet({file_in_sql(path)})")
    if numbers != guess:
        write_parquet(
            database, f"SELECT {_cells(columns, numbers)}, {test} AS {TEST} FROM cells", path
        )
    database.execute(f"CREATE VIEW rows AS FROM read_parquet({file_in_sql(path)})")
    return numbers


def _cells(names: Sequence[str], numbers: Sequence[str]) -> str:
    """Return the SQL of the columns; in numeric ones, invalid cells are NaN, missing ones null."""
    number = f"CASE WHEN {IS_NUMBER} AND NOT {IS_CODE} THEN CAST({{0}} AS DOUBLE) WHEN {{0}} IS NULL OR {IS_MISSING} THEN NULL "
    number += "ELSE 'nan'::DOUBLE END AS {0}"
    settings = set(numbers)
    return ", ".join(
        (number if name in settings else "{0}").format(name_in_sql(name)) for name in names
    )


def _only_numbers(
    database: duckdb.DuckDBPyConnection, names: Sequence[str], query: str
) -> list[str]:
    """Return the columns without NaN."""
    if not names:
        return []
    lost = ", ".join(f"coalesce(bool_or(isnan({name_in_sql(name)})), false)" for name in names)
    flags = database.execute(f"SELECT {lost} FROM ({query})").fetchone() or ()
    return [name for name, is_lost in zip(names, flags, strict=True) if not is_lost]


def write_parquet(
    database: duckdb.DuckDBPyConnection, query: str, path: Path, origin: str = "{}"
) -> None:
    """Write the rows of a query to Parquet, with `origin` as metadata."""

    # The dictionary limit saves time: few numbers repeat, so searching for more than a thousand
    # different values per column is not worth it.
    def copy(rows: int) -> None:
        database.execute(f"""
            COPY ({query}) TO {text_in_sql(str(path))} (FORMAT parquet, ROW_GROUP_SIZE {rows}, DICTIONARY_SIZE_LIMIT 1000,
                KV_METADATA {{origin: {text_in_sql(origin)}}})
        """)

    columns = len(database.execute(f"DESCRIBE {query}").fetchall())
    # A row group is held in memory: it has fewer rows if there are many columns, or long texts.
    try:
        copy(min(122_880, max(2048, 4_000_000 // columns)))
    except duckdb.OutOfMemoryException:
        copy(2048)


def name_in_sql(name: str) -> str:
    """Quote a name for SQL."""
    return '"' + name.replace('"', '""') + '"'


def text_in_sql(value: str) -> str:
    """Quote a text for SQL."""
    return "'" + value.replace("'", "''") + "'"


def file_in_sql(path: Path) -> str:
    """Quote the path of a file to read for SQL; escape its glob characters."""
    return text_in_sql(re.sub(r"[\[*?]", r"[\g<0>]", str(path)))


def first_row(database: duckdb.DuckDBPyConnection, name: str, condition: str) -> tuple[int, str]:
    """Return row number (from 1, without the header) and text of the first matching cell."""
    database.execute("SET threads = 1")  # keeps the order of the file
    row = database.execute(f"""
        SELECT row, cell FROM (SELECT row_number() OVER () AS row, {name_in_sql(name)} AS cell FROM rows)
        WHERE {condition} ORDER BY row LIMIT 1
    """).fetchone()
    if row is None:
        raise LookupError(condition)
    number, cell = row
    return number, cell


# SQL conditions on a cell. A column of numbers is numeric, any other one categorical. If nearly all
# cells are numbers, the rest are probably typing errors, so the column is rejected and the first
# one is reported. Numbers with leading zeros (00420) are codes, hence categories.
IS_NUMBER = "coalesce(isfinite(TRY_CAST({0} AS DOUBLE)) AND NOT contains({0}, '_'), false)"
IS_MISSING = "(lower({0}) IN (" + ", ".join(text_in_sql(token) for token in MISSING) + "))"
# Matches a zero followed by a digit (":" comes after "9"). Comparing is much faster than a regex.
IS_CODE = (
    "({0} < '0:' AND ({0} >= '00' OR {0} >= '-00' AND {0} < '-0:' OR {0} >= '+00' AND {0} < '+0:'))"
)
NEARLY_ALL = 0.9


def infer_kinds(
    database: duckdb.DuckDBPyConnection,
    features: Sequence[str],
    numbers: Sequence[str],
    categorical: Iterable[str] = (),
) -> dict[str, str]:
    """Return "numeric" or "categorical" for each feature; `numbers` are known to be numeric."""
    of_text = f"count(*) FILTER (NOT {IS_MISSING}), count(*) FILTER ({IS_NUMBER}), count(*) FILTER ({IS_CODE})"
    of_number = "count({0}), count({0}), 0"
    counts = [
        (of_number if name in set(numbers) else of_text).format(name_in_sql(name))
        for name in features
    ]
    flat = database.execute(f"SELECT {', '.join(counts)} FROM rows").fetchone() or ()
    kinds = {}
    for position, name in enumerate(features):
        values, finite, codes = flat[3 * position : 3 * position + 3]
        if not values:
            raise UserError(
                f"column '{name}' holds no value in any row. Put it into data.ignore in project.yaml."
            )
        if name in set(categorical) or codes or finite < NEARLY_ALL * values:
            kinds[name] = "categorical"
        elif finite == values:
            kinds[name] = "numeric"
        else:
            wrong = f"NOT {IS_NUMBER.format('cell')} AND NOT {IS_MISSING.format('cell')}"
            row, cell = first_row(database, name, wrong)
            raise UserError(
                f"row {row}, column '{name}': {cell[:60]!r} is not a finite number, but {finite:,} of the column's {values:,} "
                "values are. Correct the cell, leave it blank, or name the column in data.categorical in project.yaml."
            )
    return kinds


MOST_CLASSES = 1000


def check_label(database: duckdb.DuckDBPyConnection, label: str) -> None:
    """Check that the label has no blanks, two to MOST_CLASSES classes and two rows per class."""
    name = name_in_sql(label)
    # The limit bounds the memory if the label has as many values as the file has rows.
    found = database.execute(f"""
        SELECT {name}, count(*), count(*) OVER () FROM rows GROUP BY 1 ORDER BY {name} IS NOT NULL, 2, 1 LIMIT {MOST_CLASSES}
    """).fetchall()
    if not found:
        raise UserError("the file has a header but no rows.")
    counts, classes = {value: count for value, count, _ in found}, found[0][2]
    if None in counts:
        row, _ = first_row(database, label, "cell IS NULL")
        raise UserError(
            f"row {row}, label '{label}': is blank ({counts[None]} such rows). Label them, or remove them."
        )
    if len(counts) == 1:
        raise UserError(
            f"label '{label}': every row says {next(iter(counts))!r}; two classes at least are needed."
        )
    rare, count = next(iter(counts.items()))
    if classes > MOST_CLASSES:
        raise UserError(
            f"label '{label}' has {classes:,} different values; {MOST_CLASSES:,} at most. Is it a quantity? "
            "This template classifies: group the values into classes first."
        )
    if count == 1:
        row, _ = first_row(database, label, f"cell = {text_in_sql(rare)}")
        raise UserError(
            f"row {row}, label '{label}': {rare[:60]!r} occurs only once; each class needs two rows at least. "
            "Add rows of that class, or remove this one."
        )


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder beside the output file; remove leftovers of a killed run first."""
    # For a file in a mounted bucket, the folder is on the local disk.
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    scratch = path.with_name(path.name + ".scratch.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def explained(path: Path, target: Path) -> Iterator[None]:
    """Convert DuckDB and disk errors while `path` is converted to `target` to a UserError."""
    try:
        yield
    except duckdb.InvalidInputException as error:
        raise UserError(f"{path}: {explain(str(error))}") from None
    except duckdb.OutOfMemoryException:
        raise UserError(
            f"{path}: a row is too large, or there are too many columns, to be read in bounded memory."
        ) from None
    except (duckdb.IOException, OSError) as error:
        if not path.is_file():
            raise UserError(f"{path} vanished while it was read.") from None
        reasons = (
            [error.strerror]
            if isinstance(error, OSError)
            else re.findall(r'": ([^"\n]+)', str(error))
        )
        raise UserError(
            f"the rows of {path} cannot be written to {target.parent}: {(reasons or [str(error)])[-1]}. What was there is "
            f"unchanged. For a while about {1 + path.stat().st_size // 10**6:,} MB are needed: free them, or take another folder."
        ) from None


def explain(message: str) -> str:
    """Translate DuckDB's message about a malformed file into one that helps to fix the file."""
    line = re.search(r"CSV Error on Line: (\d+)", message)
    found = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", message)
    where = f"line {line[1]}: " if line else ""
    if found:
        return f"{where}has {found[2]} cells, but the header has {found[1]}. A cell that holds a comma wants quotes around it."
    # DuckDB's message for mixed line ends. Not ignored: surplus cells would be dropped silently.
    if "invalid state" in message:
        return r"some lines end with CRLF and some with LF. Make them alike, for example with: sed -i 's/\r$//' FILE"
    if "Maximum line size" in message:
        return f"{where}is longer than 2 MB. Is a quote opened there and never closed?"
    if "unterminated quote" in message:
        return f"{where}a quote is opened and never closed."
    if "unicode" in message:
        return f"{where}holds bytes that are not UTF-8. Save the file as UTF-8."
    return where + message.splitlines()[0]
