"""The fake of Cloud Storage, with Google's client and gcloud."""

import base64
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import requests
from google.api_core.exceptions import BadRequest, NotFound, PreconditionFailed
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY
from level_2_cicd.rehearsal.server import FakeServer, Json, Request, route
from level_2_cicd.rehearsal.storage import FakeStorage

RETRY = DEFAULT_RETRY.with_delay(initial=0.05)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStorage]:
    """Cloud Storage with the bucket "data"."""
    with FakeStorage(tmp_path / "cloud") as fake:
        fake.create_bucket("data")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", fake.address)
        monkeypatch.setenv("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        yield fake


@pytest.fixture
def bucket(fake: FakeStorage) -> Any:
    """The bucket in Google's client."""
    return storage.Client(project="p").bucket("data")


def noise(size: int) -> bytes:
    """Reproducible bytes; some look like line ends and boundaries."""
    return random.Random(size).randbytes(size) + b"\r\n--==\r\n"


# ── objects ─────────────────────────────────────────────────────────────────────────────────


def test_an_object_is_a_file_and_a_file_is_an_object(fake: FakeStorage, bucket: Any) -> None:
    blob = bucket.blob("a/b c+%2F?ü.bin")
    blob.metadata = {"key": "value"}
    blob.upload_from_string(noise(1000), content_type="text/x-noise")
    path = fake.root / "data" / "a" / "b c+%2F?ü.bin"
    assert path.read_bytes() == noise(1000)
    first = bucket.get_blob(blob.name)
    assert (first.size, first.content_type) == (path.stat().st_size, "text/x-noise")
    assert first.metadata == {"key": "value"}
    assert first.md5_hash == base64.b64encode(hashlib.md5(noise(1000)).digest()).decode()

    path.write_bytes(b"from a container that has the bucket mounted")
    second = bucket.get_blob(blob.name)
    assert second.generation > first.generation
    assert second.metadata is None
    assert second.download_as_bytes() == path.read_bytes()
    assert second.download_as_bytes(start=5, end=8) == b"a co"
    second.delete()
    assert not path.exists()
    assert bucket.get_blob(blob.name) is None


@pytest.mark.parametrize("size", [0, 1, 255, 9_000_000])
@pytest.mark.parametrize("chunk", [None, 1 << 20])
def test_every_kind_of_upload_keeps_each_byte(bucket: Any, size: int, chunk: int | None) -> None:
    content = noise(size)
    blob = bucket.blob("x", chunk_size=chunk)
    blob.upload_from_file(io.BytesIO(content), size=None if chunk else len(content))
    assert blob.size == len(content)
    assert bucket.blob("x").download_as_bytes() == content  # the client compares checksums, too


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 0}])
@pytest.mark.parametrize("done", [False, True])
def test_an_upload_in_chunks_survives_each_lost_response(
    fake: FakeStorage, bucket: Any, fault: Any, done: bool
) -> None:
    content = noise(5 << 18)
    for index in range(6):
        fake.fail("objects.insert", after=index, done=done, **fault)
        blob = bucket.blob("x", chunk_size=1 << 18)
        blob.upload_from_file(io.BytesIO(content), if_generation_match=None, retry=RETRY)
        assert bucket.blob("x").download_as_bytes() == content
        assert fake.faults.pop().times == 0


def test_lists_have_prefixes_folders_and_pages(bucket: Any) -> None:
    names = ["a/1", "a/2", "a/b/3", "a2", "z"]
    for name in names:
        bucket.blob(name).upload_from_string(b"")
    assert [blob.name for blob in bucket.list_blobs(page_size=2)] == names
    listed = bucket.list_blobs(prefix="a/", start_offset="a/2")
    assert [blob.name for blob in listed] == ["a/2", "a/b/3"]
    listed = bucket.list_blobs(prefix="a", delimiter="/", page_size=1)
    assert [blob.name for blob in listed] == ["a2"]
    assert listed.prefixes == {"a/"}


def test_a_failed_precondition_changes_nothing(bucket: Any) -> None:
    blob = bucket.blob("x")
    blob.upload_from_string(b"1", if_generation_match=0)
    first = blob.generation
    bucket.blob("x").upload_from_string(b"2", if_generation_match=first)
    second = bucket.get_blob("x").generation
    conditions = (
        {"if_generation_match": 0},
        {"if_generation_match": first},
        {"if_metageneration_match": 7},
        {"if_generation_not_match": second},
    )
    for condition in conditions:
        with pytest.raises(PreconditionFailed):
            bucket.blob("x").upload_from_string(b"3", **condition)
        with pytest.raises(PreconditionFailed):
            bucket.blob("x").delete(**condition)
    with pytest.raises(NotFound):
        bucket.blob("x", generation=first).download_as_bytes()
    corrupt = bucket.blob("x")
    corrupt.md5_hash = "AAAAAAAAAAAAAAAAAAAAAA=="
    with pytest.raises(BadRequest, match="md5Hash"):
        corrupt.upload_from_string(b"3", checksum=None)
    assert bucket.get_blob("x").download_as_bytes() == b"2"


