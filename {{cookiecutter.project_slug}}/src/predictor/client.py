"""Client of a predictor: a server, or an endpoint of Vertex AI. Predicts as a local `Model` does."""

import argparse
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from core import manifest
from core.errors import UserError
from core.registry import LocalRegistry
from core.schema import Column, Schema, parse_number
from predictor import cloud

CELLS = 25_000  # in one request: about 1 MB; the cloud's shared endpoints take 1.5 MB
HEALTH_SECONDS = 1.0
CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0
FIRST_SECONDS = 3.0  # for a server that has never responded: the address is probably wrong
MAX_WAIT_SECONDS = 600.0
TRANSIENT = (429, 502, 503, 504)
REJECTED = (400, 413, 422)  # the request is invalid, so a retry cannot help
DESCRIBE = b'{"openapi": true}'  # returns the API where only predictions are passed on


class RequestRejected(UserError):
    """The server rejects the rows and says why."""


class RetryUntil(Retry):
    """Retry until `wait` seconds after the first failure, however many attempts that takes."""

    def __init__(self, wait: float, deadline: float | None = None, **options: Any) -> None:
        """urllib3 passes its own state in `options`."""
        super().__init__(**options)
        self.wait, self.deadline = wait, deadline

    def new(self, **options: Any) -> "RetryUntil":
        """Return the state after an attempt; the first one sets the deadline."""
        deadline = self.deadline or time.monotonic() + self.wait
        return super().new(wait=self.wait, deadline=deadline, **options)

    def is_exhausted(self) -> bool:
        """Whether to give up."""
        return bool(self.deadline and time.monotonic() >= self.deadline)


def retry_policy(wait: float) -> Retry:
    """Retry transient errors for `wait` seconds; the pauses grow from 0.2 to 2 seconds."""
    return RetryUntil(
        wait,
        total=None,
        allowed_methods=None,  # POST too: predicting twice changes nothing
        status_forcelist=TRANSIENT,
        backoff_factor=0.1,
        backoff_max=2,
        retry_after_max=min(int(wait) + 1, 10),
        raise_on_status=False,
    )


def _local_session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # no proxy for 127.0.0.1, and no passwords of .netrc
    return session


