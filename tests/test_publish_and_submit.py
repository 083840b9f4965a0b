"""The pipeline is compiled, published and started by the containers themselves; servers are fakes, signals are real."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from level_1_pipeline import containers
from level_2_cicd.kfp_compile_container import main as kfp_compile
from level_2_cicd.rehearsal.kfp_templates import FakeTemplateRegistry
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex

pytestmark = pytest.mark.heavy

DIGESTS = {name: f"example.com/{name}@sha256:{'0' * 64}" for name in kfp_compile.IMAGES}
WHERE = ["--project", "my-project", "--region", "europe-west4", "--pipeline-root", "gs://root/runs"]
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def project(generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a Google Cloud project, and rows there."""
    folder = generate(tmp_path_factory.mktemp("project"))
    path = folder / "project.yaml"
    text = path.read_text(encoding="utf-8")
    text = text.replace('"sample:digits"', '"gs://rows/digits.csv"', 1)
    path.write_text(
        text.replace('dev: {project: ""', 'dev: {project: "my-project"', 1), encoding="utf-8"
    )
    return folder


class Cloud:
    """The fakes, and the environment in which commands find them."""

    def __init__(
        self, vertex: FakeVertex, storage: FakeStorage, templates: FakeTemplateRegistry
    ) -> None:
        self.vertex, self.storage, self.templates = vertex, storage, templates
        self.variables = {
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": vertex.address,
            "STORAGE_EMULATOR_HOST": storage.address,
        }

    def runs(self) -> list[Any]:
        """The runs that were started."""
        return self.vertex.calls("pipelineJobs.create")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    """All fakes, with the bucket."""
    (tmp_path / "my-project-digit-reader-storage").mkdir()
    with (
        FakeVertex() as vertex,
        FakeStorage(tmp_path) as storage,
        FakeTemplateRegistry() as templates,
    ):
        yield Cloud(vertex, storage, templates)


def images_of(project: Path, names: list[str]) -> dict[str, str]:
    """Container → its image, built unless it is there."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{project / 'src'}:{project}",
    }
    command = [sys.executable, "-m", "level_1_pipeline.containers", *names]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        container.name: containers.image(container, project.name)
        for container in containers.find(project, names)
    }


@pytest.fixture(scope="module")
def images(docker: str, project: Path) -> dict[str, str]:
    """The two containers' images."""
    return images_of(project, ["kfp_compile", "kfp_run"])


@pytest.fixture
def contain(images: dict[str, str], project: Path, cloud: Cloud) -> Callable[..., list[str]]:
    """The command that runs a module in its container: any user, a read-only root, the project's folder to be read."""

    def contain(name: str, *command: str) -> list[str]:
        variables = [
            word for key, value in cloud.variables.items() for word in ("--env", f"{key}={value}")
        ]
        how = [
            "--rm",
            "--init",
            "--read-only",
            "--tmpfs",
            "/tmp",
            "--user",
            "12345:12345",
            "--network",
            "host",
        ]
        mounted = ["--volume", f"{project}:/workspace:ro", "--workdir", "/workspace"]
        return ["docker", "run", *how, *mounted, *variables, images[name], "python", "-m", *command]

    return contain


def run(command: list[str]) -> Done:
    return subprocess.run(command, capture_output=True, text=True)


def test_the_containers_publish_and_start_the_pipeline(
    contain: Callable[..., list[str]], cloud: Cloud
) -> None:
    registry = f"{cloud.templates.address}/my-project/digit-reader-templates"
    publish = [
        "level_2_cicd.kfp_compile_container.main",
        "--images",
        json.dumps(DIGESTS),
        "--templates",
        registry,
        "--commit",
        "1A2b",
    ]
    done = run(contain("kfp_compile", *publish))
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    start = [
        "level_2_cicd.kfp_run_container.main",
        "--parameters",
        told["parameters"],
        *WHERE,
        "--wait",
        "--poll",
        "0",
    ]
    for template in (told["template"], told["pipeline"]):
        done = run(contain("kfp_run", *start, "--template", template, "--event", template))
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == "succeeded"
    first, second = (type(job).to_dict(job) for job in cloud.runs())
    assert first["pipeline_spec"] == second["pipeline_spec"]
    sent = first["pipeline_spec"]["deploymentSpec"]["executors"]
    assert {step["container"]["image"] for step in sent.values()} == {
        DIGESTS[name] for name in ("train", "deploy", "vertex_train")
    }
    assert first["labels"]["commit"] == second["labels"]["commit"] == "1a2b"
    assert cloud.templates.calls("templates.upload")[0]["tags"] == ["1a2b"]
    values = first["runtime_config"]["parameter_values"]
    assert values["csv"] == "gs://rows/digits.csv"
    assert values["serving"]["image"] == DIGESTS["predict"]

    done = run(
        contain(
            "kfp_run", *start, "--template", told["pipeline"], "--event", "x", "--set", "treshold=1"
        )
    )
    assert done.returncode == 2
    assert "did you mean 'threshold'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(cloud.runs()) == 2


