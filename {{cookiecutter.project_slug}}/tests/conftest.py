"""Shared by the tests: small CSV files, a project folder of their own, and one trained model."""

import contextlib
import csv
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from core.paths import project_root
from project.settings import load_settings
from trainer.config import Hyperparameters
from trainer.data import prepare
from trainer.train import train

ROOT = project_root()


# What the person, or the build, that runs the tests has set must not change them.
FOR_MAKE = (
    "SET",
    "RUN",
    "RUNNER",
    "ENVIRONMENT",
    "COMMIT",
    "JOB_SPEC",
    "EVENT",
    "ATTEMPT",
    "VERSION",
    "DRY_RUN",
    "SKIP",
)
for variable in (*FOR_MAKE, "RANK", "WORLD_SIZE", "CLUSTER_SPEC", "GCS_MOUNT"):
    os.environ.pop(variable, None)

# Nor may the cloud that this project was given; the tests bring their own.
CLOUD = """\
cloud:
  region: europe-west4
  ci: github-actions
  repository: {name: "", id: "", branch: main}
  data_ingestion: none
  encryption: google-managed
  private: false
  environments:
    dev: {project: "", bucket: ""}
    prod: {project: "", promote_from: dev}
  train:
    jobs: [l4]
  serve: {machine: n2-standard-2, replicas: [1, 3], canary_percent: 10}
  events: {schedule: "", ingest: "0 3 * * *", batch_window_minutes: 0}
  workbench: false
  budget: {monthly: 0, billing_account: ""}
  alerts: you@example.com
  mirrors: {}

"""


def with_own_cloud(folder: Path) -> None:
    """Write this project's project.yaml into a folder, with the block `cloud` that the tests know."""
    text = (ROOT / "project.yaml").read_text(encoding="utf-8")
    (folder / "project.yaml").write_text(
        re.sub(r"(?ms)^cloud:\n.*?(?=^\S|\Z)", CLOUD, text), encoding="utf-8"
    )


@pytest.fixture(scope="session")
def own_root(tmp_path_factory) -> Path:
    """This project, with the block `cloud` that the tests know."""
    folder = tmp_path_factory.mktemp("own") / ROOT.name
    folder.mkdir()
    with_own_cloud(folder)
    for path in ROOT.iterdir():
        if path.name not in (
            "project.yaml",
            ".git",
            "data",
            "runs",
            "registry",
            "scratch",
            "build",
        ):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(autouse=True)
def _there(own_root, monkeypatch):
    monkeypatch.chdir(own_root)


@pytest.fixture(scope="session")
def options() -> Hyperparameters:
    """Quick training."""
    return Hyperparameters(seed=0, threads=1, epochs=12, batch_size=16, learning_rate=0.01)


@pytest.fixture
def make_csv(tmp_path):
    """Write a CSV file from text, or from a header and rows."""

    def make(content: str | bytes | list[list[object]], name: str = "input.csv") -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            with path.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows(content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def mixed_rows(count: int, seed: int = 0) -> list[list[object]]:
    """Strings, blanks, an id and two numbers; the label follows from colour and width."""
    chance = random.Random(seed)
    rows: list[list[object]] = [["id", "width", "height", "colour", "animal"]]
    for number in range(count):
        animal = chance.choice(["cat", "dog", "emu"])
        width = {"cat": 1.0, "dog": 3.0, "emu": 2.0}[animal] + chance.gauss(0, 0.3)
        colour = chance.choice(
            {"cat": ["grey", "red"], "dog": ["red", "brown"], "emu": ["brown", "black"]}[animal]
        )
        blank_width, blank_colour = chance.random() < 0.1, chance.random() < 0.1
        rows.append(
            [
                f"n{number}",
                "" if blank_width else round(width, 3),
                chance.randint(10, 99),
                "" if blank_colour else colour,
                animal,
            ]
        )
    return rows


@pytest.fixture
def mixed_csv(make_csv) -> Path:
    """A mixed CSV file of 300 rows."""
    return make_csv(mixed_rows(300), "animals.csv")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, options) -> Path:
    """A folder with train.parquet, test.parquet and a saved model, made from mixed rows; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    with (folder / "animals.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(mixed_rows(300))
    prepare(
        folder / "animals.csv",
        "animal",
        folder / "train.parquet",
        folder / "test.parquet",
        ignore=["id"],
    )
    train(folder / "train.parquet", folder / "model", options)
    return folder


@pytest.fixture
def model_copy(trained, tmp_path) -> Path:
    """A saved model to damage."""
    return Path(shutil.copytree(trained / "model", tmp_path / "model"))


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A copy of this project's own files, as the current folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    with_own_cloud(folder)
    for part in ("level_0_manual", "src"):
        shutil.copytree(
            ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def git(monkeypatch):
    """Runs git in the current folder, without anybody's own settings; returns what it said and its exit code."""
    for name in [name for name in os.environ if name.startswith("GIT_")] + ["SKIP"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "Test")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "test@example.com")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def settings(own_root):
    """This project's settings."""
    with contextlib.chdir(own_root):
        return load_settings("")
