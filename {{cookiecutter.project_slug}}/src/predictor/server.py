"""Serve a saved model over HTTP, under the cloud's serving contract.

python -m predictor.server --registry registry      the champion; a new one is picked up without dropping a request
python -m predictor.server --model-dir runs/ID/model
AIP_STORAGE_URI=/model AIP_HTTP_PORT=8080 python -m predictor.server      as the cloud starts it
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
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from core import manifest
from core.errors import UserError, run_command
from core.onnx_model import Model
from core.registry import LocalRegistry, Registry, Version
from gcp import storage
from predictor import contract
from predictor.connection import Connection, allow_files, most_connections
from predictor.contract import BadRequest

ALL_INTERFACES = "0.0.0.0"  # noqa: S104  the cloud asks for it; a laptop's server is for the laptop alone
POLL_SECONDS = 0.25  # how often the registry is asked for its champion
THREAD_BYTES = (
    64 * 1024
)  # a larger body, some hundred rows, is answered in a thread, so that others need not wait for it
MAX_BYTES = (
    10_000_000  # the cloud's own limit: 1.5 MB on shared public endpoints, 10 MB on dedicated ones
)
KEEP_ALIVE_SECONDS = (
    75  # longer than load balancers keep a connection: they, not we, are to close it
)
READ_SECONDS = 60  # in which a client must take some of its answer
GRACE_SECONDS = 25  # after SIGTERM, for requests under way
LINGER_SECONDS = (
    3  # after SIGTERM, for requests that a client is just about to send on a connection it has
)


@dataclass(frozen=True)
class Served:
    """A model that has answered once, and its version in the registry, if it has one."""

    model: Model
    manifest_sha256: str
    version: int | None = None

    @classmethod
    def load(cls, folder: Path, version: int | None = None) -> "Served":
        """Verify the saved model, start it and ask it once: the first request is as quick as the second.

        Raises:
            UserError: there is no model, it is damaged, or does not answer.
        """
        model = Model.load(folder)
        instance = json.dumps({"instances": [contract.example(model.schema)]}).encode()
        try:
            contract.answer(model, version, instance)
        except Exception as error:
            raise UserError(f"the model in {folder} loads but does not answer: {error}") from None
        return cls(model, manifest.sha256(folder / manifest.NAME), version)


class Fixed:
    """One model, from start to end."""

    def __init__(self, folder: Path) -> None:
        self.served = Served.load(folder)

    async def follow(self) -> None:
        """There is nothing to follow."""


class Champion:
    """The registry's champion. A new one is loaded beside the old one; then one reference changes."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._refused: object = None
        version = registry.champion()
        if version is None:
            raise UserError(
                "the registry has no champion yet. `make level1` trains, tests and registers one."
            )
        self._mark = _mark(version)
        self.served = Served.load(version.model, version.number)

    async def follow(self) -> None:
        """Ask for a new champion now and then; whatever is wrong with it, the old one is served on."""
        told = ""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            problem = ""
            try:
                await asyncio.to_thread(self.update)
            except Exception as error:
                problem = str(error) or repr(error)
                if problem != told:
                    log(
                        f"still serving version {self.served.version}; the new champion cannot be served: {problem}"
                    )
            told = problem

    def update(self) -> None:
        """Load the champion if it is another one.

        Raises:
            UserError: there is none any more, or it is damaged. A damaged one is not tried again until something changes.
        """
        version = self.registry.champion()
        if version is None:
            raise UserError("the registry names no champion any more")
        if (mark := _mark(version)) in (self._mark, self._refused):
            return
        try:
            served = Served.load(version.model, version.number)
        except UserError:
            self._refused = mark
            raise
        self.served, self._mark = served, mark
        log(f"serving version {version.number}")


def _mark(version: Version) -> tuple[int, int]:
    """Tells champions apart: by number, and by the manifest's age, because a registry may be deleted and begun anew."""
    try:
        return version.number, (version.model / manifest.NAME).stat().st_mtime_ns
    except OSError:
        return version.number, 0


@dataclass(frozen=True)
class Options:
    """Where the server listens, and what it takes."""

    host: str = "127.0.0.1"
    port: int = 8080
    health: str = "/health"
    predict: str = "/predict"
    max_bytes: int = MAX_BYTES

    @classmethod
    def read(cls, arguments: argparse.Namespace, environ: Mapping[str, str]) -> "Options":
        """From the command line first, then from the cloud's variables.

        Raises:
            UserError: names the variable and what it may hold.
        """
        in_cloud = any(environ.get(name) for name in ("AIP_HTTP_PORT", "AIP_STORAGE_URI"))
        port = arguments.port or environ.get("AIP_HTTP_PORT") or "8080"
        return cls(
            host=arguments.host or (ALL_INTERFACES if in_cloud else "127.0.0.1"),
            port=_number("--port" if arguments.port else "AIP_HTTP_PORT", port, 0, 65535),
            health=_route("AIP_HEALTH_ROUTE", environ.get("AIP_HEALTH_ROUTE") or "/health"),
            predict=_route("AIP_PREDICT_ROUTE", environ.get("AIP_PREDICT_ROUTE") or "/predict"),
            max_bytes=_number(
                "PREDICT_MAX_BYTES", environ.get("PREDICT_MAX_BYTES") or str(MAX_BYTES), 1, 2**31
            ),
        )


