"""A double of Cloud Storage's JSON API, whose objects are files.

`with FakeStorage(root) as storage:` keeps the object gs://BUCKET/NAME as the file root/BUCKET/NAME, so that `root` can be mounted
as /gcs in a container. What a container writes there is an object too. A file's time of change, in microseconds, is the
object's generation.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import google_crc32c

from rehearsal.server import ApiError, FakeServer, Request, Response

Json = dict[str, Any]

BUCKET, OBJECT = r"/storage/v1/b/([^/]+)", r"/storage/v1/b/([^/]+)/o/(.+)"
UPLOAD = r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o"
XML_OBJECT = r"/(?!storage/|download/|upload/|resumable/)([^/]+)/(.+)"  # of the XML interface, with which Go's client reads
CHUNK = 256 * 1024  # chunks of a resumable upload are multiples of it
PAGE = 1000  # objects in an answer
# What a client may say of an object; the rest is the service's.
SETTABLE = {
    "contentType",
    "contentEncoding",
    "contentDisposition",
    "contentLanguage",
    "cacheControl",
    "metadata",
    "customTime",
    "temporaryHold",
    "eventBasedHold",
}


@dataclass
class Session:
    """A resumable upload under way."""

    bucket: str
    name: str
    metadata: Json
    query: dict[str, str]
    content: bytearray = field(default_factory=bytearray)
    result: Json | None = None


class FakeStorage(FakeServer):
    """Cloud Storage on this machine; STORAGE_EMULATOR_HOST=`address` brings Google's client to it.

    Args:
        root: the buckets' folder; buckets that are there already are known.
        pubsub: where notifications are published, such as http://127.0.0.1:8085, as the Pub/Sub emulator listens.
    """

    def __init__(self, root: Path, port: int = 0, pubsub: str = "") -> None:
        super().__init__(port)
        self.root, self.pubsub = Path(root), pubsub.rstrip("/")
        self.root.mkdir(parents=True, exist_ok=True)
        self.sessions: dict[str, Session] = {}
        self._buckets: dict[str, Json] = {}
        self._metadata: dict[tuple[str, str, int], Json] = {}  # of an object's generation
        self._hashes: dict[tuple[str, str, int, int], Json] = {}
        self._notifications: dict[str, dict[str, Json]] = {}
        self._newest = 0
        one_notification = rf"{BUCKET}/notificationConfigs/([^/]+)"
        copy = rf"{OBJECT}/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.+)"
        self.routes = [
            ("POST", r"/storage/v1/b", "buckets.insert", self._insert_bucket),
            ("GET", r"/storage/v1/b", "buckets.list", self._list_buckets),
            ("GET", BUCKET, "buckets.get", self._get_bucket),
            ("PATCH", BUCKET, "buckets.patch", self._patch_bucket),
            ("DELETE", BUCKET, "buckets.delete", self._delete_bucket),
            ("GET", rf"{BUCKET}/iam/testPermissions", "buckets.testIamPermissions", self._test_permissions),
            ("GET", rf"{BUCKET}/storageLayout", "buckets.getStorageLayout", self._get_layout),
            ("POST", rf"{BUCKET}/notificationConfigs", "notifications.insert", self._insert_notification),
            ("GET", rf"{BUCKET}/notificationConfigs", "notifications.list", self._list_notifications),
            ("GET", one_notification, "notifications.get", self._get_notification),
            ("DELETE", one_notification, "notifications.delete", self._delete_notification),
            ("GET", r"/storage/v1/projects/([^/]+)/serviceAccount", "projects.serviceAccount.get", self._service_account),
            ("POST", UPLOAD, "objects.insert", self._insert),
            ("PUT", UPLOAD, "objects.insert.chunk", self._insert_chunk),
            ("DELETE", UPLOAD, "objects.insert.cancel", self._cancel_insert),
            ("GET", rf"{BUCKET}/o", "objects.list", self._list),
            ("POST", copy, "objects.rewrite", self._rewrite),
            ("POST", rf"{OBJECT}/compose", "objects.compose", self._compose),
            ("GET", rf"(?:/download)?{OBJECT}", "objects.get", self._get),
            ("PATCH", OBJECT, "objects.patch", self._patch),
            ("DELETE", OBJECT, "objects.delete", self._delete),
            ("GET", XML_OBJECT, "objects.get", self._get_xml),
        ]

    # What tests say and ask, without HTTP.

    def create_bucket(self, bucket: str, **settings: Any) -> Path:
        """Make a bucket, with settings as the API names them; its folder."""
        with self.lock:
            (self.root / bucket).mkdir(exist_ok=True)
            self._buckets[bucket] = {**self._buckets.get(bucket, {}), **settings}
        return self.root / bucket

    def objects(self, bucket: str) -> dict[str, Json]:
        """Name → the object's resource."""
        with self.lock:
            return {name: self._resource(bucket, name) for name in self._names(bucket)}

    # Buckets.

    def _insert_bucket(self, request: Request, _: re.Match[str]) -> tuple[Any, Response]:
        asked = _json(request.body)
        name = asked.get("name", "")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", name):
            raise ApiError(400, f"Invalid bucket name: '{name}'", "invalid")
        if (self.root / name).is_dir():
            raise ApiError(409, "Your previous request to create the named bucket succeeded and you already own it.", "conflict")
        self.create_bucket(name, **asked)
        return asked, Response(self._bucket(name))

    def _list_buckets(self, request: Request, _: re.Match[str]) -> tuple[Any, Response]:
        names = sorted(path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))
        items = [self._bucket(name) for name in names if name.startswith(request.query.get("prefix", ""))]
        return request.query, Response({"kind": "storage#buckets", "items": items})

    def _get_bucket(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        return None, Response(self._bucket(found[1]))

    def _patch_bucket(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._bucket(found[1])
        self.create_bucket(found[1], **_json(request.body))
        return _json(request.body), Response(self._bucket(found[1]))

    def _delete_bucket(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._bucket(found[1])
        if self._names(found[1]):
            raise ApiError(409, "The bucket you tried to delete is not empty.", "conflict")
        shutil.rmtree(self.root / found[1])  # there are only folders in it
        self._buckets.pop(found[1], None)
        return None, Response(b"", 204)

    def _test_permissions(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._bucket(found[1])
        asked = request.repeated.get("permissions", [])
        return asked, Response({"kind": "storage#testIamPermissionsResponse", "permissions": asked})

    def _get_layout(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        location = self._bucket(found[1])["location"]
        return None, Response({"kind": "storage#storageLayout", "bucket": found[1], "location": location})

    def _service_account(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        email = f"service-{found[1]}@gs-project-accounts.iam.gserviceaccount.com"
        return None, Response({"kind": "storage#serviceAccount", "email_address": email})

    def _bucket(self, name: str) -> Json:
        """A bucket's resource.

        Raises:
            ApiError: there is no such bucket.
        """
        if name.startswith(".") or not (self.root / name).is_dir():
            raise ApiError(404, "The specified bucket does not exist.", "notFound")
        standard = {"location": "EUROPE-WEST4", "locationType": "region", "storageClass": "STANDARD", "metageneration": "1"}
        return {"kind": "storage#bucket", "id": name, "name": name, **standard, **self._buckets.get(name, {})}

    # Notifications.

    def _insert_notification(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._bucket(found[1])
        asked = _json(request.body)
        if not re.fullmatch(r"//pubsub\.googleapis\.com/projects/[^/]+/topics/[^/]+", asked.get("topic", "")):
            raise ApiError(400, f"Invalid Google Cloud Pub/Sub topic: '{asked.get('topic', '')}'", "invalid")
        if asked.get("payload_format") not in ("JSON_API_V1", "NONE"):
            raise ApiError(400, "Invalid payload format: JSON_API_V1 and NONE are allowed.", "invalid")
        of_bucket = self._notifications.setdefault(found[1], {})
        number = str(max(map(int, of_bucket), default=0) + 1)
        of_bucket[number] = {"kind": "storage#notification", **asked, "id": number, "etag": number}
        return asked, Response(of_bucket[number])

    def _list_notifications(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._bucket(found[1])
        return None, Response({"kind": "storage#notifications", "items": list(self._notifications.get(found[1], {}).values())})

    def _get_notification(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        return None, Response(self._notification(found))

    def _delete_notification(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._notification(found)
        del self._notifications[found[1]][found[2]]
        return None, Response(b"", 204)

    def _notification(self, found: re.Match[str]) -> Json:
        self._bucket(found[1])
        if found[2] not in self._notifications.get(found[1], {}):
            raise ApiError(404, "Notification not found.", "notFound")
        return self._notifications[found[1]][found[2]]

    def _notify(self, kind: str, resource: Json, **more: str) -> None:
        """Publish an event: OBJECT_FINALIZE, OBJECT_DELETE, OBJECT_ARCHIVE or OBJECT_METADATA_UPDATE."""
        for number, wanted in self._notifications.get(resource["bucket"], {}).items():
            if wanted.get("event_types") and kind not in wanted["event_types"]:
                continue
            if not resource["name"].startswith(wanted.get("object_name_prefix", "")):
                continue
            attributes = {
                **wanted.get("custom_attributes", {}),
                "eventType": kind,
                "bucketId": resource["bucket"],
                "objectId": resource["name"],
                "objectGeneration": resource["generation"],
                "eventTime": _now(),
                "notificationConfig": f"projects/_/buckets/{resource['bucket']}/notificationConfigs/{number}",
                "payloadFormat": wanted["payload_format"],
                **more,
            }
            payload = json.dumps(resource).encode() if wanted["payload_format"] == "JSON_API_V1" else b""
            self._publish(wanted["topic"], {"data": base64.b64encode(payload).decode(), "attributes": attributes})

    def _publish(self, topic: str, message: Json) -> None:
        if not self.pubsub:
            return
        address = f"{self.pubsub}/v1/{topic.removeprefix('//pubsub.googleapis.com/')}:publish"
        body = json.dumps({"messages": [message]}).encode()
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).close()
        except OSError as error:
            raise ApiError(500, f"the object is stored, but the notification to {address} failed: {error}") from None

    # Objects: reading.

    def _get_xml(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        return self._get(replace(request, query={**request.query, "alt": "media"}), found)

    def _get(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        resource = self._existing(found[1], found[2], request.query)
        if request.query.get("ifGenerationNotMatch") == resource["generation"]:
            return None, Response(b"", 304)
        _require(resource, request.query)
        if request.query.get("alt") != "media":
            return None, Response(resource)
        content = self._path(found[1], found[2]).read_bytes()
        headers = {
            "ETag": resource["etag"],
            "X-Goog-Generation": resource["generation"],
            "X-Goog-Metageneration": resource["metageneration"],
            "X-Goog-Hash": f"crc32c={resource['crc32c']},md5={resource['md5Hash']}",
            "X-Goog-Stored-Content-Length": resource["size"],
            "X-Goog-Stored-Content-Encoding": resource.get("contentEncoding", "identity"),
            "Content-Type": resource["contentType"],
        }
        return None, _part(content, request.headers.get("range", ""), headers)

    def _list(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._bucket(found[1])
        query = request.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        entries: dict[str, bool] = {}  # name or prefix → whether it is an object
        for name in self._names(found[1]):
            if not name.startswith(prefix) or not query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff"):
                continue
            if "matchGlob" in query and not fnmatch.fnmatchcase(name, query["matchGlob"].replace("**", "*")):
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            if cut < 0:
                entries[name] = True
            else:
                entries.setdefault(name[: cut + len(delimiter)], False)
        after = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
        size = min(PAGE, int(query.get("maxResults") or PAGE))
        page = sorted(entry for entry in entries if entry > after)
        answer: Json = {"kind": "storage#objects"}
        if len(page) > size:
            page = page[:size]
            answer["nextPageToken"] = base64.urlsafe_b64encode(page[-1].encode()).decode()
        answer["items"] = [self._resource(found[1], entry) for entry in page if entries[entry]]
        answer["prefixes"] = [entry for entry in page if not entries[entry]]
        return query, Response(answer)

    def _names(self, bucket: str) -> list[str]:
        folder = self.root / bucket
        paths = (Path(where) / name for where, _, files in os.walk(folder) for name in files)
        return sorted(path.relative_to(folder).as_posix() for path in paths)

    def _path(self, bucket: str, name: str) -> Path:
        """An object's file.

        Raises:
            ApiError: no file can have such a name.
        """
        if {"", ".", ".."} & set(name.split("/")) or "\0" in name or len(name.encode()) > 1024:
            raise ApiError(400, f"objects are files here, and none can be called '{name}'", "invalid")
        return self.root / bucket / name

    def _existing(self, bucket: str, name: str, query: dict[str, str]) -> Json:
        """An object's resource.

        Raises:
            ApiError: it is not there, or not in the generation that is asked for.
        """
        self._bucket(bucket)
        there = not name.endswith("/") and self._path(bucket, name).is_file()
        resource = self._resource(bucket, name) if there else None
        if resource is None or query.get("generation", resource["generation"]) != resource["generation"]:
            raise ApiError(404, f"No such object: {bucket}/{name}", "notFound")
        return resource

    def _resource(self, bucket: str, name: str) -> Json:
        path = self._path(bucket, name)
        status = path.stat()
        generation = status.st_mtime_ns // 1000
        said = self._metadata.get((bucket, name, generation), {})
        changed = datetime.fromtimestamp(generation / 1e6, UTC).isoformat().replace("+00:00", "Z")
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{generation}",
            "selfLink": f"{self.address}/storage/v1/b/{bucket}/o/{quote(name, safe='')}",
            "mediaLink": f"{self.address}/download/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media",
            "name": name,
            "bucket": bucket,
            "generation": str(generation),
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "size": str(status.st_size),
            **self._hash(bucket, name, generation, status.st_size),
            "timeCreated": changed,
            "updated": changed,
            "metageneration": "1",
            **said,
            "etag": base64.b64encode(f"{generation}/{said.get('metageneration', '1')}".encode()).decode(),
        }

    def _hash(self, bucket: str, name: str, generation: int, size: int) -> Json:
        key = (bucket, name, generation, size)
        if key not in self._hashes:
            self._hashes[key] = _hashes(self._path(bucket, name).read_bytes())
        return self._hashes[key]

    # Objects: writing.

    def _insert(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._bucket(found[1])
        way, kind = request.query.get("uploadType", "media"), request.headers.get("content-type", "")
        if way == "resumable":
            return self._begin(request, found[1])
        if way == "multipart":
            metadata, content = _parts(kind, request.body)
        else:
            metadata, content = {"contentType": kind}, request.body
        name = request.query.get("name") or metadata.get("name", "")
        return {**metadata, "name": name}, Response(self._write(found[1], name, content, metadata, request.query))

    def _begin(self, request: Request, bucket: str) -> tuple[Any, Response]:
        metadata = _json(request.body or b"{}")
        if "x-upload-content-type" in request.headers:
            metadata.setdefault("contentType", request.headers["x-upload-content-type"])
        name = request.query.get("name") or metadata.get("name", "")
        self._require(bucket, name, request.query)
        number = uuid.uuid4().hex
        self.sessions[number] = Session(bucket, name, metadata, request.query)
        here = f"http://{request.headers['host']}{request.path}?uploadType=resumable&upload_id={number}"
        return {**metadata, "name": name}, Response(b"", headers={"Location": here, "X-GUploader-UploadID": number})

    def _insert_chunk(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        session = self._session(request, found[1])
        if session.result is not None:
            return request.body, Response(session.result)
        whole = f"bytes 0-{len(request.body) - 1}/{len(request.body)}" if request.body else "bytes */0"
        said = request.headers.get("content-range", whole)
        part = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", said)
        if not part:
            raise ApiError(400, f"Invalid Content-Range: {said}", "badRequest")
        if part[1]:
            begin, end = int(part[1]), int(part[2]) + 1
            if end - begin != len(request.body) or begin > len(session.content):
                raise ApiError(400, f"{said}: {len(request.body)} bytes came, {len(session.content)} are there", "badRequest")
            if part[3] in ("*", "") and len(request.body) % CHUNK:
                raise ApiError(400, f"a chunk before the last must be a multiple of {CHUNK} bytes", "badRequest")
            session.content[begin:] = request.body
        if part[3] != "*" and len(session.content) == int(part[3]):
            session.result = self._write(session.bucket, session.name, bytes(session.content), session.metadata, session.query)
            return request.body, Response(session.result)
        there = {"Range": f"bytes=0-{len(session.content) - 1}"} if session.content else {}
        return request.body, Response(b"", 308, there)

    def _cancel_insert(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._session(request, found[1])
        del self.sessions[request.query["upload_id"]]
        return None, Response(b"", 499)

    def _session(self, request: Request, bucket: str) -> Session:
        session = self.sessions.get(request.query.get("upload_id", ""))
        if session is None or session.bucket != bucket:
            raise ApiError(404, "there is no such upload; begin it again", "notFound")
        return session

    def _rewrite(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        asked, query = _json(request.body or b"{}"), request.query
        there = {"generation": query["sourceGeneration"]} if "sourceGeneration" in query else {}
        source = self._existing(found[1], found[2], there)
        _require(source, {name.replace("Source", ""): value for name, value in query.items() if "Source" in name})
        self._bucket(found[3])
        metadata = {**{name: source[name] for name in SETTABLE & source.keys()}, **asked}
        written = self._write(found[3], found[4], self._path(found[1], found[2]).read_bytes(), metadata, query)
        if "/copyTo/" in request.path:
            return asked, Response(written)
        size = {"totalBytesRewritten": written["size"], "objectSize": written["size"]}
        return asked, Response({"kind": "storage#rewriteResponse", **size, "done": True, "resource": written})

    def _compose(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        asked = _json(request.body)
        content = b""
        for part in asked.get("sourceObjects", []):
            query = {"generation": str(part["generation"])} if part.get("generation") else {}
            self._existing(found[1], part["name"], query)
            content += self._path(found[1], part["name"]).read_bytes()
        return asked, Response(self._write(found[1], found[2], content, asked.get("destination", {}), request.query))

    def _patch(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        resource, asked = self._existing(found[1], found[2], request.query), _json(request.body or b"{}")
        _require(resource, request.query)
        key = (found[1], found[2], int(resource["generation"]))
        said = self._metadata.get(key, {})
        changes = {name: value for name, value in asked.items() if name in SETTABLE}
        if isinstance(changes.get("metadata"), dict):
            changes["metadata"] = {**said.get("metadata", {}), **changes["metadata"]}
        number = str(int(resource["metageneration"]) + 1)
        self._metadata[key] = {**said, **changes, "metageneration": number, "updated": _now()}
        changed = self._resource(found[1], found[2])
        self._notify("OBJECT_METADATA_UPDATE", changed)
        return asked, Response(changed)

    def _delete(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        resource = self._existing(found[1], found[2], request.query)
        _require(resource, request.query)
        self._path(found[1], found[2]).unlink()
        self._notify(self._end(found[1]), resource)
        return None, Response(b"", 204)

    def _end(self, bucket: str) -> str:
        """What becomes of an object that is deleted or overwritten."""
        versioned = self._buckets.get(bucket, {}).get("versioning", {}).get("enabled")
        return "OBJECT_ARCHIVE" if versioned else "OBJECT_DELETE"

    def _require(self, bucket: str, name: str, query: dict[str, str]) -> Json | None:
        """The object that would be overwritten, if it may be.

        Raises:
            ApiError: a precondition does not hold, or no file can have this name.
        """
        path = self._path(bucket, name)
        old = self._resource(bucket, name) if path.is_file() else None
        _require(old, query)
        if path.is_dir() and any(files for _, _, files in os.walk(path)):
            raise ApiError(400, f"objects are files here: '{name}' is already a folder of others", "invalid")
        return old

    def _write(self, bucket: str, name: str, content: bytes, metadata: Json, query: dict[str, str]) -> Json:
        """Write an object as a whole, and tell who wants to know.

        Raises:
            ApiError: a precondition does not hold, or the content is not what its sender meant.
        """
        old = self._require(bucket, name, query)
        for kind, value in _hashes(content).items():
            if metadata.get(kind, value) != value:
                raise ApiError(400, f"Provided {kind} {metadata[kind]} doesn't match calculated {value}.", "invalid")
        path = self._path(bucket, name)
        if path.is_dir():
            shutil.rmtree(path)  # there are only folders in it
        aside = self.root / ".uploads" / uuid.uuid4().hex
        aside.parent.mkdir(exist_ok=True)
        aside.write_bytes(content)
        self._newest = generation = max(time.time_ns() // 1000, self._newest + 1, int(old["generation"]) + 1 if old else 0)
        os.utime(aside, ns=(generation * 1000, generation * 1000))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ApiError(400, f"objects are files here: a folder of '{name}' is already an object", "invalid") from None
        aside.replace(path)
        self._metadata[bucket, name, generation] = {key: value for key, value in metadata.items() if key in SETTABLE and value}
        new = self._resource(bucket, name)
        if old:
            self._notify(self._end(bucket), old, overwrittenByGeneration=new["generation"])
        replaced = {"overwroteGeneration": old["generation"]} if old else {}
        self._notify("OBJECT_FINALIZE", new, **replaced)
        return new


def _require(resource: Json | None, query: dict[str, str]) -> None:
    """Check an object, or its absence, against ifGenerationMatch and its like.

    Raises:
        ApiError: with 412.
    """
    for what in ("generation", "metageneration"):
        now, asked = resource[what] if resource else "0", f"if{what.capitalize()}"
        if query.get(f"{asked}Match", now) != now or query.get(f"{asked}NotMatch") == now:
            raise ApiError(412, "At least one of the pre-conditions you specified did not hold.", "conditionNotMet")


def _hashes(content: bytes) -> Json:
    """As Google gives them: base64 of MD5 and of CRC-32C."""
    checksum: Any = google_crc32c
    digests = {
        "md5Hash": hashlib.md5(content, usedforsecurity=False).digest(),
        "crc32c": checksum.Checksum(content).digest(),
    }
    return {name: base64.b64encode(digest).decode() for name, digest in digests.items()}


def _part(content: bytes, asked: str, headers: dict[str, str]) -> Response:
    """The content, or the range of it that is asked for: bytes=A-B, bytes=A- or bytes=-N."""
    part = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
    if not part or part[0] == "bytes=-":
        return Response(content, headers=headers)
    size = len(content)
    begin = int(part[1]) if part[1] else max(0, size - int(part[2]))
    end = min(size, int(part[2]) + 1) if part[1] and part[2] else size
    if begin >= size or end <= begin:
        raise ApiError(416, "The requested range cannot be satisfied.", "requestedRangeNotSatisfiable")
    headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
    return Response(content[begin:end], 206, headers)


def _parts(kind: str, body: bytes) -> tuple[Json, bytes]:
    """The metadata and the content of a multipart/related body.

    Raises:
        ApiError: it is none.
    """
    boundary = re.search(r"""boundary=["']?([^"';]+)""", kind)  # gcloud's stands in single quotation marks
    if not boundary:
        raise ApiError(400, f"Missing multipart boundary in the content type {kind}", "badRequest")
    line = re.escape(boundary[1].encode())
    pieces = re.fullmatch(
        rb"(?:\r?\n)?--%b(\r?\n).*?\r?\n\r?\n(.*?)\r?\n--%b\r?\n(.*?)\r?\n\r?\n(.*)--%b--\s*" % (line, line, line),
        body,
        re.DOTALL,
    )
    if not pieces:
        raise ApiError(400, "Malformed multipart body: metadata and content are wanted", "badRequest")
    new_line, metadata, headers, content = pieces.groups()
    found = re.search(rb"content-type:\s*([^\r\n]+)", headers, re.IGNORECASE)
    return {**({"contentType": found[1].decode()} if found else {}), **_json(metadata)}, content.removesuffix(new_line)


def _json(body: bytes) -> Json:
    try:
        document = json.loads(body)
    except ValueError:
        raise ApiError(400, "Parse Error", "parseError") from None
    if not isinstance(document, dict):
        raise ApiError(400, "a JSON object is wanted", "parseError")
    return document


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
