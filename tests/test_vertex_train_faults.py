"""Training at Vertex AI when things go wrong at any moment: one job for each request, and its end is told as it is."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from core import manifest
from core.errors import UserError
from core.signals import Stop
from gcp import client as api
from gcp import training_job
from gcp.training_job import Jobs, Request, train
from level_1_pipeline import containers
from level_1_pipeline.vertex import train as vertex_train
from level_2_cicd.rehearsal.containers import Containers
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex

pytestmark = pytest.mark.heavy

FOLDER = Path(__file__).resolve().parents[1] / "{{cookiecutter.project_slug}}"
PLACE = "projects/some-project/locations/europe-west4"
OUTPUT = "gs://bucket/root/run/model"
QUICK = (0.001, 0.001)
STOCK_OUT = "Resources are insufficient in region: europe-west4. Please try a different region."
LIVING = ("QUEUED", "PENDING", "RUNNING")

FAULTS: dict[str, dict[str, Any]] = {
    "unavailable": {"status": 503},
    "too many requests": {"status": 429},
    "done, and then unavailable": {"status": 503, "done": True},
    "cut before": {"status": 0},
    "cut after": {"status": 0, "done": True},
    "slow": {"status": None, "seconds": 0.2},
}


def job(machine: str) -> dict[str, Any]:
    """A resolved job."""
    rented = {"machineType": machine, "acceleratorType": "NVIDIA_L4", "acceleratorCount": 1}
    pool = {
        "machineSpec": rented,
        "replicaCount": 1,
        "containerSpec": {"imageUri": "registry/train@sha256:1"},
    }
    return {"workerPoolSpecs": [pool], "scheduling": {"strategy": "SPOT", "timeout": "3600s"}}


def request(name: str = "run", count: int = 2) -> Request:
    """A request with two jobs to try."""
    jobs = [job(machine) for machine in ("g2-standard-8", "g2-standard-12")][:count]
    return Request(
        f"{PLACE}/pipelineJobs/{name}", jobs, ["--train", "gs://bucket/train.parquet"], OUTPUT
    )


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mounted bucket, in which the job's model is already."""
    monkeypatch.setattr(api, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("GCS_MOUNT", str(tmp_path))
    folder = tmp_path / OUTPUT.removeprefix("gs://")
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"network")
    manifest.write(folder, {"schema": {}})
    return folder


@pytest.fixture
def vertex(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVertex]:
    """Vertex AI, which has no machine for the first job."""
    with FakeVertex() as fake:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", fake.address)
        fake.set_outcome("g2-standard-8$", "FAILED", code=8, message=STOCK_OUT)
        yield fake


def states(vertex: FakeVertex) -> list[str]:
    """The jobs' states, in the order in which they were sent."""
    return [
        kept.message.state.name.removeprefix("JOB_STATE_") for kept in vertex.jobs.by_name.values()
    ]


def attempts(vertex: FakeVertex) -> list[str]:
    """Which attempts were sent, in order."""
    return [sent.labels["attempt"] for sent in vertex.calls("customJobs.create")]


def test_how_it_goes_without_a_fault(vertex: FakeVertex) -> None:
    """The other tests let each of these calls go wrong."""
    train(request(), QUICK)
    assert states(vertex) == ["FAILED", "SUCCEEDED"]
    assert len(vertex.received) == CALLS


CALLS = 18  # list, create; then a look and a list for each of four states; and that twice


@pytest.mark.parametrize("index", range(CALLS))
@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_at_any_call_changes_nothing(vertex: FakeVertex, fault: str, index: int) -> None:
    vertex.fail(after=index, **FAULTS[fault])
    train(request(), QUICK)
    assert states(vertex) == ["FAILED", "SUCCEEDED"]
    assert attempts(vertex) == ["1", "2"]
    assert vertex.faults[0].times == 0  # it did come