def test_of_a_hundred_writers_at_once_one_wins(fake: FakeStorage, bucket: Any) -> None:
    start = Barrier(100)
    query = "uploadType=media&name=one&ifGenerationMatch=0"
    uri = f"{fake.address}/upload/storage/v1/b/data/o?{query}"

    def write(number: int) -> int:
        start.wait()
        return requests.post(uri, data=str(number).encode(), timeout=60).status_code

    with ThreadPoolExecutor(100) as threads:
        statuses = list(threads.map(write, range(100)))
    assert sorted(statuses) == [200] + [412] * 99
    assert bucket.blob("one").download_as_bytes() == str(statuses.index(200)).encode()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//b", ".", "a/"])
def test_no_object_leaves_its_bucket(fake: FakeStorage, bucket: Any, name: str) -> None:
    with pytest.raises(BadRequest, match="objects are files here"):
        bucket.blob(name).upload_from_string(b"")
    assert not [path for path in fake.root.rglob("*") if path.is_file()]


def test_an_unknown_call_is_rejected_with_its_name(fake: FakeStorage) -> None:
    response = requests.get(f"{fake.address}/storage/v1/b/data/acl", timeout=10)
    assert response.status_code == 501
    message = response.json()["error"]["message"]
    assert "does not know GET /storage/v1/b/data/acl" in message


# ── notifications ───────────────────────────────────────────────────────────────────────────


class Topic(FakeServer):
    """Receives what is published."""

    @route("POST", "/v1/projects/my-project/topics/arrivals:publish", "publish")
    def publish(self, request: Request) -> Json:
        request.message = request.json()["messages"]
        return {"messageIds": ["1"]}


@pytest.mark.parametrize("versioned", [False, True])
def test_what_happens_to_an_object_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versioned: bool
) -> None:
    with Topic() as topic, FakeStorage(tmp_path, pubsub=topic.address) as fake:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", fake.address)
        fake.create_bucket("data", versioning={"enabled": versioned})
        bucket = storage.Client(project="p").bucket("data")
        notification = bucket.notification(
            "arrivals", "my-project", blob_name_prefix="in/", payload_format="JSON_API_V1"
        )
        notification.create()
        bucket.blob("elsewhere").upload_from_string(b"")
        for content in (b"1", b"22"):
            bucket.blob("in/rows.csv").upload_from_string(content)
        last = str(bucket.get_blob("in/rows.csv").generation)
        bucket.blob("in/rows.csv").delete()
        events = [message for messages in topic.calls("publish") for message in messages]
        end = "OBJECT_ARCHIVE" if versioned else "OBJECT_DELETE"
        first, overwritten, new, deleted = (event["attributes"] for event in events)
        kinds = [event["attributes"]["eventType"] for event in events]
        assert kinds == ["OBJECT_FINALIZE", end, "OBJECT_FINALIZE", end]
        assert first["objectGeneration"] == overwritten["objectGeneration"]
        assert first["objectGeneration"] == new["overwroteGeneration"]
        assert new["objectGeneration"] == deleted["objectGeneration"] == last
        assert overwritten["overwrittenByGeneration"] == last
        assert (first["bucketId"], first["objectId"]) == ("data", "in/rows.csv")
        assert first["payloadFormat"] == "JSON_API_V1"
        assert first["notificationConfig"] == "projects/_/buckets/data/notificationConfigs/1"
        resource = json.loads(base64.b64decode(events[2]["data"]))
        assert (resource["name"], resource["size"]) == ("in/rows.csv", "2")
        assert resource["generation"] == last

        assert [one.notification_id for one in bucket.list_notifications()] == ["1"]
        notification.delete()
        bucket.blob("in/rows.csv").upload_from_string(b"")
        assert len(topic.calls("publish")) == 4


# ── gcloud ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.heavy  # each command takes three seconds
def test_gcloud_copies_lists_and_removes(fake: FakeStorage, tmp_path: Path) -> None:
    assert shutil.which("gcloud"), "this test needs gcloud"
    variables = {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{fake.address}/storage/v1/",
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_CORE_PROJECT": "p",
    }

    def gcloud(*arguments: object, code: int = 0) -> str:
        command = ["gcloud", "storage", *map(str, arguments)]
        environment = {**os.environ, **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    for name, size in (("small", 10), ("large", 9_000_000)):
        (tmp_path / name).write_bytes(noise(size))
        gcloud("cp", tmp_path / name, f"gs://data/a/{name}")
        gcloud("cp", f"gs://data/a/{name}", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == noise(size)
    names = gcloud("ls", "-r", "gs://data/**").split()
    assert names == ["gs://data/a/large", "gs://data/a/small"]
    condition = "--if-generation-match=0"
    error = gcloud("cp", condition, tmp_path / "large", "gs://data/a/small", code=1)
    assert "FAILED_PRECONDITION" in error
    gcloud("rm", "-r", "gs://data/a")
    assert fake.objects("data") == {}
