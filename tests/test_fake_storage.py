"""The doubles of Cloud Storage and of the template registry: the real clients speak to them, and get what Google would answer."""

import base64
import hashlib
import io
import json
import os
import random
import re
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
from kfp import compiler, dsl
from kfp.registry import RegistryClient
from rehearsal.kfp_templates import FakeTemplateRegistry
from rehearsal.server import FakeServer, Request, Response
from rehearsal.storage import FakeStorage

QUICK = DEFAULT_RETRY.with_delay(initial=0.05)


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStorage]:
    """Cloud Storage with the bucket "data"."""
    with FakeStorage(tmp_path / "cloud") as double:
        double.create_bucket("data")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", double.address)
        monkeypatch.setenv("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        yield double


@pytest.fixture
def bucket(double: FakeStorage) -> Any:
    """The bucket, through Google's client."""
    return storage.Client(project="p").bucket("data")


def noise(size: int) -> bytes:
    """Bytes that are the same each time; some look like line ends and boundaries."""
    return random.Random(size).randbytes(size) + b"\r\n--==\r\n"


# ── objects ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_an_object_is_a_file_and_a_file_an_object(double: FakeStorage, bucket: Any) -> None:
    blob = bucket.blob("a/b c+%2F?ü.bin")
    blob.metadata = {"key": "value"}
    blob.upload_from_string(noise(1000), content_type="text/x-noise")
    path = double.root / "data" / "a" / "b c+%2F?ü.bin"
    assert path.read_bytes() == noise(1000)
    there = bucket.get_blob(blob.name)
    assert (there.size, there.content_type, there.metadata) == (path.stat().st_size, "text/x-noise", {"key": "value"})
    assert there.md5_hash == base64.b64encode(hashlib.md5(noise(1000)).digest()).decode()

    path.write_bytes(b"from a container that has the bucket mounted")
    again = bucket.get_blob(blob.name)
    assert again.generation > there.generation
    assert again.metadata is None
    assert again.download_as_bytes() == path.read_bytes()
    assert again.download_as_bytes(start=5, end=8) == b"a co"
    again.delete()
    assert not path.exists()
    assert bucket.get_blob(blob.name) is None


@pytest.mark.parametrize("size", [0, 1, 255, 9_000_000])
@pytest.mark.parametrize("chunk", [None, 1 << 20])
def test_every_way_to_upload_keeps_each_byte(bucket: Any, size: int, chunk: int | None) -> None:
    content = noise(size)
    blob = bucket.blob("x", chunk_size=chunk)
    blob.upload_from_file(io.BytesIO(content), size=None if chunk else len(content))
    assert blob.size == len(content)
    assert bucket.blob("x").download_as_bytes() == content  # the client compares the checksums, too


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 0}])
@pytest.mark.parametrize("done", [False, True])
def test_an_upload_in_chunks_goes_on_after_each_lost_answer(double: FakeStorage, bucket: Any, fault: Any, done: bool) -> None:
    content = noise(5 << 18)
    for index in range(6):
        double.fail("objects.insert", after=index, done=done, **fault)
        bucket.blob("x", chunk_size=1 << 18).upload_from_file(io.BytesIO(content), if_generation_match=None, retry=QUICK)
        assert bucket.blob("x").download_as_bytes() == content
        assert double.faults.pop().times == 0


def test_lists_have_prefixes_folders_and_pages(bucket: Any) -> None:
    names = ["a/1", "a/2", "a/b/3", "a2", "z"]
    for name in names:
        bucket.blob(name).upload_from_string(b"")
    assert [blob.name for blob in bucket.list_blobs(page_size=2)] == names
    assert [blob.name for blob in bucket.list_blobs(prefix="a/", start_offset="a/2")] == ["a/2", "a/b/3"]
    listed = bucket.list_blobs(prefix="a", delimiter="/", page_size=1)
    assert [blob.name for blob in listed] == ["a2"]
    assert listed.prefixes == {"a/"}


def test_preconditions_hold_or_nothing_changes(bucket: Any) -> None:
    blob = bucket.blob("x")
    blob.upload_from_string(b"1", if_generation_match=0)
    first = blob.generation
    bucket.blob("x").upload_from_string(b"2", if_generation_match=first)
    for wrong in ({"if_generation_match": 0}, {"if_generation_match": first}, {"if_metageneration_match": 7}):
        with pytest.raises(PreconditionFailed):
            bucket.blob("x").upload_from_string(b"3", **wrong)
        with pytest.raises(PreconditionFailed):
            bucket.blob("x").delete(**wrong)
    with pytest.raises(PreconditionFailed):
        bucket.blob("x").upload_from_string(b"3", if_generation_not_match=bucket.get_blob("x").generation)
    with pytest.raises(NotFound):
        bucket.blob("x", generation=first).download_as_bytes()
    with pytest.raises(BadRequest, match="md5Hash"):
        _with_md5(bucket.blob("x"), "AAAAAAAAAAAAAAAAAAAAAA==").upload_from_string(b"3", checksum=None)
    there = bucket.get_blob("x")
    assert there.download_as_bytes() == b"2"
    there.metadata = {"a": "b"}
    there.patch(if_metageneration_match=1)
    assert there.metageneration == 2
    with pytest.raises(PreconditionFailed):
        there.patch(if_metageneration_match=1)


