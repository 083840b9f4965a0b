"""The notebooks of level 0 and their twins in src/trainer: kept in step.

python -m level_0_manual.notebooks check                            are the pairs in step?
python -m level_0_manual.notebooks sync                             write each pair's other half from the one edited since HEAD
python -m level_0_manual.notebooks sync --from notebook [NAME …]    write the modules from the notebooks
python -m level_0_manual.notebooks sync --from module [NAME …]      write the notebooks from the modules

What counts is what the files of the working tree say, never their dates. In a commit hook pre-commit has put aside what
is not staged, so the working tree is then what will be committed.
"""

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Literal, NamedTuple, get_args

# jsonschema, which nbformat takes, would build a grammar of all web addresses for a second: no notebook holds one to check.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

import jupytext  # noqa: E402
import nbformat  # noqa: E402

from core.errors import UserError, run_command  # noqa: E402
from core.paths import project_root  # noqa: E402
from project import git  # noqa: E402

ORDER = ("data", "model", "train", "evaluate")
Half = Literal["notebook", "module"]
HALVES: tuple[Half, ...] = get_args(Half)

# Written into both halves of a pair. Each file is paired by name: a rule for the whole folder would turn every scratch
# notebook that lies in it into a module.
PAIRING = {
    "cell_markers": '"""',
    "cell_metadata_filter": "tags,-all",
    "formats": "level_0_manual///ipynb,src/trainer///py:percent",
    "notebook_metadata_filter": "jupytext,-jupytext.text_representation.jupytext_version,-kernelspec,-language_info",
}
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def notebook_path(name: str) -> Path:
    """level_0_manual/NAME.ipynb"""
    return project_root() / "level_0_manual" / f"{name}.ipynb"


def module_path(name: str) -> Path:
    """src/trainer/NAME.py"""
    return project_root() / "src" / "trainer" / f"{name}.py"


def as_module(notebook: nbformat.NotebookNode) -> str:
    """The notebook as the text of its module."""
    cells = [nbformat.from_dict({**cell, "metadata": _tags(cell)}) for cell in notebook.cells]
    twin = nbformat.v4.new_notebook(cells=cells, metadata={"jupytext": dict(PAIRING)})
    return str(jupytext.writes(twin, fmt="py:percent"))


def as_notebook(module: str) -> nbformat.NotebookNode:
    """The module's text as a notebook without outputs; cells are named by their content, so the same text gives the same file."""
    twin = jupytext.reads(module, fmt="py:percent")
    seen: set[str] = set()
    for cell in twin.cells:
        cell.metadata = _tags(cell)
        name = hashlib.sha256(f"{cell.cell_type} {cell.source}".encode()).hexdigest()[:8]
        while name in seen:
            name = hashlib.sha256(name.encode()).hexdigest()[:8]
        seen.add(name)
        cell.id = name
    twin.metadata = {
        "jupytext": dict(PAIRING),
        "kernelspec": KERNEL,
        "language_info": {"name": "python"},
    }
    twin.nbformat, twin.nbformat_minor = 4, 5
    return twin


