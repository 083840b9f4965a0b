"""The images of a push: which are built, copied or left alone. Registries and buckets are doubles; gcloud is not called."""

import dataclasses
import json
import shutil
import threading

import pytest
from core.errors import UserError
from gcp import client as api
from gcp.environment import resolve_environment
from level_1_pipeline import containers
from level_2_cicd import builds, submit_build
from level_2_cicd.rehearsal.images import Images
from level_2_cicd.rehearsal.storage import FakeStorage
from project.settings import load_settings

from tests.units.project import ROOT

BOTH = "cloud.environments.dev.project=my-project cloud.environments.prod.project=my-prod"


@pytest.fixture
def sources(project, monkeypatch):
    """A project with all that containers are made of."""
    for part in ("level_1_pipeline", "level_2_cicd", "requirements"):
        shutil.copytree(
            ROOT / part, project / part, ignore=shutil.ignore_patterns("__pycache__", "rehearsal")
        )
    monkeypatch.setenv("SET", BOTH)
    monkeypatch.setenv("COMMIT", "1a2b")
    return project


@pytest.fixture
def registry(monkeypatch):
    """The registry of dev, and of prod."""
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    with Images() as images:
        yield images


@pytest.fixture
def environment(sources, registry):
    """dev, whose images are there."""
    return dataclasses.replace(resolve_environment(load_settings()), images=f"{registry.host}/demo")


@pytest.fixture
def gcloud(registry, monkeypatch):
    """What gcloud was told; a build pushes its image."""
    commands = []

    def run(command, log=None):
        commands.append(command)
        told = substitutions(command)
        if told:
            registry.push(f"{told['_IMAGE']}:{told['_TAG']}")

    monkeypatch.setattr(submit_build, "run", run)
    return commands


def substitutions(command):
    """What a build is told."""
    [flag] = [word for word in command if word.startswith("--substitutions=")] or [
        "--substitutions="
    ]
    return dict(
        pair.split("=", 1) for pair in flag.removeprefix("--substitutions=").split(",") if pair
    )


def test_what_is_missing_is_built_and_the_rest_left_alone(sources, environment, registry, gcloud):
    wanted = containers.find(sources, ["train", "predict", "deploy"])
    there = registry.push(containers.image(wanted[0], environment.images))
    made = builds.provide_images(wanted, load_settings(), environment)
    assert sorted(substitutions(command)["_CONTAINER"] for command in gcloud) == [
        "deploy",
        "predict",
    ]
    assert made["train"] == f"{environment.images}/train@{there}"
    assert set(made) == {"train", "predict", "deploy"}
    for command in gcloud:
        assert command[:4] == ["gcloud", "builds", "submit", "."]
        assert f"--config={submit_build.IMAGE}" in command
        told = substitutions(command)
        assert told["_TOOLBOX"].startswith(f"{environment.images}/toolbox:")
        assert told["_COMMIT"] == "1a2b"
    gcloud.clear()
    assert builds.provide_images(wanted, load_settings(), environment) == made
    assert not gcloud


def test_they_are_built_at_the_same_time(sources, environment, gcloud, monkeypatch):
    wanted, push = containers.find(sources), submit_build.run
    together = threading.Barrier(len(wanted), timeout=30)

    def run(command, log=None):
        together.wait()  # breaks where one waits for another
        push(command, log)

    monkeypatch.setattr(submit_build, "run", run)
    assert len(builds.provide_images(wanted, load_settings(), environment)) == len(wanted)


def test_one_that_fails_is_told_and_the_others_are_there(
    sources, environment, registry, gcloud, monkeypatch
):
    wanted, push = containers.find(sources, ["train", "predict"]), submit_build.run

    def run(command, log=None):
        if substitutions(command)["_CONTAINER"] == "train":
            raise UserError("no space left")
        push(command, log)

    monkeypatch.setattr(submit_build, "run", run)
    with pytest.raises(UserError, match=r"^train: no space left$"):
        builds.provide_images(wanted, load_settings(), environment)
    assert registry.names() == {f"demo/predict:{wanted[1].tag()}"}


