"""Ask a server for rows as they come, and write the answers in their order.

tail -f new.jsonl | stream.py                     from standard input to standard output
stream.py new.csv --output answers.jsonl          stopped and typed again, it goes on where it was
"""

import argparse
import sys
from pathlib import Path

from predictor import batch, client
from predictor.client import Server
from predictor.rows import open_input, read_rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Ask a server for rows as they come; answers are JSON lines."
    )
    parser.add_argument(
        "input",
        nargs="?",
        type=Path,
        help="JSON lines, or a file whose name ends in .csv; otherwise standard input",
    )
    parser.add_argument("--csv", action="store_true", help="the input is CSV with a header")
    parser.add_argument(
        "--output", type=Path, help="a file; rows that it answers already are passed over"
    )
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
    with open_input(arguments.input) as stream:
        server = Server.open(arguments.endpoint, arguments.wait)
        rows = read_rows(
            stream, str(arguments.input or "standard input"), server.schema, is_csv=is_csv
        )
        summary = batch.process(
            server.endpoint, rows, arguments.output, batch_size=1, concurrency=arguments.concurrency
        )
    if summary.failed:
        print(
            f'error: {summary.failed:,} of {summary.done:,} row(s) failed; their lines hold "error".',
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    batch.run_with_threads(main)
