"""Deployment to the cloud, over the wire: what Vertex AI and Cloud Storage receive, in which order, and what is served then."""

import json
import os
import shutil
import signal
import sys
import threading
import time

import pytest

from launcher import api, deploy, vertex_registry
from launcher.vertex_registry import Serving, VertexRegistry
from project.errors import UserError
from project.registry import LocalRegistry, Overtaken, open_registry
from rehearsal.server import Response
from rehearsal.storage import Storage
from rehearsal.vertex import Vertex

REGISTRY = "gs://bucket/storage/registry"
SERVING = {
    "project": "a-project",
    "region": "europe-west4",
    "endpoint": "animals",
    "image": "europe-west4-docker.pkg.dev/a-project/animals/predict@sha256:" + "1" * 64,
    "machine": "n2-standard-2",
    "replicas": [1.0, 3.0],  # a pipeline's parameters are doubles
    "canary_percent": 10.0,
    "service_account": "",
    "key": "",
}
MODEL = "projects/a-project/locations/europe-west4/models/animals"


class Cloud:
    """Both doubles, and a bucket that is mounted."""

    def __init__(self, vertex, storage, mount, trained):
        self.vertex, self.storage, self.mount, self._trained = vertex, storage, mount, trained
        self.broken = set()  # versions that answer with an error
        vertex.predictor = self._predict

    def _predict(self, deployed, body):
        assert len(json.loads(body)["instances"]) == 1
        if deployed.model_version_id in self.broken:
            return Response({"error": "out of order"}, 500)
        return Response({"predictions": [{"label": "cat"}]})

    def model(self, run):
        """A saved model where a run leaves it."""
        folder = self.mount / "bucket" / run / "model"
        if not folder.is_dir():
            shutil.copytree(self._trained / "model", folder)
        return folder

    def deploy(self, run, replaces, **changed):
        """What the pipeline's last step does."""
        serving = {**SERVING, **changed}
        return deploy.deploy(REGISTRY, self.model(run), {"accuracy": 0.9, "rows": "x"}, run, "better", replaces, serving)

    @property
    def endpoint(self):
        """The endpoint as it is."""
        [endpoint] = self.vertex.endpoints.endpoints.values()
        return endpoint

    @property
    def served(self):
        """Version → its share of the requests; with those that get none."""
        shares = dict(self.endpoint.traffic_split)
        return {int(model.model_version_id): shares.get(model.id, 0) for model in self.endpoint.deployed_models}

    @property
    def aliases(self):
        """Version → aliases."""
        [versions] = self.vertex.models.models.values()
        return {int(number): set(model.version_aliases) for number, model in versions.items()}


@pytest.fixture
def cloud(tmp_path, trained, monkeypatch):
    """The cloud, empty but for its bucket."""
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    mount = tmp_path / "gcs"
    with Vertex() as vertex, Storage(mount) as storage:
        storage.make("bucket")
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", vertex.address)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.address)
        monkeypatch.setenv("GCS_MOUNT", str(mount))
        yield Cloud(vertex, storage, mount, trained)


def test_the_first_version_gets_all_requests(cloud):
    assert cloud.deploy("Run 1", None) == {"version": 1, "champion": True, "problem": None}
    [sent] = cloud.vertex.calls("models.upload")
    assert sent.model_id == "animals"
    assert not sent.parent_model
    assert sent.model.artifact_uri == "gs://bucket/Run 1/model"
    container = sent.model.container_spec
    assert container.image_uri == SERVING["image"]
    assert (container.predict_route, container.health_route, container.ports[0].container_port) == ("/predict", "/health", 8080)
    manifest = json.loads((cloud.model("Run 1") / "model.json").read_text())
    assert dict(sent.model.labels) == {"run": "run-1", "data": manifest["data_sha256"][:63], "commit": manifest["code_version"]}
    [deployed] = cloud.vertex.calls("endpoints.deployModel")
    assert deployed.deployed_model.model == f"{MODEL}@1"
    resources = deployed.deployed_model.dedicated_resources
    assert resources.machine_spec.machine_type == "n2-standard-2"
    assert (resources.min_replica_count, resources.max_replica_count) == (1, 3)
    assert not deployed.traffic_split  # which would come about later, whoever serves by then
    assert [dict(patch.endpoint.traffic_split) for patch in cloud.vertex.calls("endpoints.patch")] == [{"1": 100}]
    assert cloud.served == {1: 100}
    assert {"champion", "default"} < cloud.aliases[1]


