"""Deployment to the cloud when things go wrong: an error or a death at every call, two at once; and from its container.

Whatever happened, the same command typed again must bring the same end: one version for each run, one champion, which has all
requests, and nothing else deployed.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from core import manifest
from core.errors import UserError
from gcp import client as api
from gcp import deployment, endpoint, lease
from gcp.model_registry import open_registry
from google.api_core.future import polling
from level_2_cicd.rehearsal.server import Response
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex

pytestmark = pytest.mark.heavy

REGISTRY = "gs://bucket/storage/registry"
SERVING: dict[str, Any] = {
    "project": "a-project",
    "region": "europe-west4",
    "endpoint": "digits",
    "image": "europe-west4-docker.pkg.dev/a-project/digits/predict@sha256:" + "1" * 64,
    "machine": "n2-standard-2",
    "replicas": [1, 3],
    "canary_percent": 50,
    "service_account": "",
    "key": "",
}
SCHEMA = {
    "label": "digit",
    "classes": ["0", "1"],
    "columns": [{"name": "a", "kind": "numeric", "optional": False, "values": []}],
}


class Cloud:
    """Both fakes; each run is compared with the champion of its time."""

    def __init__(self, vertex: FakeVertex, store: FakeStorage, mount: Path) -> None:
        self.vertex, self.store, self.mount = vertex, store, mount
        vertex.predictor = lambda *_: Response({"predictions": [{"label": "1"}]})

    def model(self, run: str) -> Path:
        """A saved model where a run leaves it; as far as deploying is concerned, this is one."""
        folder = self.mount / "bucket" / run / "model"
        if not folder.is_dir():
            folder.mkdir(parents=True)
            (folder / "model.onnx").write_text(run)
            manifest.write(
                folder, {"schema": SCHEMA, "data_sha256": "0" * 64, "code_version": "abc"}
            )
        return folder

    def deploy(self, run: str, replaces: int | None) -> dict[str, Any]:
        """What the pipeline's last step does."""
        return deployment.deploy(
            REGISTRY, self.model(run), {"accuracy": 0.9}, run, "better", replaces, SERVING
        )

    def champion(self) -> int | None:
        """Of the registry."""
        return open_registry(REGISTRY).champion_number()

    def share_of_others(self) -> int:
        """The requests that versions get which are not the champion, in per cent."""
        [served] = self.vertex.endpoints.by_name.values()
        version = {
            deployed.id: int(deployed.model_version_id) for deployed in served.deployed_models
        }
        return sum(
            share
            for deployed, share in served.traffic_split.items()
            if version[deployed] != self.champion()
        )

    def assert_consistent(self, *runs: str) -> None:
        """These runs have one version each, one is the champion, and nothing else is served."""
        registry = open_registry(REGISTRY)
        assert sorted(version.run for version in registry.versions()) == sorted(runs)
        [versions] = self.vertex.models.by_name.values()
        assert {int(number): model.labels["run"] for number, model in versions.items()} == {
            version.number: version.run for version in registry.versions()
        }
        champion = registry.champion_number()
        assert [
            int(number) for number, model in versions.items() if "champion" in model.version_aliases
        ] == [champion]
        [served] = self.vertex.endpoints.by_name.values()
        [deployed] = served.deployed_models
        assert int(deployed.model_version_id) == champion
        assert dict(served.traffic_split) == {deployed.id: 100}
        history = registry.history()
        assert history[-1]["version"] == champion
        assert [change["replaces"] for change in history] == [
            None,
            *(change["version"] for change in history[:-1]),
        ]


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """The cloud, empty but for its bucket, which is mounted."""
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint, "PAUSE", 0.01)
    monkeypatch.setattr(polling.DEFAULT_POLLING, "_initial", 0.01)
    monkeypatch.setattr(lease, "LONGEST_WAIT", 0.02)
    mount = tmp_path / "gcs"
    with FakeVertex() as vertex, FakeStorage(mount) as store:
        store.create_bucket("bucket")
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", vertex.address)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.address)
        monkeypatch.setenv("GCS_MOUNT", str(mount))
        yield Cloud(vertex, store, mount)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets so much time pass that no lease holds any more."""
    passed = [0.0]
    monkeypatch.setattr(lease, "clock", lambda: time.time() + passed[0])

    def pass_time() -> None:
        passed[0] += 2 * lease.SECONDS

    return pass_time


REFUSED = {"status": 403, "message": "not today"}
UNAVAILABLE = {"status": 503}
ANSWER_LOST = {"status": 0, "done": True}


FAULTS = {"refused": REFUSED, "unavailable": UNAVAILABLE, "answer lost": ANSWER_LOST}
TURNS = (
    [("vertex", name, 0) for name in FAULTS]
    + [("store", name, 0) for name in FAULTS]
    + [("vertex", "answer lost", 3)]
)


@pytest.mark.parametrize(("which", "what", "slow"), TURNS)
def test_an_error_at_every_call_in_turn(
    cloud: Cloud, later: Callable[[], None], which: str, what: str, slow: int
) -> None:
    fault = FAULTS[what]
    fake, failed, met = getattr(cloud, which), 0, True
    cloud.vertex.slow_operations = slow
    runs: list[str] = []
    while met:
        runs.append(f"run-{len(runs)}")
        before = cloud.champion()
        fake.fail(after=len(runs) - 1, **fault)
        try:
            outcome = cloud.deploy(runs[-1], before)
        except UserError as error:
            assert fault is REFUSED, error
            assert "not today" in str(error)
            failed += 1
            fake.faults.clear()
            later()
            outcome = cloud.deploy(runs[-1], before)
        met = not fake.faults or fake.faults[0].times == 0
        fake.faults.clear()
        assert outcome["champion"], (len(runs), outcome)
        cloud.assert_consistent(*runs)
    assert len(runs) > 10
    assert (failed > 10) == (fault is REFUSED)


DEPLOYS_UNTIL_KILLED = """
import json, os, signal, sys, time
import google.cloud.aiplatform_v1, google.cloud.storage, requests
from google.api_core.future import polling
from pathlib import Path
from gcp import client as api, deployment, endpoint, lease

