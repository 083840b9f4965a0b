"""A project holds exactly the files of its choices; all but four are the template's, byte for byte."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cookiecutter.generate import is_copy_only_path

from tests.projects import (
    CACHES,
    JOBS,
    ONLY_FOR,
    RENDERED,
    assert_all_parse,
    assert_copied,
    assert_given_back,
    copy_template,
    executable,
    expected_files,
    files,
    git,
)

Generate = Callable[..., Path]

DEFAULTS = {
    "project_name": "Digit Reader",
    "project_slug": "digit-reader",
    "description": "Reads handwritten digits.",
    "author_name": "Your Name",
    "author_email": "you@example.com",
    "region": "europe-west4",
    "gpu": "l4",
    "ci": "github-actions",
    "data_ingestion": "scheduled-job",
    "license": "Apache-2.0",
}
CHANGES: list[dict[str, str]] = [
    {},
    {"project_name": "Churn"},
    {"project_slug": "churn"},
    {"description": "Who will leave?"},
    {"author_name": "Ada Lovelace"},
    {"author_email": "ada@example.com"},
    {"region": "europe-west1"},
    {"region": "asia-southeast1"},
    *({"gpu": gpu} for gpu in JOBS if gpu != "l4"),
    {"ci": "gitlab"},
    {"ci": "azure-devops"},
    {"ci": "cloud-build"},
    {"data_ingestion": "managed-airflow"},
    {"data_ingestion": "none"},
    {"license": "MIT"},
    {"license": "Proprietary"},
    {"ci": "gitlab", "data_ingestion": "none"},
    {"ci": "azure-devops", "data_ingestion": "managed-airflow"},
    {"ci": "cloud-build", "license": "Proprietary"},
    {"gpu": "none", "license": "MIT"},
]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the template that a test may change."""
    repository = tmp_path / "template"
    copy_template(repository)
    return repository


@pytest.fixture
def committed(copy: Path) -> Path:
    """The same as a git repository of one commit."""
    git("init", "--quiet", cwd=copy)
    git("add", ".", cwd=copy)
    git("commit", "--quiet", "-m", "first", cwd=copy)
    return copy


@pytest.fixture(scope="module", params=CHANGES, ids=lambda change: "+".join(change.values()) or "default")
def case(
    request: pytest.FixtureRequest, generate: Generate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, str]]]:
    """A project, and the answers that it was made from."""
    folder = tmp_path_factory.mktemp("case")
    yield generate(folder, **request.param), {**DEFAULTS, **request.param}
    shutil.rmtree(folder)


def test_exactly_the_files_of_the_choices(case: tuple[Path, dict[str, str]], template: Path) -> None:
    project, answers = case
    assert files(project) == expected_files(template, answers)


def test_all_but_four_are_copies(case: tuple[Path, dict[str, str]], template: Path) -> None:
    project, _ = case
    assert_copied(project, template)


def test_rendered_files_hold_no_delimiter(case: tuple[Path, dict[str, str]]) -> None:
    project, _ = case
    for path in ("project.yaml", "pyproject.toml", "README.md", "LICENSE"):
        text = (project / path).read_text(encoding="utf-8")
        assert not re.findall(r"{{|{%|{#", text), path
        assert text.endswith("\n"), path


def test_every_data_file_parses(case: tuple[Path, dict[str, str]]) -> None:
    project, _ = case
    assert_all_parse(project, files(project))


def test_every_answer_is_given_back(case: tuple[Path, dict[str, str]], questions: dict[str, Any]) -> None:
    project, answers = case
    assert_given_back(project, {**answers, "project_slug": project.name})
    settings = yaml.safe_load((project / "project.yaml").read_text(encoding="utf-8"))
    assert list(settings) == ["name", "description", "data", "train", "gate", "containers", "cloud", "template"]
    assert settings["template"]["version"] == questions["_template_version"]
    assert settings["template"]["answers"] == {**answers, "project_slug": project.name}


def test_the_tables_name_what_is_there(template: Path) -> None:
    for path in {path for paths in ONLY_FOR.values() for path in paths} | RENDERED:
        assert (template / path).exists(), path


def test_only_files_are_exempt_from_rendering(template: Path, questions: dict[str, Any]) -> None:
    """Generating over an older project deletes each folder that matches, with what the user put there."""
    context = {"cookiecutter": questions}
    for path in template.rglob("*"):
        relative = path.relative_to(template)
        if not CACHES & set(relative.parts):
            copied = path.is_file() and relative.as_posix() not in RENDERED
            assert is_copy_only_path(str(relative), context) == copied, relative


