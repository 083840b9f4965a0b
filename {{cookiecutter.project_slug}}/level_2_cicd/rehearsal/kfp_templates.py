"""A double of Artifact Registry's repositories of compiled pipelines (format KFP): versions by the content's SHA-256, and tags.

Its address stands for both hosts: https://REGION-kfp.pkg.dev (upload to /PROJECT/REPOSITORY, download) and
https://artifactregistry.googleapis.com (/v1/projects/…: packages, versions, tags).
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rehearsal.server import ApiError, FakeServer, Request, Response

Json = dict[str, Any]

REPOSITORY = r"/v1/projects/([^/]+)/locations/[^/]+/repositories/([^/]+)"
TAG = r"[a-z0-9][a-z0-9._-]{0,127}"


@dataclass
class Package:
    """The versions of one pipeline: by "sha256:…", the content and the resource; tag → version."""

    contents: dict[str, bytes] = field(default_factory=dict)
    versions: dict[str, Json] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class FakeTemplateRegistry(FakeServer):
    """The repositories, which are there as soon as something is uploaded to them."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.packages: dict[tuple[str, str, str], Package] = {}  # (project, repository, name)
        package = rf"{REPOSITORY}/packages/([^/]+)"
        self.routes = [
            ("POST", r"/([^/]+)/([^/]+)", "templates.upload", self._upload),
            ("GET", r"/([^/]+)/([^/]+)/([^/]+)/([^/]+)", "templates.download", self._download),
            ("GET", rf"{REPOSITORY}/packages", "packages.list", self._list_packages),
            ("GET", package, "packages.get", self._get_package),
            ("GET", rf"{package}/versions", "versions.list", self._list_versions),
            ("GET", rf"{package}/versions/([^/]+)", "versions.get", self._get_version),
            ("DELETE", rf"{package}/versions/([^/]+)", "versions.delete", self._delete_version),
            ("GET", rf"{package}/tags", "tags.list", self._list_tags),
            ("POST", rf"{package}/tags", "tags.create", self._create_tag),
            ("GET", rf"{package}/tags/([^/]+)", "tags.get", self._get_tag),
            ("PATCH", rf"{package}/tags/([^/]+)", "tags.patch", self._patch_tag),
            ("DELETE", rf"{package}/tags/([^/]+)", "tags.delete", self._delete_tag),
        ]

    def _upload(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        fields = _form(request)
        content = fields.get("content", b"")
        tags = [tag for tag in fields.get("tags", b"").decode().split(",") if tag]
        for tag in tags:
            _check_tag(tag)
        name, version = _pipeline_name(content), f"sha256:{hashlib.sha256(content).hexdigest()}"
        package = self.packages.setdefault((found[1], found[2], name), Package())
        if version not in package.contents:
            package.contents[version] = content
            package.versions[version] = {"createTime": _now(), "description": request.headers.get("description", "")}
        package.versions[version]["updateTime"] = _now()
        package.tags.update(dict.fromkeys(tags, version))
        message = {"name": name, "version": version, "tags": tags, "content": content}
        return message, Response(f"{name}/{version}".encode(), headers={"Content-Type": "text/plain"})

    def _download(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        package = self._package(found)
        version = package.tags.get(found[4], found[4])
        if version not in package.contents:
            raise ApiError(404, f"there is no version or tag {found[4]} of {found[3]}")
        return version, Response(package.contents[version], headers={"Content-Type": "application/yaml"})

    def _list_packages(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        names = sorted(name for project, repository, name in self.packages if (project, repository) == found.groups())
        return None, Response({"packages": [{"name": f"{_parent(request)}/{name}", "displayName": name} for name in names]})

    def _get_package(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._package(found)
        return None, Response({"name": _parent(request), "displayName": found[3]})

    def _list_versions(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        package = self._package(found)
        versions = [_version(package, version, _parent(request).removesuffix("/versions")) for version in package.versions]
        return None, Response({"versions": versions})

    def _get_version(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        package = self._package(found)
        return None, Response(_version(package, _known(package.versions, found[4]), _parent(request).split("/versions")[0]))

    def _delete_version(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        package = self._package(found)
        del package.versions[_known(package.versions, found[4])], package.contents[found[4]]
        package.tags = {tag: version for tag, version in package.tags.items() if version != found[4]}
        return None, Response({"name": f"{_parent(request)}/operations/delete", "done": True})

    def _list_tags(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        package = self._package(found)
        return None, Response({"tags": [_tag(package, tag, _parent(request).removesuffix("/tags")) for tag in package.tags]})

    def _create_tag(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        package, tag = self._package(found), request.query.get("tagId", "")
        if tag in package.tags:
            raise ApiError(409, f"the tag {tag} is there already")
        return self._point(request, package, tag)

    def _get_tag(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        package = self._package(found)
        return None, Response(_tag(package, _known(package.tags, found[4]), _parent(request).split("/tags")[0]))

    def _patch_tag(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        package = self._package(found)
        if request.query.get("updateMask", "version") != "version":
            raise ApiError(400, "of a tag, only its version can be changed")
        return self._point(request, package, _known(package.tags, found[4]))

    def _delete_tag(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        package = self._package(found)
        del package.tags[_known(package.tags, found[4])]
        return None, Response({})

    def _point(self, request: Request, package: Package, tag: str) -> tuple[Any, Response]:
        """Let a tag stand for the version that the body names in full."""
        _check_tag(tag)
        asked = _json(request.body)
        where, _, version = str(asked.get("version", "")).rpartition("/versions/")
        here = _parent(request).split("/tags")[0]
        if where != here:
            raise ApiError(400, f"the version must be named in full, as {here}/versions/sha256:…")
        package.tags[tag] = _known(package.versions, version)
        return asked, Response(_tag(package, tag, here))

    def _package(self, found: re.Match[str]) -> Package:
        return self.packages[_known(self.packages, (found[1], found[2], found[3]))]


def _known(known: Any, name: Any) -> Any:
    """The name, if it is one.

    Raises:
        ApiError: with 404.
    """
    if name not in known:
        raise ApiError(404, f"there is no {name}")
    return name


def _parent(request: Request) -> str:
    """What the path names, without the API's version."""
    return request.path.removeprefix("/v1/")


def _version(package: Package, version: str, parent: str) -> Json:
    tags = [_tag(package, tag, parent) for tag, meant in package.tags.items() if meant == version]
    return {"name": f"{parent}/versions/{version}", **package.versions[version], "relatedTags": tags}


def _tag(package: Package, tag: str, parent: str) -> Json:
    return {"name": f"{parent}/tags/{tag}", "version": f"{parent}/versions/{package.tags[tag]}"}


def _check_tag(tag: str) -> None:
    if not re.fullmatch(TAG, tag):
        raise ApiError(400, f"the tag '{tag}' must match {TAG}")


def _form(request: Request) -> dict[str, bytes]:
    """The fields of a multipart/form-data body.

    Raises:
        ApiError: it is none.
    """
    boundary = re.search(r'multipart/form-data;.*boundary="?([^";]+)', request.headers.get("content-type", ""))
    if not boundary:
        raise ApiError(400, "multipart/form-data is wanted, with content and tags")
    fields = {}
    for part in request.body.split(b"--" + boundary[1].encode())[1:-1]:
        headers, _, content = part.partition(b"\r\n\r\n")
        name = re.search(rb'name="([^"]+)"', headers)
        if name:
            fields[name[1].decode()] = content.removesuffix(b"\r\n")
    return fields


def _json(body: bytes) -> Json:
    """A JSON object.

    Raises:
        ApiError: it is none.
    """
    try:
        document = json.loads(body)
    except ValueError:
        raise ApiError(400, "the body is no JSON") from None
    if not isinstance(document, dict):
        raise ApiError(400, "a JSON object is wanted")
    return document


def _pipeline_name(content: bytes) -> str:
    """The name of a compiled pipeline, after it was parsed strictly.

    Raises:
        ApiError: it is no pipeline.
    """
    import yaml
    from google.protobuf import json_format
    from kfp.pipeline_spec import pipeline_spec_pb2

    try:
        document = next(yaml.safe_load_all(content))
        specification = json_format.ParseDict(document, pipeline_spec_pb2.PipelineSpec())
    except (yaml.YAMLError, json_format.ParseError, StopIteration, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the content is no compiled pipeline: {error}") from None
    if not specification.pipeline_info.name:
        raise ApiError(400, "the pipeline has no name")
    return str(specification.pipeline_info.name)


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