@pytest.mark.parametrize("index", range(CALLS))
def test_when_the_network_is_gone_for_good_it_says_what_remains_and_a_restart_ends_it(
    vertex: FakeVertex, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as impatient:
        impatient.setattr(api, "RETRY_TIMEOUT", 0.05)
        impatient.setattr(api, "WATCH", 0.05)
        vertex.fail(after=index, status=0, done=index % 2 == 1, times=100_000)
        with pytest.raises(UserError) as told:
            train(request(), QUICK)
    living = [
        name
        for name, kept in vertex.jobs.by_name.items()
        if kept.message.state.name.removeprefix("JOB_STATE_") in LIVING
    ]
    assert len(living) <= 1
    for name in living:
        assert name in str(told.value) or request().id in str(told.value)
    vertex.faults.clear()
    train(request(), QUICK)
    assert states(vertex) == ["FAILED", "SUCCEEDED"]


class Killed(BaseException):
    """What SIGKILL would be: nothing is tidied up."""


@pytest.mark.parametrize("index", range(CALLS))
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_any_call_and_started_again(
    vertex: FakeVertex, moment: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry_out, left = api.call, [index]

    def call(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == -1 and moment == "before":
            raise Killed
        answer = carry_out(*arguments, **options)
        if left[0] == -1:
            raise Killed
        return answer

    with monkeypatch.context() as killed:
        killed.setattr(api, "call", call)
        with pytest.raises(Killed):
            train(request(), QUICK)
    train(request(), QUICK)
    assert states(vertex) == ["FAILED", "SUCCEEDED"]
    assert attempts(vertex) == ["1", "2"]


@pytest.mark.parametrize("index", range(CALLS))
def test_told_to_stop_during_any_call_while_another_fails(
    vertex: FakeVertex, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call after the signal is lost: what lives is cancelled all the same."""
    carry_out, left = vertex.handle, [index]

    def handle(asked: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            os.kill(os.getpid(), signal.SIGTERM)
            vertex.fail(status=0)
        return carry_out(asked)

    monkeypatch.setattr(vertex, "handle", handle)
    with pytest.raises(SystemExit) as ended:
        train(request(), QUICK)
    assert ended.value.code == 128 + signal.SIGTERM
    assert not set(states(vertex)) & set(LIVING)


@pytest.mark.parametrize("round", range(10))
def test_several_at_once_leave_one_job(vertex: FakeVertex, round: int) -> None:
    """Three processes of one request, as when a step is started anew while the old one still runs."""
    vertex.jobs.outcomes.clear()
    endings: list[Any] = []
    together = threading.Barrier(3)

    def one() -> None:
        jobs = Jobs(request(f"run-{round}", 1), Stop(), QUICK)
        together.wait()
        endings.append(training_job.run_until_capacity(jobs))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(endings) == 3
    assert {training_job.state(ended) for ended in endings} == {"SUCCEEDED"}
    assert len({ended.name for ended in endings}) == 1
    assert set(states(vertex)) <= {"SUCCEEDED", "CANCELLED", "CANCELLING"}
    assert states(vertex).count("SUCCEEDED") == 1


# ── the process ─────────────────────────────────────────────────────────────────────────────────────────────


def words(name: str) -> list[str]:
    """The command line of the container."""
    asked = request(name)
    options = ["--run", asked.run, "--jobs", json.dumps(asked.jobs), "--output", asked.output]
    return ["-m", "level_2_cicd.vertex_train_container.main", *options, "--", *asked.args]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_is_stopped_by_a_signal(vertex: FakeVertex, number: signal.Signals) -> None:
    vertex.set_outcome("g2-standard-8$", "SUCCEEDED", through=("RUNNING",) * 1000)
    command = [sys.executable, *words("signalled")]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{FOLDER / 'src'}:{FOLDER}",
        "PYTHONUNBUFFERED": "1",
    }
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert any("running" in line for line in process.stdout)
        process.send_signal(number)
        _, told = process.communicate()
    assert process.returncode == 128 + number
    assert states(vertex) == ["CANCELLING"]
    assert "Traceback" not in told
    assert f"cancelled {next(iter(vertex.jobs.by_name))}" in told


# ── the container ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def project(
    docker: str, generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A project whose images nobody else has; they are removed afterwards."""
    slug = f"test-vt-{os.getpid()}"
    yield generate(tmp_path_factory.mktemp("vertex-train"), project_slug=slug)
    listed = subprocess.run(
        ["docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}"],
        capture_output=True,
        text=True,
    )
    own = [name for name in listed.stdout.split() if name.startswith(f"{slug}/")]
    if own:
        subprocess.run(["docker", "image", "rm", "--force", *own], capture_output=True, check=True)


def built(project: Path, name: str) -> str:
    """A container of the project, built as a person builds it; its image."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{project / 'src'}:{project}",
    }
    command = [sys.executable, "-m", "level_1_pipeline.containers", name]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(rf"{project.name}/{name}:\w+", done.stdout)
    assert found
    return found[0]


@pytest.fixture(scope="module")
def image(project: Path) -> str:
    """vertex_train_container."""
    return built(project, "vertex_train")


def container(
    image: str, vertex: FakeVertex, mount: Path, *command: str, name: str = ""
) -> list[str]:
    """The command that runs the image as the cloud does: any user, a read-only root, the buckets mounted."""
    mount.chmod(0o755)
    run = [
        "docker",
        "run",
        "--rm",
        "--network",
        "host",
        "--read-only",
        "--tmpfs",
        "/tmp",
        "--user",
        "12345:12345",
    ]
    run += ["--name", name] if name else []
    override = f"CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM={vertex.address}"
    return [*run, "--env", override, "--volume", f"{mount}:/gcs:ro", image, *command]


def test_the_container_trains(image: str, vertex: FakeVertex, tmp_path: Path) -> None:
    vertex.set_outcome("g2-standard-12$", "SUCCEEDED", through=())
    vertex.set_outcome("g2-standard-8$", "FAILED", code=8, message=STOCK_OUT, through=())
    done = subprocess.run(
        container(image, vertex, tmp_path, "python", *words("contained")),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no capacity: " in done.stdout
    assert states(vertex) == ["FAILED", "SUCCEEDED"]


def test_the_container_is_stopped(image: str, vertex: FakeVertex, tmp_path: Path) -> None:
    vertex.set_outcome("g2-standard-8$", "SUCCEEDED", through=("RUNNING",) * 1000)
    name = f"vertex-train-{os.getpid()}"
    command = container(image, vertex, tmp_path, "python", *words("stopped"), name=name)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert any("running" in line for line in process.stdout)
        subprocess.run(["docker", "stop", "--time", "30", name], check=True, capture_output=True)
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert states(vertex) == ["CANCELLING"]


STEP = """
import json, sys
sys.path[:0] = ["{root}", "{root}/src"]
from level_1_pipeline import component, pipeline
step = component.component(pipeline.vertex_train, "image")
print(json.dumps(step.component_spec.implementation.container.command))
"""


def step(run: str) -> list[str]:
    """kfp's own command of the pipeline's step, and what kfp's executor, which the image must hold, is told."""
    done = subprocess.run(
        [sys.executable, "-c", STEP.format(root=FOLDER)],
        capture_output=True,
        text=True,
        check=True,
    )
    artifact = {
        "name": "model",
        "type": {"schemaTitle": "system.Model"},
        "uri": OUTPUT,
        "metadata": {},
    }
    rows = {
        "name": "rows",
        "type": {"schemaTitle": "system.Dataset"},
        "uri": "gs://bucket/rows",
        "metadata": {},
    }
    values = {"seed": 0.0, "threads": 2.0, "epochs": 3.0, "batch_size": 16.0, "learning_rate": 0.01}
    told = {
        "inputs": {
            "parameterValues": {
                "hyperparameters": values,
                "jobs": [job("g2-standard-8")],
                "pipeline_job": run,
            },
            "artifacts": {"train_data": {"artifacts": [rows]}},
        },
        "outputs": {
            "artifacts": {"model": {"artifacts": [artifact]}},
            "outputFile": "/tmp/outputs.json",
        },
    }
    return [
        *json.loads(done.stdout),
        "--executor_input",
        json.dumps(told),
        "--function_to_execute",
        "vertex_train",
    ]


@pytest.fixture
def run(vertex: FakeVertex) -> str:
    """A pipeline run."""
    from google.cloud.aiplatform_v1 import types

    asked = types.PipelineJob(
        display_name="run",
        pipeline_spec={"root": {"dag": {"tasks": {}}}},
        labels={"event": "push", "commit": "1a2b"},
        runtime_config={"gcs_output_directory": "gs://bucket/root"},
    )
    service = api.client("PipelineService", "europe-west4")
    return str(
        service.create_pipeline_job(
            parent=PLACE, pipeline_job=asked, pipeline_job_id="pipeline"
        ).name
    )


def test_the_pipelines_step_runs_in_the_container(
    image: str, vertex: FakeVertex, run: str, tmp_path: Path
) -> None:
    vertex.set_outcome("g2-standard-8$", "SUCCEEDED", through=())
    ended = subprocess.run(
        container(image, vertex, tmp_path, *step(run)), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (sent,) = vertex.calls("customJobs.create")
    assert sent.labels["event"] == "push"
    (pool,) = sent.job_spec.worker_pool_specs
    assert list(pool.container_spec.args)[:2] == ["--train", "gs://bucket/rows"]
    assert [(variable.name, variable.value) for variable in pool.container_spec.env] == [
        ("CODE_VERSION", "1a2b")
    ]
    assert states(vertex) == ["SUCCEEDED"]


def test_the_pipelines_step_is_stopped_and_cancels_its_job(
    image: str, vertex: FakeVertex, run: str, tmp_path: Path
) -> None:
    """As the cloud stops a step: SIGTERM to the container's first process, which no --init stands before."""
    vertex.set_outcome("g2-standard-8$", "SUCCEEDED", through=("RUNNING",) * 1000)
    name = f"vertex-step-{os.getpid()}"
    command = container(image, vertex, tmp_path, *step(run), name=name)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        assert any("running" in line for line in process.stdout)
        subprocess.run(["docker", "stop", "--time", "30", name], check=True, capture_output=True)
        told, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, told
    assert f"cancelled {next(iter(vertex.jobs.by_name))}" in told
    assert states(vertex) == ["CANCELLING"]


def test_make_train_with_the_real_training_container(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows from here, a job that really runs, and its model here: only the machine and the registry are not Google's."""
    image = built(project, "train")
    address = "europe-west4-docker.pkg.dev/some-project/digits/train@sha256:" + "a" * 64
    buckets = tmp_path / "buckets"
    (buckets / "some-bucket").mkdir(parents=True)
    monkeypatch.chdir(project)
    monkeypatch.setattr(containers, "make_all", lambda *_: {"train": address})
    monkeypatch.setattr("sys.argv", ["make train", "--job", "cpu"])
    cloud = "cloud.environments.dev.project=some-project cloud.environments.dev.bucket=some-bucket"
    monkeypatch.setenv("SET", f"{cloud} hyperparameters.epochs=3")
    monkeypatch.setenv("GCS_MOUNT", str(tmp_path / "not mounted"))
    monkeypatch.setattr(training_job, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(training_job, "LONGEST_WAIT", 0.2)
    real = Containers(buckets, images={address: image})
    with FakeVertex(containers=real) as vertex, FakeStorage(buckets) as storage:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", vertex.address)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.address)
        vertex_train.main()
    assert "Accuracy " in capsys.readouterr().out
    (run,) = (project / "runs").iterdir()
    trained = manifest.read(run / "model")
    assert trained["hyperparameters"]["epochs"] == 3
    assert json.loads((run / "evaluation.json").read_text())["accuracy"] > 0.5
