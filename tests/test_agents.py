"""Every command in AGENTS.md works: cheap ones run, `make -n` checks the others."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "{{cookiecutter.project_slug}}"
PAGES = [ROOT / "AGENTS.md", PROJECT / "AGENTS.md"]
CHEAP_TARGETS = {"help", "sync"}
VENV = Path(sys.executable).parents[1]


def commands(page: Path) -> list[list[str]]:
    """Return the commands of the page's bash blocks."""
    code = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = (shlex.split(line, comments=True) for line in "".join(code).splitlines())
    return [words for words in lines if words]


def cheap(words: list[str], output: Path) -> list[str]:
    """Use this environment, and replace a slow command by a quick one that fails if it is invalid."""
    program, *rest = words
    if program == "make":
        environment = [f"VENV={VENV}", "-o", f"{VENV}/.ready"]
        return ["make", *environment, *([] if rest[0] in CHEAP_TARGETS else ["-n"]), *rest]
    program = program.replace(".venv", str(VENV))
    if "pytest" in rest:
        return [program, *rest, "--collect-only"]
    folder = rest.index("--output-dir") + 1
    return [program, *rest[:folder], str(output), *rest[folder + 1 :]]


CASES = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), CASES, ids=lambda case: " ".join(case) if isinstance(case, list) else ""
)
def test_command_works(
    page: Path, words: list[str], config: Path, generate: Callable[..., Path], tmp_path: Path
) -> None:
    folder = generate(tmp_path) if page.parent == PROJECT else ROOT
    own = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VIRTUAL_ENV", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"COOKIECUTTER_CONFIG": str(config), "PYTHONPATH": f"{folder}/src"}
    command = cheap(words, tmp_path / "output")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_page_is_short_and_names_existing_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n") <= 60
    names = re.findall(r"`([\w./{}-]+\.\w+|[\w./{}-]+/)`", text)
    assert names
    for name in names:
        folders = [page.parent, PROJECT, PROJECT / "src/trainer"]
        assert any((folder / name).exists() for folder in folders), name
