"""The list of what an image holds. Docker is a program of ours here; the template's tests ask real images."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from core.errors import UserError
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from gcp import storage
from gcp.environment import resolve_environment
from level_2_cicd import sbom
from level_2_cicd.rehearsal.storage import FakeStorage
from packageurl import PackageURL
from project.settings import load_settings

IMAGE = f"example.com/demo/predict@sha256:{'1' * 64}"
HELD = [["deb", "libc6", "2.36-9+deb12u9"], ["pypi", "typing_extensions", "4.16.0"]]
PACKAGES = [
    PackageURL("deb", "debian", "libc6", "2.36-9+deb12u9"),
    PackageURL("pypi", None, "typing_extensions", "4.16.0"),
]


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """A docker that notes what it is told, and answers with `HELD`, or with what stands in `answer`."""
    (tmp_path / "answer").write_text(json.dumps(HELD))
    note, answer = f"echo \"$1 $2 $3 $4 $5 $6\" >>'{tmp_path}/told'", f"cat '{tmp_path}/answer'"
    program = f"#!/bin/sh\n{note}\n{answer} || {{ echo no such image >&2; exit 125; }}\n"
    (tmp_path / "docker").write_text(program)
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


@pytest.fixture
def environment(tmp_path, project, monkeypatch):
    """A place whose bucket is there."""
    with FakeStorage(tmp_path / "buckets") as store:
        store.create_bucket("my-bucket")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.address)
        yield dataclasses.replace(
            resolve_environment(load_settings("cloud.environments.dev.project=my-project")),
            storage="gs://my-bucket",
        )


def test_the_list_is_what_cyclonedx_says_and_names_every_package():
    text = sbom.format_sbom("predict", IMAGE, PACKAGES)
    assert JsonStrictValidator(SchemaVersion.V1_5).validate_str(text) is None
    found = json.loads(text)
    assert (
        found["metadata"]["component"] | {"type": "container", "name": "predict"}
        == found["metadata"]["component"]
    )
    assert found["metadata"]["component"]["version"] == f"sha256:{'1' * 64}"
    assert {one["purl"] for one in found["components"]} == {
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u9",
        "pkg:pypi/typing-extensions@4.16.0",
    }


def test_each_image_is_asked_once_and_its_list_lies_beside_the_builds(docker, environment):
    images = {
        "predict": IMAGE,
        "train": IMAGE.replace("predict", "train").replace("1" * 64, "2" * 64),
    }
    sbom.store_sboms(images, environment)
    sbom.store_sboms(images, environment)
    told = sorted((docker / "told").read_text().splitlines())
    assert told == [
        f"run --rm --network=none --read-only --entrypoint=python {image}"
        for image in sorted(images.values())
    ]
    for name, digit in (("predict", "1"), ("train", "2")):
        content, _ = storage.read(f"gs://my-bucket/builds/contents/{name}/{digit * 64}.json")
        assert json.loads(content)["bomFormat"] == "CycloneDX"


def test_every_image_that_cannot_be_had_is_told(docker, environment):
    (docker / "answer").unlink()
    with pytest.raises(UserError) as told:
        sbom.store_sboms({"predict": IMAGE, "train": IMAGE}, environment)
    assert str(told.value).startswith("predict, train: ")
    assert "cannot list the packages of" in str(told.value)
    assert storage.generation(sbom.sbom_uri(environment, "predict", IMAGE)) is None


def test_what_runs_in_the_image_tells_of_this_environment():
    done = subprocess.run(
        [sys.executable, "-c", sbom.LIST_PACKAGES], capture_output=True, text=True, check=True
    )
    found = {(kind, name): version for kind, name, version in json.loads(done.stdout)}
    assert found["pypi", "pytest"] == pytest.__version__
    assert (("deb", "dpkg") in found) == Path("/var/lib/dpkg/status").exists()
