"""What `make lint` and the commit hooks check: one table for both. Each message says what, where and what to type next.

python -m level_0_manual.checks                          every check on every file of the project (SKIP=types,shell leaves some out)
python -m level_0_manual.checks [--fix] NAME [FILE …]    one check, as a hook calls it; --fix mends what is safe to mend
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from core.errors import UserError, run_command
from project import git

# Heavy packages are imported where they are used: each hook is a process of its own, and a commit should not wait.

# Files that a check leaves alone: a path as git names it, or a pattern.
EXCEPT: dict[str, tuple[str, ...]] = {
    "parse": (".vscode/*", ".devcontainer/*"),  # VS Code allows comments in its JSON
    "large": ("requirements/*.txt",),
    "secrets": (),
    "merge": (),
}
LARGEST = 1_000_000

SECRETS = (
    ("the key of a Google service account", re.compile(rb'"private_key(_id)?"\s*:\s*"[^"]')),
    (
        "a private key",
        re.compile(rb"-----BEGIN ([A-Z0-9]+ )*PRIVATE KEY( BLOCK)?-----|PuTTY-User-Key-File-\d"),
    ),
)
# Excluded files stay so, and no source is shown beside a finding: a line too long may be a key.
RUFF = ("--quiet", "--force-exclude", "--output-format=concise", "--")
KEY_STORES = (".p12", ".pfx", ".jks")
MARKER = re.compile(rb"^(<{7}|>{7}|\|{7}) ", re.MULTILINE)
SHELL = re.compile(rb"#!\s*/\S*\b(ba|da|k)?sh\b|#!\s*/usr/bin/env (-S )?(ba|da|k)?sh\b")

Find = Callable[[list[str]], list[str]]


class Check(NamedTuple):
    """Finds problems in files. `fix` mends them where that loses nothing, and returns what it did; the rest remains."""

    find: Find
    fix: Find | None = None


# ── notebooks ───────────────────────────────────────────────────────────────────────────────────────────────────────
def in_step(_files: list[str]) -> list[str]:
    """The four notebooks and their modules say the same."""
    return [str(pair) for pair in _notebooks().differences()]


def sync(_files: list[str]) -> list[str]:
    """Write the other half of a pair of which one half alone was edited."""
    return list(_notebooks().sync_edited())


def _notebooks() -> Any:
    """level_0_manual.notebooks, without a package that nbformat's validator would load for addresses alone: 1.4 s for each commit."""
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # None: "not installed", and it is optional
    from level_0_manual import notebooks

    return notebooks


def outputs(files: list[str]) -> list[str]:
    """Notebooks hold no outputs: these show data, and differ at every run."""
    return [f"{file}: holds outputs. Type: make strip" for file, _ in _with_outputs(files)]


def strip(files: list[str]) -> list[str]:
    """Remove the outputs."""
    mended = []
    for file, text in _with_outputs(files):
        Path(file).write_text(text, encoding="utf-8")
        mended.append(f"{file}: the outputs were removed. Next: git add {quote(file)}")
    return mended


def _with_outputs(files: list[str]) -> Iterator[tuple[str, str]]:
    """Each notebook with outputs, and its text without."""
    for file in files:
        if file.endswith(".ipynb"):
            try:
                notebook = json.loads(Path(file).read_text(encoding="utf-8"))
                found = _strip(notebook)
            except (ValueError, TypeError, AttributeError):
                continue  # no notebook; `parse` and `in-step` tell
            if found:
                yield file, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _strip(notebook: Any) -> bool:
    """Empty the outputs, and what goes with them; True when there were some."""
    found = (
        notebook.get("metadata", {}).pop("widgets", None) is not None
    )  # outputs too: the widgets' state
    for cell in notebook.get("cells", []):
        if cell.get("cell_type") == "code" and (
            cell.get("outputs") or cell.get("execution_count") is not None
        ):
            cell["outputs"], cell["execution_count"] = [], None
            cell.get("metadata", {}).pop("execution", None)
            found = True
    return found


# ── code ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def style(files: list[str]) -> list[str]:
    """Ruff's rules."""
    advice = "What a rule means: .venv/bin/ruff rule CODE. Type: make format (it mends some), and mend the rest"
    return _tool(["ruff", "check", *RUFF], _python(files), advice)


def layout(files: list[str]) -> list[str]:
    """Ruff's form of the code."""
    return _tool(["ruff", "format", "--check", *RUFF], _python(files), "Type: make format")


