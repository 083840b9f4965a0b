"""Starts a run of a published pipeline on Vertex AI: parameters checked before anything is sent, one run for one event.

python -m level_2_cicd.kfp_run_container.main --template gs://…/pipeline.json --parameters gs://…/parameters.json --event EVENT \\
    --project PROJECT --region REGION --pipeline-root gs://…           kfp_run_container runs it

The run's id is made of the event and the pipeline's name, so Vertex AI itself refuses a second run of the same event: that is
success here too, also when the event comes late, and the pipeline has been published anew meanwhile.
The request holds the pipeline itself and not only its address: what was checked is what runs, caching can be switched for
each run, and a template in a bucket is as good as one in a registry. Only the standard library is imported until all is
checked.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gcp import pipeline_template

LONGEST_NAME = 90  # of the 128 characters of an id


@dataclass(frozen=True)
class Target:
    """Where a run takes place, and as whom.

    Attributes:
        root: the gs:// folder below which its steps write.
        service_account, key: empty for Google's own.
        network_attachment: where the steps reach into a network of your own; empty: they do not.
    """

    project: str
    region: str
    root: str
    service_account: str = ""
    key: str = ""
    network_attachment: str = ""


def target_of(place: Any) -> Target:
    """Where an environment's runs take place: of a `gcp.environment.Place`, whose module is not in every image."""
    account = place.account("pipeline")
    return Target(
        place.project,
        place.region,
        place.pipeline_root,
        account,
        place.key,
        place.network_attachment,
    )


@dataclass(frozen=True)
class Submission:
    """A run to start.

    Attributes:
        spec: the compiled pipeline; template: where it came from.
        parameters: values for all that it asks for, but `run`: that is the run's id where nobody gives another.
        event: what happened; the same event gives the same id.
        attempt: 2 and more for a deliberate rerun of the same event.
        name: what the run is called where people look; its id if empty.
        cache: whether a step with inputs that were seen before may be left out.
    """

    spec: dict[str, Any]
    parameters: Mapping[str, Any]
    event: str
    template: str = ""
    attempt: int = 1
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    cache: bool = False

    @property
    def identity(self) -> str:
        """The run's id: ^[a-z][-a-z0-9]{0,127}$."""
        name = re.sub(r"[^a-z0-9]+", "-", self.spec["pipelineInfo"]["name"].lower()).strip("-")
        name = name if name[:1].isalpha() else f"run-{name}"
        attempt = f"-a{self.attempt}" if self.attempt > 1 else ""
        return (
            f"{name[:LONGEST_NAME]}-{hashlib.sha256(self.event.encode()).hexdigest()[:16]}{attempt}"
        )


@dataclass(frozen=True)
class Started:
    """A run in the cloud.

    Attributes:
        name: its resource name.
        new: whether this call started it.
        same: whether it has the template and the parameters that were asked for.
    """

    name: str
    new: bool
    same: bool = True

    @property
    def link(self) -> str:
        """The run's page."""
        _, project, _, region, _, identity = self.name.split("/")
        return f"https://console.cloud.google.com/vertex-ai/locations/{region}/pipelines/runs/{identity}?project={project}"


def request(asked: Submission, target: Target) -> dict[str, Any]:
    """What is sent, as JSON of Google's REST interface: parent, pipelineJobId, pipelineJob.

    Raises:
        UserError: the parameters do not fit the template; names each.
    """
    values = dict(asked.parameters)
    if "run" in pipeline_template.signature(asked.spec):
        values.setdefault("run", asked.identity)
    pipeline_template.check_parameters(asked.spec, values)
    job: dict[str, Any] = {
        "displayName": (asked.name or asked.identity)[:128],
        "pipelineSpec": with_caching(asked.spec, asked.cache),
        "runtimeConfig": {"gcsOutputDirectory": target.root, "parameterValues": values},
        "labels": labels(asked, values),
    }
    if target.service_account:
        job["serviceAccount"] = target.service_account
    if target.key:
        job["encryptionSpec"] = {"kmsKeyName": target.key}
    if target.network_attachment:
        job["pscInterfaceConfig"] = {"networkAttachment": target.network_attachment}
    if asked.template.startswith("https://"):
        job["templateUri"] = asked.template
    parent = f"projects/{target.project}/locations/{target.region}"
    return {"parent": parent, "pipelineJobId": asked.identity, "pipelineJob": job}


def with_caching(spec: Mapping[str, Any], cache: bool) -> dict[str, Any]:
    """The pipeline with caching switched on or off for every task."""
    changed: dict[str, Any] = json.loads(json.dumps(spec))
    for task in pipeline_template.tasks(changed):
        task["cachingOptions"] = {"enableCache": cache}
    return changed


def labels(asked: Submission, values: Mapping[str, Any]) -> dict[str, str]:
    """The labels that were given, the event, and a hash of what the run was told, to know another one by."""
    from gcp import client as api

    told = json.dumps([asked.spec, values], sort_keys=True).encode()
    return api.labels(
        {**asked.labels, "event": asked.event, "content": hashlib.sha256(told).hexdigest()[:16]}
    )


def submit(sent: Mapping[str, Any], timeout: float | None = None) -> Started:
    """Start the run, or find that it was started already.

    It may be repeated as often as need be: Vertex AI knows a run by its id.

    Args:
        timeout: seconds for each call with its repetitions; otherwise api.RETRY_TIMEOUT.

    Raises:
        ApiError: it was refused, or not answered.
        UserError: there are no credentials.
    """
    from google.cloud.aiplatform_v1 import types
    from google.protobuf import json_format

    from gcp import client as api

    message = types.CreatePipelineJobRequest(
        parent=sent["parent"], pipeline_job_id=sent["pipelineJobId"]
    )
    json_format.ParseDict(
        sent["pipelineJob"], types.CreatePipelineJobRequest.pb(message).pipeline_job
    )
    client = api.client("PipelineService", sent["parent"].split("/")[3])
    name = f"{sent['parent']}/pipelineJobs/{sent['pipelineJobId']}"
    try:
        api.call(client.create_pipeline_job, message, "starting the run", timeout=timeout)
    except api.ApiError as error:
        if error.code != 409:
            raise
    else:
        return Started(name, new=True)
    there = api.call(client.get_pipeline_job, {"name": name}, "looking at the run", timeout=timeout)
    return Started(
        name,
        new=False,
        same=there.labels.get("content") == sent["pipelineJob"]["labels"]["content"],
    )


# ── command line ────────────────────────────────────────────────────────────────────────────────────────────────────
