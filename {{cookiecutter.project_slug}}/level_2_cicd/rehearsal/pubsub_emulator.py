"""How events travel on this machine: the Pub/Sub emulator of the Cloud SDK, and the trigger function in a process of its own.

    with PubSubEmulator() as pubsub, TriggerFunction(project, variables) as function:
        pubsub.create_topic("projects/my-project/topics/digit-reader-requests", schema)
        pubsub.subscribe("projects/my-project/topics/digit-reader-requests", function.address)

The emulator is Google's own, so it pushes as Pub/Sub does, refuses what a topic's schema refuses, and delivers again. It ignores
a subscription's filter, tells no deliveryAttempt, asks for no token, and a retryPolicy makes it forget messages.
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

Json = dict[str, Any]
START_SECONDS = 90


class EmulatorNotFound(Exception):
    """The Cloud SDK, or its emulator, is not there."""


class EmulatorError(Exception):
    """The emulator answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Process(ABC):
    """A server in a process group of its own, which ends with it."""

    def __init__(self, log: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.log = log or self.folder / "log"
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where it listens, as http://127.0.0.1:PORT."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its number; 0 while it does not run."""
        return self._process.pid if self._process else 0

    @abstractmethod
    def command(self) -> tuple[list[str], dict[str, str]]:
        """What is started, and its environment."""

    def start(self) -> None:
        """Start it, and wait until it listens.

        Raises:
            RuntimeError: it ended, or did not begin to listen.
        """
        words, environment = self.command()
        with self.log.open("ab") as stream:
            self._process = subprocess.Popen(words, env=environment, stdout=stream, stderr=stream, start_new_session=True)
        limit = time.monotonic() + START_SECONDS
        while not listens(self.port):
            if self._process.poll() is not None or time.monotonic() > limit:
                self.kill()
                raise RuntimeError(f"{' '.join(words)} does not listen:\n{self.log.read_text(encoding='utf-8')}")
            time.sleep(0.02)

    def kill(self) -> None:
        """End it and all that it started at once, as a machine that fails does."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def terminate(self, seconds: float = 30) -> int:
        """Ask it to end; its exit code."""
        if self._process is None:
            raise RuntimeError("it does not run")
        self._process.terminate()
        code = self._process.wait(seconds)
        self.kill()
        return code

    def lines(self) -> list[Json]:
        """The lines of its log that are JSON."""
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]

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
    """The emulator; PUBSUB_EMULATOR_HOST=`host` brings Google's clients to it."""

    @property
    def host(self) -> str:
        """Where it listens, as HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    def command(self) -> tuple[list[str], dict[str, str]]:
        """The Cloud SDK's command, with settings of its own.

        Raises:
            EmulatorNotFound: there is no Cloud SDK.
        """
        gcloud = shutil.which("gcloud")
        if not gcloud:
            raise EmulatorNotFound("the Cloud SDK is not installed")
        start = [
            "beta",
            "emulators",
            "pubsub",
            "start",
            f"--host-port={self.host}",
            "--project=rehearsal",
            f"--data-dir={self.folder}",
        ]
        settings = {"CLOUDSDK_CONFIG": str(self.folder / "gcloud"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
        return [gcloud, *start], {**os.environ, **settings}

    def call(self, method: str, path: str, body: Json | None = None) -> Json:
        """One call of its REST interface.

        Raises:
            EmulatorError: it was refused.
        """
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.address}/v1/{path}", content, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
                found: Json = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            with error:
                raise EmulatorError(error.code, error.read().decode(errors="replace")) from None

    def create_topic(self, name: str, schema: str = "") -> None:
        """Make a topic: projects/PROJECT/topics/NAME; with an Avro schema, it takes only messages that fit, as JSON."""
        settings: Json = {}
        if schema:
            project, _, own = name.partition("/topics/")
            self.call("POST", f"{project}/schemas?schemaId={own}", {"type": "AVRO", "definition": schema})
            settings = {"schemaSettings": {"schema": f"{project}/schemas/{own}", "encoding": "JSON"}}
        self.call("PUT", name, settings)

    def subscribe(self, topic: str, endpoint: str = "", dead_letters: str = "", attempts: int = 5) -> str:
        """Make a subscription of the topic's name: it pushes to an endpoint, or is pulled from.

        What was refused comes again after a second. With a retryPolicy the emulator forgets messages when several were refused.

        Args:
            dead_letters: the topic that takes what was refused so many times.
        """
        name = topic.replace("/topics/", "/subscriptions/")
        settings: Json = {"topic": topic, "ackDeadlineSeconds": 60}
        if endpoint:
            settings["pushConfig"] = {"pushEndpoint": endpoint}
        if dead_letters:
            settings["deadLetterPolicy"] = {"deadLetterTopic": dead_letters, "maxDeliveryAttempts": attempts}
        self.call("PUT", name, settings)
        return name

    def publish(self, topic: str, data: bytes = b"", attributes: Mapping[str, str] | None = None) -> None:
        """Publish a message."""
        message = {"data": base64.b64encode(data).decode(), "attributes": dict(attributes or {})}
        self.call("POST", f"{topic}:publish", {"messages": [message]})

    def pull(self, subscription: str) -> list[Json]:
        """Take the messages that wait there now."""
        found: list[Json] = self.call("POST", f"{subscription}:pull", {"maxMessages": 1000, "returnImmediately": True}).get(
            "receivedMessages", []
        )
        if found:
            self.call("POST", f"{subscription}:acknowledge", {"ackIds": [one["ackId"] for one in found]})
        return [one["message"] for one in found]


class TriggerFunction(Process):
    """The trigger function under functions-framework, as its image's command starts it.

    Args:
        project: the project's folder; variables: the function's environment, as Terraform sets it, and what leads to the doubles.
    """

    def __init__(self, project: Path, variables: Mapping[str, str], log: Path | None = None) -> None:
        super().__init__(log)
        self.project, self.variables = project, dict(variables)

    def command(self) -> tuple[list[str], dict[str, str]]:
        """The image's CMD, with this machine's paths."""
        main = self.project / "level_2_cicd" / "trigger_function_container" / "main.py"
        words = [sys.executable, "-m", "functions_framework", "--target=handle", f"--source={main}"]
        own = {"PYTHONPATH": str(self.project / "src"), "PORT": str(self.port), "HOST": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
        return words, {**os.environ, **own, **self.variables}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Whether somebody does."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def eventually(holds: Callable[[], object], seconds: float = 120) -> None:
    """Wait until something holds.

    Raises:
        TimeoutError: it never did.
    """
    limit = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > limit:
            raise TimeoutError("this never came about")
        time.sleep(0.05)