api.FIRST_WAIT = endpoint.PAUSE = polling.DEFAULT_POLLING._initial = 0.01
send = requests.Session.send

def attempt(order):
    lease.clock = lambda: time.time() + order["passed"]
    sent = 0
    def count(*arguments, **options):
        nonlocal sent
        if sent == order["calls"]:
            os.kill(os.getpid(), signal.SIGKILL)
        sent += 1
        return send(*arguments, **options)
    requests.Session.send = count
    outcome = deployment.deploy(order["registry"], Path(order["model"]), {}, order["run"], "x", order["replaces"], order["serving"])
    os._exit(0 if outcome["champion"] else 3)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        attempt(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def deployer(cloud: Cloud) -> Iterator[Callable[..., int]]:
    """Deploys in a process that is killed when it is about to send its call of that number; returns the exit code."""
    path = os.pathsep.join(path for path in sys.path if "cookiecutter.project_slug" in path)
    command = [sys.executable, "-c", DEPLOYS_UNTIL_KILLED]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        assert process.stdin
        assert process.stdout

        def deploy(run: str, replaces: int | None, calls: int, passed: float) -> int:
            order = {"run": run, "replaces": replaces, "calls": calls, "passed": passed}
            more = {"model": str(cloud.model(run)), "registry": REGISTRY, "serving": SERVING}
            process.stdin.write(json.dumps({**order, **more}) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            return int(process.stdout.readline())  # type: ignore[union-attr]

        yield deploy
        process.stdin.close()


@pytest.mark.parametrize("slow", [0, 3])
def test_a_death_before_every_call_in_turn(
    cloud: Cloud, deployer: Callable[..., int], slow: int
) -> None:
    cloud.vertex.slow_operations = slow
    runs: list[str] = []
    code = -9
    while code == -9:
        runs.append(f"run-{len(runs)}")
        before, passed = cloud.champion(), len(runs) * 10 * lease.SECONDS
        code = deployer(runs[-1], before, len(runs) - 1, passed)
        if len(runs) > 1:
            assert (
                cloud.share_of_others() <= SERVING["canary_percent"]
            )  # the decision comes before the traffic
        if code == -9:
            assert deployer(runs[-1], before, -1, passed + 5 * lease.SECONDS) == 0
        cloud.assert_consistent(*runs)
    assert code == 0
    assert len(runs) > 30


def test_of_two_deployments_at_once_one_makes_the_champion(cloud: Cloud) -> None:
    chance = random.Random(0)
    runs: list[str] = []
    for turn in range(20):
        before = cloud.champion()
        pair = [f"run-{turn}-{name}" for name in "ab"]
        pauses = [chance.uniform(0, 0.05) for _ in pair]
        for run in pair:
            cloud.model(run)

        def one(run: str, pause: float, before: int | None = before) -> dict[str, Any]:
            time.sleep(pause)
            return cloud.deploy(run, before)

        with ThreadPoolExecutor(2) as pool:
            outcomes = list(pool.map(one, pair, pauses))
        assert [outcome["champion"] for outcome in outcomes].count(True) == 1, outcomes
        winner = next(outcome["version"] for outcome in outcomes if outcome["champion"])
        assert cloud.champion() == winner
        runs += pair
        cloud.assert_consistent(*runs)


def test_the_same_run_many_times_at_once_is_one_version(cloud: Cloud) -> None:
    cloud.deploy("run-0", None)
    cloud.model("run-1")
    with ThreadPoolExecutor(5) as pool:
        outcomes = list(pool.map(lambda _: cloud.deploy("run-1", 1), range(5)))
    assert outcomes == [{"version": 2, "champion": True, "problem": None}] * 5
    cloud.assert_consistent("run-0", "run-1")
    assert len(cloud.vertex.calls("models.upload")) == 2
    assert len(cloud.vertex.calls("endpoints.deployModel")) == 2


def test_a_slow_cloud_is_waited_for(cloud: Cloud) -> None:
    cloud.vertex.slow_operations = 1
    cloud.deploy("run-0", None)
    cloud.deploy("run-1", 1)
    cloud.assert_consistent("run-0", "run-1")


# ── the container ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def image(
    docker: str, generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """deploy_container's image; it is built unless it is there."""
    project = generate(tmp_path_factory.mktemp("deploy"))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{project / 'src'}:{project}",
    }
    script = [sys.executable, "-m", "level_1_pipeline.containers"]
    for options in ([], ["--print"]):
        done = subprocess.run(
            [*script, *options, "deploy"],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_the_container_deploys_and_takes_back_what_does_not_answer(
    cloud: Cloud, image: str
) -> None:
    def run(name: str) -> subprocess.CompletedProcess[str]:
        cloud.model(name)
        names = ("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", "STORAGE_EMULATOR_HOST")
        variables = [
            word for variable in names for word in ("--env", f"{variable}={os.environ[variable]}")
        ]
        options = [
            "--rm",
            "--init",
            "--read-only",
            "--tmpfs",
            "/tmp",
            "--user",
            "12345:12345",
            "--network",
            "host",
        ]
        what = [
            "--model-dir",
            f"gs://bucket/{name}/model",
            "--metrics",
            '{"accuracy": 0.9}',
            "--run",
            name,
        ]
        where = ["--registry", REGISTRY, "--serving", json.dumps(SERVING)]
        command = [
            "docker",
            "run",
            *options,
            *variables,
            "--volume",
            f"{cloud.mount}:/gcs:ro",
            image,
        ]
        return subprocess.run(
            [*command, "python", "-m", "level_1_pipeline.deploy_container.main", *what, *where],
            capture_output=True,
            text=True,
        )

    done = run("run-0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "version 1; it is the champion\n"
    cloud.vertex.predictor = lambda deployed, _: Response(
        {"error": "no"}, 500 if deployed.model_version_id == "2" else 200
    )
    done = run("run-1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: querying the new version failed: ")
    assert "Traceback" not in done.stderr
    assert cloud.champion() == 1
    cloud.assert_consistent("run-0", "run-1")