def test_a_later_version_proves_itself_with_few_requests_and_then_gets_all(cloud):
    cloud.deploy("run-1", None)
    cloud.deploy("run-2", 1)
    assert cloud.vertex.calls("models.upload")[1].parent_model == MODEL
    shares = [dict(patch.endpoint.traffic_split) for patch in cloud.vertex.calls("endpoints.patch")]
    assert shares == [{"1": 100}, {"2": 10, "1": 90}, {"2": 100}]
    assert [request.deployed_model_id for request in cloud.vertex.calls("endpoints.undeployModel")] == ["1"]
    assert cloud.served == {2: 100}
    assert {"champion", "default"} < cloud.aliases[2]
    assert not {"champion", "default"} & cloud.aliases[1]


def test_account_and_key_travel_with_the_model_and_level_2_makes_no_endpoint(cloud):
    account, key = (
        "predictor@a-project.iam.gserviceaccount.com",
        "projects/a-project/locations/europe-west4/keyRings/a/cryptoKeys/b",
    )
    with pytest.raises(UserError, match=r"no endpoint animals.*Terraform"):
        cloud.deploy("run-1", None, service_account=account, key=key)
    endpoint = {"display_name": "animals", **Serving.parse({**SERVING, "key": key}).encryption}
    request = {"parent": Serving.parse(SERVING).parent, "endpoint": endpoint}
    api.client("EndpointService", "europe-west4").create_endpoint(request).result()
    assert cloud.deploy("run-1", None, service_account=account, key=key)["champion"]
    [uploaded] = cloud.vertex.calls("models.upload")
    assert uploaded.model.encryption_spec.kms_key_name == key
    assert cloud.vertex.calls("endpoints.deployModel")[0].deployed_model.service_account == account


def test_the_registry_is_read_in_the_same_way_through_the_mount_and_through_the_api(cloud, monkeypatch, tmp_path):
    cloud.deploy("run-1", None)
    cloud.deploy("run-2", 1)
    mounted = open_registry(REGISTRY)
    assert isinstance(mounted, LocalRegistry)
    monkeypatch.setenv("GCS_MOUNT", str(tmp_path / "nowhere"))
    remote = open_registry(REGISTRY)
    assert isinstance(remote, VertexRegistry)
    monkeypatch.setenv("GCS_MOUNT", str(cloud.mount))
    assert mounted.versions() == remote.versions()
    assert [version.run for version in remote.versions()] == ["run-1", "run-2"]
    assert mounted.champion() == remote.champion()
    assert mounted.champion().model == cloud.model("run-2")
    assert mounted.champion().metrics == {"accuracy": 0.9}
    assert mounted.history() == remote.history()
    assert [(change["replaces"], change["version"]) for change in remote.history()] == [(None, 1), (1, 2)]
    assert remote.last_change()["reason"] == "better"
    with pytest.raises(UserError, match=r"no version 9 in gs://.*there are: 1, 2"):
        remote.version(9)


def test_a_mounted_registry_is_not_written_as_a_folder(cloud):
    with pytest.raises(UserError, match="in a bucket"):
        LocalRegistry(cloud.mount / "bucket" / "registry").register(cloud.model("run-1"), {}, "run-1")


def test_the_same_run_once_more_changes_nothing(cloud):
    cloud.deploy("run-1", None)
    before = {
        path: path.read_bytes() for path in (cloud.mount / "bucket" / "storage").rglob("*.json*") if path.name != "lock.json"
    }
    cloud.vertex.received.clear()
    assert cloud.deploy("run-1", None) == {"version": 1, "champion": True, "problem": None}
    calls = {received.call for received in cloud.vertex.received}
    assert calls <= {"models.get", "endpoints.list", "endpoints.get", "models.mergeVersionAliases"}
    assert before == {path: path.read_bytes() for path in before}


def test_whoever_was_compared_with_another_champion_is_not_deployed(cloud):
    cloud.deploy("run-1", None)
    outcome = cloud.deploy("run-2", None)
    assert outcome["version"] == 2
    assert not outcome["champion"]
    assert "made 1 the champion" in outcome["problem"]
    assert len(cloud.vertex.calls("endpoints.deployModel")) == 1
    assert cloud.served == {1: 100}


def test_a_champion_chosen_during_the_check_is_left_in_peace(cloud):
    """Not under the lease: a person's own edit of champion.json, at the worst moment."""
    cloud.deploy("run-1", None)
    cloud.deploy("run-2", 1)
    file = cloud.mount / "bucket" / "storage" / "registry" / "champion.json"
    answer = cloud._predict

    def overtake(deployed, body):
        file.write_text('{"version": 1, "replaces": 2, "reason": "by hand", "time": "now"}')
        return answer(deployed, body)

    cloud.vertex.predictor = overtake
    outcome = cloud.deploy("run-3", 2)
    assert not outcome["champion"]
    assert "made 1 the champion" in outcome["problem"]
    assert json.loads(file.read_text())["version"] == 1
    assert cloud.served == {1: 100}  # what is served follows from the file, whoever wrote it
    assert "champion" in cloud.aliases[1]


