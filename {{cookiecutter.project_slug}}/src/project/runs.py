"""Run folders below runs/: settings, data, model, evaluation and reports.

python -m project.runs     print the table of all runs (`make runs`)
"""

import json
import math
import os
import secrets
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tabulate import tabulate

from core.errors import UserError, run_command
from core.manifest import write_json
from core.paths import project_root
from core.registry import LocalRegistry
from project.settings import Settings, load_settings


@dataclass(frozen=True)
class Run:
    """Paths inside a run folder."""

    folder: Path

    @property
    def name(self) -> str:
        """The run's id, which is the folder's name."""
        return self.folder.name

    @property
    def train_data(self) -> Path:
        """Training rows."""
        return self.folder / "train.parquet"

    @property
    def test_data(self) -> Path:
        """Test rows."""
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
        """The run's settings, with overrides."""
        return self.folder / "settings.json"

    def start(self, settings: Settings) -> "Run":
        """Create the folder and record the settings."""
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
        """Return the path if an earlier notebook has created it."""
        if not path.exists():
            raise UserError(
                f"missing {path.name} in {self.folder}. Run {notebook}.ipynb first "
                "(Run ▸ Run All Cells)."
            )
        return path


def runs_folder() -> Path:
    """Return the folder of all runs."""
    return project_root() / "runs"


def registry_folder() -> Path:
    """Return the folder of the local model registry."""
    return project_root() / "registry"


def current() -> Run:
    """Return the run of a notebook: $RUN in `make level0`, else the run named "notebook"."""
    return Run(runs_folder() / os.environ.get("RUN", "notebook"))


def new() -> Run:
    """Return a new run, named by its start time so that names sort."""
    return Run(runs_folder() / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}")


def find(name: str | None = None) -> Run:
    """Return the named run, or the newest one whose model was not rejected by a gate."""
    if name:
        run = Run(runs_folder() / name)
        if not run.model.is_dir():
            raise UserError(
                f"no run '{name}' with a model in {runs_folder()}. `make runs` lists them."
            )
        return run
    finished = [
        run for run in all_runs() if (run.model / "model.json").is_file() and not _is_rejected(run)
    ]
    if not finished:
        raise UserError("no trained model yet. Run `make level0` first.")
    return max(finished, key=lambda run: (run.model / "model.json").stat().st_mtime)


def _is_rejected(run: Run) -> bool:
    """Return whether a pipeline run ended without registering its model."""
    # Notebooks write no run record, and have no gate that could reject the model.
    story = read_json(run.folder / "story.json")
    return bool(story) and not story.get("registered")


def all_runs() -> list[Run]:
    """Return all runs, sorted by name."""
    folder = runs_folder()
    return (
        [Run(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON document; empty if the file is missing or invalid."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return document
    except (OSError, ValueError):
        return {}


SETTINGS_SHOWN = ("epochs", "batch_size", "learning_rate", "seed")
METRICS_SHOWN = {"accuracy": "accuracy", "macro_f1": "macro F1", "log_loss": "log loss"}


def table(metric: str) -> str:
    """Return all runs as a text table, best `metric` first and unfinished runs last."""
    champion = LocalRegistry(registry_folder()).champion_number()
    rows = []
    for run in all_runs():
        settings, metrics = read_json(run.settings), read_json(run.evaluation)
        hyperparameters = settings.get("hyperparameters", {})
        # Files may be missing: an unfinished run still gets a row.
        row = [run.name, settings.get("data", {}).get("source", "")]
        row += [hyperparameters.get(key, "") for key in SETTINGS_SHOWN]
        row += [f"{metrics[key]:.4f}" if key in metrics else "–" for key in METRICS_SHOWN]
        row += [metrics.get("rows", "not finished"), _made_by(run.name, champion)]
        rows.append((metrics.get(metric, -math.inf), run.name, row))
    if not rows:
        raise UserError("no runs yet. Run `make level0` first.")
    rows.sort(reverse=True)
    columns = ["run", "data", *SETTINGS_SHOWN, *METRICS_SHOWN.values(), "test rows", "made by"]
    return str(tabulate([row for *_, row in rows], columns, "plain", disable_numparse=True))


def _made_by(name: str, champion: int | None) -> str:
    """Return the source of a run: notebooks, a training job, or the pipeline and its version."""
    story = read_json(runs_folder() / name / "story.json")
    if not story:
        return "a training job" if (runs_folder() / name / "request.json").exists() else "notebooks"
    number = (story.get("registered") or {}).get("version")
    model = ["the champion" if number == champion else f"version {number}"] if number else []
    return ", ".join(["pipeline", *model])


def main() -> None:
    """Print the table of all runs, and the path of their reports to standard error."""
    print(table(load_settings("").gate.metric))
    print(f"\nReports: {runs_folder()}{os.sep}RUN{os.sep}*.html", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
