"""Predict many rows with parallel requests, and write the predictions in the rows' order.

A row's line in the output begins with its key and a hash of its text: a rerun sees which rows are
done, and that the output belongs to the input. An invalid row gets a line with its error.
"""

import csv
import json
import os
import re
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from queue import Queue
from typing import Any, BinaryIO, TextIO, TypeVar

from tqdm import tqdm

from core.errors import UserError, run_command
from core.schema import BLANKS, Schema
from predictor.client import Endpoint, RequestRejected, json_values, require

try:
    import fcntl
except ImportError:  # Windows: two runs must not share an output
    fcntl = None  # type: ignore[assignment]

Item = TypeVar("Item")
Result = TypeVar("Result")

REQUEST_BYTES = 1_000_000  # the cloud's shared endpoints take 1.5 MB
ROW_BYTES = 1_000_000  # a longer CSV row has an unclosed quotation mark


# ── input ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Row:
    """A row: the start of its output line, its text, and its JSON for the server or its error."""

    start: str
    text: str
    instance: str = ""
    problem: str = ""

    def line(self, outcome: dict[str, Any]) -> str:
        """Return the row's line of the output."""
        return f"{self.start}, {json.dumps(outcome)[1:]}\n"


@contextmanager
def open_input(path: Path | None) -> Iterator[TextIO]:
    """Open a file or standard input; invalid UTF-8 is kept, so that its row can be reported."""
    if path is None:
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="")  # type: ignore[union-attr]
        yield sys.stdin
        return
    try:
        stream = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except FileNotFoundError:
        raise UserError(f"no file {path}.") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    with stream:
        yield stream


def read_rows(
    stream: TextIO, name: str, schema: Schema, *, is_csv: bool, key: str | None = None
) -> Iterator[Row]:
    """Read rows of CSV or JSON Lines; `key` names the column of their keys (default: numbers)."""
    texts = _records(stream, name, is_csv)
    names = _read_header(next(texts, ""), name, schema, key) if is_csv else []
    extra_key = None if key in {column.name for column in schema.columns} else key
    for number, text in enumerate(texts, start=1):
        row_key, instance, problem = number, "", ""
        try:
            text.encode()
            values = _parse_csv(text, names) if is_csv else _parse_json(text)
            row_key = number if key is None else _read_key(values, key)
            if is_csv:
                instance = json.dumps(json_values(schema.columns, values))
            elif extra_key is None:
                instance = text  # the server validates it
            else:
                instance = json.dumps({k: v for k, v in values.items() if k != extra_key})
        except UnicodeEncodeError:
            problem = "the row is not UTF-8."
        except ValueError as error:
            problem = str(error)
        digest = zlib.crc32(text.encode(errors="surrogateescape"))
        start = json.dumps({"key": row_key, "hash": f"{digest:08x}"})[:-1]
        yield Row(start, text, instance, problem)


def _records(stream: TextIO, name: str, is_csv: bool) -> Iterator[str]:
    """Yield each row's text; a CSV row continues while a quotation mark is open."""
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
        raise UserError(f"cannot read {name}: {error.strerror}.") from None
    if text:
        yield text.strip("\r\n")  # with an unclosed quotation mark


def _read_key(values: Any, key: str) -> Any:
    value = values.get(key) if isinstance(values, dict) else None
    if value is None or value == "" or isinstance(value, (dict, list)):
        raise ValueError(f"the row has no key in column '{key}'.")
    return value


def _read_header(text: str, name: str, schema: Schema, key: str | None) -> list[str]:
    try:
        names = [cell.strip(BLANKS) for cell in next(csv.reader([text], strict=True), [])]
    except csv.Error as error:
        raise UserError(f"{name}: the header is not valid CSV: {error}.") from None
    if not names:
        raise UserError(f"{name} is empty: its first line must name the columns.")
    if len(set(names)) < len(names):
        raise UserError(f"{name}: duplicate column name.")
    if key is not None and key not in names:
        raise UserError(f"{name} has no column '{key}' for --key, only {', '.join(names[:10])}.")
    require(schema.columns, names)
    return names


def _parse_csv(text: str, names: Sequence[str]) -> dict[str, str]:
    try:
        cells = next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise ValueError(f"the row is not valid CSV: {error}.") from None
    if len(cells) != len(names):
        raise ValueError(f"the row has {len(cells)} cells, but the header has {len(names)}.")
    return dict(zip(names, cells, strict=True))


def _parse_json(text: str) -> Any:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the row is not JSON: {error}.") from None
    if not isinstance(values, (dict, list)):
        raise ValueError("the row is neither a JSON object nor an array.")
    return values


# ── requests ────────────────────────────────────────────────────────────────────────────────────


def in_batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Yield batches of `size` rows, or fewer if they are too long for one request."""
    batch: list[Row] = []
    length = 0
    for row in rows:
        if batch and (len(batch) == size or length + len(row.instance) > REQUEST_BYTES):
            yield batch
            batch, length = [], 0
        batch.append(row)
        length += len(row.instance)
        if len(batch) == size:  # at once: a stream's next row may take long
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def answer(endpoint: Endpoint, rows: Sequence[Row]) -> list[str]:
    """Return the rows' lines of the output."""
    outcomes = iter(_predict([row for row in rows if not row.problem], endpoint))
    return [
        row.line({"error": row.problem, "row": row.text} if row.problem else next(outcomes))
        for row in rows
    ]