def types(_files: list[str]) -> list[str]:
    """Mypy; over all of src/, because a change here breaks a call there."""
    return _tool(
        ["mypy", "--no-pretty", "--no-error-summary"],
        None,
        "Mend what it says, then type: make lint",
    )


def shell(files: list[str]) -> list[str]:
    """Shell scripts, told by their name or their first line."""
    scripts = [
        file
        for file in files
        if file.endswith((".sh", ".bash")) or SHELL.match(Path(file).read_bytes()[:80])
    ]
    advice = "Mend what it says. What a number means: https://www.shellcheck.net/wiki/SC2086"
    return _tool(["shellcheck", "--external-sources", "--format=gcc", "--"], scripts, advice)


def dockerfiles(files: list[str]) -> list[str]:
    """Dockerfiles, told by their name."""
    found = [file for file in files if Path(file).name == "Dockerfile"]
    advice = "Mend what it says. What a code means: https://github.com/hadolint/hadolint/wiki"
    return _tool(["hadolint", "--no-color", "--"], found, advice)


def _python(files: list[str]) -> list[str]:
    return [file for file in files if file.endswith((".py", ".pyi"))]


def _tool(command: list[str], files: list[str] | None, advice: str) -> list[str]:
    """Run a program of this environment on files, if there are any (None: it knows which); its words, and what to do."""
    if files == []:
        return []
    program = Path(sys.executable).parent / command[0]
    try:
        done = subprocess.run(
            [program, *command[1:], *(files or [])], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UserError(f"{program} is missing. Type: make setup") from None
    said = "\n".join(filter(None, (done.stdout.strip(), done.stderr.strip())))
    return [f"{command[0]}:\n{said}\n{advice}"] if done.returncode else []


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def settings(_files: list[str]) -> list[str]:
    """project.yaml is complete and in its bounds."""
    from level_1_pipeline.vertex import gpu_jobs
    from project.settings import load_settings

    try:
        gpu_jobs.require_known(load_settings(""), Path())
    except UserError as error:
        return [f"{error}\nMend project.yaml; its comments say what is allowed"]
    return []


def parse(files: list[str]) -> list[str]:
    """YAML, TOML and JSON can be read."""
    return [problem for file in files if (problem := _unreadable(file))]


def _unreadable(file: str) -> str:
    kind = {"yaml": "YAML", "yml": "YAML", "toml": "TOML", "json": "JSON", "ipynb": "JSON"}.get(
        file.rpartition(".")[2]
    )
    if kind is None:
        return ""
    try:
        text = Path(file).read_text(encoding="utf-8")
        line, reason = {"YAML": _yaml_error, "TOML": _toml_error, "JSON": _json_error}[kind](
            text
        ) or (0, "")
    except UnicodeDecodeError:
        return f"{file}: is not UTF-8. Save it in that encoding"
    where = f"{file}:{line}" if line else file
    return (
        f"{where}: is not valid {kind}: {reason}. Mend it there or in the line above"
        if reason
        else ""
    )


def _yaml_error(text: str) -> tuple[int, str] | None:
    import yaml

    try:
        list(
            yaml.compose_all(text, Loader=yaml.SafeLoader)
        )  # the form alone: tags such as GitLab's !reference are fine
    except yaml.MarkedYAMLError as error:
        return (error.problem_mark.line + 1 if error.problem_mark else 0), str(error.problem)
    except yaml.YAMLError as error:
        return 0, str(error).splitlines()[0]
    return None


def _toml_error(text: str) -> tuple[int, str] | None:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        return (int(line[1]) if line else 0), str(error)
    return None


def _json_error(text: str) -> tuple[int, str] | None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.lineno, error.msg
    return None


def large(files: list[str]) -> list[str]:
    """No large file: git keeps each version of it for ever, in every clone."""
    return [
        f"{file}: has {size / 1e6:.1f} MB, and more than {LARGEST / 1e6:.0f} MB would stay in every clone for ever. "
        f"Move it to data/ (not in git) or a bucket, then type: git rm --cached {quote(file)}\n"
        "If it must be here, add it to EXCEPT['large'] in level_0_manual/checks.py"
        for file in files
        if (size := Path(file).stat().st_size) > LARGEST
    ]


def secrets(files: list[str]) -> list[str]:
    """No private key; its text is never shown."""
    return [
        f"{file}{place}: holds {kind}. Take it out of git: git rm --cached {quote(file)}\n"
        "If it was ever pushed, disable it and make a new one. If it opens nothing (an example's), "
        "add the file to EXCEPT['secrets'] in level_0_manual/checks.py"
        for file in files
        for place, kind in _secrets(file)
    ]


def _secrets(file: str) -> list[tuple[str, str]]:
    """The first secret: the line, and what it is."""
    if file.endswith(KEY_STORES):
        return [("", "private keys (it is a key store)")]
    content = Path(file).read_bytes()
    found = [(line, kind) for kind, pattern in SECRETS for line in _lines(pattern, content)[:1]]
    return [(f":{line}", kind) for line, kind in found[:1]]


def merge(files: list[str]) -> list[str]:
    """No conflict of a merge is left."""
    return [
        f"{file}:{line}: an unresolved merge conflict. Keep one side, remove the marker lines, then type: git add {quote(file)}"
        for file in files
        for line in _lines(MARKER, Path(file).read_bytes())[:1]
    ]


def _lines(pattern: re.Pattern[bytes], content: bytes) -> list[int]:
    """The numbers of the lines where the pattern matches."""
    return [content.count(b"\n", 0, match.start()) + 1 for match in pattern.finditer(content)]


# ── all ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
# The hooks' ids in .pre-commit-config.yaml, in their order: a file that cannot be read comes before what reads it.
CHECKS = {
    "secrets": Check(secrets),
    "large": Check(large),
    "merge": Check(merge),
    "parse": Check(parse),
    "settings": Check(settings),
    "outputs": Check(outputs, strip),
    "in-step": Check(in_step, sync),
    "style": Check(style),
    "layout": Check(layout),
    "types": Check(types),
    "shell": Check(shell),
    "dockerfiles": Check(dockerfiles),
}


def project_files() -> list[str]:
    """What git has or would take; without git, or in an ignored folder, every file that .gitignore does not name."""
    return git.files() or sorted(_walk(Path(), _ignored_names()))


def _ignored_names() -> list[str]:
    """.gitignore's patterns; its finer points (negation, **) need git."""
    path = Path(".gitignore")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [
        ".git",
        *(line.strip().rstrip("/") for line in lines if line.strip() and not line.startswith("#")),
    ]


def _walk(folder: Path, ignored: list[str]) -> Iterator[str]:
    for path in folder.iterdir():
        if any(
            fnmatch(path.name, name) or fnmatch(f"/{path.as_posix()}", name) for name in ignored
        ):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, ignored)
        else:
            yield path.as_posix()


