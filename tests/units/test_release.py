"""What a push does once its images are there: publish, try, release, and all of it again after a failure. Servers are doubles."""

import json
import shutil

import pytest
from core import manifest
from core.errors import UserError
from gcp import client as api
from gcp import deployment, pipeline_version, storage
from gcp.environment import resolve_environment
from gcp.model_registry import open_registry
from level_1_pipeline import parameters
from level_2_cicd import release, submit_build
from level_2_cicd.rehearsal.kfp_templates import FakeTemplateRegistry
from level_2_cicd.rehearsal.pubsub import FakePubSub
from level_2_cicd.rehearsal.server import Response
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex
from project.settings import load_settings

from tests.units.project import ROOT

DEV = "cloud.environments.dev.project=my-project"
SCHEMA = {
    "label": "digit",
    "classes": ["0", "1"],
    "columns": [{"name": "a", "kind": "numeric", "optional": False, "values": []}],
}


class Cloud:
    """The doubles, and a push's last three steps in this process."""

    def __init__(self, folder, vertex, store, templates, topics, monkeypatch):
        self.folder, self.vertex, self.store, self.templates, self.topics = (
            folder,
            vertex,
            store,
            templates,
            topics,
        )
        self.monkeypatch = monkeypatch
        self.images = {name: f"example.com/{name}@sha256:{'0' * 64}" for name in parameters.IMAGES}

    @property
    def environment(self):
        return resolve_environment(load_settings())

    def publish(self, changes="", commit="1a2b"):
        """make publish; the version."""
        self.monkeypatch.setenv("SET", f"{DEV} {changes}")
        self.monkeypatch.setenv("COMMIT", commit)
        release.PUBLICATION.parent.mkdir(exist_ok=True)
        manifest.write_json(release.builds.DIGESTS, self.images)
        told = release.publish(load_settings(), self.environment)
        manifest.write_json(release.PUBLICATION, told)
        return told["version"]

    def test(self):
        """make functional-test."""
        return release.test(load_settings(), self.environment)

    def release(self):
        """make release."""
        return release.release(self.environment)

    def requests(self):
        """What was asked for on the topic."""
        return [json.loads(data) for _, data, _ in self.topics.messages]

    def start_what_is_asked_for(self):
        """What the trigger function does with the messages."""
        from gcp import pipeline_run, pipeline_version

        for asked in self.requests():
            found = pipeline_version.read(
                pipeline_version.templates_folder(self.environment), asked["version"]
            )
            target = pipeline_run.Target("my-project", "europe-west4", "gs://root/runs")
            pipeline_run.submit(
                pipeline_run.request(
                    pipeline_run.RunRequest(
                        found.spec, found.values, asked["event"], attempt=asked["attempt"]
                    ),
                    target,
                )
            )

    def tests(self):
        """The functional tests that were started."""
        return [
            job
            for job in self.vertex.calls("pipelineJobs.create")
            if job.labels.get("purpose") == "functional-test"
        ]


@pytest.fixture
def pushed(tmp_path, project, monkeypatch):
    """A cloud without anything, and a project with a small file of rows."""
    for part in ("level_1_pipeline", "level_2_cicd"):
        shutil.copytree(
            ROOT / part, project / part, ignore=shutil.ignore_patterns("__pycache__", "rehearsal")
        )
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("POLL", "0")
    monkeypatch.setenv("SET", DEV)
    name = load_settings().name
    with (
        FakeVertex() as vertex,
        FakeStorage(tmp_path / "buckets") as store,
        FakeTemplateRegistry() as templates,
        FakePubSub() as topics,
    ):
        for bucket in ("storage", "data", "pipelines"):
            store.create_bucket(f"my-project-{name}-{bucket}")
        vertex.skipped_tasks.add("register")
        vertex.task_outputs["gate"] = {
            "decision": {"passed": False, "reason": "this run only tests"}
        }
        vertex.predictor = lambda *_: Response({"predictions": [{"label": "1"}]})
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", vertex.address)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.address)
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", topics.host)
        monkeypatch.setenv("TEMPLATE_REGISTRY", f"{templates.address}/my-project/templates")
        yield Cloud(project, vertex, store, templates, topics, monkeypatch)


