"""Uploads to the fake of Cloud Storage: in one request, multipart, or resumable in chunks."""

import re
import uuid
from dataclasses import dataclass, field
from typing import Any

from level_2_cicd.rehearsal.server import ApiError, Json, Request, Response, route
from level_2_cicd.rehearsal.transport import parse_json

PATH = "/(?:resumable/)?upload/storage/v1/b/{bucket}/o"
CHUNK = 256 * 1024  # chunks of a resumable upload are multiples of this, except the last


@dataclass
class Session:
    """A resumable upload."""

    bucket: str
    name: str
    metadata: Json
    query: dict[str, str]
    content: bytearray = field(default_factory=bytearray)
    result: Json | None = None


class Uploads:
    """Handlers of uploads."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        self.sessions: dict[str, Session] = {}

    @route("POST", PATH, "objects.insert")
    def _insert(self, request: Request) -> Any:
        bucket, query = request["bucket"], request.query
        self.storage.bucket(bucket)
        content_type = request.headers.get("content-type", "")
        if query.get("uploadType") == "resumable":
            return self._start_session(request)
        if query.get("uploadType") == "multipart":
            metadata, content = parse_multipart(request)
        else:
            metadata, content = {"contentType": content_type}, request.body
        # Clients send the name in the query or in the metadata.
        name = query.get("name") or metadata.get("name", "")
        request.message = {**metadata, "name": name}
        return self.storage.files.write(bucket, name, content, metadata, query)

    def _start_session(self, request: Request) -> Response:
        metadata = request.json()
        if "x-upload-content-type" in request.headers:
            metadata.setdefault("contentType", request.headers["x-upload-content-type"])
        name = request.query.get("name") or metadata.get("name", "")
        request.message = {**metadata, "name": name}
        # Check preconditions now and again at the end, because the object may change meanwhile.
        self.storage.files.check_write(request["bucket"], name, request.query)
        session = uuid.uuid4().hex
        self.sessions[session] = Session(request["bucket"], name, metadata, request.query)
        uri = f"http://{request.headers['host']}{request.path}?uploadType=resumable"
        location = {"Location": f"{uri}&upload_id={session}", "X-GUploader-UploadID": session}
        return Response(b"", headers=location)

    @route("PUT", PATH, "objects.insert.chunk")
    def _insert_chunk(self, request: Request) -> Any:
        session = self.sessions.get(request.query.get("upload_id", ""))
        if session is None or session.bucket != request["bucket"]:
            raise ApiError(404, "Upload session not found; start a new one.", "notFound")
        request.message = request.body
        # The client repeats the last chunk if its response was lost: do not write again.
        if session.result is not None:
            return session.result
        total = self._add_chunk(session, request)
        content = bytes(session.content)
        if total == str(len(content)):
            session.result = self.storage.files.write(
                session.bucket, session.name, content, session.metadata, session.query
            )
            return session.result
        # 308: the client continues after this range.
        received = {"Range": f"bytes=0-{len(content) - 1}"} if content else {}
        return Response(b"", 308, received)

    def _add_chunk(self, session: Session, request: Request) -> str:
        """Add a chunk; return the upload's total size, or * if it is still unknown."""
        body = request.body
        # Without a Content-Range, the request has the whole content.
        whole = f"bytes 0-{len(body) - 1}/{len(body)}" if body else "bytes */0"
        header = request.headers.get("content-range", whole)
        match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", header)
        if not match:
            raise ApiError(400, f"Invalid Content-Range: {header}", "badRequest")
        # "bytes */…" has no content: the client requests the received range only.
        if match[1]:
            start, end = int(match[1]), int(match[2]) + 1
            if end - start != len(body) or start > len(session.content):
                received = f"received {len(body)} bytes after {len(session.content)}"
                raise ApiError(400, f"Content-Range {header}: {received}", "badRequest")
            if match[3] == "*" and len(body) % CHUNK:
                raise ApiError(400, f"a chunk must be a multiple of {CHUNK} bytes", "badRequest")
            session.content[start:] = body  # a repeated chunk replaces itself
        return match[3]


def parse_multipart(request: Request) -> tuple[Json, bytes]:
    """Parse metadata and content of a multipart/related body."""
    # gcloud puts the boundary in single quotes.
    boundary = re.search(r"""boundary=["']?([^"';]+)""", request.headers.get("content-type", ""))
    line = re.escape(boundary[1].encode()) if boundary else b""
    parts = re.fullmatch(
        rb"(?:\r?\n)?--%b(\r?\n).*?\r?\n\r?\n(.*?)\r?\n--%b\r?\n(.*?)\r?\n\r?\n(.*)--%b--\s*"
        % (line, line, line),
        request.body,
        re.DOTALL,
    )
    if not boundary or not parts:
        raise ApiError(400, "Malformed multipart body.", "badRequest")
    # The line break before the last boundary is not part of the content.
    newline, metadata, headers, content = parts.groups()
    match = re.search(rb"content-type:\s*([^\r\n]+)", headers, re.IGNORECASE)
    content_type = {"contentType": match[1].decode()} if match else {}
    return {**content_type, **parse_json(metadata)}, content.removesuffix(newline)
