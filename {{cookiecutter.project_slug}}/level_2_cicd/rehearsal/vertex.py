"""A double of Vertex AI: jobs, pipeline jobs, models with versions and aliases, endpoints with traffic.

    with FakeVertex() as vertex:
        os.environ["CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM"] = vertex.address
        …
        vertex.calls("customJobs.create")  # what was received

By hand: python -m rehearsal
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rehearsal import protojson
from rehearsal.containers import Containers
from rehearsal.protojson import PLACE, now, place_of, written
from rehearsal.server import ApiError, FakeServer, Request, Response
from rehearsal.vertex_endpoints import Endpoints
from rehearsal.vertex_jobs import GOING, CustomJobs, Outcome, PipelineJobs
from rehearsal.vertex_models import Models

TYPES = "type.googleapis.com/google.cloud.aiplatform.v1."
EMPTY = "type.googleapis.com/google.protobuf.Empty"


@dataclass
class Operation:
    """Something that takes its time: `apply` carries it out after so many looks, and when `server` is ready.

    Attributes:
        about: what it makes, for those that must not be begun twice.
    """

    name: str
    metadata: str
    apply: Callable[[], Any]
    looks: int
    server: Any = None
    about: Any = None
    began: Any = field(default_factory=now)
    result: dict[str, Any] | None = None

    def look(self) -> None:
        """Carry it out if its time has come."""
        if self.result is not None:
            return
        if self.looks > 0:
            self.looks -= 1
            return
        try:
            if self.server is not None and not self.server.ready():
                return
            message = self.apply()
        except ApiError as refused:
            self.result = {"error": {"code": 9, "message": refused.message}}
            return
        typed = {"@type": EMPTY} if message is None else {"@type": f"{TYPES}{type(message).__name__}", **written(message)}
        self.result = {"response": typed}

    def cancel(self) -> None:
        """Let it end without having been carried out."""
        if self.result is not None:
            return
        if self.server is not None:
            self.server.stop()
        self.result = {"error": {"code": 1, "message": "The operation was cancelled"}}

    def written(self) -> dict[str, Any]:
        """As JSON."""
        times = {"createTime": self.began.isoformat().replace("+00:00", "Z")}
        metadata = {"@type": f"{TYPES}{self.metadata}", "genericMetadata": times}
        body: dict[str, Any] = {"name": self.name, "metadata": metadata}
        return body if self.result is None else {**body, "done": True, **self.result}


class FakeVertex(FakeServer):
    """The double; see README.md.

    Attributes:
        job_states: the states that a job goes through; each customJobs.get or pipelineJobs.get is a step.
        slow_operations: so many looks at an operation (or at any model or endpoint) until it is done.
        task_outputs: what pipeline tasks wrote about their outputs: {task: {output: metadata}}.
        skipped_tasks: those that never run.
        predictor: answers predictions when no containers run: (deployed model, body) → Response.
        jobs, runs, models, endpoints: what is kept.
    """

    def __init__(self, port: int = 0, containers: Containers | None = None) -> None:
        super().__init__(port)
        self.containers = containers
        self.job_states = GOING
        self.slow_operations = 0
        self.task_outputs: dict[str, dict[str, dict[str, Any]]] = {}
        self.skipped_tasks: set[str] = set()
        self.predictor: Callable[[Any, bytes], Response] | None = None
        self.operations: dict[str, Operation] = {}
        self.jobs, self.runs = CustomJobs(self), PipelineJobs(self)
        self.models, self.endpoints = Models(self), Endpoints(self)
        self._ids = itertools.count(1_000_000_001)
        for part in (self.jobs, self.runs, self.models, self.endpoints):
            self.routes += part.routes()
        operation = rf"{PLACE}/(?:\w+/[^/:]+/)?operations/(?P<id>[^/:]+)"
        self.routes += [
            ("GET", operation, "operations.get", self._look),
            ("POST", f"{operation}:wait", "operations.wait", self._wait),
            ("POST", f"{operation}:cancel", "operations.cancel", self._cancel),
            ("GET", rf"{PLACE}(?P<resource>(?:/\w+/[^/:]+)?)/operations", "operations.list", self._list),
        ]

    def __exit__(self, *what: object) -> None:
        try:
            super().__exit__(*what)
        finally:
            if self.containers is not None:
                self.containers.close()

    def set_outcome(
        self,
        name: str = "",
        state: str = "JOB_STATE_FAILED",
        *,
        code: int = 0,
        message: str = "",
        through: tuple[str, ...] = GOING,
        times: int | None = None,
    ) -> None:
        """Let jobs that are created from now on end in this way; the newest rule that fits counts.

        Args:
            name: a regular expression for display names.
            state: SUCCEEDED, FAILED …, with or without the prefix of its kind.
            code: google.rpc's code (8: RESOURCE_EXHAUSTED).
            through: the states before; () ends it at once.
            times: for so many jobs.
        """
        with self.lock:
            short = re.sub(r"^(JOB|PIPELINE)_STATE_", "", state)
            for kind in (self.jobs, self.runs):
                kind.outcomes.insert(0, Outcome(name, short, code, message, through, times))

    def new_id(self, digits: int = 19) -> str:
        """A number that nothing has yet."""
        return str(next(self._ids) * 10 ** (digits - 10))

    def operate(self, resource: str, metadata: str, apply: Callable[[], Any], server: Any = None, about: Any = None) -> Response:
        """Begin an operation; what fails at once is refused at once."""
        operation = Operation(f"{resource}/operations/{self.new_id()}", metadata, apply, self.slow_operations, server, about)
        if self.slow_operations == 0 and server is None:
            message = apply()
            operation.apply = lambda: message
            operation.look()
        self.operations[operation.name.split("/")[-1]] = operation
        return Response(operation.written())

    def tick(self) -> None:
        """A look at something lets time pass for all that is under way."""
        for operation in self.operations.values():
            operation.look()

    def under_way(self, about: Any) -> bool:
        """Whether an operation that makes this is not done."""
        return any(operation.about == about for operation in self.operations.values() if operation.result is None)

    def _find(self, found: re.Match[str]) -> Operation:
        if found["id"] not in self.operations:
            raise ApiError(404, f"The Operation does not exist: {found['id']}")
        return self.operations[found["id"]]

    def _look(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        operation = self._find(found)
        operation.look()
        return None, Response(operation.written())

    def _cancel(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        self._find(found).cancel()
        return None, Response()

    def _list(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        start = int(request.query.get("pageToken") or 0)
        size = int(request.query.get("pageSize") or protojson.PAGE)
        here = f"{place_of(found)}{found['resource']}/operations/"
        chosen = [operation for name, operation in self.operations.items() if operation.name == f"{here}{name}"]
        body: dict[str, Any] = {"operations": [operation.written() for operation in chosen[start : start + size]]}
        if start + size < len(chosen):
            body["nextPageToken"] = str(start + size)
        return None, Response(body)

    def _wait(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        operation = self._find(found)
        operation.looks = 0
        operation.look()
        return None, Response(operation.written())