# ── publish ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_what_is_published_brings_its_rows_and_bears_the_commit(pushed):
    pushed.publish()
    told, found = release.read_publication(pushed.environment)
    assert told["commit"] == found.labels["commit"] == "1a2b"
    assert found.values["csv"].startswith(f"{pushed.environment.data}/")
    assert storage.read(found.values["csv"])
    assert found.values["serving"]["image"] == pushed.images["predict"]
    assert found.values["register"] is True
    assert pipeline_version.read_current(pushed.environment) is None  # nothing uses it yet


def test_what_differs_in_the_commit_alone_is_not_published_again(pushed):
    first = pushed.publish()
    pushed.release()
    objects = set(pushed.store.objects(pushed.environment.storage.removeprefix("gs://")))
    assert pushed.publish(commit="3c4d") == first
    assert set(pushed.store.objects(pushed.environment.storage.removeprefix("gs://"))) == objects
    assert pushed.publish("gate.threshold=0.5", commit="3c4d") != first


def test_rows_that_are_not_there_are_told(pushed):
    pushed.publish("data.source=gs://my-project-rows/rows.csv")
    pushed.store.create_bucket("my-project-rows")
    with pytest.raises(UserError, match="no data at gs://my-project-rows"):
        pushed.release()


@pytest.mark.parametrize("step", ["test", "release"])
def test_each_step_says_which_one_comes_before(pushed, step):
    with pytest.raises(UserError, match="make images publish"):
        getattr(pushed, step)()


# ── functional test ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_functional_test_is_short_and_registers_nothing(pushed):
    pushed.publish("cloud.train.jobs=[l4-spot,l4]")
    assert "this run only tests" in pushed.test()
    (job,) = pushed.tests()
    values = dict(job.runtime_config.parameter_values)
    assert values["register"] is False
    assert values["hyperparameters"]["epochs"] == release.TEST_EPOCHS
    assert (
        values["hyperparameters"]["learning_rate"] == load_settings().hyperparameters.learning_rate
    )
    assert [job["scheduling"]["strategy"] for job in values["jobs"]] == ["SPOT", "STANDARD"]
    assert job.service_account == pushed.environment.account("pipeline")


def test_it_is_not_repeated_once_it_has_succeeded_and_is_after_a_failure(pushed):
    pushed.publish()
    pushed.vertex.set_outcome(pushed.environment.name, code=13, message="the weather", times=1)
    with pytest.raises(UserError, match="the weather"):
        pushed.test()
    pushed.test()
    first, second = pushed.tests()
    assert second.name == f"{first.name}-a2"
    pushed.images["predict"] = f"example.com/predict@sha256:{'1' * 64}"
    pushed.publish(commit="3c4d")
    pushed.test()  # of the same, but for the predictor
    assert len(pushed.tests()) == 2
    pushed.publish("hyperparameters.epochs=41")
    pushed.test()
    assert len(pushed.tests()) == 3


@pytest.mark.parametrize("ran", ["register", "nothing"])
def test_a_step_that_should_not_run_or_should_is_told(pushed, ran):
    pushed.publish()
    pushed.vertex.skipped_tasks.clear()
    if ran == "nothing":
        pushed.vertex.skipped_tasks.update({"register", "evaluate"})
    with pytest.raises(
        UserError, match="register ran" if ran == "register" else "without running evaluate"
    ):
        pushed.test()


def test_a_build_waits_for_no_machine(pushed, monkeypatch):
    pushed.publish("cloud.train.jobs=[h100-flex]")
    image = pushed.images["train"]
    assert list(release.resolve_test_jobs(load_settings(), pushed.environment, image)) == ["cpu"]
    monkeypatch.setenv("SET", f"{DEV} cloud.train.jobs=[h100-flex,l4]")
    assert list(release.resolve_test_jobs(load_settings(), pushed.environment, image)) == ["l4"]
    monkeypatch.setenv("JOB_SPEC", "t4")
    [(name, job)] = release.resolve_test_jobs(load_settings(), pushed.environment, image).items()
    assert name == "t4"
    assert job["workerPoolSpecs"][0]["containerSpec"]["imageUri"] == image
    monkeypatch.setenv("JOB_SPEC", "h100-flex")
    with pytest.raises(UserError, match="h100-flex may wait a day for a machine"):
        release.resolve_test_jobs(load_settings(), pushed.environment, image)
    monkeypatch.setenv("JOB_SPEC", "h1000")
    with pytest.raises(UserError, match="no GPU job 'h1000'"):
        release.resolve_test_jobs(load_settings(), pushed.environment, image)


