"""Runs of a published pipeline on Vertex AI: check and submit, follow, cancel.

The run's id is made of the event and the pipeline's name: Vertex AI itself refuses a second run of
the same event, also when the event comes late and another version is published meanwhile.
The request contains the compiled pipeline and not only its address: what was checked is what runs.
Google's packages are imported when the first call is made, after all checks.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from core.errors import UserError
from core.run_record import Step, show
from core.signals import stoppable
from gcp import pipeline_template

MAX_NAME = 90  # of the 128 characters of an id
ENDED = {"SUCCEEDED", "FAILED", "CANCELLED"}
# Vertex AI's task states as step states.
STEP_STATES = {
    "RUNNING": "running",
    "CANCEL_PENDING": "running",
    "CANCELLING": "running",
    "SUCCEEDED": "succeeded",
    "SKIPPED": "succeeded",  # its result was taken from the cache
    "FAILED": "failed",
    "CANCELLED": "failed",
}


@dataclass(frozen=True)
class Target:
    """Where a run executes, and as which service account.

    Attributes:
        root: gs:// folder below which the steps write.
        service_account, key, network_attachment: empty for Google's defaults.
    """

    project: str
    region: str
    root: str
    service_account: str = ""
    key: str = ""
    network_attachment: str = ""


def target_of(environment: Any) -> Target:
    """Target of a `gcp.environment.Environment`."""
    return Target(
        project=environment.project,
        region=environment.region,
        root=environment.pipeline_root,
        service_account=environment.account("pipeline"),
        key=environment.key,
        network_attachment=environment.network_attachment,
    )


@dataclass(frozen=True)
class RunRequest:
    """A run to start.

    Attributes:
        spec: the compiled pipeline; template: where it came from.
        parameters: all of the pipeline's, except `run`, which defaults to the run's id.
        event: what happened; the same event gives the same id.
        attempt: 2 and more for a deliberate rerun of the same event.
        name: the display name; empty for the id.
        cache: whether steps may reuse earlier results.
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
        event = hashlib.sha256(self.event.encode()).hexdigest()[:16]
        attempt = f"-a{self.attempt}" if self.attempt > 1 else ""
        return f"{name[:MAX_NAME]}-{event}{attempt}"


@dataclass(frozen=True)
class SubmittedRun:
    """A run on Vertex AI.

    Attributes:
        name: its resource name.
        new: whether this call started it.
        same: whether its template and parameters are the requested ones.
    """

    name: str
    new: bool
    same: bool = True

    @property
    def link(self) -> str:
        """The run's page in the console."""
        _, project, _, region, _, identity = self.name.split("/")
        runs = f"https://console.cloud.google.com/vertex-ai/locations/{region}/pipelines/runs"
        return f"{runs}/{identity}?project={project}"


def request(run: RunRequest, target: Target) -> dict[str, Any]:
    """Check a run and make its request: parent, pipelineJobId, pipelineJob as in the REST API."""
    from gcp import client as api

    values = dict(run.parameters)
    if "run" in pipeline_template.signature(run.spec):
        values.setdefault("run", run.identity)
    pipeline_template.check_parameters(run.spec, values)
    # The hash shows later whether a run of the same event has other contents.
    content = json.dumps([run.spec, values], sort_keys=True).encode()
    labels = {"event": run.event, "content": hashlib.sha256(content).hexdigest()[:16]}
    job: dict[str, Any] = {
        "displayName": (run.name or run.identity)[:128],
        "pipelineSpec": _with_caching(run.spec, run.cache),
        "runtimeConfig": {"gcsOutputDirectory": target.root, "parameterValues": values},
        "labels": api.labels({**run.labels, **labels}),
    }
    if target.service_account:
        job["serviceAccount"] = target.service_account
    if target.key:
        job["encryptionSpec"] = {"kmsKeyName": target.key}
    if target.network_attachment:
        job["pscInterfaceConfig"] = {"networkAttachment": target.network_attachment}
    if run.template.startswith("https://"):
        job["templateUri"] = run.template
    parent = f"projects/{target.project}/locations/{target.region}"
    return {"parent": parent, "pipelineJobId": run.identity, "pipelineJob": job}


def _with_caching(spec: Mapping[str, Any], cache: bool) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(spec))
    for task in pipeline_template.tasks(copy):
        task["cachingOptions"] = {"enableCache": cache}
    return copy