def _tags(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    return nbformat.from_dict({"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {})


def other(half: Half) -> Half:
    """The other half."""
    return "module" if half == "notebook" else "notebook"


def half_path(name: str, half: Half) -> Path:
    """Where a half of a pair lies."""
    return notebook_path(name) if half == "notebook" else module_path(name)


def shown(name: str, half: Half) -> str:
    """A half's path for messages, and for git."""
    return half_path(name, half).relative_to(project_root()).as_posix()


def code(half: Half, text: str) -> str:
    """What counts of a half's text. Outputs, cell ids and other metadata do not.

    A module goes by way of a notebook too: how many empty lines stand between two cells is no difference.
    """
    return as_module(jupytext.reads(text, fmt="ipynb") if half == "notebook" else as_notebook(text))


def current_code(name: str, half: Half) -> str | None:
    """What counts of a half as it lies here; None when it is missing."""
    try:
        return code(half, half_path(name, half).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except Exception as error:  # nbformat and jupytext raise many kinds
        raise UserError(
            f"{shown(name, half)} cannot be read as a {half}: {error}. "
            f"Mend it, or make it anew from its {other(half)}: make sync FROM={other(half)} PAIR={name}"
        ) from None


def out_of_step() -> list[str]:
    """Names of the pairs whose halves differ, or of which one is missing."""
    return [name for name in ORDER if not _in_step(name)]


def _in_step(name: str) -> bool:
    notebook = current_code(name, "notebook")
    return notebook is not None and notebook == current_code(name, "module")


_seen: dict[Path, bytes] = {}  # the modules as they were when this kernel first looked


def require_in_step() -> None:
    """Raises UserError when training would use code that nobody sees here.

    That is so when a notebook and its module differ, and when a module was changed since this kernel has loaded it.
    """
    for path in sorted(module_path("data").parent.glob("*.py")):
        first = _seen.setdefault(path, path.read_bytes())
        if first != path.read_bytes() and f"trainer.{path.stem}" in sys.modules:
            raise UserError(
                f"src/trainer/{path.name} was changed since this kernel loaded it. "
                "Choose Kernel ▸ Restart Kernel and Run All Cells."
            )
    differing = out_of_step()
    if differing:
        raise UserError(
            f"not in step: {', '.join(f'level_0_manual/{n}.ipynb and src/trainer/{n}.py' for n in differing)}. "
            "Which side is right? In a terminal, type `make sync FROM=notebook` or `make sync FROM=module`, "
            "then restart this notebook's kernel."
        )


def edited_half(name: str) -> Half | None:
    """The one half that says something else than in the last commit; None when both do, or when that cannot be told."""
    before = {half: _committed_code(name, half) for half in HALVES}
    now = {half: current_code(name, half) for half in HALVES}
    if None in now.values() or before["notebook"] is None or before["notebook"] != before["module"]:
        return None
    edited = [half for half in HALVES if now[half] != before[half]]
    return edited[0] if len(edited) == 1 else None


def _committed_code(name: str, half: Half) -> str | None:
    text = git.at_last_commit(half_path(name, half))
    try:
        return None if text is None else code(half, text)
    except Exception:  # nbformat and jupytext raise many kinds; a damaged file decides nothing
        return None


class Difference(NamedTuple):
    """A pair that is out of step, and the half that alone was edited, if there is one."""

    name: str
    edited: Half | None

    def __str__(self) -> str:
        """What is wrong and what to type, for this pair alone: another pair's right half may be the other one."""
        notebook, module = shown(self.name, "notebook"), shown(self.name, "module")
        if self.edited:
            only = shown(self.name, self.edited)
            return f"{notebook} and {module} differ: only {only} was edited since the last commit. Type: make sync"
        for half in HALVES:
            if not half_path(self.name, half).is_file():
                return f"{shown(self.name, half)} is missing. Type: make sync FROM={other(half)} PAIR={self.name}"
        return (
            f"{notebook} and {module} differ, and git does not tell which one is right: both were edited since the last "
            "commit, or none has them in step.\n"
            f"If the notebook is right, type: make sync FROM=notebook PAIR={self.name}\n"
            f"If the module is right, type:   make sync FROM=module PAIR={self.name}"
        )


def differences(names: list[str] | None = None) -> list[Difference]:
    """The pairs that are out of step, or those of them that are named."""
    return [
        Difference(name, edited_half(name)) for name in out_of_step() if name in (names or ORDER)
    ]


def sync_edited(names: list[str] | None = None) -> list[str]:
    """Write the other half of each pair of which one half alone was edited; no edit is lost. Returns what was written.

    Raises:
        UserError: pairs remain that a person must decide; they are left as they are.
    """
    found = differences(names)
    written = [_write(pair.name, pair.edited) for pair in found if pair.edited]
    undecided = [str(pair) for pair in found if not pair.edited]
    if undecided:
        raise UserError("\n".join([*undecided, *written]))
    return written


def sync(source: Half, names: list[str] | None = None) -> list[str]:
    """Write the other half of each pair that is out of step, or of those named; returns the names of those written."""
    right = {name: current_code(name, source) for name in names or ORDER}
    for name, wanted in right.items():
        if wanted is None:
            raise UserError(
                f"{shown(name, source)} is not there. `make sync FROM={other(source)}` makes it."
            )
    differing = [
        name for name, wanted in right.items() if wanted != _readable_code(name, other(source))
    ]
    for name in differing:
        _write(name, source)
    return differing


def _readable_code(name: str, half: Half) -> str | None:
    try:
        return current_code(name, half)
    except UserError:  # damaged, as by a merge: it is written anew
        return None


def _write(name: str, source: Half) -> str:
    """Write a pair's other half; returns what was done and what to type next."""
    text, target = (
        half_path(name, source).read_text(encoding="utf-8"),
        half_path(name, other(source)),
    )
    if source == "notebook":
        target.write_text(as_module(jupytext.reads(text, fmt="ipynb")), encoding="utf-8")
    else:
        target.write_text(nbformat.writes(as_notebook(text)) + "\n", encoding="utf-8")
    written, right = shown(name, other(source)), shown(name, source)
    return f"{written} was written from {right}. Next: git add {right} {written}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m level_0_manual.notebooks", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check")
    syncing = commands.add_parser("sync")
    syncing.add_argument("--from", dest="source", choices=HALVES)
    syncing.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ORDER))
    arguments = parser.parse_args()
    if arguments.command == "check":
        require_in_step()
        print(f"{len(ORDER)} notebooks are in step with their modules")
        return
    names = _known(arguments.names)
    if arguments.source is None:
        print("\n".join(sync_edited(names)) or "already in step")
    else:
        written = sync(arguments.source, names)
        print(
            f"{other(arguments.source)}s written: {', '.join(written)}"
            if written
            else "already in step"
        )


def _known(names: list[str]) -> list[str]:
    for name in names:
        if name not in ORDER:
            raise UserError(f"PAIR: there is no pair '{name}'; there are {', '.join(ORDER)}.")
    return names


if __name__ == "__main__":
    run_command(main)
