"""Fake of a container image registry: the HTTP API of Docker's registries, in memory.

An image's name begins with `host`, 127.0.0.1:PORT. Content is stored as it is, by its SHA-256.
"""

import hashlib
import json
import uuid

from level_2_cicd.rehearsal.server import ApiError, FakeServer, Json, Request, Response, route

REPOSITORY = "/v2/(?P<repository>[a-z0-9._/-]+)"
MANIFESTS = f"{REPOSITORY}/manifests/(?P<reference>[^/]+)"
BLOBS = f"{REPOSITORY}/blobs/(?P<digest>sha256:[0-9a-f]+)"
UPLOADS = f"{REPOSITORY}/blobs/uploads/(?P<upload>[0-9a-f]*)"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


class Images(FakeServer):
    """The repositories; a push creates them."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.blobs: dict[tuple[str, str], bytes] = {}  # by repository, digest
        # By repository, digest: content, media type.
        self.manifests: dict[tuple[str, str], tuple[bytes, str]] = {}
        self.tags: dict[tuple[str, str], str] = {}  # digests by repository, tag
        self._uploads: dict[str, bytes] = {}

    def push(self, name: str, content: bytes = b"") -> str:
        """Add an image HOST/REPOSITORY:TAG with one layer; return its digest."""
        # A minimal valid image; without `content`, its layer and digest follow from its name.
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
            return self._store(repository, tag, json.dumps(manifest).encode(), MANIFEST)

    def names(self) -> set[str]:
        """Return all images, as REPOSITORY:TAG."""
        with self.lock:
            return {f"{repository}:{tag}" for repository, tag in self.tags}

    @route("GET", "/v2/", "registry.get")
    def _base(self, _: Request) -> Response:
        return Response({}, headers={"Docker-Distribution-Api-Version": "registry/2.0"})

    @route("HEAD", MANIFESTS, "manifests.head")
    def _head_manifest(self, request: Request) -> Response:
        return self._get_manifest(request)

    @route("GET", MANIFESTS, "manifests.get")
    def _get_manifest(self, request: Request) -> Response:
        name, reference = request["repository"], request["reference"]
        request.message = reference
        key = name, self.tags.get((name, reference), reference)
        if key not in self.manifests:
            raise ApiError(404, f"manifest unknown: {name}:{reference}")
        content, kind = self.manifests[key]
        # A registry does not convert manifests, so a client must accept the stored kind.
        if kind not in request.headers.get("accept", ""):
            raise ApiError(404, f"manifest unknown: {name}:{reference}: {kind} is not accepted")
        return Response(content, headers={"Content-Type": kind, "Docker-Content-Digest": key[1]})

    @route("PUT", MANIFESTS, "manifests.put")
    def _put_manifest(self, request: Request) -> Response:
        name, kind = request["repository"], request.headers.get("content-type", "")
        request.message = f"{name}:{request['reference']}"
        try:
            document: Json = json.loads(request.body)
            blobs = [document["config"], *document["layers"]]
        except (ValueError, KeyError, TypeError):
            raise ApiError(400, "manifest invalid") from None
        # Clients must push blobs before the manifest, as to a real registry.
        missing = [blob["digest"] for blob in blobs if (name, blob["digest"]) not in self.blobs]
        if missing:
            raise ApiError(404, f"manifest blob unknown: {', '.join(missing)}")
        if document.get("mediaType", kind) != kind:
            raise ApiError(400, f"manifest invalid: {document['mediaType']} was sent as {kind}")
        stored = self._store(name, request["reference"], request.body, kind)
        return Response(b"", 201, {"Docker-Content-Digest": stored})

    def _store(self, name: str, reference: str, content: bytes, kind: str) -> str:
        stored = digest(content)
        self.manifests[name, stored] = content, kind
        # A reference is a tag unless it is the digest itself.
        if reference != stored:
            self.tags[name, reference] = stored
        return stored

    @route("HEAD", BLOBS, "blobs.head")
    def _head_blob(self, request: Request) -> Response:
        return self._get_blob(request)

    @route("GET", BLOBS, "blobs.get")
    def _get_blob(self, request: Request) -> Response:
        request.message = request["digest"]
        key = request["repository"], request["digest"]
        if key not in self.blobs:
            raise ApiError(404, f"blob unknown: {request['digest']}")
        return Response(self.blobs[key], headers={"Docker-Content-Digest": request["digest"]})

    @route("POST", UPLOADS, "blobs.begin")
    def _start_upload(self, request: Request) -> Response:
        identity = uuid.uuid4().hex
        self._uploads[identity] = b""
        # A relative URL with a query: the specification allows both, and clients must handle them.
        return Response(b"", 202, {"Location": f"{request.path}{identity}?state=new"})

    @route("PATCH", UPLOADS, "blobs.continue")
    def _continue_upload(self, request: Request) -> Response:
        self._uploads[self._upload(request)] += request.body
        return Response(b"", 202, {"Location": request.path})

    @route("PUT", UPLOADS, "blobs.put")
    def _put_blob(self, request: Request) -> Response:
        # The upload ends here, so a repeated request gets a 404, as after a lost response.
        content = self._uploads.pop(self._upload(request)) + request.body
        stored = request.message = digest(content)
        if stored != request.query.get("digest"):
            raise ApiError(400, f"digest invalid: the content has {stored}")
        self.blobs[request["repository"], stored] = content
        return Response(b"", 201, {"Docker-Content-Digest": stored})

    def _upload(self, request: Request) -> str:
        if request["upload"] not in self._uploads:
            raise ApiError(404, "blob upload unknown")
        return request["upload"]


def digest(content: bytes) -> str:
    """Return the digest of a blob or manifest."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
