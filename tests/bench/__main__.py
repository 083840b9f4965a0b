"""Command line: all benchmarks, or those that are named."""

import argparse
import importlib
import inspect

from tests.bench import report

# In this order: the quick ones first.
NAMES = [
    "training",
    "pipeline",
    "server",
    "commands",
    "containers",
    "preprocessing",
    "events",
    "builds",
]


def main() -> None:
    """Measure, show, keep."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; otherwise all"
    )
    parser.add_argument(
        "--small", action="store_true", help="only see whether they work; keeps nothing"
    )
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    for name in arguments.names or NAMES:
        module = importlib.import_module(f"tests.bench.{name}")
        print(f"\n{name} …", flush=True)
        figures = list(module.measure(arguments.small))
        print(report.table(figures), flush=True)
        if not arguments.small:
            how = " ".join((inspect.getdoc(module) or "").split())
            report.keep(name, how, figures)


if __name__ == "__main__":
    main()
