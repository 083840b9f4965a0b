"""Every command in AGENTS.md works: cheap ones run, `make -n` checks the others."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "{{cookiecutter.project_slug}}"
PAGES = [ROOT / "AGENTS.md"]
CHEAP_TARGETS = {"help"}


def commands(page: Path) -> list[list[str]]:
    """Return the commands of the page's bash blocks."""
    code = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = (shlex.split(line, comments=True) for line in "".join(code).splitlines())
    return [words for words in lines if words]


def cheap(words: list[str], tmp_path: Path) -> list[str]:
    """Replace a slow command by a quick one that fails if the command is invalid."""
    program = Path(words[0]).name
    if program == "make":
        return words if set(words[1:]) <= CHEAP_TARGETS else ["make", "-n", *words[1:]]
    if "pytest" in words:
        return [*words, "--collect-only"]
    if program == "cookiecutter":
        folder = words.index("--output-dir") + 1
        return [*words[:folder], str(tmp_path), *words[folder + 1 :]]
    return words


CASES = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), CASES, ids=lambda case: " ".join(case) if isinstance(case, list) else ""
)
def test_command_works(page: Path, words: list[str], config: Path, tmp_path: Path) -> None:
    own = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VIRTUAL_ENV", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment["COOKIECUTTER_CONFIG"] = str(config)
    done = subprocess.run(
        cheap(words, tmp_path), cwd=page.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_page_is_short_and_names_existing_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n") <= 60
    names = re.findall(r"`([\w./{}-]+\.\w+|[\w./{}-]+/)`", text)
    assert names
    for name in names:
        assert any((folder / name).exists() for folder in (page.parent, PROJECT)), name
