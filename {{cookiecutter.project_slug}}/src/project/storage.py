"""Buckets as folders: in the cloud they are mounted, and the code sees local paths only."""

import os
from pathlib import Path

from project.errors import UserError


def local_path(address: str) -> Path:
    """A local path for a path or a gs:// address: in the cloud, buckets are mounted under $GCS_MOUNT (default /gcs).

    Raises:
        UserError: a gs:// address where no bucket is mounted.
    """
    if not address.startswith("gs://"):
        return Path(address)
    path = _mount() / address.removeprefix("gs://")
    bucket = _mount() / address.removeprefix("gs://").split("/")[0]
    if not bucket.is_dir():
        raise UserError(
            f"{address}: no bucket is mounted at {bucket}. Copy the file here with "
            f"`gcloud storage cp {address} data/` and name that copy, or mount the bucket and set GCS_MOUNT."
        )
    return path


def in_bucket(path: Path) -> bool:
    """Whether a path lies where buckets are mounted: files there are whole objects, and slow to change."""
    return path.absolute().is_relative_to(_mount())


def _mount() -> Path:
    return Path(os.environ.get("GCS_MOUNT", "/gcs"))
