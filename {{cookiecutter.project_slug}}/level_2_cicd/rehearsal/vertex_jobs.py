"""Fake of Vertex AI's custom jobs and pipeline jobs: each get advances the state of a job."""

import re
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any, ClassVar

from google.cloud.aiplatform_v1 import types

from level_2_cicd.rehearsal.containers import Container
from level_2_cicd.rehearsal.protojson import (
    as_json,
    check_id,
    check_labels,
    now,
    parse,
    parse_query,
    require,
)
from level_2_cicd.rehearsal.server import ApiError, Json, Request, failed_precondition, route
from level_2_cicd.rehearsal.vertex_resources import ONE, Collection

ACTIVE_STATES = ("QUEUED", "PENDING", "RUNNING")
FINAL_STATES = ("SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED", "PARTIALLY_SUCCEEDED")
PIPELINE_JOB_ID = r"[a-z][-a-z0-9]{0,127}"
FOLDER = r"gs://[^/]+(/.*)?"


@dataclass
class Outcome:
    """Outcome of jobs with a matching display name.

    Attributes:
        code: the google.rpc code of the error, such as 8 (RESOURCE_EXHAUSTED).
        through: the states before the final one; () ends a job at once.
        times: number of jobs; None: all.
    """

    name: str = ""
    state: str = "SUCCEEDED"
    code: int = 0
    message: str = ""
    through: tuple[str, ...] = ACTIVE_STATES
    times: int | None = None


@dataclass
class Job:
    """A job's message, its remaining states, and the container that runs it."""

    message: Any
    outcome: Outcome
    coming_states: list[str] = field(default_factory=list)
    container: Container | None = None


class Jobs(Collection):
    """Jobs of one kind: {name: Job}."""

    states: ClassVar[Any]
    prefix: ClassVar[str]

    def __init__(self, vertex: Any) -> None:
        super().__init__(vertex)
        self.outcomes: list[Outcome] = []

    def add(self, message: Any, name: str) -> Job:
        """Add a new job in its first state."""
        message.name = name
        message.create_time = message.update_time = now()
        job = Job(message, self._outcome(message))
        job.coming_states = [*job.outcome.through, job.outcome.state]
        self.by_name[name] = job
        # A job has a state from the start; gets advance it.
        self.enter(job, job.coming_states.pop(0))
        return job

    def _outcome(self, message: Any) -> Outcome:
        for outcome in self.outcomes:
            # Count down, so that a retried job can succeed after some failures.
            if outcome.times != 0 and re.search(outcome.name, message.display_name):
                outcome.times = None if outcome.times is None else outcome.times - 1
                return outcome
        return Outcome(through=self.vertex.job_states)

    def find(self, request: Request) -> Any:
        """Return a job's message."""
        return super().find(request).message

    def in_location(self, request: Request) -> list[Any]:
        """Return the messages of a location's jobs."""
        return [job.message for job in super().in_location(request)]

    def state(self, job: Job) -> str:
        """Return a job's state without the prefix of its kind."""
        return str(job.message.state.name).removeprefix(self.prefix)

    def enter(self, job: Job, state: str) -> None:
        """Set a job's state and the times and error that belong to it."""
        message = job.message
        # The states of both kinds differ in their prefix only.
        message.state = self.states[f"{self.prefix}{state}"]
        message.update_time = now()
        if state == "RUNNING" and not message.start_time:
            message.start_time = now()
        if state in FINAL_STATES:
            message.end_time = now()
        if state == "FAILED":
            message.error.code = job.outcome.code or 3  # INVALID_ARGUMENT, as when a program fails
            message.error.message = job.outcome.message or "injected failure"

    def advance(self, job: Job) -> None:
        """Enter the next state."""
        if job.coming_states:
            self.enter(job, job.coming_states.pop(0))

    def look(self, request: Request) -> None:
        """Advance the job."""
        self.advance(self.by_name[self.find(request).name])

    @route("POST", f"{ONE}:cancel", "cancel")
    def cancel(self, request: Request) -> Json:
        message = request.message = parse(self.request_type("Cancel"), request.body)
        message.name = self.find(request).name
        job = self.by_name[message.name]
        if self.state(job) in FINAL_STATES:
            problem = f"cannot be cancelled: its state is {job.message.state.name}"
            raise failed_precondition(f"The {self.kind.__name__} {message.name} {problem}")
        # Cancelling is asynchronous: the next get returns the job as cancelled.
        job.coming_states = ["CANCELLED"]  # replaces the planned outcome
        self.enter(job, "CANCELLING")
        if job.container is not None:
            job.container.stop()
        return {}


