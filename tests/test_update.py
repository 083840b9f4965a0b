"""`cruft update` brings a new version of the template and keeps local edits; see docs/update.md."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.projects import JOBS, assert_given_back, copy_template, files, git

pytestmark = pytest.mark.heavy

Run = Callable[..., str]

ANSWERS = {
    "project_name": "O'Brien's",
    "project_slug": "obriens",
    "description": "Says \"yes\" \\ and 'no' 🙂 \\",
    "author_name": 'O\'Brien "Bob"',
    "author_email": "o'brien@example.com",
    "region": "us-central1",
    "gpu": "h100",
    "ci": "gitlab",
    "data_ingestion": "none",
    "license": "MIT",
}
FOLDER = "{{cookiecutter.project_slug}}"
MODEL, NOTEBOOK = "src/trainer/model.py", "level_0_manual/model.ipynb"
SENTENCE = "Take median, mean and standard deviation (1 for a constant) from training rows."
BINARIES = Path(sys.executable).parent
QUICK_TESTS = [f"tests/test_{name}.py" for name in ("settings", "notebooks", "model")]


class Template(NamedTuple):
    """A repository of the template, with two commits."""

    repository: Path
    older: str
    newer: str


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that occurs once."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new), encoding="utf-8")


def commit_all(repository: Path, message: str) -> str:
    """Commit everything; returns the commit."""
    if not (repository / ".git").is_dir():
        git("init", "--quiet", cwd=repository)
    git("add", "--all", cwd=repository)
    git("commit", "--quiet", "--no-verify", "--message", message, cwd=repository)
    return git("rev-parse", "HEAD", cwd=repository).strip()


def make_older(project: Path) -> None:
    """Turn the project into an older version: a file is added, one is missing, some differ."""
    (project / "tests/test_data.py").unlink()
    (project / "src/project/older.py").write_text("OLDER = True\n", encoding="utf-8")
    edit(project / "README.md", "## Before you commit", "## Before a commit")
    edit(project / "project.yaml", "# the column to predict", "# the label")
    edit(project / MODEL, SENTENCE, "Take them from training rows.")


def restore_old_layout(project: Path) -> None:
    """Turn the project into one of version 0.1.0 with the programs of all levels in src/launcher."""
    launcher = project / "src/launcher"
    launcher.mkdir(exist_ok=True)
    for path in sorted(project.glob("level_*/*.py")):
        path.rename(launcher / f"{path.parent.name}_{path.name}")
    settings = project / "project.yaml"
    edit(settings, "\nhyperparameters:\n", "\ntrain:\n")
    text = settings.read_text(encoding="utf-8")
    settings.write_text(f'{text}\ntemplate:\n  version: "0.1.0"\n', encoding="utf-8")


@pytest.fixture(scope="module")
def run(config: Path) -> Run:
    """Run a command in a project, in the template's environment; returns its output."""

    def run(*command: str, cwd: Path) -> str:
        environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
        environment |= {
            "COOKIECUTTER_CONFIG": str(config),
            "PYTHONPATH": f"{cwd}/src:{cwd}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": os.pathsep.join([str(BINARIES), os.environ["PATH"]]),
        }
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def make(run: Run) -> Run:
    """Run make in a project, with the template's environment in place of the project's."""

    def make(project: Path, *words: str) -> str:
        return run("make", *words, "-o", ".venv/.ready", cwd=project)

    return make


def template_history(repository: Path, change: Callable[[Path], None]) -> Template:
    """Commit a changed template, then the template as it is."""
    copy_template(repository)
    change(repository / FOLDER)
    older = commit_all(repository, "older")
    git("rm", "-r", "--quiet", ".", cwd=repository)
    copy_template(repository)
    return Template(repository, older, commit_all(repository, "newer"))


