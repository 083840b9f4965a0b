"""A training job at Vertex AI, over the wire: what is sent, and one job for each request whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from core import manifest
from core.errors import UserError
from core.signals import Stop
from gcp import client as api
from gcp import training_job
from gcp.training_job import Jobs, Request, train
from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format
from kfp import dsl
from kfp.dsl import Dataset, Model
from level_1_pipeline import compile as pipeline_compiler
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex
from level_2_cicd.vertex_train_container import main as vertex_train_main
from trainer.config import Hyperparameters

PLACE = "projects/some-project/locations/europe-west4"
RUN = f"{PLACE}/pipelineJobs/train-and-register-1"
OUTPUT = "gs://bucket/root/run/train_1/model"
IMAGE = "europe-west4-docker.pkg.dev/some-project/digits/train@sha256:" + "a" * 64
ACCOUNT = "digits-trainer@some-project.iam.gserviceaccount.com"
KEY = "projects/some-project/locations/europe-west4/keyRings/digits/cryptoKeys/vertex"
ARGS = ["--train", "gs://bucket/train.parquet", "--hyperparameters", '{"epochs": 3}']
GPU_QUOTA = "The following quota metrics exceed quota limits: custom_model_training_nvidia_l4_gpus"
QUICK = (0.001, 0.001)


def job(machine="g2-standard-8", strategy="SPOT"):
    """A resolved job, with numbers as a pipeline hands them over."""
    pool = {
        "machineSpec": {
            "machineType": machine,
            "acceleratorType": "NVIDIA_L4",
            "acceleratorCount": 1.0,
        },
        "replicaCount": 1.0,
        "diskSpec": {"bootDiskType": "pd-ssd", "bootDiskSizeGb": 100.0},
        "containerSpec": {"imageUri": IMAGE, "command": ["python", "-m", "trainer.train"]},
    }
    return {
        "workerPoolSpecs": [pool],
        "scheduling": {"strategy": strategy, "timeout": "3600s"},
        "serviceAccount": ACCOUNT,
    }


def request(count=1, **changes):
    names = ["g2-standard-8", "g2-standard-12", "g2-standard-16"][:count]
    return Request(
        **{
            "run": RUN,
            "jobs": [job(name) for name in names],
            "args": ARGS,
            "output": OUTPUT,
            **changes,
        }
    )


@pytest.fixture
def vertex(monkeypatch):
    monkeypatch.setattr(api, "FIRST_WAIT", 0.001)
    with FakeVertex() as double:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", double.address)
        yield double


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    """A mounted bucket, in which the job's model is already."""
    monkeypatch.setenv("GCS_MOUNT", str(tmp_path / "gcs"))
    folder = tmp_path / "gcs" / OUTPUT.removeprefix("gs://")
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"network")
    manifest.write(folder, {"schema": {}})
    return folder


def jobs_in(vertex, *states):
    """Names of the jobs in these states, or in any."""
    states = [f"JOB_STATE_{state}" for state in states]
    return [
        name
        for name, kept in vertex.jobs.by_name.items()
        if not states or kept.message.state.name in states
    ]


def received(vertex):
    return [call.call for call in vertex.received]


