"""The rows that a run begins with: found on this machine and checked, and sent to the cloud once."""

from contextlib import suppress
from pathlib import Path

from core import manifest
from core.paths import project_root
from gcp import storage
from gcp.environment import Environment
from project.settings import Settings
from trainer.csv_reader import check_header
from trainer.data import find_csv


def find(settings: Settings) -> Path:
    """The CSV file of project.yaml.

    Raises:
        UserError: there is no such file, or no such column.
    """
    data = settings.data
    csv = find_csv(data.source, project_root() / "data").resolve()
    check_header(csv, data.label, data.ignore, data.categorical)
    return csv


def address(environment: Environment, file: Path) -> str:
    """Where a file of rows is for the cloud: a place that is named by its content, so the same rows are sent once."""
    return f"{environment.data}/{manifest.sha256(file)[:32]}/{file.name}"


def upload(environment: Environment, file: Path) -> str:
    """Send the rows, unless they are in the cloud already; returns their address.

    Raises:
        UserError: they cannot be written.
    """
    there = address(environment, file)
    with suppress(storage.Conflict):
        storage.upload(file, there, if_generation_match=0)
    return there