def _with_md5(blob: Any, md5: str) -> Any:
    blob.md5_hash = md5
    return blob


def test_of_a_hundred_writers_at_once_one_wins(double: FakeStorage, bucket: Any) -> None:
    start = Barrier(100)
    url = f"{double.address}/upload/storage/v1/b/data/o?uploadType=media&name=one&ifGenerationMatch=0"

    def write(number: int) -> int:
        start.wait()
        return requests.post(url, data=str(number).encode(), timeout=60).status_code

    with ThreadPoolExecutor(100) as threads:
        answers = list(threads.map(write, range(100)))
    assert sorted(answers) == [200] + [412] * 99
    assert bucket.blob("one").download_as_bytes() == str(answers.index(200)).encode()


def test_a_copy_and_a_composition(bucket: Any) -> None:
    for name in "xy":
        bucket.blob(name).upload_from_string(name.encode(), content_type="text/plain")
    bucket.copy_blob(bucket.blob("x"), bucket, "copy")
    assert bucket.get_blob("copy").content_type == "text/plain"
    bucket.blob("both").compose([bucket.blob("copy"), bucket.blob("y")])
    assert bucket.blob("both").download_as_bytes() == b"xy"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//b", ".", "a/"])
def test_no_object_leaves_its_bucket(double: FakeStorage, bucket: Any, name: str) -> None:
    with pytest.raises(BadRequest, match="objects are files here"):
        bucket.blob(name).upload_from_string(b"")
    assert not [path for path in double.root.rglob("*") if path.is_file()]


def test_what_it_does_not_know_is_named(double: FakeStorage) -> None:
    answer = requests.get(f"{double.address}/storage/v1/b/data/acl", timeout=10)
    assert answer.status_code == 501
    assert "does not know GET /storage/v1/b/data/acl" in answer.json()["error"]["message"]


# ── notifications ───────────────────────────────────────────────────────────────────────────────────────────────────
class Topic(FakeServer):
    """Takes what is published."""

    def __init__(self) -> None:
        super().__init__()
        self.routes = [("POST", "/v1/projects/my-project/topics/arrivals:publish", "publish", self.publish)]

    def publish(self, request: Request, _: re.Match[str]) -> tuple[Any, Response]:
        """A message."""
        return json.loads(request.body)["messages"], Response({"messageIds": ["1"]})


@pytest.mark.parametrize("versioned", [False, True])
def test_what_happens_to_an_object_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versioned: bool) -> None:
    with Topic() as topic, FakeStorage(tmp_path, pubsub=topic.address) as double:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", double.address)
        double.create_bucket("data", versioning={"enabled": versioned})
        bucket = storage.Client(project="p").bucket("data")
        wanted = bucket.notification("arrivals", "my-project", blob_name_prefix="in/", payload_format="JSON_API_V1")
        wanted.create()
        bucket.blob("elsewhere").upload_from_string(b"")
        for content in (b"1", b"22"):
            bucket.blob("in/rows.csv").upload_from_string(content)
        last = bucket.get_blob("in/rows.csv").generation
        bucket.blob("in/rows.csv").delete()
        events = [message for messages in topic.calls("publish") for message in messages]
        gone = "OBJECT_ARCHIVE" if versioned else "OBJECT_DELETE"
        kinds = [event["attributes"]["eventType"] for event in events]
        assert kinds == ["OBJECT_FINALIZE", gone, "OBJECT_FINALIZE", gone]
        first, overwritten, finalized, deleted = (event["attributes"] for event in events)
        assert first["objectGeneration"] == overwritten["objectGeneration"] == finalized["overwroteGeneration"]
        assert finalized["objectGeneration"] == deleted["objectGeneration"] == overwritten["overwrittenByGeneration"] == str(last)
        assert {"bucketId": "data", "objectId": "in/rows.csv", "payloadFormat": "JSON_API_V1"}.items() <= first.items()
        assert first["notificationConfig"] == "projects/_/buckets/data/notificationConfigs/1"
        resource = json.loads(base64.b64decode(events[2]["data"]))
        assert (resource["name"], resource["size"], resource["generation"]) == ("in/rows.csv", "2", str(last))

        assert [found.notification_id for found in bucket.list_notifications()] == ["1"]
        wanted.delete()
        bucket.blob("in/rows.csv").upload_from_string(b"")
        assert len(topic.calls("publish")) == 4


