"""The double of Vertex AI: what Google's own client and gcloud send is understood, checked, kept and answered as the API does."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform_v1 as api
from google.protobuf import json_format
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from rehearsal import protojson
from rehearsal.containers import Containers
from rehearsal.server import Response
from rehearsal.storage import FakeStorage
from rehearsal.vertex import FakeVertex
from trainer.data import find_csv, prepare

PLACE = "projects/digits/locations/europe-west4"
IMAGE = "python:3.11-slim"  # what the project's own images start from
SPEC: dict[str, Any] = {
    "workerPoolSpecs": [
        {
            "machineSpec": {"machineType": "g2-standard-8", "acceleratorType": "NVIDIA_L4", "acceleratorCount": 1},
            "replicaCount": "1",
            "diskSpec": {"bootDiskType": "pd-ssd", "bootDiskSizeGb": 200},
            "containerSpec": {"imageUri": "train@sha256:1", "command": ["python", "-m", "trainer.train"], "args": ["--x", "{}"]},
        }
    ],
    "scheduling": {"strategy": "SPOT", "timeout": "3600s"},
    "serviceAccount": "trainer@digits.iam.gserviceaccount.com",
    "baseOutputDirectory": {"outputUriPrefix": "gs://bucket/run"},
}
RESOURCES = {"machine_spec": {"machine_type": "n2-standard-2"}, "min_replica_count": 1, "max_replica_count": 3}
CALLS = settings(max_examples=20, stateful_step_count=20)


@pytest.fixture
def vertex() -> Iterator[FakeVertex]:
    with FakeVertex() as vertex:
        yield vertex


def client(vertex: FakeVertex, kind: str) -> Any:
    """Google's client, as the project makes it."""
    options = {"api_endpoint": vertex.address}
    return getattr(api, f"{kind}ServiceClient")(client_options=options, transport="rest", credentials=AnonymousCredentials())


def custom_job(name: str = "train", image: str = "", **fields: Any) -> api.CustomJob:
    job = api.CustomJob(display_name=name, **fields)
    json_format.ParseDict(SPEC, api.CustomJobSpec.pb(job.job_spec))
    if image:
        job.job_spec.worker_pool_specs[0].container_spec.image_uri = image
    return job


def create_job(vertex: FakeVertex, name: str = "train", **fields: Any) -> api.CustomJob:
    return client(vertex, "Job").create_custom_job(parent=PLACE, custom_job=custom_job(name, **fields))


def states(vertex: FakeVertex, name: str, looks: int = 4) -> list[str]:
    return [client(vertex, "Job").get_custom_job(name=name).state.name.removeprefix("JOB_STATE_") for _ in range(looks)]


def run_of(**parameters: Any) -> dict[str, Any]:
    """A pipeline job of a pipeline with one required parameter and one with a default."""
    inputs = {"epochs": {"parameterType": "NUMBER_INTEGER"}, "seed": {"parameterType": "NUMBER_INTEGER", "defaultValue": 0}}
    return {
        "display_name": "run",
        "pipeline_spec": {"root": {"inputDefinitions": {"parameters": inputs}}},
        "runtime_config": {"gcs_output_directory": "gs://bucket/runs", "parameter_values": parameters},
    }


def submit(vertex: FakeVertex, identity: str = "", job: dict[str, Any] | None = None) -> api.PipelineJob:
    request = {"parent": PLACE, "pipeline_job_id": identity, "pipeline_job": job or run_of(epochs=3)}
    return client(vertex, "Pipeline").create_pipeline_job(request=request)


def upload(vertex: FakeVertex, *aliases: str, parent: str = "", **fields: Any) -> api.UploadModelResponse:
    container = {"image_uri": "predict@sha256:2", "health_route": "/health", "predict_route": "/predict"}
    model = {"display_name": "digits", "container_spec": container, "artifact_uri": "gs://b/model", "version_aliases": aliases}
    request = {"parent": PLACE, "parent_model": parent, "model": {**model, **fields}}
    return client(vertex, "Model").upload_model(request=request).result()


def aliases_of(vertex: FakeVertex, model: str) -> dict[str, set[str]]:
    versions = client(vertex, "Model").list_model_versions(name=model)
    return {version.version_id: set(version.version_aliases) for version in versions}


def create_endpoint(vertex: FakeVertex, name: str = "digits") -> str:
    endpoint: api.Endpoint = client(vertex, "Endpoint").create_endpoint(parent=PLACE, endpoint={"display_name": name}).result()
    return str(endpoint.name)


def deploy(vertex: FakeVertex, endpoint: str, model: str, traffic: dict[str, int] | None = None, **fields: Any) -> str:
    deployed = {"model": model, "dedicated_resources": RESOURCES, **fields}
    request = {"endpoint": endpoint, "deployed_model": deployed, "traffic_split": traffic or {}}
    response = client(vertex, "Endpoint").deploy_model(request=request).result()
    return str(response.deployed_model.id)


def undeploy(vertex: FakeVertex, endpoint: str, identity: str, traffic: dict[str, int] | None = None) -> None:
    request = {"endpoint": endpoint, "deployed_model_id": identity, "traffic_split": traffic or {}}
    client(vertex, "Endpoint").undeploy_model(request=request).result()


def send_traffic(vertex: FakeVertex, endpoint: str, traffic: dict[str, int], etag: str = "") -> api.Endpoint:
    message = {"name": endpoint, "traffic_split": traffic, "etag": etag}
    return client(vertex, "Endpoint").update_endpoint(endpoint=message, update_mask="trafficSplit")


def traffic_of(vertex: FakeVertex, endpoint: str) -> dict[str, int]:
    return dict(client(vertex, "Endpoint").get_endpoint(name=endpoint).traffic_split)


