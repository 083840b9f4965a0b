"""A project follows its template: cruft brings what is new, keeps what was edited; see docs/update.md."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.projects import JOBS, assert_given_back, copy_template, files, git

pytestmark = pytest.mark.heavy

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
MODEL, NOTEBOOK = "src/trainer/model.py", "level_0_manual/model.ipynb"
SENTENCE = "Take median, mean and spread (standard deviation; 1 for a constant) from training rows."
BINARIES = Path(sys.executable).parent
QUICK_TESTS = [
    f"tests/test_{name}.py" for name in ("settings", "schema", "notebooks", "model", "template")
]


class Template(NamedTuple):
    """A repository of the template with two commits: one of yesterday, and what it is now."""

    repository: Path
    older: str
    newer: str


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that stands there once."""
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
    """What the template's project may have been: one file is not there yet, one still is, and some differ."""
    (project / "tests/test_client.py").unlink()
    (project / "src/project/older.py").write_text("OLDER = True\n", encoding="utf-8")
    edit(project / "README.md", "## Before you commit", "## Before a commit")
    edit(project / "project.yaml", "# the column to predict", "# the label")
    edit(project / MODEL, SENTENCE, "Take them from training rows.")


@pytest.fixture(scope="module")
def run(config: Path) -> Callable[..., str]:
    """Run a command as a person types it in a project, in the template's environment; returns its words."""

    def run(*command: str, cwd: Path) -> str:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("GIT_")
        }
        environment |= {
            "COOKIECUTTER_CONFIG": str(config),
            "PYTHONPATH": f"{cwd / 'src'}:{cwd}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        environment["PATH"] = os.pathsep.join([str(BINARIES), os.environ["PATH"]])
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def make(run: Callable[..., str]) -> Callable[..., str]:
    """A task of a project; its environment is the template's, and taken for ready."""

    def make(project: Path, *words: str) -> str:
        return run(
            "make",
            *words,
            f"VENV={BINARIES.parent}",
            "-o",
            f"{BINARIES.parent}/.ready",
            cwd=project,
        )

    return make


@pytest.fixture(scope="module")
def history(run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Template:
    repository = tmp_path_factory.mktemp("template")
    copy_template(repository)
    project = repository / "{{cookiecutter.project_slug}}"
    make_older(project)
    run(sys.executable, "-m", "level_0_manual.notebooks", "sync", "--from", "module", cwd=project)
    older = commit_all(repository, "older")
    for path in repository.iterdir():  # git leaves folders that hold what it ignores
        if path.is_dir() and path.name != ".git":
            shutil.rmtree(path)
    copy_template(repository)
    return Template(repository, older, commit_all(repository, "newer"))


@pytest.fixture
def project(history: Template, run: Callable[..., str], tmp_path: Path) -> Path:
    """A project that cruft made from the older template, in a repository."""
    answers = json.dumps(ANSWERS)
    template = [str(history.repository), "--checkout", history.older]
    run("cruft", "create", *template, "--no-input", "--extra-context", answers, cwd=tmp_path)
    commit_all(tmp_path / "obriens", "first")
    return tmp_path / "obriens"


def assert_new(project: Path, fresh: Path, history: Template, edited: set[str]) -> None:
    """The project is what the newer template makes, but for what the user edited."""
    assert files_of(project) == files_of(fresh)
    for path in files_of(fresh) - edited:
        assert (project / path).read_bytes() == (fresh / path).read_bytes(), path
    assert (
        json.loads((project / ".cruft.json").read_text(encoding="utf-8"))["commit"] == history.newer
    )
    settings = yaml.safe_load((project / "project.yaml").read_text(encoding="utf-8"))
    assert settings["template"]["commit"] == history.newer
    assert settings["cloud"]["train"]["jobs"] == JOBS[ANSWERS["gpu"]]
    assert_given_back(project, ANSWERS)


def files_of(project: Path) -> set[str]:
    """The project's files, without git's and cruft's own."""
    return {
        path
        for path in files(project)
        if not path.startswith((".git/", ".cruft.json", ".pytest_cache"))
    }


@pytest.fixture
def fresh(history: Template, generate: Callable[..., Path], tmp_path: Path) -> Path:
    """A project of today."""
    return generate(tmp_path / "fresh", repository=history.repository, **ANSWERS)


def test_an_update_brings_what_is_new_and_keeps_what_was_edited(
    project: Path, fresh: Path, history: Template, run: Callable[..., str], make: Callable[..., str]
) -> None:
    edit(project / MODEL, "LIMIT = 10.0", "LIMIT = 8.0")
    make(project, "sync", "FROM=module")
    edit(project / "level_0_manual/evaluate.ipynb", "# Evaluate", "# How good is it?")
    make(project, "sync", "FROM=notebook")
    edit(project / "project.yaml", "epochs: 40", "epochs: 25")
    commit_all(project, "my own edits")

    assert "has been updated" in run("cruft", "update", "--skip-apply-ask", cwd=project)
    assert "model" in make(project, "sync", "FROM=module")

    pairs = {f"src/trainer/{name}.py" for name in ("model", "evaluate")}
    pairs |= {f"level_0_manual/{name}.ipynb" for name in ("model", "evaluate")}
    assert_new(project, fresh, history, edited={*pairs, "project.yaml"})
    for path in (MODEL, NOTEBOOK):
        text = (project / path).read_text(encoding="utf-8")
        assert "LIMIT = 8.0" in text
        assert SENTENCE in text
    for path in ("src/trainer/evaluate.py", "level_0_manual/evaluate.ipynb"):
        assert "# How good is it?" in (project / path).read_text(encoding="utf-8")
    edit(project / "project.yaml", "epochs: 25", "epochs: 40")
    assert (project / "project.yaml").read_bytes() == (fresh / "project.yaml").read_bytes()

    make(project, "lint", "SKIP=style,layout,types")
    run(
        sys.executable, "-m", "pytest", *QUICK_TESTS, "-k", "not level0_leaves_reports", cwd=project
    )


def test_a_conflict_is_marked_in_the_file_and_found_by_lint(
    project: Path, history: Template, run: Callable[..., str], make: Callable[..., str]
) -> None:
    edit(project / MODEL, "Take them from training rows.", "Look at training rows.")
    make(project, "sync", "FROM=module")
    commit_all(project, "my own edit")

    said = run("cruft", "update", "--skip-apply-ask", cwd=project)
    assert f"Applied patch to '{MODEL}' with conflicts." in said
    assert git("diff", "--name-only", "--diff-filter=U", cwd=project).split() == [MODEL]
    text = (project / MODEL).read_text(encoding="utf-8")
    mine, theirs = text.split("<<<<<<< ours\n")[1].split(">>>>>>> theirs\n")[0].split("=======\n")
    assert "Look at training rows." in mine
    assert SENTENCE in theirs
    assert (project / "tests/test_client.py").is_file()
    with pytest.raises(AssertionError, match=f"{MODEL}:\\d+: an unresolved merge conflict"):
        make(project, "lint", "SKIP=in-step,style,layout,types")

    (project / MODEL).write_text(
        text.split("<<<<<<<")[0] + theirs + text.split(">>>>>>> theirs\n")[1], encoding="utf-8"
    )
    make(project, "sync", "FROM=module")
    make(project, "lint", "SKIP=style,layout,types")


def test_a_project_of_plain_cookiecutter_can_be_updated(
    history: Template,
    generate: Callable[..., Path],
    fresh: Path,
    run: Callable[..., str],
    make: Callable[..., str],
    tmp_path: Path,
) -> None:
    git("clone", "--quiet", str(history.repository), str(tmp_path / "clone"), cwd=tmp_path)
    git("checkout", "--quiet", history.older, cwd=tmp_path / "clone")
    project = generate(tmp_path / "plain", repository=tmp_path / "clone", **ANSWERS)
    commit_all(project, "first")

    state = json.loads((project / ".cruft.json").read_text(encoding="utf-8"))
    assert state["commit"] == history.older
    assert {name: state["context"]["cookiecutter"][name] for name in ANSWERS} == ANSWERS
    git("checkout", "--quiet", history.newer, cwd=tmp_path / "clone")

    assert "has been updated" in run("cruft", "update", "--skip-apply-ask", cwd=project)
    make(project, "sync", "FROM=module")
    assert_new(project, fresh, history, edited=set())
