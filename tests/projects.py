"""What a project contains: its files, and where each answer is written."""

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

# Files and folders that only this choice needs; repeats post_gen's table to detect a mistake there.
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

CRUFT = ".cruft.json"  # written if the template is a git repository
CACHES = {"__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".ipynb_checkpoints"}


def files(folder: Path) -> set[str]:
    """Return the paths of all files in a folder, without .cruft.json."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return paths - {CRUFT}


def template_files(template: Path) -> set[str]:
    """Return the template's files, without caches."""
    return {path for path in files(template) if not CACHES & set(path.split("/"))}


def expected_files(template: Path, answers: dict[str, str]) -> set[str]:
    """Return the template's files, without those of other choices."""
    unwanted = {
        path
        for (answer, value), paths in ONLY_FOR.items()
        if answers[answer] != value
        for path in paths
    }
    kept = {
        path
        for path in template_files(template)
        if not any(f"{path}/".startswith(f"{drop}/") for drop in unwanted)
    }
    return kept - {f"LICENSE-{answers['license']}"} | {"LICENSE"}


def assert_copied(project: Path, template: Path) -> None:
    """Every file that is not rendered equals the template's file."""
    for path in files(project) - RENDERED - {"LICENSE"}:
        assert (project / path).read_bytes() == (template / path).read_bytes(), path
        assert executable(project / path) == executable(template / path), path


def assert_all_parse(folder: Path, paths: Iterable[str]) -> None:
    """YAML, TOML and JSON files are valid and not empty."""
    for path in map(folder.joinpath, paths):
        if path.suffix in {".yaml", ".yml"}:
            assert list(yaml.safe_load_all(path.read_text(encoding="utf-8"))), path
        elif path.suffix == ".toml":
            assert tomllib.loads(path.read_text(encoding="utf-8")), path
        elif path.suffix in {".json", ".ipynb"}:
            assert json.loads(path.read_text(encoding="utf-8")), path


def assert_given_back(project: Path, answers: dict[str, str]) -> None:
    """Every answer is in the project's files exactly as given."""
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
    assert package["authors"] == [
        {"name": answers["author_name"], "email": answers["author_email"]}
    ]

    heading, blank, paragraph, *_ = (project / "README.md").read_text(encoding="utf-8").splitlines()
    assert (heading, blank) == (f"# {answers['project_name']}", "")
    assert html.unescape(paragraph) == answers["description"]

    licence = (project / "LICENSE").read_text(encoding="utf-8")
    assert licence.strip().startswith(LICENCES[answers["license"]])
    assert answers["license"] == "Apache-2.0" or f" {answers['author_name']}" in licence


def copy_template(to: Path) -> None:
    """Copy the files that cookiecutter needs, without caches."""
    caches = shutil.ignore_patterns(*CACHES)
    for name in ("{{cookiecutter.project_slug}}", "hooks"):
        shutil.copytree(ROOT / name, to / name, ignore=caches)
    shutil.copy(ROOT / "cookiecutter.json", to)


def executable(path: Path) -> bool:
    """Return whether the owner may execute the file."""
    return bool(path.stat().st_mode & stat.S_IXUSR)


def git(*arguments: str, cwd: Path) -> str:
    """Run git with a fixed identity."""
    options = ["user.name=Test", "user.email=test@example.com", "commit.gpgsign=false"]
    command = ["git", *(word for option in options for word in ("-c", option))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


def makefile_text() -> str:
    """The project's Makefile with the targets of its levels."""
    project = ROOT / "{{cookiecutter.project_slug}}"
    files = [project / "Makefile", *sorted(project.glob("level_*/targets.mk"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)
