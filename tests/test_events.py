"""Events for real: the Cloud SDK's Pub/Sub emulator pushes to the trigger function, a process under functions-framework, which
starts runs at the fake of Vertex AI; files are written to the fake of Cloud Storage, which tells the emulator.

The emulator ignores a subscription's filter, and we use none; it asks for no token, so who may push is not tested here.
"""

import base64
import collections
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage as google_storage
from level_1_pipeline import containers
from level_2_cicd import request as request_run
from level_2_cicd.rehearsal.pubsub_emulator import (
    EmulatorError,
    PubSubEmulator,
    TriggerFunction,
    eventually,
)
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex

from tests import published
from tests.published import ROWS, Cloud

pytestmark = pytest.mark.heavy

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def project(
    generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A project, as the current folder."""
    folder = generate(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("SET", raising=False)
        yield folder


@pytest.fixture(scope="module")
def cloud(project: Path) -> Cloud:
    """Its first environment."""
    return published.prepare(project)


@pytest.fixture(scope="module")
def spec(cloud: Cloud, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The compiled pipeline."""
    return published.compiled(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def emulator() -> Iterator[PubSubEmulator]:
    """Google's emulator."""
    if not shutil.which("gcloud"):
        (pytest.fail if os.environ.get("REQUIRE_DOCKER") else pytest.skip)("this test needs gcloud")
    with PubSubEmulator() as pubsub:
        yield pubsub


@dataclass
class Events:
    """All that takes part."""

    cloud: Cloud
    pubsub: PubSubEmulator
    vertex: FakeVertex
    storage: FakeStorage
    function: TriggerFunction

    def topic(self, kind: str) -> str:
        return self.cloud.environment.topic(kind)

    def runs(self) -> dict[str, dict[str, Any]]:
        """Run → the values of its parameters."""
        jobs = [
            json.loads(type(job).to_json(job)) for job in self.vertex.calls("pipelineJobs.create")
        ]
        return {job["name"].split("/")[-1]: job["runtimeConfig"]["parameterValues"] for job in jobs}

    def events(self) -> list[str]:
        """The events for which the function said that it started a run."""
        return [
            line["event"]
            for line in self.function.lines()
            if line["message"].startswith("started ")
        ]

    def said(self, text: str) -> list[dict[str, Any]]:
        return [line for line in self.function.lines() if text in line["message"]]


@pytest.fixture
def make_events(
    emulator: PubSubEmulator,
    cloud: Cloud,
    spec: dict[str, Any],
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Events]]:
    """Start all of it: topics, subscriptions, fakes, function."""
    with (
        FakeVertex() as vertex,
        FakeStorage(tmp_path / "buckets", pubsub=emulator.address) as storage,
    ):
        started: list[TriggerFunction] = []
        topics = {
            kind: cloud.environment.topic(kind) for kind in ("requests", "data", "dead-letters")
        }

        def make_events(
            csv: str = ROWS,
            attempts: int = 5,
            kind: type[TriggerFunction] = TriggerFunction,
            **variables: str,
        ) -> Events:
            published.publish(storage, cloud, spec, csv)
            leading = {
                "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": vertex.address,
                "STORAGE_EMULATOR_HOST": storage.address,
            }
            function = kind(
                project, {**cloud.variables, **leading, **variables}, tmp_path / "function.log"
            )
            function.start()
            started.append(function)
            emulator.create_topic(
                topics["requests"],
                (project / "level_2_cicd/trigger_function_container/request.avsc").read_text(
                    encoding="utf-8"
                ),
            )
            emulator.create_topic(topics["data"])
            emulator.create_topic(topics["dead-letters"])
            for name in ("requests", "data"):
                emulator.subscribe(
                    topics[name],
                    f"{function.address}/{topics[name]}",
                    topics["dead-letters"],
                    attempts,
                )
            emulator.subscribe(topics["dead-letters"])
            monkeypatch.setenv("PUBSUB_EMULATOR_HOST", emulator.host)
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.address)
            return Events(cloud, emulator, vertex, storage, function)

        yield make_events
        for function in started:
            function.kill()
        for topic in topics.values():
            emulator.call("DELETE", topic.replace("/topics/", "/subscriptions/"))
            emulator.call("DELETE", topic)
        emulator.call("DELETE", topics["requests"].replace("/topics/", "/schemas/"))


