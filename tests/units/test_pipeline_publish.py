"""Publishing the pipeline: what the registry and the bucket receive, and what is refused before. The servers are doubles."""

import hashlib
import json
import sys

import pytest
import yaml
from core.errors import UserError
from gcp import client as api
from level_1_pipeline import compile as pipeline_compiler
from level_1_pipeline import parameters
from level_2_cicd.kfp_compile_container import main as kfp_compile
from level_2_cicd.kfp_run_container import main as kfp_run
from level_2_cicd.rehearsal.kfp_templates import FakeTemplateRegistry
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex
from project import git
from project.settings import load_settings

DIGESTS = {name: f"example.com/{name}@sha256:{'0' * 64}" for name in kfp_compile.IMAGES}
CLOUD = "cloud.environments.dev.project=my-project data.source=gs://rows/rows.csv"


@pytest.fixture
def storage(tmp_path, monkeypatch, settings):
    """A double of Cloud Storage, with the project's bucket."""
    (tmp_path / f"my-project-{settings.name}-storage").mkdir()
    with FakeStorage(tmp_path) as storage:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.address)
        monkeypatch.setenv("SET", CLOUD)
        yield storage


@pytest.fixture
def templates(monkeypatch):
    """A double of the template registry."""
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    with FakeTemplateRegistry() as templates:
        yield templates


@pytest.fixture
def publish(templates, monkeypatch, capsys):
    """The command; what it prints."""

    def publish(*options: str, images: object = DIGESTS) -> dict:
        where = [
            "--templates",
            f"{templates.address}/my-project/repository",
            "--tag",
            "v1",
            "--commit",
            "1A2b-dirty",
        ]
        monkeypatch.setattr(
            sys, "argv", ["kfp_publish", "--images", json.dumps(images), *where, *options]
        )
        kfp_compile.main()
        return json.loads(capsys.readouterr().out)

    return publish


def read(storage_root, address: str) -> bytes:
    return (storage_root / address.removeprefix("gs://")).read_bytes()


def test_the_registry_and_the_bucket_receive_the_same_pipeline(
    storage, templates, publish, tmp_path, settings
):
    told = publish()
    (uploaded,) = templates.calls("templates.upload")
    assert uploaded["tags"] == ["v1"]
    assert told["sha256"] == hashlib.sha256(uploaded["content"]).hexdigest()
    assert (
        told["template"]
        == f"{templates.address}/my-project/repository/train-and-register/sha256:{told['sha256']}"
    )
    folder = (
        f"gs://my-project-{settings.name}-storage/templates/train-and-register/{told['version']}"
    )
    assert (told["pipeline"], told["parameters"]) == (
        f"{folder}/pipeline.json",
        f"{folder}/parameters.json",
    )
    pipeline = json.loads(read(tmp_path, told["pipeline"]))
    assert pipeline == yaml.safe_load(uploaded["content"])
    executors = pipeline["deploymentSpec"]["executors"]
    images = {
        name.removeprefix("exec-"): executors[name]["container"]["image"] for name in executors
    }
    assert images == {
        **dict.fromkeys(("preprocess", "evaluate", "gate"), DIGESTS["train"]),
        "vertex-train": DIGESTS["vertex_train"],
        "register": DIGESTS["deploy"],
    }


def test_the_parameters_are_those_of_the_settings(storage, publish, tmp_path):
    document = json.loads(read(tmp_path, publish()["parameters"]))
    assert document["labels"] == {"commit": "1A2b-dirty"}
    values = document["parameters"]
    settings = load_settings()
    assert values["csv"] == "gs://rows/rows.csv"
    assert values["threshold"] == settings.gate.threshold
    assert values["hyperparameters"]["epochs"] == settings.hyperparameters.epochs
    assert len(values["jobs"]) == len(settings.cloud.train.jobs)
    assert {
        pool["containerSpec"]["imageUri"]
        for job in values["jobs"]
        for pool in job["workerPoolSpecs"]
    } == {DIGESTS["train"]}
    assert values["registry"] == f"gs://my-project-{settings.name}-storage/registry"
    assert values["serving"] == {
        "project": "my-project",
        "region": settings.cloud.region,
        "endpoint": settings.name,
        "image": DIGESTS["predict"],
        "machine": settings.cloud.serve.machine,
        "replicas": list(settings.cloud.serve.replicas),
        "canary_percent": settings.cloud.serve.canary_percent,
        "service_account": f"{settings.name}-predictor@my-project.iam.gserviceaccount.com",
        "key": "",
    }


def test_what_is_published_can_be_started(storage, publish, monkeypatch, capsys):
    told = publish()
    with FakeVertex() as vertex:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", vertex.address)
        where = [
            "--project",
            "my-project",
            "--region",
            "europe-west4",
            "--pipeline-root",
            "gs://root",
        ]
        given = [
            "--template",
            told["pipeline"],
            "--parameters",
            told["parameters"],
            "--event",
            "a push",
        ]
        monkeypatch.setattr(sys, "argv", ["kfp_submit", *given, *where])
        kfp_run.main()
        (job,) = vertex.calls("pipelineJobs.create")
        assert job.labels["commit"] == "1a2b-dirty"  # the model will tell from which code it came


