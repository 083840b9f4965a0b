"""The project's git repository: current version, committed files, pre-commit hooks.

python -m project.git     create the repository if missing and install the hooks (`make setup`)
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from core.errors import run_command

# git sets these inside a hook. They are removed, so that git searches from the current folder.
HOOK_VARIABLES = {
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_PREFIX",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command; return code 127 if it is not installed."""
    kept = {name: value for name, value in os.environ.items() if name not in HOOK_VARIABLES}
    try:
        return subprocess.run(
            command,
            env=kept | {"LC_ALL": "C"},  # English messages: `install_hooks` compares one
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",  # file names may be in any encoding
            check=False,
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")


def version() -> str:
    """Return the current commit, with "-dirty" if files have changed; "unknown" without one."""
    done = run("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def remote() -> str:
    """Return the URL of origin without credentials; empty without a remote."""
    done = run("git", "remote", "get-url", "origin")
    return re.sub(r"(?<=://)[^/@]*@", "", done.stdout.strip()) if done.returncode == 0 else ""


def at_last_commit(path: Path) -> str | None:
    """Return the file's text in HEAD; None if HEAD does not have it."""
    done = run("git", "-C", str(path.parent), "show", f"HEAD:./{path.name}")
    return done.stdout if done.returncode == 0 else None


def install_hooks() -> str:
    """Create the repository if missing and install the hooks; return the problem, or ""."""
    top = run("git", "rev-parse", "--show-toplevel")
    if "not a git repository" in top.stderr:
        branch = run("git", "config", "init.defaultBranch").stdout.strip() or "main"
        created = run("git", "-c", f"init.defaultBranch={branch}", "init", "--quiet")
        top = created if created.returncode else run("git", "rev-parse", "--show-toplevel")
    if top.returncode:
        return top.stderr.strip().splitlines()[0]
    if not Path(top.stdout.strip()).samefile(Path.cwd()):
        return f"the project is inside the repository {top.stdout.strip()}"
    # pre-commit refuses to install its hooks while core.hooksPath is set.
    hooks_path = run("git", "config", "core.hooksPath").stdout.strip()
    if hooks_path:
        return f"git's core.hooksPath is set to {hooks_path}"
    done = run(sys.executable, "-m", "pre_commit", "install")
    return (done.stderr or done.stdout).strip().splitlines()[0] if done.returncode else ""


def main() -> None:
    """Install the hooks; print a problem without failing the setup."""
    if problem := install_hooks():
        print(f"note: the hooks are not installed: {problem}. `make lint` runs the same checks.")


if __name__ == "__main__":
    run_command(main)
