"""Read and write Cloud Storage objects; `fetch` reads mounted buckets as folders.

If STORAGE_EMULATOR_HOST is set, calls go to that server and need no credentials.
"""

# Google's client is imported inside functions: loading it takes a second, and some images do not
# include it.

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from core import paths
from core.errors import UserError
from gcp import client as api

DEADLINE = 60.0  # seconds for one call
RETRY_TIMEOUT = 60.0  # seconds for one call with all its retries
WRITER = "written-by"  # metadata key for the id of a write


class Conflict(UserError):
    """Another process has changed the object in the meantime."""


@dataclass(frozen=True)
class StoredObject:
    """Content and generation of an object; generation 0 if it does not exist."""

    content: bytes = b""
    generation: int = 0

    @property
    def document(self) -> dict[str, Any]:
        """Return the content parsed as a JSON object; empty if it is not a JSON object."""
        try:
            document = json.loads(self.content)
        except ValueError:
            return {}
        return document if isinstance(document, dict) else {}


def get(address: str) -> StoredObject:
    """Read an object; return generation 0 if it does not exist."""
    return StoredObject(*(read(address) or ()))


def replace(address: str, content: bytes, current: StoredObject) -> StoredObject | None:
    """Replace an object if its generation is unchanged; otherwise return None."""
    try:
        return StoredObject(content, write(address, content, current.generation))
    except Conflict:
        return None


def fetch(address: str, into: Path) -> Path:
    """Return a local path for a path or gs:// address; download it if it is not mounted.

    Args:
        into: target folder. A single object is written to into/NAME, a folder's objects below it.
    """
    is_local = not address.startswith("gs://") or paths.is_mounted(paths.split_uri(address)[0])
    if is_local or not _has_client():
        return paths.local_path(address)
    bucket_name, name = paths.split_uri(address)
    with _errors(f"reading {address}"):
        from google.api_core.exceptions import NotFound

        bucket = _client().bucket(bucket_name)
        if name and not name.endswith("/"):
            with suppress(NotFound):  # not an object, so it is read as a folder
                return _download(bucket.blob(name), into, Path(name).name)
        folder = f"{name.rstrip('/')}/" if name else ""
        blobs = [
            blob
            for blob in bucket.list_blobs(prefix=folder, **_options())
            if not blob.name.endswith("/")
        ]
        for blob in blobs:
            _download(blob, into, blob.name.removeprefix(folder))
    if not blobs:
        raise UserError(
            f"{address} not found. `gcloud storage ls gs://{bucket_name}` lists the bucket."
        )
    return into


def _download(blob: Any, into: Path, name: str) -> Path:
    path = into / name
    if not path.resolve().is_relative_to(into.resolve()):  # path traversal: the name has ..
        raise UserError(
            f"gs://{blob.bucket.name}/{blob.name} would be written outside {into}; skipped."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Rename when complete, so that an interrupted download leaves no truncated file.
    partial = path.with_name(f"{path.name}.partial")
    try:
        _retry(blob.download_to_filename, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read(address: str) -> tuple[bytes, int] | None:
    """Return an object's content and generation, or None if it does not exist."""
    bucket, name = paths.split_uri(address)
    with _errors(f"reading {address}"):
        from google.api_core.exceptions import NotFound

        blob = _client().bucket(bucket).blob(name)
        try:
            return _retry(blob.download_as_bytes), int(blob.generation)
        except NotFound as error:
            # A missing bucket is also a 404, but it is a configuration error.
            if "bucket does not exist" in api.error_message(error):
                raise
            return None


def names(address: str) -> list[str]:
    """Return the sorted gs:// addresses of all objects below a folder."""
    bucket, name = paths.split_uri(address)
    with _errors(f"reading {address}"):
        folder = f"{name.rstrip('/')}/" if name else ""
        blobs = _client().list_blobs(bucket, prefix=folder, **_options())
        return [f"gs://{bucket}/{blob.name}" for blob in blobs]


def generation(address: str) -> int | None:
    """Return an object's generation, or None if it does not exist."""
    bucket, name = paths.split_uri(address)
    with _errors(f"reading {address}"):
        blob = _client().bucket(bucket).get_blob(name, **_options())
        return int(blob.generation) if blob else None


def upload(path: Path, address: str, if_generation_match: int | None = None) -> int:
    """Upload a file atomically and return its generation; see `write`."""
    return _write(address, "upload_from_filename", path, if_generation_match)


def write(address: str, content: bytes, if_generation_match: int | None = None) -> int:
    """Write an object atomically and return its generation.

    Args:
        if_generation_match: the expected generation, 0 for a new object. On a mismatch, Conflict
            is raised. None overwrites any generation.
    """
    return _write(address, "upload_from_string", content, if_generation_match)


def _write(address: str, method: str, content: Any, if_generation_match: int | None) -> int:
    bucket, name = paths.split_uri(address)
    with _errors(f"writing {address}"):
        from google.api_core.exceptions import PreconditionFailed

        blob = _client().bucket(bucket).blob(name)
        writer = uuid.uuid4().hex
        blob.metadata = {WRITER: writer}
        try:
            getattr(blob, method)(content, if_generation_match=if_generation_match, **_options())
        except PreconditionFailed:
            # After a lost response, the retry conflicts with its own first attempt. Then the stored
            # writer id is ours, and the write has succeeded.
            blob = blob.bucket.get_blob(name, **_options())
            if blob is None or (blob.metadata or {}).get(WRITER) != writer:
                raise Conflict(
                    f"{address} was changed by another process; it was not overwritten."
                ) from None
        return int(blob.generation)


def _has_client() -> bool:
    from importlib.util import find_spec

    packages = ("google", "google.cloud", "google.cloud.storage")
    return all(find_spec(package) for package in packages)


def _client() -> Any:
    return _client_of(os.environ.get("STORAGE_EMULATOR_HOST"))


@cache
def _client_of(_: str | None) -> Any:
    """Create one client per server, to reuse its connections and token."""
    from google.cloud import storage

    # Otherwise a thread reads the metadata of each bucket for traces that we do not collect.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    return storage.Client(project=None)  # object access needs no project


def _options() -> dict[str, Any]:
    # The library does not retry writes without if_generation_match by default. Here a retry is
    # safe: it overwrites with the same content.
    from google.cloud.storage.retry import DEFAULT_RETRY

    retry = DEFAULT_RETRY.with_delay(initial=0.2, maximum=10.0).with_timeout(RETRY_TIMEOUT)
    return {"timeout": DEADLINE, "retry": retry}


def _retry(download: Any, *arguments: Any) -> Any:
    # The library's own download retry does not cover a truncated error response.
    options = _options()
    return options["retry"](download)(*arguments, **options)


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """Convert Google client errors to one message with a hint; other errors pass through."""
    try:
        import requests
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
        from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
    except ImportError:
        raise UserError(f"{what} needs `pip install google-cloud-storage`.") from None
    network = (requests.exceptions.RequestException, ConnectionError)
    try:
        yield
    except DefaultCredentialsError:
        raise UserError(f"{what} failed: {api.NO_CREDENTIALS}") from None
    except (GoogleAPIError, GoogleAuthError, InvalidResponse, DataCorruption, *network) as error:
        raise api.explain(error, what) from None
