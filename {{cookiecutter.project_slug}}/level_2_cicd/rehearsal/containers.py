"""Runs with Docker what the double of Vertex AI is asked to run: a custom job's container, a deployed model's server.

Only worker pool 0 runs, without its accelerators. A job sees the buckets at /gcs, as on Vertex AI; a server does not.
"""

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rehearsal.server import ApiError, Response

LAST_LINES = 12
GRACE = 10  # seconds between SIGTERM and SIGKILL
UNPRIVILEGED = ("--user", f"{os.getuid()}:{os.getgid()}")  # so that what a job writes belongs to whoever runs this


class Containers:
    """Starts containers, and ends those that still run when it is closed.

    Args:
        storage_root: the folder that holds the buckets, as storage.Storage keeps them.
        network: Docker's network; "host" reaches the doubles on loopback.
        images: {an image as the cloud names it: an image that Docker has here}; others are taken by their own name.
        storage_address: the double of Cloud Storage, for servers, which fetch their model themselves.
        patience: seconds until a server must be healthy.
    """

    def __init__(
        self,
        storage_root: Path,
        *,
        network: str = "host",
        images: Mapping[str, str] | None = None,
        storage_address: str = "",
        patience: float = 60.0,
    ) -> None:
        self.storage_root, self.network, self.images = Path(storage_root), network, dict(images or {})
        self.storage_address, self.patience = storage_address, patience
        self.started: list[Container] = []
        self._logs = tempfile.TemporaryDirectory(prefix="rehearsal-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End what still runs, and remove the logs."""
        for container in self.started:
            container.stop(grace=0)
        for container in self.started:
            container.process.wait()
        self._logs.cleanup()

    def run(self, image: str, options: list[str], environment: Mapping[str, str], command: list[str]) -> "Container":
        """Start a container; `command` stands after the image."""
        name = f"rehearsal-{os.getpid()}-{len(self.started) + 1}-{time.time_ns() % 1_000_000}"
        variables = [word for key, value in environment.items() for word in ("--env", f"{key}={value}")]
        fixed = ["--rm", "--pull", "never", "--name", name, "--network", self.network, *UNPRIVILEGED]
        line = ["docker", "run", *fixed, *options, *variables, self.images.get(image, image), *command]
        container = Container(name, line, Path(self._logs.name, f"{name}.log"))
        self.started.append(container)
        return container

    def start_job(self, job: Any) -> "Container":
        """Start worker pool 0 of a custom job."""
        spec = job.job_spec.worker_pool_specs[0].container_spec
        command = list(spec.command)  # it takes the place of the image's ENTRYPOINT
        self.storage_root.mkdir(parents=True, exist_ok=True)
        options = ["--volume", f"{self.storage_root.resolve()}:/gcs"]
        options += ["--entrypoint", command[0]] if command else []
        environment = {variable.name: variable.value for variable in spec.env}
        if prefix := job.job_spec.base_output_directory.output_uri_prefix.rstrip("/"):
            environment["AIP_MODEL_DIR"] = f"{prefix}/model/"
            environment["AIP_CHECKPOINT_DIR"] = f"{prefix}/checkpoints/"
            environment["AIP_TENSORBOARD_LOG_DIR"] = f"{prefix}/logs/"
        return self.run(spec.image_uri, options, environment, [*command[1:], *spec.args])

    def start_server(self, model: Any, deployed: Any) -> "ModelServer":
        """Start a deployed model's container, on a free port in place of its own."""
        spec = model.container_spec
        port = free_port()
        routes = {
            "AIP_HEALTH_ROUTE": spec.health_route or f"/v1/endpoints/0/deployedModels/{deployed.id}",
            "AIP_PREDICT_ROUTE": spec.predict_route or f"/v1/endpoints/0/deployedModels/{deployed.id}:predict",
        }
        environment = {variable.name: variable.value for variable in spec.env}
        environment |= {**routes, "AIP_HTTP_PORT": str(port), "AIP_STORAGE_URI": model.artifact_uri, "AIP_MODE": "PREDICTION"}
        if self.storage_address:
            environment["STORAGE_EMULATOR_HOST"] = self.storage_address
        command = list(spec.command)
        options = ["--entrypoint", command[0]] if command else []
        options += [] if self.network == "host" else ["--publish", f"127.0.0.1:{port}:{port}"]
        container = self.run(spec.image_uri, options, environment, [*command[1:], *spec.args])
        return ModelServer(container, f"http://127.0.0.1:{port}", routes, time.monotonic() + self.patience)


class Container:
    """One run of `docker run`, in the foreground of a process of its own."""

    def __init__(self, name: str, line: list[str], log: Path) -> None:
        self.name, self.path = name, log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT)
        self._stopping: threading.Thread | None = None

    def log(self) -> str:
        """What it has printed so far."""
        return self.path.read_text(errors="replace")

    def last_lines(self) -> str:
        """What it printed last."""
        return "\n".join(self.log().splitlines()[-LAST_LINES:])

    def poll(self) -> tuple[int, str] | None:
        """None while it runs; then its exit code and last lines."""
        code = self.process.poll()
        return None if code is None else (code, self.last_lines())

    def stop(self, grace: int = GRACE) -> None:
        """Send SIGTERM, and SIGKILL after so many seconds; returns at once."""
        if self._stopping is None and self.process.poll() is None:
            self._stopping = threading.Thread(target=self._stop, args=[grace])
            self._stopping.start()

    def _stop(self, grace: int) -> None:
        while self.process.poll() is None:  # Docker may not have made the container yet
            subprocess.run(["docker", "stop", "--time", str(grace), self.name], capture_output=True, check=False)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)


class ModelServer:
    """A deployed model's container."""

    def __init__(self, container: Container, address: str, routes: Mapping[str, str], deadline: float) -> None:
        self.container, self.address, self.routes, self.deadline = container, address, routes, deadline

    def ready(self) -> bool:
        """Whether it is healthy.

        Raises:
            ApiError: it has ended, or is not healthy in time; the text holds its last lines.
        """
        ended = self.container.poll()
        if ended is not None:
            raise ApiError(400, f"Model server exited unexpectedly with {ended[0]}. {ended[1]}")
        if self._ask(self.routes["AIP_HEALTH_ROUTE"], None, 1.0).status == 200:
            return True
        if time.monotonic() > self.deadline:
            self.container.stop()
            raise ApiError(400, f"Model server never became ready. {self.container.last_lines()}")
        return False

    def predict(self, body: bytes) -> Response:
        """What it answers to a body."""
        return self._ask(self.routes["AIP_PREDICT_ROUTE"], body, 60.0)

    def stop(self) -> None:
        """End it."""
        self.container.stop()

    def _ask(self, route: str, body: bytes | None, seconds: float) -> Response:
        request = urllib.request.Request(f"{self.address}{route}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return Response(answer.read(), answer.status, {"Content-Type": answer.headers["Content-Type"] or "text/plain"})
        except urllib.error.HTTPError as error:
            return Response(error.read(), error.code, {"Content-Type": error.headers["Content-Type"] or "text/plain"})
        except OSError as error:
            return Response(json.dumps({"error": str(error)}).encode(), 503, {"Content-Type": "application/json"})


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
