"""A cloud for pushes: all fakes that a build talks to, and a project whose cloudbuild.yaml is run there.

Real: gcloud, make, the project's programs, the wire between them. Not real: the services, Docker, Terraform (its own tests run
it), and the machines on which a pipeline's steps would run.
"""

import base64
import json
import os
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from core import manifest
from gcp import deployment
from gcp.environment import resolve_environment
from level_1_pipeline import containers
from level_2_cicd import submit_build
from level_2_cicd.rehearsal import build_steps, cloud_build
from level_2_cicd.rehearsal.images import Images
from level_2_cicd.rehearsal.kfp_templates import FakeTemplateRegistry
from level_2_cicd.rehearsal.pubsub import FakePubSub
from level_2_cicd.rehearsal.server import Response
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex
from level_2_cicd.trigger_function_container import events
from project.settings import load_settings

COMMIT = "1a2b3c4d"
SCHEMA = {
    "label": "digit",
    "classes": ["0", "1"],
    "columns": [{"name": "a", "kind": "numeric", "optional": False, "values": []}],
}
REGISTRY = "gs://my-project-digit-reader-storage/registry"
TEMPLATES = "templates/train-and-register"
# What stands for programs that cannot be had here, or that other tests run.
DOCKER = """#!/bin/sh
case "$1" in
    build) echo "$@" >>"$FAKES/docker.log" ;;
    image) [ "$2" = ls ] || echo 1000000 ;;
    run) echo '[["pypi", "numpy", "2.0"]]' ;;
esac
"""


