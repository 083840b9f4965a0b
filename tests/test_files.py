"""A project has exactly the files of its choices; all but the rendered ones are copies."""

import json
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
    CRUFT,
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
    """Copy the template, so that a test may change it."""
    repository = tmp_path / "template"
    copy_template(repository)
    return repository


@pytest.fixture
def committed(copy: Path) -> Path:
    """Commit the copy to a git repository."""
    git("init", "--quiet", cwd=copy)
    git("add", ".", cwd=copy)
    git("commit", "--quiet", "-m", "first", cwd=copy)
    return copy


@pytest.fixture(
    scope="module", params=CHANGES, ids=lambda change: "+".join(change.values()) or "default"
)
def case(
    request: pytest.FixtureRequest, generate: Generate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Generate a project; returns it with its answers."""
    folder = tmp_path_factory.mktemp("case")
    yield generate(folder, **request.param), {**DEFAULTS, **request.param}
    shutil.rmtree(folder)


def test_project_has_the_files_of_its_choices(
    case: tuple[Path, dict[str, str]], template: Path
) -> None:
    project, answers = case
    assert files(project) == expected_files(template, answers)


def test_other_files_are_copies(case: tuple[Path, dict[str, str]], template: Path) -> None:
    project, _ = case
    assert_copied(project, template)


def test_rendered_files_contain_no_jinja(case: tuple[Path, dict[str, str]]) -> None:
    project, _ = case
    for path in ("project.yaml", "pyproject.toml", "README.md", "LICENSE"):
        text = (project / path).read_text(encoding="utf-8")
        assert not re.findall(r"{{|{%|{#", text), path
        assert text.endswith("\n"), path


def test_data_files_are_valid(case: tuple[Path, dict[str, str]]) -> None:
    project, _ = case
    assert_all_parse(project, files(project))


def test_answers_are_in_the_project(case: tuple[Path, dict[str, str]]) -> None:
    project, answers = case
    assert_given_back(project, {**answers, "project_slug": project.name})
    settings = yaml.safe_load((project / "project.yaml").read_text(encoding="utf-8"))
    assert list(settings) == [
        "name",
        "description",
        "data",
        "hyperparameters",
        "gate",
        "containers",
        "cloud",
    ]


def test_tables_name_existing_files(template: Path) -> None:
    for path in {path for paths in ONLY_FOR.values() for path in paths} | RENDERED:
        assert (template / path).exists(), path


def test_copy_without_render_matches_files_only(template: Path, questions: dict[str, Any]) -> None:
    """cookiecutter --overwrite-if-exists deletes matching folders, with the user's files in them."""
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
    *(
        "README.md",
        "project.yaml",
        "pyproject.toml",
        "Makefile",
        "Dockerfile",
        ".gitignore",
        ".dockerignore",
    ),
    *(".gitkeep", ".terraform.lock.hcl"),
]
AT_THE_ROOT = [
    *(
        "AGENTS.md",
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


def test_other_files_are_not_rendered(
    generate: Generate, copy: Path, template: Path, tmp_path: Path
) -> None:
    """Rendering these would fail or change them."""
    probe = "{{ 1 + 1 }}\r\n{{ nonsense }} {% nonsense ${#array[@]} f'{{x}}'\n"
    for path in map((copy / template.name).joinpath, PROBES):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(probe.encode())
        path.chmod(0o755)
    project = generate(tmp_path / "output", repository=copy)
    for path in map(project.joinpath, PROBES):
        assert path.read_bytes() == probe.encode(), path
        assert executable(path), path


def test_caches_are_not_copied(
    generate: Generate, copy: Path, template: Path, tmp_path: Path
) -> None:
    for path in (
        ".mypy_cache/x.json",
        "src/trainer/__pycache__/x.pyc",
        "tests/.ipynb_checkpoints/x.ipynb",
    ):
        cached = copy / template.name / path
        cached.parent.mkdir(parents=True)
        cached.write_text("{}", encoding="utf-8")
    project = generate(tmp_path / "output", repository=copy)
    assert files(project) == expected_files(template, DEFAULTS)
    assert not CACHES & {path.name for path in project.rglob("*")}


def test_generating_again_keeps_added_files(
    generate: Generate, config: Path, root: Path, tmp_path: Path
) -> None:
    project = generate(tmp_path)
    mine = [
        project / "src/mine.py",
        project / "level_0_manual/mine.ipynb",
        project / "data/mine.csv",
    ]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "cookiecutter",
        str(root),
        "--no-input",
        "-f",
        "-o",
        str(tmp_path),
    ]
    subprocess.run([*command, "--config-file", str(config)], check=True, capture_output=True)
    assert all(path.read_text(encoding="utf-8") == "mine" for path in mine)


def cruft_state(project: Path) -> dict[str, Any]:
    """Read .cruft.json."""
    state: dict[str, Any] = json.loads((project / CRUFT).read_text(encoding="utf-8"))
    return state


def test_cruft_file_names_local_template_commit_and_answers(
    generate: Generate, committed: Path, tmp_path: Path
) -> None:
    head = git("rev-parse", "HEAD", cwd=committed).strip()
    answers = {**DEFAULTS, "project_name": "O'Brien's \"X\" 🙂", "project_slug": "obriens"}
    project = generate(tmp_path / "output", repository=committed, **answers)
    state = cruft_state(project)
    assert set(state) == {"template", "commit", "checkout", "context", "directory"}
    assert (state["template"], state["commit"]) == (str(committed), head)
    assert state["context"]["cookiecutter"] == {
        **answers,
        "_template": str(committed),
        "_commit": head,
    }


def test_cruft_file_names_the_address_of_a_clone(
    generate: Generate, committed: Path, config: Path, tmp_path: Path
) -> None:
    project = generate(tmp_path / "first", repository=f"git+file://{committed}")
    assert cruft_state(project)["template"] == f"file://{committed}"
    # cookiecutter finds its own clones by name, and git does not know that name.
    name = committed.name
    clone = json.loads(config.read_text(encoding="utf-8"))["cookiecutters_dir"]
    git("remote", "set-url", "origin", "https://me:secret@example.com/x.git", cwd=Path(clone, name))
    state = cruft_state(generate(tmp_path / "second", repository=name))
    assert state["template"] == "https://example.com/x.git"


def test_cruft_file_is_missing_without_a_commit(
    generate: Generate, copy: Path, tmp_path: Path
) -> None:
    assert not (generate(tmp_path / "no-git", repository=copy) / CRUFT).exists()
    git("init", "--quiet", cwd=copy)
    assert not (generate(tmp_path / "no-commit", repository=copy) / CRUFT).exists()


def test_command_line_prints_the_next_commands(committed: Path, config: Path) -> None:
    """Neither a relative path nor a git hook's variables hide the template's commit."""
    command = [sys.executable, "-m", "cookiecutter", "template", "--no-input", "--config-file"]
    environment = {**os.environ, "GIT_DIR": str(config.parent), "PWD": str(config.parent)}
    done = subprocess.run(
        [*command, str(config)],
        cwd=committed.parent,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    first, second, third = done.stdout.splitlines()
    assert first == "cd digit-reader"
    assert re.match(r"make setup +# ", second)
    assert re.match(r"make level0 +# .*runs/", third)
    assert done.stderr == ""
    head = git("rev-parse", "HEAD", cwd=committed).strip()
    assert cruft_state(committed.parent / "digit-reader")["commit"] == head