# ── release ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_first_release_asks_for_a_run_of_its_own_version(pushed):
    version = pushed.publish()
    assert pushed.release() == f"requested a run; version {version} is current"
    (asked,) = pushed.requests()
    told, found = release.read_publication(pushed.environment)
    generation = storage.generation(found.values["csv"])
    event = f"push {release.hash_inputs(found)} {found.values['csv']}#{generation}"
    assert asked == {
        "event": event,
        "version": version,
        "parameters": "{}",
        "actor": "build",
        "attempt": 1,
    }
    assert pipeline_version.read_current(pushed.environment) == told


def test_nothing_changed_starts_nothing(pushed):
    pushed.publish()
    pushed.release()
    pushed.start_what_is_asked_for()
    pushed.publish(commit="3c4d")
    assert pushed.release() == "nothing changed: nothing to start"
    assert len(pushed.requests()) == 1


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED"])
def test_a_training_that_failed_is_attempted_anew_by_the_next_push(pushed, state):
    pushed.publish()
    pushed.release()
    pushed.vertex.set_outcome(state=state, through=(), times=1)
    pushed.start_what_is_asked_for()
    pushed.publish(commit="3c4d")
    assert "requested a run, attempt 2" in pushed.release()
    assert [asked["attempt"] for asked in pushed.requests()] == [1, 2]
    pushed.start_what_is_asked_for()
    assert pushed.release() == "nothing changed: nothing to start"


def test_what_is_released_is_noted_as_passed(pushed):
    pushed.publish()
    pushed.test()
    digest = pushed.images["train"].partition("@")[2]
    address = release.builds.passed_uri(pushed.environment, "train", digest)
    assert storage.read(address) is None
    pushed.release()
    assert storage.read(address)[0] == b"1a2b\n"


def test_whoever_is_cut_off_anywhere_asks_for_the_same_run(pushed):
    version = pushed.publish()
    pushed.store.fail("^objects.insert", status=403)
    with pytest.raises(UserError):
        pushed.release()  # asked, and not written
    assert pipeline_version.read_current(pushed.environment) is None
    pushed.start_what_is_asked_for()
    assert pushed.release().endswith(f"version {version} is current")
    assert len({asked["event"] for asked in pushed.requests()}) == 1


def test_other_rows_under_the_same_name_are_another_event(pushed):
    pushed.store.create_bucket("my-project-rows")
    storage.write("gs://my-project-rows/rows.csv", b"a,digit\n1,2\n")
    pushed.publish("data.source=gs://my-project-rows/rows.csv")
    pushed.release()
    pushed.start_what_is_asked_for()
    storage.write("gs://my-project-rows/rows.csv", b"a,digit\n1,3\n")
    assert pushed.release() == "requested a run"
    first, second = pushed.requests()
    assert first["event"] != second["event"]


def test_what_was_trained_before_is_not_trained_again(pushed):
    pushed.publish()
    pushed.release()
    pushed.publish("gate.threshold=0.5")
    pushed.release()
    pushed.start_what_is_asked_for()
    version = pushed.publish()
    said = pushed.release()
    assert "these inputs were trained before: https://console.cloud.google.com/" in said
    assert said.endswith(f"version {version} is current")
    assert len(pushed.requests()) == 2


def test_a_build_that_is_overtaken_releases_nothing(pushed):
    """The older commit builds images, and so publishes later than the one that reverts it."""
    release.BEGAN.parent.mkdir(exist_ok=True)
    release.BEGAN.write_text("2026-11-30T04:04:00+00:00\n")
    version = pushed.publish("gate.threshold=0.5", commit="3c4d")
    pushed.release()
    release.BEGAN.write_text("2026-11-30T04:00:00+00:00\n")
    pushed.publish()
    said = pushed.release()
    assert "commit 3c4d, whose build began later" in said
    assert len(pushed.requests()) == 1
    assert pipeline_version.read_current(pushed.environment)["version"] == version


