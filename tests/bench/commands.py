"""The first commands of a newcomer, in a new project: seconds, whole commands.

`make setup` finds its packages in uv's cache, and fetches uv itself unless the machine has it; the first
time on a machine it also downloads about 0.5 GB. `make level0` runs the four notebooks, `make level1`
the pipeline, both on the digits. Each runs once: absolute seconds are for orientation.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bench import generated
from tests.bench.report import Figure


def measure(small: bool) -> Iterator[Figure]:
    """Seconds of each command, one after the other in the same project."""
    with TemporaryDirectory() as name:
        project = generated.project(Path(name))
        for target in ("help",) if small else ("setup", "level0", "level1"):
            yield Figure(f"make {target}", seconds(project, target), "s")


def seconds(project: Path, target: str) -> float:
    """How long a target takes; nothing of this process's own environment counts."""
    own = ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")
    environment = {key: value for key, value in os.environ.items() if key not in own}
    began = time.perf_counter()
    done = subprocess.run(
        ["make", target], cwd=project, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return time.perf_counter() - began
