"""make level1 RUNNER=vertex, and make status of such a run. The servers are doubles, and images have digests without Docker."""

import json
import os
import shutil

import pytest
from core.errors import UserError
from core.manifest import sha256
from core.registry import LocalRegistry
from gcp import client as api
from level_1_pipeline import containers, status
from level_1_pipeline import run as pipeline_runner
from level_1_pipeline.vertex import run as vertex_run
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex
from project import runs

from tests.units.project import ROOT

DECISION = {"passed": True, "reason": "0.97 is enough"}


@pytest.fixture
def cloud_project(project, trained, monkeypatch):
    """A project with rows of its own, and a Google Cloud project with one bucket."""
    shutil.copytree(
        ROOT / "level_1_pipeline",
        project / "level_1_pipeline",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copytree(
        ROOT / "level_2_cicd",
        project / "level_2_cicd",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copy(trained / "animals.csv", project / "animals.csv")
    cloud = "cloud.environments.dev.project=my-project cloud.environments.dev.bucket=my-bucket cloud.train.jobs=[l4-spot,cpu]"
    monkeypatch.setenv("SET", f"data.source=animals.csv data.label=animal data.ignore=[id] {cloud}")
    monkeypatch.setenv("RUNNER", "vertex")
    monkeypatch.setenv("TORCH", "cu130")
    monkeypatch.setenv("DOCKER_DEFAULT_PLATFORM", "linux/amd64")
    monkeypatch.setattr(vertex_run, "POLL", 0)
    return project


@pytest.fixture
def vertex(cloud_project, tmp_path, monkeypatch):
    """A double of Vertex AI, and one of Cloud Storage with the bucket."""
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    (tmp_path / "buckets" / "my-bucket").mkdir(parents=True)
    with FakeVertex() as vertex, FakeStorage(tmp_path / "buckets") as storage:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", vertex.address)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.address)
        vertex.storage = storage
        yield vertex


@pytest.fixture
def pushed(monkeypatch) -> list[tuple[list[str], str]]:
    """What was built, and where it was sent."""
    pushes = []

    def make_all(made, _, registry):
        pushes.append(([container.name for container in made], registry))
        return {
            container.name: f"{registry}/{container.name}@sha256:{'a' * 64}" for container in made
        }

    monkeypatch.setattr(containers, "make_all", make_all)
    return pushes


def registry() -> LocalRegistry:
    return LocalRegistry(runs.registry_folder())


def test_the_run_is_started_followed_and_told(
    vertex, pushed, cloud_project, tmp_path, capsys, settings
):
    version = {"version": 3, "champion": True, "problem": None}
    vertex.task_outputs = {"gate": {"decision": DECISION}, "register": {"version": version}}
    pipeline_runner.main()
    images = f"{settings.cloud.region}-docker.pkg.dev/my-project/{settings.name}"
    assert pushed == [(["train", "deploy", "vertex_train", "predict"], images)]
    (job,) = vertex.calls("pipelineJobs.create")
    values = json.loads(type(job).to_json(job))["runtimeConfig"]["parameterValues"]
    rows = cloud_project / "animals.csv"
    assert values["csv"] == f"gs://my-bucket/data/{sha256(rows)[:32]}/animals.csv"
    assert (
        tmp_path / "buckets" / values["csv"].removeprefix("gs://")
    ).read_bytes() == rows.read_bytes()
    assert values["jobs"][0]["scheduling"]["strategy"] == "SPOT"
    assert len(values["jobs"]) == 2
    assert values["registry"] == "gs://my-bucket/storage/registry"
    assert values["serving"]["image"] == f"{images}/predict@sha256:{'a' * 64}"
    assert job.runtime_config.gcs_output_directory == "gs://my-bucket/pipeline-root"
    assert job.service_account == ""
    (run,) = runs.all_runs()
    assert values["run"] == run.name
    told = runs.read_json(run.folder / "story.json")
    assert (told["state"], told["gate"], told["registered"]) == ("succeeded", DECISION, version)
    assert told["job"].startswith("projects/my-project/")
    assert told["job"].split("/")[-1] == job.name.split("/")[-1]
    steps = ["preprocess", "vertex-train", "evaluate", "gate", "register"]
    assert [step["name"] for step in told["steps"]] == steps
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  ✓")] == steps
    assert "Gate: open, because 0.97 is enough." in out
    assert "Registered: version 3; it is the champion." in out
    text = status.story(run, registry())
    assert [line.split()[0] for line in text.splitlines()] == [
        "event",
        "run",
        *["step"] * 5,
        "gate",
        "version",
        "page",
    ]


def test_the_same_rows_are_sent_once(vertex, pushed):
    pipeline_runner.main()
    pipeline_runner.main()
    assert len(vertex.storage.calls("objects.insert")) == 1
    assert (
        len({job.name for job in vertex.calls("pipelineJobs.create")}) == 2
    )  # two runs: a person asked twice


def test_a_dry_run_prints_the_request_and_sends_and_keeps_nothing(
    vertex, pushed, monkeypatch, capsys
):
    monkeypatch.setenv("DRY_RUN", "1")
    pipeline_runner.main()
    shown = json.loads(capsys.readouterr().out)
    assert vertex.received == vertex.storage.received == pushed == runs.all_runs() == []
    monkeypatch.delenv("DRY_RUN")
    pipeline_runner.main()
    (job,) = vertex.calls("pipelineJobs.create")
    received = json.loads(type(job).to_json(job))["runtimeConfig"]["parameterValues"]
    planned = shown["pipelineJob"]["runtimeConfig"]["parameterValues"]
    same = ("csv", "hyperparameters", "threshold", "registry", "label")
    assert {name: received[name] for name in same} == {name: planned[name] for name in same}


def test_a_dry_run_elsewhere_is_told(cloud_project, monkeypatch):
    monkeypatch.setenv("RUNNER", "local")
    monkeypatch.setenv("DRY_RUN", "1")
    with pytest.raises(UserError, match=r"RUNNER=local sends nothing: add RUNNER=vertex"):
        pipeline_runner.main()


def test_a_closed_gate_is_no_failure(vertex, pushed, capsys):
    vertex.task_outputs = {"gate": {"decision": {"passed": False, "reason": "0.8 is below 0.95"}}}
    vertex.skipped_tasks = {"register"}
    pipeline_runner.main()
    out = capsys.readouterr().out
    assert "Gate: closed, because 0.8 is below 0.95." in out
    assert "there is no champion yet" in out
    assert runs.read_json(runs.all_runs()[0].folder / "story.json")["state"] == "succeeded"


def test_a_failed_step_is_named_with_what_it_said(vertex, pushed):
    vertex.set_outcome(state="FAILED", message="row 3 is wrong")
    with pytest.raises(UserError, match="the run failed: step 'vertex-train': row 3 is wrong"):
        pipeline_runner.main()
    told = runs.read_json(runs.all_runs()[0].folder / "story.json")
    assert (told["state"], told["problem"]) == ("failed", "step 'vertex-train': row 3 is wrong")


def test_a_run_that_was_refused_is_told_from_one_that_may_have_started(vertex, pushed, monkeypatch):
    monkeypatch.setattr(api, "RETRY_TIMEOUT", 0.1)
    for fault, state in (
        ({"status": 403}, "failed"),
        ({"status": 503, "done": True, "times": 9999}, "running"),
    ):
        vertex.fail("pipelineJobs.(create|get)", **fault)
        with pytest.raises(UserError):
            pipeline_runner.main()
        (run,) = [
            run
            for run in runs.all_runs()
            if runs.read_json(run.folder / "story.json")["state"] == state
        ]
        vertex.faults.clear()
        text = status.story(run, registry())
        assert ("page " in text) == (state == "running")


def test_a_run_that_is_no_longer_followed_goes_on_and_status_asks_for_it(
    vertex, pushed, monkeypatch, capsys
):
    vertex.task_outputs = {"gate": {"decision": DECISION}}

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vertex_run.pipeline_run, "follow", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pipeline_runner.main()
    (run,) = runs.all_runs()
    assert f"The run continues. `make status RUN={run.name}`" in capsys.readouterr().out
    assert runs.read_json(run.folder / "story.json")["state"] == "running"
    assert vertex.calls("pipelineJobs.cancel") == []
    texts = [status.story(run, registry()) for _ in range(4)]
    assert ": running" in texts[0]
    assert ": succeeded" in texts[-1]
    assert "open: 0.97 is enough" in texts[-1]
    asked = len(vertex.received)
    assert status.story(run, registry()) == texts[-1]
    assert len(vertex.received) == asked  # its end is written


def test_status_knows_a_run_that_was_started_elsewhere(vertex, pushed):
    pipeline_runner.main()
    identity = vertex.calls("pipelineJobs.create")[0].name.split("/")[-1]
    text = status.story(runs.Run(runs.runs_folder() / identity), registry())
    assert f"run      {identity}: succeeded" in text
    with pytest.raises(UserError, match=r"reading the run's state failed: .*does not exist"):
        status.story(runs.Run(runs.runs_folder() / "nobody"), registry())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "cloud.environments.dev.project='\"\"'",
            "cloud.environments.dev.project in project.yaml is empty",
        ),
        ("data.label=plant", "no label column 'plant'"),
        ("cloud.train.jobs=[l5]", "l5"),
    ],
)
def test_a_mistake_is_told_before_anything_is_built_or_sent(
    vertex, pushed, monkeypatch, change, told
):
    monkeypatch.setenv("SET", f"{os.environ['SET']} {change}")
    with pytest.raises(UserError) as caught:
        pipeline_runner.main()
    assert told in str(caught.value)
    assert pushed == vertex.received == vertex.storage.received == runs.all_runs() == []


def test_a_gpu_is_not_rented_for_an_image_that_cannot_use_it(vertex, pushed, monkeypatch):
    monkeypatch.setenv("TORCH", "cpu")
    with pytest.raises(UserError, match="would not use that GPU"):
        pipeline_runner.main()
    assert pushed == vertex.received == []


def test_an_error_at_any_call_leaves_one_run_or_none(vertex, pushed):
    for call in ("objects.insert", "pipelineJobs.create", "pipelineJobs.get"):
        for fault in ({"status": 503}, {"status": 0, "done": True}, {"status": 429}):
            before = len(vertex.calls("pipelineJobs.create"))
            for double in (vertex, vertex.storage):
                double.faults.clear()
                double.fail(call, **fault)
            pipeline_runner.main()
            assert len(vertex.calls("pipelineJobs.create")) == before + 1