class CustomJobs(Jobs):
    """Custom jobs."""

    plural, kind, prefix, states = "customJobs", types.CustomJob, "JOB_STATE_", types.JobState

    @route("POST", "", "create")
    def create(self, request: Request) -> Json:
        message = request.message = parse(types.CustomJob, request.body)
        parse_query(types.CreateCustomJobRequest, request)  # rejects unknown parameters
        require(message, "display_name", "job_spec")
        check_job_spec(message.job_spec)
        check_labels(message.labels)
        job = self.add(types.CustomJob(message), self.name(request, self.vertex.new_id()))
        # A job with an injected failure needs no container.
        if self.vertex.containers is not None and job.outcome.state == "SUCCEEDED":
            job.container = self.vertex.containers.start_job(job.message)
        return self.view(job.message)

    def advance(self, job: Job) -> None:
        """Enter the next state; with a container, stay in RUNNING until it exits."""
        if job.container is None:
            super().advance(job)
            return
        exit_status = job.container.poll()
        if exit_status is None:
            if self.state(job) in ("QUEUED", "PENDING") and len(job.coming_states) > 1:
                super().advance(job)
        elif self.state(job) not in FINAL_STATES:
            code, last_lines = exit_status
            state = "SUCCEEDED" if code == 0 else "FAILED"
            if self.state(job) == "CANCELLING":
                state = "CANCELLED"
            error = f"The replica workerpool0-0 exited with a non-zero status of {code}."
            # The container's exit replaces the planned outcome.
            job.outcome = Outcome(state=state, code=3, message=f"{error} {last_lines}")
            job.coming_states = []
            self.enter(job, state)


def check_job_spec(spec: Any) -> None:
    """Reject an invalid CustomJobSpec."""
    if not spec.worker_pool_specs:
        raise ApiError(400, "job_spec.worker_pool_specs is required")
    for index, pool in enumerate(spec.worker_pool_specs):
        if problem := worker_pool_problem(index, pool):
            raise ApiError(400, f"job_spec.worker_pool_specs[{index}]{problem}")
    prefix = spec.base_output_directory.output_uri_prefix
    if prefix:
        check_id("job_spec.base_output_directory.output_uri_prefix", prefix, FOLDER)


def worker_pool_problem(index: int, pool: Any) -> str:
    """Return the problem of a worker pool, or an empty string."""
    if "container_spec" not in pool and "python_package_spec" not in pool:
        # Only pools after the first may be empty.
        empty = index > 0 and not pool.replica_count
        return "" if empty else ": container_spec or python_package_spec is required"
    if "container_spec" in pool and not pool.container_spec.image_uri:
        return ".container_spec.image_uri is required"
    if not pool.machine_spec.machine_type:
        return ".machine_spec.machine_type is required"
    if pool.replica_count < 1 or (index == 0 and pool.replica_count > 1):
        return f".replica_count is {pool.replica_count}: 1 for pool 0, at least 1 for others"
    if bool(pool.machine_spec.accelerator_type) != bool(pool.machine_spec.accelerator_count):
        return ".machine_spec: accelerator_type and accelerator_count go together"
    return ""


