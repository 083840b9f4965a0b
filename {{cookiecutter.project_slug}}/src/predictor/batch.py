"""Many rows, asked with several requests at a time, and written in their order.

The output holds one line for each row: an answer, or in its place what is wrong with the row.
"""

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from queue import Queue
from typing import Any, BinaryIO, TypeVar

from tqdm import tqdm

from core.errors import UserError, run_command
from predictor.client import Endpoint, Refused
from predictor.rows import Row

try:
    import fcntl
except ImportError:  # not a POSIX system; there two runs with one output must be avoided by hand
    fcntl = None  # type: ignore[assignment]

Item = TypeVar("Item")
Result = TypeVar("Result")

REQUEST_BYTES = 1_000_000  # a batch is cut there: the cloud's shared endpoints take 1.5 MB


class Summary:
    """How many rows are done, and how many of them failed."""

    done = 0
    failed = 0

    def count(self, line: str, row: Row) -> None:
        """Count a row and its line of the output."""
        self.done += 1
        self.failed += line.startswith('"error": ', len(row.start) + 2)


# ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def in_batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Rows in batches of `size`, or of fewer where those would be too long for one request."""
    batch: list[Row] = []
    length = 0
    for row in rows:
        if batch and length + len(row.instance) > REQUEST_BYTES:
            yield batch
            batch, length = [], 0
        batch.append(row)
        length += len(row.instance)
        if len(batch) == size:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def answer(endpoint: Endpoint, rows: Sequence[Row]) -> list[str]:
    """The rows' lines. Where the server refuses some, they are divided until those are found that it refuses.

    Raises:
        UserError: the server does not answer.
    """
    outcomes = iter(_ask([row for row in rows if not row.problem], endpoint))
    return [
        row.line({"error": row.problem, "row": row.text} if row.problem else next(outcomes))
        for row in rows
    ]


def _ask(rows: Sequence[Row], endpoint: Endpoint) -> list[dict[str, Any]]:
    if not rows:
        return []
    try:
        return endpoint.ask_texts([row.instance for row in rows])
    except Refused as error:
        if len(rows) == 1:
            return [{"error": re.sub("^instance 1[,:] ", "", str(error)), "row": rows[0].text}]
    middle = len(rows) // 2
    return _ask(rows[:middle], endpoint) + _ask(rows[middle:], endpoint)


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], concurrency: int
) -> Iterator[Result]:
    """`work` of each item, several at a time, in the items' order, each as soon as it and those before it are done.

    At most three items for each thread are under way. They are drawn by a thread of their own: where no next one comes for
    a while, the results of the others do not wait for it.
    """
    waiting: Queue[Future[Result] | None] = Queue(maxsize=2 * concurrency)
    threads = ThreadPoolExecutor(concurrency)

    def draw() -> None:
        try:
            for item in items:
                waiting.put(threads.submit(work, item))
        except BaseException as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            waiting.put(failed)
        waiting.put(None)

    threading.Thread(target=draw, daemon=True).start()
    while (future := waiting.get()) is not None:
        yield future.result()
    threads.shutdown()


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_output(path: Path) -> BinaryIO:
    """A file to read and go on with; for this process alone.

    Raises:
        UserError: it cannot be written, or another run writes it.
    """
    try:
        stream = path.open("a+b")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
    try:
        if fcntl:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another run is writing {path}.") from None
    return stream


