# ---
# jupyter:
#   jupytext:
#     cell_markers: '"""'
#     cell_metadata_filter: tags,-all
#     formats: level_0_manual///ipynb,src/trainer///py:percent
#     notebook_metadata_filter: jupytext,-jupytext.text_representation.jupytext_version,-kernelspec,-language_info
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
# ---

# %% [markdown]
"""
# Data
A CSV file goes in; two Parquet files come out: rows to train on, and rows to test on.

Run it here cell by cell, or as a program: `python -m trainer.data --csv data/digits.csv --label digit --train train.parquet --test test.parquet`
"""

# %% tags=["active-ipynb"]
"""
import notebooks

notebooks.require_in_sync()
"""

# %%
import argparse
import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from core.errors import UserError, run_command
from core.manifest import flush, sha256
from core.paths import local_path
from core.schema import Column, Schema
from trainer import csv_reader
from trainer.csv_reader import TEST, file_in_sql, name_in_sql, text_in_sql

# %% [markdown]
"""
## Where the rows come from
`data.source` in project.yaml names a CSV file, or one of three real datasets that scikit-learn carries, so that there is something to
learn from before your own data are ready. A sample is written as a CSV too: from here on nothing knows the difference.
"""


# %%
def find_csv(source: str, folder: Path) -> Path:
    """The CSV file that `data.source` means; a sample is made in `folder` if it is not there yet."""
    if not source.startswith("sample:"):
        path = local_path(source)
        return path if path.is_absolute() else folder.parent / path
    name = source.removeprefix("sample:")
    path = folder / f"{name}.csv"
    if not path.exists():
        _write_sample(name, path)
    return path