def post(address: str, body: Any) -> tuple[int, Any]:
    """A plain HTTP call: its status and JSON."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# ── what is understood ──────────────────────────────────────────────────────────────────────────────────────


def test_a_job_is_received_as_it_was_sent(vertex: FakeVertex) -> None:
    sent = custom_job(labels={"commit": "a1b2"}, encryption_spec={"kms_key_name": "projects/p/key"})
    answered = client(vertex, "Job").create_custom_job(parent=PLACE, custom_job=sent)
    assert vertex.calls("customJobs.create") == [sent]
    assert answered.job_spec == sent.job_spec
    assert answered.encryption_spec == sent.encryption_spec
    assert answered.labels == {"commit": "a1b2"}


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("customJobs", {"displayName": "x", "jobSpec": {"workerPools": []}}, "workerPools"),
        ("customJobs", {"displayName": "x", "jobSpec": {"scheduling": {"strategy": "CHEAP"}}}, "strategy"),
        ("customJobs?customJobId=7", {"displayName": "x", "jobSpec": SPEC}, "customJobId"),
        ("pipelineJobs", {"displayName": "x", "runtimeConfig": {"parameters_": {}}}, "parameters_"),
        ("models:upload", {"model": {"displayName": "x"}, "versionAliases": ["a"]}, "versionAliases"),
        ("endpoints", {"displayName": "x", "trafficsplit": {}}, "trafficsplit"),
        ("customJobs", [1], "Failed to parse"),
    ],
)
def test_a_field_that_the_api_does_not_know_is_refused_with_its_name(
    vertex: FakeVertex, path: str, body: Any, named: str
) -> None:
    status, answer = post(f"{vertex.address}/v1/{PLACE}/{path}", body)
    assert (status, answer["error"]["status"]) == (400, "INVALID_ARGUMENT")
    assert named in answer["error"]["message"]
    assert vertex.received == []


def test_a_call_that_the_double_does_not_know_is_refused_with_its_name(vertex: FakeVertex) -> None:
    with pytest.raises(exceptions.MethodNotImplemented, match=r"POST /v1/.*/batchPredictionJobs; it knows .*customJobs.create"):
        client(vertex, "Job").create_batch_prediction_job(parent=PLACE, batch_prediction_job={"display_name": "x"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda job: setattr(job, "display_name", ""), "display_name is required"),
        (lambda job: setattr(job.job_spec, "worker_pool_specs", []), "worker_pool_specs is required"),
        (lambda job: setattr(job.job_spec.worker_pool_specs[0].container_spec, "image_uri", ""), "image_uri is required"),
        (lambda job: setattr(job.job_spec.worker_pool_specs[0].machine_spec, "machine_type", ""), "machine_type is required"),
        (lambda job: setattr(job.job_spec.worker_pool_specs[0].machine_spec, "accelerator_count", 0), "go together"),
        (lambda job: setattr(job.job_spec.worker_pool_specs[0], "replica_count", 2), "replica_count is 2"),
        (lambda job: setattr(job.job_spec.base_output_directory, "output_uri_prefix", "/data"), "gs://BUCKET"),
        (lambda job: job.labels.update({"Commit": "x"}), "'Commit'"),
        (lambda job: job.labels.update({"actor": "ada@example.com"}), "'ada@example.com'"),
        (lambda job: job.labels.update({"long": "x" * 64}), "at most 63"),
    ],
)
def test_a_job_that_the_api_refuses_is_refused(vertex: FakeVertex, change: Callable[[Any], Any], named: str) -> None:
    job = custom_job()
    change(job)
    with pytest.raises(exceptions.BadRequest, match=named):
        client(vertex, "Job").create_custom_job(parent=PLACE, custom_job=job)
    assert list(client(vertex, "Job").list_custom_jobs(parent=PLACE)) == []


def test_names_carry_the_projects_number_and_both_forms_are_taken(vertex: FakeVertex) -> None:
    name = create_job(vertex).name
    assert name.split("/")[1].isdigit()
    by_id = f"{PLACE}/customJobs/{name.split('/')[-1]}"
    assert client(vertex, "Job").get_custom_job(name=by_id).name == name
    with pytest.raises(exceptions.NotFound, match="CustomJob does not exist"):
        client(vertex, "Job").get_custom_job(name=by_id.replace("digits", "other"))


# ── jobs ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_look_at_a_job_is_a_step_and_a_list_is_none(vertex: FakeVertex) -> None:
    job = create_job(vertex)
    assert job.state.name == "JOB_STATE_QUEUED"
    for _ in range(3):
        listed = list(client(vertex, "Job").list_custom_jobs(parent=PLACE))
    assert [job.state.name for job in listed] == ["JOB_STATE_QUEUED"]
    assert states(vertex, job.name) == ["PENDING", "RUNNING", "SUCCEEDED", "SUCCEEDED"]
    ended = client(vertex, "Job").get_custom_job(name=job.name)
    assert ended.create_time <= ended.start_time <= ended.end_time


def test_a_job_ends_as_the_newest_rule_says(vertex: FakeVertex) -> None:
    vertex.set_outcome("spot", code=8, message="RESOURCE_EXHAUSTED: no L4 is free", through=("QUEUED", "PENDING"), times=1)
    first, second = create_job(vertex, "l4-spot"), create_job(vertex, "l4-spot")
    assert states(vertex, first.name, 3) == ["PENDING", "FAILED", "FAILED"]
    failed = client(vertex, "Job").get_custom_job(name=first.name)
    assert (failed.error.code, failed.error.message) == (8, "RESOURCE_EXHAUSTED: no L4 is free")
    assert states(vertex, second.name)[-1] == "SUCCEEDED"
    vertex.set_outcome("l4", "JOB_STATE_EXPIRED", through=())
    assert create_job(vertex, "l4").state.name == "JOB_STATE_EXPIRED"


def test_a_cancelled_job_ends_cancelled_and_an_ended_one_cannot_be_cancelled(vertex: FakeVertex) -> None:
    jobs, job = client(vertex, "Job"), create_job(vertex)
    jobs.cancel_custom_job(name=job.name)
    assert [message.name for message in vertex.calls("customJobs.cancel")] == [job.name]
    assert next(iter(jobs.list_custom_jobs(parent=PLACE))).state.name == "JOB_STATE_CANCELLING"
    with pytest.raises(exceptions.BadRequest, match=f"{job.name} cannot be deleted: its state is JOB_STATE_CANCELLING"):
        jobs.delete_custom_job(name=job.name)
    assert states(vertex, job.name, 2) == ["CANCELLED", "CANCELLED"]
    with pytest.raises(exceptions.BadRequest, match=f"{job.name} cannot be cancelled: its state is JOB_STATE_CANCELLED"):
        jobs.cancel_custom_job(name=job.name)
    jobs.delete_custom_job(name=job.name).result()
    assert list(jobs.list_custom_jobs(parent=PLACE)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('labels.run="r1"', ["b", "a"]),
        ('labels.run="r1" AND labels.job="2"', ["b"]),
        ('labels.run="r1" labels.job="2"', ["b"]),
        ('display_name="a" OR displayName="c"', ["c", "a"]),
        ('NOT (display_name="a" OR display_name="c")', ["b"]),
        ('display_name="a" OR display_name="b" AND labels.job="2"', ["b"]),  # OR binds closer, as Google's filters say
        ('state="JOB_STATE_QUEUED" AND -display_name:"a*"', ["c", "b"]),
        ("labels.run:*", ["b", "a"]),
        ('labels.run!="r1"', ["c"]),
        (f'create_time>"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%dT%H:%M:%SZ}"', ["c", "b", "a"]),
        ('create_time<"2020-01-01T00:00:00Z"', []),
    ],
)
def test_a_list_holds_what_the_filter_says_the_newest_first(vertex: FakeVertex, text: str, found: list[str]) -> None:
    create_job(vertex, "a", labels={"run": "r1", "job": "1"})
    create_job(vertex, "b", labels={"run": "r1", "job": "2"})
    create_job(vertex, "c")
    listed = client(vertex, "Job").list_custom_jobs(request={"parent": PLACE, "filter": text})
    assert [job.display_name for job in listed] == found


@pytest.mark.parametrize(
    ("text", "named"), [("owner=x", "owner"), ('display_name="a" AND', "AND"), ("(state=x", r"\)"), ("a~b", "a~b")]
)
def test_a_filter_that_is_not_understood_is_refused(vertex: FakeVertex, text: str, named: str) -> None:
    create_job(vertex)
    with pytest.raises(exceptions.BadRequest, match=named):
        client(vertex, "Job").list_custom_jobs(request={"parent": PLACE, "filter": text})


def test_a_list_comes_in_pages_and_holds_one_region(vertex: FakeVertex) -> None:
    names = {create_job(vertex).name for _ in range(5)}
    jobs = client(vertex, "Job")
    pages = [len(page.custom_jobs) for page in jobs.list_custom_jobs(request={"parent": PLACE, "page_size": 2}).pages]
    assert pages == [2, 2, 1]
    assert {job.name for job in jobs.list_custom_jobs(request={"parent": PLACE, "page_size": 2})} == names
    assert list(jobs.list_custom_jobs(parent="projects/digits/locations/us-central1")) == []


def test_a_run_is_kept_under_its_id_and_advances(vertex: FakeVertex) -> None:
    run = submit(vertex, "event-1")
    assert run.name.endswith("/pipelineJobs/event-1")
    assert [message.name for message in vertex.calls("pipelineJobs.create")] == [run.name]
    assert vertex.calls("pipelineJobs.create")[0].runtime_config.parameter_values["epochs"] == 3
    seen = [client(vertex, "Pipeline").get_pipeline_job(name=run.name).state.name for _ in range(3)]
    assert seen == ["PIPELINE_STATE_PENDING", "PIPELINE_STATE_RUNNING", "PIPELINE_STATE_SUCCEEDED"]
    vertex.set_outcome(state="PIPELINE_STATE_FAILED", through=())
    assert submit(vertex).state.name == "PIPELINE_STATE_FAILED"


def test_the_same_run_a_hundred_times_at_once_is_one(vertex: FakeVertex) -> None:
    def one(_: int) -> int:
        return post(f"{vertex.address}/v1/{PLACE}/pipelineJobs?pipelineJobId=event-1", body)[0]

    body = {"templateUri": "https://x-kfp.pkg.dev/t", "runtimeConfig": {"gcsOutputDirectory": "gs://b/r"}}
    with ThreadPoolExecutor(20) as pool:
        assert sorted(pool.map(one, range(100))) == [200, *[409] * 99]
    assert len(list(client(vertex, "Pipeline").list_pipeline_jobs(parent=PLACE))) == 1


@pytest.mark.parametrize(
    ("identity", "job", "named"),
    [
        ("Event", run_of(epochs=1), "Event"),
        ("1-event", run_of(epochs=1), "1-event"),
        ("a" * 129, run_of(epochs=1), "must match"),
        ("event", run_of(), "epochs is required"),
        ("event", run_of(epochs=1, epoch=2), "no parameter epoch"),
        ("event", {"display_name": "run"}, "pipeline_spec or template_uri"),
        ("event", {**run_of(epochs=1), "runtime_config": {}}, "gcs_output_directory"),
        ("event", {**run_of(epochs=1), "labels": {"by": "Ada"}}, "'Ada'"),
    ],
)
def test_a_run_that_the_api_refuses_is_refused(vertex: FakeVertex, identity: str, job: dict[str, Any], named: str) -> None:
    with pytest.raises(exceptions.BadRequest, match=named):
        submit(vertex, identity, job)
    assert list(client(vertex, "Pipeline").list_pipeline_jobs(parent=PLACE)) == []


def test_a_runs_tasks_follow_its_state(vertex: FakeVertex) -> None:
    tasks: dict[str, Any] = {
        "evaluate": {"componentRef": {"name": "comp-evaluate"}, "dependentTasks": ["train"]},
        "train": {"componentRef": {"name": "comp-train"}},
        "if-passed": {"componentRef": {"name": "comp-if"}, "dependentTasks": ["evaluate"]},
    }
    inner = {"dag": {"tasks": {"deploy": {"componentRef": {"name": "comp-deploy"}}}}}
    vertex.task_outputs = {"evaluate": {"metrics": {"accuracy": 0.97}}}
    job = {**run_of(), "pipeline_spec": {"root": {"dag": {"tasks": tasks}}, "components": {"comp-if": inner}}}
    run = submit(vertex, "event-1", job)
    looks = [client(vertex, "Pipeline").get_pipeline_job(name=run.name).job_detail.task_details for _ in range(3)]
    told = [[(task.task_name, task.state.name) for task in details] for details in looks]
    assert told == [[], [("train", "RUNNING")], [(name, "SUCCEEDED") for name in ("train", "evaluate", "deploy")]]
    assert looks[2][1].outputs["metrics"].artifacts[0].metadata == {"accuracy": 0.97}

    vertex.set_outcome("run", code=8, message="no GPU is free", through=())
    failed = submit(vertex, "event-2", job).job_detail.task_details
    assert [(task.task_name, task.state.name, task.error.message) for task in failed] == [
        ("train", "SUCCEEDED", ""),
        ("evaluate", "FAILED", "no GPU is free"),
    ]


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_versions_are_numbered_and_an_alias_is_on_one_version(vertex: FakeVertex) -> None:
    first = upload(vertex, "candidate", labels={"commit": "a1"})
    second = upload(vertex, "candidate", parent=first.model)
    assert (first.model_version_id, second.model_version_id) == ("1", "2")
    assert first.model == second.model
    assert aliases_of(vertex, first.model) == {"1": {"default"}, "2": {"candidate"}}

    models = client(vertex, "Model")
    models.merge_version_aliases(name=f"{first.model}@2", version_aliases=["champion", "default", "-candidate"])
    assert aliases_of(vertex, first.model) == {"1": set(), "2": {"champion", "default"}}
    models.merge_version_aliases(name=f"{first.model}@1", version_aliases=["champion"])
    assert aliases_of(vertex, first.model) == {"1": {"champion"}, "2": {"default"}}

    found = {which: models.get_model(name=f"{first.model}{which}").version_id for which in ("", "@1", "@champion", "@default")}
    assert found == {"": "2", "@1": "1", "@champion": "1", "@default": "2"}
    assert models.get_model(name=f"{first.model}@1").labels == {"commit": "a1"}
    with pytest.raises(exceptions.NotFound):
        models.get_model(name=f"{first.model}@candidate")
    assert [model.version_id for model in models.list_models(request={"parent": PLACE, "filter": 'display_name="digits"'})] == [
        "2"
    ]


def test_an_upload_that_the_api_refuses_is_refused(vertex: FakeVertex) -> None:
    models = client(vertex, "Model")
    with pytest.raises(exceptions.NotFound):
        upload(vertex, parent=f"{PLACE}/models/7")
    with pytest.raises(exceptions.BadRequest, match="image_uri"):
        upload(vertex, container_spec={"health_route": "/h"})
    with pytest.raises(exceptions.BadRequest, match="'1'"):
        upload(vertex, "1")
    request = {"parent": PLACE, "model_id": "digits", "model": {"display_name": "x", "artifact_uri": "gs://b/m"}}
    assert models.upload_model(request=request).result().model.endswith("/models/digits")
    with pytest.raises(exceptions.Conflict, match="parent_model"):
        models.upload_model(request=request)
    with pytest.raises(exceptions.BadRequest, match="model_id"):
        models.upload_model(request={**request, "model_id": "7up"})


def test_aliases_that_the_api_refuses_are_refused(vertex: FakeVertex) -> None:
    models, name = client(vertex, "Model"), upload(vertex).model
    with pytest.raises(exceptions.BadRequest, match="a version must be named"):
        models.merge_version_aliases(name=name, version_aliases=["champion"])
    with pytest.raises(exceptions.BadRequest, match="`default` cannot be removed"):
        models.merge_version_aliases(name=f"{name}@1", version_aliases=["-default"])
    with pytest.raises(exceptions.BadRequest, match="'2nd'"):
        models.merge_version_aliases(name=f"{name}@1", version_aliases=["2nd"])
    assert aliases_of(vertex, name) == {"1": {"default"}}


def test_what_is_deployed_or_the_default_is_not_deleted_and_a_number_is_not_given_twice(vertex: FakeVertex) -> None:
    models, name, endpoint = client(vertex, "Model"), upload(vertex).model, create_endpoint(vertex)
    upload(vertex, parent=name)
    deployed = deploy(vertex, endpoint, f"{name}@2")
    assert [place.deployed_model_id for place in models.get_model(name=f"{name}@2").deployed_models] == [deployed]
    for remove in (lambda: models.delete_model_version(name=f"{name}@2"), lambda: models.delete_model(name=name)):
        with pytest.raises(exceptions.BadRequest, match="undeploy it first"):
            remove()
    with pytest.raises(exceptions.BadRequest, match="default version"):
        models.delete_model_version(name=f"{name}@1")
    undeploy(vertex, endpoint, deployed)
    models.delete_model_version(name=f"{name}@2").result()
    assert upload(vertex, parent=name).model_version_id == "3"
    models.delete_model(name=name).result()
    assert list(models.list_models(parent=PLACE)) == []


def test_a_models_labels_change_and_its_artifact_does_not(vertex: FakeVertex) -> None:
    models, name = client(vertex, "Model"), upload(vertex, labels={"a": "1"}).model
    change = {"name": f"{name}@1", "labels": {"a": "2"}, "artifact_uri": "gs://b/other"}
    assert models.update_model(model=change, update_mask="labels").labels == {"a": "2"}
    assert models.get_model(name=name).artifact_uri == "gs://b/model"
    with pytest.raises(exceptions.BadRequest, match="artifact_uri cannot be changed"):
        models.update_model(model=change, update_mask="artifactUri")


# ── endpoints ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_canary_from_deployment_to_the_old_ones_end(vertex: FakeVertex) -> None:
    endpoint, model = create_endpoint(vertex), upload(vertex, "champion").model
    old = deploy(vertex, endpoint, f"{model}@champion", {"0": 100}, service_account="predictor@digits.iam.gserviceaccount.com")
    upload(vertex, "candidate", parent=model)
    new = deploy(vertex, endpoint, f"{model}@candidate", {"0": 10, old: 90})
    assert traffic_of(vertex, endpoint) == {old: 90, new: 10}
    with pytest.raises(exceptions.BadRequest, match="still has 90 %"):
        undeploy(vertex, endpoint, old)
    assert dict(send_traffic(vertex, endpoint, {new: 100}).traffic_split) == {new: 100}
    undeploy(vertex, endpoint, old)
    kept = client(vertex, "Endpoint").get_endpoint(name=endpoint)
    assert [(deployed.id, deployed.model, deployed.model_version_id) for deployed in kept.deployed_models] == [(new, model, "2")]
    sent = vertex.calls("endpoints.deployModel")[0]
    assert sent.deployed_model.service_account == "predictor@digits.iam.gserviceaccount.com"
    assert sent.deployed_model.dedicated_resources == api.DedicatedResources(RESOURCES)
    assert sent.traffic_split == {"0": 100}
    undeploy(vertex, endpoint, new)  # the last may have traffic
    assert traffic_of(vertex, endpoint) == {}


@pytest.mark.parametrize(
    ("traffic", "fields", "named"),
    [
        ({"0": 90}, {}, "90 is the sum"),
        ({"0": 50, "7": 50}, {}, "no DeployedModel 7"),
        ({"0": 120, "1": -20}, {"id": "2"}, "sum|no DeployedModel"),
        ({"0": 100}, {"id": "one"}, "'one'"),
        ({"0": 100}, {"dedicated_resources": {"machine_spec": {"machine_type": "n"}}}, "min_replica_count"),
        ({"0": 100}, {"dedicated_resources": {**RESOURCES, "min_replica_count": 4}}, "less than"),
        ({"0": 100}, {"dedicated_resources": None}, "is required"),
        ({"0": 100}, {"model": ""}, "model is required"),
    ],
)
def test_a_deployment_that_the_api_refuses_changes_nothing(
    vertex: FakeVertex, traffic: dict[str, int], fields: dict[str, Any], named: str
) -> None:
    endpoint, model = create_endpoint(vertex), upload(vertex).model
    with pytest.raises(exceptions.BadRequest, match=named):
        deploy(vertex, endpoint, **{"model": model, "traffic": traffic, **fields})
    assert not client(vertex, "Endpoint").get_endpoint(name=endpoint).deployed_models


def test_an_id_that_is_taken_an_unknown_model_and_a_full_endpoint_are_refused(vertex: FakeVertex) -> None:
    endpoint, model = create_endpoint(vertex), upload(vertex).model
    assert deploy(vertex, endpoint, model, {"0": 100}, id="7") == "7"
    with pytest.raises(exceptions.Conflict, match="7 already exists"):
        deploy(vertex, endpoint, model, id="7")
    with pytest.raises(exceptions.NotFound, match="@9"):
        deploy(vertex, endpoint, f"{model}@9")
    with pytest.raises(exceptions.NotFound, match="DeployedModel 8"):
        undeploy(vertex, endpoint, "8")
    with pytest.raises(exceptions.BadRequest, match="undeploy them first"):
        client(vertex, "Endpoint").delete_endpoint(name=endpoint)
    undeploy(vertex, endpoint, "7")
    client(vertex, "Endpoint").delete_endpoint(name=endpoint).result()
    assert list(client(vertex, "Endpoint").list_endpoints(parent=PLACE)) == []


def test_a_change_of_what_has_changed_since_is_refused_when_an_etag_is_sent(vertex: FakeVertex) -> None:
    endpoint, model = create_endpoint(vertex), upload(vertex).model
    first, second = deploy(vertex, endpoint, model, {"0": 100}), deploy(vertex, endpoint, model)
    read = client(vertex, "Endpoint").get_endpoint(name=endpoint).etag
    assert read
    send_traffic(vertex, endpoint, {first: 90, second: 10}, read)
    with pytest.raises(exceptions.Conflict, match="has changed since"):
        send_traffic(vertex, endpoint, {second: 100}, read)
    assert traffic_of(vertex, endpoint) == {first: 90, second: 10}
    send_traffic(vertex, endpoint, {second: 100})
    assert traffic_of(vertex, endpoint) == {second: 100}
    with pytest.raises(exceptions.BadRequest, match="99 is the sum"):
        send_traffic(vertex, endpoint, {second: 99})


def test_endpoints_are_found_by_display_name(vertex: FakeVertex) -> None:
    create_endpoint(vertex, "other")
    wanted = create_endpoint(vertex, "digits")
    found = client(vertex, "Endpoint").list_endpoints(request={"parent": PLACE, "filter": 'display_name="digits"'})
    assert [endpoint.name for endpoint in found] == [wanted]


def test_whatever_is_called_the_traffic_adds_up() -> None:
    class Calls(RuleBasedStateMachine):
        """Any calls with any shares, right or wrong; what is kept must be right after each."""

        @initialize()
        def start(self) -> None:
            self.endpoint, self.model = create_endpoint(vertex), upload(vertex).model
            self.path = f"{vertex.address}/v1/{self.endpoint}"

        def kept(self) -> Any:
            return vertex.endpoints.endpoints[self.endpoint]

        def shares(self, data: st.DataObject, *others: str) -> dict[str, int]:
            known = [*(deployed.id for deployed in self.kept().deployed_models), *others]
            pairs = st.tuples(st.sampled_from([*known, "42"]), st.sampled_from([0, 10, 50]), st.sampled_from([*known, "42"]))
            right = pairs.map(lambda pair: {pair[0]: 100 - pair[1], pair[2]: pair[1]} if pair[0] != pair[2] else {pair[0]: 100})
            wrong = st.dictionaries(st.sampled_from([*known, "42"]), st.sampled_from([0, 10, 50, 90, 100]), max_size=3)
            return data.draw(st.one_of(right, wrong, st.just({})))

        @rule(data=st.data())
        def deploy(self, data: st.DataObject) -> None:
            deployed = {"model": self.model, "dedicatedResources": {"machineSpec": {"machineType": "n"}, "minReplicaCount": 1}}
            post(f"{self.path}:deployModel", {"deployedModel": deployed, "trafficSplit": self.shares(data, "0")})

        @precondition(lambda self: self.kept().deployed_models)
        @rule(data=st.data())
        def undeploy(self, data: st.DataObject) -> None:
            known = [deployed.id for deployed in self.kept().deployed_models]
            body = {"deployedModelId": data.draw(st.sampled_from([*known, "42"])), "trafficSplit": self.shares(data)}
            post(f"{self.path}:undeployModel", body)

        @rule(data=st.data())
        def change(self, data: st.DataObject) -> None:
            body = json.dumps({"trafficSplit": self.shares(data)}).encode()
            request = urllib.request.Request(f"{self.path}?updateMask=trafficSplit", body, method="PATCH")
            try:
                urllib.request.urlopen(request).close()
            except urllib.error.HTTPError as error:
                assert error.code == 400

        @invariant()
        def holds(self) -> None:
            if hasattr(self, "endpoint"):
                traffic = self.kept().traffic_split
                assert sum(traffic.values()) in {0, 100}
                assert set(traffic) <= {deployed.id for deployed in self.kept().deployed_models}

    with FakeVertex() as vertex:
        run_state_machine_as_test(Calls, settings=CALLS)
        carried_out = {call: len(vertex.calls(f"endpoints.{call}")) for call in ("deployModel", "undeployModel", "patch")}
        assert min(carried_out.values()) >= 5, carried_out


# ── predictions ─────────────────────────────────────────────────────────────────────────────────────────────


def predict(vertex: FakeVertex, endpoint: str) -> api.PredictResponse:
    return client(vertex, "Prediction").predict(endpoint=endpoint, instances=[{"x": 1.0}])


def test_each_deployed_model_gets_its_share_evenly(vertex: FakeVertex) -> None:
    endpoint, model = create_endpoint(vertex), upload(vertex).model
    old = deploy(vertex, endpoint, model, {"0": 100})
    new = deploy(vertex, endpoint, upload(vertex, parent=model).model + "@2", {"0": 10, old: 90})
    vertex.predictor = lambda deployed, body: Response({"predictions": [deployed.model_version_id, json.loads(body)]})
    answers = [predict(vertex, endpoint) for _ in range(20)]
    ids = [answer.deployed_model_id for answer in answers]
    assert [ids[:10].count(new), ids[10:].count(new)] == [1, 1]
    assert ids.count(old) == 18
    assert {(answer.model, answer.model_version_id) for answer in answers} == {(model, "1"), (model, "2")}
    assert list(answers[0].predictions) == ["1", {"instances": [{"x": 1.0}]}]


def test_raw_predictions_pass_and_an_error_of_the_container_is_told(vertex: FakeVertex) -> None:
    endpoint = create_endpoint(vertex)
    with pytest.raises(exceptions.BadRequest, match="no deployed model with traffic"):
        predict(vertex, endpoint)
    deployed = deploy(vertex, endpoint, upload(vertex).model, {"0": 100})
    with pytest.raises(exceptions.MethodNotImplemented, match=r"FakeVertex\.predictor"):
        predict(vertex, endpoint)
    vertex.predictor = lambda deployed, body: Response(body[::-1])
    request = urllib.request.Request(f"{vertex.address}/v1/{endpoint}:rawPredict", b"abc")
    with urllib.request.urlopen(request) as answer:  # Google's client wraps the body when it speaks REST
        assert (answer.read(), answer.headers["X-Vertex-AI-Deployed-Model-Id"]) == (b"cba", deployed)
    assert vertex.calls("endpoints.rawPredict") == [b"abc"]
    vertex.predictor = lambda deployed, body: Response({"error": "instance 0: x is missing"}, 400)
    with pytest.raises(exceptions.BadRequest, match="instance 0: x is missing"):
        predict(vertex, endpoint)


# ── what goes wrong when it shall ───────────────────────────────────────────────────────────────────────────


def test_an_operation_takes_as_many_looks_as_it_shall(vertex: FakeVertex) -> None:
    vertex.slow_operations = 1
    endpoints = client(vertex, "Endpoint")
    operation = endpoints.create_endpoint(parent=PLACE, endpoint={"display_name": "slow"})
    assert list(endpoints.list_endpoints(parent=PLACE)) == []
    assert operation.result().display_name == "slow"
    assert len(vertex.calls("operations.get")) == 2


def test_operations_that_go_on_are_listed_and_may_be_cancelled(vertex: FakeVertex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protojson, "PAGE", 1)
    endpoint, model = create_endpoint(vertex), upload(vertex).model
    vertex.slow_operations = 1
    endpoints = client(vertex, "Endpoint")
    request = {"endpoint": endpoint, "deployed_model": {"id": "7", "model": model, "dedicated_resources": RESOURCES}}
    operation = endpoints.deploy_model(request=request)
    with pytest.raises(exceptions.Conflict, match="7 is being deployed"):
        endpoints.deploy_model(request=request)
    first = endpoints.list_operations({"name": endpoint})
    second = endpoints.list_operations({"name": endpoint, "page_token": first.next_page_token})
    seen = [(one.name, one.done) for page in (first, second) for one in page.operations]
    assert seen[-1] == (operation.operation.name, False)
    assert [done for _, done in seen] == [True, False]
    assert not second.next_page_token
    endpoints.cancel_operation({"name": operation.operation.name})
    with pytest.raises(exceptions.Cancelled, match="cancelled"):
        operation.result()
    vertex.slow_operations = 0
    assert not endpoints.get_endpoint(name=endpoint).deployed_models
    assert endpoints.deploy_model(request=request).result().deployed_model.id == "7"


def test_an_operation_fails_when_the_world_has_changed_meanwhile(vertex: FakeVertex) -> None:
    endpoint, model = create_endpoint(vertex), upload(vertex).model
    old = deploy(vertex, endpoint, model, {"0": 100})
    new = deploy(vertex, endpoint, model)
    vertex.slow_operations = 1
    request = {"endpoint": endpoint, "deployed_model_id": new}
    operation = client(vertex, "Endpoint").undeploy_model(request=request)
    send_traffic(vertex, endpoint, {new: 100})
    with pytest.raises(exceptions.GoogleAPICallError, match="still has 100 %"):
        operation.result()
    assert traffic_of(vertex, endpoint) == {new: 100}
    assert old


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
def test_a_fault_comes_once_before_or_after_the_work(vertex: FakeVertex, fault: dict[str, Any], error: type, done: bool) -> None:
    vertex.fail("customJobs.create", done=done, **fault)
    with pytest.raises(error, match=fault["message"]):
        create_job(vertex, "first")
    create_job(vertex, "second")
    listed = [job.display_name for job in client(vertex, "Job").list_custom_jobs(parent=PLACE)]
    assert listed == (["second", "first"] if done else ["second"])
    assert len(vertex.calls("customJobs.create")) == len(listed)


def test_a_fault_waits_comes_as_often_as_it_shall_and_meets_only_its_call(vertex: FakeVertex) -> None:
    job = create_job(vertex)
    vertex.fail("customJobs.get", after=1, times=2)
    jobs, seen = client(vertex, "Job"), []
    for _ in range(5):
        try:
            seen.append(jobs.get_custom_job(name=job.name).state.name)
        except exceptions.ServiceUnavailable:
            seen.append("503")
        list(jobs.list_custom_jobs(parent=PLACE))
    assert seen == ["JOB_STATE_PENDING", "503", "503", "JOB_STATE_RUNNING", "JOB_STATE_SUCCEEDED"]


def test_a_slow_answer_is_no_error_but_a_deadline_may_end_before_it(vertex: FakeVertex) -> None:
    vertex.fail("customJobs.list", status=None, seconds=0.5, times=2)
    jobs = client(vertex, "Job")
    with pytest.raises(Exception, match="timed out"):
        jobs.list_custom_jobs(parent=PLACE, timeout=0.1, retry=None)
    assert list(jobs.list_custom_jobs(parent=PLACE, timeout=30)) == []


def test_a_mistake_in_the_double_itself_is_an_answer_that_says_so(vertex: FakeVertex, capfd: pytest.CaptureFixture[str]) -> None:
    vertex.jobs.outcomes = [None]  # type: ignore[list-item]
    with pytest.raises(exceptions.InternalServerError, match="a mistake of its own: AttributeError"):
        create_job(vertex)
    endpoint = create_endpoint(vertex)
    deploy(vertex, endpoint, upload(vertex).model, {"0": 100})
    vertex.predictor = lambda deployed, body: Response(b"no JSON")
    with pytest.raises(exceptions.InternalServerError, match="a mistake of its own: JSONDecodeError"):
        predict(vertex, endpoint)
    assert "Traceback" in capfd.readouterr().err


# ── by hand, and with gcloud ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def by_hand(template: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """The process of `python -m rehearsal`, and the variables that it says."""
    command = [sys.executable, "-m", "rehearsal", "--port", "0", "--buckets", str(tmp_path), "--bucket", "my-bucket"]
    process = subprocess.Popen(command, cwd=template / "level_2_cicd", stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        lines = [process.stdout.readline().strip() for _ in range(4)]
        assert all(line.startswith("export ") for line in lines)
        yield process, dict(line.removeprefix("export ").split("=", 1) for line in lines)
    finally:
        process.kill()
        process.wait()


def test_by_hand_each_call_is_a_line_and_sigterm_ends_it(by_hand: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    process, variables = by_hand
    address = variables["CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM"]
    post(f"{address}v1/{PLACE}/customJobs", {"displayName": "x", "jobSpec": SPEC})
    post(f"{address}v1/{PLACE}/customJobs", {})
    post(f"{address}v1/{PLACE}/tensorboards", {})
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


def test_by_hand_a_port_in_use_is_told(template: Path, vertex: FakeVertex) -> None:
    port = vertex.address.rpartition(":")[2]
    command = [sys.executable, "-m", "rehearsal", "--port", port]
    done = subprocess.run(command, cwd=template / "level_2_cicd", capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"port {port}" in done.stderr


@pytest.fixture
def gcloud(vertex: FakeVertex, tmp_path: Path) -> Callable[..., str]:
    """The real gcloud, with the double as its server and no credentials; what it writes."""
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
def test_gcloud_speaks_to_it(vertex: FakeVertex, gcloud: Callable[..., str], tmp_path: Path) -> None:
    config = tmp_path / "job.json"  # JSON is YAML too
    config.write_text(json.dumps(SPEC), encoding="utf-8")
    gcloud("custom-jobs", "create", "--display-name=train", f"--config={config}", "--labels=commit=a1b2")
    assert vertex.calls("customJobs.create") == [custom_job(labels={"commit": "a1b2"})]
    name = gcloud("custom-jobs", "list", "--format=value(name)")
    assert gcloud("custom-jobs", "describe", name, "--format=value(state)") == "JOB_STATE_PENDING"
    gcloud("custom-jobs", "cancel", name)
    assert states(vertex, name, 1) == ["CANCELLED"]

    gcloud("models", "upload", "--display-name=digits", "--container-image-uri=predict", "--artifact-uri=gs://b/model")
    assert gcloud("models", "list", "--format=value(displayName)") == "digits"
    model = vertex.calls("models.upload")[0].model
    assert (model.container_spec.image_uri, model.artifact_uri) == ("predict", "gs://b/model")
    gcloud("endpoints", "create", "--display-name=digits")
    endpoint = gcloud("endpoints", "list", "--filter=displayName=digits", "--format=value(name)")
    model_id = gcloud("models", "list", "--format=value(name)")
    options = ["--display-name=d", "--machine-type=n2-standard-2", "--min-replica-count=1", "--traffic-split=0=100"]
    gcloud("endpoints", "deploy-model", endpoint, f"--model={model_id}", *options)
    assert list(traffic_of(vertex, f"{PLACE}/endpoints/{endpoint}").values()) == [100]
    assert (
        vertex.calls("endpoints.deployModel")[0].deployed_model.dedicated_resources.machine_spec.machine_type == "n2-standard-2"
    )


# ── what really runs ────────────────────────────────────────────────────────────────────────────────────────

# It stands for a model's server: it answers with what its environment says.
SERVER = """
import json, os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Answer(BaseHTTPRequestHandler):
    def reply(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        self.reply(200 if self.path == os.environ["AIP_HEALTH_ROUTE"] else 404, {})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        right = self.path == os.environ["AIP_PREDICT_ROUTE"] and asked["instances"] != ["bad"]
        where = [os.environ["AIP_STORAGE_URI"], os.environ.get("STORAGE_EMULATOR_HOST"), os.path.exists("/gcs")]
        self.reply(200 if right else 400, {"predictions": where} if right else {"error": "instance 0 is bad"})
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
HTTPServer(("0.0.0.0", int(os.environ["AIP_HTTP_PORT"])), Answer).serve_forever()
"""


@pytest.fixture(scope="module")
def python_image(docker: str) -> str:
    """An image with Python, on this machine."""
    if subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True).returncode:
        subprocess.run(["docker", "pull", "--quiet", IMAGE], check=True)
    return IMAGE


@pytest.fixture
def real(python_image: str, tmp_path: Path) -> Iterator[FakeVertex]:
    """A double that runs what it is asked to run; the cloud's image names mean the image with Python."""
    images = {"train@sha256:1": python_image, "predict@sha256:2": python_image}
    with FakeVertex(containers=Containers(tmp_path / "buckets", images=images, storage_address="http://storage")) as vertex:
        yield vertex


def running() -> list[str]:
    """Containers of this process that run."""
    names = ["docker", "ps", "--format", "{{.Names}}", "--filter", f"name=rehearsal-{os.getpid()}-"]
    return subprocess.run(names, capture_output=True, text=True, check=True).stdout.split()


def eventually(holds: Callable[[], object]) -> None:
    """Wait until something holds."""
    limit = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit, "this never came about"
        time.sleep(0.05)


def start_script(vertex: FakeVertex, script: str) -> str:
    """Start a job of a Python script; its name."""
    job = custom_job()
    container = job.job_spec.worker_pool_specs[0].container_spec
    container.command, container.args = ["python", "-c"], [script]
    container.env = [{"name": "GREETING", "value": "hello, bucket"}]
    return str(client(vertex, "Job").create_custom_job(parent=PLACE, custom_job=job).name)


def ended(vertex: FakeVertex, name: str) -> api.CustomJob:
    """The job, when it has ended."""
    jobs = client(vertex, "Job")
    eventually(lambda: jobs.get_custom_job(name=name).end_time)
    return jobs.get_custom_job(name=name)


@pytest.mark.heavy
def test_a_job_really_runs_and_writes_to_the_bucket(real: FakeVertex, tmp_path: Path) -> None:
    script = """
import os, pathlib
folder = pathlib.Path("/gcs", os.environ["AIP_MODEL_DIR"].removeprefix("gs://"))
folder.mkdir(parents=True)
names = ("GREETING", "AIP_MODEL_DIR", "AIP_CHECKPOINT_DIR", "AIP_TENSORBOARD_LOG_DIR")
(folder / "model.txt").write_text(" ".join(os.environ[name] for name in names))
"""
    job = ended(real, start_script(real, script))
    assert job.state.name == "JOB_STATE_SUCCEEDED", job.error
    written = tmp_path / "buckets" / "bucket" / "run" / "model" / "model.txt"
    folders = "gs://bucket/run/model/ gs://bucket/run/checkpoints/ gs://bucket/run/logs/"
    assert written.read_text() == f"hello, bucket {folders}"
    assert written.stat().st_uid == os.getuid()


@pytest.mark.heavy
def test_a_job_that_fails_says_its_last_lines_and_one_whose_image_is_not_there_fails(real: FakeVertex) -> None:
    job = ended(real, start_script(real, "import sys; print('row 7 is bad'); sys.exit(3)"))
    assert job.state.name == "JOB_STATE_FAILED"
    assert "status of 3" in job.error.message
    assert "row 7 is bad" in job.error.message
    missing = ended(real, create_job(real, image="nowhere/none:1").name)
    assert missing.state.name == "JOB_STATE_FAILED"
    assert "nowhere/none:1" in missing.error.message


@pytest.mark.heavy
def test_a_cancelled_job_gets_sigterm_and_ends_cancelled(real: FakeVertex, tmp_path: Path) -> None:
    script = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path("/gcs/stopped").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("/gcs/started").touch()
time.sleep(600)
"""
    name = start_script(real, script)
    eventually((tmp_path / "buckets" / "started").exists)
    assert states(real, name, 3) == ["PENDING", "RUNNING", "RUNNING"]
    client(real, "Job").cancel_custom_job(name=name)
    assert ended(real, name).state.name == "JOB_STATE_CANCELLED"
    assert (tmp_path / "buckets" / "stopped").exists()
    assert running() == []


@pytest.mark.heavy
def test_a_deployed_model_really_answers_and_ends_when_it_is_undeployed(real: FakeVertex) -> None:
    endpoint = create_endpoint(real)
    serving = {"image_uri": "predict@sha256:2", "health_route": "/health", "predict_route": "/predict"}
    model = upload(real, container_spec={**serving, "command": ["python", "-c"], "args": [SERVER]}).model
    upload(real, parent=model, container_spec={**serving, "command": ["python", "-c", "print('no manifest'); exit(4)"]})
    deployed = deploy(real, endpoint, model, {"0": 100})
    answer = predict(real, endpoint)
    assert list(answer.predictions) == ["gs://b/model", "http://storage", False]
    assert (answer.deployed_model_id, answer.model_version_id) == (deployed, "1")
    with pytest.raises(exceptions.BadRequest, match="instance 0 is bad"):
        client(real, "Prediction").predict(endpoint=endpoint, instances=["bad"])

    with pytest.raises(exceptions.GoogleAPICallError, match=r"exited unexpectedly with 4\. no manifest"):
        deploy(real, endpoint, f"{model}@2", {"0": 10, deployed: 90})
    assert traffic_of(real, endpoint) == {deployed: 100}
    undeploy(real, endpoint, deployed)
    eventually(lambda: running() == [])


@pytest.mark.heavy
def test_what_runs_ends_with_the_double_also_after_an_error(python_image: str, tmp_path: Path) -> None:
    images = {"train@sha256:1": python_image}
    with pytest.raises(ZeroDivisionError), FakeVertex(containers=Containers(tmp_path, images=images)) as vertex:
        start_script(vertex, "import time; time.sleep(600)")
        eventually(running)
        raise ZeroDivisionError
    assert running() == []


@pytest.fixture(scope="module")
def images(docker: str, generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The cloud's image names → the project's own images, built here."""
    project = generate(tmp_path_factory.mktemp("vertex"))
    environment = {**os.environ, "RUN_PYTHON": sys.executable, "PYTHONPATH": str(project / "src")}
    script = [project / "level_1_pipeline" / "build_containers.sh"]
    subprocess.run([*script, "train", "predict"], cwd=project, env=environment, check=True)
    printed = [
        subprocess.run([*script, "--print", name], cwd=project, env=environment, check=True, capture_output=True, text=True)
        for name in ("train", "predict")
    ]
    return dict(zip(["train@sha256:1", "predict@sha256:2"], [done.stdout.strip() for done in printed], strict=True))


@pytest.mark.heavy
def test_the_projects_own_images_train_and_predict(images: dict[str, str], tmp_path: Path) -> None:
    data = tmp_path / "buckets" / "bucket" / "data"
    data.mkdir(parents=True)
    table = find_csv("sample:digits", tmp_path)
    prepare(table, "digit", data / "train.parquet", data / "test.parquet")
    columns, row = [line.split(",") for line in table.read_text(encoding="utf-8").splitlines()[:2]]
    instance = {name: float(value) for name, value in zip(columns, row, strict=True) if name != "digit"}
    values = {"seed": 0, "threads": 1, "epochs": 3, "batch_size": 128, "learning_rate": 0.003}
    job = custom_job()
    container = job.job_spec.worker_pool_specs[0].container_spec
    container.args = ["--train", "gs://bucket/data/train.parquet", "--hyperparameters", json.dumps(values)]

    with contextlib.ExitStack() as stack:
        storage = stack.enter_context(FakeStorage(root=tmp_path / "buckets"))
        containers = Containers(storage.root, images=images, storage_address=storage.address)
        vertex = stack.enter_context(FakeVertex(containers=containers))
        name = client(vertex, "Job").create_custom_job(parent=PLACE, custom_job=job).name
        trained = ended(vertex, name)
        assert trained.state.name == "JOB_STATE_SUCCEEDED", trained.error
        endpoint = create_endpoint(vertex)
        model = upload(vertex, artifact_uri="gs://bucket/run/model").model
        deploy(vertex, endpoint, model, {"0": 100})
        answer = client(vertex, "Prediction").predict(endpoint=endpoint, instances=[instance])
        assert len(answer.predictions) == 1
        assert answer.predictions[0]["label"] in range(10)
        assert storage.calls("objects.get")  # the server fetched its model itself
        with pytest.raises(exceptions.BadRequest, match=columns[0]):
            client(vertex, "Prediction").predict(endpoint=endpoint, instances=[{columns[0]: "x"}])
    assert running() == []
