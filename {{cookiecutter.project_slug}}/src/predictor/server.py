"""Serve a saved model over HTTP, under Vertex AI's serving contract (AIP_* variables).

python -m predictor.server --registry registry      the champion; replaced without dropping a request
python -m predictor.server --model-dir runs/ID/model
AIP_STORAGE_URI=/model AIP_HTTP_PORT=8080 python -m predictor.server      as Vertex AI starts it
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from core.errors import UserError, run_command
from predictor import contract
from predictor.contract import BadRequest
from predictor.models import ChampionModel, LoadedModel, StaticModel, log, open_source

ALL_INTERFACES = "0.0.0.0"  # noqa: S104  only in a container
# A larger body (some hundred rows) is answered in a thread, so that it does not delay other requests.
THREAD_BYTES = 64 * 1024
MAX_BYTES = 10_000_000  # Vertex AI's limit: 1.5 MB on shared public endpoints, 10 MB on dedicated
# Longer than a load balancer keeps its connections: if the server closes first, requests are lost.
KEEP_ALIVE_SECONDS = 75
GRACE_SECONDS = 25  # after SIGTERM, for requests in progress
MAX_CONNECTIONS = 2000  # more get status 503


@dataclass(frozen=True)
class Options:
    """Address, routes and limits of the server."""

    host: str = "127.0.0.1"
    port: int = 8080
    health: str = "/health"
    predict: str = "/predict"
    max_bytes: int = MAX_BYTES

    @classmethod
    def read(cls, arguments: argparse.Namespace, environ: Mapping[str, str]) -> "Options":
        """Read the command line first, then the AIP_* variables."""
        in_cloud = any(environ.get(name) for name in ("AIP_HTTP_PORT", "AIP_STORAGE_URI"))
        port = arguments.port or environ.get("AIP_HTTP_PORT") or "8080"
        max_bytes = environ.get("PREDICT_MAX_BYTES") or str(MAX_BYTES)
        return cls(
            host=arguments.host or (ALL_INTERFACES if in_cloud else "127.0.0.1"),
            port=_number("--port" if arguments.port else "AIP_HTTP_PORT", port, 0, 65535),
            health=_route("AIP_HEALTH_ROUTE", environ.get("AIP_HEALTH_ROUTE") or "/health"),
            predict=_route("AIP_PREDICT_ROUTE", environ.get("AIP_PREDICT_ROUTE") or "/predict"),
            max_bytes=_number("PREDICT_MAX_BYTES", max_bytes, 1, 2**31),
        )


def _number(name: str, text: str, least: int, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise UserError(f"{name} is {text!r}; it must be a number from {least} to {most}.")
    return int(text)


def _route(name: str, text: str) -> str:
    if not re.fullmatch(r"/[^\s{}?#]*", text):
        raise UserError(f"{name} is {text!r}; it must be a path such as /predict.")
    return text


def create_app(source: StaticModel | ChampionModel, options: Options) -> FastAPI:
    """Create the application: predict, health and /openapi.json."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(source.follow())
        yield
        task.cancel()

    async def predict(request: Request) -> Response:
        body = await _read_body(request, options.max_bytes)
        if contract.asks_for_openapi(body):
            return await openapi(request)
        # One reference for the whole request, even if the champion changes meanwhile.
        loaded = source.current
        if len(body) > THREAD_BYTES:
            content = await asyncio.to_thread(contract.answer, loaded.model, loaded.version, body)
        else:
            content = contract.answer(loaded.model, loaded.version, body)
        return Response(content, media_type="application/json")

    async def health(_: Request) -> Response:
        loaded = source.current
        document = {"version": loaded.version, "manifest_sha256": loaded.manifest_sha256}
        return _json({"status": "ok", **document})

    async def openapi(_: Request) -> Response:
        schema, version = source.current.model.schema, source.current.version
        return _json(contract.openapi(schema, version, options.predict, options.health))

    async def bad_request(_: Request, error: Any) -> Response:
        # The rest of a body that is too large is not read.
        headers = {"connection": "close"} if error.status == 413 else None
        return _json({"error": str(error)}, error.status, headers)

    async def no_route(request: Request, error: Any) -> Response:
        routes = f"POST {options.predict}, GET {options.health} and GET /openapi.json"
        message = f"{error.detail}: {request.method} {request.url.path}; the routes are {routes}."
        return _json({"error": message}, error.status_code, error.headers)

    async def crash(_: Request, __: Exception) -> Response:
        return _json({"error": "internal error; see the server's log."}, 500)

    handlers: dict[Any, Any] = {BadRequest: bad_request, HTTPException: no_route, Exception: crash}
    # /docs is off: its page loads scripts from a public network.
    app = FastAPI(
        openapi_url=None, redirect_slashes=False, lifespan=lifespan, exception_handlers=handlers
    )
    # Plain routes: contract.py validates the body once, against the schema of the current model.
    app.add_route(options.predict, predict, methods=["POST"])
    app.add_route(options.health, health, methods=["GET"])
    app.add_route("/openapi.json", openapi, methods=["GET"])
    return app


