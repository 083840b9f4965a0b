"""git, where there is one: the project's files, what the last commit holds, and the hooks of .pre-commit-config.yaml.

python -m project.git     make the repository if there is none, and install the hooks; `make setup` calls it
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from core.errors import run_command

# A hook is told by these where its repository is; the project's own is found from its folder.
LOCATION = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_PREFIX",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
)
INSTEAD = "`make lint` checks the same at any time."


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the current folder; exit code 127 when it is not installed."""
    environment = {name: value for name, value in os.environ.items() if name not in LOCATION} | {
        "LC_ALL": "C"
    }
    try:
        # Names of files may be in any encoding, and must come out as they came in.
        return subprocess.run(
            command,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            check=False,
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")


def files() -> list[str]:
    """What git has or would take, below the current folder; nothing without git, or where a repository above ignores it."""
    done = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return sorted(set(done.stdout.split("\0")) - {""}) if done.returncode == 0 else []


def version() -> str:
    """The commit that the code is at, with "-dirty" behind it when files were edited since; "unknown" without one."""
    done = run("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def remote() -> str:
    """Where the repository is kept, without a password in it; empty when that is nowhere but here."""
    done = run("git", "remote", "get-url", "origin")
    return re.sub(r"(?<=://)[^/@]*@", "", done.stdout.strip()) if done.returncode == 0 else ""


def at_last_commit(path: Path) -> str | None:
    """The file's text in HEAD; None when there is no git, no commit, or no such file in it."""
    done = run("git", "-C", str(path.parent), "show", f"HEAD:./{path.name}")
    return done.stdout if done.returncode == 0 else None


def install_hooks() -> str:
    """Make the repository where there is none, install the hooks; returns what a person should know, mostly nothing."""
    found = run("git", "rev-parse", "--show-toplevel")
    if found.returncode == 127:
        return f"git is not installed, so no commit is checked. {INSTEAD}"
    if found.returncode and "not a git repository" in found.stderr:
        branch = run("git", "config", "init.defaultBranch").stdout.strip() or "main"
        found = run("git", "-c", f"init.defaultBranch={branch}", "init", "--quiet")
        found = found if found.returncode else run("git", "rev-parse", "--show-toplevel")
    if found.returncode:
        return f"the hooks are not installed: {_first_line(found)} {INSTEAD}"
    if not Path(found.stdout.strip()).samefile(Path.cwd()):
        return (
            f"the hooks are not installed: the project lies in the repository {found.stdout.strip()}, "
            f"and they would run for all of it. {INSTEAD}"
        )
    other = run("git", "config", "core.hooksPath").stdout.strip()
    if other:
        return f"the hooks are not installed: git's core.hooksPath says that they are in {other}. {INSTEAD}"
    done = run(sys.executable, "-m", "pre_commit", "install")
    return f"the hooks are not installed: {_first_line(done)} {INSTEAD}" if done.returncode else ""


def _first_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[0] if lines else f"exit code {done.returncode}."


def main() -> None:
    """Command line; what hinders is told, and never stops a setup."""
    message = install_hooks()
    if message:
        print(f"note: {message}")


if __name__ == "__main__":
    run_command(main)