class Cloud:
    """The fakes, and a project that is pushed there."""

    def __init__(self, folder: Path, project: Path, stack: ExitStack) -> None:
        self.folder, self.project = folder, project
        self.storage = stack.enter_context(FakeStorage(folder / "buckets"))
        self.vertex = stack.enter_context(FakeVertex())
        self.templates = stack.enter_context(FakeTemplateRegistry())
        self.images = stack.enter_context(Images())
        self.topics = stack.enter_context(FakePubSub())
        self.ran: list[build_steps.Outcome] = []
        work = cloud_build.build_worker(
            folder / "buckets",
            folder / "children",
            lambda _: self.command(),
            self.images.push,
            self._note,
        )
        self.builds = stack.enter_context(cloud_build.FakeCloudBuild(work))
        edit(project / "project.yaml", 'dev: {project: ""', 'dev: {project: "my-project"')
        edit(
            project / "project.yaml", 'registry: ""', f'registry: "{self.images.host}/digit-reader"'
        )
        write_program(folder / "fakes" / "docker", DOCKER)
        for bucket in ("storage", "data", "pipelines"):
            self.storage.create_bucket(f"my-project-digit-reader-{bucket}")
        self.vertex.skipped_tasks.add("register")  # as the gate decides, which is not run here
        self.vertex.predictor = lambda *_: Response({"predictions": [{"label": "1"}]})
        self.vertex.task_outputs["gate"] = {
            "decision": {"passed": False, "reason": "this run only tests"}
        }

    def _note(self, _: Any, outcome: build_steps.Outcome) -> None:
        self.ran.append(outcome)

    @property
    def variables(self) -> dict[str, str]:
        """What leads programs here, and into this environment."""
        return {
            "CLOUDSDK_CONFIG": str(self.folder / "gcloud"),
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_CLOUDBUILD": f"{self.builds.address}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{self.storage.address}/storage/v1/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": f"{self.vertex.address}/",
            "STORAGE_EMULATOR_HOST": self.storage.address,
            "PUBSUB_EMULATOR_HOST": self.topics.host,
            "TEMPLATE_REGISTRY": f"{self.templates.address}/my-project/digit-reader-templates",
            "PATH": f"{self.folder / 'fakes'}{os.pathsep}{os.environ['PATH']}",
            "FAKES": str(self.folder / "fakes"),
            "VENV": sys.prefix,
            "PYTHONPATH": "src:.",
            "POLL": "0.01",
        }

    def command(
        self, instead: Mapping[str, list[str]] | None = None
    ) -> Callable[..., build_steps.Command]:
        """What runs a step here: the toolbox's own making, quality and Terraform have tests of their own."""
        left_out = {name: ["true"] for name in ("toolbox", "setup", "lint", "test", "apply")}
        return build_steps.as_process(self.variables, {**left_out, **(instead or {})})

    @property
    def fakes(self) -> list[Any]:
        """Everybody who can receive something."""
        return [self.storage, self.vertex, self.templates, self.images, self.topics, self.builds]

    def pull_request(self) -> build_steps.Outcome:
        """Run cloudbuild.pr.yaml."""
        with within(self.project), settings_of_nobody():
            settings = load_settings("")
            told = submit_build.pull_request_substitutions(
                settings, resolve_environment(settings, "dev")
            )
        instead = {"terraform": ["true"], "plan": ["true"]}
        return build_steps.run(
            build_steps.read(self.project / submit_build.PULL_REQUEST, told),
            self.project,
            self.command(instead),
        )

    def push(
        self, kill_after: int | None = None, instead: Mapping[str, list[str]] | None = None
    ) -> build_steps.Outcome:
        """Run cloudbuild.yaml as a push does, in the project's folder as it is now."""
        with within(self.project), settings_of_nobody():
            settings = load_settings("")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("COMMIT", COMMIT)
                patch.setenv("JOB_SPEC", "cpu")
                told = submit_build.push_substitutions(
                    settings, resolve_environment(settings, "dev")
                )
        shutil.rmtree(
            self.project / "build", ignore_errors=True
        )  # each build begins with an empty workspace
        return build_steps.run(
            build_steps.read(self.project / submit_build.PUSH, told),
            self.project,
            self.command(instead),
            kill_after,
        )

    def deliver(self) -> list[int]:
        """Bring every message to the trigger function, as Pub/Sub does: at least once. Its answers."""
        environment = events.TriggerConfig(
            events.Target(
                "my-project",
                "europe-west4",
                "gs://my-project-digit-reader-pipelines",
                "pipeline@my-project",
            ),
            "gs://my-project-digit-reader-storage/templates/train-and-register",
            "gs://my-project-digit-reader-data/incoming",
        )
        function = events.Function(environment)
        answers = []
        for number, (_, data, _) in enumerate(self.topics.messages):
            sent = {
                "messageId": str(number),
                "publishTime": "2026-11-30T04:00:00Z",
                "data": base64.b64encode(data).decode(),
            }
            push = {"message": sent}
            answers.append(function.handle("POST", json.dumps(push).encode())[1])
        return answers

    def have_images(self) -> None:
        """Let the registry have all images, as if an earlier build had made them."""
        for container in containers.find(self.project):
            self.images.push(f"{self.images.host}/digit-reader/{container.name}:{container.tag()}")

    def current(self) -> str:
        """The version that events start; empty before the first."""
        path = (
            self.folder / "buckets" / "my-project-digit-reader-storage" / TEMPLATES / "current.json"
        )
        return str(json.loads(path.read_text())["version"]) if path.is_file() else ""

    def templates_of_bucket(self) -> list[str]:
        """The objects below the folder of published versions."""
        names = self.storage.objects("my-project-digit-reader-storage")
        return [name.removeprefix(f"{TEMPLATES}/") for name in names if name.startswith(TEMPLATES)]

    def parameters(self) -> dict[str, Any]:
        """Those of the current version."""
        path = (
            self.folder
            / "buckets"
            / "my-project-digit-reader-storage"
            / TEMPLATES
            / self.current()
            / "parameters.json"
        )
        return dict(json.loads(path.read_text())["parameters"])

    def trainings(self) -> list[Any]:
        """The runs that were started, without functional tests."""
        return [
            job for job in self.vertex.calls("pipelineJobs.create") if "purpose" not in job.labels
        ]

    def tests(self) -> list[Any]:
        """The functional tests that were started."""
        return [job for job in self.vertex.calls("pipelineJobs.create") if "purpose" in job.labels]

    def built(self) -> list[str]:
        """The containers that builds were asked for, in order of their names."""
        return sorted(
            build.substitutions["_CONTAINER"] for build in self.builds.calls("builds.create")
        )

    def forget(self) -> None:
        """Let the fakes forget what they received, and keep what they hold."""
        for fake in self.fakes:
            fake.received.clear()
        self.topics.messages.clear()