@dataclass(frozen=True)
class Endpoint:
    """The address and path of predictions; transient errors are retried for `wait` seconds."""

    address: str
    route: str = "/predict"
    wait: float = 0.0
    session: requests.Session = field(default_factory=_local_session, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Keep up to 64 connections open, one for each thread."""
        adapter = HTTPAdapter(pool_maxsize=64, max_retries=retry_policy(self.wait))
        self.session.mount(self.address, adapter)

    def get(self, path: str, read_seconds: float = READ_SECONDS) -> Any:
        """Return the JSON document at a path."""
        return self._request("GET", path, None, read_seconds)

    def post(self, body: bytes) -> Any:
        """Return the JSON document for a request for predictions."""
        return self._request("POST", self.route, body)

    def predict(self, instances: Sequence[Any], **parameters: Any) -> list[dict[str, Any]]:
        """Return one prediction for each instance, in their order."""
        return self.predict_json([json.dumps(instance) for instance in instances], **parameters)

    def predict_json(self, instances: Sequence[str], **parameters: Any) -> list[dict[str, Any]]:
        """Return one prediction for each instance; the instances are JSON already."""
        body = f'{{"instances": [{", ".join(instances)}], "parameters": {json.dumps(parameters)}}}'
        document = self.post(body.encode())
        predictions = document.get("predictions") if isinstance(document, dict) else None
        if not isinstance(predictions, list) or len(predictions) != len(instances):
            raise UserError(
                f"{self.address}{self.route} does not return {len(instances)} prediction(s), "
                "one for each row."
            )
        return predictions

    def _request(
        self, method: str, path: str, body: bytes | None, read_seconds: float = READ_SECONDS
    ) -> Any:
        def send() -> requests.Response:
            return self.session.request(
                method,
                self.address + path,
                data=body,
                headers={"Content-Type": "application/json"},
                allow_redirects=False,
                timeout=(min(CONNECT_SECONDS, read_seconds), read_seconds),
            )

        try:
            try:
                response = send()
            except requests.exceptions.ChunkedEncodingError:
                if not self.wait:
                    raise
                response = send()  # Retry does not cover a response that breaks off in its body
        except requests.RequestException as error:
            cause = error.args[0] if error.args else error
            reason = str(getattr(cause, "reason", None) or cause).rsplit(": ", 1)[-1]
            raise UserError(f"{self.address} does not respond: {reason}.") from None
        except Exception as error:  # google-auth's, which only endpoints in the cloud have
            if not type(error).__module__.startswith("google.auth"):
                raise
            raise UserError(f"Google rejects the credentials: {error}. {cloud.LOGIN}") from None
        return _read_response(response, f"{self.address} responds to {method} {path}")


def _read_response(response: requests.Response, subject: str) -> Any:
    try:
        document = json.loads(response.content)
    except (ValueError, RecursionError):
        document = None
    if response.status_code == 200 and document is not None:
        return document
    message = document.get("error") if isinstance(document, dict) else None
    if isinstance(message, dict):
        message = cloud.explain(response.status_code, message)
    if response.status_code in REJECTED and message:
        raise RequestRejected(str(message))
    raise UserError(f"{subject} with status {response.status_code}: {message or 'not a predictor'}")


@dataclass(frozen=True)
class Server:
    """A server with its model's schema, and the model's version in the registry, if any."""

    endpoint: Endpoint
    version: int | None
    schema: Schema

    @property
    def address(self) -> str:
        """The server's address."""
        return self.endpoint.address

    @classmethod
    def find(cls, port: int, registry: LocalRegistry) -> "Server | None":
        """Return the server on this machine's port if it serves a version of this registry."""
        endpoint = Endpoint(f"http://127.0.0.1:{port}")
        try:
            health = endpoint.get("/health", HEALTH_SECONDS)
            path = registry.version(health["version"]).model / manifest.NAME
            if manifest.sha256(path) != health["manifest_sha256"]:
                return None  # another project's
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None
        return cls(endpoint, health["version"], Schema.from_json(document["schema"]))

    @classmethod
    def open(cls, address: str, wait: float) -> "Server":
        """Read the API of the server or Vertex AI endpoint at `address`.

        Args:
            address: http://HOST:PORT, perhaps with the path of its predictions; or
                projects/PROJECT/locations/REGION/endpoints/ID.
            wait: for how many seconds transient errors are retried.
        """
        if name := cloud.parse(address):
            return cls._open_cloud(*name, wait)
        try:
            url = urlsplit(address)
        except ValueError:
            url = urlsplit("")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(
                f"--endpoint is {address!r}; expected an address such as http://127.0.0.1:8080, "
                "or an endpoint's name: projects/PROJECT/locations/REGION/endpoints/ID."
            )
        base = f"{url.scheme}://{url.netloc}"
        try:
            document = Endpoint(base, wait=min(wait, FIRST_SECONDS)).get("/openapi.json")
            route, version, schema = read_description(document)
        except UserError as error:
            raise UserError(
                f"{error} Is a server running there? `make serve` starts one; "
                "--endpoint gives its address."
            ) from None
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{base}/openapi.json is not a predictor's.") from None
        if (url.path or "/") not in ("/", route):
            raise UserError(
                f"--endpoint is {address!r}; the server there predicts at {base}{route}."
            )
        return cls(Endpoint(base, route, wait), version, schema)

    @classmethod
    def _open_cloud(cls, server: str, route: str, wait: float) -> "Server":
        endpoint = Endpoint(server, route, wait, cloud.open_session())
        try:
            _, version, schema = read_description(endpoint.post(DESCRIBE))
        except (RequestRejected, KeyError, TypeError, ValueError, AttributeError) as error:
            detail = f": {error}" if isinstance(error, RequestRejected) else "."
            raise UserError(f"{server}{route} is not this project's predictor{detail}") from None
        return cls(endpoint, version, schema)

    def probabilities(self, table: Mapping[str, Sequence[Any] | np.ndarray]) -> np.ndarray:
        """Return probabilities, float64 (rows, classes), for columns of values."""
        predictions = self.predict(table, top=len(self.schema.classes))
        names = [str(name) for name in self.schema.classes]
        return np.array([[row["scores"][name] for name in names] for row in predictions])

    def predict(
        self, table: Mapping[str, Sequence[Any] | np.ndarray], **parameters: Any
    ) -> list[dict[str, Any]]:
        """Return the server's predictions for columns of values."""
        require(self.schema.columns, table)
        # An empty object is a row too, if all columns are optional.
        rows = len(next(iter(table.values()))) if table else 1
        size = max(1, CELLS // len(self.schema.columns))
        predictions = []
        for start in range(0, rows, size):
            end = min(start + size, rows)
            instances = [self._instance(table, row) for row in range(start, end)]
            try:
                predictions += self.endpoint.predict(instances, **parameters)
            except RequestRejected as error:
                raise UserError(f"the server rejects rows {start + 1} to {end}: {error}") from None
        return predictions

    def _instance(self, table: Mapping[str, Sequence[Any] | np.ndarray], row: int) -> list[Any]:
        values = {name: column[row] for name, column in table.items()}
        try:
            return json_values(self.schema.columns, values)
        except ValueError as error:
            raise UserError(f"row {row + 1}, {error}") from None


def read_description(document: Mapping[str, Any]) -> tuple[str, int | None, Schema]:
    """Return the predictions' path, the model's version and schema from `contract.openapi`.

    The schema's categories are examples only. Another document raises KeyError, TypeError,
    ValueError or AttributeError.
    """
    (route,) = (path for path, methods in document["paths"].items() if "post" in methods)
    version = document["info"]["version"]
    schemas = document["components"]["schemas"]
    instance = schemas["Instance"]
    columns = tuple(
        Column(
            name,
            "categorical" if "string" in column["type"] else "numeric",
            name not in instance["required"],
            tuple(column.get("examples", ())),
        )
        for name, column in instance["properties"].items()
    )
    label = document["paths"][route]["post"]["summary"].removeprefix("Predict ")
    classes = tuple(schemas["Prediction"]["properties"]["label"]["enum"])
    return route, int(version) if version.isdecimal() else None, Schema(label, columns, classes)


def require(columns: Sequence[Column], names: Iterable[str]) -> None:
    """Check that every required column is in the data."""
    present = set(names)
    missing = [
        column.name for column in columns if not column.optional and column.name not in present
    ]
    if missing:
        raise UserError(
            f"{len(missing)} column(s) of the model are not in the data: {', '.join(missing[:10])}."
        )


def json_values(columns: Sequence[Column], row: Mapping[str, Any]) -> list[Any]:
    """Convert a row to JSON values in the columns' order; null for a missing one."""
    values = []
    for column in columns:
        value = row.get(column.name)
        if column.kind == "categorical":
            values.append(None if value == "" else value)
            continue
        try:
            number = parse_number(value)
        except ValueError:
            raise ValueError(f"column '{column.name}': {value!r} is not a finite number.") from None
        values.append(None if math.isnan(number) else number)
    return values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options --endpoint and --wait."""
    parser.add_argument(
        "--endpoint",
        default="http://127.0.0.1:8080",
        help="the server's address, or the name of an endpoint in the cloud (%(default)s)",
    )
    parser.add_argument(
        "--wait",
        type=number_between(0, MAX_WAIT_SECONDS),
        default=60.0,
        metavar="SECONDS",
        help="for how long a server that is down or too busy is retried (%(default)s)",
    )


def number_between(least: float, most: float, kind: type[int] | type[float] = float) -> Any:
    """Return an argument type: a number within bounds."""

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = kind(least - 1)
        if not least <= number <= most:  # also for NaN
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")
        return number

    return parse