# ── what is sent ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_job_is_what_was_asked_for(vertex, bucket):
    outcome = train(request(labels={"commit": "ABC", "actor": "ada@example.com"}, key=KEY), QUICK)
    (sent,) = vertex.calls("customJobs.create")
    (pool,) = sent.job_spec.worker_pool_specs
    assert pool.machine_spec.machine_type == "g2-standard-8"
    assert pool.machine_spec.accelerator_type == types.AcceleratorType.NVIDIA_L4
    assert (pool.machine_spec.accelerator_count, pool.replica_count) == (1, 1)
    assert (pool.disk_spec.boot_disk_type, pool.disk_spec.boot_disk_size_gb) == ("pd-ssd", 100)
    assert pool.container_spec.image_uri == IMAGE
    assert list(pool.container_spec.command) == ["python", "-m", "trainer.train"]
    assert list(pool.container_spec.args) == ARGS
    assert [(variable.name, variable.value) for variable in pool.container_spec.env] == [
        ("CODE_VERSION", "ABC")
    ]
    assert sent.job_spec.scheduling.strategy == types.Scheduling.Strategy.SPOT
    assert sent.job_spec.scheduling.timeout.total_seconds() == 3600
    assert sent.job_spec.service_account == ACCOUNT
    assert sent.job_spec.base_output_directory.output_uri_prefix == OUTPUT.removesuffix("/model")
    assert sent.encryption_spec.kms_key_name == KEY
    assert sent.display_name == "train-and-register-1-train-g2-standard-8"
    assert dict(sent.labels) == {
        "commit": "abc",
        "actor": "ada-example-com",
        "request": request().id,
        "attempt": "1",
    }
    assert outcome["job"] == jobs_in(vertex, "SUCCEEDED")[0]


def test_every_pool_of_several_machines_gets_the_arguments(vertex, bucket):
    two = job()
    two["workerPoolSpecs"] = [*two["workerPoolSpecs"], *job()["workerPoolSpecs"]]
    train(request(jobs=[two]), QUICK)
    (sent,) = vertex.calls("customJobs.create")
    assert [list(pool.container_spec.args) for pool in sent.job_spec.worker_pool_specs] == [
        ARGS,
        ARGS,
    ]
    assert "baseOutputDirectory" not in two  # what was given stays as it was


@pytest.fixture
def pipeline_job(vertex):
    """A pipeline run with a key and labels."""
    service = api.client("PipelineService", "europe-west4")
    run = types.PipelineJob(
        display_name="run",
        pipeline_spec={"root": {"dag": {"tasks": {}}}},
        labels={"event": "push", "vertex-ai-pipelines-run-billing-id": "1"},
        encryption_spec={"kms_key_name": KEY},
        runtime_config={"gcs_output_directory": "gs://bucket/root"},
    )
    created = service.create_pipeline_job(
        parent=PLACE, pipeline_job=run, pipeline_job_id="train-and-register-1"
    )
    return created.name  # with the project's number


def test_the_pipelines_step_sends_a_job_with_the_runs_key_and_labels(
    vertex, bucket, pipeline_job, monkeypatch
):
    """As kfp calls it: what is in `hyperparameters` and `jobs` has become doubles."""
    monkeypatch.setattr(training_job, "FIRST_WAIT", 0.001)
    vertex.set_outcome(state="SUCCEEDED", through=())
    rows, model = Dataset(uri="gs://bucket/rows"), Model(uri=OUTPUT)
    values = {"seed": 0.0, "threads": 2.0, "epochs": 3.0, "batch_size": 16.0, "learning_rate": 0.01}
    pipeline_compiler.load_definition().vertex_train(values, [job()], pipeline_job, rows, model)
    (sent,) = vertex.calls("customJobs.create")
    assert sent.encryption_spec.kms_key_name == KEY
    assert set(sent.labels) == {"event", "request", "attempt"}
    words = list(sent.job_spec.worker_pool_specs[0].container_spec.args)
    assert words[:3] == ["--train", "gs://bucket/rows", "--hyperparameters"]
    assert Hyperparameters.from_json(words[3]) == Hyperparameters(0, 2, 3, 16, 0.01)
    assert model.metadata["job"] == jobs_in(vertex, "SUCCEEDED")[0]


def test_hyperparameters_that_cannot_be_are_told_before_a_machine_is_rented(vertex, pipeline_job):
    values = {"seed": 0.0, "threads": 2.0, "epochs": 3.5, "batch_size": 16.0, "learning_rate": 0.01}
    with pytest.raises(UserError, match=r"epochs: .*integer"):
        pipeline_compiler.load_definition().vertex_train(
            values, [job()], pipeline_job, Dataset(uri="gs://bucket/rows"), Model(uri=OUTPUT)
        )
    assert vertex.calls("customJobs.create") == []


