"""The rows that a run begins with: found on this machine and checked, and sent to the cloud once."""

from contextlib import suppress
from pathlib import Path

from project import manifest, settings, storage
from project.cloud import Place
from project.settings import Settings
from trainer.csv_file import check_header
from trainer.data import find_csv


def find(chosen: Settings) -> Path:
    """The CSV file of project.yaml.

    Raises:
        UserError: there is no such file, or no such column.
    """
    data = chosen.data
    csv = find_csv(data.source, settings.project_root() / "data").resolve()
    check_header(csv, data.label, data.ignore, data.categorical)
    return csv


def address(place: Place, file: Path) -> str:
    """Where a file of rows is for the cloud: a place that is named by its content, so the same rows are sent once."""
    return f"{place.data}/{manifest.sha256(file)[:32]}/{file.name}"


def upload(place: Place, file: Path) -> str:
    """Send the rows, unless they are in the cloud already; returns their address.

    Raises:
        UserError: they cannot be written.
    """
    there = address(place, file)
    with suppress(storage.Conflict):
        storage.upload(file, there, if_generation_match=0)
    return there
