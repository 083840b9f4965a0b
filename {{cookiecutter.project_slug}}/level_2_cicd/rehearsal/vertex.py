"""Fake of Vertex AI: jobs, pipeline jobs, models with versions and aliases, endpoints.

    with FakeVertex() as vertex:
        os.environ["CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM"] = vertex.address
        …
        vertex.calls("customJobs.create")  # the jobs that were created

Manually: python -m rehearsal
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from level_2_cicd.rehearsal.containers import Containers
from level_2_cicd.rehearsal.protojson import LOCATION, as_json, canonical, now, paginate
from level_2_cicd.rehearsal.server import ApiError, FakeServer, Json, Request, Response, route
from level_2_cicd.rehearsal.transport import timestamp
from level_2_cicd.rehearsal.vertex_endpoints import Endpoints
from level_2_cicd.rehearsal.vertex_jobs import ACTIVE_STATES, CustomJobs, Outcome, PipelineJobs
from level_2_cicd.rehearsal.vertex_models import Models

TYPES = "type.googleapis.com/google.cloud.aiplatform.v1."
EMPTY = "type.googleapis.com/google.protobuf.Empty"
OPERATION = rf"{LOCATION}/(?:\w+/[^/:]+/)?operations/{{id}}"


@dataclass
class Operation:
    """A long-running operation: `apply` runs after `polls` polls, once `server` is ready.

    `key` identifies the resource to create, so that two operations do not create the same one.
    """

    name: str
    verb: str
    apply: Callable[[], Any]
    polls: int
    server: Any = None
    key: Any = None
    create_time: Any = field(default_factory=now)
    result: Json | None = None

    def poll(self) -> None:
        """Apply the operation if it is due."""
        if self.result is not None:
            return
        # Each poll is a unit of time: tests need no clock.
        if self.polls > 0:
            self.polls -= 1
            return
        try:
            if self.server is not None and not self.server.ready():
                return
            self.finish(self.apply())
        except ApiError as error:
            # 9 is FAILED_PRECONDITION: the state has changed since the operation began.
            self.result = {"error": {"code": 9, "message": error.message}}

    def finish(self, message: Any) -> None:
        """Set the response; None is an empty response."""
        if message is None:
            self.result = {"response": {"@type": EMPTY}}
        else:
            kind = f"{TYPES}{type(message).__name__}"
            self.result = {"response": {"@type": kind, **as_json(message)}}

    def cancel(self) -> None:
        """End the operation without applying it."""
        if self.result is None:
            if self.server is not None:
                self.server.stop()
            # 1 is CANCELLED.
            self.result = {"error": {"code": 1, "message": "The operation was cancelled"}}

    def as_json(self) -> Json:
        """Convert the operation to JSON."""
        metadata = {
            "@type": f"{TYPES}{self.verb}OperationMetadata",
            "genericMetadata": {"createTime": timestamp(self.create_time)},
        }
        done = {} if self.result is None else {"done": True, **self.result}
        return {"name": self.name, "metadata": metadata, **done}


class FakeVertex(FakeServer):
    """Vertex AI; see README.md.

    Attributes:
        job_states: the states of a job before its final one; each get of a job advances it.
        slow_operations: number of polls of an operation (or gets of any resource) until it is done.
        task_outputs: metadata of the outputs of pipeline tasks: {task: {output: metadata}}.
        skipped_tasks: tasks that never run.
        predictor: predicts if there are no containers: (deployed model, body) → Response.
        jobs, runs, models, endpoints: the resources.
    """

    def __init__(self, port: int = 0, containers: Containers | None = None) -> None:
        super().__init__(port)
        self.containers = containers
        self.job_states = ACTIVE_STATES
        self.slow_operations = 0
        self.task_outputs: dict[str, dict[str, Json]] = {}
        self.skipped_tasks: set[str] = set()
        self.predictor: Callable[[Any, bytes], Response] | None = None
        self.operations: dict[str, Operation] = {}
        self.jobs, self.runs = CustomJobs(self), PipelineJobs(self)
        self.models, self.endpoints = Models(self), Endpoints(self)
        self._ids = itertools.count(1_000_000_001)  # 10 digits, the most of a deployed model's ID
        for part in (self.jobs, self.runs, self.models, self.endpoints):
            self.add_routes(part, f"{LOCATION}/{part.plural}", f"{part.plural}.")

    def __exit__(self, *exception: object) -> None:
        # Stop the server first, so that no request starts another container.
        try:
            super().__exit__(*exception)
        finally:
            if self.containers is not None:
                self.containers.close()

    def set_outcome(self, name: str = "", state: str = "FAILED", **outcome: Any) -> None:
        """Set the outcome of future jobs; the newest matching rule wins.

        Args:
            name: a regular expression for display names.
            state: SUCCEEDED, FAILED …, with or without the prefix JOB_STATE_ or PIPELINE_STATE_.
            outcome: the other fields of Outcome.
        """
        with self.lock:
            short = re.sub(r"^(JOB|PIPELINE)_STATE_", "", state)
            for jobs in (self.jobs, self.runs):
                # First in the list, because the first match wins.
                jobs.outcomes.insert(0, Outcome(name, short, **outcome))

    def new_id(self, digits: int = 19) -> str:
        """Return a new ID of so many digits."""
        # Padding with zeros keeps IDs of all lengths unique.
        return str(next(self._ids) * 10 ** (digits - 10))

    def start_operation(
        self,
        resource: str,
        verb: str,
        apply: Callable[[], Any],
        server: Any = None,
        key: Any = None,
    ) -> Json:
        """Start an operation; if it is not slow, apply it now, and fail with the call."""
        identity = self.new_id()
        name = f"{resource}/operations/{identity}"
        operation = Operation(name, verb, apply, self.slow_operations, server, key)
        # A server needs time to become healthy, so a deployment with a server is never immediate.
        if self.slow_operations == 0 and server is None:
            operation.finish(apply())
        self.operations[identity] = operation
        return operation.as_json()

    def tick(self) -> None:
        """Poll all operations."""
        for operation in self.operations.values():
            operation.poll()

    def is_pending(self, key: Any) -> bool:
        """Return whether an operation with this key is not done."""
        return any(one.key == key and one.result is None for one in self.operations.values())

    def _operation(self, request: Request) -> Operation:
        if request["id"] not in self.operations:
            raise ApiError(404, f"The Operation does not exist: {request['id']}")
        return self.operations[request["id"]]

    @route("GET", OPERATION, "operations.get")
    def _get_operation(self, request: Request) -> Json:
        operation = self._operation(request)
        operation.poll()
        return operation.as_json()

    @route("POST", f"{OPERATION}:cancel", "operations.cancel")
    def _cancel_operation(self, request: Request) -> Json:
        self._operation(request).cancel()
        return {}

    @route("GET", rf"{LOCATION}(?P<resource>(?:/\w+/[^/:]+)?)/operations", "operations.list")
    def _list_operations(self, request: Request) -> Json:
        # An exact match: a list for a location excludes the operations of its resources.
        parent = f"{canonical(request['parent'])}{request['resource']}/operations/"
        operations = [
            operation.as_json()
            for identity, operation in self.operations.items()
            if operation.name == f"{parent}{identity}"
        ]
        size, token = int(request.query.get("pageSize") or 0), request.query.get("pageToken", "")
        page, next_page = paginate(operations, size, token)
        return {"operations": page, **next_page}
