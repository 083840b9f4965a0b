"""Level 1's run, beside the sum of its steps called one after another in one Python process.

Both are whole processes on the digits, from start to end; they take turns, and the median of five runs
counts. The five steps are the functions of `level_1_pipeline/pipeline.py`. A run costs more because each
step is a process of its own, as it is a container in the cloud: Python, and what the step imports, start
five times. kfp itself is imported by the process that compiles and by the one that starts the steps.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bench import generated
from tests.bench.report import Figure

# The steps in one process, with what kfp would hand to them; prints each one's seconds.
ONE_PROCESS = """
import json, sys, time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from level_1_pipeline.compile import load_definition
from project.settings import load_settings

folder, registry = Path(sys.argv[1]), sys.argv[2]
chosen, steps, seconds = load_settings(), load_definition(), {}

def artifact(name):
    return SimpleNamespace(path=str(folder / name), metadata={})

def call(step, *arguments):
    began = time.perf_counter()
    step(*arguments)
    seconds[step.__name__] = time.perf_counter() - began

names = ("train", "test", "model", "scores", "decision", "version")
train, test, model, scores, decision, version = map(artifact, names)
call(steps.preprocess, "data/digits.csv", chosen.data.label, [], [], chosen.data.test_fraction, 0, train, test)
call(steps.train, asdict(chosen.hyperparameters), train, model)
call(steps.evaluate, registry, test, model, scores)
call(steps.gate, chosen.gate.metric, chosen.gate.threshold, chosen.gate.max_regression, True, scores, decision)
call(steps.register, registry, "bench", {}, model, scores, decision, version)
print(json.dumps(seconds))
"""


def seconds(project: Path, *command: str) -> tuple[float, str]:
    """How long a Python process of the project takes, and what it prints."""
    environment = {**os.environ, "PYTHONPATH": f"{project / 'src'}:{project}"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=project, env=environment, capture_output=True, text=True
    )
    took = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr)
    return took, done.stdout


def measure(small: bool) -> Iterator[Figure]:
    """The ratio, and where the difference goes."""
    with TemporaryDirectory() as name:
        project = generated.project(Path(name))
        runs, sums, starts, in_run, in_one = [], [], [], [], []
        seconds(project, "-m", "level_1_pipeline.run")  # makes the data, fills caches
        for turn in range(1 if small else 5):
            took, printed = seconds(
                project,
                "-c",
                ONE_PROCESS,
                str(project / f"scratch/{turn}"),
                str(project / f"scratch/r{turn}"),
            )
            sums.append(took)
            in_one.append(sum(json.loads(printed.splitlines()[-1]).values()))
            runs.append(seconds(project, "-m", "level_1_pipeline.run")[0])
            story = json.loads(
                newest(project / "runs").joinpath("story.json").read_text(encoding="utf-8")
            )
            in_run.append(sum(step["seconds"] for step in story["steps"]))
            starts.append(runs[-1] - in_run[-1])
    run, one = statistics.median(runs), statistics.median(sums)
    yield Figure("level 1's run", run, "s")
    yield Figure("its steps in one process", one, "s")
    yield Figure("the run, over that", run / one, "×", "≤ 2")
    yield Figure("in the run: the five steps, as processes", statistics.median(in_run), "s")
    yield Figure(
        "in the run: kfp's imports, twice, compiling, checking", statistics.median(starts), "s"
    )
    yield Figure("in one process: the five steps, as calls", statistics.median(in_one), "s")


def newest(runs: Path) -> Path:
    """The folder of the last run."""
    return max(runs.iterdir(), key=lambda run: run.stat().st_mtime)
