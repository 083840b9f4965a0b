"""Keep the four notebooks and their twins in src/trainer in sync.

python -m level_0_manual.notebooks check                          compare all pairs
python -m level_0_manual.notebooks sync                           update the half not edited since HEAD
python -m level_0_manual.notebooks sync --from module [NAME …]    write the notebooks (or: notebook)

Contents decide, never modification times. pre-commit stashes what is not staged before it runs a
hook, so there the working tree is what will be committed.
"""

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Literal, get_args

# nbformat's validator would load a grammar of URLs for a second; no notebook has one to check.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

import jupytext  # noqa: E402
import nbformat  # noqa: E402

from core.errors import UserError, run_command  # noqa: E402
from core.paths import project_root  # noqa: E402
from project import git  # noqa: E402

ORDER = ("data", "model", "train", "evaluate")
Half = Literal["notebook", "module"]
HALVES: tuple[Half, ...] = get_args(Half)
OTHER: dict[Half, Half] = {"notebook": "module", "module": "notebook"}

# In both halves of a pair. Each file is paired by name: a rule for the whole folder would turn
# every scratch notebook in it into a module.
PAIRING = {
    "cell_markers": '"""',
    "cell_metadata_filter": "tags,-all",
    "formats": "level_0_manual///ipynb,src/trainer///py:percent",
    "notebook_metadata_filter": (
        "jupytext,-jupytext.text_representation.jupytext_version,-kernelspec,-language_info"
    ),
}
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def notebook_path(name: str) -> Path:
    """level_0_manual/NAME.ipynb"""
    return project_root() / "level_0_manual" / f"{name}.ipynb"


def module_path(name: str) -> Path:
    """src/trainer/NAME.py"""
    return project_root() / "src" / "trainer" / f"{name}.py"


def half_path(name: str, half: Half) -> Path:
    """The file of one half of a pair."""
    return notebook_path(name) if half == "notebook" else module_path(name)


def display_path(name: str, half: Half) -> str:
    """The same path relative to the project's root, for messages and git."""
    return half_path(name, half).relative_to(project_root()).as_posix()


# ── conversion ──────────────────────────────────────────────────────────────────────────────────
def as_module(notebook: nbformat.NotebookNode) -> str:
    """Convert a notebook to its module's text."""
    cells = [nbformat.from_dict({**cell, "metadata": _tags(cell)}) for cell in notebook.cells]
    twin = nbformat.v4.new_notebook(cells=cells, metadata={"jupytext": dict(PAIRING)})
    return str(jupytext.writes(twin, fmt="py:percent"))


def as_notebook(module: str) -> nbformat.NotebookNode:
    """Convert a module's text to a notebook without outputs."""
    twin = jupytext.reads(module, fmt="py:percent")
    ids: set[str] = set()
    for cell in twin.cells:
        cell.metadata = _tags(cell)
        # Ids follow from the content, so that the same module always gives the same file.
        cell.id = hashlib.sha256(f"{cell.cell_type} {cell.source}".encode()).hexdigest()[:8]
        while cell.id in ids:
            cell.id = hashlib.sha256(cell.id.encode()).hexdigest()[:8]
        ids.add(cell.id)
    language = {"name": "python"}
    twin.metadata = {
        "jupytext": dict(PAIRING),
        "kernelspec": KERNEL,
        "language_info": language,
    }
    twin.nbformat, twin.nbformat_minor = 4, 5
    return twin


