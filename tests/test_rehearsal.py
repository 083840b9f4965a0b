"""`python -m rehearsal`, and gcloud with the fake of Vertex AI."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from level_2_cicd.rehearsal.vertex import FakeVertex

from tests.vertex_calls import PLACE, SPEC, custom_job, send, states, traffic_of


@pytest.fixture
def vertex() -> Iterator[FakeVertex]:
    with FakeVertex() as vertex:
        yield vertex


@pytest.fixture
def served(
    template: Path, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """The process of `python -m rehearsal`, and the variables that it prints."""
    command = [
        sys.executable,
        "-m",
        "level_2_cicd.rehearsal",
        "--port",
        "0",
        "--buckets",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        [*command, "--bucket", "my-bucket"],
        cwd=template,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        lines = [process.stdout.readline().strip() for _ in range(4)]
        assert all(line.startswith("export ") for line in lines)
        yield process, dict(line.removeprefix("export ").split("=", 1) for line in lines)
    finally:
        process.kill()
        process.wait()


def test_each_call_is_one_line_and_sigterm_ends_it(
    served: tuple[subprocess.Popen[str], dict[str, str]],
) -> None:
    process, variables = served
    address = variables["CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM"]
    job = {"displayName": "x", "jobSpec": SPEC}
    send("POST", f"{address}v1/{PLACE}/customJobs", job)
    send("POST", f"{address}v1/{PLACE}/customJobs", {})
    send("POST", f"{address}v1/{PLACE}/tensorboards", {})
    bucket = requests.get(f"{variables['STORAGE_EMULATOR_HOST']}/storage/v1/b/my-bucket")
    assert bucket.json()["name"] == "my-bucket"
    process.terminate()
    lines, _ = process.communicate(timeout=30)
    assert lines.splitlines() == [
        f"customJobs.create /v1/{PLACE}/customJobs → 200",
        f"customJobs.create /v1/{PLACE}/customJobs → 400",
        f"unknown POST /v1/{PLACE}/tensorboards → 501",
        "buckets.get /storage/v1/b/my-bucket → 200",
    ]
    assert process.returncode == 0


def test_a_port_in_use_is_reported(template: Path, vertex: FakeVertex, tmp_path: Path) -> None:
    port = vertex.address.rpartition(":")[2]
    options = ["--port", port, "--buckets", str(tmp_path)]  # nothing is written into the template
    command = [sys.executable, "-m", "level_2_cicd.rehearsal", *options]
    done = subprocess.run(command, cwd=template, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"port {port}" in done.stderr


@pytest.fixture
def gcloud(vertex: FakeVertex, tmp_path: Path) -> Callable[..., str]:
    """The real gcloud, with the fake as its server and no credentials; returns its output."""
    if shutil.which("gcloud") is None:
        if os.environ.get("REQUIRE_DOCKER"):  # where heavy tests must run
            pytest.fail("this test needs gcloud")
        pytest.skip("this test needs gcloud")
    environment = {
        **os.environ,
        "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "CLOUDSDK_CORE_PROJECT": "digits",
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": f"{vertex.address}/",
    }

    def run(*arguments: str) -> str:
        command = ["gcloud", "ai", *arguments, "--region", "europe-west4"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.mark.heavy
def test_gcloud_manages_custom_jobs(
    vertex: FakeVertex, gcloud: Callable[..., str], tmp_path: Path
) -> None:
    config = tmp_path / "job.json"  # JSON is YAML too
    config.write_text(json.dumps(SPEC), encoding="utf-8")
    options = ["--display-name=train", f"--config={config}", "--labels=commit=a1b2"]
    gcloud("custom-jobs", "create", *options)
    assert vertex.calls("customJobs.create") == [custom_job(labels={"commit": "a1b2"})]
    name = gcloud("custom-jobs", "list", "--format=value(name)")
    state = gcloud("custom-jobs", "describe", name, "--format=value(state)")
    assert state == "JOB_STATE_PENDING"
    gcloud("custom-jobs", "cancel", name)
    assert states(vertex, name, 1) == ["CANCELLED"]


@pytest.mark.heavy
def test_gcloud_uploads_and_deploys_models(vertex: FakeVertex, gcloud: Callable[..., str]) -> None:
    options = ["--container-image-uri=predict", "--artifact-uri=gs://b/model"]
    gcloud("models", "upload", "--display-name=digits", *options)
    assert gcloud("models", "list", "--format=value(displayName)") == "digits"
    model = vertex.calls("models.upload")[0].model
    assert (model.container_spec.image_uri, model.artifact_uri) == ("predict", "gs://b/model")
    gcloud("endpoints", "create", "--display-name=digits")
    by_name = ["--filter=displayName=digits", "--format=value(name)"]
    endpoint = gcloud("endpoints", "list", *by_name)
    model_id = gcloud("models", "list", "--format=value(name)")
    options = ["--display-name=d", "--machine-type=n2-standard-2", "--min-replica-count=1"]
    options += ["--traffic-split=0=100", f"--model={model_id}"]
    gcloud("endpoints", "deploy-model", endpoint, *options)
    assert list(traffic_of(vertex, f"{PLACE}/endpoints/{endpoint}").values()) == [100]
    resources = vertex.calls("endpoints.deployModel")[0].deployed_model.dedicated_resources
    assert resources.machine_spec.machine_type == "n2-standard-2"
