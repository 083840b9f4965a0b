"""A project from the default answers, for benchmarks."""

import subprocess
import sys
from pathlib import Path

from tests.bench.report import ROOT


def project(folder: Path) -> Path:
    """Generate it; nothing is printed."""
    command = [
        sys.executable,
        "-m",
        "cookiecutter",
        "--no-input",
        "--output-dir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.iterdir())
