"""A CSV file, read as text and checked before anything is learned from it: header, label, what each column holds.

DuckDB reads it in pieces, so it may be larger than memory. Every mistake is one UserError that names row, column and value.
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
    """The names in the CSV's first line."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
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
        if "\n" in name or "\r" in name:  # DuckDB would take its second half for a row
            raise UserError(
                f"{path}: the name of column {position} has a line break: {name[:60]!r}. Write it on one line."
            )
    folded = [name.casefold() for name in names]  # SQL engines do not tell A from a
    twice = sorted({name for name in names if folded.count(name.casefold()) > 1})
    if twice:
        raise UserError(
            f"{path}: these column names stand more than once: {', '.join(twice)} (A and a count as the same)."
        )
    return names


def check_header(
    path: Path, label: str, ignore: Iterable[str] = (), categorical: Iterable[str] = ()
) -> None:
    """What can be told of a file in no time; the rows are not read. Raises UserError as the functions around it do."""
    choose_features(read_header(path), label, ignore, categorical)


def choose_features(
    names: Sequence[str], label: str, ignore: Iterable[str], categorical: Iterable[str]
) -> list[str]:
    """The columns that the model sees."""
    shown = ", ".join(
        names if len(names) <= 12 else [*names[:6], "…", *names[-3:]]
    )  # a label is often the last column
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


# Columns of our own: no name in a header begins with a blank.
BLANK, TEST = '" blank"', '" test"'


def open_csv(path: Path, names: Sequence[str], scratch: Path) -> duckdb.DuckDBPyConnection:
    """A connection with the view `cells`: the file's rows as text, blanks cut off, empty cells null.

    What does not fit into memory goes to the folder `scratch`.
    """
    memory = f"{400 + len(names)}MB"  # whatever the number of rows; a piece of each column is in memory at once
    database = duckdb.connect(config={"memory_limit": memory, "temp_directory": str(scratch)})
    # With hundreds of columns the one takes most of the time, and the other makes a join of each test for missing words.
    database.execute("SET disabled_optimizers = 'common_subexpressions,in_clause'")
    if not sys.stdout.isatty():
        with suppress(
            duckdb.InvalidInputException
        ):  # Jupyter has none to switch off, unless ipywidgets is there
            database.execute(
                "SET enable_progress_bar = false"
            )  # it is for people, and would spoil a log
    types = ", ".join(f"{text_in_sql(name)}: 'VARCHAR'" for name in names)
    # Cutting is slow, and few rows have a blank beside a comma: each row is first looked at as a whole.
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
    """Keep the file's rows in a Parquet file, with the condition `test` as a column, and make the view `rows` of it.

    Reading CSV is the slow part, so it is done once. A column is kept as numbers when its first rows are; if a later cell is
    none, the file is read again with that column as text. So a wrong guess costs time, and changes nothing.

    Returns:
        The columns that are kept as numbers.
    """
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
    """The columns in SQL; a cell that is no number becomes NaN among numbers, a missing one null."""
    number = f"CASE WHEN {IS_NUMBER} AND NOT {IS_CODE} THEN CAST({{0}} AS DOUBLE) WHEN {{0}} IS NULL OR {IS_MISSING} THEN NULL "
    number += "ELSE 'nan'::DOUBLE END AS {0}"
    settings = set(numbers)
    return ", ".join(
        (number if name in settings else "{0}").format(name_in_sql(name)) for name in names
    )


def _only_numbers(
    database: duckdb.DuckDBPyConnection, names: Sequence[str], query: str
) -> list[str]:
    """The columns without a NaN."""
    if not names:
        return []
    lost = ", ".join(f"coalesce(bool_or(isnan({name_in_sql(name)})), false)" for name in names)
    flags = database.execute(f"SELECT {lost} FROM ({query})").fetchone() or ()
    return [name for name, is_lost in zip(names, flags, strict=True) if not is_lost]


def write_parquet(
    database: duckdb.DuckDBPyConnection, query: str, path: Path, origin: str = "{}"
) -> None:
    """Write a query's rows, and `origin` as the file's metadata.

    A group of rows is held in memory, so it is small where there are many columns or long texts. The writer looks for repeated
    values in each column and is told to give up after a thousand different ones: few numbers repeat, and looking takes time.
    """

    def copy(rows: int) -> None:
        database.execute(f"""
            COPY ({query}) TO {text_in_sql(str(path))} (FORMAT parquet, ROW_GROUP_SIZE {rows}, DICTIONARY_SIZE_LIMIT 1000,
                KV_METADATA {{origin: {text_in_sql(origin)}}})
        """)

    columns = len(database.execute(f"DESCRIBE {query}").fetchall())
    try:
        copy(min(122_880, max(2048, 4_000_000 // columns)))
    except duckdb.OutOfMemoryException:
        copy(2048)


def name_in_sql(name: str) -> str:
    """The name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def text_in_sql(value: str) -> str:
    """The value as SQL writes it."""
    return "'" + value.replace("'", "''") + "'"


def file_in_sql(path: Path) -> str:
    """The path of a file to read as SQL writes it: brackets, asterisks and question marks are no patterns in it."""
    return text_in_sql(re.sub(r"[\[*?]", r"[\g<0>]", str(path)))


def first_row(database: duckdb.DuckDBPyConnection, name: str, condition: str) -> tuple[int, str]:
    """Number (from 1, the header not counted) and text of the first cell of a column that meets a condition."""
    database.execute("SET threads = 1")  # keeps the rows in the file's order
    row = database.execute(f"""
        SELECT row, cell FROM (SELECT row_number() OVER () AS row, {name_in_sql(name)} AS cell FROM rows)
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
# Of the texts that begin with a zero and a digit: ":" comes after "9". A comparison is much faster than a pattern.
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
    """For each feature "numeric" or "categorical"; `numbers` are the columns that are known to be numbers."""
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
    """Raises UserError when there is nothing to learn: no rows, a blank label, one class, a class seen once."""
    name = name_in_sql(label)
    # Few enough to look at; a label that has as many values as the file has rows must not fill the memory.
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
    """A folder beside a file that is to be written; what a run that was killed left in it is removed first.

    For a file in a mounted bucket it is in this machine's folder for temporary files.
    """
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
    """Turns what stops DuckDB or the disk, while the file at `path` is made into `target`, into a UserError."""
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
    """DuckDB's message about a malformed file, in the words of someone who edits it."""
    line = re.search(r"CSV Error on Line: (\d+)", message)
    found = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", message)
    where = f"line {line[1]}: " if line else ""
    if found:
        return f"{where}has {found[2]} cells, but the header has {found[1]}. A cell that holds a comma wants quotes around it."
    if (
        "invalid state" in message
    ):  # what DuckDB says of mixed line ends; reading on would drop surplus cells silently
        return r"some lines end with CRLF and some with LF. Make them alike, for example with: sed -i 's/\r$//' FILE"
    if "Maximum line size" in message:
        return f"{where}is longer than 2 MB. Is a quote opened there and never closed?"
    if "unterminated quote" in message:
        return f"{where}a quote is opened and never closed."
    if "unicode" in message:
        return f"{where}holds bytes that are not UTF-8. Save the file as UTF-8."
    return where + message.splitlines()[0]
