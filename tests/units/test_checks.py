"""What a commit must pass: each hook fails on what it is for, `make lint` finds the same, and a fresh project passes both."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from core.errors import UserError
from level_0_manual import checks, notebooks
from project.git import install_hooks

from tests.units.project import ROOT

HIDDEN = "bm90IHJlYWxseSBhIGtleQ"  # stands for a key's text, which no message may show
KEY = "-----BEGIN " + f"PRIVATE KEY-----\n{HIDDEN}\n"  # in two parts, so that this file holds none
ACCOUNT = json.dumps(
    {"type": "service_account", "private_" + "key_id": HIDDEN, "private_" + "key": KEY}, indent=2
)


@pytest.fixture
def repository(tmp_path, monkeypatch, git):
    """This project's own files in a git repository of one commit, as the current folder; .venv is what runs the tests."""
    with contextlib.chdir(ROOT):
        files = [file for file in checks.project_files() if Path(file).is_file()]
    folder = tmp_path / "project"
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "pre-commit"))
    monkeypatch.setenv(
        "MYPY_CACHE_DIR", os.environ.get("MYPY_CACHE_DIR", str(ROOT / ".mypy_cache"))
    )  # a cold one takes long
    monkeypatch.setenv("PATH", os.defpath)  # as in an editor: the tools are not on it
    git("init", "--quiet")
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / ".git" / "info").mkdir(exist_ok=True)
    (folder / ".git" / "info" / "exclude").write_text(".venv\n")
    git("add", "--all")
    assert git("commit", "--quiet", "--message=first").returncode == 0
    return folder


def hooks(*arguments, code):
    """Run pre-commit; returns what a person sees."""
    command = [sys.executable, "-m", "pre_commit", "run", "--color=never", *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False
    )
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def lint():
    """What `make lint` says; nothing when all is well."""
    try:
        checks.lint()
    except UserError as error:
        return str(error)
    return ""


def write(path, content):
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def with_outputs():
    """The notebook as Jupyter saves it after a run."""
    notebook = json.loads(Path("level_0_manual/train.ipynb").read_text())
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    cell["execution_count"], cell["metadata"]["execution"] = (
        3,
        {"iopub.execute_input": "2030-01-01"},
    )
    cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": ["a patient's name\n"]}]
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def edited(path, old, new):
    text = Path(path).read_text()
    assert old in text
    return text.replace(old, new)


