"""What a commit must pass: each hook fails on what it is for, and a fresh project passes all."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from level_0_manual import notebooks
from project import settings
from project.git import install_hooks

from tests.units.project import ROOT

HIDDEN = "bm90IHJlYWxseSBhIGtleQ"  # stands for a key's text, which no message may show
KEY = "-----BEGIN " + f"PRIVATE KEY-----\n{HIDDEN}\n"  # in two parts: this file holds none
ACCOUNT = json.dumps({"type": "service_account", "private_" + "key": KEY}, indent=2)
HOOKS = [
    hook["id"]
    for hook in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
]


@pytest.fixture
def repository(tmp_path, monkeypatch, git):
    """The project's files in a git repository of one commit, as the current folder."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("__pycache__", ".git"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "pre-commit"))
    cache = os.environ.get("MYPY_CACHE_DIR", str(ROOT.parent / "mypy"))  # a cold one takes long
    monkeypatch.setenv("MYPY_CACHE_DIR", cache)
    monkeypatch.setenv("PATH", os.defpath)  # as in an editor: the tools are not on it
    monkeypatch.setenv("PYTHONPATH", f"{folder / 'src'}{os.pathsep}{folder}")
    git("init", "--quiet")
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / ".git" / "info").mkdir(exist_ok=True)
    (folder / ".git" / "info" / "exclude").write_text(".venv\n")
    git("add", "--all")
    assert git("commit", "--quiet", "--message=first").returncode == 0
    return folder