def test_an_image_that_another_build_has_sent_meanwhile_is_good(
    sources, environment, registry, monkeypatch
):
    """Tags never move: the second one to push is refused."""
    [wanted] = containers.find(sources, ["predict"])

    def run(*_):
        registry.push(containers.image(wanted, environment.images))
        raise UserError("the build failed: the tag is there")

    monkeypatch.setattr(submit_build, "run", run)
    assert builds.provide_images([wanted], load_settings(), environment)["predict"].startswith(
        f"{environment.images}/predict@sha256:"
    )


def test_a_build_without_an_image_is_a_failure(sources, environment, monkeypatch):
    monkeypatch.setattr(submit_build, "run", lambda *_: None)
    with pytest.raises(UserError, match="is not in the registry"):
        builds.provide_images(containers.find(sources, ["predict"]), load_settings(), environment)


def test_the_digests_are_kept_here_and_beside_the_builds(
    sources, environment, tmp_path, monkeypatch
):
    with FakeStorage(tmp_path / "buckets") as storage:
        folder = storage.create_bucket(environment.storage.removeprefix("gs://"))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.address)
        builds.save_digests({"train": "x@sha256:0"}, environment)
        assert json.loads((folder / "builds" / "images.json").read_text()) == {
            "train": "x@sha256:0"
        }
    assert json.loads(builds.DIGESTS.read_text()) == {"train": "x@sha256:0"}


# ── promotion ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def promoted(sources, registry, environment, tmp_path, monkeypatch):
    """prod, with a registry of its own; dev's is `registry`, and dev's bucket says what has passed."""
    with Images() as own, FakeStorage(tmp_path / "buckets") as store:
        store.create_bucket(environment.storage.removeprefix("gs://"))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.address)
        monkeypatch.setenv("COMMIT", "1a2b")
        prod = dataclasses.replace(
            resolve_environment(load_settings(), "prod"), images=f"{own.host}/prod"
        )
        monkeypatch.setattr(
            builds,
            "resolve_environment",
            lambda _, name=None: environment if name == "dev" else prod,
        )
        yield prod, own


def test_prod_copies_what_passed_in_dev_and_builds_nothing(
    sources, environment, registry, promoted, gcloud
):
    prod, own = promoted
    wanted = containers.find(sources, ["train", "predict"])
    digests = {
        container.name: registry.push(containers.image(container, environment.images))
        for container in wanted
    }
    with pytest.raises(UserError, match="has not passed in dev yet"):  # built, and no more
        builds.provide_images(wanted, load_settings(), prod)
    assert not own.names()
    for _ in range(2):
        builds.record_passed(
            {name: f"{environment.images}/{name}@{digest}" for name, digest in digests.items()},
            environment,
        )
    made = builds.provide_images(wanted, load_settings(), prod)
    assert made == {name: f"{prod.images}/{name}@{digest}" for name, digest in digests.items()}
    assert own.names() == {f"prod/{container.name}:{container.tag()}" for container in wanted}
    assert not gcloud
    assert not registry.calls("manifests.put")


def test_what_is_not_in_dev_does_not_get_into_prod(
    sources, environment, registry, promoted, gcloud
):
    prod, own = promoted
    registry.push(f"{environment.images}/predict:of-other-code")
    with pytest.raises(
        UserError, match=r"has not been built in dev yet.*make submit ENVIRONMENT=dev"
    ):
        builds.provide_images(containers.find(sources, ["predict"]), load_settings(), prod)
    assert not own.names()
    assert not gcloud


# ── one image, in its own build ─────────────────────────────────────────────────────────────────────────────────────
def test_an_image_is_built_only_from_the_files_that_are_meant(sources, monkeypatch):
    built = []
    monkeypatch.setattr(containers, "build", lambda container, name, _: built.append(name))
    [predict] = containers.find(sources, ["predict"])
    builds.build_here(predict, load_settings(), "example.com/predict", predict.tag())
    assert built == [f"example.com/predict:{predict.tag()}"]
    (sources / "src" / "predictor" / "server.py").write_text("# another\n")
    with pytest.raises(UserError, match="gcloudignore"):
        builds.build_here(
            predict, load_settings(), "example.com/predict", built[0].rpartition(":")[2]
        )


def test_by_hand_there_is_no_such_build(sources, environment):
    with pytest.raises(UserError, match="make foundation"):
        builds.provide_images(
            containers.find(sources, ["predict"]),
            load_settings(),
            dataclasses.replace(environment, by_hand=True),
        )
