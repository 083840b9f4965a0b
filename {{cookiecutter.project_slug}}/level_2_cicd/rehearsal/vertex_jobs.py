"""Custom jobs and pipeline jobs of Vertex AI: they are kept, their states advance, they may fail or be cancelled."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from google.cloud.aiplatform_v1 import types

from rehearsal.containers import Container
from rehearsal.protojson import (
    PLACE,
    answer,
    check_labels,
    field_of,
    need,
    now,
    page,
    place_of,
    read,
    read_query,
    written,
)
from rehearsal.server import ApiError, Handler, Request, Response

GOING = ("QUEUED", "PENDING", "RUNNING")
ENDED = ("SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED", "PARTIALLY_SUCCEEDED")
PIPELINE_JOB_ID = r"[a-z][-a-z0-9]{0,127}"
FOLDER = r"gs://[^/]+(/.*)?"


@dataclass
class Outcome:
    """How jobs whose display name fits end; see Vertex.outcome."""

    name: str = ""
    state: str = "SUCCEEDED"
    code: int = 0
    message: str = ""
    through: tuple[str, ...] = GOING
    times: int | None = None


@dataclass
class Job:
    """A job: its message, and the states before it."""

    message: Any
    outcome: Outcome
    ahead: list[str] = field(default_factory=list)
    running: Container | None = None  # what really runs it


class Jobs(ABC):
    """What both kinds of jobs have in common."""

    plural: str
    kind: Any
    prefix: str
    states: Any
    asks: tuple[Any, Any, Any, Any]  # the messages of get, list, cancel and delete
    fields: tuple[str, ...] = ()  # what else a filter may name

    def __init__(self, vertex: Any) -> None:
        self.vertex = vertex
        self.jobs: dict[str, Job] = {}
        self.outcomes: list[Outcome] = []

    def routes(self) -> list[tuple[str, str, str, Handler]]:
        """Paths and their handlers."""
        one = rf"{PLACE}/{self.plural}/(?P<id>[^/:]+)"
        return [
            ("POST", f"{PLACE}/{self.plural}", f"{self.plural}.create", self.create),
            ("GET", f"{PLACE}/{self.plural}", f"{self.plural}.list", self.search),
            ("GET", one, f"{self.plural}.get", self.get),
            ("POST", f"{one}:cancel", f"{self.plural}.cancel", self.cancel),
            ("DELETE", one, f"{self.plural}.delete", self.delete),
        ]

    @abstractmethod
    def create(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Take in a job that the API would take."""

    def keep(self, message: Any, found: re.Match[str], identity: str) -> Job:
        """Take a new job in; `message` gets its name, times and first state."""
        message.name = f"{place_of(found)}/{self.plural}/{identity}"
        message.create_time = message.update_time = now()
        job = Job(message, self.outcome_of(message))
        job.ahead = [*job.outcome.through, job.outcome.state]
        self.jobs[message.name] = job
        self.enter(job, job.ahead.pop(0))
        return job

    def outcome_of(self, message: Any) -> Outcome:
        """How this job will end: by the first rule that fits."""
        for outcome in self.outcomes:
            if outcome.times != 0 and re.search(outcome.name, message.display_name):
                outcome.times = None if outcome.times is None else outcome.times - 1
                return outcome
        return Outcome(through=self.vertex.job_states)

    def find(self, found: re.Match[str]) -> Job:
        """The job of a path."""
        name = f"{place_of(found)}/{self.plural}/{found['id']}"
        if name not in self.jobs:
            raise ApiError(404, f"The {self.kind.__name__} does not exist: {name}")
        return self.jobs[name]

    def state(self, job: Job) -> str:
        """A job's state, without the prefix of its kind."""
        name: str = job.message.state.name
        return name.removeprefix(self.prefix)

    def enter(self, job: Job, state: str) -> None:
        """Let a job be in a state."""
        message = job.message
        message.state = self.states[f"{self.prefix}{state}"]
        message.update_time = now()
        if state == "RUNNING" and not message.start_time:
            message.start_time = now()
        if state in ENDED:
            message.end_time = now()
            if state == "FAILED":
                message.error.code = job.outcome.code or 3
                message.error.message = job.outcome.message or "told to fail"

    def advance(self, job: Job) -> None:
        """Let a job be in its next state."""
        if job.ahead:
            self.enter(job, job.ahead.pop(0))

    def get(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Answer with the job's next state."""
        job = self.find(found)
        self.advance(job)
        return read_query(self.asks[0], request, name=job.message.name), answer(job.message)

    def search(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Answer with those that fit; no state changes."""
        asked = read_query(self.asks[1], request, parent=found["parent"])
        here = [job.message for name, job in self.jobs.items() if name.startswith(f"{place_of(found)}/")]
        return asked, page(here, asked, self.plural, lambda message, name: field_of(message, name, "state", *self.fields))

    def cancel(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Begin to cancel."""
        asked = read(self.asks[2], request.body)
        job = self.find(found)
        asked.name = job.message.name
        if self.state(job) in ENDED:
            text = f"The {self.kind.__name__} {job.message.name} cannot be cancelled: its state is {job.message.state.name}"
            raise ApiError(400, text, name="FAILED_PRECONDITION")
        job.ahead = ["CANCELLED"]
        self.enter(job, "CANCELLING")
        if job.running is not None:
            job.running.stop()
        return asked, Response()

    def delete(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Forget a job that has ended."""
        job = self.find(found)
        asked = read_query(self.asks[3], request, name=job.message.name)
        if self.state(job) not in ENDED:
            text = f"The {self.kind.__name__} {job.message.name} cannot be deleted: its state is {job.message.state.name}"
            raise ApiError(400, text, name="FAILED_PRECONDITION")

        def apply() -> None:
            self.jobs.pop(job.message.name, None)

        return asked, self.vertex.operate(job.message.name, "DeleteOperationMetadata", apply)


class CustomJobs(Jobs):
    """Custom jobs."""

    plural, kind, prefix, states = "customJobs", types.CustomJob, "JOB_STATE_", types.JobState
    asks = (types.GetCustomJobRequest, types.ListCustomJobsRequest, types.CancelCustomJobRequest, types.DeleteCustomJobRequest)

    def create(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Check a job as the API does, and begin it."""
        message = read(types.CustomJob, request.body)
        read_query(types.CreateCustomJobRequest, request)
        need(message, "display_name", "job_spec")
        check_job_spec(message.job_spec)
        check_labels(message.labels)
        job = self.keep(types.CustomJob(message), found, self.vertex.new_id())
        if self.vertex.containers is not None and job.outcome.state == "SUCCEEDED":
            job.running = self.vertex.containers.start_job(job.message)
        return message, answer(job.message)

    def advance(self, job: Job) -> None:
        """Its next state; a job that really runs is RUNNING until its container has ended."""
        if job.running is None:
            super().advance(job)
            return
        ended = job.running.poll()
        if ended is None:
            if self.state(job) in GOING[:2] and len(job.ahead) > 1:
                super().advance(job)
            return
        if self.state(job) in ENDED:
            return
        code, said = ended
        state = "CANCELLED" if self.state(job) == "CANCELLING" else "SUCCEEDED" if code == 0 else "FAILED"
        job.ahead = []
        text = f"The replica workerpool0-0 exited with a non-zero status of {code}. {said}"
        job.outcome = Outcome(state=state, code=3, message=text)
        self.enter(job, state)


def check_job_spec(spec: Any) -> None:
    """Refuse a CustomJobSpec that lacks what the API requires, or says more than the API takes."""
    if not spec.worker_pool_specs:
        raise ApiError(400, "job_spec.worker_pool_specs is required")
    for index, pool in enumerate(spec.worker_pool_specs):
        here = f"job_spec.worker_pool_specs[{index}]"
        if "container_spec" not in pool and "python_package_spec" not in pool:
            if index == 0 or pool.replica_count:
                raise ApiError(400, f"{here}: container_spec or python_package_spec is required")
            continue
        if "container_spec" in pool and not pool.container_spec.image_uri:
            raise ApiError(400, f"{here}.container_spec.image_uri is required")
        if not pool.machine_spec.machine_type:
            raise ApiError(400, f"{here}.machine_spec.machine_type is required")
        if pool.replica_count < 1 or (index == 0 and pool.replica_count > 1):
            raise ApiError(400, f"{here}.replica_count is {pool.replica_count}: 1 for pool 0, at least 1 for others")
        if bool(pool.machine_spec.accelerator_type) != bool(pool.machine_spec.accelerator_count):
            raise ApiError(400, f"{here}.machine_spec: accelerator_type and accelerator_count go together")
    prefix = spec.base_output_directory.output_uri_prefix
    if prefix and not re.fullmatch(FOLDER, prefix):
        raise ApiError(400, f"job_spec.base_output_directory.output_uri_prefix is {prefix!r}: gs://BUCKET/FOLDER")


class PipelineJobs(Jobs):
    """Pipeline jobs."""

    plural, kind, prefix, states = "pipelineJobs", types.PipelineJob, "PIPELINE_STATE_", types.PipelineState
    asks = (
        types.GetPipelineJobRequest,
        types.ListPipelineJobsRequest,
        types.CancelPipelineJobRequest,
        types.DeletePipelineJobRequest,
    )
    fields = ("template_uri", "service_account")

    def create(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Check a run as the API does, and begin it; an id that is taken is refused."""
        message = read(types.PipelineJob, request.body)
        identity = read_query(types.CreatePipelineJobRequest, request).pipeline_job_id or f"run-{self.vertex.new_id()}"
        if not re.fullmatch(PIPELINE_JOB_ID, identity):
            raise ApiError(400, f"pipeline_job_id is {identity!r}: it must match {PIPELINE_JOB_ID}")
        check_run(message)
        check_labels(message.labels)
        message.name = f"{place_of(found)}/pipelineJobs/{identity}"
        if message.name in self.jobs:
            raise ApiError(409, f"The PipelineJob {message.name} already exists")
        job = self.keep(types.PipelineJob(message), found, identity)
        return message, answer(job.message)

    def enter(self, job: Job, state: str) -> None:
        """A run's tasks follow its state: the first runs with it; at the end all are done, or the second has failed."""
        super().enter(job, state)
        names = [name for name in tasks(job.message) if name not in self.vertex.skipped_tasks]
        ends = {"RUNNING": ["RUNNING"], "SUCCEEDED": ["SUCCEEDED"] * len(names), "FAILED": ["SUCCEEDED", "FAILED"]}
        details = [self.detail(name, end, job.message) for name, end in zip(names, ends.get(state, []), strict=False)]
        if details:
            job.message.job_detail.task_details = details

    def detail(self, name: str, state: str, run: Any) -> Any:
        """What is told of a task; `Vertex.task_outputs` says what it wrote about its outputs."""
        detail = types.PipelineTaskDetail(task_name=name, state=state, create_time=run.create_time, start_time=run.start_time)
        if state != "RUNNING":
            detail.end_time = run.end_time
        if state == "FAILED":
            detail.error = run.error
        if state == "SUCCEEDED":
            for output, metadata in self.vertex.task_outputs.get(name, {}).items():
                artifact = types.Artifact(display_name=output, metadata=metadata)
                detail.outputs[output] = types.PipelineTaskDetail.ArtifactList(artifacts=[artifact])
        return detail


def tasks(run: Any) -> list[str]:
    """The names of a run's tasks in an order in which they can run; those within a condition in its place."""
    spec = written(run).get("pipelineSpec", {})
    return ordered(spec.get("root", {}), spec.get("components", {}))


def ordered(graph: Any, components: Any) -> list[str]:
    """The names of a graph's tasks, each after those that it needs."""
    names: list[str] = []
    waiting = dict(graph.get("dag", {}).get("tasks", {}))
    while waiting:
        ready = [name for name, task in waiting.items() if not set(task.get("dependentTasks", [])) & set(waiting)]
        for name in ready or list(waiting):
            inner = components.get(waiting.pop(name)["componentRef"]["name"], {})
            names += ordered(inner, components) if "dag" in inner else [name]
    return names


def check_run(message: Any) -> None:
    """Refuse a PipelineJob whose parameters are not those of its pipeline."""
    if not message.pipeline_spec and not message.template_uri:
        raise ApiError(400, "pipeline_spec or template_uri is required")
    folder = message.runtime_config.gcs_output_directory
    if not re.fullmatch(FOLDER, folder):
        raise ApiError(400, f"runtime_config.gcs_output_directory is {folder!r}: gs://BUCKET/FOLDER")
    if not message.pipeline_spec:
        return
    spec = written(message)["pipelineSpec"]
    known = spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    given = message.runtime_config.parameter_values
    if unknown := sorted(set(given) - set(known)):
        raise ApiError(400, f"runtime_config.parameter_values: the pipeline has no parameter {', '.join(unknown)}")
    needed = [name for name, rule in known.items() if "defaultValue" not in rule and not rule.get("isOptional")]
    if missing := set(needed) - set(given):
        raise ApiError(400, f"runtime_config.parameter_values: {', '.join(sorted(missing))} is required")
