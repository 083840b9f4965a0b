"""What a push does, as a table: the steps of cloudbuild.yaml are run, and the fakes tell what they received."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from level_1_pipeline import containers

from tests.push import Cloud, Effect, compilations, edit, effect, make_champion, running

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def made(generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project; not to be changed."""
    return generate(tmp_path_factory.mktemp("made"))


@pytest.fixture
def gcloud() -> None:
    """Without gcloud there is nothing to test."""
    if shutil.which("gcloud") is None:
        (pytest.fail if os.environ.get("REQUIRE_DOCKER") else pytest.skip)("this test needs gcloud")


@pytest.fixture
def cloud(
    gcloud: None, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cloud]:
    """An empty project in the cloud, as the foundation leaves it."""
    project = Path(shutil.copytree(made, tmp_path / "project"))
    with running(tmp_path, project, monkeypatch) as cloud:
        yield cloud


IMAGES = [
    "deploy",
    "kfp_compile",
    "kfp_run",
    "predict",
    "train",
    "trigger_function",
    "vertex_train",
]


def served(cloud: Cloud) -> tuple[int, str]:
    """The champion and the image that answers for it."""
    [endpoint] = cloud.vertex.endpoints.by_name.values()
    [deployed] = endpoint.deployed_models
    [versions] = cloud.vertex.models.by_name.values()
    assert dict(endpoint.traffic_split) == {deployed.id: 100}
    return int(deployed.model_version_id), versions[
        deployed.model_version_id
    ].container_spec.image_uri


def test_the_table(cloud: Cloud) -> None:
    """Each row begins where the one before it ended."""
    project = cloud.project
    first = effect(cloud)
    assert first == Effect(
        tuple(IMAGES), tuple(IMAGES), compiled=True, published=True, tried=1, runs=1
    )
    run = cloud.vertex.calls("pipelineJobs.create")[-1]
    assert run.labels["actor"] == "build"
    assert dict(run.runtime_config.parameter_values)["register"] is True
    tried = next(
        job
        for job in cloud.vertex.calls("pipelineJobs.create")
        if job.labels["purpose"] == "functional-test"
    )
    values = dict(tried.runtime_config.parameter_values)
    assert values["register"] is False
    assert values["hyperparameters"]["epochs"] == 2
    assert [
        pool["machineSpec"]["machineType"] for pool in values["jobs"][0]["workerPoolSpecs"]
    ] == ["n1-standard-4"]

    make_champion(cloud)
    before = served(cloud)
    assert effect(cloud) == Effect(), "nothing changed"

    edit(project / "README.md", "#", "# Read me:")
    assert effect(cloud) == Effect(), "documentation"

    edit(project / "project.yaml", "threshold: 0.95", "threshold: 0.9")
    assert effect(cloud) == Effect(published=True, tried=1, runs=1), "project.yaml"

    edit(
        project / "level_1_pipeline" / "pipeline.py",
        'description="preprocess',
        'description="first preprocess',
    )
    assert effect(cloud) == Effect(compiled=True, published=True, tried=1, runs=1), "pipeline"

    edit(project / "src" / "trainer" / "model.py", "import", "# another model\nimport")
    assert effect(cloud) == Effect(
        ("train",), ("train",), compiled=True, published=True, tried=1, runs=1
    ), "training code"
    assert served(cloud) == before

    edit(project / "src" / "predictor" / "server.py", "import", "# another answer\nimport")
    assert effect(cloud) == Effect(("predict",), ("predict",), published=True, redeployed=1), (
        "predictor"
    )
    number, image = served(cloud)
    assert (number, image) == (before[0] + 1, cloud.parameters()["serving"]["image"])
    assert image != before[1]
    assert effect(cloud) == Effect(), "nothing changed"


STEPS = 10


@pytest.mark.parametrize("succeeded", range(STEPS))
def test_a_build_that_was_killed_and_is_started_again_ends_right(
    cloud: Cloud, succeeded: int
) -> None:
    """Killed with all that it runs as soon as so many steps had succeeded; the images were there already."""
    cloud.have_images()
    killed = cloud.push(kill_after=succeeded)
    assert killed.status == "KILLED"
    assert sum(step.status == "SUCCESS" for step in killed.steps) >= succeeded
    again = cloud.push()
    assert again.status == "SUCCESS", again.failures()
    assert set(cloud.deliver()) == {200}
    assert (len(cloud.tests()), len(cloud.trainings()), cloud.built()) == (1, 1, [])
    assert compilations(cloud) == 1
    assert (
        cloud.vertex.calls("pipelineJobs.create")[-1].runtime_config.parameter_values["csv"]
        == cloud.parameters()["csv"]
    )
    version = cloud.current()
    assert set(cloud.templates_of_bucket()) == {
        "current.json",
        f"{version}/parameters.json",
        f"{version}/pipeline.json",
    }


def test_one_that_is_killed_again_and_again_gets_to_its_end(cloud: Cloud) -> None:
    """From nothing, and killed at every moment in turn; what was reached is not done again."""
    for succeeded in range(STEPS):
        assert cloud.push(kill_after=succeeded).status == "KILLED"
    outcome = cloud.push()
    assert outcome.status == "SUCCESS", outcome.failures()
    assert set(cloud.deliver()) == {200}
    assert (len(cloud.tests()), len(cloud.trainings())) == (1, 1)
    assert cloud.images.names() == {
        f"digit-reader/{container.name}:{container.tag()}"
        for container in containers.find(cloud.project)
    }
    assert len(cloud.images.tags) == len(IMAGES)


def test_a_pull_request_changes_nothing(cloud: Cloud) -> None:
    """cloudbuild.pr.yaml builds all images, and none of the fakes receives anything."""
    outcome = cloud.pull_request()
    assert outcome.status == "SUCCESS", outcome.failures()
    assert "l4-spot" in outcome.step("jobs").output
    built = (cloud.folder / "fakes" / "docker.log").read_text()
    assert all(f"digit-reader/{name}:" in built for name in IMAGES)
    assert not [one.call for fake in cloud.fakes for one in fake.received]
