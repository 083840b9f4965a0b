"""Fake of Cloud Storage's JSON API. Objects are files below a folder; see storage_objects.py.

STORAGE_EMULATOR_HOST=`address` sends Google's client here.
"""

import base64
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from level_2_cicd.rehearsal.server import ApiError, FakeServer, Json, Request, Response, route
from level_2_cicd.rehearsal.storage_notifications import Notifications
from level_2_cicd.rehearsal.storage_objects import Objects, check_preconditions
from level_2_cicd.rehearsal.storage_uploads import Uploads

BUCKET = "/storage/v1/b/{bucket}"
OBJECT = f"{BUCKET}/o/{{object=**}}"
# A path of the XML API, which Go's client (Terraform) uses to read objects.
XML_OBJECT = r"/(?!storage/|download/|upload/|resumable/){bucket}/{object=**}"
PAGE = 1000  # objects in a list's page


class FakeStorage(FakeServer):
    """Cloud Storage.

    Args:
        root: the folder of the buckets; existing buckets are served.
        pubsub: base URL of Pub/Sub for notifications, such as http://127.0.0.1:8085.
    """

    def __init__(self, root: Path, port: int = 0, pubsub: str = "") -> None:
        super().__init__(port)
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self._settings: dict[str, Json] = {}  # of buckets
        self.notifications = Notifications(self, pubsub)
        self.files = Objects(self)
        self.add_routes(Uploads(self))
        self.add_routes(self.notifications)

    def create_bucket(self, bucket: str, **settings: Any) -> Path:
        """Create a bucket with settings, named as in the API, and return its folder."""
        with self.lock:
            (self.root / bucket).mkdir(exist_ok=True)
            self._settings[bucket] = {**self._settings.get(bucket, {}), **settings}
        return self.root / bucket

    def objects(self, bucket: str) -> dict[str, Json]:
        """Return a bucket's objects by name."""
        with self.lock:
            return {name: self.files.resource(bucket, name) for name in self.files.names(bucket)}

    def bucket(self, name: str) -> Json:
        """Return a bucket's resource."""
        # .uploads contains files that are not objects yet.
        if name.startswith(".") or not (self.root / name).is_dir():
            raise ApiError(404, "The specified bucket does not exist.", "notFound")
        return {
            "kind": "storage#bucket",
            "id": name,
            "name": name,
            "location": "EUROPE-WEST4",
            "locationType": "region",
            "storageClass": "STANDARD",
            "metageneration": "1",
            **self._settings.get(name, {}),
        }

    @route("POST", "/storage/v1/b", "buckets.insert")
    def _insert_bucket(self, request: Request) -> Json:
        settings = request.message = request.json()
        name = settings.get("name", "")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", name):
            raise ApiError(400, f"Invalid bucket name: '{name}'", "invalid")
        if (self.root / name).is_dir():
            raise ApiError(409, "You already own this bucket.", "conflict")
        self.create_bucket(**settings, bucket=name)
        return self.bucket(name)

    @route("GET", BUCKET, "buckets.get")
    def _get_bucket(self, request: Request) -> Json:
        return self.bucket(request["bucket"])

    # gcloud requests the layout before it lists or copies.
    @route("GET", f"{BUCKET}/storageLayout", "buckets.getStorageLayout")
    def _get_layout(self, request: Request) -> Json:
        bucket = self.bucket(request["bucket"])
        layout = {"bucket": bucket["name"], "location": bucket["location"]}
        return {"kind": "storage#storageLayout", **layout}

    @route("GET", f"{BUCKET}/o", "objects.list")
    def _list(self, request: Request) -> Json:
        bucket, query = request["bucket"], request.query
        self.bucket(bucket)
        request.message = query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        is_object: dict[str, bool] = {}  # by name of an object, or common prefix of several
        for name in self.files.names(bucket):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            end = name.find(delimiter, len(prefix)) if delimiter else -1
            # All names below a common prefix collapse into one entry.
            is_object[name if end < 0 else name[: end + len(delimiter)]] = end < 0
        # The token is the last name, not an index: the next page is correct even after deletions.
        last = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
        size = min(PAGE, int(query.get("maxResults") or PAGE))
        names = sorted(name for name in is_object if name > last)
        page = names[:size]
        token = base64.urlsafe_b64encode(page[-1].encode()).decode() if page != names else ""
        return {
            "kind": "storage#objects",
            "items": [self.files.resource(bucket, name) for name in page if is_object[name]],
            "prefixes": [name for name in page if not is_object[name]],
            **({"nextPageToken": token} if token else {}),
        }

    @route("GET", f"(?:/download)?{OBJECT}", "objects.get")
    def _get(self, request: Request) -> Any:
        resource = self.files.find(request["bucket"], request["object"], request.query)
        check_preconditions(resource, request.query)
        # Without alt=media, the API returns the metadata.
        if request.query.get("alt") != "media":
            return resource
        # Clients verify a download with the hash in these headers.
        headers = {
            "ETag": resource["etag"],
            "X-Goog-Generation": resource["generation"],
            "X-Goog-Metageneration": resource["metageneration"],
            "X-Goog-Hash": f"crc32c={resource['crc32c']},md5={resource['md5Hash']}",
            "X-Goog-Stored-Content-Length": resource["size"],
            "X-Goog-Stored-Content-Encoding": resource.get("contentEncoding", "identity"),
            "Content-Type": resource["contentType"],
        }
        content = self.files.path(request["bucket"], request["object"]).read_bytes()
        return byte_range(content, request.headers.get("range", ""), headers)

    @route("GET", XML_OBJECT, "objects.get")
    def _get_xml(self, request: Request) -> Any:
        return self._get(replace(request, query={**request.query, "alt": "media"}))

    @route("DELETE", OBJECT, "objects.delete")
    def _delete(self, request: Request) -> Response:
        resource = self.files.find(request["bucket"], request["object"], request.query)
        check_preconditions(resource, request.query)
        self.files.path(request["bucket"], request["object"]).unlink()
        self.notifications.send(self.end_event(request["bucket"]), resource)
        return Response(b"", 204)

    def end_event(self, bucket: str) -> str:
        """Return the event type of a deleted or overwritten object."""
        # With versioning, Cloud Storage archives an object instead of deleting it.
        versioning = self._settings.get(bucket, {}).get("versioning", {})
        return "OBJECT_ARCHIVE" if versioning.get("enabled") else "OBJECT_DELETE"


def byte_range(content: bytes, header: str, headers: dict[str, str]) -> Response:
    """Return the content, or the range that a header names: bytes=A-B, bytes=A- or bytes=-N."""
    # As HTTP requires, an invalid header is ignored and a range outside the content rejected.
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if not match or match[0] == "bytes=-":
        return Response(content, headers=headers)
    size = len(content)
    start = int(match[1]) if match[1] else max(0, size - int(match[2]))
    end = min(size, int(match[2]) + 1) if match[1] and match[2] else size
    if start >= size or end <= start:
        message = "The requested range cannot be satisfied."
        raise ApiError(416, message, "requestedRangeNotSatisfiable")
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Response(content[start:end], 206, headers)
