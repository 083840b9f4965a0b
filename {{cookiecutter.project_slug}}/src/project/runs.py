"""runs/: one folder for each run, with its settings, data, model, evaluation and reports."""

import json
import math
import os
import secrets
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from core.errors import UserError, run_command
from core.manifest import write_json
from core.paths import project_root
from core.registry import LocalRegistry
from project.settings import Settings, load_settings


@dataclass(frozen=True)
class Run:
    """The places in one run's folder."""

    folder: Path

    @property
    def name(self) -> str:
        """The run's id: the folder's name."""
        return self.folder.name

    @property
    def train_data(self) -> Path:
        """Rows to train on."""
        return self.folder / "train.parquet"

    @property
    def test_data(self) -> Path:
        """Rows that no training sees."""
        return self.folder / "test.parquet"

    @property
    def model(self) -> Path:
        """The saved model's folder."""
        return self.folder / "model"

    @property
    def evaluation(self) -> Path:
        """Metrics on the test rows."""
        return self.folder / "evaluation.json"

    @property
    def settings(self) -> Path:
        """The settings this run used, overrides included."""
        return self.folder / "settings.json"

    def start(self, settings: Settings) -> "Run":
        """Make the folder and note the settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(
            self.settings,
            {
                "data": settings.data.model_dump(),
                "hyperparameters": asdict(settings.hyperparameters),
            },
        )
        return self

    def require(self, path: Path, notebook: str) -> Path:
        """The path, if an earlier notebook has made it.

        Raises:
            UserError: says which notebook to run first.
        """
        if not path.exists():
            raise UserError(
                f"{path.name} is not in {self.folder} yet. Run {notebook}.ipynb first (Run ▸ Run All Cells)."
            )
        return path


def runs_folder() -> Path:
    """Where runs are kept."""
    return project_root() / "runs"


def registry_folder() -> Path:
    """Where the registry of this machine is."""
    return project_root() / "registry"


def current() -> Run:
    """The run that a notebook belongs to: $RUN under `make level0`, and the run named "notebook" in Jupyter."""
    return Run(runs_folder() / os.environ.get("RUN", "notebook"))


def new() -> Run:
    """A run of its own, named by the time it starts, so that names sort."""
    return Run(runs_folder() / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}")


def find(name: str | None = None) -> Run:
    """The run of that name, or the newest one with a saved model that no gate has turned down.

    Raises:
        UserError: there is none.
    """
    if name:
        run = Run(runs_folder() / name)
        if not run.model.is_dir():
            raise UserError(
                f"there is no run '{name}' with a model in {runs_folder()}. `make runs` lists them."
            )
        return run
    finished = [
        run for run in all_runs() if (run.model / "model.json").is_file() and not _turned_down(run)
    ]
    if not finished:
        raise UserError("no model is trained yet. Type `make level0` first.")
    return max(finished, key=lambda run: (run.model / "model.json").stat().st_mtime)


def _turned_down(run: Run) -> bool:
    story = read_json(run.folder / "story.json")
    return bool(story) and not story.get("registered")


def all_runs() -> list[Run]:
    """Every run's folder, in the order of their names."""
    folder = runs_folder()
    return (
        [Run(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    )


def read_json(path: Path) -> dict[str, Any]:
    """The document; an empty one when there is none yet."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return document
    except (OSError, ValueError):
        return {}


def table(metric: str) -> str:
    """All runs as text: settings and test metrics, best first, unfinished ones last."""
    rows = []
    for run in all_runs():
        settings, metrics = read_json(run.settings), read_json(run.evaluation)
        rows.append((metrics.get(metric, -math.inf), run.name, settings, metrics))
    if not rows:
        raise UserError("there is no run yet. Type `make level0` first.")
    rows.sort(key=lambda row: (row[0], row[1]), reverse=True)
    champion = LocalRegistry(registry_folder()).champion_number()
    settings_shown = ("epochs", "batch_size", "learning_rate", "seed")
    lines: list[tuple[str, ...]] = [
        ("run", "data", *settings_shown, "accuracy", "macro F1", "log loss", "test rows", "made by")
    ]
    for _, name, settings, metrics in rows:
        used = [str(settings.get("hyperparameters", {}).get(key, "")) for key in settings_shown]
        scores = [
            f"{metrics[key]:.4f}" if key in metrics else "–"
            for key in ("accuracy", "macro_f1", "log_loss")
        ]
        source = str(settings.get("data", {}).get("source", ""))
        lines.append(
            (
                name,
                source,
                *used,
                *scores,
                str(metrics.get("rows", "not finished")),
                _made_by(name, champion),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _made_by(name: str, champion: int | None) -> str:
    """Notebooks, a rented machine, or the pipeline and what became of its model."""
    story = read_json(runs_folder() / name / "story.json")
    if not story:
        return "a training job" if (runs_folder() / name / "request.json").exists() else "notebooks"
    number = (story.get("registered") or {}).get("version")
    kept = ["the champion" if number == champion else f"version {number}"] if number else []
    return ", ".join(["pipeline", *kept])


def main() -> None:
    """python -m project.runs"""
    print(table(load_settings("").gate.metric))
    print(f"\nReports: {runs_folder()}{os.sep}RUN{os.sep}*.html", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
