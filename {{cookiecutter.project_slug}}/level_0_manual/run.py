"""Run the four notebooks in order without a browser; write reports and model to runs/ID/.

python -m level_0_manual.run     (`make level0`)
"""

import os
import re
import signal
import sys
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from tqdm import tqdm

from core.errors import UserError, run_command
from core.manifest import write_bytes
from core.paths import project_root
from level_0_manual import notebooks
from project import git, runs
from project.settings import load_settings
from trainer.csv_reader import check_header
from trainer.data import find_csv


def execute(name: str, run: runs.Run, place: str) -> float:
    """Run one notebook and write its report, even if a cell fails; return the seconds."""
    path = notebooks.notebook_path(name)
    notebook = nbformat.read(path, as_version=4)
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    report = run.folder / f"{name}.html"
    started = time.monotonic()
    with tqdm(
        total=cells, desc=f"{place} {name:<9}", unit="cell", ncols=80, leave=False, disable=None
    ) as bar:
        client = NotebookClient(
            notebook,
            resources={"metadata": {"path": str(path.parent)}},
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],
            on_cell_executed=lambda **_: bar.update(),
        )
        try:
            client.execute(
                env={
                    "CODE_VERSION": git.version(),
                    **os.environ,
                    "RUN": run.name,
                    "TQDM_MININTERVAL": "1",
                }
            )
        except CellExecutionError as error:
            raise UserError(_explain(error, name, str(report))) from None
        finally:
            write_bytes(report, to_html(notebook, f"{name} · {run.name}").encode())
    for note in notes(notebook):
        print(f"  {note}")
    return time.monotonic() - started


def notes(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the lines of the cells' output that begin with "note:"."""
    outputs = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    ]
    return [
        line for output in outputs for line in output.text.splitlines() if line.startswith("note:")
    ]


def to_html(notebook: nbformat.NotebookNode, title: str) -> str:
    """Return a self-contained HTML report: text and cells with output."""
    shown = [cell for cell in notebook.cells if cell.cell_type == "markdown" or cell.get("outputs")]
    report = nbformat.from_dict({**notebook, "cells": shown})
    exporter = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True, exclude_raw=True)
    body, _ = exporter.from_notebook_node(report, resources={"metadata": {"name": title}})
    # Without scripts, and with images embedded, opening the report loads nothing from the network.
    return re.sub(r"<script\b.*?</script>", "", str(body), flags=re.DOTALL)


def _explain(error: CellExecutionError, name: str, report: str) -> str:
    """Format the error of a cell; a UserError keeps its own message."""
    if error.ename == "UserError":
        return f"{error.evalue}\n({name}.ipynb; the report up to there: {report})"
    return f"{name}.ipynb failed: {error.ename}: {error.evalue}\nThe report shows the cell and the whole message: {report}"


def stop(*_: object) -> None:
    """Exit immediately on Ctrl-C; the kernels notice that their parent has ended, and exit."""
    print("\ninterrupted", file=sys.stderr, flush=True)
    os._exit(130)


def main() -> None:
    """Check the settings and the data, run the notebooks, print the result."""
    # nbclient's own handling of Ctrl-C depends on timing and mostly prints a traceback.
    signal.signal(signal.SIGINT, stop)
    notebooks.require_in_sync()
    # Check settings and columns first, so that an error is reported before any notebook runs.
    settings = load_settings()
    csv_path = find_csv(settings.data.source, project_root() / "data")
    check_header(csv_path, settings.data.label, settings.data.ignore, settings.data.categorical)
    run = runs.new().start(settings)
    print(f"Training on {settings.data.source}; everything goes to runs/{run.name}/")
    for number, name in enumerate(notebooks.ORDER, start=1):
        seconds = execute(name, run, f"{number}/{len(notebooks.ORDER)}")
        print(
            f"  {number}/{len(notebooks.ORDER)} {name + '.ipynb':<15} {seconds:5.1f} s   report: runs/{run.name}/{name}.html"
        )
        sys.stdout.flush()
    metrics = runs.read_json(run.evaluation)
    print(
        f"\nAccuracy {metrics['accuracy']:.4f} on {metrics['rows']:,} test rows "
        f"(always answering the most common class: {metrics['baseline']:.4f}).\n"
        f"The model is in runs/{run.name}/model/. Next: make predict ROW=1 · make runs · open the reports in a browser"
    )


if __name__ == "__main__":
    run_command(main)