def _predict(rows: Sequence[Row], endpoint: Endpoint) -> list[dict[str, Any]]:
    """Predict; bisect the rows if the server rejects them, until only the invalid ones fail."""
    if not rows:
        return []
    try:
        return endpoint.predict_json([row.instance for row in rows])
    except RequestRejected as error:
        if len(rows) == 1:
            return [{"error": re.sub("^instance 1[,:] ", "", str(error)), "row": rows[0].text}]
    middle = len(rows) // 2
    return _predict(rows[:middle], endpoint) + _predict(rows[middle:], endpoint)


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], concurrency: int
) -> Iterator[Result]:
    """Run `work` on the items in parallel; yield the results in order, each as soon as possible.

    At most three items for each thread are in progress. Another thread reads the items, so that
    results do not wait for an input that pauses.
    """
    waiting: Queue[Future[Result] | None] = Queue(maxsize=2 * concurrency)
    threads = ThreadPoolExecutor(concurrency)

    def read() -> None:
        try:
            for item in items:
                waiting.put(threads.submit(work, item))
        except BaseException as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            waiting.put(failed)
        waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (future := waiting.get()) is not None:
        yield future.result()
    threads.shutdown()


# ── output ──────────────────────────────────────────────────────────────────────────────────────


class Summary:
    """Number of rows in the output, and how many of them failed."""

    done = 0
    failed = 0

    def count(self, lines: Sequence[str], rows: Sequence[Row]) -> None:
        """Count rows and their lines of the output."""
        self.done += len(rows)
        for line, row in zip(lines, rows, strict=True):
            self.failed += line.startswith('"error": ', len(row.start) + 2)

    def __str__(self) -> str:
        """Say how to continue."""
        return f"{self.done:,} row(s) are done; rerun the same command to continue."


def open_output(path: Path) -> BinaryIO:
    """Open and lock a file to read and append to."""
    try:
        stream = path.open("a+b")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from None
    try:
        if fcntl:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another run is writing {path}.") from None
    return stream


def resume(
    output: BinaryIO, name: str, batches: Iterator[list[Row]], summary: Summary
) -> Iterator[list[Row]]:
    """Skip the batches in the output, truncate an incomplete one, and return the remaining ones.

    Batches stay whole because a prediction's last digits may depend on the other rows of its batch.
    """
    output.seek(0)
    for batch in batches:
        begin = output.tell()
        lines = [output.readline().decode(errors="replace") for _ in batch]
        for line, row in zip(lines, batch, strict=True):
            start = f"{row.start}, "
            # A line may be incomplete at any place.
            if not (line.startswith(start) or start.startswith(line)):
                raise UserError(
                    f"{name} does not belong to these rows. Remove it, or name another file."
                )
        if not lines[-1].endswith("\n"):
            output.truncate(begin)
            return chain([batch], batches)
        summary.count(lines, batch)
    if output.read(1):
        raise UserError(
            f"{name} has more lines than the input has rows. Remove it, or name another file."
        )
    return iter(())


def process(
    endpoint: Endpoint,
    rows: Iterable[Row],
    output: Path | None,
    *,
    batch_size: int,
    concurrency: int,
) -> Summary:
    """Write the rows' predictions to standard output or to a file; a partial file is resumed."""
    summary = Summary()
    batches = in_batches(rows, batch_size)
    if output is None:
        _write(endpoint, batches, concurrency, sys.stdout.buffer, summary)
        return summary
    batches = chain(list(islice(batches, 1)), batches)  # invalid input fails before a file exists
    with open_output(output) as stream:
        remaining = resume(stream, str(output), batches, summary)
        try:
            _write(endpoint, remaining, concurrency, stream, summary)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror}. {summary}") from None
        except UserError as error:
            raise UserError(f"{error} {summary}") from None
        except KeyboardInterrupt:
            print(f"\n{summary}", file=sys.stderr)
            raise
    return summary


def _write(
    endpoint: Endpoint,
    batches: Iterable[list[Row]],
    concurrency: int,
    stream: BinaryIO,
    summary: Summary,
) -> None:
    # None: tqdm shows the bar on a terminal only; True: never between the predictions.
    silent = True if stream.isatty() else None
    with tqdm(initial=summary.done, unit=" rows", ncols=100, disable=silent) as bar:
        results = in_order(lambda rows: (rows, answer(endpoint, rows)), batches, concurrency)
        for batch, lines in results:
            stream.write("".join(lines).encode())
            stream.flush()
            summary.count(lines, batch)
            bar.update(len(batch))


def process_file(
    endpoint: Endpoint, rows: Iterable[Row], output: Path, *, batch_size: int, concurrency: int
) -> tuple[Summary, Path]:
    """Write OUTPUT.partial and rename it when it is complete; return the path of the failed rows.

    OUTPUT.errors.jsonl exists only if rows failed.
    """
    if output.exists():
        raise UserError(f"{output} exists. Remove it, or name another file.")
    partial, failures, failed_part, good_part = (
        output.with_name(output.name + suffix)
        for suffix in (
            ".partial",
            ".errors.jsonl",
            ".errors.jsonl.partial",
            ".answers.partial",
        )
    )
    summary = process(endpoint, rows, partial, batch_size=batch_size, concurrency=concurrency)
    if not summary.failed:
        failures.unlink(missing_ok=True)  # of an earlier run
        partial.replace(output)
        return summary, failures
    with partial.open("rb") as lines, failed_part.open("wb") as bad, good_part.open("wb") as good:
        for line in lines:
            (bad if "error" in json.loads(line) else good).write(line)
    failed_part.replace(failures)
    good_part.replace(output)
    partial.unlink()
    return summary, failures


def run_with_threads(command: Callable[[], None]) -> None:
    """Run the command and exit at once, without waiting for threads that wait for the server."""
    code: object = 0
    try:
        run_command(command)
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)
