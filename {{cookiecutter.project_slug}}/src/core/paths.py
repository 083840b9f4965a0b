"""Project root, and conversion between gs:// URIs and paths of mounted buckets."""

import os
import re
from pathlib import Path

from core.errors import UserError

PROJECT_FILE = "project.yaml"


def project_root() -> Path:
    """Return the nearest folder with a project.yaml, from the current folder upwards."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / PROJECT_FILE).is_file():
            return folder
    raise UserError(
        f"no {PROJECT_FILE} in {here} or above it. Go to the project's folder first: cd YOUR-PROJECT."
    )


def local_path(address: str) -> Path:
    """Return the local path of a path or gs:// URI.

    On Google Cloud, buckets are mounted under $GCS_MOUNT (default /gcs).
    """
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
    """Return the path of a gs:// URI below the mount point, mounted or not."""
    return _mount().joinpath(*split_uri(address))


def address(path: Path) -> str:
    """Return the gs:// URI of a path in a mounted bucket; any other path unchanged."""
    return f"gs://{path.absolute().relative_to(_mount())}" if in_bucket(path) else str(path)


def in_bucket(path: Path) -> bool:
    """Return whether a path is in a mounted bucket, where each change rewrites a whole object."""
    return path.absolute().is_relative_to(_mount())


def split_uri(address: str) -> tuple[str, str]:
    """Return bucket and object name of a gs:// URI."""
    found = re.fullmatch(r"gs://([^/]+)(?:/(.*))?", address)
    if not found:
        raise UserError(
            f"{address!r} is no address in Cloud Storage; it must look like gs://BUCKET/NAME."
        )
    return found[1], found[2] or ""


def _mount() -> Path:
    return Path(os.environ.get("GCS_MOUNT", "/gcs"))


def is_mounted(bucket: str) -> bool:
    """Return whether a bucket is mounted as a folder."""
    return (_mount() / bucket).is_dir()
