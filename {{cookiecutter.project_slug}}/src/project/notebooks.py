"""The notebooks of level 0 and their twins in src/trainer: kept in step, and run without a browser.

python -m project.notebooks check                    are the pairs in step?
python -m project.notebooks sync --from notebook     write the modules from the notebooks
python -m project.notebooks sync --from module       write the notebooks from the modules
"""

import argparse
import hashlib
from pathlib import Path

import jupytext
import nbformat

from project.errors import UserError, run_command
from project.settings import project_root

ORDER = ("data", "model", "train", "evaluate")

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
    twin.metadata = {"jupytext": dict(PAIRING), "kernelspec": KERNEL, "language_info": {"name": "python"}}
    twin.nbformat, twin.nbformat_minor = 4, 5
    return twin


def _tags(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    return nbformat.from_dict({"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {})


def out_of_step() -> list[str]:
    """Names of the pairs whose halves differ; outputs, cell ids and other metadata do not count."""
    return [name for name in ORDER if not _in_step(name)]


def _in_step(name: str) -> bool:
    try:
        notebook = jupytext.read(notebook_path(name), fmt="ipynb")
        module = module_path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    except Exception as error:  # nbformat and jupytext raise many kinds
        raise UserError(f"{notebook_path(name)} cannot be read as a notebook: {error}") from None
    # By way of the notebook on both sides: how many empty lines stand between two cells is no difference.
    return as_module(notebook) == as_module(as_notebook(module))


def require_in_step() -> None:
    """Raises UserError when a notebook and its module differ: training would use code that nobody sees here."""
    differing = out_of_step()
    if differing:
        raise UserError(
            f"not in step: {', '.join(f'level_0_manual/{n}.ipynb and src/trainer/{n}.py' for n in differing)}. "
            "Which side is right? In a terminal, type `make sync FROM=notebook` or `make sync FROM=module`, "
            "then restart this notebook's kernel."
        )


def sync(source: str) -> list[str]:
    """Write the other half of each pair that is out of step; returns the names of those written."""
    differing = out_of_step()
    for name in differing:
        if source == "notebook":
            if not notebook_path(name).is_file():
                raise UserError(f"{notebook_path(name)} is not there. `make sync FROM=module` makes it.")
            text = as_module(jupytext.read(notebook_path(name), fmt="ipynb"))
            module_path(name).write_text(text, encoding="utf-8")
        else:
            if not module_path(name).is_file():
                raise UserError(f"{module_path(name)} is not there. `make sync FROM=notebook` makes it.")
            twin = as_notebook(module_path(name).read_text(encoding="utf-8"))
            notebook_path(name).write_text(nbformat.writes(twin) + "\n", encoding="utf-8")
    return differing


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m project.notebooks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check")
    commands.add_parser("sync").add_argument("--from", dest="source", choices=("notebook", "module"), required=True)
    arguments = parser.parse_args()
    if arguments.command == "check":
        require_in_step()
        print(f"{len(ORDER)} notebooks are in step with their modules")
    else:
        written = sync(arguments.source)
        other = "modules" if arguments.source == "notebook" else "notebooks"
        print(f"{other} written: {', '.join(written)}" if written else "already in step")


if __name__ == "__main__":
    run_command(main)