def test_the_step_takes_the_place_of_the_laptops_one(tmp_path):
    pipeline = pipeline_compiler.load_definition().make_pipeline("train", "deploy", IMAGE)
    compiled = json.loads(
        json_format.MessageToJson(
            pipeline_compiler.compile_pipeline(pipeline, tmp_path / "pipeline.yaml")
        )
    )
    executor = compiled["deploymentSpec"]["executors"]["exec-vertex-train"]["container"]
    assert executor["image"] == IMAGE
    assert "pip install" not in str(executor["command"])
    inputs = compiled["root"]["dag"]["tasks"]["vertex-train"]["inputs"]
    assert {*inputs["parameters"], *inputs["artifacts"]} == {
        "hyperparameters",
        "jobs",
        "pipeline_job",
        "train_data",
    }
    run = inputs["parameters"]["pipeline_job"]["runtimeValue"]["constant"]
    assert run == dsl.PIPELINE_JOB_RESOURCE_NAME_PLACEHOLDER


def test_states_links_and_times_are_told(vertex, bucket, capsys):
    outcome = train(request(), QUICK)
    told = capsys.readouterr().out
    states = [line.split("  ")[-1] for line in told.splitlines() if line.startswith("  0:00:")]
    assert states == ["queued", "pending", "running", "succeeded"]
    assert "g2-standard-8 with 1 NVIDIA_L4, SPOT), job 1 of 1" in told
    assert training_job.logs(outcome["job"]) in told
    assert outcome["page"] in told


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"output": "gs://bucket/run/weights"}, "output must be named model"),
        ({"output": "runs/1/model"}, "gs://BUCKET/…/model"),
        ({"run": "train-and-register-1"}, "projects/PROJECT/locations/REGION"),
        ({"jobs": []}, r"cloud\.train\.jobs"),
        ({"jobs": [{**job(), "strateggy": "SPOT"}]}, "strateggy"),
        ({"jobs": [job(), job(strategy="SOMETIMES")]}, r"job 2 \(g2-standard-8.*SOMETIMES"),
    ],
)
def test_what_cannot_be_sent_is_told_before_anything_is(vertex, changes, problem):
    with pytest.raises(UserError, match=problem):
        train(request(**changes), QUICK)
    assert vertex.received == []


# ── how it ends ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_failure_is_told_with_the_jobs_own_words_and_its_log(vertex, bucket):
    vertex.set_outcome(
        state="FAILED", message="The replica workerpool0-0 exited with a non-zero status of 2."
    )
    with pytest.raises(UserError, match="non-zero status of 2") as told:
        train(request(2), QUICK)
    assert training_job.logs(jobs_in(vertex)[0]) in str(told.value)
    assert len(jobs_in(vertex)) == 1  # another machine would fail as well


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (8, "injected fault"),
        (3, "Resources are insufficient in region: europe-west4"),
        (9, "STOCKOUT"),
        (9, "The zone does not have enough resources available to fulfill the request"),
        (9, GPU_QUOTA),
    ],
)
def test_want_of_a_machine_leads_to_the_next_job(vertex, bucket, capsys, code, message):
    vertex.set_outcome("g2-standard-8$", "FAILED", code=code, message=message)
    train(request(3), QUICK)
    sent = [
        (job.display_name.split("-train-")[1], job.labels["attempt"])
        for job in vertex.calls("customJobs.create")
    ]
    assert sent == [("g2-standard-8", "1"), ("g2-standard-12", "2")]
    assert f"no capacity: {message}" in capsys.readouterr().out


def test_too_little_memory_is_no_want_of_a_machine(vertex, bucket):
    vertex.set_outcome(
        state="FAILED",
        code=8,
        message="The replica workerpool0-0 ran out-of-memory and exited with 137",
    )
    with pytest.raises(UserError, match="ran out-of-memory"):
        train(request(2), QUICK)
    assert len(jobs_in(vertex)) == 1


