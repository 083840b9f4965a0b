"""Asks a registry of images, over Docker's HTTP interface: which digest has a name, and a copy from one registry to another.

No Docker is needed. A registry on this machine (localhost, 127.0.0.1) is asked over http:// and without credentials.
"""

import hashlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import UserError
from gcp import client as api
from gcp import pipeline_template
from level_1_pipeline import containers

# What a manifest may be: Docker's or OCI's, of one platform or a list of several.
MANIFESTS = (
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
)
CHUNK = 8 * 1024 * 1024
DIGEST = r"sha256:[0-9a-f]{64}"


def _split(name: str) -> tuple[str, str, str]:
    """An image's name as the registry's address, the repository, and a tag or digest.

    Raises:
        UserError: it is no such name.
    """
    found = re.fullmatch(rf"([^/]+)/([^@]+?)(?::([\w][\w.-]*)|@({DIGEST}))", name)
    if not found or containers.registry_of(name) == "docker.io":
        raise UserError(
            f"'{name}' is no image in a registry; it must look like REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:…."
        )
    host, repository, tag, digest = found.groups()
    scheme = "http" if re.match(r"(localhost|127\.0\.0\.1)(:|$)", host) else "https"
    return f"{scheme}://{host}/v2", repository, tag or digest


def digest(name: str) -> str | None:
    """sha256:… of an image in its registry; None if it is not there.

    Raises:
        ApiError: the registry refused, or did not answer.
    """
    base, repository, reference = _split(name)
    headers = {"Accept": ", ".join(MANIFESTS)}
    try:
        found = pipeline_template.ask_registry(
            "HEAD",
            f"{base}/{repository}/manifests/{reference}",
            f"looking for {name}",
            headers=headers,
        )
    except api.ApiError as error:
        if error.code == 404:
            return None
        raise
    return str(found.headers["Docker-Content-Digest"])


def copy(source: str, target: str) -> str:
    """Copy an image, byte for byte, so that it has the same digest; what the target has already is not sent again.

    Docker's pull and push would not do: they pack the layers anew, and another digest may come out.

    Args:
        source: REGISTRY/NAME@sha256:….
        target: REGISTRY/NAME:TAG.

    Raises:
        ApiError: a registry refused, or did not answer.
        UserError: another digest came out.
    """
    base, repository, tag = _split(target)
    content, kind = _manifest(source)
    document = content.json()
    if "manifests" in document:
        raise UserError(
            f"{source} is an image for several platforms; those of this project are for one."
        )
    for blob in (document["config"], *document["layers"]):
        _copy_blob(source, target, blob["digest"])
    what = f"copying {target}"
    address = f"{base}/{repository}/manifests/{tag}"
    pipeline_template.ask_registry(
        "PUT", address, what, data=content.content, headers={"Content-Type": kind}
    )
    wanted, there = source.rpartition("@")[2], digest(target)
    if there != wanted:
        raise UserError(
            f"{target} has the digest {there} where {wanted} was copied: somebody else wrote it. Type the same again."
        )
    return wanted


def _manifest(name: str) -> tuple[Any, str]:
    base, repository, reference = _split(name)
    headers = {"Accept": ", ".join(MANIFESTS)}
    answer = pipeline_template.ask_registry(
        "GET", f"{base}/{repository}/manifests/{reference}", f"reading {name}", headers=headers
    )
    return answer, answer.headers["Content-Type"].partition(";")[0]


def _copy_blob(source: str, target: str, blob: str) -> None:
    """Copy a layer, or the image's description."""
    base, repository, _ = _split(target)
    what = f"copying {target}"

    def find() -> bool | None:
        try:
            pipeline_template.ask_registry("HEAD", f"{base}/{repository}/blobs/{blob}", what)
        except api.ApiError as error:
            if error.code == 404:
                return None
            raise
        return True

    def send() -> bool:
        # With the download in it: an answer that breaks off is asked for again, into a new file.
        with tempfile.TemporaryDirectory() as folder:
            file = _File(Path(folder, "blob"))
            _download(source, blob, file.path)
            begun = pipeline_template.ask_registry(
                "POST", f"{base}/{repository}/blobs/uploads/", what
            )
            address = _absolute(base, begun.headers["Location"])
            address = f"{address}{'&' if '?' in address else '?'}digest={blob}"
            try:
                pipeline_template.ask_registry(
                    "PUT",
                    address,
                    what,
                    data=file,
                    headers={"Content-Type": "application/octet-stream"},
                )
            except api.ApiError as error:
                if error.code != 404:
                    raise
                # The upload is over: an answer was lost, and this was its repetition. Look again.
                raise api.ApiError(str(error), 409, transient=False) from error
        return True

    api.get_or_create(find, send)


def _download(source: str, blob: str, path: Path) -> None:
    """Read a layer, or the image's description, into a file.

    Raises:
        ApiError: the registry refused or did not answer; or, and then it is worth another attempt, the answer broke off, or is
            not what was asked for.
    """
    base, repository, _ = _split(source)
    what, content = f"reading {source}", hashlib.sha256()
    read = pipeline_template.ask_registry(
        "GET", f"{base}/{repository}/blobs/{blob}", what, stream=True
    )
    try:
        with read, path.open("wb") as stream:
            for chunk in read.iter_content(CHUNK):
                content.update(chunk)
                stream.write(chunk)
    except Exception as error:
        raise api.explain(error, what) from error
    came = f"sha256:{content.hexdigest()}"
    if came != blob:
        message = f"{what} failed: {blob} was asked for, and {came} came. Type the same again; if it stays so, it is broken there."
        raise api.ApiError(message, 0, transient=True)


class _File:
    """A file to be sent, and sent again if need be, without being held in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return self.path.stat().st_size

    def __iter__(self) -> Iterator[bytes]:
        with self.path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk


def _absolute(base: str, location: str) -> str:
    """Where an upload goes on: registries answer with a whole address, or with a path."""
    return location if "://" in location else base.removesuffix("/v2") + location