def _tags(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    return nbformat.from_dict({"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {})


def code(half: Half, text: str) -> str:
    """A half's text without outputs, cell ids, metadata and the blank lines between cells."""
    return as_module(jupytext.reads(text, fmt="ipynb") if half == "notebook" else as_notebook(text))


def current_code(name: str, half: Half) -> str | None:
    """The code of a half in the working tree; None if the file is missing."""
    try:
        return code(half, half_path(name, half).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except Exception as error:  # nbformat and jupytext raise many kinds
        raise UserError(
            f"{display_path(name, half)}: not a valid {half}: {error}. "
            f"Fix it, or rewrite it: make sync FROM={OTHER[half]} PAIR={name}"
        ) from None


# ── comparison ──────────────────────────────────────────────────────────────────────────────────
def out_of_sync() -> list[str]:
    """The pairs whose halves differ, or of which one is missing."""
    return [
        name
        for name in ORDER
        if (notebook := current_code(name, "notebook")) is None
        or notebook != current_code(name, "module")
    ]


_loaded: dict[Path, bytes] = {}  # the modules as they were when this kernel first looked


def require_in_sync() -> None:
    """Stop a notebook that would train other code than it shows.

    That is so if a notebook and its module differ, or if a module changed after this kernel
    imported it.
    """
    for path in sorted(module_path("data").parent.glob("*.py")):
        content = path.read_bytes()
        if _loaded.setdefault(path, content) != content and f"trainer.{path.stem}" in sys.modules:
            raise UserError(
                f"src/trainer/{path.name} has changed since this kernel imported it. "
                "Choose Kernel ▸ Restart Kernel and Run All Cells."
            )
    names = out_of_sync()
    if names:
        pairs = ", ".join(f"level_0_manual/{n}.ipynb and src/trainer/{n}.py" for n in names)
        raise UserError(
            f"not in sync: {pairs}. In a terminal, run `make sync FROM=notebook` or "
            "`make sync FROM=module`, then restart this notebook's kernel."
        )


def edited_half(name: str) -> Half | None:
    """The half that alone differs from the last commit; None if both or neither do."""
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
    except Exception:  # a damaged file in HEAD decides nothing
        return None


def undecided_message(name: str) -> str:
    """Which command settles a pair that cannot be synchronized automatically."""
    for half in HALVES:
        if not half_path(name, half).is_file():
            command = f"make sync FROM={OTHER[half]} PAIR={name}"
            return f"{display_path(name, half)} is missing. Run {command}"
    return (
        f"{display_path(name, 'notebook')} and {display_path(name, 'module')} differ, and both "
        "were edited since the last commit, or there is no commit.\n"
        f"To keep the notebook: make sync FROM=notebook PAIR={name}\n"
        f"To keep the module:   make sync FROM=module PAIR={name}"
    )


# ── writing ─────────────────────────────────────────────────────────────────────────────────────
def sync_edited(names: list[str] | None = None) -> list[str]:
    """Update the other half of each pair of which one half was edited; return messages."""
    messages, undecided = [], []
    for name in out_of_sync():
        if names and name not in names:
            continue
        half = edited_half(name)
        if half:
            messages.append(_write(name, half))
        else:
            undecided.append(undecided_message(name))
    if undecided:
        raise UserError("\n".join([*undecided, *messages]))
    return messages


def sync(source: Half, names: list[str] | None = None) -> list[str]:
    """Write the other half of each pair that is out of sync; return the names."""
    sources = {name: current_code(name, source) for name in names or ORDER}
    for name, text in sources.items():
        if text is None:
            raise UserError(
                f"{display_path(name, source)} is missing. "
                f"`make sync FROM={OTHER[source]}` writes it."
            )
    stale = [name for name, text in sources.items() if text != _readable_code(name, OTHER[source])]
    for name in stale:
        _write(name, source)
    return stale


def _readable_code(name: str, half: Half) -> str | None:
    try:
        return current_code(name, half)
    except UserError:  # damaged, for example by a merge: it is rewritten
        return None


def _write(name: str, source: Half) -> str:
    target = half_path(name, OTHER[source])
    text = half_path(name, source).read_text(encoding="utf-8")
    if source == "notebook":
        target.write_text(as_module(jupytext.reads(text, fmt="ipynb")), encoding="utf-8")
    else:
        target.write_text(nbformat.writes(as_notebook(text)) + "\n", encoding="utf-8")
    written, read = display_path(name, OTHER[source]), display_path(name, source)
    return f"{written} was written from {read}. Next: git add {read} {written}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m level_0_manual.notebooks")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="compare all pairs")
    syncing = commands.add_parser("sync", help="write the other half of each pair")
    syncing.add_argument("--from", dest="source", choices=HALVES)
    syncing.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ORDER))
    arguments = parser.parse_args()
    if arguments.command == "check":
        require_in_sync()
        print(f"{len(ORDER)} notebooks are in sync with their modules")
        return
    for name in arguments.names:
        if name not in ORDER:
            raise UserError(f"PAIR: unknown pair '{name}'; expected one of {', '.join(ORDER)}.")
    if arguments.source is None:
        print("\n".join(sync_edited(arguments.names)) or "already in sync")
    else:
        names = sync(arguments.source, arguments.names)
        half = OTHER[arguments.source]
        print(f"{half}s written: {', '.join(names)}" if names else "already in sync")


if __name__ == "__main__":
    run_command(main)