def test_a_pointer_that_is_damaged_is_written_anew(pushed):
    version = pushed.publish()
    storage.write(f"{pipeline_version.templates_folder(pushed.environment)}/current.json", b"{")
    assert pushed.release().endswith(f"version {version} is current")
    assert pipeline_version.read_current(pushed.environment)["version"] == version


# ── another predictor ───────────────────────────────────────────────────────────────────────────────────────────────
def event_of(pushed):
    """What `run_of` wants of what is published now."""
    _, found = release.read_publication(pushed.environment)
    return found, release.push_event_id(found), pushed.environment


def saved(pushed, run):
    """A saved model, and its address."""
    environment = pushed.environment
    model = pushed.store.root / environment.pipeline_root.removeprefix("gs://") / run / "model"
    model.mkdir(parents=True)
    (model / "model.onnx").write_text(f"the model of {run}")
    manifest.write(model, {"schema": SCHEMA, "data_sha256": "0" * 64, "code_version": "abc"})
    return model, f"{environment.pipeline_root}/{run}/model"


def champion(pushed):
    """A version that is served, and the endpoint that Terraform makes."""
    client, environment = api.client("EndpointService", "europe-west4"), pushed.environment
    request = {
        "parent": environment.parent,
        "endpoint_id": environment.name,
        "endpoint": {"display_name": environment.name},
    }
    client.create_endpoint(request=request).result()
    model, address = saved(pushed, "run-1")
    serving = parameters.serving(load_settings(), environment, pushed.images["predict"])
    assert deployment.deploy(
        environment.registry, model, {"accuracy": 0.9}, "run-1", "better", None, serving, address
    )["champion"]


def images_of_versions(pushed):
    """Version → the image that serves it."""
    [versions] = pushed.vertex.models.by_name.values()
    return {int(number): model.container_spec.image_uri[-1] for number, model in versions.items()}


def served(pushed):
    """Version → its share of the requests."""
    [endpoint] = pushed.vertex.endpoints.by_name.values()
    return {
        int(model.model_version_id): endpoint.traffic_split.get(model.id, 0)
        for model in endpoint.deployed_models
    }


def release_with_predictor(pushed, digit):
    """Another predictor, and nothing else."""
    pushed.images["predict"] = f"example.com/predict@sha256:{digit * 64}"
    pushed.publish(commit=f"with{digit}")
    return pushed.release()


@pytest.fixture
def serving(pushed, monkeypatch):
    """A champion that is served, and whose version is current."""
    from gcp import endpoint
    from google.api_core.future import polling

    monkeypatch.setattr(endpoint, "PAUSE", 0.01)
    monkeypatch.setattr(polling.DEFAULT_POLLING, "_initial", 0.01)
    pushed.publish()
    pushed.release()
    pushed.start_what_is_asked_for()
    champion(pushed)
    return pushed


def test_another_predictor_serves_the_champion_and_nothing_is_trained(serving):
    assert "served by the new server image, as version 2" in release_with_predictor(serving, "1")
    assert images_of_versions(serving) == {1: "0", 2: "1"}
    assert served(serving) == {2: 100}
    assert len(serving.requests()) == 1
    first, second = open_registry(serving.environment.registry).versions()
    assert (second.metrics, second.data_sha256, second.code_version) == (
        first.metrics,
        first.data_sha256,
        first.code_version,
    )
    assert second.run == "run-1+11111111"
    release_with_predictor(
        serving, "0"
    )  # back again: a version of its own, and its origin is not forgotten
    assert open_registry(serving.environment.registry).versions()[-1].run == "run-1+00000000"


def test_a_predictor_that_serves_already_is_no_new_version(serving):
    same = parameters.serving(load_settings(), serving.environment, serving.images["predict"])
    assert deployment.redeploy(serving.environment.registry, same) is None
    assert images_of_versions(serving) == {1: "0"}


