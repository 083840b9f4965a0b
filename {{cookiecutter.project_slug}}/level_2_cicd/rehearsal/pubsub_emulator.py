"""Deliver events on this machine with the Cloud SDK's Pub/Sub emulator and the trigger function.

    with PubSubEmulator() as pubsub, TriggerFunction(project, variables) as function:
        pubsub.create_topic("projects/my-project/topics/requests", schema)
        pubsub.subscribe("projects/my-project/topics/requests", function.address)

Like Pub/Sub, the emulator pushes, checks a topic's schema and redelivers. It ignores the filter of
a subscription, sends no deliveryAttempt and no token, and loses messages with a retryPolicy.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from level_2_cicd.rehearsal.containers import free_port

Json = dict[str, Any]
START_SECONDS = 90


class EmulatorNotFound(Exception):
    """The Cloud SDK is not installed."""


class EmulatorError(Exception):
    """An error response of the emulator."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Process(ABC):
    """A server process in its own session, so that its children are killed with it."""

    def __init__(self, log: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.log = log or self.folder / "log"
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        """Return host and port, 127.0.0.1:PORT."""
        return f"127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        """Return the base URL, http://127.0.0.1:PORT."""
        return f"http://{self.host}"

    @property
    def pid(self) -> int:
        """Return the process ID; 0 while it does not run."""
        return self._process.pid if self._process else 0

    @abstractmethod
    def command(self) -> tuple[list[str], dict[str, str]]:
        """Return the command line and its environment."""

    def start(self) -> None:
        """Start the process and wait until it listens."""
        words, variables = self.command()
        # Append: a restarted server keeps the log of its earlier run.
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                words, env=variables, stdout=out, stderr=out, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not listens(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                log = self.log.read_text(encoding="utf-8")
                raise RuntimeError(f"{' '.join(words)} does not listen:\n{log}")
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill the process and its children, as a machine failure does."""
        if self._process:
            # The whole process group: gcloud starts Java and would leave it running.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def terminate(self, seconds: float = 30) -> int:
        """Send SIGTERM and return the exit code."""
        if self._process is None:
            raise RuntimeError("the process does not run")
        self._process.terminate()
        code = self._process.wait(seconds)
        self.kill()  # children that SIGTERM has left
        return code

    def lines(self) -> list[Json]:
        """Return the JSON objects in the log, one per line."""
        # Other lines are plain text, for example of the web server.
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()


class PubSubEmulator(Process):
    """The emulator; PUBSUB_EMULATOR_HOST=`host` sends Google's clients to it."""

    def command(self) -> tuple[list[str], dict[str, str]]:
        """Return the gcloud command and its environment."""
        gcloud = shutil.which("gcloud")
        if not gcloud:
            raise EmulatorNotFound("the Cloud SDK is not installed")
        words = [gcloud, "beta", "emulators", "pubsub", "start", "--project=rehearsal"]
        words += [f"--host-port={self.host}", f"--data-dir={self.folder}"]
        # A separate configuration leaves the user's untouched; a prompt would block the start.
        config = {"CLOUDSDK_CONFIG": str(self.folder), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
        return words, {**os.environ, **config}

    def call(self, method: str, path: str, body: Json | None = None) -> Json:
        """Send a request to the emulator's REST API."""
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        uri = f"{self.address}/v1/{path}"
        request = urllib.request.Request(uri, content, headers, method=method)
        # A proxy of the environment cannot reach loopback.
        no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with no_proxy.open(request, timeout=60) as response:
                document: Json = json.load(response)
                return document
        except urllib.error.HTTPError as error:
            with error:
                message = error.read().decode(errors="replace")
                raise EmulatorError(error.code, message) from None

    def create_topic(self, name: str, schema: str = "") -> None:
        """Create projects/PROJECT/topics/NAME, optionally with an Avro schema for its messages."""
        settings: Json = {}
        if schema:
            # The schema must exist before the topic that refers to it.
            project, _, short = name.partition("/topics/")
            definition = {"type": "AVRO", "definition": schema}
            self.call("POST", f"{project}/schemas?schemaId={short}", definition)
            schema_name = f"{project}/schemas/{short}"
            settings = {"schemaSettings": {"schema": schema_name, "encoding": "JSON"}}
        self.call("PUT", name, settings)

    def subscribe(
        self, topic: str, endpoint: str = "", dead_letters: str = "", attempts: int = 5
    ) -> str:
        """Create a subscription with the topic's name and return the subscription's full name.

        With `endpoint` it pushes. After `attempts` rejections a message goes to `dead_letters`.
        """
        name = topic.replace("/topics/", "/subscriptions/")
        settings: Json = {"topic": topic, "ackDeadlineSeconds": 60}
        if endpoint:
            settings["pushConfig"] = {"pushEndpoint": endpoint}
        if dead_letters:
            policy = {"deadLetterTopic": dead_letters, "maxDeliveryAttempts": attempts}
            settings["deadLetterPolicy"] = policy
        self.call("PUT", name, settings)
        return name

    def publish(
        self, topic: str, data: bytes = b"", attributes: Mapping[str, str] | None = None
    ) -> None:
        """Publish a message."""
        encoded = base64.b64encode(data).decode()
        message = {"data": encoded, "attributes": dict(attributes or {})}
        self.call("POST", f"{topic}:publish", {"messages": [message]})

    def pull(self, subscription: str) -> list[Json]:
        """Pull and acknowledge the pending messages."""
        # Without returnImmediately, the call would wait for a message.
        limits = {"maxMessages": 1000, "returnImmediately": True}
        response = self.call("POST", f"{subscription}:pull", limits)
        received = response.get("receivedMessages", [])
        if received:
            ids = {"ackIds": [one["ackId"] for one in received]}
            self.call("POST", f"{subscription}:acknowledge", ids)
        return [one["message"] for one in received]


class TriggerFunction(Process):
    """The trigger function under functions-framework, as in its image.

    Args:
        project: the project's folder.
        variables: environment variables, as set by Terraform, and those that select the fakes.
    """

    def __init__(
        self, project: Path, variables: Mapping[str, str], log: Path | None = None
    ) -> None:
        super().__init__(log)
        self.project, self.variables = project, dict(variables)

    def command(self) -> tuple[list[str], dict[str, str]]:
        """Return the image's CMD with this machine's paths."""
        main = self.project / "level_2_cicd" / "trigger_function_container" / "main.py"
        words = [sys.executable, "-m", "functions_framework", "--target=handle"]
        # Unbuffered, so that `lines` finds output while the process runs.
        server = {"PORT": str(self.port), "HOST": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
        path = {"PYTHONPATH": str(self.project / "src")}
        return [*words, f"--source={main}"], {**os.environ, **path, **server, **self.variables}


def listens(port: int) -> bool:
    """Return whether a server listens on a port."""
    address = ("127.0.0.1", port)
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=1):
        return True
    return False


def eventually(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true within {seconds} s")
        time.sleep(0.05)
