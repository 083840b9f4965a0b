"""Check what is installed on this machine, level by level.

Standard library only, Python 3.9 or newer, because it runs before anything is installed.

python3 src/project/doctor.py            everything
python3 src/project/doctor.py python     only the Python version; exit code 2 if too old
"""

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OLDEST_PYTHON = (3, 11)
DISK_GB = 4
START_DOCKER = "start Docker Desktop, or run `sudo systemctl start docker`"


class Check(NamedTuple):
    """A check: `find` returns a description or None, `get` has install commands by system.

    `start` is the command if the program is installed but does not respond.
    """

    level: int
    name: str
    purpose: str
    find: Callable[[], "str | None"]
    get: "dict[str, str]"
    needed: bool = True
    start: str = ""


def version_of(*command: str) -> Callable[[], "str | None"]:
    """Return a function for the first line of a command's output; None if the command fails."""

    def find() -> "str | None":
        if shutil.which(command[0]) is None:
            return None
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.SubprocessError):
            return None
        lines = (done.stdout or done.stderr).strip().splitlines()
        return lines[0] if done.returncode == 0 and lines else None

    return find


def python() -> "str | None":
    """Return the version of this Python if it is new enough."""
    return f"Python {platform.python_version()}" if sys.version_info[:2] >= OLDEST_PYTHON else None


def disk() -> "str | None":
    """Return the free disk space if there are at least DISK_GB."""
    free = shutil.disk_usage(ROOT).free / 1e9
    return f"{free:.0f} GB free" if free >= DISK_GB else None


def environment() -> "str | None":
    """Return torch's version if the environment is at least as new as the lock file."""
    ready, lock = ROOT / ".venv" / ".ready", ROOT / "requirements" / "dev.txt"
    if not ready.is_file() or ready.stat().st_mtime < lock.stat().st_mtime:
        return None
    return version_of(
        str(ROOT / ".venv" / "bin" / "python"),
        "-c",
        "import torch; print('torch', torch.__version__)",
    )()


def accelerator() -> "str | None":
    """Return the name of the GPU, if any."""
    # torch is installed in .venv; this file may run with another Python.
    code = (
        "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() "
        "else 'Apple MPS' if torch.backends.mps.is_available() else '')"
    )
    python = ROOT / ".venv" / "bin" / "python"
    return (version_of(str(python), "-c", code)() if python.exists() else None) or None


def anywhere(text: str) -> "dict[str, str]":
    """Return the same advice for every system."""
    return dict.fromkeys(("linux", "macos", "wsl"), text)


CHECKS = (
    Check(
        0,
        "python",
        "runs everything",
        python,
        {
            "linux": "sudo apt install python3.11 python3.11-venv (or newer), then: make setup PYTHON=python3.11",
            "macos": "brew install python@3.12, then: make setup PYTHON=python3.12",
            "wsl": "sudo apt install python3.11 python3.11-venv (or newer), then: make setup PYTHON=python3.11",
        },
    ),
    Check(
        0,
        "git",
        "keeps versions",
        version_of("git", "--version"),
        {
            "linux": "sudo apt install git",
            "macos": "xcode-select --install",
            "wsl": "sudo apt install git",
        },
    ),
    Check(
        0,
        "make",
        "runs the tasks",
        version_of("make", "--version"),
        {
            "linux": "sudo apt install make",
            "macos": "xcode-select --install",
            "wsl": "sudo apt install make",
        },
    ),
    Check(
        0,
        "disk",
        f"the environment takes about 2 GB; {DISK_GB} GB should be free",
        disk,
        anywhere("free some space"),
    ),
    Check(
        0, "environment", "packages as locked, torch with them", environment, anywhere("make setup")
    ),
    Check(
        0,
        "accelerator",
        "trains faster; not needed",
        accelerator,
        {
            "linux": "with an NVIDIA GPU: make setup TORCH=auto",
            "macos": "-",
            "wsl": "with an NVIDIA GPU: make setup TORCH=auto",
        },
        needed=False,
    ),
    Check(
        1,
        "docker",
        "runs the steps as containers",
        version_of("docker", "info", "--format", "Docker engine {{.ServerVersion}}"),
        {
            "linux": "https://docs.docker.com/engine/install, then: sudo usermod -aG docker $USER",
            "macos": "https://docs.docker.com/desktop/setup/install/mac-install, then start it",
            "wsl": "Docker Desktop on Windows, with WSL integration switched on",
        },
        needed=False,
        start=START_DOCKER,
    ),
    Check(
        1,
        "gcloud",
        "logs in to Google Cloud, and makes the bucket and the repository",
        version_of("gcloud", "--version"),
        anywhere("https://cloud.google.com/sdk/docs/install"),
        needed=False,
    ),
    Check(
        2,
        "terraform",
        "makes the cloud's resources",
        version_of("terraform", "version"),
        anywhere("https://developer.hashicorp.com/terraform/install"),
        needed=False,
    ),
)
LEVELS = (
    "Level 0, notebooks on this machine; and level 1, the pipeline on this machine",
    "Level 1 in containers, and in the cloud by hand (is the cloud ready? make doctor LEVEL=1)",
    "Level 2, git push to production (is the cloud ready? make doctor LEVEL=2)",
)


def system() -> str:
    """Return linux, macos or wsl."""
    if sys.platform == "darwin":
        return "macos"
    return "wsl" if "microsoft" in platform.release().lower() else "linux"


def report(checks: "tuple[Check, ...]" = CHECKS) -> bool:
    """Print the result of each check; return whether all that level 0 needs is installed."""
    complete = True
    level = -1
    for check in checks:
        if check.level != level:
            level = check.level
            print(f"\n{LEVELS[level]}")
        found = check.find()
        complete = complete and (found is not None or not check.needed)
        if found:
            print(f"  ✓ {check.name:<12} {found}")
        else:
            sign = "✗" if check.needed else "·"
            # Installed but not working, such as a stopped Docker daemon: start it.
            there = check.start and shutil.which(check.name)
            problem, mend = (
                ("does not respond", check.start)
                if there
                else ("missing", f"get it: {check.get[system()]}")
            )
            print(f"  {sign} {check.name:<12} {problem}: {check.purpose}\n      {mend}")
    print(
        "\nLevels 0 and 1 can start on this machine."
        if complete
        else "\nSome checks of level 0 failed (✗)."
    )
    return complete


def main() -> None:
    """Run the command line; exit with 2 if a required check fails."""
    if sys.argv[1:] == ["python"]:
        check = CHECKS[0]
        if check.find() is None:
            wanted = ".".join(map(str, OLDEST_PYTHON))
            print(
                f"error: Python {wanted} or newer is needed, this is {platform.python_version()}.",
                file=sys.stderr,
            )
            print(f"       get it: {check.get[system()]}", file=sys.stderr)
            sys.exit(2)
    elif len(sys.argv) > 1:
        sys.exit(
            f"error: LEVEL={sys.argv[1]}: expected 1 or 2; without LEVEL, this machine is checked."
        )
    elif not report():
        sys.exit(2)


if __name__ == "__main__":
    main()
