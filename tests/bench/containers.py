"""Builds the three images of a generated project with a real engine; the packages are in uv's cache.

"From nothing" is after a change in the script that installs the packages, so that no layer but the base can be
used again; the other builds are after one changed line in `src/trainer`, and after no change at all. A cold start
is counted from `docker run` to the first answered prediction; the median of five. Sizes are Docker's own,
uncompressed.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.bench import generated
from tests.bench.report import Figure

NEEDS_DOCKER = True


def measure(small: bool) -> Iterator[Figure]:
    """Sizes, builds, cold starts."""
    with tempfile.TemporaryDirectory() as folder:
        project = generated.project(Path(folder))
        base = image_size((project / "level_1_pipeline/base_image.txt").read_text().strip())
        if not small:
            from_nothing = seconds_to_build(
                project, "train", "level_1_pipeline/install_packages.sh"
            )
            again = seconds_to_build(project, "train", "src/trainer/model.py")
            yield Figure("train image, from nothing", from_nothing, "s")
            yield Figure(
                "… after a change in src/trainer, over that", again / from_nothing, "×", "≤ 0.2"
            )
        build(project)
        yield Figure("nothing changed: all three", build(project), "s", "≤ 2", "no image is built")
        sizes = {
            name: image_size(reference(project, name)) for name in ("predict", "train", "deploy")
        }
        yield Figure("predictor, more than its base", sizes["predict"] - base, "MB", "≤ 220")
        yield Figure(
            "training image, CPU, more than its base",
            sizes["train"] - base,
            "MB",
            note=parts(project),
        )
        yield Figure("deploying image, more than its base", sizes["deploy"] - base, "MB")
        yield Figure("the base", base, "MB")
        model = trained(project)
        starts = [
            cold_start(reference(project, "predict"), model) for _ in range(1 if small else 5)
        ]
        yield Figure(
            "predictor, `docker run` to the first prediction", statistics.median(starts), "s"
        )


def run(project: Path, *command: str) -> str:
    """A Python module of the project, in this environment."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{project / 'src'}:{project}",
    }
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def build(project: Path, *names: str) -> float:
    """Seconds that `make containers` takes."""
    began = time.monotonic()
    run(project, sys.executable, "-m", "level_1_pipeline.containers", *names)
    return time.monotonic() - began


def seconds_to_build(project: Path, name: str, changed: str) -> float:
    """Build after a change in a file that nobody has seen before."""
    with (project / changed).open("a", encoding="utf-8") as stream:
        stream.write(f"\n# {time.time_ns()}\n")
    return build(project, name)


def reference(project: Path, name: str) -> str:
    """The image's name."""
    return run(
        project, sys.executable, "-m", "level_1_pipeline.containers", "--print", name
    ).strip()


def image_size(name: str) -> float:
    """Megabytes of an image."""
    command = ["docker", "image", "inspect", "--format", "{{.Size}}", name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1e6


def parts(project: Path) -> str:
    """The largest packages of the training image."""
    listing = "du -sBM /opt/venv/lib/python3*/site-packages/* | sort -rn | head -6"
    command = ["docker", "run", "--rm", reference(project, "train"), "sh", "-c", listing]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    sizes = [line.split() for line in lines if line]
    return ", ".join(
        f"{Path(path).name.split('.')[0].lstrip('_')} {size[:-1]}" for size, path in sizes
    )


def trained(project: Path) -> Path:
    """A saved model of the digits."""
    train, test, model = "scratch/train.parquet", "scratch/test.parquet", "scratch/model"
    sample = "from pathlib import Path; from trainer import data; data.find_csv('sample:digits', Path('data'))"
    run(project, sys.executable, "-c", sample)
    given = ["--csv", "data/digits.csv", "--label", "digit"]
    run(project, sys.executable, "-m", "trainer.data", *given, "--train", train, "--test", test)
    run(project, sys.executable, "-m", "trainer.train", "--train", train, "--model-dir", model)
    return project / model


def cold_start(image: str, model: Path) -> float:
    """Seconds from `docker run` to the first 200."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    body = json.dumps({"instances": [[0] * 64]}).encode()
    options = [
        "--publish",
        f"127.0.0.1:{port}:8080",
        "--volume",
        f"{model}:/model:ro",
        "--env",
        "AIP_STORAGE_URI=/model",
    ]
    began = time.monotonic()
    container = subprocess.run(
        ["docker", "run", "--detach", "--rm", *options, "--env", "AIP_STORAGE_URI=/model", image],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    try:
        while time.monotonic() - began < 60:
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{port}/predict", body, timeout=5
                ) as response:
                    json.load(response)
                return time.monotonic() - began
            except OSError:
                time.sleep(0.01)
        raise RuntimeError("the predictor did not answer within a minute")
    finally:
        subprocess.run(["docker", "kill", container], capture_output=True, check=False)
