"""Predict rows as they arrive, and write the predictions in their order.

tail -f new.jsonl | stream.py                     from standard input to standard output
stream.py new.csv --output answers.jsonl          rerun it to continue where it stopped
"""

import argparse
import sys
from pathlib import Path

from predictor import batch, client
from predictor.client import Server


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Predict rows as they arrive; the output is JSON Lines."
    )
    parser.add_argument(
        "input",
        nargs="?",
        type=Path,
        help="JSON Lines, or a file whose name ends in .csv (default: standard input)",
    )
    parser.add_argument("--csv", action="store_true", help="the input is CSV with a header")
    parser.add_argument("--output", type=Path, help="a file; rows that it already has are skipped")
    parser.add_argument(
        "--concurrency",
        type=client.number_between(1, 64, int),
        default=8,
        help="requests at a time (%(default)s)",
    )
    client.add_arguments(parser)
    arguments = parser.parse_args()
    is_csv = arguments.csv or (
        arguments.input is not None and arguments.input.suffix.lower() == ".csv"
    )
    with batch.open_input(arguments.input) as stream:
        server = Server.open(arguments.endpoint, arguments.wait)
        rows = batch.read_rows(
            stream, str(arguments.input or "standard input"), server.schema, is_csv=is_csv
        )
        summary = batch.process(
            server.endpoint, rows, arguments.output, batch_size=1, concurrency=arguments.concurrency
        )
    if summary.failed:
        print(
            f'error: {summary.failed:,} of {summary.done:,} row(s) failed; their lines have "error".',
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    batch.run_with_threads(main)