@pytest.fixture(scope="module")
def history(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Template:
    """A template whose older version differs in a few files."""

    def change(project: Path) -> None:
        make_older(project)
        sync = ("-m", "level_0_manual.notebooks", "sync", "--from", "module")
        run(sys.executable, *sync, cwd=project)

    return template_history(tmp_path_factory.mktemp("template"), change)


def generate_older(history: Template, generate: Callable[..., Path], folder: Path) -> Path:
    """Generate a project from the older commit with plain cookiecutter, and commit it."""
    git("clone", "--quiet", str(history.repository), str(folder / "clone"), cwd=folder)
    git("checkout", "--quiet", history.older, cwd=folder / "clone")
    project = generate(folder / "plain", repository=folder / "clone", **ANSWERS)
    commit_all(project, "first")
    (project / ".venv").symlink_to(BINARIES.parent)
    (project / ".git/info/exclude").write_text("/.venv\n", encoding="utf-8")
    git("checkout", "--quiet", history.newer, cwd=folder / "clone")
    return project


@pytest.fixture
def project(history: Template, generate: Callable[..., Path], tmp_path: Path) -> Path:
    """A project that cookiecutter generated from the older template, in a repository."""
    return generate_older(history, generate, tmp_path)


@pytest.fixture
def fresh(history: Template, generate: Callable[..., Path], tmp_path: Path) -> Path:
    """A project of the newer template."""
    return generate(tmp_path / "fresh", repository=history.repository, **ANSWERS)


def assert_updated(project: Path, fresh: Path, history: Template, edited: set[str]) -> None:
    """The project equals a new one, except for the edited files."""
    assert files_of(project) == files_of(fresh)
    for path in files_of(fresh) - edited:
        assert (project / path).read_bytes() == (fresh / path).read_bytes(), path
    state = json.loads((project / ".cruft.json").read_text(encoding="utf-8"))
    assert state["commit"] == history.newer
    settings = yaml.safe_load((project / "project.yaml").read_text(encoding="utf-8"))
    assert settings["cloud"]["train"]["jobs"] == JOBS[ANSWERS["gpu"]]
    assert_given_back(project, ANSWERS)


def files_of(project: Path) -> set[str]:
    """Return the project's files, without git's and caches."""
    return {path for path in files(project) if not path.startswith((".git/", ".pytest_cache"))}


def test_update_brings_changes_and_keeps_edits(
    project: Path, fresh: Path, history: Template, run: Run, make: Run
) -> None:
    edit(project / MODEL, "LIMIT = 10.0", "LIMIT = 8.0")
    make(project, "sync", "FROM=module")
    edit(project / "level_0_manual/evaluate.ipynb", "# Evaluate", "# How good is it?")
    make(project, "sync", "FROM=notebook")
    edit(project / "project.yaml", "epochs: 40", "epochs: 25")
    commit_all(project, "my edits")

    assert "has been updated" in run("cruft", "update", "--skip-apply-ask", cwd=project)
    assert "model" in make(project, "sync", "FROM=module")

    pairs = {f"src/trainer/{name}.py" for name in ("model", "evaluate")}
    pairs |= {f"level_0_manual/{name}.ipynb" for name in ("model", "evaluate")}
    assert_updated(project, fresh, history, edited={*pairs, "project.yaml"})
    for path in (MODEL, NOTEBOOK):
        text = (project / path).read_text(encoding="utf-8")
        assert "LIMIT = 8.0" in text
        assert SENTENCE in text
    for path in ("src/trainer/evaluate.py", "level_0_manual/evaluate.ipynb"):
        assert "# How good is it?" in (project / path).read_text(encoding="utf-8")
    edit(project / "project.yaml", "epochs: 25", "epochs: 40")
    assert (project / "project.yaml").read_bytes() == (fresh / "project.yaml").read_bytes()

    make(project, "lint", "SKIP=ruff,ruff-format,mypy")
    quick = [*QUICK_TESTS, "-k", "not level0_leaves_reports"]
    run(sys.executable, "-m", "pytest", *quick, cwd=project)


def test_update_marks_a_conflict_and_lint_reports_it(
    project: Path, history: Template, run: Run, make: Run
) -> None:
    edit(project / MODEL, "Take them from training rows.", "Look at training rows.")
    make(project, "sync", "FROM=module")
    commit_all(project, "my edit")

    output = run("cruft", "update", "--skip-apply-ask", cwd=project)
    assert f"Applied patch to '{MODEL}' with conflicts." in output
    assert git("diff", "--name-only", "--diff-filter=U", cwd=project).split() == [MODEL]
    text = (project / MODEL).read_text(encoding="utf-8")
    before, rest = text.split("<<<<<<< ours\n")
    conflict, after = rest.split(">>>>>>> theirs\n")
    ours, theirs = conflict.split("=======\n")
    assert "Look at training rows." in ours
    assert SENTENCE in theirs
    assert (project / "tests/test_data.py").is_file()
    with pytest.raises(AssertionError, match=f"{MODEL}:\\d+: Merge conflict string"):
        make(project, "lint", "SKIP=notebook-sync,ruff,ruff-format,mypy")

    (project / MODEL).write_text(before + theirs + after, encoding="utf-8")
    make(project, "sync", "FROM=module")
    make(project, "lint", "SKIP=ruff,ruff-format,mypy")


def test_update_across_the_restructuring_keeps_edits(
    generate: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    """Programs move from src/launcher to their levels, and blocks of project.yaml change."""
    template = tmp_path / "template"
    template.mkdir()
    history = template_history(template, restore_old_layout)
    project = generate_older(history, generate, tmp_path)
    moved = "level_1_pipeline/pipeline.py"
    edit(project / MODEL, "LIMIT = 10.0", "LIMIT = 8.0")
    edit(project / "project.yaml", "epochs: 40", "epochs: 25")
    old = project / "src/launcher/level_1_pipeline_pipeline.py"
    old.write_text(old.read_text(encoding="utf-8") + "\nMY_EDIT = True\n", encoding="utf-8")
    (project / "src/mine.py").write_text("MINE = True\n", encoding="utf-8")
    commit_all(project, "my edits")

    output = run("cruft", "update", "--skip-apply-ask", cwd=project)

    assert "conflicts" not in output
    fresh = generate(tmp_path / "fresh", repository=template, **ANSWERS)
    (fresh / "src/mine.py").write_text("MINE = True\n", encoding="utf-8")
    assert_updated(project, fresh, history, edited={MODEL, moved, "project.yaml"})
    assert (project / moved).read_text(encoding="utf-8").endswith("MY_EDIT = True\n")
    edit(project / MODEL, "LIMIT = 8.0", "LIMIT = 10.0")
    edit(project / "project.yaml", "epochs: 25", "epochs: 40")
    for path in (MODEL, "project.yaml"):
        assert (project / path).read_bytes() == (fresh / path).read_bytes(), path