def resume(
    output: BinaryIO, name: str, batches: Iterator[list[Row]], summary: Summary
) -> Iterator[list[Row]]:
    """Pass over the batches that the output holds, and cut off one that it holds in part; the batches that remain.

    Batches are kept whole because a model's last digits may depend on which rows it is asked together.

    Raises:
        UserError: the output does not belong to this input.
    """
    output.seek(0)
    for batch in batches:
        begin = output.tell()
        lines = [output.readline().decode(errors="replace") for _ in batch]
        for line, row in zip(lines, batch, strict=True):
            start = f"{row.start}, "
            if not (
                line.startswith(start) or start.startswith(line)
            ):  # a line may be torn anywhere
                raise UserError(
                    f"{name} holds something else than answers to these rows. Remove it, or name another file."
                )
        if not lines[-1].endswith("\n"):
            output.truncate(begin)
            return chain([batch], batches)
        for line, row in zip(lines, batch, strict=True):
            summary.count(line, row)
    if output.read(1):
        raise UserError(
            f"{name} holds more lines than the input has rows. Remove it, or name another file."
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
    """Answer the rows into the output, or to standard output; an output with a part of them is gone on with.

    Raises:
        UserError: the server does not answer, or input or output are at fault.
    """
    summary = Summary()
    batches = in_batches(rows, batch_size)
    if output is None:
        _write(endpoint, batches, concurrency, sys.stdout.buffer, summary)
        return summary
    batches = chain(
        list(islice(batches, 1)), batches
    )  # what is wrong with the input is told before a file is made
    with open_output(output) as stream:
        remaining = resume(stream, str(output), batches, summary)
        try:
            _write(endpoint, remaining, concurrency, stream, summary)
        except OSError as error:
            raise UserError(
                f"{output} cannot be written: {error.strerror}. {_so_far(summary)}"
            ) from None
        except UserError as error:
            raise UserError(f"{error} {_so_far(summary)}") from None
        except KeyboardInterrupt:
            print(f"\n{_so_far(summary)}", file=sys.stderr)
            raise
    return summary


def _write(
    endpoint: Endpoint,
    batches: Iterable[list[Row]],
    concurrency: int,
    stream: BinaryIO,
    summary: Summary,
) -> None:
    def work(batch: list[Row]) -> tuple[list[Row], list[str]]:
        return batch, answer(endpoint, batch)

    # The bar shows on a terminal only, and never between answers.
    silent = True if stream.isatty() else None
    with tqdm(initial=summary.done, unit=" rows", ncols=100, disable=silent) as bar:
        for batch, lines in in_order(work, batches, concurrency):
            stream.write("".join(lines).encode())
            stream.flush()
            for row, line in zip(batch, lines, strict=True):
                summary.count(line, row)
            bar.update(len(batch))


def _so_far(summary: Summary) -> str:
    return f"{summary.done:,} row(s) are done; the same command goes on from there."


def process_file(
    endpoint: Endpoint, rows: Iterable[Row], output: Path, *, batch_size: int, concurrency: int
) -> tuple[Summary, Path]:
    """`process` into OUTPUT.partial, which becomes OUTPUT when all is done: what has its name is whole.

    Returns:
        what was done, and the file of the failures, OUTPUT.errors.jsonl, which is there only if there are some.

    Raises:
        UserError: as `process`; or there is an output already.
    """
    if output.exists():
        raise UserError(f"{output} is there already. Remove it, or name another file.")
    partial, failures = (
        output.with_name(output.name + ending) for ending in (".partial", ".errors.jsonl")
    )
    summary = process(endpoint, rows, partial, batch_size=batch_size, concurrency=concurrency)
    if not summary.failed:
        failures.unlink(missing_ok=True)  # of an earlier run
        partial.replace(output)
        return summary, failures
    parts = {
        True: failures.with_name(failures.name + ".partial"),
        False: output.with_name(output.name + ".answers.partial"),
    }
    with (
        partial.open("rb") as lines,
        parts[True].open("wb") as failed,
        parts[False].open("wb") as answered,
    ):
        for line in lines:
            (failed if "error" in json.loads(line) else answered).write(line)
    parts[True].replace(failures)
    parts[False].replace(output)
    partial.unlink()
    return summary, failures


def run_with_threads(command: Callable[[], None]) -> None:
    """`run_command`, and then an end at once: threads that wait for the server or for input are not waited for."""
    code: object = 0
    try:
        run_command(command)
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)