async def _read_body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                message = f"the body is larger than {max_bytes:,} bytes; send fewer instances."
                raise BadRequest(message, status=413)
    except ClientDisconnect:
        raise BadRequest("the client disconnected before its body was complete.") from None
    return bytes(body)


def _json(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # ASCII: a client's text may have unpaired surrogates, which UTF-8 cannot encode.
    content = json.dumps(document).encode()
    return Response(content, status, headers, media_type="application/json")


def create_server(source: StaticModel | ChampionModel, options: Options) -> uvicorn.Server:
    """Create the uvicorn server; on SIGTERM it finishes the requests in progress."""
    config = uvicorn.Config(
        create_app(source, options),
        http="h11",  # limits the size of a request's head; httptools under uvicorn does not
        log_level="warning",
        access_log=False,
        ws="none",
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        h11_max_incomplete_event_size=16 * 1024,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket; requests wait in it until the server starts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = (error.strerror or str(error)).split(" (while")[0]  # without the address again
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason}. "
            f"Another port: make serve PORT={port + 1}"
        ) from None


def greeting(loaded: LoadedModel, address: tuple[Any, ...], options: Options) -> str:
    """Return the first line of the log: what is served, where, and a command to try it."""
    host, port = address[:2]
    if host in (ALL_INTERFACES, "::"):
        host = "localhost"
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    what = "a model" if loaded.version is None else f"version {loaded.version}"
    body = json.dumps({"instances": [contract.example(loaded.model.schema)]}, ensure_ascii=False)
    command = f"curl {url}{options.predict} -d {shlex.quote(body)}"
    return f"serving {what} at {url}{options.predict}, API: {url}/openapi.json; try: {command}"


def parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    command = argparse.ArgumentParser(
        prog="python -m predictor.server", description="Serve a saved model over HTTP."
    )
    what = command.add_mutually_exclusive_group()
    what.add_argument("--registry", type=Path, help="serve the champion of this registry")
    what.add_argument("--model-dir", type=Path, help="a saved model (default: AIP_STORAGE_URI)")
    command.add_argument("--port", help="default: AIP_HTTP_PORT or 8080; 0: any free port")
    command.add_argument(
        "--host", help="default: 127.0.0.1; all interfaces if an AIP_* variable is set"
    )
    return command


def main() -> None:
    """Run the server until SIGTERM or Ctrl-C."""
    # uvicorn raises the signal again after its shutdown; that is a normal end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    arguments = parser().parse_args()
    options = Options.read(arguments, os.environ)
    source = open_source(arguments, os.environ)
    with listen(options.host, options.port) as listener:
        log(greeting(source.current, listener.getsockname(), options))
        create_server(source, options).run(sockets=[listener])


if __name__ == "__main__":
    run_command(main)
