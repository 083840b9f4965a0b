"""Shared by the tests: small CSV files, a project folder of their own, and one trained model."""

import csv
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from project.settings import load, project_root
from trainer.data import prepare
from trainer.hyperparameters import Hyperparameters
from trainer.train import train

ROOT = project_root()


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch):
    """What the person who runs the tests has set must not change them."""
    for name in ("SET", "RUN", "RANK", "WORLD_SIZE", "CLUSTER_SPEC", "GCS_MOUNT"):
        monkeypatch.delenv(name, raising=False)


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
        colour = chance.choice({"cat": ["grey", "red"], "dog": ["red", "brown"], "emu": ["brown", "black"]}[animal])
        blank_width, blank_colour = chance.random() < 0.1, chance.random() < 0.1
        rows.append(
            [f"n{number}", "" if blank_width else round(width, 3), chance.randint(10, 99), "" if blank_colour else colour, animal]
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
    prepare(folder / "animals.csv", "animal", folder / "train.parquet", folder / "test.parquet", ignore=["id"])
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
    shutil.copy(ROOT / "project.yaml", folder)
    for part in ("level_0_manual", "src"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
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
            ["git", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False
        )

    return run


@pytest.fixture(scope="session")
def settings():
    """This project's settings."""
    return load("")
