"""Buckets: in the cloud they are mounted as folders, and the code sees local paths only; elsewhere Google's client fetches.

Standard library only, until something is fetched or uploaded: Google's packages are not in every image, and take a second.
STORAGE_EMULATOR_HOST names another server than Google's; no credentials are looked for then.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from core import paths
from core.errors import UserError

DEADLINE = 60.0  # seconds for one answer
PATIENCE = 60.0  # seconds for a request with all its repetitions
WRITER = "written-by"  # an object's metadata that tells whose write it was


class Conflict(UserError):
    """Somebody else has written the object meanwhile."""


def fetch(address: str, into: Path) -> Path:
    """A local path for an address, whose content is copied only if its bucket is not mounted.

    Args:
        address: a path, or gs:// and the name of an object or of a folder.
        into: where copies go: an object to into/NAME, a folder's objects below `into`.

    Raises:
        UserError: there is nothing at the address, or it cannot be read.
    """
    if (
        not address.startswith("gs://")
        or paths.is_mounted(paths.split_uri(address)[0])
        or not _has_client()
    ):
        return paths.local_path(address)
    bucket, name = paths.split_uri(address)
    with _explained(f"reading {address}"):
        from google.api_core.exceptions import NotFound

        source = _client().bucket(bucket)
        if name and not name.endswith("/"):
            try:
                return _copy(source.blob(name), into, Path(name).name)
            except NotFound as error:
                _require_bucket(error)
        folder = f"{name.rstrip('/')}/" if name else ""
        blobs = [
            blob
            for blob in source.list_blobs(prefix=folder, **_patience())
            if not blob.name.endswith("/")
        ]
        if not blobs:
            raise UserError(
                f"there is nothing at {address}. `gcloud storage ls gs://{bucket}` shows what there is."
            )
        for blob in blobs:
            _copy(blob, into, blob.name.removeprefix(folder))
    return into


def _find(bucket: Any, name: str) -> Any:
    """An object and what is known of it; None if there is none in the bucket."""
    from google.api_core.exceptions import NotFound

    blob = bucket.blob(name)
    try:
        blob.reload(**_patience())
    except NotFound as error:
        _require_bucket(error)
        return None
    return blob


def _require_bucket(error: Exception) -> None:
    """Raise the error again if not an object was missing, but its bucket."""
    if "bucket does not exist" in _said(error):
        raise error


def _copy(blob: Any, into: Path, name: str) -> Path:
    """Download an object to into/NAME."""
    path = into / name
    if not path.resolve().is_relative_to(into.resolve()):
        raise UserError(
            f"gs://{blob.bucket.name}/{blob.name} would be copied to a place outside of {into}; it was not."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        _persist(blob.download_to_filename, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read(address: str) -> tuple[bytes, int] | None:
    """An object's content and its generation, the number of its last write; None if there is none.

    Raises:
        UserError: it cannot be read.
    """
    bucket, name = paths.split_uri(address)
    with _explained(f"reading {address}"):
        from google.api_core.exceptions import NotFound

        blob = _client().bucket(bucket).blob(name)
        try:
            content = _persist(blob.download_as_bytes)
        except NotFound as error:
            _require_bucket(error)
            return None
        return content, int(blob.generation)


def names(address: str) -> list[str]:
    """The addresses of all objects below a folder's address, in order.

    Raises:
        UserError: it cannot be read.
    """
    bucket, name = paths.split_uri(address)
    with _explained(f"reading {address}"):
        blobs = _client().list_blobs(
            bucket, prefix=f"{name.rstrip('/')}/" if name else "", **_patience()
        )
        return [f"gs://{bucket}/{blob.name}" for blob in blobs]


def generation(address: str) -> int | None:
    """An object's generation, the number of its last write; None if there is none.

    Raises:
        UserError: nobody can tell.
    """
    bucket, name = paths.split_uri(address)
    with _explained(f"looking at {address}"):
        found = _find(_client().bucket(bucket), name)
        return None if found is None else int(found.generation)


def upload(path: Path, address: str, if_generation_match: int | None = None) -> int:
    """Copy a file to an address; the generation that it has there. See `write`.

    Raises:
        Conflict: the object is not what if_generation_match says.
        UserError: it cannot be written.
    """
    return _write(
        address,
        if_generation_match,
        lambda blob, **options: blob.upload_from_filename(path, **options),
    )


def write(address: str, content: bytes, if_generation_match: int | None = None) -> int:
    """Write an object as a whole or not at all; the generation that it has then.

    Args:
        if_generation_match: only if this is the object's generation, and for 0 only if there is none.

    Raises:
        Conflict: the object is not what if_generation_match says.
        UserError: it cannot be written.
    """
    return _write(
        address,
        if_generation_match,
        lambda blob, **options: blob.upload_from_string(content, **options),
    )


def _write(address: str, if_generation_match: int | None, send: Any) -> int:
    bucket, name = paths.split_uri(address)
    with _explained(f"writing {address}"):
        from google.api_core.exceptions import PreconditionFailed

        blob = _client().bucket(bucket).blob(name)
        writer = uuid.uuid4().hex
        blob.metadata = {WRITER: writer}
        try:
            send(blob, if_generation_match=if_generation_match, **_patience())
        except PreconditionFailed:
            # The first attempt may have succeeded, and only its answer been lost: then the object is ours.
            there = _find(blob.bucket, name)
            if there is None or (there.metadata or {}).get(WRITER) != writer:
                raise Conflict(
                    f"{address} was written by somebody else meanwhile, and was left as it is."
                ) from None
            return int(there.generation)
        return int(blob.generation)


def _has_client() -> bool:
    from importlib.util import find_spec

    return bool(
        find_spec("google") and find_spec("google.cloud") and find_spec("google.cloud.storage")
    )


def _client() -> Any:
    return _client_of(os.environ.get("STORAGE_EMULATOR_HOST"))


@cache
def _client_of(_: str | None) -> Any:
    """A client, which keeps its connections and its token from one call to the next."""
    from google.cloud import storage

    # Otherwise it asks for each bucket's own metadata, in a thread beside, to label traces that nobody takes.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    return storage.Client(project=None)  # objects need none


def _patience() -> dict[str, Any]:
    """How long a call may take, and how it is repeated."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return {
        "timeout": DEADLINE,
        "retry": DEFAULT_RETRY.with_delay(initial=0.2, maximum=10.0).with_timeout(PATIENCE),
    }


