"""The fake of Vertex AI: strict requests, injected faults, custom jobs and pipeline jobs."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from google.api_core import exceptions
from level_2_cicd.rehearsal.server import Response
from level_2_cicd.rehearsal.vertex import FakeVertex

from tests.vertex_calls import (
    PLACE,
    SPEC,
    client,
    create_endpoint,
    create_job,
    custom_job,
    deploy,
    pipeline_job,
    predict,
    send,
    states,
    submit,
    upload,
)


@pytest.fixture
def vertex() -> Iterator[FakeVertex]:
    with FakeVertex() as vertex:
        yield vertex


# ── requests ────────────────────────────────────────────────────────────────────────────────


def test_a_custom_job_is_received_as_sent(vertex: FakeVertex) -> None:
    job = custom_job(labels={"commit": "a1b2"}, encryption_spec={"kms_key_name": "projects/p/key"})
    response = client(vertex, "Job").create_custom_job(parent=PLACE, custom_job=job)
    assert vertex.calls("customJobs.create") == [job]
    assert response.job_spec == job.job_spec
    assert response.encryption_spec == job.encryption_spec
    assert response.labels == {"commit": "a1b2"}


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("customJobs", {"displayName": "x", "jobSpec": {"workerPools": []}}, "workerPools"),
        (
            "customJobs",
            {"displayName": "x", "jobSpec": {"scheduling": {"strategy": "CHEAP"}}},
            "strategy",
        ),
        ("customJobs?customJobId=7", {"displayName": "x", "jobSpec": SPEC}, "customJobId"),
        (
            "pipelineJobs",
            {"displayName": "x", "runtimeConfig": {"parameters_": {}}},
            "parameters_",
        ),
        (
            "models:upload",
            {"model": {"displayName": "x"}, "versionAliases": ["a"]},
            "versionAliases",
        ),
        ("endpoints", {"displayName": "x", "trafficsplit": {}}, "trafficsplit"),
        ("customJobs", [1], "Failed to parse"),
    ],
)
def test_an_unknown_field_is_rejected_with_its_name(
    vertex: FakeVertex, path: str, body: Any, name: str
) -> None:
    status, response = send("POST", f"{vertex.address}/v1/{PLACE}/{path}", body)
    assert (status, response["error"]["status"]) == (400, "INVALID_ARGUMENT")
    assert name in response["error"]["message"]
    assert vertex.received == []


def test_an_unknown_call_is_rejected_with_its_name(vertex: FakeVertex) -> None:
    job, message = {"display_name": "x"}, r"POST /v1/.*/batchPredictionJobs; it knows .*customJobs"
    with pytest.raises(exceptions.MethodNotImplemented, match=message):
        client(vertex, "Job").create_batch_prediction_job(parent=PLACE, batch_prediction_job=job)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("display_name", "", "display_name is required"),
        ("job_spec.worker_pool_specs", [], "worker_pool_specs is required"),
        ("pool.container_spec.image_uri", "", "image_uri is required"),
        ("pool.machine_spec.machine_type", "", "machine_type is required"),
        ("pool.machine_spec.accelerator_count", 0, "go together"),
        ("pool.replica_count", 2, "replica_count is 2"),
        ("job_spec.base_output_directory.output_uri_prefix", "/data", "must match gs://"),
        ("labels", {"Commit": "x"}, "'Commit'"),
        ("labels", {"actor": "ada@example.com"}, "'ada@example.com'"),
        ("labels", {"long": "x" * 64}, "at most 63"),
    ],
)
def test_an_invalid_custom_job_is_rejected(
    vertex: FakeVertex, path: str, value: Any, message: str
) -> None:
    job = custom_job()
    owner: Any = job.job_spec.worker_pool_specs[0] if path.startswith("pool.") else job
    *parents, field = path.removeprefix("pool.").split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, field, value)
    with pytest.raises(exceptions.BadRequest, match=message):
        client(vertex, "Job").create_custom_job(parent=PLACE, custom_job=job)
    assert list(client(vertex, "Job").list_custom_jobs(parent=PLACE)) == []


def test_names_have_the_projects_number_and_both_forms_are_accepted(vertex: FakeVertex) -> None:
    name = create_job(vertex).name
    assert name.split("/")[1].isdigit()
    by_id = f"{PLACE}/customJobs/{name.split('/')[-1]}"
    assert client(vertex, "Job").get_custom_job(name=by_id).name == name
    with pytest.raises(exceptions.NotFound, match="CustomJob does not exist"):
        client(vertex, "Job").get_custom_job(name=by_id.replace("digits", "other"))


# ── faults ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"status": 429, "message": "Quota exceeded"}, exceptions.TooManyRequests),
        ({"status": 503, "message": "try later"}, exceptions.ServiceUnavailable),
        ({"status": 409, "message": "it already exists"}, exceptions.Conflict),
        ({"status": 0, "message": "Connection aborted"}, requests.exceptions.ConnectionError),
    ],
)
@pytest.mark.parametrize("done", [False, True])
def test_a_fault_occurs_once_before_or_after_the_work(
    vertex: FakeVertex, fault: dict[str, Any], error: type, done: bool
) -> None:
    vertex.fail("customJobs.create", done=done, **fault)
    with pytest.raises(error, match=fault["message"]):
        create_job(vertex, "first")
    create_job(vertex, "second")
    jobs = client(vertex, "Job").list_custom_jobs(parent=PLACE)
    names = [job.display_name for job in jobs]
    assert names == (["second", "first"] if done else ["second"])
    assert len(vertex.calls("customJobs.create")) == len(names)


def test_a_fault_starts_late_repeats_and_meets_only_its_call(vertex: FakeVertex) -> None:
    job = create_job(vertex)
    vertex.fail("customJobs.get", after=1, times=2)
    jobs, results = client(vertex, "Job"), []
    for _ in range(5):
        try:
            results.append(jobs.get_custom_job(name=job.name).state.name)
        except exceptions.ServiceUnavailable:
            results.append("503")
        list(jobs.list_custom_jobs(parent=PLACE))
    ends = ["JOB_STATE_RUNNING", "JOB_STATE_SUCCEEDED"]
    assert results == ["JOB_STATE_PENDING", "503", "503", *ends]


def test_a_slow_response_is_no_error_within_the_deadline(vertex: FakeVertex) -> None:
    vertex.fail("customJobs.list", status=None, seconds=0.5, times=2)
    jobs = client(vertex, "Job")
    with pytest.raises(Exception, match="timed out"):
        jobs.list_custom_jobs(parent=PLACE, timeout=0.1, retry=None)
    assert list(jobs.list_custom_jobs(parent=PLACE, timeout=30)) == []


def test_a_bug_in_the_fake_is_reported_as_one(
    vertex: FakeVertex, capfd: pytest.CaptureFixture[str]
) -> None:
    vertex.jobs.outcomes = [None]  # type: ignore[list-item]
    with pytest.raises(exceptions.InternalServerError, match="bug in FakeVertex: AttributeError"):
        create_job(vertex)
    endpoint = create_endpoint(vertex)
    deploy(vertex, endpoint, upload(vertex).model, {"0": 100})
    vertex.predictor = lambda deployed, body: Response(b"no JSON")
    with pytest.raises(exceptions.InternalServerError, match="bug in FakeVertex: JSONDecodeError"):
        predict(vertex, endpoint)
    assert "Traceback" in capfd.readouterr().err


# ── custom jobs ─────────────────────────────────────────────────────────────────────────────


def test_each_get_advances_a_job_and_a_list_does_not(vertex: FakeVertex) -> None:
    job = create_job(vertex)
    assert job.state.name == "JOB_STATE_QUEUED"
    for _ in range(3):
        jobs = list(client(vertex, "Job").list_custom_jobs(parent=PLACE))
    assert [job.state.name for job in jobs] == ["JOB_STATE_QUEUED"]
    assert states(vertex, job.name) == ["PENDING", "RUNNING", "SUCCEEDED", "SUCCEEDED"]
    job = client(vertex, "Job").get_custom_job(name=job.name)
    assert job.create_time <= job.start_time <= job.end_time


def test_a_job_ends_as_the_newest_outcome_says(vertex: FakeVertex) -> None:
    message = "RESOURCE_EXHAUSTED: no L4 is free"
    vertex.set_outcome("spot", code=8, message=message, through=("QUEUED", "PENDING"), times=1)
    first, second = create_job(vertex, "l4-spot"), create_job(vertex, "l4-spot")
    assert states(vertex, first.name, 3) == ["PENDING", "FAILED", "FAILED"]
    job = client(vertex, "Job").get_custom_job(name=first.name)
    assert (job.error.code, job.error.message) == (8, message)
    assert states(vertex, second.name)[-1] == "SUCCEEDED"
    vertex.set_outcome("l4", "JOB_STATE_EXPIRED", through=())
    assert create_job(vertex, "l4").state.name == "JOB_STATE_EXPIRED"


def test_a_job_is_cancelled_unless_it_has_ended(vertex: FakeVertex) -> None:
    jobs, job = client(vertex, "Job"), create_job(vertex)
    jobs.cancel_custom_job(name=job.name)
    assert [message.name for message in vertex.calls("customJobs.cancel")] == [job.name]
    [listed] = jobs.list_custom_jobs(parent=PLACE)
    assert listed.state.name == "JOB_STATE_CANCELLING"
    assert states(vertex, job.name, 2) == ["CANCELLED", "CANCELLED"]
    message = f"{job.name} cannot be cancelled: its state is JOB_STATE_CANCELLED"
    with pytest.raises(exceptions.BadRequest, match=message):
        jobs.cancel_custom_job(name=job.name)


@pytest.mark.parametrize(
    ("condition", "names"),
    [
        ('labels.run="r1"', ["b", "a"]),
        ('labels.run="r1" AND labels.job="2"', ["b"]),
        ('displayName="a"', ["a"]),
        ("state='JOB_STATE_QUEUED' AND display_name = c", ["c"]),
        ("labels.run=r1 AND state=JOB_STATE_FAILED", []),
    ],
)
def test_a_list_has_what_matches_the_filter_newest_first(
    vertex: FakeVertex, condition: str, names: list[str]
) -> None:
    create_job(vertex, "a", labels={"run": "r1", "job": "1"})
    create_job(vertex, "b", labels={"run": "r1", "job": "2"})
    create_job(vertex, "c")
    jobs = client(vertex, "Job").list_custom_jobs(request={"parent": PLACE, "filter": condition})
    assert [job.display_name for job in jobs] == names


@pytest.mark.parametrize(
    "condition", ["owner=x", 'display_name="a" AND', "(state=x", "a~b", "state=x OR state=y"]
)
def test_a_filter_that_cannot_be_parsed_is_rejected(vertex: FakeVertex, condition: str) -> None:
    create_job(vertex)
    with pytest.raises(exceptions.BadRequest, match="filter: "):
        client(vertex, "Job").list_custom_jobs(request={"parent": PLACE, "filter": condition})


def test_a_list_has_pages_and_one_region(vertex: FakeVertex) -> None:
    names = {create_job(vertex).name for _ in range(5)}
    jobs, request = client(vertex, "Job"), {"parent": PLACE, "page_size": 2}
    assert [len(page.custom_jobs) for page in jobs.list_custom_jobs(request=request).pages] == [
        2,
        2,
        1,
    ]
    assert {job.name for job in jobs.list_custom_jobs(request=request)} == names
    assert list(jobs.list_custom_jobs(parent="projects/digits/locations/us-central1")) == []


# ── pipeline jobs ───────────────────────────────────────────────────────────────────────────


def test_a_pipeline_job_has_its_id_and_advances(vertex: FakeVertex) -> None:
    job = submit(vertex, "event-1")
    assert job.name.endswith("/pipelineJobs/event-1")
    assert [message.name for message in vertex.calls("pipelineJobs.create")] == [job.name]
    parameters = vertex.calls("pipelineJobs.create")[0].runtime_config.parameter_values
    assert parameters["epochs"] == 3
    pipelines = client(vertex, "Pipeline")
    results = [pipelines.get_pipeline_job(name=job.name).state.name for _ in range(3)]
    assert results == [f"PIPELINE_STATE_{name}" for name in ("PENDING", "RUNNING", "SUCCEEDED")]
    vertex.set_outcome(state="PIPELINE_STATE_FAILED", through=())
    assert submit(vertex).state.name == "PIPELINE_STATE_FAILED"


def test_of_a_hundred_equal_ids_at_once_one_is_created(vertex: FakeVertex) -> None:
    uri = f"{vertex.address}/v1/{PLACE}/pipelineJobs?pipelineJobId=event-1"
    config = {"gcsOutputDirectory": "gs://b/r"}
    body = {"templateUri": "https://x-kfp.pkg.dev/t", "runtimeConfig": config}
    with ThreadPoolExecutor(20) as pool:
        statuses = pool.map(lambda _: send("POST", uri, body)[0], range(100))
        assert sorted(statuses) == [200, *[409] * 99]
    assert len(list(client(vertex, "Pipeline").list_pipeline_jobs(parent=PLACE))) == 1


@pytest.mark.parametrize(
    ("identity", "job", "message"),
    [
        ("Event", pipeline_job(epochs=1), "Event"),
        ("1-event", pipeline_job(epochs=1), "1-event"),
        ("a" * 129, pipeline_job(epochs=1), "must match"),
        ("event", pipeline_job(), "epochs is required"),
        ("event", pipeline_job(epochs=1, epoch=2), "no parameter epoch"),
        ("event", {"display_name": "run"}, "pipeline_spec or template_uri"),
        ("event", {**pipeline_job(epochs=1), "runtime_config": {}}, "gcs_output_directory"),
        ("event", {**pipeline_job(epochs=1), "labels": {"by": "Ada"}}, "'Ada'"),
    ],
)
def test_an_invalid_pipeline_job_is_rejected(
    vertex: FakeVertex, identity: str, job: dict[str, Any], message: str
) -> None:
    with pytest.raises(exceptions.BadRequest, match=message):
        submit(vertex, identity, job)
    assert list(client(vertex, "Pipeline").list_pipeline_jobs(parent=PLACE)) == []


def test_the_tasks_follow_their_jobs_state(vertex: FakeVertex) -> None:
    def task(name: str, *needs: str) -> dict[str, Any]:
        return {"componentRef": {"name": f"comp-{name}"}, "dependentTasks": list(needs)}

    tasks = {
        "evaluate": task("evaluate", "train"),
        "train": task("train"),
        "if-passed": task("if", "evaluate"),
    }
    inner = {"dag": {"tasks": {"deploy": task("deploy")}}}
    vertex.task_outputs = {"evaluate": {"metrics": {"accuracy": 0.97}}}
    spec = {"root": {"dag": {"tasks": tasks}}, "components": {"comp-if": inner}}
    job = {**pipeline_job(), "pipeline_spec": spec}
    name = submit(vertex, "event-1", job).name
    get: Callable[..., Any] = client(vertex, "Pipeline").get_pipeline_job
    looks = [get(name=name).job_detail.task_details for _ in range(3)]
    names = [[(task.task_name, task.state.name) for task in details] for details in looks]
    succeeded = [(name, "SUCCEEDED") for name in ("train", "evaluate", "deploy")]
    assert names == [[], [("train", "RUNNING")], succeeded]
    assert looks[2][1].outputs["metrics"].artifacts[0].metadata == {"accuracy": 0.97}

    vertex.set_outcome("run", code=8, message="no GPU is free", through=())
    details = submit(vertex, "event-2", job).job_detail.task_details
    assert [(task.task_name, task.state.name, task.error.message) for task in details] == [
        ("train", "SUCCEEDED", ""),
        ("evaluate", "FAILED", "no GPU is free"),
    ]
