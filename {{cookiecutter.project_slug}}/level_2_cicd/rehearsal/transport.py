"""HTTP on loopback: requests, responses, and errors in the format of Google's APIs."""

import json
import re
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

Json = dict[str, Any]

# Names of google.rpc codes in Google's errors, by HTTP status.
STATUS_NAMES = {
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


@dataclass
class Request:
    """A request; `request["id"]` is a named part of its path.

    Attributes:
        path: decoded, without the query.
        query: the last value of each parameter; `repeated` has all values.
        headers: by name in lower case.
        call: the route's name, such as "customJobs.create".
        message: the body as the handler parsed it: a protobuf message, a dict, bytes or None.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    repeated: dict[str, list[str]] = field(default_factory=dict)
    call: str = ""
    match: re.Match[str] | None = None
    message: Any = None

    def __getitem__(self, name: str) -> str:
        return self.match[name] if self.match else ""

    def json(self) -> Json:
        """Parse the body as a JSON object."""
        return parse_json(self.body)


@dataclass
class Response:
    """A response; a callable body is called without the lock and returns the response."""

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    fraction: float = 1.0  # of the body that is sent before the connection is closed


class ApiError(Exception):
    """An error response in the format of Google's APIs.

    Args:
        reason: Cloud Storage's reason code.
        name: the google.rpc code, if not the usual one of this HTTP status.
    """

    def __init__(self, status: int, message: str, reason: str = "", name: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.reason, self.name = status, message, reason, name

    def response(self) -> Response:
        """Convert the error to a response."""
        name = self.name or STATUS_NAMES.get(self.status, "UNKNOWN")
        error: Json = {"code": self.status, "message": self.message, "status": name}
        if self.reason:
            error["errors"] = [{"reason": self.reason, "message": self.message}]
        return Response({"error": error}, self.status)


def parse_json(body: bytes) -> Json:
    """Parse a JSON object; an empty body is an empty object."""
    try:
        document = json.loads(body or b"{}")
    except ValueError:
        raise ApiError(400, "Invalid JSON payload received.", "parseError") from None
    if not isinstance(document, dict):
        raise ApiError(400, "Invalid JSON payload received. Expected an object.", "parseError")
    return document


def timestamp(time: datetime | None = None) -> str:
    """Format a time, by default the current time, as in Google's JSON."""
    return (time or datetime.now(UTC)).isoformat().replace("+00:00", "Z")


def failed_precondition(message: str) -> ApiError:
    """Return the error for a resource whose state does not allow the call."""
    return ApiError(400, message, name="FAILED_PRECONDITION")


class HttpServer(ThreadingHTTPServer):
    """Pass requests to `fake.handle`, in a thread per connection; None closes the connection."""

    daemon_threads = True  # open connections of clients do not keep the program alive
    # Tests send a hundred requests at once; the default of 5 would refuse connections.
    request_queue_size = 256

    def __init__(self, port: int, fake: Any) -> None:
        super().__init__(("127.0.0.1", port), _Connection)
        self.fake = fake

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report errors except connections closed by clients."""
        # Tests kill clients, which is not an error of the server.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # persistent connections, as Google's servers have
    server: HttpServer
    # Otherwise each response waits 40 ms for the client's delayed ACK.
    disable_nagle_algorithm: ClassVar[bool] = True

    def _handle(self) -> None:
        url = urlsplit(self.path)
        # Keep blank values: `prefix=` is valid.
        repeated = parse_qs(url.query, keep_blank_values=True)
        query = {name: values[-1] for name, values in repeated.items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(
            self.command, unquote(url.path), query, headers, self._read_body(), repeated
        )
        response = self.server.fake.handle(request)
        if response is None:
            self.close_connection = True
        else:
            self._send(response)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _handle

    def _send(self, response: Response) -> None:
        content, kind = response.body, "application/octet-stream"
        if not isinstance(content, bytes):
            content, kind = json.dumps(content).encode(), "application/json; charset=UTF-8"
        headers = {"Content-Type": kind, **response.headers, "Content-Length": str(len(content))}
        self.send_response(response.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        # A response to HEAD has the headers of GET and no body.
        if self.command != "HEAD":
            self.wfile.write(content[: int(len(content) * response.fraction)])
        # The body is shorter than Content-Length: the client sees a broken connection.
        self.close_connection |= response.fraction < 1

    def _read_body(self) -> bytes:
        # Python's server does not decode chunked bodies, which Go's clients (Terraform) send.
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *_: object) -> None:
        """Print nothing, because the fakes store the requests."""
