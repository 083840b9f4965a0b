"""The frame of a double: an HTTP server on loopback that keeps what it received, and fails when told to.

A call that no route knows is answered with 501 and a text that names it.
"""

import json
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit


@dataclass(frozen=True)
class Request:
    """A request, as it came in."""

    method: str
    path: str  # decoded, without the query
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    repeated: dict[str, list[str]] = field(default_factory=dict)  # the query, where a name may stand several times


@dataclass(frozen=True)
class Received:
    """A request that a route knew.

    Attributes:
        call: the route's name, such as "customJobs.create".
        message: the body as the route understood it: a protobuf message, a dict, bytes or None.
    """

    call: str
    request: Request
    message: Any = None


@dataclass
class Response:
    """An answer; a dict becomes JSON. A body that is a function is called after the lock is given back, and gives the answer."""

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    share: float = 1.0  # of the body that is sent before the connection is cut


class ApiError(Exception):
    """An answer that is an error, in Google's form."""

    def __init__(self, status: int, message: str, reason: str = "", name: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.reason, self.name = status, message, reason, name


@dataclass
class Fault:
    """Something that shall go wrong.

    Attributes:
        call: a regular expression for the route's name.
        status: what is answered instead; 0 cuts the connection.
        done: the request is carried out all the same, and only its answer is lost.
        after: so many matching calls go well before.
        times: so often.
        seconds: a slow answer: with status None nothing else is wrong.
        share: with status None, the part of the answer's body that comes before the connection is cut.
    """

    call: str = ""
    status: int | None = 503
    message: str = "told to fail"
    done: bool = False
    after: int = 0
    times: int = 1
    seconds: float = 0.0
    share: float = 1.0


# Google's names for HTTP statuses, as its errors carry them.
NAMES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ALREADY_EXISTS",
    412: "FAILED_PRECONDITION",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}

Handler = Callable[[Request, re.Match[str]], tuple[Any, Response]]


class FakeServer:
    """A server on a free port: `with Vertex() as vertex: … vertex.address … vertex.received`.

    A subclass fills `routes`: (method, regular expression of the whole path, the call's name, handler). A handler gets
    the request and the path's match, under the lock, and returns the parsed message and the response, or raises ApiError.
    """

    def __init__(self, port: int = 0) -> None:
        self.routes: list[tuple[str, str, str, Handler]] = []
        self.received: list[Received] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.log: Callable[[str], None] | None = None  # gets one line for each call
        self._http = _Server(("127.0.0.1", port), _Answer)
        self._http.double = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def address(self) -> str:
        """Where it listens, as http://127.0.0.1:PORT."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def fail(self, call: str = "", **what: Any) -> None:
        """Let calls go wrong: see Fault."""
        with self.lock:
            self.faults.append(Fault(call, **what))

    def calls(self, name: str) -> list[Any]:
        """The messages that a call received, in order."""
        with self.lock:
            return [received.message for received in self.received if received.call == name]

    def handle(self, request: Request) -> Response | None:
        """Answer a request; None cuts the connection."""
        for method, pattern, call, handler in self.routes:
            found = re.fullmatch(pattern, request.path)
            if found and method == request.method:
                response = self._carry_out(request, call, handler, found)
                self._tell(f"{call} {request.path}", response)
                return response
        known = sorted({call for _, _, call, _ in self.routes})
        message = f"this double does not know {request.method} {request.path}; it knows {', '.join(known)}"
        response = error_response(501, message)
        self._tell(f"unknown {request.method} {request.path}", response)
        return response

    def _carry_out(self, request: Request, call: str, handler: Handler, found: re.Match[str]) -> Response | None:
        fault = self._fault(call)
        if fault:
            time.sleep(fault.seconds)
        if fault and fault.status is not None and not fault.done:
            return error_response(fault.status, fault.message) if fault.status else None
        try:
            with self.lock:
                message, response = handler(request, found)
                self.received.append(Received(call, request, message))
            if callable(response.body):
                response = response.body()
        except ApiError as refused:
            response = error_response(refused.status, refused.message, refused.reason, refused.name)
        except Exception as error:
            traceback.print_exc()
            response = error_response(500, f"this double has a mistake of its own: {error!r}")
        if fault and fault.status is not None:
            return error_response(fault.status, fault.message) if fault.status else None
        if fault:
            response.share = fault.share
        return response

    def _tell(self, what: str, response: Response | None) -> None:
        if self.log is not None:
            self.log(f"{what} → {response.status if response else 'cut off'}")

    def _fault(self, call: str) -> Fault | None:
        """The fault that this call meets."""
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


def error_response(status: int, message: str, reason: str = "", name: str = "") -> Response:
    """An error in the form of Google's APIs; `name` where the status has another name than its usual one."""
    error: dict[str, Any] = {"code": status, "message": message, "status": name or NAMES.get(status, "UNKNOWN")}
    if reason:
        error["errors"] = [{"reason": reason, "message": message}]
    return Response({"error": error}, status)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    double: FakeServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Be silent about a client that hung up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    disable_nagle_algorithm: ClassVar[bool] = True

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        body = self._read_body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        query, repeated = dict(parse_qsl(parts.query, True)), parse_qs(parts.query, True)
        request = Request(self.command, unquote(parts.path), query, headers, body, repeated)
        response = self.server.double.handle(request)
        if response is None:
            self.close_connection = True
            return
        content = response.body if isinstance(response.body, bytes) else json.dumps(response.body).encode()
        kind = "application/octet-stream" if isinstance(response.body, bytes) else "application/json; charset=UTF-8"
        self.send_response(response.status)
        for name, value in {"Content-Type": kind, **response.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: int(len(content) * response.share)])
        self.close_connection |= response.share < 1

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _answer

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *_: object) -> None:
        """Be silent: what came in is in `received`."""