def watch(events: Events) -> Any:
    """Let the bucket tell the topic what happens below `incoming`, as Terraform does; returns the bucket."""
    name = events.cloud.bucket(events.cloud.environment.data)
    events.storage.create_bucket(name)
    client = google_storage.Client(
        project="my-project",
        credentials=AnonymousCredentials(),
        client_options={"api_endpoint": events.storage.address},
    )
    bucket = client.bucket(name)
    bucket.notification(
        topic_name=events.topic("data").rpartition("/")[2],
        topic_project="my-project",
        event_types=["OBJECT_FINALIZE", "OBJECT_ARCHIVE", "OBJECT_DELETE"],
        blob_name_prefix="incoming/",
        payload_format="JSON_API_V1",
    ).create()
    return bucket


def ask(project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command, as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{project / 'src'}:{project}", "USER": "me"}
    command = [sys.executable, "-m", "level_2_cicd.request", *options]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_request_by_hand_becomes_a_run(make_events: Callable[..., Events], project: Path) -> None:
    events = make_events()
    done = ask(project, "--event", "März", "--set", "hyperparameters.epochs=50")
    assert done.returncode == 0, done.stderr
    eventually(events.runs)
    ((identity, values),) = events.runs().items()
    assert values["hyperparameters"]["epochs"] == 50
    assert values["run"] == identity
    (job,) = events.vertex.calls("pipelineJobs.create")
    assert {"event": "m-rz", "actor": "me", "commit": "1a2b"}.items() <= dict(job.labels).items()
    assert job.service_account == events.cloud.environment.account("pipeline")
    eventually(events.events)
    (line,) = events.function.lines()
    assert (line["severity"], line["event"], line["status"]) == ("NOTICE", "März", 200)
    assert line["run"].endswith(identity)

    done = ask(project, "--event", "x", "--set", "treshold=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'threshold'?" in done.stderr
    assert len(events.runs()) == 1


def test_the_topic_refuses_what_is_no_request(make_events: Callable[..., Events]) -> None:
    """The schema of the topic is the function's."""
    events = make_events()
    good = request_run.compose("x")
    wrong = [
        {**good, "attempt": "1"},
        {**good, "event": 5},
        {name: it for name, it in good.items() if name != "actor"},
        {},
        [],
    ]
    for message in wrong:
        with pytest.raises(EmulatorError) as caught:
            events.pubsub.publish(events.topic("requests"), json.dumps(message).encode())
        assert caught.value.status == 400
    events.pubsub.publish(events.topic("requests"), json.dumps(good).encode())
    eventually(events.runs)


def test_poison_is_told_and_ends_in_the_dead_letter_topic(
    make_events: Callable[..., Events],
) -> None:
    events = make_events()
    poison = request_run.compose("poison", {"treshold": 1})
    events.pubsub.publish(events.topic("requests"), json.dumps(poison).encode())
    events.pubsub.publish(events.topic("data"), b"no notification")
    dead: list[Any] = []
    subscription = events.topic("dead-letters").replace("/topics/", "/subscriptions/")
    eventually(lambda: dead.extend(events.pubsub.pull(subscription)) or len(dead) == 2)
    assert events.runs() == {}
    refused = events.said("invalid message: ")
    assert {line["severity"] for line in refused} == {"ERROR"}
    assert len(refused) == len(events.function.lines()) >= 10
    time.sleep(4)  # longer than the emulator waits between two attempts
    assert len(events.function.lines()) == len(refused)


def test_the_scheduler_s_message_starts_a_run_of_its_minute(
    make_events: Callable[..., Events],
) -> None:
    events = make_events()
    message = json.dumps(request_run.compose("schedule", actor="schedule")).encode()
    before = f"schedule {datetime.now(UTC):%Y-%m-%dT%H:%MZ}"
    events.pubsub.publish(events.topic("requests"), message)
    eventually(events.events)
    assert events.events()[0] in (before, f"schedule {datetime.now(UTC):%Y-%m-%dT%H:%MZ}")


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("versioned", [False, True])
def test_files_that_come_change_and_go(make_events: Callable[..., Events], versioned: bool) -> None:
    """Where project.yaml names rows in a bucket, each change is a run on those, and an overwrite is one change."""
    events = make_events(DATA_SOURCE=ROWS)
    events.storage.create_bucket(
        events.cloud.bucket(events.cloud.environment.data), versioning={"enabled": versioned}
    )
    bucket = watch(events)
    bucket.blob("incoming/a.csv").upload_from_string("a,b\n")
    bucket.blob("incoming/a.txt").upload_from_string("no rows")
    bucket.blob("elsewhere/a.csv").upload_from_string("a,b\n")
    bucket.blob("incoming/a.csv").upload_from_string("a,b\n1,2\n")
    bucket.blob("incoming/a.csv").delete()
    eventually(lambda: len(events.function.lines()) == 5)
    kinds = collections.Counter(event.rpartition(" ")[2] for event in events.events())
    assert kinds == {"OBJECT_FINALIZE": 2, "OBJECT_ARCHIVE" if versioned else "OBJECT_DELETE": 1}
    assert len(events.runs()) == 3
    assert {values["csv"] for values in events.runs().values()} == {ROWS}
    assert len(events.said("it was overwritten")) == len(events.said("does not end in .csv")) == 1


def test_where_no_rows_are_in_a_bucket_each_new_file_is_trained_on(
    make_events: Callable[..., Events],
) -> None:
    events = make_events()
    bucket = watch(events)
    for name in ("incoming/a.csv", "incoming/b c.csv"):
        bucket.blob(name).upload_from_string("a,b\n")
    bucket.blob("incoming/a.csv").delete()
    eventually(lambda: len(events.function.lines()) == 3)
    addresses = {f"{events.cloud.environment.data}/incoming/{name}.csv" for name in ("a", "b c")}
    assert {values["csv"] for values in events.runs().values()} == addresses
    assert len(events.said("nothing to train on")) == 1


def test_files_of_a_window_start_one_run_at_its_end(make_events: Callable[..., Events]) -> None:
    """The window is a minute, and the clock is real: the emulator brings them again until it is over."""
    events = make_events(attempts=100, BATCH_WINDOW_MINUTES="1", DATA_SOURCE=ROWS)
    bucket = watch(events)
    now = datetime.now(UTC)
    if now.second > 50:
        time.sleep(61 - now.second)
    start = datetime.now(UTC).replace(second=0, microsecond=0)
    for name in ("a", "b", "c"):
        bucket.blob(f"incoming/{name}.csv").upload_from_string("a,b\n")
    eventually(lambda: len(events.said("files are batched until")) >= 3)
    assert events.runs() == {}
    eventually(lambda: len(events.said("started")) >= 3)
    assert datetime.now(UTC) >= start + timedelta(minutes=1)
    assert events.events() == [f"data window {start:%Y-%m-%dT%H:%MZ}"]
    assert len(events.runs()) == 1
    assert {line["status"] for line in events.function.lines()} == {200, 429}


# ── the process ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_it_ends_when_it_is_told_to(make_events: Callable[..., Events]) -> None:
    events = make_events()
    events.pubsub.publish(events.topic("requests"), json.dumps(request_run.compose("x")).encode())
    eventually(events.runs)
    assert events.function.terminate() == 0
    assert "Traceback" not in events.function.log.read_text(encoding="utf-8")


def test_what_it_was_told_before_it_ended_is_answered(make_events: Callable[..., Events]) -> None:
    """SIGTERM comes while Vertex AI is slow: the run is started, and said."""
    events = make_events()
    events.vertex.fail("pipelineJobs.create", status=None, seconds=2)
    events.pubsub.publish(events.topic("requests"), json.dumps(request_run.compose("x")).encode())
    eventually(lambda: events.vertex.faults[0].times == 0)
    assert events.function.terminate() == 0
    assert events.events() == ["x"]
    assert len(events.runs()) == 1


def test_a_wrong_environment_is_told_in_one_message(
    cloud: Cloud, project: Path, tmp_path: Path
) -> None:
    function = TriggerFunction(
        project,
        {**cloud.variables, "TEMPLATES": "", "BATCH_WINDOW_MINUTES": "soon"},
        tmp_path / "log",
    )
    with pytest.raises(RuntimeError) as caught:
        function.start()
    told = str(caught.value)
    assert (
        "error: invalid environment variables of the function:\n  TEMPLATES='': expected a gs:// address"
        in told
    )
    assert "BATCH_WINDOW_MINUTES='soon'" in told
    assert "Traceback" not in told


class Contained(TriggerFunction):
    """The function in its image: any user, a read-only root, no --init, as on Cloud Run."""

    image = ""

    def command(self) -> tuple[list[str], dict[str, str]]:
        """The image's own command."""
        variables = {**self.variables, "PORT": str(self.port)}
        how = [
            "--rm",
            "--read-only",
            "--tmpfs",
            "/tmp",
            "--user",
            "12345:12345",
            "--network",
            "host",
            "--name",
            self.name,
        ]
        given = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
        return ["docker", "run", *how, *given, self.image], dict(os.environ)

    @property
    def name(self) -> str:
        """The container's."""
        return f"trigger-{self.port}"

    def kill(self) -> None:
        """End the container, too."""
        if self._process:
            subprocess.run(["docker", "kill", self.name], capture_output=True)
        super().kill()


@pytest.fixture(scope="module")
def image(docker: str, project: Path) -> str:
    """The function's image, built unless it is there."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{project / 'src'}:{project}",
    }
    command = [sys.executable, "-m", "level_1_pipeline.containers", "trigger_function"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (container,) = containers.find(project, ["trigger_function"])
    return containers.image(container, project.name)


def test_the_image_serves_it_and_ends_when_it_is_told_to(
    make_events: Callable[..., Events], image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Contained, "image", image)
    events = make_events(kind=Contained)
    events.pubsub.publish(events.topic("requests"), json.dumps(request_run.compose("x")).encode())
    eventually(events.events)
    assert len(events.runs()) == 1
    held = subprocess.run(
        ["docker", "top", events.function.name, "-o", "pid,uid"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {line.split()[1] for line in held.stdout.splitlines()[1:]} == {"12345"}
    began = time.monotonic()
    subprocess.run(
        ["docker", "stop", "--time", "60", events.function.name], check=True, capture_output=True
    )
    assert time.monotonic() - began < 30  # it was not killed
    assert "Traceback" not in events.function.log.read_text(encoding="utf-8")


def test_the_image_is_small_and_holds_what_it_needs(image: str) -> None:
    def ask(*words: str) -> str:
        return subprocess.run(
            ["docker", *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    sizes = [
        int(ask("image", "inspect", "--format", "{{.Size}}", name))
        for name in (image, "python:3.11-slim")
    ]
    assert sizes[0] - sizes[1] <= 320_000_000, sizes
    code = "from importlib.util import find_spec; print(*[n for n in ('torch', 'kfp', 'pydantic', 'trainer') if find_spec(n)])"
    assert ask("run", "--rm", image, "python", "-c", code) == "pydantic trainer"


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────────────
EVENTS, TWICE, POISON, FAILING, KILLS = 1000, 0.3, 20, 0.2, 3


def test_a_thousand_events_with_all_that_can_go_wrong(
    make_events: Callable[..., Events], capsys: pytest.CaptureFixture[str]
) -> None:
    """30 % told twice, in any order; one call in five fails, the function is killed three times."""
    chance = random.Random(8)
    events = make_events(csv="", attempts=30)
    failing = [break_calls(events.vertex, chance), break_calls(events.storage, chance)]
    requests = [f"event {index}" for index in range(EVENTS // 2)]
    generations = list(range(1, EVENTS - len(requests) + 1))
    rows, bucket = {"csv": "gs://rows/a.csv"}, events.cloud.bucket(events.cloud.environment.data)
    sent: list[tuple[str, bytes, dict[str, str]]] = []
    for event in requests:
        sent.append(("requests", json.dumps(request_run.compose(event, rows)).encode(), {}))
    for generation in generations:
        told = {
            "bucketId": bucket,
            "objectId": "incoming/a.csv",
            "objectGeneration": str(generation),
            "payloadFormat": "NONE",
        }
        sent.append(("data", b"", {"eventType": "OBJECT_FINALIZE", **told}))
    sent += chance.sample(sent, int(EVENTS * TWICE))
    poison = [
        request_run.compose(f"poison {index}", {**rows, "treshold": 1}) for index in range(POISON)
    ]
    sent += [("requests", json.dumps(message).encode(), {}) for message in poison]
    chance.shuffle(sent)

    killed = threading.Event()
    killer = threading.Thread(target=kill_again_and_again, args=(events, killed))
    killer.start()
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(lambda one: events.pubsub.publish(events.topic(one[0]), one[1], one[2]), sent)
        )
    dead: list[Any] = []
    subscription = events.topic("dead-letters").replace("/topics/", "/subscriptions/")

    def settled() -> bool:
        dead.extend(events.pubsub.pull(subscription))
        return killed.is_set() and len(events.runs()) >= EVENTS and len(dead) >= POISON

    try:
        eventually(settled, 600)
    finally:
        killer.join()
    time.sleep(5)  # whatever is still on its way
    dead += events.pubsub.pull(subscription)

    started = [dict(job.labels)["event"] for job in events.vertex.calls("pipelineJobs.create")]
    expected = [event.replace(" ", "-") for event in requests]
    expected += [
        f"data-{bucket}-incoming-a-csv-{generation}-object_finalize"[:63]
        for generation in generations
    ]
    assert collections.Counter(started) == collections.Counter(
        expected
    )  # one run for each, and none lost
    assert len(events.runs()) == EVENTS
    lost = [json.loads(decode(message))["event"] for message in dead]
    assert sorted(set(lost)) == sorted(message["event"] for message in poison)
    lines = events.function.lines()
    assert {line["status"] for line in lines} <= {200, 400, 503}
    assert not [line for line in lines if line["severity"] == "CRITICAL"]
    counted = [counter() for counter in failing]
    assert all(0.15 < failed / calls < 0.25 for failed, calls in counted), counted
    with capsys.disabled():
        statuses = collections.Counter(line["status"] for line in lines)
        print(
            f"\n{len(sent)} messages, {len(lines)} answers {dict(statuses)}; (failed, calls): {counted}; dead: {len(dead)}"
        )


def decode(message: dict[str, Any]) -> bytes:
    return base64.b64decode(message["data"])


def kill_again_and_again(events: Events, done: threading.Event) -> None:
    """Kill the function when a quarter, a half and three quarters of the runs are there, and start it again."""
    for part in range(1, KILLS + 1):
        eventually(
            lambda part=part: len(events.vertex.runs.by_name) >= part * EVENTS // (KILLS + 1), 600
        )  # type: ignore[misc]
        events.function.kill()
        time.sleep(1)
        events.function.start()
    done.set()


def break_calls(fake: Any, chance: random.Random) -> Callable[[], tuple[int, int]]:
    """Let one call in five fail, in one of four ways; tells how many did, of how many."""
    ways: list[dict[str, Any]] = [
        {"status": 503},
        {"status": 0},
        {"status": 503, "done": True},
        {"status": 0, "done": True},
    ]
    calls, failed = 0, 0
    find = fake._fault

    def fault(call: str) -> Any:
        nonlocal calls, failed
        with fake.lock:
            calls += 1
            if chance.random() < FAILING:
                failed += 1
                fake.fail(**chance.choice(ways))
            return find(call)

    fake._fault = fault
    return lambda: (failed, calls)
