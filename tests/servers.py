"""Starts servers as processes of their own, and makes models for them."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.report import PROJECT

START_SECONDS = 60


@dataclass(frozen=True)
class Running:
    """A server process, its port on this machine, and the file with what it says."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path


def our_server(model: Path) -> list[str]:
    """The command that serves a saved model."""
    return [sys.executable, "-m", "predictor.server", "--model-dir", str(model), "--port", "0"]


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, cores: Sequence[int] = (), **variables: str
) -> Iterator[Running]:
    """Start a server, wait until it says its address, and end it afterwards."""
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}", **variables}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    try:
        if cores:
            os.sched_setaffinity(process.pid, cores)
        yield Running(process, _port(process, log), log)
    finally:
        process.kill()
        process.wait()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    """What the server says as http://127.0.0.1:PORT."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text(encoding="utf-8")):
            return int(found[1])
        time.sleep(0.02)
    raise RuntimeError(f"the server did not start: {log.read_text(encoding='utf-8')}")


def train_model(source: Path, label: str, folder: Path) -> Path:
    """Train for a moment on a CSV file; the saved model's folder."""
    from trainer.config import Hyperparameters
    from trainer.data import prepare
    from trainer.train import train

    prepare(source, label, folder / "train.parquet", folder / "test.parquet")
    options = Hyperparameters(seed=0, threads=1, epochs=2, batch_size=128, learning_rate=0.003)
    train(folder / "train.parquet", folder / "model", options)
    return folder / "model"
