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
    mount = Path(os.environ.get("GCS_MOUNT", "/gcs"))
    path = mount / address.removeprefix("gs://")
    bucket = mount / address.removeprefix("gs://").split("/")[0]
    if not bucket.is_dir():
        raise UserError(
            f"{address}: no bucket is mounted at {bucket}. Copy the file here with "
            f"`gcloud storage cp {address} data/` and name that copy, or mount the bucket and set GCS_MOUNT."
        )
    return path