def test_a_refused_quota_leads_to_the_next_job(vertex, bucket):
    vertex.fail("customJobs.create", status=429, message=GPU_QUOTA)
    train(request(2), QUICK)
    assert [sent.labels["attempt"] for sent in vertex.calls("customJobs.create")] == ["2"]


def test_when_none_gets_a_machine_it_says_so(vertex, bucket):
    vertex.fail("customJobs.create", status=429, message=GPU_QUOTA, times=2)
    with pytest.raises(UserError, match=r"the last of 2 jobs got no capacity: .*make gpu-jobs"):
        train(request(2), QUICK)
    assert jobs_in(vertex) == []


def test_another_refusal_ends_it(vertex, bucket):
    vertex.fail(
        "customJobs.create",
        status=403,
        message="Permission 'aiplatform.customJobs.create' denied",
        times=9,
    )
    with pytest.raises(UserError, match=r"roles/aiplatform\.user"):
        train(request(2), QUICK)
    assert received(vertex) == ["customJobs.list"]


def test_success_without_a_model_is_none(vertex, bucket):
    (bucket / "model.onnx").write_bytes(b"half")
    with pytest.raises(UserError, match=r"left no complete model: .*model\.onnx"):
        train(request(), QUICK)


def test_without_a_mount_the_model_is_checked_through_the_api(vertex, bucket, monkeypatch):
    with FakeStorage(bucket.parents[4]) as storage:
        monkeypatch.setenv("GCS_MOUNT", str(bucket / "nowhere"))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.address)
        train(request(), QUICK)
        (bucket / "model.onnx").unlink()
        with pytest.raises(UserError, match="left no complete model"):
            train(request(), QUICK)


# ── one job for each request ────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "fault",
    [{"status": 503}, {"status": 503, "done": True}, {"status": 0}, {"status": 0, "done": True}],
)
def test_a_lost_answer_starts_no_second_job(vertex, bucket, fault):
    vertex.fail("customJobs.create", **fault)
    train(request(), QUICK)
    assert len(jobs_in(vertex)) == 1


def test_a_restart_finds_the_job_that_runs_and_the_one_that_has_ended(vertex, bucket, capsys):
    first = train(request(), QUICK)
    assert train(request(), QUICK) == first
    assert "found: " in capsys.readouterr().out
    assert len(jobs_in(vertex)) == 1


def test_a_restart_goes_on_where_earlier_jobs_got_no_machine(vertex, bucket):
    """The first attempt was refused and left no job; a restart must not send it while the second runs."""
    vertex.fail("customJobs.create", status=429, message=GPU_QUOTA)
    first = train(request(2), QUICK)
    assert train(request(2), QUICK) == first
    assert len(jobs_in(vertex)) == 1


def test_a_restart_after_a_failure_tells_it_again_and_sends_nothing(vertex, bucket):
    """Here too the first attempt was refused, and left no job."""
    vertex.fail("customJobs.create", status=429, message=GPU_QUOTA)
    vertex.set_outcome(
        state="FAILED", message="The replica workerpool0-0 exited with a non-zero status of 2."
    )
    for _ in range(2):
        with pytest.raises(UserError, match="non-zero status of 2"):
            train(request(2), QUICK)
    assert len(jobs_in(vertex)) == 1


def test_of_two_jobs_the_older_stays(vertex, bucket, capsys):
    service = api.client("JobService", "europe-west4")
    older, younger = (
        service.create_custom_job(parent=PLACE, custom_job=message)
        for message in request().messages() * 2
    )
    assert train(request(), QUICK)["job"] == older.name
    assert jobs_in(vertex, "CANCELLED", "CANCELLING") == [younger.name]
    assert f"cancelling {younger.name}" in capsys.readouterr().out


def test_a_job_that_has_ended_meanwhile_need_not_be_cancelled(vertex, bucket):
    name = train(request(), QUICK)["job"]
    jobs = Jobs(request(), Stop())
    assert not jobs.cancel(name)
    assert not jobs.cancel(name.replace("customJobs/", "customJobs/9"))  # there is no such job


