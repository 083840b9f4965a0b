"""Asks a server: one on this machine, or an endpoint in the cloud. Answers as a `Model` in this process does."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import urllib3

from core import manifest
from core.errors import UserError
from core.registry import LocalRegistry
from core.schema import Column, Schema, parse_number
from predictor import cloud

CELLS = 25_000  # in one request: about 1 MB, where the cloud's shared endpoints take 1.5
HEALTH_SECONDS = 1.0
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 60.0
FIRST_SECONDS = 3.0  # for a server that has never answered: the address is probably wrong
MOST_SECONDS = 600.0  # each attempt of urllib3 is a call within a call, and those are limited
PASSING = (429, 502, 503, 504)  # too busy, or restarting: the same request may be answered later
REFUSING = (400, 413, 422)  # the request itself is at fault
DESCRIBE = b'{"openapi": true}'  # a request for what a server says of itself, where only predictions are passed on to it


class Refused(UserError):
    """The server says what is wrong with the rows."""


class Patience(urllib3.Retry):
    """Tries again until a moment, however often that is; Retry-After is honoured, but no pause goes beyond that moment."""

    until = -math.inf

    @classmethod
    def of(cls, seconds: float) -> "Patience":
        """Tries for so many seconds from now; an attempt under way may still end."""
        patience = cls(
            total=None,
            allowed_methods=None,  # POST too: asking a model twice changes nothing
            status_forcelist=PASSING,
            backoff_factor=0.1,
            backoff_max=2,
            backoff_jitter=0.1,
            raise_on_status=False,
        )
        patience.until = time.monotonic() + seconds
        return patience

    def new(self, **changes: Any) -> "Patience":
        """What urllib3 goes on with after an attempt."""
        following = super().new(**changes)
        following.until = self.until
        return following

    def is_exhausted(self) -> bool:
        """Whether the moment has come."""
        return time.monotonic() >= self.until

    def sleep(self, response: urllib3.BaseHTTPResponse | None = None) -> None:
        """Pause as long as the server asks, otherwise longer each time."""
        asked = None if response is None else self.get_retry_after(response)
        time.sleep(max(0.0, min(asked or self.get_backoff_time(), self.until - time.monotonic())))


# Of connections, which are kept open from one request to the next; a thread needs one.
CONNECTIONS: dict[str, Any] = {
    "maxsize": 64,
    "timeout": urllib3.Timeout(connect=CONNECT_SECONDS, read=ANSWER_SECONDS),
}


def _pool() -> urllib3.PoolManager:
    return urllib3.PoolManager(**CONNECTIONS)


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked.

    Attributes:
        address: such as http://127.0.0.1:8080.
        route: the path that predictions are asked at.
        wait: for how many seconds a server is asked again that is down or too busy.
        sign: gives the headers that say who asks.
    """

    address: str
    route: str = "/predict"
    wait: float = 0.0
    pool: urllib3.PoolManager = field(default_factory=_pool, repr=False, compare=False)
    sign: Callable[[], Mapping[str, str]] = field(default=dict, repr=False, compare=False)

    def get(self, path: str, **options: Any) -> Any:
        """The JSON document at a path; `options` are urllib3's.

        Raises:
            UserError: no server answers there, or not with JSON.
        """
        return self._request("GET", path, None, **options)

    def post(self, body: bytes, **options: Any) -> Any:
        """The JSON document that answers a request for predictions; otherwise as `get`."""
        return self._request("POST", self.route, body, **options)

    def ask(self, instances: Sequence[Any], **parameters: Any) -> list[dict[str, Any]]:
        """One prediction for each instance, in their order.

        Raises:
            Refused: the server says what is wrong with the instances.
            UserError: it does not answer, or not as a predictor does.
        """
        return self.ask_texts([json.dumps(instance) for instance in instances], **parameters)

    def ask_texts(self, instances: Iterable[str], **parameters: Any) -> list[dict[str, Any]]:
        """`ask`, for instances that are written as JSON already."""
        texts = list(instances)
        body = f'{{"instances": [{", ".join(texts)}], "parameters": {json.dumps(parameters)}}}'
        document = self.post(body.encode())
        predictions = document.get("predictions") if isinstance(document, dict) else None
        if not isinstance(predictions, list) or len(predictions) != len(texts):
            raise UserError(
                f"{self.address}{self.route} answers, but not with one prediction for each of {len(texts)} row(s)."
            )
        return predictions

    def _request(self, method: str, path: str, body: bytes | None, **options: Any) -> Any:
        options.setdefault("retries", Patience.of(self.wait))
        options["headers"] = {"Content-Type": "application/json", **self.sign()}
        try:
            response = self.pool.request(
                method, self.address + path, body=body, redirect=False, **options
            )
        except urllib3.exceptions.HTTPError as error:
            reason = str(getattr(error, "reason", None) or error).rsplit(": ", 1)[-1]
            raise UserError(f"{self.address} does not answer: {reason}.") from None
        try:
            document = json.loads(response.data)
        except (ValueError, RecursionError):
            document = None
        if response.status == 200 and document is not None:
            return document
        told = document.get("error") if isinstance(document, dict) else None
        if isinstance(told, dict):
            told = cloud.refusal(response.status, told)
        if response.status in REFUSING and told:
            raise Refused(str(told))
        raise UserError(
            f"{self.address} answers {method} {path} with status {response.status}: {told or 'not as a predictor'}"
        )