# Check → the file that breaks it, its content, what the message says.
BREAKS = {
    "secrets": ("key.pem", KEY, r"key\.pem:1: holds a private key.*git rm --cached key\.pem"),
    "secrets in JSON": (
        "service.json",
        ACCOUNT,
        r"service\.json:3: holds the key of a Google service account",
    ),
    "secrets in a notebook": (
        "x.ipynb",
        json.dumps({"cells": [{"source": [KEY]}]}, indent=1),
        r"x\.ipynb:5: holds a private key",
    ),
    "secrets in a key store": ("old.p12", b"\0\1\2", r"old\.p12: holds private keys"),
    "large": (
        "all of it.csv",
        b"1,2\n" * 300_000,
        r"all of it\.csv: has 1\.2 MB.*git rm --cached 'all of it\.csv'",
    ),
    "merge": (
        "README.md",
        "one\n<<<<<<< HEAD\ntwo\n",
        r"README\.md:2: an unresolved merge conflict.*git add README\.md",
    ),
    "parse YAML": ("jobs/a.yaml", "a: 1\nb: [1,\n", r"jobs/a\.yaml:3: is not valid YAML.*Mend it"),
    "parse TOML": ("a.toml", "a = 1\nb = \n", r"a\.toml:2: is not valid TOML"),
    "parse JSON": ("a.json", '{\n"a": 1,\n}', r"a\.json:3: is not valid JSON"),
    "parse a notebook": ("a.ipynb", '{\n"cells": [\n', r"a\.ipynb:3: is not valid JSON"),
    "parse Latin-1": ("a.yml", "ä: 1".encode("latin-1"), r"a\.yml: is not UTF-8"),
    "settings": (
        "project.yaml",
        lambda: edited("project.yaml", "epochs: 40", "epoch: 40"),
        r"train\.epoch: there is no such key; did you mean 'epochs'\?[\s\S]*Mend project\.yaml",
    ),
    "outputs": (
        "level_0_manual/train.ipynb",
        with_outputs,
        r"level_0_manual/train\.ipynb: (holds outputs.*make strip|the outputs were)",
    ),
    "in-step": (
        "src/trainer/model.py",
        lambda: edited("src/trainer/model.py", "min(50,", "min(40,"),
        r"(only src/trainer/model\.py was edited.*make sync|model\.ipynb was written from src/trainer/model\.py.*git add)",
    ),
    "style": (
        "src/project/new.py",
        "import os\n",
        r"src/project/new\.py:1:8: F401[\s\S]*make format",
    ),
    "layout": (
        "src/project/wide.py",
        "a  =  1\n",
        r"src/project/wide\.py:1:3: unformatted[\s\S]*Type: make format",
    ),
    "types": (
        "src/project/new.py",
        'a: int = "1"\n',
        r"src/project/new\.py:1: error[\s\S]*make lint",
    ),
    "shell": ("run.sh", "#!/bin/sh\ncd $1\n", r"run\.sh:2:1: warning[\s\S]*Mend what it says"),
    "shell without a suffix": (
        "bin/run",
        "#!/usr/bin/env bash\nread x\n",
        r"bin/run:2:1[\s\S]*SC2162",
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_each_hook_fails_on_what_it_is_for_and_lint_on_the_same(repository, git, case):
    name = case.split()[0]
    file, content, message = BREAKS[case]
    write(file, content() if callable(content) else content)
    found = "\n".join(
        checks.problems(name, checks.project_files())
    )  # in `make lint`; not yet added to git
    assert re.search(message, found), found
    git("add", "--all")
    shown = hooks(name, "--files", file, code=1)
    assert f"hook id: {name}" in shown
    assert re.search(message, shown), shown
    assert HIDDEN not in found + shown


def test_a_fresh_project_passes_all_hooks_and_lint(repository, capsys):
    shown = hooks("--all-files", code=0)
    assert shown.count("Passed") == len(checks.CHECKS)
    assert lint() == ""
    assert f"{len(checks.CHECKS)} checks passed on " in capsys.readouterr().out


def test_hooks_and_lint_are_one_list():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    assert [hook["id"] for hook in local["hooks"]] == list(checks.CHECKS)
    for hook in local["hooks"]:
        mends = "--fix " if checks.CHECKS[hook["id"]].fix else ""
        assert hook["entry"] == f".venv/bin/python -m level_0_manual.checks {mends}{hook['id']}"
    recipe = subprocess.run(
        ["make", "--dry-run", "--always-make", "lint"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert recipe.stdout.splitlines()[-1].endswith("/bin/python -m level_0_manual.checks")


def test_lint_tells_all_at_once_changes_nothing_and_shows_no_secret(repository, git, monkeypatch):
    monkeypatch.setenv("SKIP", "types")
    for case, (file, content, _) in BREAKS.items():
        if not case.startswith(("settings", "types")):
            write(file, content() if callable(content) else content)
    write("src/project/secret.py", f'KEY = """{KEY}"""; {"x" * 200} = "{HIDDEN}"\n')
    write("secret.yaml", f'key: "{KEY}\n')
    before = git("status", "--porcelain").stdout, git("diff").stdout
    said = lint()
    for word in (
        "key.pem:1",
        "all of it.csv",
        "README.md:2",
        "a.toml:2",
        "train.ipynb",
        "make sync",
        "F401",
        "unformatted",
        "SC2162",
    ):
        assert word in said
    assert HIDDEN not in said
    assert (git("status", "--porcelain").stdout, git("diff").stdout) == before
    git("add", "--all")
    assert HIDDEN not in hooks("--all-files", code=1)


def test_skip_leaves_a_check_out_and_says_so(repository, monkeypatch, capsys):
    monkeypatch.setenv("SKIP", "settings,types,style,layout")
    write("project.yaml", "{}")
    assert lint() == ""
    assert "skipped, as SKIP says: settings, style, layout, types" in capsys.readouterr().out


# ── a commit, as an editor makes it ─────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def commit(repository, git, monkeypatch):
    """Commits what is staged, through the installed hooks of the notebooks; the others would only take time."""
    assert install_hooks() == ""
    monkeypatch.setenv(
        "SKIP", ",".join(name for name, check in checks.CHECKS.items() if not check.fix)
    )
    return lambda: git("commit", "--message=next")


def test_a_commit_removes_outputs_and_passes_when_added_again(commit, git):
    path = Path("level_0_manual/train.ipynb")
    before = path.read_bytes()
    write(path, with_outputs())
    write("more.md", "more\n")
    git("add", "--all")
    done = commit()
    assert done.returncode == 1
    assert f"{path}: the outputs were removed. Next: git add {path}" in done.stdout
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


def test_what_counts_is_what_is_staged_and_an_edit_beside_it_is_not_lost(commit, git):
    write("level_0_manual/model.ipynb", edited("level_0_manual/model.ipynb", "min(50,", "min(40,"))
    git("add", "level_0_manual/model.ipynb")
    write("src/trainer/model.py", edited("src/trainer/model.py", "min(50,", "min(30,"))
    assert commit().returncode == 1
    assert "min(30," in Path("src/trainer/model.py").read_text()
    git("add", "src/trainer/model.py")
    done = commit()
    assert done.returncode == 1
    assert "both were edited since the last commit" in done.stdout
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
    assert (
        "src/trainer/model.py is missing. Type: make sync FROM=notebook PAIR=model" in done.stdout
    )


# ── the files and the repository ────────────────────────────────────────────────────────────────────────────────────
def test_without_git_the_same_files_are_checked(repository):
    for ignored in ("data/a.csv", "src/x.egg-info/b", "scratch/c.ipynb", "d.partial"):
        write(ignored, "x")
    write("new.md", "x")
    with_git = checks.project_files()
    assert "new.md" in with_git
    shutil.rmtree(".git")
    assert checks.project_files() == with_git


def test_in_a_folder_that_another_repository_ignores_all_files_are_checked(
    project, git, monkeypatch
):
    git("init", "--quiet")
    write(".gitignore", "build/\n")
    write("build/project.yaml", "a: 1")
    monkeypatch.chdir("build")
    assert checks.project_files() == ["project.yaml"]


def test_a_deleted_file_and_a_link_are_no_mistake(repository):
    Path("README.md").unlink()
    Path("link.yaml").symlink_to("nowhere")
    for name in ("secrets", "large", "merge", "parse", "outputs", "shell"):
        assert checks.problems(name, checks.project_files()) == []


@pytest.mark.parametrize(
    "content",
    ["[]", "3", '{"cells": 3}', '{"cells": [3]}', '{"metadata": null}', "{}", "", "<<<<<<<"],
)
def test_a_strange_notebook_is_no_traceback(project, content):
    write("a.ipynb", content)
    assert checks.problems("outputs", ["a.ipynb"]) == []


def test_the_exceptions_are_left_alone(project):
    write(".vscode/settings.json", "{} // a comment")
    write("requirements/dev.txt", b"x" * 2_000_000)
    assert checks.problems("parse", [".vscode/settings.json"]) == []
    assert checks.problems("large", ["requirements/dev.txt"]) == []


def test_outside_a_project_the_way_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["checks"])
    with pytest.raises(UserError, match="cd YOUR-PROJECT"):
        checks.main()


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
    assert "the hooks are not installed: the project lies in the repository" in install_hooks()
    assert not Path(".git").exists()
    assert not (project / ".git" / "hooks" / "pre-commit").exists()


def test_setup_respects_hooks_of_ones_own(project, git, tmp_path):
    git("init", "--quiet")
    git("config", "core.hooksPath", "/etc/hooks")
    assert (
        "core.hooksPath says that they are in /etc/hooks. `make lint` checks the same"
        in install_hooks()
    )
    assert not Path(".git/hooks/pre-commit").exists()


def test_setup_without_git_says_so(project, git, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git is not installed, so no commit is checked. `make lint`" in install_hooks()


def test_setup_inside_a_hook_of_another_repository_finds_its_own(
    project, git, tmp_path, monkeypatch
):
    git("init", "--quiet", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert install_hooks() == ""
    assert Path(".git/hooks/pre-commit").is_file()
    assert not (tmp_path / "other" / ".git" / "hooks" / "pre-commit").exists()


def test_a_check_that_is_not_there_is_not_skipped(monkeypatch):
    monkeypatch.setenv("SKIP", "tpyes")
    assert "there is no check tpyes; there are secrets," in lint()


def test_a_job_that_is_not_there_is_found_before_a_commit(repository):
    path = repository / "project.yaml"
    path.write_text(
        re.sub(r"jobs: \[.*\]", "jobs: [l4-sopt]", path.read_text(encoding="utf-8")),
        encoding="utf-8",
    )
    assert (
        "there is no GPU job 'l4-sopt'; near it are l4-spot" in checks.problems("settings", [])[0]
    )