def selected(name: str, files: Iterable[str]) -> list[str]:
    """Those of the files that a check looks at."""
    present = [file for file in files if Path(file).is_file() and not Path(file).is_symlink()]
    return [
        file
        for file in present
        if not any(fnmatch(file, pattern) for pattern in EXCEPT.get(name, ()))
    ]


def problems(name: str, files: Iterable[str]) -> list[str]:
    """What one check finds in these files."""
    try:
        return CHECKS[name].find(selected(name, files))
    except UserError as error:
        return [str(error)]


def fix(name: str, files: Iterable[str]) -> None:
    """Mend what is safe to mend, and say so. pre-commit itself stops the commit when a hook changed a file.

    Raises:
        UserError: something remains.
    """
    mend = CHECKS[name].fix
    if mend:
        print("\n".join(mend(selected(name, files))) or "nothing to mend")
    report(problems(name, files))


def report(found: list[str]) -> None:
    """Raises UserError when there are problems."""
    if found:
        raise UserError("\nerror: ".join(found))


def lint() -> None:
    """Every check on every file.

    Raises:
        UserError: the problems of all checks, or SKIP names none.
    """
    asked = [name for name in os.environ.get("SKIP", "").split(",") if name]
    if unknown := [name for name in asked if name not in CHECKS]:
        raise UserError(
            f"SKIP: there is no check {', '.join(unknown)}; there are {', '.join(CHECKS)}."
        )
    skipped = [name for name in CHECKS if name in asked]
    files = project_files()
    report([problem for name in CHECKS if name not in skipped for problem in problems(name, files)])
    left_out = f"; skipped, as SKIP says: {', '.join(skipped)}" if skipped else ""
    print(f"{len(CHECKS) - len(skipped)} checks passed on {len(files)} files{left_out}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m level_0_manual.checks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("name", nargs="?", choices=CHECKS)
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("--fix", action="store_true")
    arguments = parser.parse_args()
    if not Path("project.yaml").is_file():
        raise UserError(
            f"no project.yaml in {Path.cwd()}. Go to the project's folder first: cd YOUR-PROJECT"
        )
    if not arguments.name:
        lint()
    elif arguments.fix:
        fix(arguments.name, arguments.files or project_files())
    else:
        report(problems(arguments.name, arguments.files or project_files()))


if __name__ == "__main__":
    run_command(main)
