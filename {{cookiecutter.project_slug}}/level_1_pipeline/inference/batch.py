"""Predict a file of rows, many in a request.

batch.py new.csv answers.jsonl --key id      failed rows go to answers.jsonl.errors.jsonl
"""

import argparse
import sys
import time
from pathlib import Path

from predictor import batch, client
from predictor.client import Server
from predictor.contract import MAX_INSTANCES


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Predict a file of rows; the output is JSON Lines."
    )
    parser.add_argument("input", type=Path, help="JSON Lines, or a file whose name ends in .csv")
    parser.add_argument(
        "output", type=Path, help="the predictions; exists only when all rows are done"
    )
    parser.add_argument("--csv", action="store_true", help="the input is CSV with a header")
    parser.add_argument(
        "--key", metavar="COLUMN", help="the rows' key (default: their number, from 1)"
    )
    parser.add_argument(
        "--batch-size",
        type=client.number_between(1, MAX_INSTANCES, int),
        default=1000,
        help="rows in a request (%(default)s)",
    )
    parser.add_argument(
        "--concurrency",
        type=client.number_between(1, 64, int),
        default=4,
        help="requests at a time (%(default)s)",
    )
    client.add_arguments(parser)
    arguments = parser.parse_args()
    is_csv = arguments.csv or arguments.input.suffix.lower() == ".csv"
    with batch.open_input(arguments.input) as stream:
        server = Server.open(arguments.endpoint, arguments.wait)
        rows = batch.read_rows(
            stream, str(arguments.input), server.schema, is_csv=is_csv, key=arguments.key
        )
        start = time.monotonic()
        summary, failures = batch.process_file(
            server.endpoint,
            rows,
            arguments.output,
            batch_size=arguments.batch_size,
            concurrency=arguments.concurrency,
        )
    counts = f"{summary.done:,} row(s) in {time.monotonic() - start:.1f} s"
    if summary.failed:
        print(
            f"error: {summary.failed:,} of {counts} failed: see {failures}. The others are in {arguments.output}.",
            file=sys.stderr,
        )
        sys.exit(1)
    print(f"{counts}; the predictions are in {arguments.output}.", file=sys.stderr)


if __name__ == "__main__":
    batch.run_with_threads(main)