@dataclass(frozen=True)
class Server:
    """A server, and what it says of its model.

    Attributes:
        version: its number in the registry, if it has one.
    """

    endpoint: Endpoint
    version: int | None
    schema: Schema

    @property
    def address(self) -> str:
        """Where it is."""
        return self.endpoint.address

    @classmethod
    def find(cls, port: int, registry: LocalRegistry) -> "Server | None":
        """The server on this machine's port, if one answers and serves a version of this very registry."""
        endpoint = Endpoint(f"http://127.0.0.1:{port}")
        try:
            health = endpoint.get("/health", timeout=HEALTH_SECONDS)
            number, saved = (
                health["version"],
                registry.version(health["version"]).model / manifest.NAME,
            )
            if manifest.sha256(saved) != health["manifest_sha256"]:
                return None  # another project's
            document = json.loads(saved.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None
        return cls(endpoint, number, Schema.from_json(document["schema"]))

    @classmethod
    def open(cls, address: str, wait: float) -> "Server":
        """The server at an address, as it describes itself.

        Args:
            address: such as http://127.0.0.1:8080, which may end with the path of its predictions; or an endpoint in the
                cloud, projects/PROJECT/locations/REGION/endpoints/ID.
            wait: for how many seconds it is asked again when it is down or too busy.

        Raises:
            UserError: it is no address, nobody answers there, or no predictor does.
        """
        in_cloud = cloud.parse(address)
        if in_cloud:
            return cls._open_cloud(*in_cloud, wait)
        try:
            url = urllib3.util.parse_url(address)
        except urllib3.exceptions.LocationParseError:
            url = urllib3.util.Url()
        if url.scheme not in ("http", "https") or not url.host:
            raise UserError(
                f"--endpoint is {address!r}; it must be an address such as http://127.0.0.1:8080, or an endpoint's name: "
                "projects/PROJECT/locations/REGION/endpoints/ID."
            )
        base = Endpoint(f"{url.scheme}://{url.netloc}")
        try:
            document = base.get("/openapi.json", retries=Patience.of(min(wait, FIRST_SECONDS)))
            route, version, schema = read_description(document)
        except UserError as error:
            raise UserError(
                f"{error} Is a server there? `make serve` starts one; --endpoint says where it is."
            ) from None
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{base.address} answers, but its /openapi.json is not a predictor's."
            ) from None
        if (url.path or "/") not in ("/", route):
            raise UserError(
                f"--endpoint is {address!r}; the server there predicts at {base.address}{route}."
            )
        return cls(Endpoint(base.address, route, wait, base.pool), version, schema)

    @classmethod
    def _open_cloud(cls, server: str, route: str, wait: float) -> "Server":
        endpoint = Endpoint(server, route, wait, cloud.pool(server, **CONNECTIONS), cloud.Bearer())
        try:
            _, version, schema = read_description(endpoint.post(DESCRIBE))
        except Refused as error:
            raise UserError(
                f"{server}{route} answers, but not as this project's predictor: {error}"
            ) from None
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{server}{route} answers, but not as this project's predictor."
            ) from None
        return cls(endpoint, version, schema)

    def probabilities(self, table: Mapping[str, Sequence[Any] | np.ndarray]) -> np.ndarray:
        """Probabilities, float64 (rows, classes), for columns of values.

        Raises:
            UserError: what the server says of a wrong row, or that it does not answer.
        """
        answers = self.ask(table, top=len(self.schema.classes))
        return np.array(
            [[answer["scores"][str(name)] for name in self.schema.classes] for answer in answers]
        )

    def ask(
        self, table: Mapping[str, Sequence[Any] | np.ndarray], **parameters: Any
    ) -> list[dict[str, Any]]:
        """The server's predictions for columns of values.

        Raises:
            UserError: what the server says of a wrong row, or that it does not answer.
        """
        require(self.schema.columns, table)
        rows = (
            len(next(iter(table.values()))) if table else 1
        )  # an empty object is a row too, if all columns are optional
        size = max(1, CELLS // len(self.schema.columns))
        predictions = []
        for start in range(0, rows, size):
            end = min(start + size, rows)
            instances = [self._instance(table, row) for row in range(start, end)]
            try:
                predictions += self.endpoint.ask(instances, **parameters)
            except Refused as error:
                raise UserError(f"the server refuses rows {start + 1} to {end}: {error}") from None
        return predictions

    def _instance(self, table: Mapping[str, Sequence[Any] | np.ndarray], row: int) -> list[Any]:
        try:
            return json_values(
                self.schema.columns, {name: values[row] for name, values in table.items()}
            )
        except ValueError as error:
            raise UserError(f"row {row + 1}, {error}") from None


def read_description(document: Mapping[str, Any]) -> tuple[str, int | None, Schema]:
    """The path of the predictions, the model's version and its schema, from its server's OpenAPI document.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not a predictor's.
    """
    (route,) = (path for path, methods in document["paths"].items() if "post" in methods)
    version = document["info"]["version"]
    return route, int(version) if version.isdecimal() else None, read_schema(document, route)


def read_schema(document: Mapping[str, Any], route: str) -> Schema:
    """The model's columns and classes from its server's OpenAPI document: the reverse of `contract.openapi`.

    Of a categorical column's categories it shows examples only.
    """
    schemas = document["components"]["schemas"]
    instance = schemas["Instance"]
    columns = []
    for name, column in instance["properties"].items():
        optional, examples = name not in instance["required"], tuple(column.get("examples", ()))
        columns.append(
            Column(
                name, "categorical" if "string" in column["type"] else "numeric", optional, examples
            )
        )
    label = document["paths"][route]["post"]["summary"].removeprefix("Predict ")
    return Schema(
        label, tuple(columns), tuple(schemas["Prediction"]["properties"]["label"]["enum"])
    )


def require(columns: Sequence[Column], names: Iterable[str]) -> None:
    """Check that the data have every column that the model needs.

    Raises:
        UserError: names those that are not there.
    """
    there = set(names)
    absent = [column.name for column in columns if column.name not in there and not column.optional]
    if absent:
        raise UserError(
            f"{len(absent)} column(s) of the model are not in the data: {', '.join(absent[:10])}."
        )


def json_values(columns: Sequence[Column], row: Mapping[str, Any]) -> list[Any]:
    """A row as the server takes it, in the columns' order: a number for a cell's text, null for a missing one.

    Raises:
        ValueError: names the column and the value that is not allowed.
    """
    values = []
    for column in columns:
        value = row.get(column.name)
        if column.kind == "numeric":
            try:
                number = parse_number(value)
            except ValueError:
                raise ValueError(
                    f"column '{column.name}': {value!r} is not a finite number."
                ) from None
            values.append(None if math.isnan(number) else number)
        else:
            values.append(None if value == "" else value)
    return values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line's options that say whom to ask."""
    parser.add_argument(
        "--endpoint",
        default="http://127.0.0.1:8080",
        help="the server's address, or the name of an endpoint in the cloud (%(default)s)",
    )
    parser.add_argument(
        "--wait",
        type=number_between(0, MOST_SECONDS),
        default=60.0,
        metavar="SECONDS",
        help="for how long a server that is down or too busy is asked again (%(default)s)",
    )


def number_between(least: float, most: float, kind: type[int] | type[float] = float) -> Any:
    """An argument's type: a number, within bounds."""

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = kind(least - 1)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least:g} to {most:g}")
        return number

    return parse
