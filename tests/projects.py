"""What a project consists of: the table of its files, and where each answer is found again."""

import html
import json
import os
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Iterable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]

RENDERED = {
    "project.yaml",
    "pyproject.toml",
    "README.md",
    "LICENSE-Apache-2.0",
    "LICENSE-MIT",
    "LICENSE-Proprietary",
}

# Files and folders that only this value needs: post_gen's table once more, so that a slip there shows.
ONLY_FOR = {
    ("ci", "github-actions"): {".github"},
    ("ci", "gitlab"): {".gitlab-ci.yml"},
    ("ci", "azure-devops"): {"level_2_cicd/azure-pipelines.yml", "level_2_cicd/azure-submit.yml"},
    ("license", "Apache-2.0"): {"LICENSE-Apache-2.0"},
    ("license", "MIT"): {"LICENSE-MIT"},
    ("license", "Proprietary"): {"LICENSE-Proprietary"},
}

JOBS = {
    "none": ["cpu"],
    "t4": ["t4"],
    "l4": ["l4-spot", "l4"],
    "a100-40gb": ["a100"],
    "a100-80gb": ["a100-80gb"],
    "h100": ["h100-spot", "h100-flex"],
    "h200": ["h200x8"],
    "b200": ["b200x8"],
}

FROM_CHOICES = ("region", "ci", "data_ingestion")
LICENCES = {"Apache-2.0": "Apache License", "MIT": "MIT License", "Proprietary": "Copyright (c) 2"}

CACHES = {"__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".ipynb_checkpoints"}


def files(folder: Path) -> set[str]:
    """Every file below, as a path with slashes."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def template_files(template: Path) -> set[str]:
    """The template's own files, without what tools leave there while it is worked on."""
    return {path for path in files(template) if not CACHES & set(path.split("/"))}


def expected_files(template: Path, answers: dict[str, str]) -> set[str]:
    """The template's files, without what only the other values need; the licence has lost its suffix."""
    unwanted = {path for (answer, value), paths in ONLY_FOR.items() if answers[answer] != value for path in paths}
    kept = {path for path in template_files(template) if not any(f"{path}/".startswith(f"{drop}/") for drop in unwanted)}
    return kept - {f"LICENSE-{answers['license']}"} | {"LICENSE"}


def assert_copied(project: Path, template: Path) -> None:
    """Every file that is not rendered is the template's, byte for byte."""
    for path in files(project) - RENDERED - {"LICENSE"}:
        assert (project / path).read_bytes() == (template / path).read_bytes(), path
        assert executable(project / path) == executable(template / path), path


def assert_all_parse(folder: Path, paths: Iterable[str]) -> None:
    """Those of the files that hold data can be read, and are not empty."""
    for path in map(folder.joinpath, paths):
        if path.suffix in {".yaml", ".yml"}:
            assert list(yaml.safe_load_all(path.read_text(encoding="utf-8"))), path
        elif path.suffix == ".toml":
            assert tomllib.loads(path.read_text(encoding="utf-8")), path
        elif path.suffix in {".json", ".ipynb"}:
            assert json.loads(path.read_text(encoding="utf-8")), path


def assert_given_back(project: Path, answers: dict[str, str]) -> None:
    """Every answer is read from the project's files exactly as it was given."""
    settings = yaml.safe_load((project / "project.yaml").read_text(encoding="utf-8"))
    assert project.name == settings["name"] == answers["project_slug"]
    assert settings["description"] == answers["description"]
    cloud = settings["cloud"]
    assert cloud["alerts"] == answers["author_email"]
    assert cloud["train"]["jobs"] == JOBS[answers["gpu"]]
    assert {key: cloud[key] for key in FROM_CHOICES} == {key: answers[key] for key in FROM_CHOICES}

    package = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert package["name"] == answers["project_slug"]
    assert package["description"] == answers["description"]
    assert package["authors"] == [{"name": answers["author_name"], "email": answers["author_email"]}]

    heading, blank, paragraph, *_ = (project / "README.md").read_text(encoding="utf-8").splitlines()
    assert (heading, blank) == (f"# {answers['project_name']}", "")
    assert html.unescape(paragraph) == answers["description"]

    licence = (project / "LICENSE").read_text(encoding="utf-8")
    assert licence.strip().startswith(LICENCES[answers["license"]])
    assert answers["license"] == "Apache-2.0" or f" {answers['author_name']}" in licence


def copy_template(to: Path) -> None:
    """What cookiecutter needs of this repository, into a folder; what tools left there stays behind."""
    left_out = shutil.ignore_patterns(*CACHES)
    for name in ("{{cookiecutter.project_slug}}", "hooks"):
        shutil.copytree(ROOT / name, to / name, ignore=left_out)
    shutil.copy(ROOT / "cookiecutter.json", to)


def executable(path: Path) -> bool:
    """Whether its owner may run it."""
    return bool(path.stat().st_mode & stat.S_IXUSR)


def git(*arguments: str, cwd: Path) -> str:
    """Run git without anybody's own settings."""
    command = [
        "git",
        "-c",
        "user.name=Test",
        "-c",
        "user.email=test@example.com",
        "-c",
        "commit.gpgsign=false",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run([*command, *arguments], cwd=cwd, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
