"""Objects of the fake of Cloud Storage, as files that containers can mount at /gcs.

gs://BUCKET/NAME is the file ROOT/BUCKET/NAME. Its modification time in microseconds is the
generation of the object, so a file that a container writes is an object too.
"""

import base64
import hashlib
import os
import shutil
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import google_crc32c

from level_2_cicd.rehearsal.transport import ApiError, Json, timestamp

# Metadata that a client may set; the service sets the rest.
SETTABLE = {"contentType", "contentEncoding", "cacheControl", "metadata", "customTime"}


class Objects:
    """The objects of all buckets."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        self._metadata: dict[tuple[str, str, int], Json] = {}  # by bucket, name, generation
        self._hashes: dict[tuple[str, str, int, int], Json] = {}  # by the same, and size
        self._last_generation = 0

    def names(self, bucket: str) -> list[str]:
        """Return the names of a bucket's objects, sorted."""
        # Walk the folder instead of keeping a list: containers add files at any time.
        root = self.storage.root / bucket
        files = (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
        return sorted(file.relative_to(root).as_posix() for file in files)

    def path(self, bucket: str, name: str) -> Path:
        """Return an object's file; reject names that are not valid paths."""
        # ".." would leave the bucket's folder.
        invalid = {"", ".", ".."} & set(name.split("/")) or "\0" in name
        if invalid or len(name.encode()) > 1024:
            message = f"objects are files here, and '{name}' is not a valid file name"
            raise ApiError(400, message, "invalid")
        root: Path = self.storage.root
        return root / bucket / name

    def find(self, bucket: str, name: str, query: dict[str, str]) -> Json:
        """Return an object's resource in the generation of the query, by default the current."""
        self.storage.bucket(bucket)
        if not name.endswith("/") and self.path(bucket, name).is_file():
            resource = self.resource(bucket, name)
            if query.get("generation", resource["generation"]) == resource["generation"]:
                return resource
        raise ApiError(404, f"No such object: {bucket}/{name}", "notFound")

    def resource(self, bucket: str, name: str) -> Json:
        """Return the resource of an existing object."""
        path = self.path(bucket, name)
        status = path.stat()
        generation = status.st_mtime_ns // 1000
        # Cache the hashes: hashing large files at each call would be slow.
        key = (bucket, name, generation, status.st_size)
        if key not in self._hashes:
            self._hashes[key] = hashes(path.read_bytes())
        modified = timestamp(datetime.fromtimestamp(generation / 1e6, UTC))
        uri, quoted = f"{self.storage.address}/", f"storage/v1/b/{bucket}/o/{quote(name, safe='')}"
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{generation}",
            "selfLink": uri + quoted,
            "mediaLink": f"{uri}download/{quoted}?alt=media",
            "name": name,
            "bucket": bucket,
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "size": str(status.st_size),
            "timeCreated": modified,
            "updated": modified,
            "etag": base64.b64encode(f"{generation}/1".encode()).decode(),
            **self._hashes[key],
            **self._metadata.get((bucket, name, generation), {}),
        }

    def check_write(self, bucket: str, name: str, query: dict[str, str]) -> Json | None:
        """Return the object that a write would overwrite; reject an invalid write."""
        path = self.path(bucket, name)
        old = self.resource(bucket, name) if path.is_file() else None
        check_preconditions(old, query)
        if path.is_dir() and any(files for _, _, files in os.walk(path)):
            raise ApiError(400, f"objects are files here: '{name}' is a folder", "invalid")
        return old

    def write(
        self, bucket: str, name: str, content: bytes, metadata: Json, query: dict[str, str]
    ) -> Json:
        """Write an object atomically and publish the events."""
        old = self.check_write(bucket, name, query)
        # Before writing: content damaged on the way must not become an object.
        for kind, value in hashes(content).items():
            if metadata.get(kind, value) != value:
                message = f"Provided {kind} {metadata[kind]} doesn't match calculated {value}."
                raise ApiError(400, message, "invalid")
        # Generations must grow even if two writes share a microsecond or the clock goes back.
        generation = max(time.time_ns() // 1000, self._last_generation + 1)
        if old:
            generation = max(generation, int(old["generation"]) + 1)
        self._last_generation = generation
        self._replace(self.path(bucket, name), content, generation)
        settings = {key: value for key, value in metadata.items() if key in SETTABLE and value}
        self._metadata[bucket, name, generation] = settings
        new = self.resource(bucket, name)
        notify = self.storage.notifications.send
        if old:
            notify(self.storage.end_event(bucket), old, overwrittenByGeneration=new["generation"])
        notify(
            "OBJECT_FINALIZE", new, **({"overwroteGeneration": old["generation"]} if old else {})
        )
        return new

    def _replace(self, path: Path, content: bytes, generation: int) -> None:
        if path.is_dir():
            shutil.rmtree(path)  # it has only empty folders: see check_write
        # Write elsewhere and rename: readers see the old or the new content, never a part.
        temporary = self.storage.root / ".uploads" / uuid.uuid4().hex
        temporary.parent.mkdir(exist_ok=True)
        temporary.write_bytes(content)
        # Before the rename, so that the object never has another generation.
        os.utime(temporary, ns=(generation * 1000, generation * 1000))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            message = f"objects are files here: a folder of '{path.name}' is an object"
            raise ApiError(400, message, "invalid") from None
        temporary.replace(path)


def check_preconditions(resource: Json | None, query: dict[str, str]) -> None:
    """Check an object, or its absence, against ifGenerationMatch and similar parameters."""
    for name in ("generation", "metageneration"):
        # An absent object has generation 0: ifGenerationMatch=0 means "create only".
        current, parameter = resource[name] if resource else "0", f"if{name.capitalize()}"
        matches = query.get(f"{parameter}Match", current) == current
        if not matches or query.get(f"{parameter}NotMatch") == current:
            message = "At least one of the pre-conditions you specified did not hold."
            raise ApiError(412, message, "conditionNotMet")


def hashes(content: bytes) -> Json:
    """Return MD5 and CRC-32C in base64."""
    crc32c: Any = google_crc32c
    digests = {
        "md5Hash": hashlib.md5(content, usedforsecurity=False).digest(),
        "crc32c": crc32c.Checksum(content).digest(),
    }
    return {name: base64.b64encode(digest).decode() for name, digest in digests.items()}
