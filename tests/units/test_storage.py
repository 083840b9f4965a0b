"""Buckets: mounted as folders, and through Google's client where they are not; over the wire, to a double."""

import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from core import paths
from core.errors import UserError
from gcp import storage
from level_2_cicd.rehearsal.storage import FakeStorage


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A double of Cloud Storage with the bucket "b"; nothing is mounted."""
    monkeypatch.setenv("GCS_MOUNT", str(tmp_path / "mount"))
    with FakeStorage(tmp_path / "cloud") as double:
        double.create_bucket("b")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", double.address)
        yield double


def put(cloud, name, content=b"content"):
    path = cloud.root / "b" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_a_mounted_buckets_path_and_address_are_each_others_reverse(tmp_path, monkeypatch):
    monkeypatch.setenv("GCS_MOUNT", str(tmp_path))
    (tmp_path / "b").mkdir()
    for address in ("gs://b/a/model", "gs://b/x"):
        path = paths.local_path(address)
        assert path == tmp_path / "b" / address.removeprefix("gs://b/")
        assert paths.address(path) == address
        assert storage.fetch(address, tmp_path / "into") == path
    assert paths.address(Path("runs/1")) == "runs/1"
    assert not (tmp_path / "into").exists()
    with pytest.raises(
        UserError,
        match=r"gs://other/x: no bucket is mounted at .*gcloud storage cp gs://other/x data/",
    ):
        paths.local_path("gs://other/x")


def test_without_googles_client_the_mount_is_missed(cloud, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_has_client", lambda: False)
    with pytest.raises(UserError, match="no bucket is mounted"):
        storage.fetch("gs://b/x", tmp_path)


def test_an_object_and_a_folder_are_fetched(cloud, tmp_path):
    put(cloud, "a/model/model.json", b"1")
    put(cloud, "a/model/more/x y.bin", b"2")
    put(cloud, "a/model-2/model.json", b"3")
    assert (
        storage.fetch("gs://b/a/model/model.json", tmp_path / "one")
        == tmp_path / "one" / "model.json"
    )
    assert (tmp_path / "one" / "model.json").read_bytes() == b"1"
    for number, address in enumerate(["gs://b/a/model", "gs://b/a/model/"]):
        folder = storage.fetch(address, tmp_path / str(number))
        found = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        assert found == {"model.json": b"1", "more/x y.bin": b"2"}
    assert storage.names("gs://b/a/model") == [
        "gs://b/a/model/model.json",
        "gs://b/a/model/more/x y.bin",
    ]
    assert len(storage.names("gs://b")) == 3


def test_an_object_is_written_and_read_with_its_generation(cloud, tmp_path):
    assert storage.read("gs://b/champion.json") is None
    first = storage.write("gs://b/champion.json", b"1", if_generation_match=0)
    assert storage.read("gs://b/champion.json") == (b"1", first)
    second = storage.write("gs://b/champion.json", b"2", if_generation_match=first)
    assert second > first
    for generation in (0, first):
        with pytest.raises(
            storage.Conflict, match=r"gs://b/champion.json was changed by another process"
        ):
            storage.write("gs://b/champion.json", b"3", if_generation_match=generation)
    assert storage.read("gs://b/champion.json") == (b"2", second)
    (tmp_path / "file").write_bytes(b"4")
    assert storage.upload(tmp_path / "file", "gs://b/champion.json") > second
    assert (cloud.root / "b" / "champion.json").read_bytes() == b"4"


def test_of_many_writers_at_once_one_wins(cloud):
    start = threading.Barrier(20)

    def write(number):
        start.wait()
        try:
            return storage.write("gs://b/one", b"the same for all", if_generation_match=0)
        except storage.Conflict:
            return None

    with ThreadPoolExecutor(20) as threads:
        (won,) = filter(None, threads.map(write, range(20)))
    assert storage.read("gs://b/one") == (b"the same for all", won)


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"status": 429}, {"status": 0}, {"status": None, "fraction": 0.5}]
)
@pytest.mark.parametrize("done", [False, True])
def test_each_request_is_repeated_when_its_answer_is_lost(cloud, tmp_path, fault, done):
    put(cloud, "folder/x")

    def all_of_it(number):
        written = storage.write(f"gs://b/new-{number}", b"1", if_generation_match=0)
        assert storage.read(f"gs://b/new-{number}") == (b"1", written)
        assert storage.names("gs://b/folder") == ["gs://b/folder/x"]
        assert (
            storage.fetch("gs://b/folder", tmp_path / str(number)) / "x"
        ).read_bytes() == b"content"

    all_of_it(-1)
    requests = len(cloud.received)
    assert requests >= 5
    for index in range(requests):
        cloud.fail(after=index, done=done, **fault)
        all_of_it(index)
        assert cloud.faults.pop().times == 0
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"status": 401}, r"Run `gcloud auth application-default login`"),
        ({"status": 403}, r"denied\..*`gcloud auth list`.*roles/storage.objectUser"),
        ({"status": 503}, r"denied\. This may be temporary; retry"),
        ({"status": 0}, r"No response; check the network"),
        ({"status": 400}, r"denied\. `make doctor LEVEL=1`"),
    ],
)
def test_a_failure_is_one_line_that_says_what_to_do(cloud, tmp_path, monkeypatch, fault, told):
    monkeypatch.setattr(storage, "RETRY_TIMEOUT", 0.5)
    put(cloud, "x")
    cloud.fail(message="denied", times=1000, **fault)
    for act in (
        lambda: storage.fetch("gs://b/x", tmp_path / "into"),
        lambda: storage.read("gs://b/x"),
        lambda: storage.names("gs://b/x"),
        lambda: storage.write("gs://b/x", b"", if_generation_match=0),
    ):
        with pytest.raises(
            UserError, match=rf"^(reading|writing) gs://b/x failed: .*{told}"
        ) as error:
            act()
        assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.joinpath("into").rglob("*") if path.is_file()]


def test_what_is_not_there_is_told(cloud, tmp_path):
    with pytest.raises(UserError, match=r"gs://b/no not found. `gcloud storage ls gs://b`"):
        storage.fetch("gs://b/no", tmp_path)
    absent = r"gs://absent/x failed: The specified bucket does not exist\. `gcloud storage ls`"
    for act in (storage.read, storage.names, lambda address: storage.fetch(address, tmp_path)):
        with pytest.raises(UserError, match=absent):
            act("gs://absent/x")
    with pytest.raises(UserError, match=absent):
        storage.write("gs://absent/x", b"")
    for wrong in ("gs://", "b/x", "s3://b/x"):
        with pytest.raises(UserError, match=re.escape(f"{wrong!r} is no address in Cloud Storage")):
            storage.read(wrong)


def test_without_credentials_it_says_how_to_sign_in(cloud, monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nowhere.json"))
    storage._client_of.cache_clear()
    with pytest.raises(
        UserError,
        match=r"no Google Cloud credentials\. Run `gcloud auth application-default login`",
    ):
        storage.read("gs://b/x")


def test_a_full_or_closed_disk_is_no_matter_of_the_cloud(cloud, tmp_path):
    put(cloud, "x")
    (tmp_path / "into").write_text("a file, where a folder is wanted")
    with pytest.raises(OSError, match=os.strerror(17)):
        storage.fetch("gs://b/x", tmp_path / "into")


def test_nothing_is_copied_outside_of_the_folder(tmp_path):
    blob = type("Blob", (), {"name": "m/../../x", "bucket": type("Bucket", (), {"name": "b"})})
    with pytest.raises(UserError, match="outside"):
        storage._download(blob, tmp_path / "into", "../../x")
