"""Generating a project, beside what cookiecutter needs for a template of one file and no hooks.

Both are whole processes, `python -m cookiecutter --no-input`, as a user starts them. They take turns with two
more, and the best of 21 runs counts. The two are the same template without its hooks, and a Python that ends
at once: there are two hooks, each a Python of its own, so they cannot cost less than two such starts.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bench.report import ROOT, Figure

COOKIECUTTER = [sys.executable, "-m", "cookiecutter", "--no-input"]


def one_file_template(folder: Path) -> Path:
    """A template that asks one question and renders one file."""
    project = folder / "{{cookiecutter.project_slug}}"
    project.mkdir(parents=True)
    (project / "README.md").write_text("# {{ cookiecutter.project_slug }}\n", encoding="utf-8")
    (folder / "cookiecutter.json").write_text(json.dumps({"project_slug": "one"}), encoding="utf-8")
    return folder


def seconds(command: list[str]) -> float:
    """How long a process takes, from start to end."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


def measure(small: bool) -> Iterator[Figure]:
    """Times of whole processes, and their ratio."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "config.yaml"
        own = {"replay_dir": str(folder / "replay"), "cookiecutters_dir": str(folder / "clones")}
        config.write_text(
            json.dumps(own), encoding="utf-8"
        )  # nobody's own settings count; JSON is YAML too
        cookiecutter = [*COOKIECUTTER, "--config-file", str(config)]
        one_file = [*cookiecutter, str(one_file_template(folder / "one"))]
        commands = {
            "project": [*cookiecutter, str(ROOT)],
            "one file": one_file,
            "without hooks": [*cookiecutter, "--accept-hooks", "no", str(ROOT)],
            "Python": [sys.executable, "-c", ""],
        }
        best = dict.fromkeys(commands, float("inf"))
        for turn in range(3 if small else 21):
            for what, command in commands.items():
                output = (
                    [] if what == "Python" else ["--output-dir", str(folder / what / str(turn))]
                )
                best[what] = min(best[what], seconds([*command, *output]))
    hooks = best["project"] - best["without hooks"]
    floor = (best["without hooks"] + 2 * best["Python"]) / best["one file"]
    yield Figure("generating a project", best["project"], "s")
    yield Figure("a template of one file", best["one file"], "s")
    yield Figure(
        "generating over the one file",
        best["project"] / best["one file"],
        "×",
        goal="≤ 1.5",
        note=f"of it {1000 * hooks:.0f} ms for the two hooks; {floor:.2f} if they did nothing",
    )