def _persist(download: Any, *arguments: Any) -> Any:
    """Call a download's method. By itself it is repeated too, but not where an error's own text is cut off."""
    options = _patience()
    return options["retry"](download)(*arguments, **options)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn an error of Google's packages into one line that says what to do."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except ImportError:
        raise UserError(
            f"{what} needs Google's client. Type: pip install google-cloud-storage"
        ) from None
    except Exception as error:
        said, advice = _explain(
            getattr(error, "cause", None) or error
        )  # the last of many attempts says why
        if not advice:
            raise
        raise UserError(f"{what} failed: {said} {advice}") from None


def _explain(error: Exception) -> tuple[str, str]:
    """What went wrong, and what a person can do; nothing for what is no answer of Google's."""
    import requests
    from google.api_core.exceptions import GoogleAPICallError, RetryError
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    if isinstance(error, (GoogleAPICallError, InvalidResponse)):
        return f"{_said(error)}.", ADVICE.get(
            _status(error), "`make doctor LEVEL=1` looks for a cause."
        )
    if isinstance(error, DataCorruption):
        return "what came is not what was stored.", "Type the same again."
    if isinstance(
        error, (requests.exceptions.RequestException, TransportError, RetryError, ConnectionError)
    ):
        return (
            "nobody answered.",
            "Is there a network, and a proxy that lets storage.googleapis.com through? Then type it again.",
        )
    if isinstance(error, DefaultCredentialsError):
        return "there are no credentials.", "Type: gcloud auth application-default login"
    if isinstance(error, GoogleAuthError):
        return "the credentials have expired.", "Type: gcloud auth application-default login"
    return str(error), ""


# The HTTP status of a refusal → what a person can do.
ADVICE = {
    401: "Type: gcloud auth application-default login",
    403: "`gcloud auth list` shows who you are; ask for roles/storage.objectUser on that bucket.",
    404: "`gcloud storage ls` shows the buckets that there are; the README of level_1_pipeline says how to make one.",
    **dict.fromkeys(
        (408, 429, 500, 502, 503, 504), "No good answer came in time. Type the same again."
    ),
}


def _status(error: Any) -> int:
    return int(getattr(error, "code", None) or error.response.status_code)


def _said(error: Any) -> str:
    """Google's own words, or what its client makes of them."""
    try:
        said = error.response.json()["error"]["message"]
    except (AttributeError, ValueError, KeyError, TypeError):
        said = getattr(error, "message", None) or error
    return " ".join(str(said).split())[:300].rstrip(".")
