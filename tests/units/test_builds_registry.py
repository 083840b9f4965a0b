"""Digests of images, and their copies, over Docker's HTTP interface; the registries are doubles."""

import pytest
from core.errors import UserError
from gcp import client as api
from level_2_cicd import builds
from level_2_cicd.rehearsal.images import Images


@pytest.fixture
def registries(monkeypatch):
    """Two registries."""
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    with Images() as source, Images() as target:
        yield source, target


def test_the_digest_of_an_image_is_told_or_that_there_is_none(registries):
    source, _ = registries
    there = source.push(f"{source.host}/demo/train:abc")
    assert builds.find_digest(f"{source.host}/demo/train:abc") == there
    assert builds.find_digest(f"{source.host}/demo/train@{there}") == there
    assert builds.find_digest(f"{source.host}/demo/train:other") is None
    assert builds.find_digest(f"{source.host}/demo/predict:abc") is None


def test_a_copy_has_the_same_bytes_and_what_is_there_is_not_sent_again(registries):
    source, target = registries
    there = source.push(f"{source.host}/demo/train:abc", b"a layer" * 1000)
    for _ in range(2):
        builds.copy_image(f"{source.host}/demo/train@{there}", f"{target.host}/other/train:abc")
    assert target.manifests["other/train", there] == source.manifests["demo/train", there]
    assert len(target.calls("blobs.put")) == 2  # the layer and the description, once
    assert builds.find_digest(f"{target.host}/other/train:abc") == there


@pytest.mark.parametrize(
    "call",
    ["manifests.get", "blobs.get", "blobs.begin", "blobs.put", "manifests.put", "blobs.head"],
)
def test_a_copy_comes_about_also_when_an_answer_is_lost(registries, call):
    source, target = registries
    there = source.push(f"{source.host}/demo/train:abc")
    for registry in registries:
        registry.fail(f"^{call}$", status=503, done=True)
        registry.fail(f"^{call}$", status=0)
    builds.copy_image(f"{source.host}/demo/train@{there}", f"{target.host}/other/train:abc")
    assert builds.find_digest(f"{target.host}/other/train:abc") == there


@pytest.mark.parametrize("after", [0, 1])
def test_a_copy_comes_about_also_when_the_connection_is_cut_while_a_layer_is_read(
    registries, after
):
    source, target = registries
    there = source.push(f"{source.host}/demo/train:abc", b"a layer" * 1000)
    source.fail("^blobs.get$", status=None, fraction=0.5, after=after)
    builds.copy_image(f"{source.host}/demo/train@{there}", f"{target.host}/other/train:abc")
    assert builds.find_digest(f"{target.host}/other/train:abc") == there
    assert sorted(target.blobs.values()) == sorted(source.blobs.values())
    assert (
        len(source.calls("blobs.get")) == 3
    )  # the layer and the description, and one of them again


def test_a_connection_that_is_always_cut_is_told_in_one_line_and_nothing_is_left(
    registries, monkeypatch
):
    source, target = registries
    monkeypatch.setattr(api, "RETRY_TIMEOUT", 0.1)
    there = source.push(f"{source.host}/demo/train:abc", b"a layer" * 1000)
    source.fail(
        "^blobs.get$", status=None, fraction=0.5, after=1, times=1000
    )  # the description is whole, the layer never
    with pytest.raises(
        api.ApiError,
        match=rf"^reading {source.host}/demo/train@{there} failed: .*retry",
    ) as told:
        builds.copy_image(f"{source.host}/demo/train@{there}", f"{target.host}/other/train:abc")
    assert "\n" not in str(told.value)
    assert len(source.calls("blobs.get")) > 2
    assert not target.names()
    assert not target.calls("manifests.put")
    assert len(target.calls("blobs.put")) == 1
    assert builds.find_digest(f"{target.host}/other/train:abc") is None


def test_a_layer_that_is_not_what_its_name_says_is_not_sent(registries, monkeypatch):
    source, target = registries
    monkeypatch.setattr(api, "RETRY_TIMEOUT", 0.1)
    there = source.push(f"{source.host}/demo/train:abc", b"a layer")
    [layer] = [key for key, content in source.blobs.items() if content == b"a layer"]
    source.blobs[layer] = b"another"
    with pytest.raises(UserError, match="digest invalid: the content has sha256:"):
        builds.copy_image(f"{source.host}/demo/train@{there}", f"{target.host}/other/train:abc")
    assert not target.names()
    assert b"another" not in target.blobs.values()


def test_a_copy_that_becomes_another_image_is_refused(registries, monkeypatch):
    source, target = registries
    there = source.push(f"{source.host}/demo/train:abc")
    keep = target._store
    monkeypatch.setattr(
        target, "_store", lambda name, tag, content, kind: keep(name, tag, content + b"\n", kind)
    )
    with pytest.raises(UserError, match="changed its digest"):
        builds.copy_image(f"{source.host}/demo/train@{there}", f"{target.host}/other/train:abc")


def test_an_image_for_several_platforms_is_not_copied_by_half(registries):
    source, target = registries
    index = b'{"schemaVersion": 2, "manifests": []}'
    there = source._store("demo/train", "abc", index, "application/vnd.oci.image.index.v1+json")
    with pytest.raises(UserError, match="several platforms"):
        builds.copy_image(f"{source.host}/demo/train@{there}", f"{target.host}/other/train:abc")
    assert not target.names()


@pytest.mark.parametrize(
    "name",
    ["train:abc", "demo/train:abc", "localhost:5000/train", "localhost:5000/train@sha256:abc"],
)
def test_what_is_no_image_in_a_registry_is_told(name):
    with pytest.raises(UserError, match="invalid image"):
        builds.find_digest(name)
