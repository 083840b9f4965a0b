"""Paths: the project's root, and gs:// addresses where buckets are mounted as folders."""

import os
import re
from pathlib import Path

from core.errors import UserError

PROJECT_FILE = "project.yaml"


def project_root() -> Path:
    """The nearest folder upwards from the current one that holds project.yaml."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / PROJECT_FILE).is_file():
            return folder
    raise UserError(
        f"no {PROJECT_FILE} in {here} or above it. Go to the project's folder first: cd YOUR-PROJECT."
    )


def local_path(address: str) -> Path:
    """A local path for a path or a gs:// address: in the cloud, buckets are mounted under $GCS_MOUNT (default /gcs)."""
    if not address.startswith("gs://"):
        return Path(address)
    bucket, name = split_uri(address)
    if not is_mounted(bucket):
        raise UserError(
            f"{address}: no bucket is mounted at {_mount() / bucket}. Copy the file here with "
            f"`gcloud storage cp {address} data/` and name that copy, or mount the bucket and set GCS_MOUNT."
        )
    return _mount() / bucket / name


def mounted(address: str) -> Path:
    """Where the object at a gs:// address is, or would be, with its bucket mounted."""
    return _mount().joinpath(*split_uri(address))


def address(path: Path) -> str:
    """The gs:// address of a path where buckets are mounted; any other path as it is."""
    return f"gs://{path.absolute().relative_to(_mount())}" if in_bucket(path) else str(path)


def in_bucket(path: Path) -> bool:
    """Whether a path lies where buckets are mounted: files there are whole objects, and slow to change."""
    return path.absolute().is_relative_to(_mount())


def split_uri(address: str) -> tuple[str, str]:
    """Bucket and name of a gs:// address."""
    found = re.fullmatch(r"gs://([^/]+)(?:/(.*))?", address)
    if not found:
        raise UserError(
            f"{address!r} is no address in Cloud Storage; it must look like gs://BUCKET/NAME."
        )
    return found[1], found[2] or ""


def _mount() -> Path:
    return Path(os.environ.get("GCS_MOUNT", "/gcs"))


def is_mounted(bucket: str) -> bool:
    return (_mount() / bucket).is_dir()
