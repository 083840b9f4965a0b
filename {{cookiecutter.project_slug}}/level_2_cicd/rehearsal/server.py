"""Base class of the fakes: route calls to methods, store them, and inject faults."""

import re
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from level_2_cicd.rehearsal.transport import (
    ApiError,
    HttpServer,
    Json,
    Request,
    Response,
    failed_precondition,
)

__all__ = ["ApiError", "FakeServer", "Json", "Request", "Response", "failed_precondition", "route"]

AnyHandler = TypeVar("AnyHandler", bound=Callable[..., Any])
Handler = Callable[[Request], Any]


@dataclass
class Fault:
    """A fault to inject into matching calls.

    Attributes:
        call: a regular expression for the route's name.
        status: the HTTP status to return; 0: close the connection; None: only delay or cut the
            response.
        done: execute the call and lose only its response.
        after: number of matching calls that succeed first.
        times: number of calls that fail.
        seconds: delay before the call.
        fraction: with status None, the fraction of the body that is sent before the connection
            closes.
    """

    call: str = ""
    status: int | None = 503
    message: str = "injected fault"
    done: bool = False
    after: int = 0
    times: int = 1
    seconds: float = 0.0
    fraction: float = 1.0


def route(method: str, path: str, call: str) -> Callable[[AnyHandler], AnyHandler]:
    """Register a method as the handler of a call, named as in Google's REST reference.

    `path` is a regular expression in which {name} matches one segment and {name=**} several.
    """

    def register(handler: AnyHandler) -> AnyHandler:
        # Store the route on the function; add_routes collects it once there is an object.
        handler.__dict__["route"] = (method, path, call)
        return handler

    return register


class FakeServer:
    """A server on a free port: `with FakeVertex() as vertex: … vertex.address … vertex.received`.

    Methods with @route run one at a time, under `lock`. They set `request.message`, and return a
    Response or its body, or raise ApiError.
    """

    def __init__(self, port: int = 0) -> None:
        self.routes: list[tuple[str, str, str, Handler]] = []
        self.received: list[Request] = []
        self.faults: list[Fault] = []
        # One call at a time: each is atomic, as in the cloud. Reentrant, because handlers call
        # methods that take the lock too.
        self.lock = threading.RLock()
        self.log: Callable[[str], None] | None = None  # gets one line per call
        self.add_routes(self)
        self._http = HttpServer(port, self)
        # The default poll interval would add half a second to the end of each test.
        serve = {"poll_interval": 0.02}
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs=serve, daemon=True)

    def add_routes(self, owner: object, path: str = "", call: str = "") -> None:
        """Serve an object's @route methods with prefixes for their paths and call names."""
        # Base classes first, in source order: the first matching route wins.
        for cls in reversed(type(owner).__mro__):
            for name, attribute in vars(cls).items():
                if spec := getattr(attribute, "route", None):
                    handler = getattr(owner, name)
                    self.routes.append((spec[0], path + spec[1], call + spec[2], handler))

    @property
    def address(self) -> str:
        """Return the base URL, http://127.0.0.1:PORT."""
        return f"http://{self.host}"

    @property
    def host(self) -> str:
        """Return host and port, 127.0.0.1:PORT."""
        return f"127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def fail(self, call: str = "", **fault: Any) -> None:
        """Inject a fault into future calls; see Fault."""
        with self.lock:
            self.faults.append(Fault(call, **fault))

    def calls(self, name: str) -> list[Any]:
        """Return the messages of all successful requests of one call, in order."""
        with self.lock:
            return [request.message for request in self.received if request.call == name]

    def handle(self, request: Request) -> Response | None:
        """Respond to a request; None closes the connection without a response."""
        for method, pattern, call, handler in self.routes:
            if method == request.method and (
                match := re.fullmatch(to_regex(pattern), request.path)
            ):
                request.call, request.match = call, match
                return self._log(f"{call} {request.path}", self._respond(request, handler))
        known = ", ".join(sorted({call for _, _, call, _ in self.routes}))
        what = f"{request.method} {request.path}"
        # 501, not 404: a call that the fake lacks must not look like a missing resource.
        error = ApiError(501, f"{type(self).__name__} does not know {what}; it knows {known}")
        return self._log(f"unknown {what}", error.response())

    def _respond(self, request: Request, handler: Handler) -> Response | None:
        fault = self._fault(request.call)
        if fault is None:
            return self._run(request, handler)
        time.sleep(fault.seconds)  # without the lock: other calls go on
        if fault.status is None:
            response = self._run(request, handler)
            response.fraction = fault.fraction
            return response
        if fault.done:
            self._run(request, handler)  # execute the call; only its response is lost
        return ApiError(fault.status, fault.message).response() if fault.status else None

    def _run(self, request: Request, handler: Handler) -> Response:
        try:
            with self.lock:
                result = handler(request)
                # Store successful requests only, so that tests see what took effect.
                self.received.append(request)
            response = result if isinstance(result, Response) else Response(result)
            # Outside the lock: a prediction takes time, and others may run meanwhile.
            return response.body() if callable(response.body) else response
        except ApiError as error:
            return error.response()
        except Exception as error:
            # A client would retry after a closed connection, which would hide the bug.
            traceback.print_exc()
            return ApiError(500, f"bug in {type(self).__name__}: {error!r}").response()

    def _log(self, call: str, response: Response | None) -> Response | None:
        if self.log is not None:
            self.log(f"{call} → {response.status if response else 'connection closed'}")
        return response

    def _fault(self, call: str) -> Fault | None:
        """Return the fault to inject into this call, if any."""
        with self.lock:
            for fault in self.faults:
                if not re.search(fault.call, call) or fault.times <= 0:
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault
        return None


def to_regex(path: str) -> str:
    """Replace {name} and {name=**} in a route's path by named groups."""
    # A segment ends at a colon too, which separates custom verbs such as :cancel.
    path = re.sub(r"\{(\w+)=\*\*\}", r"(?P<\1>.+)", path)
    return re.sub(r"\{([a-z_]+)\}", r"(?P<\1>[^/:]+)", path)
