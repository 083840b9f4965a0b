"""Finish a new project: delete the files of other choices and write .cruft.json.

`cruft update` runs this hook in a temporary folder: use only the answers and the template.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

# Question, choice: the files and folders that only this choice needs.
ONLY_FOR = {
    ("ci", "github-actions"): [".github"],
    ("ci", "gitlab"): [".gitlab-ci.yml"],
    ("ci", "azure-devops"): ["level_2_cicd/azure-pipelines.yml", "level_2_cicd/azure-submit.yml"],
    ("license", "Apache-2.0"): ["LICENSE-Apache-2.0"],
    ("license", "MIT"): ["LICENSE-MIT"],
    ("license", "Proprietary"): ["LICENSE-Proprietary"],
}
# Tools leave these in a local template; cookiecutter copies them with the rest.
CACHES = ["__pycache__", ".ipynb_checkpoints", ".*_cache"]


def delete_caches() -> None:
    """Delete the tools' caches, but nothing in hidden folders such as .venv: they are the user's."""
    for folder, children, _ in os.walk("."):
        for name in children:
            if any(fnmatch(name, pattern) for pattern in CACHES):
                shutil.rmtree(Path(folder, name))
        children[:] = [name for name in children if not name.startswith(".")]


def git(repository: Path, *arguments: str) -> str:
    """Return git's output; empty if git fails or is not installed."""
    # In a git hook these variables name another repository, and git prefers them to -C.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(repository), *arguments]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def write_cruft_file(answers: dict[str, str]) -> None:
    """Write what `cruft update` reads, unless the template is not a git repository."""
    # A relative path starts where cookiecutter was started, which a hook does not know: try the
    # shell's folder and the output folder, which is the same by default.
    starts = (os.environ.get("PWD", "."), answers["_output_dir"])
    folders = [Path(start, answers["_repo_dir"]).resolve() for start in starts]
    folders = [f for f in folders if (f / ".git").exists() and (f / "cookiecutter.json").exists()]
    commit = git(folders[0], "rev-parse", "HEAD") if folders else ""
    if not commit:
        return
    address = str(folders[0])
    if answers["_template"] != answers["_repo_dir"]:  # cookiecutter cloned it
        address = git(folders[0], "remote", "get-url", "origin")
        address = re.sub(r"^(https?://)[^/@]+@", r"\1", address)  # without a password
    context = {name: value for name, value in answers.items() if not name.startswith("_")}
    context.update(_template=address, _commit=commit)
    state = {"template": address, "commit": commit, "checkout": answers["_checkout"]}
    state.update(context={"cookiecutter": context}, directory=None)
    Path(".cruft.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Finish the project in the current folder."""
    answers = json.loads(r"""{{ cookiecutter | jsonify }}""")  # see pre_gen_project.py
    for (question, choice), paths in ONLY_FOR.items():
        for path in paths if answers[question] != choice else []:
            delete = shutil.rmtree if Path(path).is_dir() else Path.unlink
            delete(Path(path))
    Path(f"LICENSE-{answers['license']}").replace("LICENSE")
    delete_caches()
    if "_commit" in answers:  # cruft runs this hook, and writes .cruft.json itself
        return
    write_cruft_file(answers)
    print(f"cd {answers['project_slug']}")
    print("make setup     # installs the project's packages into .venv")
    print("make level0    # trains a model and writes HTML reports to runs/")


if __name__ == "__main__":
    main()
