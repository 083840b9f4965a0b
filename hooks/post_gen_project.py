"""Removes what was not chosen, records the template's commit, and says what to type next.

cookiecutter renders this file and runs it in the new project. cruft runs it again at every update, in a
folder of its own: it must depend on nothing but the answers and the template. The Jinja expression stands in
a raw string, so the file is valid Python as it lies here; anywhere else, comments included, no opening brace
may be followed by a brace, a percent sign or a hash.

A hook is a process of its own, and imports are most of its time: it does without pathlib and typing, and
imports shutil where that is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
from fnmatch import fnmatch

# Answer → value → the files and folders that only this value needs; a value without any needs no line.
ONLY_FOR: dict[str, dict[str, list[str]]] = {
    "ci": {
        "github-actions": [".github"],
        "gitlab": [".gitlab-ci.yml"],
        "azure-devops": ["level_2_cicd/azure-pipelines.yml", "level_2_cicd/azure-submit.yml"],
    },
    "license": {
        "Apache-2.0": ["LICENSE-Apache-2.0"],
        "MIT": ["LICENSE-MIT"],
        "Proprietary": ["LICENSE-Proprietary"],
    },
}

# What tools leave behind in a local template that is worked on; cookiecutter copies it with the rest.
CACHES = ["__pycache__", ".ipynb_checkpoints", ".*_cache"]


def remove_what_was_not_chosen(answers: dict[str, str]) -> None:
    """Delete every path of the table that no chosen value asks for."""
    kept = {path for answer, values in ONLY_FOR.items() for path in values.get(answers[answer], [])}
    every = {path for values in ONLY_FOR.values() for paths in values.values() for path in paths}
    for path in sorted(every - kept):
        if os.path.isdir(path):
            remove_folder(path)
        else:
            os.unlink(path)


def remove_caches() -> None:
    """Delete what is no part of the template; what lies in hidden folders, such as .venv, is the user's."""
    for folder, children, _ in os.walk("."):
        for name in children:
            if any(fnmatch(name, pattern) for pattern in CACHES):
                remove_folder(os.path.join(folder, name))
        children[:] = [name for name in children if not name.startswith(".")]


def remove_folder(path: str) -> None:
    """Delete a folder with all that it holds."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def template_commit(answers: dict[str, str]) -> str:
    """The commit that this project is made from, with "-dirty" behind it if the template was edited since."""
    if "_commit" in answers:  # cruft says it, and does not say where its clone lies
        return str(answers["_commit"])
    # A relative path counts from where cookiecutter was started. A hook is not told where that is: try the
    # shell's folder and the output folder, which is the same by default.
    for start in (os.environ.get("PWD", "."), answers["_output_dir"]):
        template = os.path.join(start, answers["_repo_dir"])
        if all(os.path.exists(os.path.join(template, name)) for name in ("cookiecutter.json", ".git")):
            return describe(template)
    return "unknown"


def describe(repository: str) -> str:
    """git's name for the checked out commit; "unknown" without git or without a commit."""
    # Inside a git hook these variables point at another repository, and win over -C.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", repository, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def record_commit(commit: str) -> None:
    """Fill in template.commit; bytes, so that line ends stay as they are."""
    with open("project.yaml", "r+b") as settings:
        text = settings.read().replace(b'commit: ""', f'commit: "{commit}"'.encode(), 1)
        settings.seek(0)
        settings.write(text)


def main() -> None:
    """Finish the project in the current folder."""
    answers = json.loads(r"""{{ cookiecutter | jsonify }}""")
    remove_what_was_not_chosen(answers)
    remove_caches()
    os.replace(f"LICENSE-{answers['license']}", "LICENSE")
    record_commit(template_commit(answers))
    print(f"cd {answers['project_slug']}")
    print("make setup     # installs what the project needs, into .venv")
    print("make level0    # trains a model here, and writes HTML reports under runs/")


if __name__ == "__main__":
    main()