FOLDERS = ["level_1_pipeline", ".github/workflows", "level_2_cicd/terraform/foundation"]
NAMES = [
    *(
        "probe.py",
        "probe.ipynb",
        "probe.sh",
        "probe.tf",
        "probe.tfvars",
        "probe.txt",
        "probe.in",
        "probe.json",
    ),
    *(
        "probe.csv",
        "probe.yaml",
        "probe.yml",
        "probe.toml",
        "probe.md",
        "probe.html",
        "probe.svg",
        "probe.js",
    ),
    *("README.md", "project.yaml", "pyproject.toml", "Makefile", "Dockerfile", ".gitignore", ".dockerignore"),
    *(".gitkeep", ".terraform.lock.hcl"),
]
AT_THE_ROOT = [
    *(
        "Makefile",
        ".gitignore",
        ".dockerignore",
        ".gitattributes",
        ".pre-commit-config.yaml",
        ".probe.yml",
    ),
    *("conftest.py", "probe.sh", "probe.txt"),
]
PROBES = [*AT_THE_ROOT, *(f"{folder}/{name}" for folder in FOLDERS for name in NAMES)]


def test_nothing_else_is_rendered(generate: Generate, copy: Path, template: Path, tmp_path: Path) -> None:
    """Each of these would fail to render, or come out different."""
    probe = "{{ 1 + 1 }}\r\n{{ nonsense }} {% nonsense ${#array[@]} f'{{x}}'\n"
    for path in map((copy / template.name).joinpath, PROBES):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(probe.encode())
        path.chmod(0o755)
    project = generate(tmp_path / "output", repository=copy)
    for path in map(project.joinpath, PROBES):
        assert path.read_bytes() == probe.encode(), path
        assert executable(path), path


def test_caches_are_not_passed_on(generate: Generate, copy: Path, template: Path, tmp_path: Path) -> None:
    for path in (".mypy_cache/x.json", "src/trainer/__pycache__/x.pyc", "tests/.ipynb_checkpoints/x.ipynb"):
        cached = copy / template.name / path
        cached.parent.mkdir(parents=True)
        cached.write_text("{}", encoding="utf-8")
    project = generate(tmp_path / "output", repository=copy)
    assert files(project) == expected_files(template, DEFAULTS)
    assert not CACHES & {path.name for path in project.rglob("*")}


def test_generating_again_keeps_what_the_user_added(generate: Generate, config: Path, root: Path, tmp_path: Path) -> None:
    project = generate(tmp_path)
    mine = [project / "src/mine.py", project / "level_0_manual/mine.ipynb", project / "data/mine.csv"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    command = [sys.executable, "-m", "cookiecutter", str(root), "--no-input", "-f", "-o", str(tmp_path)]
    subprocess.run([*command, "--config-file", str(config)], check=True, capture_output=True)
    assert all(path.read_text(encoding="utf-8") == "mine" for path in mine)


def recorded_commit(project: Path) -> str:
    """template.commit in project.yaml."""
    return str(yaml.safe_load((project / "project.yaml").read_text(encoding="utf-8"))["template"]["commit"])


def test_the_commit_is_recorded(generate: Generate, committed: Path, template: Path, tmp_path: Path) -> None:
    head = git("rev-parse", "HEAD", cwd=committed).strip()
    git("tag", "v1", cwd=committed)
    assert recorded_commit(generate(tmp_path / "clean", repository=committed)) == head
    (committed / template.name / "project.yaml").open("a").write("# edited\n")
    assert recorded_commit(generate(tmp_path / "edited", repository=committed)) == f"{head}-dirty"


def test_the_commit_is_unknown_without_git(generate: Generate, copy: Path, tmp_path: Path) -> None:
    assert recorded_commit(generate(tmp_path / "no-git", repository=copy)) == "unknown"
    git("init", "--quiet", cwd=copy)
    assert recorded_commit(generate(tmp_path / "no-commit", repository=copy)) == "unknown"


def test_the_command_line_says_what_to_type_next(committed: Path, config: Path) -> None:
    """Also: a relative path to the template, and a git hook's variables, do not hide the commit."""
    command = [sys.executable, "-m", "cookiecutter", "template", "--no-input", "--config-file", str(config)]
    elsewhere = {**os.environ, "GIT_DIR": str(config.parent), "PWD": str(config.parent)}
    done = subprocess.run(command, cwd=committed.parent, env=elsewhere, check=True, capture_output=True, text=True)
    first, second, third = done.stdout.splitlines()
    assert first == "cd digit-reader"
    assert re.match(r"make setup +# ", second)
    assert re.match(r"make level0 +# .*runs/", third)
    assert done.stderr == ""
    assert recorded_commit(committed.parent / "digit-reader") == git("rev-parse", "HEAD", cwd=committed).strip()
