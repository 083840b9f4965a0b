"""A CSV file of 2 GB is checked, divided into training and test rows, and written as Parquet by the project's
`trainer.data.prepare`. Beside it, pandas turns the same file into one Parquet file: `read_csv` with its
default engine and `to_parquet` with pyarrow, with no checks and no division. The file has 11 million rows
of 14 numbers, some of them missing, 5 columns of text, some of it in quotes, and a label of five classes.
Both run three times, in turn, each time in a new process. Seconds and memory are the whole process's,
imports included, and the ratio is the median of the three rounds.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.report import PROJECT, RATIO, Figure

ROWS = 11_400_000  # of 176 bytes: 2 GB
SMALL_ROWS = 114_000

GENERATE = """
import duckdb
columns = []
for k in range(10):
    number = f"(hash(i, {k}) % 10**9)::BIGINT / 1e{k % 5 + 2}"
    columns.append(f"CASE WHEN hash(i, {k}) % 50 > 0 THEN {number} END AS number_{k}")
for k in range(4):
    columns.append(f"hash(i, 1{k}) % {100 * 10**k} AS count_{k}")
colours = ["red", "green", "blue", "light grey", "dark, deep brown", "é"]
for k in range(3):
    columns.append(f"{colours}[(1 + hash(i, 2{k}) % 6)::INT] AS colour_{k}")
columns.append("'item ' || hash(i, 30) % 500 AS item")
remarks = ["'plain text of some length'", "'in quotes, as ''they'' say'"]
columns.append(f"CASE WHEN hash(i, 31) % 3 > 0 THEN {remarks[0]} ELSE {remarks[1]} END AS remark")
columns.append("['a', 'b', 'c', 'd', 'e'][(1 + hash(i, 32) % 5)::INT] AS label")
duckdb.execute(f"COPY (SELECT {', '.join(columns)} FROM range(ROWS) t(i)) TO 'rows.csv' (FORMAT csv, HEADER)")
print(0)
"""

MEMORY = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
OURS = f"""
from pathlib import Path
from trainer import data
data.prepare(Path("rows.csv"), "label", Path("train.parquet"), Path("test.parquet"))
{MEMORY}
"""
PANDAS = f"""
import pandas
pandas.read_csv("rows.csv").to_parquet("rows.parquet", engine="pyarrow")
{MEMORY}
"""


@dataclass(frozen=True)
class Run:
    """One process."""

    seconds: float
    memory: float


def run(code: str, folder: Path) -> Run:
    """Run code in a new process; its last line says how much memory it held."""
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}"}
    command = [sys.executable, "-c", code]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE)
    seconds = time.perf_counter() - started
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, int(done.stdout.split()[-1]) * unit / 1e6)


def measure(small: bool) -> Iterator[Figure]:
    """Memory, and rows each second."""
    rows = SMALL_ROWS if small else ROWS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(GENERATE.replace("ROWS", str(rows)), folder)
        size = (folder / "rows.csv").stat().st_size
        rounds = [(run(OURS, folder), run(PANDAS, folder)) for _ in range(1 if small else 3)]
    ours, theirs = zip(*rounds, strict=True)
    ratio = statistics.median(other.seconds / one.seconds for one, other in rounds)
    yield Figure("peak memory", most_memory(ours), "MB", "≤ 600", f"a file of {size / 1e6:,.0f} MB")
    yield Figure("rows each second over pandas'", ratio, RATIO, "≥ 3")
    yield Figure("rows each second", rows / median_seconds(ours), "rows/s")
    yield Figure("rows each second, pandas", rows / median_seconds(theirs), "rows/s")
    yield Figure("peak memory, pandas", most_memory(theirs), "MB")


def median_seconds(runs: Iterable[Run]) -> float:
    """Seconds of the run in the middle."""
    return statistics.median(run.seconds for run in runs)


def most_memory(runs: Iterable[Run]) -> float:
    """Megabytes of the run that held most."""
    return max(run.memory for run in runs)