def submit(job: Mapping[str, Any], timeout: float | None = None) -> SubmittedRun:
    """Start a run, or return the one that the same event has started. Idempotent.

    Args:
        job: what `request` returned.
        timeout: seconds for each call with its retries; see api.call.
    """
    from google.cloud.aiplatform_v1 import types
    from google.protobuf import json_format

    from gcp import client as api

    message = types.CreatePipelineJobRequest(
        parent=job["parent"], pipeline_job_id=job["pipelineJobId"]
    )
    json_format.ParseDict(
        job["pipelineJob"], types.CreatePipelineJobRequest.pb(message).pipeline_job
    )
    client = api.client("PipelineService", job["parent"].split("/")[3])
    name = f"{job['parent']}/pipelineJobs/{job['pipelineJobId']}"
    try:
        api.call(client.create_pipeline_job, message, "starting the run", timeout=timeout)
    except api.ApiError as error:
        if error.code != 409:
            raise
    else:
        return SubmittedRun(name, new=True)
    current = _get(name, timeout)
    content = job["pipelineJob"]["labels"]["content"]
    return SubmittedRun(name, new=False, same=current.labels.get("content") == content)


def _get(name: str, timeout: float | None = None) -> Any:
    from gcp import client as api

    client = api.client("PipelineService", name.split("/")[3])
    return api.call(
        client.get_pipeline_job, {"name": name}, "reading the run's state", timeout=timeout
    )


@dataclass
class RunStatus:
    """The state of a run.

    Attributes:
        state: PENDING, RUNNING, SUCCEEDED, FAILED, CANCELLED …
        steps: those that have started, in order.
        facts: metadata of the steps' outputs: (step, output) → metadata.
    """

    state: str
    event: str
    began: str
    problem: str
    steps: list[Step] = field(default_factory=list)
    facts: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)


def look(name: str, timeout: float | None = None) -> RunStatus:
    """Read the status of a run by its resource name."""
    return _status(_get(name, timeout))


def _status(job: Any) -> RunStatus:
    from google.protobuf import json_format

    document = json_format.MessageToDict(type(job).pb(job))
    names = pipeline_template.steps(document.get("pipelineSpec") or {"root": {}, "components": {}})
    # A retried step has an entry for each try: the last one counts.
    details = {it.task_name: it for it in job.job_detail.task_details if it.task_name in names}
    tasks = sorted(details.values(), key=lambda task: str(task.create_time or task.start_time))
    errors = [
        f"step '{task.task_name}': {task.error.message}" for task in tasks if task.error.message
    ]
    status = RunStatus(
        state=job.state.name.removeprefix("PIPELINE_STATE_"),
        event=job.labels.get("event", ""),
        began=job.create_time.isoformat(timespec="seconds"),
        problem=errors[0] if errors else str(job.error.message),
    )
    for task in tasks:
        if task.state.name in STEP_STATES:
            status.steps.append(Step(task.task_name, STEP_STATES[task.state.name], _seconds(task)))
        for output, artifacts in task.outputs.items():
            for artifact in artifacts.artifacts:
                facts = json_format.MessageToDict(type(artifact).pb(artifact)).get("metadata", {})
                status.facts[task.task_name, output] = {
                    key: _as_integer(value) for key, value in facts.items()
                }
    return status


def _seconds(task: Any) -> float:
    if not task.start_time or not task.end_time:
        return 0.0
    return round(float((task.end_time - task.start_time).total_seconds()), 1)


def _as_integer(value: Any) -> Any:
    # Metadata travels as JSON, where every number is a double.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def follow(
    name: str,
    poll: float,
    report: Callable[[Step], None] = show,
    on_poll: Callable[[RunStatus], None] = lambda _: None,
) -> RunStatus:
    """Wait for a run's end; report each step when it starts and ends.

    Args:
        poll: seconds between two requests.
        on_poll: called after each request.
    """
    from gcp import client as api

    states: dict[str, str] = {}
    while True:
        status = look(name, api.WATCH)
        for step in status.steps:
            if states.get(step.name) != step.state:
                states[step.name] = step.state
                report(step)
        on_poll(status)
        if status.state in ENDED:
            return status
        time.sleep(poll)


def start_and_follow(start: Callable[[], Any], name: str, poll: float, cancel: bool) -> None:
    """Start a run and end as it ends.

    On SIGTERM or Ctrl-C the run goes on, or is cancelled with `cancel`.
    """
    started = False
    with stoppable() as stop:
        try:
            # A signal waits meanwhile: else it would leave a run that is not reported.
            with stop.held():
                start()
                started = True
            status = follow(name, poll, on_poll=lambda _: stop.check())
        except SystemExit:
            stop.holding = True  # it is ending already
            if cancel:
                message = "the run is cancelled" if cancel_run(name) else "no run is active"
            else:
                message = "the run goes on" if started else "no run was seen to start"
            print(f"stopped; {message}", flush=True)
            raise
    require_success(status)
    print("succeeded", flush=True)


def cancel_run(name: str) -> bool:
    """Cancel a run; False if it has already ended or does not exist."""
    from gcp import client as api

    client = api.client("PipelineService", name.split("/")[3])
    return api.cancel(client.cancel_pipeline_job, name, "cancelling the run")


def require_success(status: RunStatus) -> None:
    """Fail with the run's error unless it succeeded."""
    if status.state != "SUCCEEDED":
        problem = f": {status.problem}" if status.problem else "."
        raise UserError(f"the run {status.state.lower()}{problem}")
