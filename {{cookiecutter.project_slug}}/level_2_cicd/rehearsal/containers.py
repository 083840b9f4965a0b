"""Run the custom jobs and model servers of the fake of Vertex AI with Docker.

Only worker pool 0 of a job runs, without accelerators. As on Vertex AI, a job has the buckets at
/gcs and a server does not.
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
from typing import Any

from level_2_cicd.rehearsal.server import ApiError, Response

LAST_LINES = 12
HEALTHY_SECONDS = 60.0  # until a server must be healthy
GRACE = 10  # seconds between SIGTERM and SIGKILL
# Files that a job writes belong to the user who runs this, not to root.
UNPRIVILEGED = ("--user", f"{os.getuid()}:{os.getgid()}")


class Containers:
    """Start containers, and stop the running ones on close.

    Args:
        storage_root: the folder of the buckets, as in FakeStorage.
        images: local images by their names in the cloud; others have the same name.
        storage_address: address of FakeStorage; servers download their model from it.
    """

    def __init__(
        self,
        storage_root: Path,
        *,
        images: Mapping[str, str] | None = None,
        storage_address: str = "",
    ) -> None:
        self.storage_root, self.storage_address = Path(storage_root), storage_address
        self.images = dict(images or {})
        self.started: list[Container] = []
        self._logs = tempfile.TemporaryDirectory(prefix="rehearsal-")

    def close(self) -> None:
        """Stop the running containers and remove the logs."""
        # Stop all at once, then wait for each: one after the other would take longer.
        for container in self.started:
            container.stop(grace=0)
        for container in self.started:
            container.process.wait()
        self._logs.cleanup()

    def start_job(self, job: Any) -> "Container":
        """Start worker pool 0 of a custom job."""
        spec = job.job_spec.worker_pool_specs[0].container_spec
        self.storage_root.mkdir(parents=True, exist_ok=True)
        folders = {}
        # Vertex AI sets these variables only with a base output directory.
        if prefix := job.job_spec.base_output_directory.output_uri_prefix.rstrip("/"):
            folders = {
                "AIP_MODEL_DIR": f"{prefix}/model/",
                "AIP_CHECKPOINT_DIR": f"{prefix}/checkpoints/",
                "AIP_TENSORBOARD_LOG_DIR": f"{prefix}/logs/",
            }
        return self._run(spec, ["--volume", f"{self.storage_root.resolve()}:/gcs"], folders)

    def start_server(self, model: Any, deployed: Any) -> "ModelServer":
        """Start a deployed model's container on a free port instead of the model's port."""
        # Several servers share this machine's network, so the model's port may be in use.
        spec, port = model.container_spec, free_port()
        default = f"/v1/endpoints/0/deployedModels/{deployed.id}"
        routes = {
            "AIP_HEALTH_ROUTE": spec.health_route or default,
            "AIP_PREDICT_ROUTE": spec.predict_route or f"{default}:predict",
        }
        variables = {**routes, "AIP_HTTP_PORT": str(port), "AIP_MODE": "PREDICTION"}
        variables["AIP_STORAGE_URI"] = model.artifact_uri
        if self.storage_address:
            variables["STORAGE_EMULATOR_HOST"] = self.storage_address
        container = self._run(spec, [], variables)
        deadline = time.monotonic() + HEALTHY_SECONDS
        return ModelServer(container, f"http://127.0.0.1:{port}", routes, deadline)

    def _run(self, spec: Any, options: list[str], variables: dict[str, str]) -> "Container":
        """Start a container; Vertex AI's variables override those of the spec."""
        # Unique across processes and repeated runs: Docker rejects a name that is in use.
        name = f"rehearsal-{os.getpid()}-{len(self.started) + 1}-{time.time_ns() % 1_000_000}"
        variables = {variable.name: variable.value for variable in spec.env} | variables
        # Never pull: a missing image must fail at once, without network.
        words = ["docker", "run", "--rm", "--pull", "never", "--name", name]
        words += ["--network", "host", *UNPRIVILEGED, *options]  # the fakes are on loopback
        for key, value in variables.items():
            words += ["--env", f"{key}={value}"]
        command = list(spec.command)  # replaces the image's ENTRYPOINT
        words += ["--entrypoint", command[0]] if command else []
        words += [self.images.get(spec.image_uri, spec.image_uri), *command[1:], *spec.args]
        container = Container(name, words, Path(self._logs.name, f"{name}.log"))
        self.started.append(container)
        return container


class Container:
    """One `docker run` in the foreground of a process."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self.log = name, log
        # A file, not a pipe: a full pipe would block a container that logs much.
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
        self._stopping: threading.Thread | None = None

    def last_lines(self) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LAST_LINES:])

    def poll(self) -> tuple[int, str] | None:
        """Return the exit code and the last lines of the log; None while it runs."""
        code = self.process.poll()
        return None if code is None else (code, self.last_lines())

    def stop(self, grace: int = GRACE) -> None:
        """Send SIGTERM, and SIGKILL after some seconds, in the background."""
        if self._stopping is None and self.process.poll() is None:
            self._stopping = threading.Thread(target=self._stop, args=[grace])
            self._stopping.start()

    def _stop(self, grace: int) -> None:
        # Repeat, because Docker may not have created the container yet.
        while self.process.poll() is None:
            command = ["docker", "stop", "--time", str(grace), self.name]
            subprocess.run(command, capture_output=True, check=False)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)


class ModelServer:
    """A deployed model's container."""

    def __init__(
        self, container: Container, address: str, routes: Mapping[str, str], deadline: float
    ) -> None:
        self.container, self.address = container, address
        self.routes, self.deadline = routes, deadline

    def ready(self) -> bool:
        """Return whether it is healthy; raise ApiError if it exited or missed the deadline."""
        # Check the process first: a server that exited will never respond.
        exit_status = self.container.poll()
        if exit_status is not None:
            code, lines = exit_status
            raise ApiError(400, f"Model server exited unexpectedly with {code}. {lines}")
        if self._request(self.routes["AIP_HEALTH_ROUTE"], None, 1.0).status == 200:
            return True
        if time.monotonic() > self.deadline:
            self.stop()  # a failed deployment leaves no server behind
            raise ApiError(400, f"Model server never became ready. {self.container.last_lines()}")
        return False

    def predict(self, body: bytes) -> Response:
        """Send a body to the server and return its response."""
        return self._request(self.routes["AIP_PREDICT_ROUTE"], body, 60.0)

    def stop(self) -> None:
        """Stop the container."""
        self.container.stop()

    def _request(self, path: str, body: bytes | None, timeout: float) -> Response:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}{path}", body, headers)
        try:
            response: Any = urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            response = error  # an error status is the server's response, to be passed on
        except OSError as error:
            return Response(json.dumps({"error": str(error)}).encode(), 503, headers)
        with response:
            kind = response.headers["Content-Type"] or "text/plain"
            return Response(response.read(), response.status, {"Content-Type": kind})


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