def _write_sample(name: str, path: Path) -> None:
    from sklearn import datasets

    sample = getattr(datasets, f"load_{name}")()
    label = {"digits": "digit", "wine": "cultivar", "breast_cancer": "diagnosis"}[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{name}.{os.getpid()}.partial")  # two runs may make it at once
    try:
        with partial.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow([*sample.feature_names, label])
            for features, target in zip(sample.data, sample.target, strict=True):
                writer.writerow(
                    [*(f"{value:.17g}" for value in features), sample.target_names[target]]
                )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# %% [markdown]
"""
## Train or test?
Each row is put on one side by a hash of its own content (and a seed). A row therefore never changes side when other rows are added,
and two equal rows are never on both sides, which would let the model be tested on what it has seen.
"""


# %%
def is_test(names: Iterable[str], test_fraction: float, split_seed: int) -> str:
    """The SQL condition under which a row is a test row; MD5 because every system and version computes it alike."""
    cells = ", ".join(f"coalesce({name_in_sql(name)}, '')" for name in sorted(names))
    bound = f"{round(test_fraction * 16**8):08x}"
    return (
        f"(left(md5(concat_ws(chr(31), {text_in_sql(str(split_seed))}, {cells})), 8) < '{bound}')"
    )


def check_split(database: duckdb.DuckDBPyConnection, label: str) -> tuple[int, int]:
    """How many rows are to train on, and how many to test on."""
    sides = database.execute(f"""
        SELECT {name_in_sql(label)}, count(*) FILTER (NOT {TEST}), count(*) FILTER ({TEST}) FROM rows GROUP BY 1 ORDER BY 1
    """).fetchall()
    for name, in_train, in_test in sides:
        if not in_train:
            raise UserError(
                f"class {name!r} has {in_test} rows, and the split puts all of them into the test part. "
                "Add rows of that class, or try another data.split_seed in project.yaml."
            )
    train_rows, test_rows = sum(side[1] for side in sides), sum(side[2] for side in sides)
    if not test_rows:
        raise UserError(
            "the split leaves no row to test on. Add rows, or raise data.test_fraction in project.yaml."
        )
    return train_rows, test_rows


# %% [markdown]
"""
## From CSV to Parquet
The file is checked before anything is written: the header, the label, and what each column holds, which is decided by all of its rows and
not by the first few (the checks themselves are in `src/trainer/csv_reader.py`). A mistake is told with its row, column and value.
"""


# %%
def write_sides(
    database: duckdb.DuckDBPyConnection, origin: str, train_path: Path, test_path: Path
) -> None:
    """Write the rows of both sides. Whenever both files are there, they belong together, also after an interruption."""
    sides = {train_path: f"NOT {TEST}", test_path: TEST}
    partial = {path: path.with_name(path.name + ".partial") for path in sides}
    try:
        for path, condition in sides.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            csv_reader.write_parquet(
                database,
                f"SELECT * EXCLUDE ({TEST}) FROM rows WHERE {condition}",
                partial[path],
                origin,
            )
            flush(partial[path])
        test_path.unlink(
            missing_ok=True
        )  # or a new train.parquet would for a moment lie beside an old test.parquet
        for path in sides:
            partial[path].replace(path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


# %%
def prepare(
    csv_path: Path,
    label: str,
    train_path: Path,
    test_path: Path,
    *,
    ignore: Iterable[str] = (),
    categorical: Iterable[str] = (),
    test_fraction: float = 0.2,
    split_seed: int = 0,
) -> dict[str, Any]:
    """Check the CSV file and write its rows, typed, to two Parquet files.

    Returns:
        Numbers of rows and the kind of each column, to look at.
    """
    names = csv_reader.read_header(csv_path)
    features = csv_reader.choose_features(names, label, ignore, categorical)
    test = is_test([*features, label], test_fraction, split_seed)
    # The condition says all that decides on which side a row is: columns, share, seed.
    split = hashlib.sha256(test.encode()).hexdigest()
    with (
        csv_reader.explained(csv_path, train_path),
        csv_reader.scratch_folder(train_path) as scratch,
        csv_reader.open_csv(csv_path, names, scratch) as database,
    ):
        numbers = csv_reader.read_once(
            database, features, label, categorical, test, scratch / "rows.parquet"
        )
        csv_reader.check_label(database, label)
        kinds = csv_reader.infer_kinds(database, features, numbers, categorical)
        sides = check_split(database, label)
        write_sides(
            database,
            json.dumps({"label": label, "sha256": sha256(csv_path), "split": split}),
            train_path,
            test_path,
        )
    return {"train_rows": sides[0], "test_rows": sides[1], "label": label, "kinds": kinds}


# %% [markdown]
"""
## Reading them back
The Parquet files carry all that training needs to know of the data: the types of the columns, the label's name and the hash of the
CSV file that they came from.
"""


# %%
def read_origin(path: Path) -> dict[str, str]:
    """The label's name, the SHA-256 of the CSV file that a Parquet file came from, and that of the rule that divided its rows."""
    if not path.is_file():
        raise UserError(
            f"there is no file {path}. Make it with `python -m trainer.data`, or run data.ipynb."
        )
    query = f"SELECT value FROM parquet_kv_metadata({file_in_sql(path)}) WHERE key = 'origin'"
    try:
        entry = duckdb.execute(query).fetchone()
    except duckdb.Error as error:
        told = str(error).splitlines()[0]
        raise UserError(
            f"{path} is damaged ({told}). Make it again with `python -m trainer.data`, or run data.ipynb."
        ) from None
    if entry is None:
        raise UserError(
            f"{path} was not written by trainer.data: it does not say what its label is."
        )
    origin: dict[str, str] = json.loads(entry[0])
    return origin


def read_rows(path: Path) -> dict[str, np.ndarray]:
    """Column name → values: float64 with NaN for missing numbers, or text with None for blanks."""
    read_origin(path)
    table = duckdb.execute(f"SELECT * FROM read_parquet({file_in_sql(path)})").fetchnumpy()
    for values in filter(np.ma.isMaskedArray, table.values()):
        values.data[values.mask] = np.nan if values.dtype == np.float64 else None
    return {name: np.ma.getdata(values) for name, values in table.items()}


MOST_CATEGORIES = 1000


def read_schema(train_path: Path) -> Schema:
    """Columns, categories and classes as the training rows show them.

    A category that occurs once shares the code of unknown ones: that is how the model learns what to make of them.
    """
    label, rows = read_origin(train_path)["label"], read_rows(train_path)
    columns = []
    for name, values in rows.items():
        if name == label:
            continue
        if values.dtype == np.float64:
            columns.append(Column(name, "numeric", optional=bool(np.isnan(values).any())))
            continue
        known = Counter(value for value in values if value is not None)
        often = sorted(value for value, count in known.most_common(MOST_CATEGORIES) if count > 1)
        columns.append(Column(name, "categorical", known.total() < len(values), tuple(often)))
    found = sorted({str(value) for value in rows[label]})
    integers = all(re.fullmatch(r"0|-?[1-9]\d{0,17}", value) for value in found)
    classes: tuple[int, ...] | tuple[str, ...] = (
        tuple(sorted(map(int, found))) if integers else tuple(found)
    )
    return Schema(label, tuple(columns), classes)


def notes(rows: dict[str, np.ndarray]) -> list[str]:
    """Columns of text in which nearly every row has a value of its own: they look like names or ids."""
    found = []
    for name, values in rows.items():
        different = len(set(values.tolist())) if values.dtype != np.float64 else 0
        if different > 0.5 * len(values) and different > MOST_CATEGORIES // 50:
            told = (
                f"note: column '{name}' has {different:,} different values in {len(values):,} rows"
            )
            found.append(f"{told}. Is it an id? Then put it into data.ignore in project.yaml.")
    return found


# %% [markdown]
"""
## Try it
These cells use the source that project.yaml names. Change `data` there, and run all again.
"""

# %% tags=["active-ipynb"]
"""
from core.paths import project_root
from project import runs
from project.settings import load_settings
from trainer import plots

settings = load_settings()
data = settings.data
run = runs.current().start(settings)
csv_path = find_csv(data.source, project_root() / "data")
summary = prepare(
    csv_path,
    data.label,
    run.train_data,
    run.test_data,
    ignore=data.ignore,
    categorical=data.categorical,
    test_fraction=data.test_fraction,
    split_seed=data.split_seed,
)
schema = read_schema(run.train_data)
print(f"{csv_path.name}: {summary['train_rows']:,} rows to train on, {summary['test_rows']:,} to test on,")
for note in notes(read_rows(run.train_data)):
    print(note)
print(f"{len(schema.columns)} columns, {len(schema.classes)} classes: {', '.join(map(str, schema.classes[:10]))}")
"""

# %% [markdown]
"""
Look at the rows before anything else. If you cannot tell the classes apart, do not expect the model to.
"""

# %% tags=["active-ipynb"]
"""
train_rows = read_rows(run.train_data)
plots.samples(train_rows, schema)
"""

# %% [markdown]
"""
Are the classes balanced? If one class holds nine rows in ten, then a model that always answers with it is right nine times in ten.
"""

# %% tags=["active-ipynb"]
"""
plots.class_balance(train_rows[schema.label], read_rows(run.test_data)[schema.label], schema)
"""

# %% [markdown]
"""
What does each column hold? Missing values are allowed: the model sees the training median and a flag beside it.
"""

# %% tags=["active-ipynb"]
"""
plots.columns(train_rows, schema)
"""


# %% tags=["active-py"]
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.data", description="CSV → train.parquet and test.parquet"
    )
    parser.add_argument(
        "--csv",
        required=True,
        help="a CSV file with a header; gs:// works where the bucket is mounted",
    )
    parser.add_argument("--label", required=True, help="the column to predict")
    parser.add_argument(
        "--ignore", nargs="*", default=[], help="columns that the model must not see"
    )
    parser.add_argument(
        "--categorical",
        nargs="*",
        default=[],
        help="columns that are categories although they look like numbers",
    )
    parser.add_argument("--test-fraction", type=float, default=0.2)
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--train", required=True, help="where the training rows go")
    parser.add_argument("--test", required=True, help="where the test rows go")
    arguments = parser.parse_args()
    summary = prepare(
        local_path(arguments.csv),
        arguments.label,
        local_path(arguments.train),
        local_path(arguments.test),
        ignore=arguments.ignore,
        categorical=arguments.categorical,
        test_fraction=arguments.test_fraction,
        split_seed=arguments.split_seed,
    )
    print(
        f"{summary['train_rows']:,} rows → {arguments.train}, {summary['test_rows']:,} rows → {arguments.test}"
    )


if __name__ == "__main__":
    run_command(main)
