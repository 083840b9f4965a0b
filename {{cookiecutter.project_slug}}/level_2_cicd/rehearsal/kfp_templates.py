"""Fake of Artifact Registry's repositories of compiled pipelines: versions by SHA-256, and tags.

Its address replaces both hosts, REGION-kfp.pkg.dev and artifactregistry.googleapis.com.
"""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from level_2_cicd.rehearsal.server import ApiError, FakeServer, Json, Request, Response, route
from level_2_cicd.rehearsal.transport import timestamp

LOCATION = "/v1/(?P<parent>projects/{project}/locations/[^/]+/repositories/{repository}/packages/"
TAG = r"[a-z0-9][a-z0-9._-]{0,127}"


@dataclass
class Package:
    """One pipeline's versions: by "sha256:…", the content and the resource; tag → version."""

    contents: dict[str, bytes] = field(default_factory=dict)
    versions: dict[str, Json] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class FakeTemplateRegistry(FakeServer):
    """The repositories; an upload creates them."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.packages: dict[tuple[str, str, str], Package] = {}  # by project, repository, name

    @route("POST", "/{project}/{repository}", "templates.upload")
    def _upload(self, request: Request) -> Response:
        fields = parse_form(request)
        content = fields.get("content", b"")
        # Check all tags before storing anything: a rejected upload leaves no version.
        tags = [tag for tag in fields.get("tags", b"").decode().split(",") if tag]
        for tag in tags:
            if not re.fullmatch(TAG, tag):
                raise ApiError(400, f"the tag '{tag}' must match {TAG}")
        name, version = pipeline_name(content), f"sha256:{hashlib.sha256(content).hexdigest()}"
        key = request["project"], request["repository"], name
        package = self.packages.setdefault(key, Package())
        # The same content is the same version: it keeps its creation time and description.
        if version not in package.contents:
            package.contents[version] = content
            description = request.headers.get("description", "")
            package.versions[version] = {"createTime": timestamp(), "description": description}
        package.versions[version]["updateTime"] = timestamp()
        package.tags.update(dict.fromkeys(tags, version))
        request.message = {"name": name, "version": version, "tags": tags, "content": content}
        return Response(f"{name}/{version}".encode(), headers={"Content-Type": "text/plain"})

    @route("GET", "/{project}/{repository}/{package}/(?P<version>[^/]+)", "templates.download")
    def _download(self, request: Request) -> Response:
        package, name = self._package(request), request["version"]
        version = request.message = package.tags.get(name, name)  # a tag or a version
        if version not in package.contents:
            raise ApiError(404, f"version or tag {name} of {request['package']} not found")
        headers = {"Content-Type": "application/yaml"}
        return Response(package.contents[version], headers=headers)

    @route("GET", LOCATION + "{package})/versions/(?P<version>[^/]+)", "versions.get")
    def _get_version(self, request: Request) -> Json:
        package, version = self._package(request), request["version"]
        if version not in package.versions:
            raise ApiError(404, f"version {version} not found")
        parent = request["parent"]
        tags = [
            {"name": f"{parent}/tags/{tag}", "version": f"{parent}/versions/{version}"}
            for tag, target in package.tags.items()
            if target == version
        ]
        name = f"{parent}/versions/{version}"
        return {"name": name, **package.versions[version], "relatedTags": tags}

    def _package(self, request: Request) -> Package:
        key = request["project"], request["repository"], request["package"]
        if key not in self.packages:
            raise ApiError(404, f"package {'/'.join(key)} not found")
        return self.packages[key]


def parse_form(request: Request) -> dict[str, bytes]:
    """Parse the fields of a multipart/form-data body."""
    content_type = request.headers.get("content-type", "")
    boundary = re.search(r'multipart/form-data;.*boundary="?([^";]+)', content_type)
    if not boundary:
        raise ApiError(400, "expected multipart/form-data with content and tags")
    fields = {}
    # Before the first boundary and after the last one there is no part.
    for part in request.body.split(b"--" + boundary[1].encode())[1:-1]:
        headers, _, content = part.partition(b"\r\n\r\n")
        if name := re.search(rb'name="([^"]+)"', headers):
            fields[name[1].decode()] = content.removesuffix(b"\r\n")
    return fields


def pipeline_name(content: bytes) -> str:
    """Parse a compiled pipeline strictly and return its name."""
    # Imported here, so that tests without a pipeline do not need kfp.
    import yaml
    from google.protobuf import json_format
    from kfp.pipeline_spec import pipeline_spec_pb2

    errors: Any = (yaml.YAMLError, json_format.ParseError, StopIteration, AttributeError, TypeError)
    try:
        # The pipeline is the first document; the others describe the platform.
        document = next(yaml.safe_load_all(content))
        spec = json_format.ParseDict(document, pipeline_spec_pb2.PipelineSpec())
    except (*errors, UnicodeDecodeError) as error:
        raise ApiError(400, f"the content is not a compiled pipeline: {error}") from None
    if not spec.pipeline_info.name:
        raise ApiError(400, "the pipeline has no name")
    return str(spec.pipeline_info.name)