def test_a_predictor_that_does_not_answer_leaves_served_what_was_and_the_same_again_tries_again(
    serving,
):
    answers = serving.vertex.predictor
    serving.vertex.predictor = lambda deployed, body: (
        Response({"error": "no"}, 500)
        if deployed.model_version_id == "2"
        else answers(deployed, body)
    )
    before = pipeline_version.read_current(serving.environment)
    with pytest.raises(UserError):
        release_with_predictor(serving, "1")
    assert served(serving) == {1: 100}
    assert pipeline_version.read_current(serving.environment) == before
    serving.vertex.predictor = answers
    assert "as version 2" in serving.release()
    assert served(serving) == {2: 100}
    assert images_of_versions(serving) == {1: "0", 2: "1"}


def test_whoever_is_cut_off_behind_the_deployment_does_not_repeat_it(serving):
    write = pipeline_version.write_current

    def fail(*_):
        raise UserError("cut off")

    serving.monkeypatch.setattr(pipeline_version, "write_current", fail)
    with pytest.raises(UserError, match="cut off"):
        release_with_predictor(serving, "1")
    serving.monkeypatch.setattr(pipeline_version, "write_current", write)
    serving.release()
    assert images_of_versions(serving) == {1: "0", 2: "1"}
    assert (
        pipeline_version.read_current(serving.environment)["version"]
        == release.read_publication(serving.environment)[0]["version"]
    )


def test_without_a_champion_the_next_run_brings_the_predictor(pushed):
    pushed.publish()
    pushed.release()
    pushed.start_what_is_asked_for()
    said = release_with_predictor(pushed, "1")
    assert said.endswith("is current")
    assert not pushed.vertex.calls("models.upload")


@pytest.mark.parametrize("evaluated", ["before", "after"])
def test_a_run_that_goes_on_while_another_predictor_is_pushed_loses_neither(serving, evaluated):
    serving.publish("hyperparameters.epochs=41")
    serving.release()
    told_at_its_start = parameters.serving(
        load_settings(), serving.environment, serving.images["predict"]
    )
    serving.vertex.set_outcome(state="RUNNING", through=(), times=1)
    serving.start_what_is_asked_for()
    run = release.run_of(*event_of(serving)).name.rpartition("/")[2]
    serving.images["predict"] = f"example.com/predict@sha256:{'1' * 64}"
    serving.publish("hyperparameters.epochs=41", commit="with1")
    assert "as version 2" in serving.release()  # at once, for the champion that there is
    compared_with = 1 if evaluated == "before" else 2
    model, address = saved(serving, run)
    outcome = deployment.deploy(
        serving.environment.registry,
        model,
        {"accuracy": 0.99},
        run,
        "better",
        compared_with,
        told_at_its_start,
        address,
    )
    assert outcome == {"version": 3, "champion": True, "problem": None}
    assert images_of_versions(serving)[3] == "0"
    serving.publish("hyperparameters.epochs=41", commit="later")
    assert "as version 4" in serving.release()
    assert images_of_versions(serving)[4] == "1"
    assert served(serving) == {4: 100}
    assert serving.release() == "nothing changed: nothing to start"


def test_what_a_person_has_chosen_stays(serving):
    run = release.run_of(*event_of(serving)).name.rpartition("/")[2]
    model, address = saved(serving, run)
    old = parameters.serving(load_settings(), serving.environment, serving.images["predict"])
    assert deployment.deploy(
        serving.environment.registry, model, {"accuracy": 0.99}, run, "better", 1, old, address
    )["champion"]
    release_with_predictor(serving, "1")
    assert served(serving) == {3: 100}
    deployment.rollback(
        serving.environment.registry, 2, old
    )  # the same model, and the predictor that was good
    serving.publish(commit="docs")
    assert serving.release() == "nothing changed: nothing to start"
    assert served(serving) == {2: 100}


# ── where ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_level_1_by_hand_is_told_what_level_2_needs(pushed, monkeypatch):
    monkeypatch.setenv("SET", f"{DEV} cloud.environments.dev.bucket=my-bucket")
    with pytest.raises(UserError, match="make foundation"):
        submit_build.require_level_2(pushed.environment)