def _number(name: str, text: str, least: int, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise UserError(f"{name} is {text!r}; it must be a number from {least} to {most}.")
    return int(text)


def _route(name: str, text: str) -> str:
    if not re.fullmatch(r"/[^\s{}?#]*", text):
        raise UserError(f"{name} is {text!r}; it must be a path such as /predict.")
    return text


def create_app(source: Fixed | Champion, options: Options | None = None) -> FastAPI:
    """The web application: predict, health, and /openapi.json."""
    options = options or Options()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(source.follow())
        yield
        following.cancel()

    async def predict(request: Request) -> Response:
        body = await _read_body(request, options.max_bytes)
        served = (
            source.served
        )  # this one until the answer is given, whatever the champion does meanwhile
        if contract.asks_for_openapi(body):
            return await openapi(request)
        if len(body) > THREAD_BYTES:
            return _json(
                await asyncio.to_thread(contract.answer, served.model, served.version, body)
            )
        return _json(contract.answer(served.model, served.version, body))

    async def health(_: Request) -> Response:
        served = source.served
        return _json(
            {"status": "ok", "version": served.version, "manifest_sha256": served.manifest_sha256}
        )

    async def openapi(_: Request) -> Response:
        served = source.served
        return _json(
            contract.openapi(served.model.schema, served.version, options.predict, options.health)
        )

    async def refuse(_: Request, error: Any) -> Response:
        return _json({"error": str(error)}, error.status)

    async def no_route(request: Request, error: Any) -> Response:
        known = f"POST {options.predict}, GET {options.health} and GET /openapi.json"
        message = f"{error.detail}: {request.method} {request.url.path}; there are {known}."
        return _json({"error": message}, error.status_code, error.headers)

    async def crash(_: Request, __: Exception) -> Response:
        return _json({"error": "the server failed; its log says why."}, 500)

    handlers: dict[Any, Any] = {BadRequest: refuse, HTTPException: no_route, Exception: crash}
    # /docs is off: its page loads scripts from a public network.
    app = FastAPI(
        openapi_url=None, redirect_slashes=False, lifespan=lifespan, exception_handlers=handlers
    )
    # Plain routes: the body is parsed and checked once, by the model's own schema, and not again by a class made for it.
    app.add_route(options.predict, predict, methods=["POST"])
    app.add_route(options.health, health, methods=["GET"])
    app.add_route("/openapi.json", openapi, methods=["GET"])
    return app


async def _read_body(request: Request, most: int) -> bytes:
    """The body, given up as soon as it is too large."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise BadRequest(
                    f"the body is larger than {most:,} bytes; send fewer instances at once.",
                    status=413,
                )
    except ClientDisconnect:
        raise BadRequest("the client hung up before its body was complete.") from None
    return bytes(body)


def _json(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response; escaped to ASCII, because a client's text may hold halves of characters that UTF-8 cannot write."""
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    return Response(content, status, headers, media_type="application/json")


class Server(uvicorn.Server):
    """uvicorn, which ends without dropping a request that was sent.

    By itself it closes a connection between two requests although the second may be on its way, and forgets connections
    that the system took and it did not yet.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new connections, and end each that is open with its next answer, or after LINGER_SECONDS."""
        self.server_state.default_headers.append((b"connection", b"close"))
        waiting = [
            connection for listener in sockets or [] for connection in _take_waiting(listener)
        ]
        for server in self.servers:  # at once: who connects between these two lines is cut off
            server.close()
        await self._adopt(waiting)
        limit = time.monotonic() + LINGER_SECONDS
        while self.server_state.connections and time.monotonic() < limit and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)

    async def _adopt(self, connections: list[socket.socket]) -> None:
        """Answer on connections that were accepted here and not by the event loop."""
        parts: dict[str, Any] = {
            "config": self.config,
            "server_state": self.server_state,
            "app_state": self.lifespan.state,
        }
        protocol: Any = self.config.http_protocol_class
        for connection in connections:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol(**parts), connection
            )