# ── gcloud ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.heavy  # each command takes three seconds
def test_gcloud_copies_lists_and_removes(double: FakeStorage, tmp_path: Path) -> None:
    assert shutil.which("gcloud"), "the Google Cloud CLI is wanted"
    variables = {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{double.address}/storage/v1/",
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_CORE_PROJECT": "p",
    }

    def gcloud(*arguments: object, code: int = 0) -> str:
        command = ["gcloud", "storage", *map(str, arguments)]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    for name, size in (("small", 10), ("large", 9_000_000)):
        (tmp_path / name).write_bytes(noise(size))
        gcloud("cp", tmp_path / name, f"gs://data/a/{name}")
        gcloud("cp", f"gs://data/a/{name}", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == noise(size)
    assert gcloud("ls", "-r", "gs://data/**").split() == ["gs://data/a/large", "gs://data/a/small"]
    assert "FAILED_PRECONDITION" in gcloud("cp", "--if-generation-match=0", tmp_path / "large", "gs://data/a/small", code=1)
    gcloud("rm", "-r", "gs://data/a")
    assert double.objects("data") == {}


# ── templates ───────────────────────────────────────────────────────────────────────────────────────────────────────
HOSTS = r"https://(artifactregistry\.googleapis\.com|europe-west4-kfp\.pkg\.dev)"


def compiled(folder: Path, default: int) -> Path:
    """A pipeline, whose parameter has this default."""

    @dsl.component(base_image="python:3.11-slim")
    def same(number: int) -> int:
        return number

    @dsl.pipeline(name="one-step")
    def one_step(number: int = default) -> None:
        same(number=number)

    compiler.Compiler().compile(one_step, str(folder / f"{default}.yaml"))
    return folder / f"{default}.yaml"


def test_kfps_own_client_publishes_tags_and_finds(tmp_path: Path) -> None:
    first, second = compiled(tmp_path, 1), compiled(tmp_path, 2)
    with FakeTemplateRegistry() as double:
        client = RegistryClient("https://europe-west4-kfp.pkg.dev/p/r", auth=requests.auth.HTTPBasicAuth("", ""))
        client._config = {key: re.sub(HOSTS, double.address, value) for key, value in client._config.items()}
        name, version = client.upload_pipeline(str(first), tags=["v1", "latest"], extra_headers={"description": "first"})
        assert (name, version) == ("one-step", f"sha256:{hashlib.sha256(first.read_bytes()).hexdigest()}")
        assert client.upload_pipeline(str(first)) == (name, version)  # the same again is the same version
        _, newer = client.upload_pipeline(str(second), tags="latest")
        package = "projects/p/locations/europe-west4/repositories/r/packages/one-step"
        assert client.get_tag(name, "latest") == {
            "name": f"{package}/tags/latest",
            "version": f"{package}/versions/{newer}",
        }
        described = client.get_version(name, version)
        assert described["description"] == "first"
        assert [tag["name"] for tag in described["relatedTags"]] == [f"{package}/tags/v1"]
        assert [found["name"] for found in client.list_versions(name)] == [f"{package}/versions/{v}" for v in (version, newer)]
        for chosen, content in (({"tag": "v1"}, first), ({"version": newer}, second)):
            client.download_pipeline(name, **chosen, file_name=str(tmp_path / "back"))
            assert (tmp_path / "back").read_bytes() == content.read_bytes()
        client.create_tag(name, version, "stable")
        client.update_tag(name, newer, "stable")
        assert client.get_tag(name, "stable")["version"].endswith(newer)
        for refused, status in (
            (lambda: client.create_tag(name, newer, "stable"), 409),
            (lambda: client.get_tag(name, "no"), 404),
        ):
            with pytest.raises(requests.HTTPError, match=str(status)):
                refused()
        assert [call["tags"] for call in double.calls("templates.upload")] == [["v1", "latest"], [], ["latest"]]


@pytest.mark.parametrize("content", ["", "a: 1", "[", "pipelineInfo: {}", "pipelineInfo: {name: x}\nroot: {dagg: {}}"])
def test_what_is_no_pipeline_is_not_published(content: str) -> None:
    with FakeTemplateRegistry() as double:
        answer = requests.post(f"{double.address}/p/r", files={"content": content}, timeout=10)
        assert answer.status_code == 400
        assert double.packages == {}