class PipelineJobs(Jobs):
    """Pipeline jobs. Tasks do not run: `FakeVertex.task_outputs` has their outputs."""

    plural, kind, states = "pipelineJobs", types.PipelineJob, types.PipelineState
    prefix = "PIPELINE_STATE_"

    @route("POST", "", "create")
    def create(self, request: Request) -> Json:
        message = request.message = parse(types.PipelineJob, request.body)
        query = parse_query(types.CreatePipelineJobRequest, request)
        identity = query.pipeline_job_id or f"run-{self.vertex.new_id()}"
        check_id("pipeline_job_id", identity, PIPELINE_JOB_ID)
        check_pipeline_job(message)
        check_labels(message.labels)
        message.name = self.name(request, identity)
        self.check_new(message.name)  # callers rely on this 409 to start a run only once
        return self.view(self.add(types.PipelineJob(message), message.name).message)

    def enter(self, job: Job, state: str) -> None:
        """Set the states of a job and its tasks; in a failed job, the second task fails."""
        super().enter(job, state)
        spec = as_json(job.message).get("pipelineSpec", {})
        names = [
            name
            for name in task_names(spec.get("root", {}), spec.get("components", {}))
            if name not in self.vertex.skipped_tasks
        ]
        states = {
            "RUNNING": ["RUNNING"],
            "SUCCEEDED": ["SUCCEEDED"] * len(names),
            "FAILED": ["SUCCEEDED", "FAILED"],
        }.get(state, [])
        # QUEUED and PENDING jobs have no task details yet; cancelled jobs keep theirs.
        if details := [
            self._task_detail(name, state, job.message)
            for name, state in zip(names, states, strict=False)
        ]:
            job.message.job_detail.task_details = details

    def _task_detail(self, name: str, state: str, job: Any) -> Any:
        detail = types.PipelineTaskDetail(task_name=name, state=state)
        detail.create_time, detail.start_time = job.create_time, job.start_time
        if state != "RUNNING":
            detail.end_time = job.end_time
        if state == "FAILED":
            detail.error = job.error
        if state == "SUCCEEDED":
            for output, metadata in self.vertex.task_outputs.get(name, {}).items():
                artifact = types.Artifact(display_name=output, metadata=metadata)
                artifacts = types.PipelineTaskDetail.ArtifactList(artifacts=[artifact])
                detail.outputs[output] = artifacts
        return detail


def task_names(graph: Json, components: Json) -> list[str]:
    """Return the tasks of a graph and its inner graphs in an order in which they can run."""
    tasks = graph.get("dag", {}).get("tasks", {})
    needs = {name: task.get("dependentTasks", []) for name, task in tasks.items()}
    names: list[str] = []
    for name in TopologicalSorter(needs).static_order():
        component = components.get(tasks[name]["componentRef"]["name"], {})
        names += task_names(component, components) if "dag" in component else [name]
    return names


def check_pipeline_job(message: Any) -> None:
    """Reject a pipeline job whose parameters do not match its pipeline."""
    if not message.pipeline_spec and not message.template_uri:
        raise ApiError(400, "pipeline_spec or template_uri is required")
    config = message.runtime_config
    check_id("runtime_config.gcs_output_directory", config.gcs_output_directory, FOLDER)
    # With a template URI only, the parameters are unknown here.
    if not message.pipeline_spec:
        return
    root = as_json(message)["pipelineSpec"].get("root", {})
    known = root.get("inputDefinitions", {}).get("parameters", {})
    values = set(config.parameter_values)
    if unknown := ", ".join(sorted(values - set(known))):
        raise ApiError(400, f"parameter_values: the pipeline has no parameter {unknown}")
    # A parameter with a default value or isOptional may be left out.
    optional = {name for name in known if {"defaultValue", "isOptional"} & set(known[name])}
    if missing := ", ".join(sorted(set(known) - optional - values)):
        raise ApiError(400, f"runtime_config.parameter_values: {missing} is required")