def test_again_changes_nothing_and_another_setting_goes_to_another_place(
    storage, publish, monkeypatch, tmp_path
):
    first = publish()
    content = read(tmp_path, first["parameters"])
    generations = [storage.calls("objects.insert").copy()]
    assert publish() == first
    assert (
        storage.calls("objects.insert") == generations[0]
    )  # refused by ifGenerationMatch=0, and known to be the same
    monkeypatch.setenv("SET", f"{CLOUD} gate.threshold=0.5")
    other = publish()
    assert other["sha256"] == first["sha256"]
    assert other["parameters"] != first["parameters"]
    assert read(tmp_path, first["parameters"]) == content


def test_an_object_with_other_content_is_left_as_it_is(storage, publish, tmp_path):
    environment = tmp_path / publish()["pipeline"].removeprefix("gs://")
    environment.write_bytes(b"{}")
    with pytest.raises(
        UserError, match=r"pipeline\.json is there already with other content\. `gcloud storage rm"
    ):
        publish()
    assert environment.read_bytes() == b"{}"


def test_a_dry_run_sends_nothing_and_shows_what_would_be_published(
    storage, templates, tmp_path, monkeypatch, capsys
):
    options = [
        "--images",
        json.dumps(DIGESTS),
        "--templates",
        templates.address,
        "--output",
        str(tmp_path / "new" / "out"),
    ]
    monkeypatch.setattr(sys, "argv", ["kfp_publish", *options, "--dry-run"])
    kfp_compile.main()
    assert storage.received == templates.received == []
    written = (tmp_path / "new" / "out" / "parameters.json").read_text()
    assert capsys.readouterr().out == written
    assert json.loads(written)["parameters"]["csv"] == "gs://rows/rows.csv"
    assert (
        json.loads((tmp_path / "new" / "out" / "pipeline.json").read_text())["pipelineInfo"]["name"]
        == "train-and-register"
    )


def test_rows_of_this_machine_are_left_to_the_event(storage, publish, monkeypatch, tmp_path):
    monkeypatch.setenv("SET", CLOUD.split(maxsplit=1)[0])
    assert "csv" not in json.loads(read(tmp_path, publish()["parameters"]))["parameters"]
    assert (
        json.loads(read(tmp_path, publish("--csv", "gs://a/b.csv")["parameters"]))["parameters"][
            "csv"
        ]
        == "gs://a/b.csv"
    )


def test_the_code_must_be_known(storage, templates, publish, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(git, "version", lambda: "unknown")
    output = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"--commit: nobody could tell from which code .* --commit 1a2b3c"
    ):
        publish("--commit", "", "--output", str(output))
    assert storage.received == templates.received == []
    assert not output.exists()
    assert publish("--commit", "", "--dry-run")["labels"] == {}
    monkeypatch.setattr(git, "version", lambda: "3c4d")
    assert publish("--commit", "", "--dry-run")["labels"] == {"commit": "3c4d"}


def test_the_tag_is_the_commit_where_none_is_given(storage, templates, publish):
    publish("--tag", "")
    assert templates.calls("templates.upload")[0]["tags"] == ["1a2b-dirty"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"train": "example.com/train:latest"},
            "--images: train must be named, as ADDRESS@sha256:",
        ),
        ({"predict": "example.com/predict@sha256:12"}, "--images: predict must be named"),
        (["train"], "--images: wants a JSON object"),
        ({"deploy": None}, "--images: deploy: wants an image's address"),
    ],
)
def test_an_image_without_a_digest_is_refused(storage, templates, publish, change, told):
    with pytest.raises(UserError) as caught:
        publish(images={**DIGESTS, **change} if isinstance(change, dict) else change)
    assert told in str(caught.value)
    assert storage.received == templates.received == []


@pytest.mark.parametrize("missing", parameters.STEP_IMAGES)
def test_compiling_refuses_an_image_without_a_digest(missing, tmp_path):
    images = {**DIGESTS, missing: "example.com/image:latest"}
    with pytest.raises(
        UserError,
        match=rf"the image of {missing}_container is 'example\.com/image:latest'; expected",
    ):
        pipeline_compiler.compile_for_cloud(images, tmp_path / "pipeline.yaml")
    assert not (tmp_path / "pipeline.yaml").exists()


@pytest.mark.parametrize(
    ("settings_", "told"),
    [
        ("data.label=digit", r"cloud\.environments\.dev\.project in project\.yaml is empty"),
        (f"{CLOUD} cloud.train.jobs=[l5]", "l5"),
    ],
)
def test_a_setting_that_cannot_be_published_is_told_before_anything_is_sent(
    storage, templates, publish, monkeypatch, settings_, told
):
    monkeypatch.setenv("SET", settings_)
    with pytest.raises(UserError, match=told):
        publish()
    assert storage.received == templates.received == []


def test_a_lost_answer_is_asked_for_again_at_every_call(storage, templates, publish, tmp_path):
    expected = publish()
    for call in ("templates.upload", "objects.insert"):
        for after in range(2):
            for fault in ({"status": 503}, {"status": 0, "done": True}):
                for path in tmp_path.rglob("*.json"):
                    path.unlink()
                for double in (templates, storage):
                    double.faults.clear()
                    double.fail(call, after=after, **fault)
                assert publish() == expected
                assert read(tmp_path, expected["pipeline"])


def test_a_refusal_of_the_registry_is_one_line(storage, templates, publish):
    templates.fail("templates.upload", status=403, message="Permission denied on resource")
    with pytest.raises(
        UserError,
        match=r"publishing the template to .* failed: .*Permission denied.*A permission is missing",
    ):
        publish()