def test_another_requests_job_is_left_alone(vertex, bucket):
    service = api.client("JobService", "europe-west4")
    (message,) = request(run=f"{PLACE}/pipelineJobs/another").messages()
    other = service.create_custom_job(parent=PLACE, custom_job=message)
    assert train(request(), QUICK)["job"] != other.name
    assert jobs_in(vertex, "QUEUED") == [other.name]


def test_a_job_that_somebody_cancelled_ends_it_and_a_restart_sends_another(vertex, bucket):
    vertex.set_outcome(state="CANCELLED", times=1)
    with pytest.raises(UserError, match="ended as CANCELLED"):
        train(request(), QUICK)
    train(request(), QUICK)
    assert (len(jobs_in(vertex, "CANCELLED")), len(jobs_in(vertex, "SUCCEEDED"))) == (1, 1)


def cancel(name):
    api.client("JobService", "europe-west4").cancel_custom_job(name=name)


def test_a_restart_waits_for_the_end_of_a_job_that_is_being_cancelled_and_sends_another(
    vertex, bucket, capsys
):
    """Both write to the same folder."""
    service = api.client("JobService", "europe-west4")
    (message,) = request().messages()
    first = service.create_custom_job(parent=PLACE, custom_job=message)
    cancel(first.name)
    second = train(request(), QUICK)["job"]
    assert jobs_in(vertex, "CANCELLED") == [first.name]
    assert jobs_in(vertex, "SUCCEEDED") == [second]
    assert received(vertex).index("customJobs.get") < len(received(vertex)) - 1 - received(vertex)[
        ::-1
    ].index("customJobs.create")
    assert (
        f"waiting for the end of {first.name}, which is being cancelled" in capsys.readouterr().out
    )


def test_a_job_that_is_being_cancelled_does_not_end_a_younger_one_that_runs(vertex, bucket):
    service = api.client("JobService", "europe-west4")
    older, younger = (
        service.create_custom_job(parent=PLACE, custom_job=message)
        for message in request().messages() * 2
    )
    cancel(older.name)
    assert train(request(), QUICK)["job"] == younger.name
    assert [call.name for call in vertex.calls("customJobs.cancel")] == [older.name]


def test_when_nobody_answers_it_says_what_remains(vertex, bucket, monkeypatch):
    monkeypatch.setattr(api, "WATCH", 0.05)
    vertex.fail("customJobs.get", times=10_000)
    with pytest.raises(UserError, match="The job may still run: ") as told:
        train(request(), QUICK)
    assert f"gcloud ai custom-jobs cancel {jobs_in(vertex)[0]} --region=europe-west4" in str(
        told.value
    )


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_any_call_cancels_the_job(vertex, bucket, monkeypatch, number, index):
    """The double sends it while this process waits for its answer."""
    vertex.set_outcome(state="SUCCEEDED", through=("RUNNING",) * 1000)
    carry_out, left = vertex.handle, [index]

    def handle(asked):
        left[0] -= 1
        if left[0] == -1:
            os.kill(os.getpid(), number)
        return carry_out(asked)

    monkeypatch.setattr(vertex, "handle", handle)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        train(request(), QUICK)
    assert ended.value.code == 128 + number
    assert jobs_in(vertex) == jobs_in(vertex, "CANCELLING")
    assert len(jobs_in(vertex)) == (index > 0)
    assert len(vertex.calls("customJobs.cancel")) == (index > 0)
    assert signal.getsignal(number) is before


def test_a_signal_waits_until_the_job_is_sent(vertex, bucket, monkeypatch):
    """Else nobody would know of a job that comes into being a moment later."""
    carry_out = vertex.handle

    def handle(asked):
        if asked.path.endswith("/customJobs") and asked.method == "POST":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        return carry_out(asked)

    monkeypatch.setattr(vertex, "handle", handle)
    with pytest.raises(SystemExit):
        train(request(), QUICK)
    assert jobs_in(vertex) == jobs_in(vertex, "CANCELLING")
    assert len(jobs_in(vertex)) == 1


