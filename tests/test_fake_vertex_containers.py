"""The fake of Vertex AI runs jobs and model servers with Docker."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.api_core import exceptions
from google.cloud import aiplatform_v1 as api
from level_2_cicd.rehearsal.containers import Containers
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex
from trainer.data import find_csv, prepare

from tests.vertex_calls import (
    PLACE,
    SERVING,
    client,
    create_endpoint,
    create_job,
    custom_job,
    deploy,
    predict,
    states,
    traffic_of,
    undeploy,
    upload,
)

pytestmark = pytest.mark.heavy

IMAGE = "python:3.11-slim"  # the base of the project's own images
# In place of a model server: it responds with its environment.
SERVER = """
import json, os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def reply(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        self.reply(200 if self.path == os.environ["AIP_HEALTH_ROUTE"] else 404, {})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        emulator = os.environ.get("STORAGE_EMULATOR_HOST")
        result = [os.environ["AIP_STORAGE_URI"], emulator, os.path.exists("/gcs")]
        if self.path == os.environ["AIP_PREDICT_ROUTE"] and body["instances"] != ["bad"]:
            self.reply(200, {"predictions": result})
        else:
            self.reply(400, {"error": "instance 0 is bad"})
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
HTTPServer(("0.0.0.0", int(os.environ["AIP_HTTP_PORT"])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def python_image(docker: str) -> str:
    """An image with Python, on this machine."""
    if subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True).returncode:
        subprocess.run(["docker", "pull", "--quiet", IMAGE], check=True)
    return IMAGE


@pytest.fixture
def vertex(python_image: str, tmp_path: Path) -> Iterator[FakeVertex]:
    """A fake that runs containers; the cloud's image names stand for the image with Python."""
    images = {"train@sha256:1": python_image, "predict@sha256:2": python_image}
    root, address = tmp_path / "buckets", "http://storage"
    with FakeVertex(containers=Containers(root, images=images, storage_address=address)) as vertex:
        yield vertex


def running() -> list[str]:
    """Running containers of this process."""
    command = ["docker", "ps", "--format", "{{.Names}}", "--filter"]
    command.append(f"name=rehearsal-{os.getpid()}-")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "not true in time"
        time.sleep(0.05)


def start_script(vertex: FakeVertex, script: str) -> str:
    """Start a job of a Python script; return its name."""
    job = custom_job()
    container = job.job_spec.worker_pool_specs[0].container_spec
    container.command, container.args = ["python", "-c"], [script]
    container.env = [{"name": "GREETING", "value": "hello, bucket"}]
    return str(client(vertex, "Job").create_custom_job(parent=PLACE, custom_job=job).name)


def wait(vertex: FakeVertex, name: str) -> api.CustomJob:
    """Wait for a job's end."""
    jobs = client(vertex, "Job")
    eventually(lambda: jobs.get_custom_job(name=name).end_time)
    return jobs.get_custom_job(name=name)


def test_a_job_runs_and_writes_to_the_bucket(vertex: FakeVertex, tmp_path: Path) -> None:
    script = """
import os, pathlib
folder = pathlib.Path("/gcs", os.environ["AIP_MODEL_DIR"].removeprefix("gs://"))
folder.mkdir(parents=True)
names = ("GREETING", "AIP_MODEL_DIR", "AIP_CHECKPOINT_DIR", "AIP_TENSORBOARD_LOG_DIR")
(folder / "model.txt").write_text(" ".join(os.environ[name] for name in names))
"""
    job = wait(vertex, start_script(vertex, script))
    assert job.state.name == "JOB_STATE_SUCCEEDED", job.error
    output = tmp_path / "buckets" / "bucket" / "run" / "model" / "model.txt"
    folders = "gs://bucket/run/model/ gs://bucket/run/checkpoints/ gs://bucket/run/logs/"
    assert output.read_text() == f"hello, bucket {folders}"
    assert output.stat().st_uid == os.getuid()


def test_a_failed_job_has_its_last_output_and_a_missing_image_fails(vertex: FakeVertex) -> None:
    script = "import sys; print('row 7 is bad'); sys.exit(3)"
    job = wait(vertex, start_script(vertex, script))
    assert job.state.name == "JOB_STATE_FAILED"
    assert "status of 3" in job.error.message
    assert "row 7 is bad" in job.error.message
    missing = wait(vertex, create_job(vertex, image="nowhere/none:1").name)
    assert missing.state.name == "JOB_STATE_FAILED"
    assert "nowhere/none:1" in missing.error.message


def test_a_cancelled_job_gets_sigterm(vertex: FakeVertex, tmp_path: Path) -> None:
    script = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path("/gcs/stopped").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("/gcs/started").touch()
time.sleep(600)
"""
    name = start_script(vertex, script)
    eventually((tmp_path / "buckets" / "started").exists)
    assert states(vertex, name, 3) == ["PENDING", "RUNNING", "RUNNING"]
    client(vertex, "Job").cancel_custom_job(name=name)
    assert wait(vertex, name).state.name == "JOB_STATE_CANCELLED"
    assert (tmp_path / "buckets" / "stopped").exists()
    assert running() == []


def test_a_deployed_model_predicts_until_it_is_undeployed(vertex: FakeVertex) -> None:
    endpoint, python = create_endpoint(vertex), {**SERVING, "command": ["python", "-c"]}
    model = upload(vertex, container_spec={**python, "args": [SERVER]}).model
    broken = "print('no manifest'); exit(4)"
    upload(vertex, parent=model, container_spec={**python, "args": [broken]})
    deployed = deploy(vertex, endpoint, model, {"0": 100})
    response = predict(vertex, endpoint)
    assert list(response.predictions) == ["gs://b/model", "http://storage", False]
    assert (response.deployed_model_id, response.model_version_id) == (deployed, "1")
    with pytest.raises(exceptions.BadRequest, match="instance 0 is bad"):
        predict(vertex, endpoint, "bad")

    message = r"exited unexpectedly with 4\. no manifest"
    with pytest.raises(exceptions.GoogleAPICallError, match=message):
        deploy(vertex, endpoint, f"{model}@2", {"0": 10, deployed: 90})
    assert traffic_of(vertex, endpoint) == {deployed: 100}
    undeploy(vertex, endpoint, deployed)
    eventually(lambda: running() == [])


def test_containers_stop_with_the_fake_after_an_error_too(
    python_image: str, tmp_path: Path
) -> None:
    containers = Containers(tmp_path, images={"train@sha256:1": python_image})
    with pytest.raises(ZeroDivisionError), FakeVertex(containers=containers) as vertex:
        start_script(vertex, "import time; time.sleep(600)")
        eventually(running)
        raise ZeroDivisionError
    assert running() == []


@pytest.fixture(scope="module")
def images(
    docker: str, generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The project's own images, built here, by their names in the cloud."""
    project = generate(tmp_path_factory.mktemp("vertex"))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{project / 'src'}:{project}",
    }
    script = [sys.executable, "-m", "level_1_pipeline.containers"]

    def build(*arguments: str) -> str:
        command = [*script, *arguments]
        done = subprocess.run(
            command, cwd=project, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        return done.stdout.strip()

    build("train", "predict")
    names = {"train@sha256:1": "train", "predict@sha256:2": "predict"}
    return {cloud: build("--print", name) for cloud, name in names.items()}


def test_the_projects_own_images_train_and_predict(images: dict[str, str], tmp_path: Path) -> None:
    data = tmp_path / "buckets" / "bucket" / "data"
    data.mkdir(parents=True)
    table = find_csv("sample:digits", tmp_path)
    prepare(table, "digit", data / "train.parquet", data / "test.parquet")
    lines = table.read_text(encoding="utf-8").splitlines()
    columns, row = [line.split(",") for line in lines[:2]]
    values = zip(columns, map(float, row), strict=True)
    instance = {name: value for name, value in values if name != "digit"}
    hyperparameters = {"seed": 0, "threads": 1, "epochs": 3, "batch_size": 128}
    hyperparameters_json = json.dumps({**hyperparameters, "learning_rate": 0.003})
    job = custom_job()
    container = job.job_spec.worker_pool_specs[0].container_spec
    container.args = ["--train", "gs://bucket/data/train.parquet"]
    container.args += ["--hyperparameters", hyperparameters_json]

    with contextlib.ExitStack() as stack:
        storage = stack.enter_context(FakeStorage(root=tmp_path / "buckets"))
        containers = Containers(storage.root, images=images, storage_address=storage.address)
        vertex = stack.enter_context(FakeVertex(containers=containers))
        name = client(vertex, "Job").create_custom_job(parent=PLACE, custom_job=job).name
        trained = wait(vertex, name)
        assert trained.state.name == "JOB_STATE_SUCCEEDED", trained.error
        endpoint = create_endpoint(vertex)
        model = upload(vertex, artifact_uri="gs://bucket/run/model").model
        deploy(vertex, endpoint, model, {"0": 100})
        [prediction] = predict(vertex, endpoint, instance).predictions
        assert prediction["label"] in range(10)
        assert storage.calls("objects.get")  # the server downloaded its model itself
        with pytest.raises(exceptions.BadRequest, match=columns[0]):
            predict(vertex, endpoint, {columns[0]: "x"})
    assert running() == []
