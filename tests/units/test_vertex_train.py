"""make train, over the wire: rows and job are sent, the model comes here; and what is told when something is missing."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from core.errors import UserError
from gcp import client as api
from gcp import training_job
from level_1_pipeline import containers
from level_1_pipeline.vertex import train as vertex_train
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex
from project import runs
from project.settings import load_settings

from tests.units.project import ROOT

NAME = "20260101-000000-abcd"
IMAGE = "registry.example/train@sha256:" + "b" * 64
DATA = "data.source=animals.csv data.label=animal data.ignore=[id]"
CLOUD = "cloud.environments.dev.project=some-project cloud.environments.dev.bucket=some-bucket"


@pytest.fixture
def cloud(project, trained, tmp_path, monkeypatch):
    """A project with data, a bucket, and a Vertex AI whose jobs end with the model that `trained` holds."""
    shutil.copytree(ROOT / "level_1_pipeline", project / "level_1_pipeline")
    shutil.copytree(ROOT / "requirements", project / "requirements")
    shutil.copy(trained / "animals.csv", project)
    monkeypatch.setattr(api, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(training_job, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(runs, "new", lambda: runs.Run(project / "runs" / NAME))
    monkeypatch.setattr(containers, "make_all", lambda made, settings, registry: {"train": IMAGE})
    monkeypatch.setenv("DOCKER_DEFAULT_PLATFORM", "linux/amd64")
    monkeypatch.setenv("TORCH", "cu130")
    monkeypatch.setenv("SET", f"{DATA} {CLOUD} cloud.train.jobs=[l4-spot,l4]")
    bucket = tmp_path / "buckets" / "some-bucket"
    shutil.copytree(trained / "model", bucket / "pipeline-root" / "runs" / NAME / "model")
    with FakeVertex() as vertex, FakeStorage(tmp_path / "buckets") as storage:
        vertex.set_outcome(state="SUCCEEDED", through=())
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", vertex.address)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.address)
        monkeypatch.setenv("GCS_MOUNT", str(tmp_path / "not-mounted"))
        vertex.storage, vertex.bucket = storage, bucket
        yield vertex


def train(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["train", *words])
    vertex_train.main()


def test_rows_go_there_and_the_model_comes_here(cloud, monkeypatch, capsys, trained):
    train(monkeypatch)
    (sent,) = cloud.calls("customJobs.create")
    pool = sent.job_spec.worker_pool_specs[0]
    assert pool.container_spec.image_uri == IMAGE
    words = list(pool.container_spec.args)
    rows = cloud.bucket / words[1].removeprefix("gs://some-bucket/")
    run = runs.find(NAME)
    assert rows.read_bytes() == run.train_data.read_bytes()
    assert json.loads(words[3])["epochs"] == load_settings().hyperparameters.epochs
    assert (
        sent.job_spec.base_output_directory.output_uri_prefix
        == f"gs://some-bucket/pipeline-root/runs/{NAME}"
    )
    assert sent.labels["run"] == NAME
    assert not sent.job_spec.service_account  # by hand Google's default one acts
    assert (run.model / "model.onnx").read_bytes() == (
        trained / "model" / "model.onnx"
    ).read_bytes()
    accuracy = runs.read_json(run.evaluation)["accuracy"]
    assert f"Accuracy {accuracy:.4f}" in capsys.readouterr().out
    assert "a training job" in runs.table("accuracy")


def test_the_same_rows_are_not_sent_twice(cloud, monkeypatch):
    train(monkeypatch)
    (address,) = cloud.storage.root.glob("some-bucket/data/*/train.parquet")
    before = address.stat().st_mtime_ns
    shutil.rmtree(runs.runs_folder() / NAME)
    train(monkeypatch)
    assert list(cloud.storage.root.glob("some-bucket/data/*/train.parquet")) == [address]
    assert address.stat().st_mtime_ns == before


def test_one_job_can_be_chosen(cloud, monkeypatch):
    train(monkeypatch, "--job", "cpu")
    (sent,) = cloud.calls("customJobs.create")
    assert not sent.job_spec.worker_pool_specs[0].machine_spec.accelerator_count


def test_a_run_that_was_cut_off_goes_on(cloud, monkeypatch):
    """Its job is found, not sent again, and neither are image and rows."""
    cloud.set_outcome(state="SUCCEEDED")
    cloud.fail("customJobs.get", status=403)
    with pytest.raises(UserError, match="The job may still run"):
        train(monkeypatch)
    monkeypatch.setenv("RUN", NAME)
    monkeypatch.setattr(vertex_train, "begin", None)
    train(monkeypatch)
    assert len(cloud.calls("customJobs.create")) == 1
    assert runs.read_json(runs.find(NAME).evaluation)


def test_a_dry_run_prints_the_jobs_and_sends_nothing(cloud, monkeypatch, capsys):
    monkeypatch.setattr(containers, "docker", None)
    train(monkeypatch, "--dry-run")
    first, second = yaml.safe_load_all(capsys.readouterr().out)
    assert [job["jobSpec"]["scheduling"]["strategy"] for job in (first, second)] == [
        "SPOT",
        "STANDARD",
    ]
    assert first["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"][1].startswith(
        "gs://some-bucket/data/"
    )
    assert cloud.received == []
    assert cloud.storage.received == []
    assert not runs.runs_folder().exists()


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("SET", DATA, r"cloud\.environments\.dev\.project in project\.yaml is empty"),
        ("SET", f"{DATA} {CLOUD.replace('some-bucket', 'no-bucket')}", "bucket does not exist"),
        ("SET", f"{DATA} {CLOUD} data.label=plant", "plant"),
        ("TORCH", "cpu", "TORCH=cu130"),
        ("DOCKER_DEFAULT_PLATFORM", "linux/arm64", "DOCKER_DEFAULT_PLATFORM=linux/amd64"),
        ("RUN", "unknown", "no training was sent from"),
    ],
)
def test_what_is_missing_is_told_before_an_image_is_built(cloud, monkeypatch, name, value, problem):
    monkeypatch.setattr(containers, "make_all", None)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=problem):
        train(monkeypatch)
    assert cloud.received == []
    assert not (runs.runs_folder() / NAME).exists()


def test_an_unknown_job_is_told(cloud, monkeypatch):
    with pytest.raises(UserError, match="no GPU job 'l5'"):
        train(monkeypatch, "--job", "l5")


def test_a_model_that_was_changed_on_its_way_is_not_kept(cloud, monkeypatch):
    (cloud.bucket / "pipeline-root" / "runs" / NAME / "model" / "model.onnx").write_bytes(b"half")
    with pytest.raises(UserError, match="no complete model"):
        train(monkeypatch)
    assert not (runs.runs_folder() / NAME / "model").exists()


def test_ctrl_c_cancels_the_job(cloud, monkeypatch):
    cloud.set_outcome(state="SUCCEEDED", through=("RUNNING",) * 100)
    carry_out = cloud.handle

    def handle(asked):
        if "customJobs/" in asked.path and asked.method == "GET":
            signal.raise_signal(signal.SIGINT)
        return carry_out(asked)

    monkeypatch.setattr(cloud, "handle", handle)
    with pytest.raises(SystemExit) as ended:
        train(monkeypatch)
    assert ended.value.code == 130
    assert [kept.message.state.name for kept in cloud.jobs.by_name.values()] == [
        "JOB_STATE_CANCELLING"
    ]
    assert Path(runs.runs_folder() / NAME).exists()