def _take_waiting(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that wait in a listening socket."""
    with contextlib.suppress(BlockingIOError):
        while True:
            yield listener.accept()[0]


def create_server(source: Fixed | Champion, options: Options) -> Server:
    """The application in uvicorn, which on SIGTERM finishes the requests under way and takes no more."""
    config = uvicorn.Config(
        create_app(source, options),
        http=Connection,
        backlog=min(
            2048, most_connections() // 8
        ),  # so many are accepted in one go, before any is counted
        log_level="warning",
        access_log=False,
        ws="none",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return Server(config)


def open_source(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Fixed | Champion:
    """The model that the command line or AIP_STORAGE_URI names, loaded.

    Raises:
        UserError: none is named, or it cannot be served.
    """
    if arguments.registry:
        try:
            return Champion(LocalRegistry(arguments.registry))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the registry in {arguments.registry} cannot be read: {error!r}."
            ) from None
    if arguments.model_dir:
        return Fixed(arguments.model_dir)
    if environ.get("AIP_STORAGE_URI"):
        uri = environ["AIP_STORAGE_URI"]
        with fetched(uri) as folder:
            try:
                return Fixed(folder)
            except UserError as error:
                raise UserError(str(error).replace(str(folder), uri)) from None
    raise UserError(
        "say what to serve: --registry FOLDER, --model-dir FOLDER, or the variable AIP_STORAGE_URI."
    )


@contextlib.contextmanager
def fetched(uri: str) -> Iterator[Path]:
    """The folder of a saved model, wherever it is; copied from a bucket, it is there until the model is loaded.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if "://" not in uri:
        yield Path(uri)
        return
    if not uri.startswith("gs://"):
        raise UserError(
            f"AIP_STORAGE_URI is {uri!r}; it must be a folder, or an address such as gs://BUCKET/FOLDER."
        )
    try:
        temporary = tempfile.TemporaryDirectory(prefix="model-")
    except OSError as error:
        raise UserError(
            f"{uri} cannot be copied here: {error.strerror}. A container may want --tmpfs /tmp."
        ) from None
    with temporary as folder:
        yield fetch(uri.rstrip("/"), Path(folder))


def fetch(uri: str, into: Path) -> Path:
    """The folder of a bucket's saved model: those files that its manifest names, and no others.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    folder = storage.fetch(f"{uri}/{manifest.NAME}", into).parent
    for name in manifest.parse(folder)["files"]:
        storage.fetch(f"{uri}/{name}", into)
    return folder


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; requests wait in it until the server takes them.

    Raises:
        UserError: the port is taken, or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = (error.strerror or str(error)).split(" (while")[0]  # the address is named already
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason}. Another port: make serve PORT={port + 1}"
        ) from None
    # Connections inherit it. Without, head and body of an answer, written apart, may travel 40 ms apart.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(
        socket, "TCP_USER_TIMEOUT"
    ):  # Linux ends a connection whose client takes nothing of its answer
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * READ_SECONDS)
    return listener


def greeting(served: Served, address: tuple[Any, ...], options: Options) -> str:
    """What is served, where, and a command to try it."""
    host, port = address[:2]
    if host in (ALL_INTERFACES, "::"):
        host = "localhost"
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    what = "a model" if served.version is None else f"version {served.version}"
    body = json.dumps({"instances": [contract.example(served.model.schema)]}, ensure_ascii=False)
    try_it = f"curl {url}{options.predict} -d {shlex.quote(body)}"
    return (
        f"serving {what} at {url}{options.predict}, described at {url}/openapi.json; try: {try_it}"
    )


def log(line: str) -> None:
    """One line to standard error."""
    print(line.replace("\n", " "), file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    command = argparse.ArgumentParser(
        prog="python -m predictor.server", description="Serve a saved model over HTTP."
    )
    what = command.add_mutually_exclusive_group()
    what.add_argument("--registry", type=Path, help="a registry's folder: its champion is served")
    what.add_argument(
        "--model-dir", type=Path, help="a saved model's folder; without either, AIP_STORAGE_URI's"
    )
    command.add_argument(
        "--port", help="otherwise AIP_HTTP_PORT, or 8080; 0 takes any that is free"
    )
    command.add_argument(
        "--host", help="otherwise all interfaces in the cloud, and this machine alone elsewhere"
    )
    return command


def main() -> None:
    """Command line."""
    # uvicorn finishes the requests under way, then raises the signal again: stopping a server is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    arguments = parser().parse_args()
    options = Options.read(arguments, os.environ)
    source = open_source(arguments, os.environ)
    allow_files()
    with listen(options.host, options.port) as listener:
        log(greeting(source.served, listener.getsockname(), options))
        create_server(source, options).run(sockets=[listener])


if __name__ == "__main__":
    run_command(main)