def test_a_signal_cancels_the_job_that_was_sent_also_when_none_can_be_looked_for(
    vertex, bucket, monkeypatch
):
    monkeypatch.setattr(training_job, "LAST_CALLS", 0.05)
    carry_out = vertex.handle

    def handle(asked):
        if "customJobs/" in asked.path and asked.method == "GET":
            vertex.fail("customJobs.list", times=10_000)
            os.kill(os.getpid(), signal.SIGTERM)
        return carry_out(asked)

    monkeypatch.setattr(vertex, "handle", handle)
    with pytest.raises(SystemExit):
        train(request(), QUICK)
    assert len(jobs_in(vertex, "CANCELLING")) == 1


def test_a_cancellation_that_fails_says_what_remains(vertex, bucket, monkeypatch, capfd):
    monkeypatch.setattr(training_job, "LAST_CALLS", 0.05)
    vertex.fail("customJobs.cancel", times=10_000)
    carry_out = vertex.handle

    def handle(asked):
        if "customJobs/" in asked.path and asked.method == "GET":
            os.kill(os.getpid(), signal.SIGTERM)
        return carry_out(asked)

    monkeypatch.setattr(vertex, "handle", handle)
    with pytest.raises(SystemExit):
        train(request(), QUICK)
    assert (
        f"The job may still run: {training_job.console(jobs_in(vertex)[0])}"
        in capfd.readouterr().err
    )


# ── the command line ────────────────────────────────────────────────────────────────────────────────────────────────
def command(*extra, jobs=None):
    words = [
        "--run",
        RUN,
        "--jobs",
        json.dumps(jobs or [job()]),
        "--output",
        OUTPUT,
        "--label",
        "event=push",
        *extra,
    ]
    environment = os.environ
    return subprocess.run(
        [sys.executable, "-m", "level_2_cicd.vertex_train_container.main", *words, "--", *ARGS],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_the_command_line_trains(vertex, bucket):
    vertex.set_outcome(state="SUCCEEDED", through=())
    done = command("--key", KEY)
    assert done.returncode == 0, done.stderr
    (sent,) = vertex.calls("customJobs.create")
    assert list(sent.job_spec.worker_pool_specs[0].container_spec.args) == ARGS
    assert sent.labels["event"] == "push"
    assert sent.encryption_spec.kms_key_name == KEY
    assert f"trained: {training_job.console(jobs_in(vertex)[0])}" in done.stdout


def test_a_dry_run_prints_what_would_be_sent_and_sends_nothing(vertex):
    done = command("--dry-run")
    assert json.loads(done.stdout) == [request(labels={"event": "push"}).custom_job(1)]
    assert vertex.received == []


@pytest.mark.parametrize(
    ("jobs", "problem"),
    [
        ("nowhere.json", "--jobs nowhere.json: cannot be read: No such file"),
        ("[1]", "--jobs: expected a JSON list of jobs"),
        ("{", "--jobs: expected JSON, or a file"),
        ('[{"replicaCount": NaN}]', "--jobs: expected JSON.*NaN is not a JSON number"),
    ],
)
def test_jobs_that_cannot_be_read_are_told(jobs, problem):
    with pytest.raises(UserError, match=problem):
        vertex_train_main.read_jobs(jobs)


def test_jobs_are_read_from_a_file_and_from_a_bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("GCS_MOUNT", str(tmp_path))
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "jobs.json").write_text(json.dumps(job()))
    assert vertex_train_main.read_jobs(str(tmp_path / "bucket" / "jobs.json")) == [job()]
    assert vertex_train_main.read_jobs("gs://bucket/jobs.json") == [job()]


@pytest.mark.parametrize("label", ["commit", "=a"])
def test_a_label_without_a_key_or_a_value_is_told_and_nothing_is_sent(vertex, label):
    done = command("--label", label)
    assert done.returncode == 2
    assert done.stderr == f"error: --label {label}: expected KEY=VALUE, such as commit=1a2b3c.\n"
    assert vertex.received == []