def test_the_containers_are_small(images: dict[str, str]) -> None:
    def size(image: str) -> int:
        return int(run(["docker", "image", "inspect", "--format", "{{.Size}}", image]).stdout)

    sizes = {name: size(image) - size("python:3.11-slim") for name, image in images.items()}
    assert sizes["kfp_run"] <= 320_000_000, sizes
    assert sizes["kfp_compile"] <= 360_000_000, sizes


# ── the command, as processes ───────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def published(project: Path) -> list[str]:
    """The options that name the pipeline and its parameters."""
    publish = [
        "level_2_cicd.kfp_compile_container.main",
        "--images",
        json.dumps(DIGESTS),
        "--output",
        "build",
        "--dry-run",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{project / 'src'}:{project}"}
    subprocess.run(
        [sys.executable, "-m", *publish],
        cwd=project,
        env=environment,
        check=True,
        capture_output=True,
    )
    return [
        "--template",
        str(project / "build/pipeline.json"),
        "--parameters",
        str(project / "build/parameters.json"),
    ]


@pytest.fixture
def submit(project: Path, published: list[str], cloud: Cloud) -> list[str]:
    """The command."""
    variables = [f"{key}={value}" for key, value in cloud.variables.items()]
    python = [
        f"PYTHONPATH={project / 'src'}:{project}",
        sys.executable,
        "-m",
        "level_2_cicd.kfp_run_container.main",
    ]
    return ["env", *variables, *python, *published, *WHERE]


def test_processes_at_once_start_one_run(submit: list[str], cloud: Cloud) -> None:
    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(lambda _: run([*submit, "--event", "a push"]), range(8)))
    assert [done.returncode for done in ended] == [0] * 8, [done.stderr for done in ended]
    assert len(cloud.runs()) == 1
    told = [done.stdout for done in ended]
    assert sum(text.startswith("started ") for text in told) == 1
    assert len({text.removeprefix("already ") for text in told}) == 1


@pytest.mark.parametrize(
    "fault",
    [{"status": 503}, {"status": 0}, {"status": 503, "done": True}, {"status": 0, "done": True}],
)
def test_an_error_at_any_call_ends_with_one_run(
    submit: list[str], cloud: Cloud, fault: dict[str, Any]
) -> None:
    index = 0
    while True:
        cloud.vertex.fail(after=index, **fault)
        event = f"event {index}"
        done = run([*submit, "--event", event, "--wait", "--poll", "0"])
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "succeeded"
        assert len(cloud.runs()) == index + 1
        if cloud.vertex.faults[-1].times:  # it was not met: there was no such call
            break
        cloud.vertex.faults.clear()
        index += 1
    assert index >= 3


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_while_it_follows(
    submit: list[str], cloud: Cloud, cancel: bool, number: signal.Signals
) -> None:
    cloud.vertex.job_states = ("RUNNING",) * 10_000
    options = ["--cancel-on-exit"] if cancel else []
    command = [*submit, "--event", "a push", "--wait", "--poll", "0.05", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        limit = time.monotonic() + 60
        while not cloud.vertex.calls("pipelineJobs.get"):
            assert time.monotonic() < limit, "it does not look"
            time.sleep(0.02)
        process.send_signal(number)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()  # or a mistake would wait for ever
    assert process.returncode == 128 + number, err
    assert out.splitlines()[-1] == (
        "stopped; the run is cancelled" if cancel else "stopped; the run goes on"
    )
    assert len(cloud.vertex.calls("pipelineJobs.cancel")) == int(cancel)
    assert not re.search("Traceback", err)
