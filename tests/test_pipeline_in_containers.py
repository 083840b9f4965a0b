"""make level1 RUNNER=docker: the same pipeline, each step in a container, with a real engine."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def project(
    docker: str, generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A project from the default answers."""
    return generate(tmp_path_factory.mktemp("containers"))


@pytest.fixture
def level1(project: Path) -> Run:
    """`make level1` in this environment."""

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": f"{project / 'src'}:{project}", **variables}
        command = [sys.executable, "-m", "level_1_pipeline.run"]
        return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)

    return run


def newest_run(project: Path) -> Path:
    return max((project / "runs").iterdir(), key=lambda run: run.stat().st_mtime)


def weights(project: Path) -> str:
    return hashlib.sha256(
        (newest_run(project) / "model" / "model.safetensors").read_bytes()
    ).hexdigest()


def test_the_steps_run_in_containers_and_the_weights_are_those_of_this_machine(
    project: Path, level1: Run
) -> None:
    done = level1(RUNNER="docker")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in containers" in done.stdout
    assert "Registered: version 1; it is the champion" in done.stdout
    log = (newest_run(project) / "pipeline.log").read_text()
    assert log.count("Found image 'digit-reader/train:") == 4
    assert log.count("Found image 'digit-reader/deploy:") == 1
    in_containers = weights(project)
    owners = {path.stat().st_uid for path in (project / "registry").rglob("*")}
    assert owners == {os.getuid()}

    done = level1(RUNNER="local")
    assert done.returncode == 0, done.stdout + done.stderr
    assert weights(project) == in_containers

    done = level1(
        RUNNER="docker", SET="hyperparameters.epochs=1 hyperparameters.learning_rate=0.0001"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Gate: closed" in done.stdout
    assert "The champion stays version 2" in done.stdout


def test_a_mistake_in_the_data_is_one_message_from_inside_the_container(
    project: Path, level1: Run
) -> None:
    (project / "bad.csv").write_text(
        "a,b,label\n1,2,x\n3,4,y\n" * 5 + "5,6,lonely\n", encoding="utf-8"
    )
    done = level1(RUNNER="docker", SET="data.source=bad.csv data.label=label")
    assert done.returncode == 2
    assert "step 'preprocess' failed; the champion is unchanged" in done.stderr
    assert "'lonely' occurs only once" in done.stderr
    assert "Traceback" not in done.stderr
    story = json.loads((newest_run(project) / "story.json").read_text())
    assert story["state"] == "failed"


def test_an_unknown_runner_and_an_engine_that_does_not_answer_are_told(
    project: Path, level1: Run
) -> None:
    done = level1(RUNNER="podman")
    assert (done.returncode, done.stderr) == (
        2,
        "error: RUNNER=podman: expected local, docker, vertex; for example make level1 RUNNER=docker\n",
    )
    done = level1(RUNNER="docker", DOCKER_HOST="unix:///nowhere.sock")
    assert done.returncode == 2
    assert "the Docker daemon is not running" in done.stderr
    assert "Traceback" not in done.stderr


def containers_of(run: Path) -> list[str]:
    """Containers that still run for a run."""
    command = ["docker", "ps", "--quiet", "--filter", f"label=run={run.name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def eventually(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_ctrl_c_ends_the_steps_container_too(project: Path, level1: Run) -> None:
    before = set((project / "runs").iterdir())
    environment = {**os.environ, "PYTHONPATH": f"{project / 'src'}:{project}", "RUNNER": "docker"}
    process = subprocess.Popen(
        [sys.executable, "-m", "level_1_pipeline.run"],
        cwd=project,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    eventually(lambda: set((project / "runs").iterdir()) - before)
    (run,) = set((project / "runs").iterdir()) - before
    eventually(lambda: list(run.glob("steps/*/preprocess/*")) and containers_of(run))
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert containers_of(run) == []
    assert json.loads((run / "story.json").read_text())["state"] == "interrupted"
