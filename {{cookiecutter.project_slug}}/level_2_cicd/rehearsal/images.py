"""A double of a registry of images, such as Artifact Registry's: Docker's HTTP interface, with manifests and blobs in memory.

Its `host` is what stands before an image's name: 127.0.0.1:PORT. What is pushed is kept byte for byte under its SHA-256.
"""

import hashlib
import json
import re
import uuid
from typing import Any

from rehearsal.server import ApiError, FakeServer, Request, Response

Json = dict[str, Any]

REPOSITORY = r"/v2/(?P<repository>[a-z0-9._/-]+)"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


class Images(FakeServer):
    """The repositories, which are there as soon as something is pushed to them."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.blobs: dict[tuple[str, str], bytes] = {}  # (repository, digest)
        self.manifests: dict[tuple[str, str], tuple[bytes, str]] = {}  # (repository, digest) → content, type
        self.tags: dict[tuple[str, str], str] = {}  # (repository, tag) → digest
        self._uploads: dict[str, bytes] = {}
        manifest, blob = rf"{REPOSITORY}/manifests/(?P<reference>[^/]+)", rf"{REPOSITORY}/blobs/(?P<digest>sha256:[0-9a-f]+)"
        upload = rf"{REPOSITORY}/blobs/uploads/(?P<upload>[0-9a-f]*)"
        self.routes = [
            ("GET", r"/v2/", "registry.get", self._base),
            ("HEAD", manifest, "manifests.head", self._get_manifest),
            ("GET", manifest, "manifests.get", self._get_manifest),
            ("PUT", manifest, "manifests.put", self._put_manifest),
            ("HEAD", blob, "blobs.head", self._get_blob),
            ("GET", blob, "blobs.get", self._get_blob),
            ("POST", upload, "blobs.begin", self._begin),
            ("PATCH", upload, "blobs.continue", self._continue),
            ("PUT", upload, "blobs.put", self._put_blob),
        ]

    @property
    def host(self) -> str:
        """What stands before an image's name."""
        return self.address.removeprefix("http://")

    # What tests say and ask, without HTTP.

    def push(self, name: str, content: bytes = b"") -> str:
        """Let an image be there: HOST/REPOSITORY:TAG, with one layer of this content; returns its digest."""
        repository, _, tag = name.removeprefix(f"{self.host}/").rpartition(":")
        layer, config = content or name.encode(), json.dumps({"rootfs": {}}).encode()
        with self.lock:
            for blob in (layer, config):
                self.blobs[repository, digest(blob)] = blob
            manifest = {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": {"mediaType": CONFIG, "size": len(config), "digest": digest(config)},
                "layers": [{"mediaType": LAYER, "size": len(layer), "digest": digest(layer)}],
            }
            return self._keep(repository, tag, json.dumps(manifest).encode(), MANIFEST)

    def names(self) -> set[str]:
        """Every image that is there: REPOSITORY:TAG."""
        with self.lock:
            return {f"{repository}:{tag}" for repository, tag in self.tags}

    # HTTP.

    def _base(self, _: Request, __: re.Match[str]) -> tuple[Any, Response]:
        return None, Response({}, headers={"Docker-Distribution-Api-Version": "registry/2.0"})

    def _get_manifest(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        name, reference = found["repository"], found["reference"]
        key = name, self.tags.get((name, reference), reference)
        if key not in self.manifests:
            raise ApiError(404, f"manifest unknown: {name}:{reference}")
        content, kind = self.manifests[key]
        if kind not in request.headers.get("accept", ""):
            raise ApiError(404, f"manifest unknown: {name}:{reference} is a {kind}, which the request does not accept")
        return reference, Response(content, headers={"Content-Type": kind, "Docker-Content-Digest": key[1]})

    def _put_manifest(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        name, kind = found["repository"], request.headers.get("content-type", "")
        try:
            document: Json = json.loads(request.body)
            blobs = [document["config"], *document["layers"]]
        except (ValueError, KeyError, TypeError):
            raise ApiError(400, "manifest invalid") from None
        missing = [blob["digest"] for blob in blobs if (name, blob["digest"]) not in self.blobs]
        if missing:
            raise ApiError(404, f"manifest blob unknown: {', '.join(missing)}")
        if document.get("mediaType", kind) != kind:
            raise ApiError(400, f"manifest invalid: it says {document['mediaType']}, and its header {kind}")
        there = self._keep(name, found["reference"], request.body, kind)
        return f"{name}:{found['reference']}", Response(b"", 201, {"Docker-Content-Digest": there})

    def _keep(self, name: str, reference: str, content: bytes, kind: str) -> str:
        there = digest(content)
        self.manifests[name, there] = content, kind
        if reference != there:
            self.tags[name, reference] = there
        return there

    def _get_blob(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        key = found["repository"], found["digest"]
        if key not in self.blobs:
            raise ApiError(404, f"blob unknown: {found['digest']}")
        return found["digest"], Response(self.blobs[key], headers={"Docker-Content-Digest": found["digest"]})

    def _begin(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        identity = uuid.uuid4().hex
        self._uploads[identity] = b""
        return None, Response(b"", 202, {"Location": f"/v2/{found['repository']}/blobs/uploads/{identity}?state=begun"})

    def _continue(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._uploads[self._upload(found)] += request.body
        return None, Response(b"", 202, {"Location": f"/v2/{found['repository']}/blobs/uploads/{found['upload']}"})

    def _put_blob(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        content = self._uploads.pop(self._upload(found)) + request.body
        if digest(content) != request.query.get("digest"):
            raise ApiError(400, "digest invalid: the content has another one")
        self.blobs[found["repository"], digest(content)] = content
        return digest(content), Response(b"", 201, {"Docker-Content-Digest": digest(content)})

    def _upload(self, found: re.Match[str]) -> str:
        if found["upload"] not in self._uploads:
            raise ApiError(404, "blob upload unknown")
        return found["upload"]


def digest(content: bytes) -> str:
    """A content's name."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
