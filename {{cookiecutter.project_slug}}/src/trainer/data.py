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
Check a CSV file and split its rows into two Parquet files: one for training, one for testing.

Run it cell by cell, or as a program:

    python -m trainer.data --csv data/digits.csv --label digit --train train.parquet --test test.parquet
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
## Data source
`data.source` in project.yaml is the path of a CSV file, or one of three datasets included in scikit-learn
(`sample:digits`, `sample:wine`, `sample:breast_cancer`), so you can start before your own data are ready. A sample
is written as a CSV file too, so the rest of the code treats both alike.
"""


# %%
def find_csv(source: str, folder: Path) -> Path:
    """Return the path of the CSV file of `data.source`; write a sample to `folder` if missing."""
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
    partial = path.with_name(
        f"{name}.{os.getpid()}.partial"
    )  # unique: two runs may write it at once
    try:
        with partial.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow([*sample.feature_names, label])
            # 17 digits, so that float64 values are read back exactly.
            for features, target in zip(sample.data, sample.target, strict=True):
                writer.writerow(
                    [*(f"{value:.17g}" for value in features), sample.target_names[target]]
                )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# %% [markdown]
"""
## Train/test split
A hash of a row's content and of a seed assigns each row to the training or the test set. A row therefore stays in
its set when other rows are added. Duplicate rows always land in the same set, so the test set contains no
copies of training rows (data leakage).
"""


# %%
def is_test(names: Iterable[str], test_fraction: float, split_seed: int) -> str:
    """Return the SQL condition that selects the test rows."""
    # MD5, because every system and version computes it alike. Sorted, so that the order of the
    # columns in the file does not matter.
    cells = ", ".join(f"coalesce({name_in_sql(name)}, '')" for name in sorted(names))
    bound = f"{round(test_fraction * 16**8):08x}"
    return (
        f"(left(md5(concat_ws(chr(31), {text_in_sql(str(split_seed))}, {cells})), 8) < '{bound}')"
    )


def check_split(database: duckdb.DuckDBPyConnection, label: str) -> tuple[int, int]:
    """Return the numbers of training and test rows; check that every class has training rows."""
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
Before anything is written, the file is checked (see `src/trainer/csv_reader.py`): the header, the label, and the type
of each column, which is inferred from all rows, not only from the first few. Errors name the row, the column and
the value.
"""


# %%
def write_sides(
    database: duckdb.DuckDBPyConnection, origin: str, train_path: Path, test_path: Path
) -> None:
    """Write both sets to Parquet.

    If both files exist, they come from the same split, also after an interruption.
    """
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
        # Otherwise a new train.parquet would exist beside an old test.parquet for a moment.
        test_path.unlink(missing_ok=True)
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
    """Check a CSV file, write the training and test rows to Parquet, and return a summary."""
    names = csv_reader.read_header(csv_path)
    features = csv_reader.choose_features(names, label, ignore, categorical)
    test = is_test([*features, label], test_fraction, split_seed)
    # The condition contains everything that determines the split: columns, fraction and seed.
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
## Read the Parquet files
They contain everything that training needs: the column types and, as metadata, the name of the label and the hashes
of the CSV file and of the split.
"""


# %%
def read_origin(path: Path) -> dict[str, str]:
    """Return a Parquet file's metadata: `label`, `sha256` of the CSV file, and hash `split`."""
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
    """Return the values of each column: float64 with NaN, or text with None, for missing values."""
    read_origin(path)
    table = duckdb.execute(f"SELECT * FROM read_parquet({file_in_sql(path)})").fetchnumpy()
    for values in filter(np.ma.isMaskedArray, table.values()):
        values.data[values.mask] = np.nan if values.dtype == np.float64 else None
    return {name: np.ma.getdata(values) for name, values in table.items()}


MOST_CATEGORIES = 1000


def read_schema(train_path: Path) -> Schema:
    """Infer columns, categories and classes from the training rows."""
    label, rows = read_origin(train_path)["label"], read_rows(train_path)
    columns = []
    for name, values in rows.items():
        if name == label:
            continue
        if values.dtype == np.float64:
            columns.append(Column(name, "numeric", optional=bool(np.isnan(values).any())))
            continue
        known = Counter(value for value in values if value is not None)
        # A category that occurs once gets the code of unknown categories: this is how the model
        # learns an embedding for them.
        often = sorted(value for value, count in known.most_common(MOST_CATEGORIES) if count > 1)
        columns.append(Column(name, "categorical", known.total() < len(values), tuple(often)))
    found = sorted({str(value) for value in rows[label]})
    integers = all(re.fullmatch(r"0|-?[1-9]\d{0,17}", value) for value in found)
    classes: tuple[int, ...] | tuple[str, ...] = (
        tuple(sorted(map(int, found))) if integers else tuple(found)
    )
    return Schema(label, tuple(columns), classes)


def notes(rows: dict[str, np.ndarray]) -> list[str]:
    """Return a note for each text column with mostly unique values: it may be an id or a name."""
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
The following cells use `data` from project.yaml. Change it there, and run all cells again.
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
Look at the rows first. If you cannot distinguish the classes, the model probably cannot either.
"""

# %% tags=["active-ipynb"]
"""
train_rows = read_rows(run.train_data)
plots.samples(train_rows, schema)
"""

# %% [markdown]
"""
Are the classes balanced? If 90 % of the rows belong to one class, a model that always predicts it has an accuracy
of 90 %.
"""

# %% tags=["active-ipynb"]
"""
plots.class_balance(train_rows[schema.label], read_rows(run.test_data)[schema.label], schema)
"""

# %% [markdown]
"""
How are the values of each column distributed? Missing numbers are allowed: the model replaces them with the
median of the training rows and adds an indicator.
"""

# %% tags=["active-ipynb"]
"""
plots.columns(train_rows, schema)
"""


# %% tags=["active-py"]
def main() -> None:
    """Run the command line."""
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
