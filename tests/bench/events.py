"""How soon a message becomes a run: from its publication in the Pub/Sub emulator to the arrival at the double of Vertex AI.

The emulator of the Cloud SDK pushes to the trigger function under functions-framework; the template lies in the double of
Cloud Storage. Cold: the process starts, and gets its first message as soon as it listens; counted from its start. Warm: the same
process, one message after the other. In turn with the cold ones, a process only imports Google's generated client. Medians. On
Cloud Run the start of a machine and of its container comes before what is called cold here, and Google's servers are farther
away than loopback.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory

from level_2_cicd import request as request_run
from level_2_cicd.rehearsal.pubsub_emulator import PubSubEmulator, TriggerFunction, eventually
from level_2_cicd.rehearsal.server import Request, Response
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex

from tests import published
from tests.bench import generated
from tests.bench.report import Figure

IMPORT = "import google.cloud.aiplatform_v1"
COLD, WARM = 5, 50
NEEDS_GCLOUD = True


class Watched(FakeVertex):
    """A Vertex AI fake that records when the request for a run arrived."""

    arrived = 0.0

    def handle(self, request: Request) -> Response | None:
        """Record the time and respond."""
        if request.method == "POST" and request.path.endswith("/pipelineJobs"):
            self.arrived = time.perf_counter()
        return super().handle(request)


def measure(small: bool) -> Iterator[Figure]:
    """Seconds and milliseconds, their ratio, and memory."""
    with TemporaryDirectory() as name, PubSubEmulator() as pubsub, Watched() as vertex:
        folder = Path(name)
        (folder / "generated").mkdir()
        project = generated.project(folder / "generated")
        with chdir(project), FakeStorage(folder / "buckets") as storage:
            cloud = published.prepare(project)
            published.publish(storage, cloud, published.compiled(folder))
            leading = {
                "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": vertex.address,
                "STORAGE_EMULATOR_HOST": storage.address,
            }
            function = TriggerFunction(project, {**cloud.variables, **leading}, folder / "log")
            topic = cloud.environment.topic("requests")
            pubsub.create_topic(
                topic,
                (project / "level_2_cicd/trigger_function_container/request.avsc").read_text(
                    encoding="utf-8"
                ),
            )
            pubsub.subscribe(topic, f"{function.address}/{topic}")

            def ask(event: str) -> None:
                pubsub.publish(topic, json.dumps(request_run.compose(event)).encode())

            cold, warm, listening, importing = [], [], [], []
            for turn in range(1 if small else COLD):
                began = time.perf_counter()
                subprocess.run([sys.executable, "-c", IMPORT], check=True)
                importing.append(time.perf_counter() - began)
                began = time.perf_counter()
                function.start()
                listening.append(time.perf_counter() - began)
                cold.append(arrival(vertex, began, lambda turn=turn: ask(f"cold {turn}")))  # type: ignore[misc]
                function.kill()
            function.start()
            for turn in range(-1, 3 if small else WARM):  # the first one loads what is loaded once
                taken = arrival(vertex, time.perf_counter(), lambda turn=turn: ask(f"warm {turn}"))  # type: ignore[misc]
                if turn >= 0:
                    warm.append(taken)
            memory = resident(function)
            function.kill()
    yield Figure("until the function's process listens", statistics.median(listening), "s")
    yield Figure(
        "cold: from the process's start to the run's arrival", statistics.median(cold), "s"
    )
    yield Figure(
        "warm: from the message's publication to the run's arrival",
        statistics.median(warm) * 1000,
        "ms",
    )
    yield Figure("warm, the slowest of twenty", sorted(warm)[int(len(warm) * 0.95)] * 1000, "ms")
    yield Figure(
        "cold, over importing the generated client alone",
        statistics.median(cold) / statistics.median(importing),
        "×",
        "≤ 2.5",
    )
    yield Figure("warm, over cold", statistics.median(warm) / statistics.median(cold), "×", "≤ 0.2")
    yield Figure("memory of the function, its processes together", memory, "MB", "≤ 300")


def arrival(vertex: Watched, began: float, ask: Callable[[], None]) -> float:
    """Seconds until the run's request arrives."""
    vertex.arrived = 0.0
    ask()
    eventually(lambda: vertex.arrived)
    return vertex.arrived - began


def resident(function: TriggerFunction) -> float:
    """Megabytes in memory, of the process and its children; what they share counts once (Linux)."""
    assert function.pid
    children = (
        Path(f"/proc/{function.pid}/task/{function.pid}/children")
        .read_text(encoding="ascii")
        .split()
    )
    kilobytes = 0
    for process in (str(function.pid), *children):
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
        kilobytes += next(
            int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")
        )
    return kilobytes * 1024 / 1e6
