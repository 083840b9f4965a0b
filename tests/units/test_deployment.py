"""Deployment to the cloud, over the wire: what Vertex AI and Cloud Storage receive, in which order, and what is served then."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time

import pytest
from core.errors import UserError
from core.registry import LocalRegistry, StaleChampion
from gcp import client as api
from gcp import deployment, endpoint, lease, model_registry, storage
from gcp.model_registry import Serving, VertexRegistry, open_registry
from google.api_core.future import polling
from level_1_pipeline import status
from level_1_pipeline.deploy_container import main as deploy_main
from level_2_cicd.rehearsal import protojson
from level_2_cicd.rehearsal.server import Response
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex
from project.settings import load_settings

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
        return deployment.deploy(
            REGISTRY,
            self.model(run),
            {"accuracy": 0.9, "rows": "x"},
            run,
            "better",
            replaces,
            serving,
        )

    @property
    def endpoint(self):
        """The endpoint as it is."""
        [endpoint] = self.vertex.endpoints.by_name.values()
        return endpoint

    @property
    def served(self):
        """Version → its share of the requests; with those that get none."""
        shares = dict(self.endpoint.traffic_split)
        return {
            int(model.model_version_id): shares.get(model.id, 0)
            for model in self.endpoint.deployed_models
        }

    def served_by(self, identity):
        """What an endpoint of this id serves: id → share."""
        return next(
            dict(found.traffic_split)
            for name, found in self.vertex.endpoints.by_name.items()
            if name.endswith(f"/{identity}")
        )

    @property
    def aliases(self):
        """Version → aliases."""
        [versions] = self.vertex.models.by_name.values()
        return {int(number): set(model.version_aliases) for number, model in versions.items()}


@pytest.fixture
def cloud(tmp_path, trained, monkeypatch):
    """The cloud, empty but for its bucket."""
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint, "PAUSE", 0.01)
    monkeypatch.setattr(polling.DEFAULT_POLLING, "_initial", 0.01)
    mount = tmp_path / "gcs"
    with FakeVertex() as vertex, FakeStorage(mount) as storage:
        storage.create_bucket("bucket")
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
    assert (container.predict_route, container.health_route, container.ports[0].container_port) == (
        "/predict",
        "/health",
        8080,
    )
    manifest = json.loads((cloud.model("Run 1") / "model.json").read_text())
    assert dict(sent.model.labels) == {
        "run": "run-1",
        "manifest": hashlib.sha256((cloud.model("Run 1") / "model.json").read_bytes()).hexdigest()[
            :32
        ],
        "data": manifest["data_sha256"][:32],
        "commit": manifest["code_version"],
    }
    [deployed] = cloud.vertex.calls("endpoints.deployModel")
    assert deployed.deployed_model.model == f"{MODEL}@1"
    resources = deployed.deployed_model.dedicated_resources
    assert resources.machine_spec.machine_type == "n2-standard-2"
    assert (resources.min_replica_count, resources.max_replica_count) == (1, 3)
    assert not deployed.traffic_split  # which would come about later, whoever serves by then
    assert [
        dict(patch.endpoint.traffic_split) for patch in cloud.vertex.calls("endpoints.patch")
    ] == [{"1": 100}]
    assert cloud.served == {1: 100}
    assert {"champion", "default"} < cloud.aliases[1]


def test_a_later_version_proves_itself_with_few_requests_and_then_gets_all(cloud):
    cloud.deploy("run-1", None)
    cloud.deploy("run-2", 1)
    assert cloud.vertex.calls("models.upload")[1].parent_model == MODEL
    shares = [dict(patch.endpoint.traffic_split) for patch in cloud.vertex.calls("endpoints.patch")]
    assert shares == [{"1": 100}, {"2": 10, "1": 90}, {"2": 100}]
    assert [
        request.deployed_model_id for request in cloud.vertex.calls("endpoints.undeployModel")
    ] == ["1"]
    assert cloud.served == {2: 100}
    assert {"champion", "default"} < cloud.aliases[2]
    assert not {"champion", "default"} & cloud.aliases[1]


def test_account_and_key_travel_with_the_model_and_level_2_makes_no_endpoint(cloud):
    account, key = (
        "predictor@a-project.iam.gserviceaccount.com",
        "projects/a-project/locations/europe-west4/keyRings/a/cryptoKeys/b",
    )
    with pytest.raises(UserError, match=r"endpoint animals not found.*Terraform"):
        cloud.deploy("run-1", None, service_account=account, key=key)
    endpoint = {"display_name": "animals", **Serving.parse({**SERVING, "key": key}).encryption}
    request = {"parent": Serving.parse(SERVING).parent, "endpoint": endpoint}
    api.client("EndpointService", "europe-west4").create_endpoint(request).result()
    assert cloud.deploy("run-1", None, service_account=account, key=key)["champion"]
    [uploaded] = cloud.vertex.calls("models.upload")
    assert uploaded.model.encryption_spec.kms_key_name == key
    assert cloud.vertex.calls("endpoints.deployModel")[0].deployed_model.service_account == account


def test_the_registry_is_read_in_the_same_way_through_the_mount_and_through_the_api(
    cloud, monkeypatch, tmp_path
):
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
    assert [(change["replaces"], change["version"]) for change in remote.history()] == [
        (None, 1),
        (1, 2),
    ]
    assert remote.last_change()["reason"] == "better"
    with pytest.raises(UserError, match=r"no version 9 in gs://.*there are: 1, 2"):
        remote.version(9)


def test_a_mounted_registry_is_not_written_as_a_folder(cloud):
    with pytest.raises(UserError, match="in a bucket"):
        LocalRegistry(cloud.mount / "bucket" / "registry").register(
            cloud.model("run-1"), {}, "run-1"
        )


def test_the_same_run_once_more_changes_nothing(cloud):
    cloud.deploy("run-1", None)
    before = {
        path: path.read_bytes()
        for path in (cloud.mount / "bucket" / "storage").rglob("*.json*")
        if path.name != "lock.json"
    }
    cloud.vertex.received.clear()
    assert cloud.deploy("run-1", None) == {"version": 1, "champion": True, "problem": None}
    calls = {received.call for received in cloud.vertex.received}
    looks = {
        "models.get",
        "models.listVersions",
        "endpoints.list",
        "endpoints.get",
        "operations.list",
    }
    assert calls <= {*looks, "models.mergeVersionAliases"}
    assert before == {path: path.read_bytes() for path in before}


def test_whoever_was_compared_with_another_champion_is_not_deployed(cloud):
    cloud.deploy("run-1", None)
    outcome = cloud.deploy("run-2", None)
    assert outcome["version"] == 2
    assert not outcome["champion"]
    assert "has made 1 the champion" in outcome["problem"]
    assert outcome["problem"].endswith("make rollback VERSION=2 RUNNER=vertex")
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
    assert "has made 1 the champion" in outcome["problem"]
    assert json.loads(file.read_text())["version"] == 1
    assert cloud.served == {1: 100}  # what is served follows from the file, whoever wrote it
    assert "champion" in cloud.aliases[1]


def test_a_champion_chosen_while_it_is_written_is_not_overwritten(cloud, monkeypatch):
    cloud.deploy("run-1", None)
    cloud.deploy("run-2", 1)
    file = cloud.mount / "bucket" / "storage" / "registry" / "champion.json"
    write = storage.replace

    def overtake(address, content, held):
        if address.endswith("champion.json"):
            file.write_text('{"version": 1, "replaces": 2, "reason": "by hand", "time": "now"}')
        return write(address, content, held)

    monkeypatch.setattr(storage, "replace", overtake)
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
    with pytest.raises(UserError, match=r"querying the new version failed: .*out of order"):
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
            deploy_main.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cloud.served == {1: 100}


def test_a_pipelines_step_that_is_ended_leaves_served_what_was_served(cloud):
    """The step calls `deploy`: nobody else listens to SIGTERM there."""
    cloud.deploy("run-1", None)
    answer, heard = cloud._predict, []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("ended"))

    def end(deployed, body):
        if deployed.model_version_id == "2":
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(deployed, body)

    cloud.vertex.predictor = end
    try:
        with pytest.raises(KeyboardInterrupt):
            cloud.deploy("run-2", 1)
        assert cloud.served == {1: 100}
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == ["ended"]  # afterwards it is as it was
    finally:
        signal.signal(signal.SIGTERM, before)


def test_whatever_ends_a_deployment_what_was_served_is_served(cloud, monkeypatch):
    cloud.deploy("run-1", None)

    def fail(*_):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(endpoint.Endpoint, "check", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        cloud.deploy("run-2", 1)
    assert cloud.served == {1: 100}


# ── what Google goes on with, unseen ────────────────────────────────────────────────────────────────────────────────
def test_a_lost_answer_registers_and_deploys_nothing_twice(cloud):
    cloud.deploy("run-1", None)
    cloud.vertex.slow_operations = 4
    for call in ("models.upload", "endpoints.deployModel", "endpoints.undeployModel"):
        cloud.vertex.fail(call, status=0, done=True)
    assert cloud.deploy("run-2", 1) == {"version": 2, "champion": True, "problem": None}
    assert {version: "champion" in aliases for version, aliases in cloud.aliases.items()} == {
        1: False,
        2: True,
    }
    assert cloud.served == {2: 100}
    assert [
        len(cloud.vertex.calls(f"{call}")) for call in ("models.upload", "endpoints.deployModel")
    ] == [2, 2]
    assert len(cloud.vertex.calls("endpoints.undeployModel")) == 1


def test_lost_answers_at_the_very_beginning_make_one_model_and_one_endpoint(cloud):
    cloud.vertex.slow_operations = 4
    for call in ("models.upload", "endpoints.create"):
        cloud.vertex.fail(call, status=0, done=True)
    assert cloud.deploy("run-1", None)["champion"]
    assert (
        len(cloud.vertex.calls("models.upload")) == len(cloud.vertex.calls("endpoints.create")) == 1
    )
    assert cloud.served == {1: 100}


def test_of_two_versions_of_the_same_run_the_lower_one_counts(cloud):
    cloud.deploy("run-0", None)
    models = api.client("ModelService", "europe-west4")
    request = model_registry.upload_request(Serving.parse(SERVING), cloud.model("run-1"), "run-1")
    for _ in range(2):
        models.upload_model({**request, "parent_model": MODEL}).result()
    assert cloud.deploy("run-1", 1)["version"] == 2
    assert sorted(cloud.aliases) == [1, 2, 3]


def test_a_deployment_that_is_interrupted_does_not_come_alive_later(cloud, monkeypatch, capsys):
    cloud.deploy("run-1", None)
    finish, register = api.wait_for_operation, VertexRegistry.register

    def slow_from_here(*arguments):
        found = register(*arguments)
        cloud.vertex.slow_operations = 1000
        return found

    def interrupt(operation, what):
        if what == "deploying version 2":
            raise KeyboardInterrupt
        return finish(operation, what)

    monkeypatch.setattr(VertexRegistry, "register", slow_from_here)
    monkeypatch.setattr(api, "wait_for_operation", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cloud.deploy("run-2", 1)
    assert (
        "version 2 may still come up; to remove it: gcloud ai endpoints undeploy-model animals"
        in capsys.readouterr().err
    )
    for _ in range(1001):
        cloud.vertex.tick()
    assert cloud.served == {1: 100}
    assert all(operation.result for operation in cloud.vertex.operations.values())


def begin_deployment(cloud, version):
    """What a process that died has begun."""
    serving = Serving.parse(SERVING)
    cloud.vertex.slow_operations = 5
    name = f"{serving.parent}/endpoints/animals"
    api.client("EndpointService", "europe-west4").deploy_model(
        endpoint.deploy_request(serving, name, version)
    )
    cloud.vertex.slow_operations = 0


def test_a_deployment_that_goes_on_is_waited_for_and_not_begun_again(cloud):
    cloud.deploy("run-1", None)
    cloud.deploy("run-2", 1)
    begin_deployment(cloud, 1)
    assert deployment.rollback(REGISTRY, 1, SERVING)["champion"]
    assert (
        len(cloud.vertex.calls("endpoints.deployModel")) == 3
    )  # two versions, and the one that went on
    assert cloud.served == {1: 100}


def test_a_deployment_that_goes_on_and_cannot_be_cancelled_is_removed(cloud):
    cloud.deploy("run-1", None)
    cloud.deploy("run-2", 1)
    begin_deployment(cloud, 1)
    cloud.vertex.fail("operations.cancel", status=400, message="it cannot be cancelled")
    assert cloud.deploy("run-2", 1)["champion"]
    assert cloud.served == {2: 100}
    assert all(operation.result for operation in cloud.vertex.operations.values())


# ── whose the endpoint is ───────────────────────────────────────────────────────────────────────────────────────────
def test_an_endpoint_that_serves_another_model_is_left_alone(cloud):
    cloud.deploy("run-1", None)
    serving = Serving.parse({**SERVING, "endpoint": "plants"})
    other = model_registry.upload_request(serving, cloud.model("other"), "other")
    api.client("ModelService", "europe-west4").upload_model(
        {**other, "model_id": "plants"}
    ).result()
    request = endpoint.deploy_request(serving, cloud.endpoint.name, 7) | {
        "traffic_split": {"0": 50, "1": 50}
    }
    request["deployed_model"]["model"] = f"{serving.model}@1"
    api.client("EndpointService", "europe-west4").deploy_model(request).result()
    with pytest.raises(
        UserError,
        match=r"also serves .*/models/plants, .*undeploy-model animals --deployed-model-id=7",
    ):
        cloud.deploy("run-2", 1)
    assert dict(cloud.endpoint.traffic_split) == {"7": 50, "1": 50}


def test_two_endpoints_of_the_same_name_are_refused_on_whichever_page_they_are(cloud, monkeypatch):
    monkeypatch.setattr(protojson, "PAGE", 1)
    cloud.deploy("run-1", None)
    request = {"parent": Serving.parse(SERVING).parent, "endpoint": {"display_name": "animals"}}
    api.client("EndpointService", "europe-west4").create_endpoint(request).result()
    cloud.vertex.fail("endpoints.list", status=503, after=1)
    with pytest.raises(UserError, match="2 endpoints have the name animals"):
        cloud.deploy("run-2", 1)
    assert cloud.served_by("animals") == {"1": 100}


# ── the check ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_version_may_be_busy_at_first_and_no_longer(cloud, monkeypatch):
    cloud.deploy("run-1", None)
    for busy in (429, 502, 503, 504):
        cloud.vertex.fail("endpoints.predict", status=busy, times=2)
    assert cloud.deploy("run-2", 1)["champion"]
    monkeypatch.setattr(endpoint, "STARTING", 0.0)
    cloud.vertex.fail("endpoints.predict", status=503)
    with pytest.raises(endpoint.UnhealthyDeployment, match="injected fault"):
        cloud.deploy("run-3", 2)
    assert cloud.served == {2: 100}


@pytest.mark.parametrize("status", [400, 404, 500])
def test_any_other_error_of_a_new_version_is_its_end(cloud, status):
    cloud.deploy("run-1", None)
    cloud.vertex.fail("endpoints.predict", status=status)
    with pytest.raises(endpoint.UnhealthyDeployment, match="injected fault"):
        cloud.deploy("run-2", 1)
    assert cloud.served == {1: 100}


def test_a_share_that_takes_effect_late_is_waited_for(cloud):
    """However many requests the champion answers meanwhile."""
    cloud.deploy("run-1", None)
    choose, asked = cloud.vertex.endpoints.choose, itertools.count()

    def late(served):
        champion = next(model for model in served.deployed_models if model.model_version_id == "1")
        return champion if next(asked) < 400 else choose(served)

    cloud.vertex.endpoints.choose = late
    assert cloud.deploy("run-2", 1)["champion"]


def test_a_first_version_that_answers_with_errors_leaves_nothing(cloud):
    cloud.broken = {"1"}
    with pytest.raises(UserError, match="out of order"):
        cloud.deploy("run-1", None)
    assert cloud.served == {}
    assert open_registry(REGISTRY).champion() is None


def test_what_does_not_get_its_share_of_the_requests_is_not_promoted(cloud, monkeypatch):
    cloud.deploy("run-1", None)
    monkeypatch.setattr(endpoint, "CHECK", 0.5)
    cloud.vertex.endpoints.choose = lambda endpoint: next(iter(endpoint.deployed_models))
    with pytest.raises(UserError, match="the new version responded to 0 of"):
        cloud.deploy("run-2", 1)
    assert cloud.served == {1: 100}


def test_what_a_crash_left_beside_the_champion_is_removed_by_the_next_run(cloud):
    cloud.deploy("run-1", None)
    cloud.vertex.fail("endpoints.predict", status=403, times=1)
    cloud.vertex.fail("endpoints.patch", status=403, after=1)
    with pytest.raises(UserError, match="Restoring the traffic failed too"):
        cloud.deploy("run-2", 1)
    assert cloud.served == {1: 90, 2: 10}
    assert cloud.deploy("run-3", 1)["version"] == 3
    assert cloud.served == {3: 100}


def test_rollback_deploys_the_older_version_again(cloud, monkeypatch, capsys):
    cloud.deploy("run-1", None)
    cloud.deploy("run-2", 1)
    words = ["deploy", "--registry", REGISTRY, "--serving", json.dumps(SERVING), "--rollback"]
    monkeypatch.setattr(sys, "argv", [*words, "1"])
    deploy_main.main()
    assert "version 1; it is the champion" in capsys.readouterr().out
    assert cloud.served == {1: 100}
    assert "rollback from version 2" in open_registry(REGISTRY).last_change()["reason"]
    monkeypatch.setattr(sys, "argv", [*words, "9"])
    with pytest.raises(UserError, match="no version 9"):
        deploy_main.main()


def test_a_rollback_that_is_only_to_be_shown_sends_nothing(cloud, monkeypatch, capsys):
    cloud.deploy("run-1", None)
    cloud.deploy("run-2", 1)
    cloud.vertex.received.clear()
    cloud.storage.received.clear()
    words = [
        "deploy",
        "--registry",
        REGISTRY,
        "--serving",
        json.dumps(SERVING),
        "--rollback",
        "1",
        "--dry-run",
    ]
    monkeypatch.setattr(sys, "argv", words)
    deploy_main.main()
    shown = json.loads(capsys.readouterr().out)
    assert not cloud.vertex.received
    assert not cloud.storage.received
    assert shown["endpoints.deployModel"]["deployed_model"]["model"].endswith("/models/animals@1")
    assert shown["endpoints.patch"]["endpoint"]["traffic_split"] == {"1": 10, "CHAMPION": 90}


@pytest.fixture
def in_project(cloud, monkeypatch):
    """A project whose cloud this is."""
    chosen = load_settings()
    where = next(iter(chosen.cloud.environments.values())).model_copy(
        update={"project": "a-project", "bucket": "bucket"}
    )
    own = chosen.cloud.model_copy(update={"region": "europe-west4", "environments": {"dev": where}})
    monkeypatch.setattr(
        status, "load_settings", lambda: chosen.model_copy(update={"name": "animals", "cloud": own})
    )
    monkeypatch.setenv("RUNNER", "vertex")
    return cloud


def test_status_and_rollback_of_the_clouds_registry(in_project, monkeypatch, capsys):
    """What `make status RUNNER=vertex` and `make rollback VERSION=1 RUNNER=vertex` do."""
    in_project.deploy("run-1", None)
    in_project.deploy("run-2", 1)
    monkeypatch.setattr(sys, "argv", ["status"])
    status.main()
    out = capsys.readouterr().out
    assert "Champion: version 2" in out
    assert f"kept in {in_project.mount}/bucket/storage/registry" in out
    assert "make serve" not in out
    monkeypatch.setattr(sys, "argv", ["status", "--rollback", "1"])
    in_project.vertex.received.clear()
    monkeypatch.setenv("DRY_RUN", "1")
    status.main()
    assert "animals@1" in capsys.readouterr().out
    assert not in_project.vertex.received
    monkeypatch.delenv("DRY_RUN")
    status.main()
    assert "Version 1 is the champion" in capsys.readouterr().out
    assert in_project.served == {1: 100}
    assert open_registry(REGISTRY).champion_number() == 1


def test_an_empty_or_lost_registry_in_the_cloud_says_what_to_type_there(
    in_project, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["status"])
    status.main()
    assert "`make level1 RUNNER=vertex` trains" in capsys.readouterr().out
    in_project.deploy("run-1", None)
    (
        in_project.mount / "bucket" / "storage" / "registry" / "versions" / "1" / "version.json"
    ).unlink()
    status.main()
    assert "make rollback VERSION=N RUNNER=vertex" in capsys.readouterr().out


def test_registering_needs_the_image_and_going_back_does_not(cloud):
    cloud.deploy("run-1", None)
    cloud.deploy("run-2", 1)
    without = {name: value for name, value in SERVING.items() if name != "image"}
    assert deployment.rollback(REGISTRY, 1, without)["champion"]
    cloud.vertex.received.clear()
    with pytest.raises(UserError, match="image is missing"):
        deployment.deploy(REGISTRY, cloud.model("run-3"), {}, "run-3", "better", 1, without)
    assert not cloud.vertex.received


def test_another_deployment_is_waited_for(cloud, capsys):
    cloud.deploy("run-1", None)
    with lease.Lease(REGISTRY, "run-x"):
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
    with lease.Lease(REGISTRY, "asleep") as asleep:
        asleep.check()
        monkeypatch.setattr(lease, "clock", lambda: time.time() + lease.SECONDS)
        with lease.Lease(REGISTRY, "next") as following:
            following.check()
            with pytest.raises(UserError, match="paused for so long"):
                asleep.check()


def test_a_lease_is_prolonged_while_it_is_held(cloud, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", 0.03)
    file = cloud.mount / "bucket" / "storage" / "registry" / "lock.json"
    with lease.Lease(REGISTRY, "run-1"):
        first, written = json.loads(file.read_text())["ends"], {}
        while written.get("ends", 0) <= first:
            written = json.loads(file.read_text())
    assert written["run"] == "run-1"


def test_a_dry_run_sends_nothing_and_shows_the_requests(cloud, monkeypatch, capsys, tmp_path):
    (tmp_path / "metrics.json").write_text('{"accuracy": 0.9}')
    (tmp_path / "serving.json").write_text(json.dumps(SERVING))
    words = [
        "--model-dir",
        str(cloud.model("run-1")),
        "--metrics",
        str(tmp_path / "metrics.json"),
        "--run",
        "run-1",
    ]
    more = ["--registry", REGISTRY, "--serving", str(tmp_path / "serving.json"), "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["deploy", *words, *more])
    deploy_main.main()
    shown = json.loads(capsys.readouterr().out)
    assert not cloud.vertex.received
    assert not cloud.storage.received
    monkeypatch.setattr(sys, "argv", ["deploy", *words, *more[:-1]])
    deploy_main.main()
    [sent] = cloud.vertex.calls("models.upload")
    assert (
        shown["models.upload"]["model"]["artifact_uri"]
        == sent.model.artifact_uri
        == "gs://bucket/run-1/model"
    )
    assert shown["models.upload"]["model"]["labels"] == dict(sent.model.labels)
    assert shown["endpoints.patch"]["endpoint"]["traffic_split"] == {"VERSION": 10, "CHAMPION": 90}
    [deployed] = cloud.vertex.calls("endpoints.deployModel")
    assert shown["endpoints.deployModel"]["deployed_model"][
        "model"
    ] == deployed.deployed_model.model.replace("@1", "@VERSION")


def test_a_model_in_a_bucket_that_is_not_mounted_is_fetched(cloud, monkeypatch, tmp_path, capsys):
    cloud.model("run-1")
    monkeypatch.setenv("GCS_MOUNT", str(tmp_path / "nowhere"))
    words = [
        "--model-dir",
        "gs://bucket/run-1/model",
        "--metrics",
        '{"accuracy": 1}',
        "--run",
        "run-1",
    ]
    monkeypatch.setattr(
        sys, "argv", ["deploy", *words, "--registry", REGISTRY, "--serving", json.dumps(SERVING)]
    )
    deploy_main.main()
    assert "version 1; it is the champion" in capsys.readouterr().out
    assert cloud.vertex.calls("models.upload")[0].model.artifact_uri == "gs://bucket/run-1/model"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"machine": None}, "machine is missing"),
        ({"machin": "x"}, "unknown key machin"),
        ({"replicas": 3}, "two integers"),
        ({"replicas": [3, 1]}, "minimum, maximum"),
        ({"canary_percent": 0}, "from 1 to 100"),
    ],
)
def test_a_wrong_way_of_serving_is_told_before_anything_is_asked(cloud, changed, message):
    serving = {name: value for name, value in {**SERVING, **changed}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        deployment.deploy(REGISTRY, cloud.model("run-1"), {}, "run-1", "better", None, serving)
    assert not cloud.vertex.received


def test_a_damaged_model_or_one_on_this_machine_is_told_before_anything_is_asked(cloud, trained):
    (cloud.model("run-1") / "model.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        cloud.deploy("run-1", None)
    with pytest.raises(UserError, match=r"is not in a bucket.*gcloud storage cp"):
        deployment.deploy(REGISTRY, trained / "model", {}, "run-1", "better", None, SERVING)
    assert not cloud.vertex.received
    assert not cloud.storage.received


def test_promoting_in_the_registry_is_refused_when_the_champion_is_another_one(cloud):
    cloud.deploy("run-1", None)
    cloud.deploy("run-2", 1)
    registry = VertexRegistry(REGISTRY, Serving.parse(SERVING))
    with pytest.raises(
        StaleChampion, match="compared with champion none, but another run has made 2"
    ):
        registry.promote(1, "late", None)
    assert registry.champion_number() == 2
