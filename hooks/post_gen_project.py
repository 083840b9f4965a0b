"""Removes what was not chosen, records the template's commit, and says what to type next.

cookiecutter renders this file and runs it in the new project. cruft runs it again at every update, in a
folder of its own: it must depend on nothing but the answers and the template. The Jinja expression stands in
a raw string, so the file is valid Python as it lies here; anywhere else, comments included, no opening brace
may be followed by a brace, a percent sign or a hash.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

# Answer → value → the files and folders that only this value needs; a value without any needs no line.
ONLY_FOR: dict[str, dict[str, list[str]]] = {
    "license": {
        "Apache-2.0": ["LICENSE-Apache-2.0"],
        "MIT": ["LICENSE-MIT"],
        "Proprietary": ["LICENSE-Proprietary"],
    },
}

# What tools leave behind in a local template that is worked on; cookiecutter copies it with the rest.
CACHES = [".*_cache", "[!.]*/**/__pycache__", "[!.]*/**/.ipynb_checkpoints"]


def remove_what_was_not_chosen(answers: dict[str, Any]) -> None:
    """Delete every path of the table that no chosen value asks for."""
    kept = {path for answer, values in ONLY_FOR.items() for path in values.get(answers[answer], [])}
    every = {path for values in ONLY_FOR.values() for paths in values.values() for path in paths}
    for path in map(Path, sorted(every - kept)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_caches() -> None:
    """Delete what is no part of the template."""
    for pattern in CACHES:
        for folder in list(Path().glob(pattern)):
            shutil.rmtree(folder, ignore_errors=True)


def template_commit(answers: dict[str, Any]) -> str:
    """The commit that this project is made from, with "-dirty" behind it if the template was edited since."""
    if "_commit" in answers:  # cruft says it, and does not say where its clone lies
        return str(answers["_commit"])
    # A relative path counts from where cookiecutter was started. A hook is not told where that is: try the
    # shell's folder and the output folder, which is the same by default.
    for start in (os.environ.get("PWD", "."), answers["_output_dir"]):
        template = Path(start, answers["_repo_dir"])
        if (template / "cookiecutter.json").is_file() and (template / ".git").exists():
            return describe(template)
    return "unknown"


def describe(repository: Path) -> str:
    """git's name for the checked out commit; "unknown" without git or without a commit."""
    # Inside a git hook these variables point at another repository, and win over -C.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def record_commit(commit: str) -> None:
    """Fill in template.commit; bytes, so that line ends stay as they are."""
    settings = Path("project.yaml")
    settings.write_bytes(settings.read_bytes().replace(b'commit: ""', f'commit: "{commit}"'.encode(), 1))


def main() -> None:
    """Finish the project in the current folder."""
    answers = json.loads(r"""{{ cookiecutter | jsonify }}""")
    remove_what_was_not_chosen(answers)
    remove_caches()
    Path(f"LICENSE-{answers['license']}").replace("LICENSE")
    record_commit(template_commit(answers))
    print(f"cd {answers['project_slug']}")
    print("make setup     # installs what the project needs, into .venv")
    print("make level0    # trains a model here, and writes HTML reports under runs/")


if __name__ == "__main__":
    main()