def test_a_champion_chosen_while_it_is_written_is_not_overwritten(cloud, monkeypatch):
    cloud.deploy("run-1", None)
    cloud.deploy("run-2", 1)
    file = cloud.mount / "bucket" / "storage" / "registry" / "champion.json"
    write = vertex_registry.replace

    def overtake(address, content, held):
        if address.endswith("champion.json"):
            file.write_text('{"version": 1, "replaces": 2, "reason": "by hand", "time": "now"}')
        return write(address, content, held)

    monkeypatch.setattr(vertex_registry, "replace", overtake)
    assert not cloud.deploy("run-3", 2)["champion"]
    assert json.loads(file.read_text())["version"] == 1
    assert cloud.served == {1: 100}


def test_a_decision_that_a_crash_kept_out_of_the_history_is_added_before_the_next_one(cloud):
    cloud.deploy("run-1", None)
    (cloud.mount / "bucket" / "storage" / "registry" / "history.jsonl").unlink()
    cloud.deploy("run-2", 1)
    assert [change["version"] for change in open_registry(REGISTRY).history()] == [1, 2]


def test_a_version_that_answers_with_errors_is_taken_back(cloud):
    cloud.deploy("run-1", None)
    cloud.broken = {"2"}
    with pytest.raises(UserError, match=r"asking the new version failed: .*out of order"):
        cloud.deploy("run-2", 1)
    assert cloud.served == {1: 100}
    assert "champion" in cloud.aliases[1]
    cloud.broken = set()
    assert cloud.deploy("run-2", 1)["champion"]  # repaired, it is the same version
    assert cloud.served == {2: 100}


def test_whoever_interrupts_a_deployment_finds_served_what_was_served(cloud, monkeypatch):
    cloud.deploy("run-1", None)
    answer, before = cloud._predict, signal.getsignal(signal.SIGTERM)

    def interrupt(deployed, body):
        if deployed.model_version_id == "2":
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(deployed, body)

    cloud.vertex.predictor = interrupt
    words = ["--model-dir", str(cloud.model("run-2")), "--metrics", "{}", "--registry", REGISTRY]
    monkeypatch.setattr(sys, "argv", ["deploy", *words, "--serving", json.dumps(SERVING)])
    try:
        with pytest.raises(KeyboardInterrupt):
            deploy.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cloud.served == {1: 100}


def test_a_first_version_that_answers_with_errors_leaves_nothing(cloud):
    cloud.broken = {"1"}
    with pytest.raises(UserError, match="out of order"):
        cloud.deploy("run-1", None)
    assert cloud.served == {}
    assert open_registry(REGISTRY).champion() is None


def test_what_does_not_get_its_share_of_the_requests_is_not_promoted(cloud):
    cloud.deploy("run-1", None)
    cloud.vertex.endpoints.choose = lambda endpoint: next(iter(endpoint.deployed_models))
    with pytest.raises(UserError, match="of 300 requests, the new version answered 0"):
        cloud.deploy("run-2", 1)
    assert cloud.served == {1: 100}


def test_what_a_crash_left_beside_the_champion_is_removed_by_the_next_run(cloud):
    cloud.deploy("run-1", None)
    cloud.vertex.fail("endpoints.predict", status=403, times=1)
    cloud.vertex.fail("endpoints.patch", status=403, after=1)
    with pytest.raises(UserError, match="Going back failed too"):
        cloud.deploy("run-2", 1)
    assert cloud.served == {1: 90, 2: 10}
    assert cloud.deploy("run-3", 1)["version"] == 3
    assert cloud.served == {3: 100}


def test_rollback_deploys_the_older_version_again(cloud, monkeypatch, capsys):
    cloud.deploy("run-1", None)
    cloud.deploy("run-2", 1)
    words = ["deploy", "--registry", REGISTRY, "--serving", json.dumps(SERVING), "--rollback"]
    monkeypatch.setattr(sys, "argv", [*words, "1"])
    deploy.main()
    assert "version 1; it is the champion" in capsys.readouterr().out
    assert cloud.served == {1: 100}
    assert "rollback from version 2" in open_registry(REGISTRY).last_change()["reason"]
    monkeypatch.setattr(sys, "argv", [*words, "9"])
    with pytest.raises(UserError, match="no version 9"):
        deploy.main()


def test_another_deployment_is_waited_for(cloud, capsys):
    cloud.deploy("run-1", None)
    with vertex_registry.Lease(REGISTRY, "run-x", print):
        thread = threading.Thread(target=cloud.deploy, args=("run-2", 1))
        thread.start()
        while "waiting for run run-x" not in capsys.readouterr().err:
            thread.join(0.01)
        assert cloud.served == {1: 100}
        assert len(cloud.vertex.calls("models.upload")) == 1
    thread.join()
    assert cloud.served == {2: 100}


