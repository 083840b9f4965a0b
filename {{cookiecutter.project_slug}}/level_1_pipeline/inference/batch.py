"""Ask a server for a file of rows, many in a request.

batch.py new.csv answers.jsonl --key id      failures, if there are any, lie in answers.jsonl.errors.jsonl
"""

import argparse
import sys
import time
from pathlib import Path

from predictor import batch, client
from predictor.client import Server
from predictor.contract import MAX_INSTANCES
from predictor.rows import open_input, read_rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Ask a server for a file of rows; answers are JSON lines."
    )
    parser.add_argument("input", type=Path, help="JSON lines, or a file whose name ends in .csv")
    parser.add_argument("output", type=Path, help="the answers; there only when all rows are done")
    parser.add_argument("--csv", action="store_true", help="the input is CSV with a header")
    parser.add_argument(
        "--key", metavar="COLUMN", help="what tells rows apart; otherwise their number, from 1"
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
    with open_input(arguments.input) as stream:
        server = Server.open(arguments.endpoint, arguments.wait)
        rows = read_rows(
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
    told = f"{summary.done:,} row(s) in {time.monotonic() - start:.1f} s"
    if summary.failed:
        print(
            f"error: {summary.failed:,} of {told} failed: see {failures}. The others are in {arguments.output}.",
            file=sys.stderr,
        )
        sys.exit(1)
    print(f"{told}; the answers are in {arguments.output}.", file=sys.stderr)


if __name__ == "__main__":
    batch.run_with_threads(main)