def run_hooks(*arguments, code):
    """Run pre-commit; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "run", "--color=never", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def write(path, content):
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    if not Path(path).suffix:
        Path(path).chmod(0o755)  # an executable is known by its first line


def with_outputs():
    """The notebook as Jupyter saves it after a run."""
    notebook = json.loads(Path("level_0_manual/train.ipynb").read_text())
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    cell["execution_count"] = 3
    cell["metadata"]["execution"] = {"iopub.execute_input": "2030-01-01"}
    cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": ["a patient's name\n"]}]
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def edited(path, old, new):
    text = Path(path).read_text()
    assert old in text
    return text.replace(old, new)


# Hook, case → the file that breaks it, its content, what the message says.
BREAKS = {
    ("private-keys", "PEM"): ("key.pem", KEY, r"key\.pem"),
    ("private-keys", "JSON"): ("service.json", ACCOUNT, r"service\.json"),
    ("private-keys", "notebook"): (
        "x.ipynb",
        json.dumps({"cells": [{"source": [KEY]}]}),
        r"x\.ipynb",
    ),
    ("key-stores", ""): ("old.p12", b"\0\1\2", r"git rm --cached FILE[\s\S]*old\.p12"),
    ("large-files", ""): ("all of it.csv", b"1,2\n" * 300_000, r"all of it\.csv \(1172 KB\)"),
    ("merge-conflicts", ""): ("README.md", "one\n<<<<<<< HEAD\ntwo\n", r"README\.md:2"),
    ("yaml", "syntax"): ("jobs/a.yaml", "a: 1\nb: [1,\n", r'"jobs/a\.yaml", line 3'),
    ("toml", ""): ("a.toml", "a = 1\nb = \n", r"a\.toml"),
    ("json", ""): ("a.json", '{\n"a": 1,\n}', r"a\.json[\s\S]*line 3"),
    ("json", "notebook"): ("a.ipynb", '{\n"cells": [\n', r"a\.ipynb"),
    ("settings", "key"): (
        "project.yaml",
        lambda: edited("project.yaml", "epochs: 40", "epoch: 40"),
        r"hyperparameters\.epoch: .*; did you mean 'epochs'\?",
    ),
    ("settings", "job"): (
        "project.yaml",
        lambda: re.sub(r"jobs: \[.*\]", "jobs: [l4-sopt]", Path("project.yaml").read_text()),
        r"unknown GPU job 'l4-sopt'; did you mean 'l4-spot'\?",
    ),
    ("notebook-outputs", ""): ("level_0_manual/train.ipynb", with_outputs, "modified by this hook"),
    ("notebook-sync", ""): (
        "src/trainer/model.py",
        lambda: edited("src/trainer/model.py", "min(50,", "min(40,"),
        r"model\.ipynb was written from src/trainer/model\.py.*git add",
    ),
    ("ruff", ""): ("src/project/new.py", "import os\n", r"src/project/new\.py:1:8: F401"),
    ("ruff-format", ""): ("src/project/wide.py", "a  =  1\n", r"src/project/wide\.py"),
    ("mypy", ""): ("src/project/new.py", 'a: int = "1"\n', r"src/project/new\.py:1: error"),
    ("shellcheck", ""): ("run.sh", "#!/bin/sh\ncd $1\n", r"run\.sh line 2[\s\S]*SC2164"),
    ("shellcheck", "no suffix"): ("bin/run", "#!/usr/bin/env bash\nread x\n", r"SC2162"),
    ("hadolint", ""): ("x/Dockerfile", "FROM debian\nRUN cd /tmp\n", r"x/Dockerfile:2 DL3003"),
}


@pytest.mark.parametrize(("hook", "case"), BREAKS)
def test_each_hook_fails_on_what_it_is_for(repository, git, hook, case):
    file, content, message = BREAKS[hook, case]
    write(file, content() if callable(content) else content)
    git("add", "--all")
    printed = run_hooks(hook, "--files", file, code=1)
    assert f"hook id: {hook}" in printed
    assert re.search(message, printed), printed
    assert HIDDEN not in printed


def test_every_hook_has_a_case():
    assert {hook for hook, _ in BREAKS} == set(HOOKS)


def test_a_fresh_project_passes_all_hooks(repository):
    printed = run_hooks("--all-files", code=0)
    assert printed.count("Passed") + printed.count("Skipped") == len(HOOKS)


def test_make_lint_runs_the_hooks_without_a_repository_too(repository):
    shutil.rmtree(".git")
    command = ["make", "lint", "--old-file=setup", "--old-file=.venv/.ready", "SKIP=mypy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Passed") >= len(HOOKS) - 2


def test_the_editors_schema_is_current():
    assert (ROOT / "project.schema.json").read_text() == settings.schema()
    first = (ROOT / "project.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=./project.schema.json"


# ── a commit, as an editor makes it ─────────────────────────────────────────────────────────────
@pytest.fixture
def commit(repository, git, monkeypatch):
    """Commit what is staged with the hooks of the notebooks alone; the others take time."""
    assert install_hooks() == ""
    monkeypatch.setenv("SKIP", ",".join(hook for hook in HOOKS if not hook.startswith("notebook")))
    return lambda: git("commit", "--message=next")


def test_a_commit_removes_outputs_and_passes_when_added_again(commit, git):
    path = Path("level_0_manual/train.ipynb")
    before = path.read_bytes()
    write(path, with_outputs())
    write("more.md", "more\n")
    git("add", "--all")
    assert commit().returncode == 1
    assert path.read_bytes() == before
    git("add", str(path))
    done = commit()
    assert done.returncode == 0, done.stdout


def test_a_commit_writes_the_other_half_and_passes_when_added(commit, git):
    write("level_0_manual/model.ipynb", edited("level_0_manual/model.ipynb", "min(50,", "min(40,"))
    git("add", "level_0_manual/model.ipynb")
    done = commit()
    assert done.returncode == 1
    assert "Next: git add level_0_manual/model.ipynb src/trainer/model.py" in done.stdout
    git("add", "src/trainer/model.py")
    done = commit()
    assert done.returncode == 0, done.stdout
    assert "min(40," in git("show", "HEAD:src/trainer/model.py").stdout


def test_an_unstaged_edit_of_the_other_half_is_not_lost(commit, git):
    write("level_0_manual/model.ipynb", edited("level_0_manual/model.ipynb", "min(50,", "min(40,"))
    git("add", "level_0_manual/model.ipynb")
    write("src/trainer/model.py", edited("src/trainer/model.py", "min(50,", "min(30,"))
    assert commit().returncode == 1
    assert "min(30," in Path("src/trainer/model.py").read_text()
    git("add", "src/trainer/model.py")
    done = commit()
    assert done.returncode == 1
    assert "were edited since the last commit" in done.stdout
    assert "make sync FROM=notebook PAIR=model" in done.stdout
    assert "min(30," in Path("src/trainer/model.py").read_text()
    notebooks.sync("module")
    git("add", "--all")
    done = commit()
    assert done.returncode == 0, done.stdout


def test_a_deleted_half_is_not_committed(commit, git):
    git("rm", "--quiet", "src/trainer/model.py")
    done = commit()
    assert done.returncode == 1
    assert "src/trainer/model.py is missing" in done.stdout
    assert "make sync FROM=notebook PAIR=model" in done.stdout


# ── the repository that setup makes ─────────────────────────────────────────────────────────────
def test_setup_makes_a_repository_with_hooks_once(project, git):
    assert install_hooks() == ""
    hook = Path(".git/hooks/pre-commit").read_bytes()
    assert git("symbolic-ref", "HEAD").stdout == "refs/heads/main\n"
    assert install_hooks() == ""
    assert Path(".git/hooks/pre-commit").read_bytes() == hook
    assert not list(Path(".git/hooks").glob("*.legacy"))


def test_setup_leaves_a_repository_around_the_project_alone(project, git, monkeypatch):
    git("init", "--quiet")
    shutil.copytree("src", "inner/src")
    monkeypatch.chdir("inner")
    assert "the project is inside the repository" in install_hooks()
    assert not Path(".git").exists()
    assert not (project / ".git" / "hooks" / "pre-commit").exists()


def test_setup_respects_the_users_own_hooks(project, git):
    git("init", "--quiet")
    git("config", "core.hooksPath", "/etc/hooks")
    assert "core.hooksPath is set to /etc/hooks" in install_hooks()
    assert not Path(".git/hooks/pre-commit").exists()


def test_setup_without_git_says_so(project, git, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git is not installed" in install_hooks()


def test_setup_inside_a_hook_of_another_repository_finds_its_own(
    project, git, tmp_path, monkeypatch
):
    git("init", "--quiet", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert install_hooks() == ""
    assert Path(".git/hooks/pre-commit").is_file()
    assert not (tmp_path / "other" / ".git" / "hooks" / "pre-commit").exists()