def test_a_lease_that_nobody_prolongs_is_taken_over_and_its_owner_is_told(cloud, monkeypatch):
    cloud.model("run-1")
    with vertex_registry.Lease(REGISTRY, "asleep", print) as asleep:
        asleep.check()
        monkeypatch.setattr(vertex_registry, "clock", lambda: time.time() + vertex_registry.LEASE_SECONDS)
        with vertex_registry.Lease(REGISTRY, "next", print) as following:
            following.check()
            with pytest.raises(UserError, match="interrupted for so long"):
                asleep.check()


def test_a_lease_is_prolonged_while_it_is_held(cloud, monkeypatch):
    monkeypatch.setattr(vertex_registry, "LEASE_SECONDS", 0.03)
    file = cloud.mount / "bucket" / "storage" / "registry" / "lock.json"
    with vertex_registry.Lease(REGISTRY, "run-1", print):
        first, written = json.loads(file.read_text())["ends"], {}
        while written.get("ends", 0) <= first:
            written = json.loads(file.read_text())
    assert written["run"] == "run-1"


def test_a_dry_run_sends_nothing_and_shows_the_requests(cloud, monkeypatch, capsys, tmp_path):
    (tmp_path / "metrics.json").write_text('{"accuracy": 0.9}')
    (tmp_path / "serving.json").write_text(json.dumps(SERVING))
    words = ["--model-dir", str(cloud.model("run-1")), "--metrics", str(tmp_path / "metrics.json"), "--run", "run-1"]
    more = ["--registry", REGISTRY, "--serving", str(tmp_path / "serving.json"), "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["deploy", *words, *more])
    deploy.main()
    shown = json.loads(capsys.readouterr().out)
    assert not cloud.vertex.received
    assert not cloud.storage.received
    monkeypatch.setattr(sys, "argv", ["deploy", *words, *more[:-1]])
    deploy.main()
    [sent] = cloud.vertex.calls("models.upload")
    assert shown["models.upload"]["model"]["artifact_uri"] == sent.model.artifact_uri == "gs://bucket/run-1/model"
    assert shown["models.upload"]["model"]["labels"] == dict(sent.model.labels)
    assert shown["endpoints.patch"]["endpoint"]["traffic_split"] == {"VERSION": 10, "CHAMPION": 90}
    [deployed] = cloud.vertex.calls("endpoints.deployModel")
    assert shown["endpoints.deployModel"]["deployed_model"]["model"] == deployed.deployed_model.model.replace("@1", "@VERSION")


def test_a_model_in_a_bucket_that_is_not_mounted_is_fetched(cloud, monkeypatch, tmp_path, capsys):
    cloud.model("run-1")
    monkeypatch.setenv("GCS_MOUNT", str(tmp_path / "nowhere"))
    words = ["--model-dir", "gs://bucket/run-1/model", "--metrics", '{"accuracy": 1}', "--run", "run-1"]
    monkeypatch.setattr(sys, "argv", ["deploy", *words, "--registry", REGISTRY, "--serving", json.dumps(SERVING)])
    deploy.main()
    assert "version 1; it is the champion" in capsys.readouterr().out
    assert cloud.vertex.calls("models.upload")[0].model.artifact_uri == "gs://bucket/run-1/model"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"machine": None}, "machine is missing"),
        ({"machin": "x"}, "there is no machin"),
        ({"replicas": 3}, "two whole numbers"),
        ({"replicas": [3, 1]}, "fewest, most"),
        ({"canary_percent": 0}, "from 1 to 100"),
    ],
)
def test_a_wrong_way_of_serving_is_told_before_anything_is_asked(cloud, changed, message):
    serving = {name: value for name, value in {**SERVING, **changed}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        deploy.deploy(REGISTRY, cloud.model("run-1"), {}, "run-1", "better", None, serving)
    assert not cloud.vertex.received


def test_a_damaged_model_or_one_on_this_machine_is_told_before_anything_is_asked(cloud, trained):
    (cloud.model("run-1") / "model.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        cloud.deploy("run-1", None)
    with pytest.raises(UserError, match=r"is in no bucket.*gcloud storage cp"):
        deploy.deploy(REGISTRY, trained / "model", {}, "run-1", "better", None, SERVING)
    assert not cloud.vertex.received
    assert not cloud.storage.received


def test_promoting_in_the_registry_is_refused_when_the_champion_is_another_one(cloud):
    cloud.deploy("run-1", None)
    cloud.deploy("run-2", 1)
    registry = VertexRegistry(REGISTRY, Serving.parse(SERVING))
    with pytest.raises(Overtaken, match="compared with champion none, and meanwhile another run made 2"):
        registry.promote(1, "late", None)
    assert registry.champion_number() == 2
