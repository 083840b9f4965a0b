"""Calls of the fake of Vertex AI through Google's own client, for its tests."""

import json
import urllib.error
import urllib.request
from typing import Any

from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform_v1 as api
from google.protobuf import json_format
from level_2_cicd.rehearsal.vertex import FakeVertex

PLACE = "projects/digits/locations/europe-west4"
POOL: dict[str, Any] = {
    "machineSpec": {
        "machineType": "g2-standard-8",
        "acceleratorType": "NVIDIA_L4",
        "acceleratorCount": 1,
    },
    "replicaCount": "1",
    "diskSpec": {"bootDiskType": "pd-ssd", "bootDiskSizeGb": 200},
    "containerSpec": {
        "imageUri": "train@sha256:1",
        "command": ["python", "-m", "trainer.train"],
        "args": ["--x", "{}"],
    },
}
SPEC: dict[str, Any] = {
    "workerPoolSpecs": [POOL],
    "scheduling": {"strategy": "SPOT", "timeout": "3600s"},
    "serviceAccount": "trainer@digits.iam.gserviceaccount.com",
    "baseOutputDirectory": {"outputUriPrefix": "gs://bucket/run"},
}
SERVING = {
    "image_uri": "predict@sha256:2",
    "health_route": "/health",
    "predict_route": "/predict",
}
RESOURCES = {
    "machine_spec": {"machine_type": "n2-standard-2"},
    "min_replica_count": 1,
    "max_replica_count": 3,
}


def client(vertex: FakeVertex, kind: str) -> Any:
    """Google's client, as the project creates it."""
    return getattr(api, f"{kind}ServiceClient")(
        client_options={"api_endpoint": vertex.address},
        transport="rest",
        credentials=AnonymousCredentials(),
    )


def custom_job(name: str = "train", image: str = "", **fields: Any) -> api.CustomJob:
    job = api.CustomJob(display_name=name, **fields)
    json_format.ParseDict(SPEC, api.CustomJobSpec.pb(job.job_spec))
    if image:
        job.job_spec.worker_pool_specs[0].container_spec.image_uri = image
    return job


def create_job(vertex: FakeVertex, name: str = "train", **fields: Any) -> api.CustomJob:
    job = custom_job(name, **fields)
    return client(vertex, "Job").create_custom_job(parent=PLACE, custom_job=job)


def states(vertex: FakeVertex, name: str, looks: int = 4) -> list[str]:
    jobs = [client(vertex, "Job").get_custom_job(name=name) for _ in range(looks)]
    return [job.state.name.removeprefix("JOB_STATE_") for job in jobs]


def pipeline_job(**parameters: Any) -> dict[str, Any]:
    """A job of a pipeline with one required parameter and one with a default."""
    inputs = {
        "epochs": {"parameterType": "NUMBER_INTEGER"},
        "seed": {"parameterType": "NUMBER_INTEGER", "defaultValue": 0},
    }
    return {
        "display_name": "run",
        "pipeline_spec": {"root": {"inputDefinitions": {"parameters": inputs}}},
        "runtime_config": {
            "gcs_output_directory": "gs://bucket/runs",
            "parameter_values": parameters,
        },
    }


def submit(
    vertex: FakeVertex, identity: str = "", job: dict[str, Any] | None = None
) -> api.PipelineJob:
    job = job or pipeline_job(epochs=3)
    request = {"parent": PLACE, "pipeline_job_id": identity, "pipeline_job": job}
    return client(vertex, "Pipeline").create_pipeline_job(request=request)


def upload(
    vertex: FakeVertex, *aliases: str, parent: str = "", **fields: Any
) -> api.UploadModelResponse:
    model = {
        "display_name": "digits",
        "container_spec": SERVING,
        "artifact_uri": "gs://b/model",
        "version_aliases": aliases,
        **fields,
    }
    request = {"parent": PLACE, "parent_model": parent, "model": model}
    return client(vertex, "Model").upload_model(request=request).result()


def create_endpoint(vertex: FakeVertex, name: str = "digits") -> str:
    endpoints = client(vertex, "Endpoint")
    endpoint = endpoints.create_endpoint(parent=PLACE, endpoint={"display_name": name}).result()
    return str(endpoint.name)


def deploy(
    vertex: FakeVertex,
    endpoint: str,
    model: str,
    traffic: dict[str, int] | None = None,
    **fields: Any,
) -> str:
    deployed = {"model": model, "dedicated_resources": RESOURCES, **fields}
    request = {"endpoint": endpoint, "deployed_model": deployed, "traffic_split": traffic or {}}
    response = client(vertex, "Endpoint").deploy_model(request=request).result()
    return str(response.deployed_model.id)


def undeploy(vertex: FakeVertex, endpoint: str, identity: str) -> None:
    request = {"endpoint": endpoint, "deployed_model_id": identity}
    client(vertex, "Endpoint").undeploy_model(request=request).result()


def set_traffic(
    vertex: FakeVertex, endpoint: str, traffic: dict[str, int], etag: str = ""
) -> api.Endpoint:
    message = {"name": endpoint, "traffic_split": traffic, "etag": etag}
    endpoints = client(vertex, "Endpoint")
    return endpoints.update_endpoint(endpoint=message, update_mask="trafficSplit")


def traffic_of(vertex: FakeVertex, endpoint: str) -> dict[str, int]:
    return dict(client(vertex, "Endpoint").get_endpoint(name=endpoint).traffic_split)


def predict(vertex: FakeVertex, endpoint: str, instance: Any = None) -> api.PredictResponse:
    instances = [instance or {"x": 1.0}]
    return client(vertex, "Prediction").predict(endpoint=endpoint, instances=instances)


def send(method: str, uri: str, body: Any) -> tuple[int, Any]:
    """Send a plain HTTP request; return status and JSON."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(uri, json.dumps(body).encode(), headers, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