@dataclass(frozen=True)
class Effect:
    """What a push did, as the fakes received it.

    Attributes:
        builds: the containers for whose image a build was asked for; pushed: those whose image the registry got.
        compiled: a pipeline that the registry of templates did not have.
        published: another version is current.
        tried: functional tests that were started; runs: trainings that were started.
        redeployed: the model got another version with another image.
    """

    builds: tuple[str, ...] = ()
    pushed: tuple[str, ...] = ()
    compiled: bool = False
    published: bool = False
    tried: int = 0
    runs: int = 0
    redeployed: int = 0


def effect(cloud: Cloud, **how: Any) -> Effect:
    """Push, deliver what was published twice, and look."""
    cloud.forget()
    images, compiled, current = cloud.images.names(), compilations(cloud), cloud.current()
    outcome = cloud.push(**how)
    assert outcome.status == "SUCCESS", outcome.failures() + "\n".join(
        child.failures() for child in cloud.ran
    )
    assert set(cloud.deliver() + cloud.deliver()) <= {200}
    return Effect(
        builds=tuple(cloud.built()),
        pushed=tuple(
            sorted(name.split("/")[-1].split(":")[0] for name in cloud.images.names() - images)
        ),
        compiled=compilations(cloud) > compiled,
        published=cloud.current() != current,
        tried=len(cloud.tests()),
        runs=len(cloud.trainings()),
        redeployed=len(cloud.vertex.calls("models.upload")),
    )


def compilations(cloud: Cloud) -> int:
    """How many pipelines the registry of templates holds."""
    return sum(len(package.versions) for package in cloud.templates.packages.values())


def make_champion(cloud: Cloud) -> None:
    """A version that is served, as the first run would leave it."""
    environment = "projects/my-project/locations/europe-west4"
    asked = {"displayName": "digit-reader"}
    address = f"{cloud.vertex.address}/v1/{environment}/endpoints?endpointId=digit-reader"
    urllib.request.urlopen(
        urllib.request.Request(address, json.dumps(asked).encode(), method="POST")
    ).close()
    folder = cloud.folder / "buckets" / "my-project-digit-reader-pipelines" / "run-1" / "model"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_text("a model")
    manifest.write(folder, {"schema": SCHEMA, "data_sha256": "0" * 64, "code_version": "abc"})
    serving = cloud.parameters()["serving"]
    told = deployment.deploy(
        REGISTRY,
        folder,
        {"accuracy": 0.9},
        "run-1",
        "better",
        None,
        serving,
        "gs://my-project-digit-reader-pipelines/run-1/model",
    )
    assert told["champion"]


@contextmanager
def running(folder: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """A cloud, to which this process's own calls go too."""
    with ExitStack() as stack:
        made = Cloud(folder, project, stack)
        for name in (
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM",
            "STORAGE_EMULATOR_HOST",
            "PUBSUB_EMULATOR_HOST",
        ):
            monkeypatch.setenv(name, made.variables[name])
        yield made


@contextmanager
def within(folder: Path) -> Iterator[None]:
    """In a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def settings_of_nobody() -> Iterator[None]:
    """Without variables that whoever runs the tests has set."""
    kept = {
        name: os.environ.pop(name)
        for name in ("SET", "ENVIRONMENT", "COMMIT", "JOB_SPEC")
        if name in os.environ
    }
    try:
        yield
    finally:
        os.environ.update(kept)


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that is there."""
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path}: {old}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def write_program(path: Path, text: str) -> None:
    """A program of few lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
