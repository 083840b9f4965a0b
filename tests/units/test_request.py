"""A person, or a build, asks for a run: what is received, what is refused before it is sent. The servers are doubles."""

import base64
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from core.errors import UserError
from gcp import client as api
from gcp import pipeline_version, storage
from gcp.environment import resolve_environment
from level_1_pipeline import compile as pipeline_compiler
from level_1_pipeline import parameters
from level_2_cicd import request as request_run
from level_2_cicd.rehearsal.server import ApiError, FakeServer
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.trigger_function_container import events
from level_2_cicd.trigger_function_container.request import FIXED, Push, RunMessage, parse
from project.settings import load_settings

from tests.units.project import ROOT

SCHEMA = ROOT / "level_2_cicd/trigger_function_container/request.avsc"
IMAGES = {name: f"example.com/{name}@sha256:{'a' * 64}" for name in parameters.STEP_IMAGES}
PROJECT = "cloud.environments.dev.project=my-project"
VERSION, OTHER = "0" * 15 + "1", "0" * 15 + "2"


class Topics(FakeServer):
    """Topics of Pub/Sub that keep what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[str] = set()
        path = r"/v1/(?P<topic>projects/[^/]+/topics/[^/]+):publish"
        self.routes = [("POST", path, "topics.publish", self._publish)]

    def _publish(self, request):
        topic = request["topic"]
        if topic not in self.known:
            raise ApiError(404, f"Topic not found (resource={topic.split('/')[-1]}).")
        messages = json.loads(request.body)["messages"]
        request.message = topic, [base64.b64decode(message["data"]) for message in messages]
        return {"messageIds": ["7"]}


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> dict:
    """The pipeline, compiled for the cloud."""
    path = tmp_path_factory.mktemp("template") / "pipeline.yaml"
    pipeline_compiler.compile_for_cloud(IMAGES, path)
    return yaml.safe_load(path.read_text())


@pytest.fixture
def environment():
    """The environment's addresses."""
    return resolve_environment(load_settings(PROJECT), "dev")


@pytest.fixture
def bucket(tmp_path, monkeypatch, spec, environment, settings):
    """Cloud Storage, with two published versions; the second trains on other rows' addresses: none."""
    pipeline_version._version.cache_clear()
    values = parameters.from_settings(settings, "gs://rows/digits.csv", environment.registry)
    without = {name: value for name, value in values.items() if name != "csv"}
    with FakeStorage(tmp_path) as double:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", double.address)
        double.create_bucket(environment.storage.removeprefix("gs://"))
        folder = pipeline_version.templates_folder(environment)
        for version, published_values in ((VERSION, values), (OTHER, without)):
            storage.write(f"{folder}/{version}/pipeline.json", json.dumps(spec).encode())
            document = {"labels": {}, "parameters": published_values}
            storage.write(f"{folder}/{version}/parameters.json", json.dumps(document).encode())
        pipeline_version.write_current(
            environment, dict.fromkeys(pipeline_version.FIELDS, "x") | {"version": VERSION}
        )
        double.received.clear()
        yield double


@pytest.fixture
def topics(monkeypatch, environment):
    """Pub/Sub, with the topic."""
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    with Topics() as double:
        double.known.add(environment.topic("requests"))
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", double.address.removeprefix("http://"))
        yield double


@pytest.fixture
def ask(monkeypatch, bucket, topics):
    """The command, in a project whose first environment has a Google Cloud project."""
    settings = load_settings(PROJECT)
    monkeypatch.setattr(request_run, "load_settings", lambda overrides=None: settings)
    monkeypatch.setenv("USER", "me")

    def ask(*given: str) -> None:
        monkeypatch.setattr(sys, "argv", ["request_run", *given])
        request_run.main()

    return ask


def sent(topics) -> list[dict]:
    return [json.loads(data) for _, datas in topics.calls("topics.publish") for data in datas]


def test_what_is_received_is_what_was_asked_for(ask, topics, environment, capsys):
    ask(
        "--event",
        "März",
        "--set",
        "hyperparameters.epochs=50",
        "--set",
        "csv=gs://rows/b=c.csv",
        "--attempt",
        "2",
    )
    ((topic, _),) = topics.calls("topics.publish")
    assert topic == environment.topic("requests")
    (message,) = sent(topics)
    assert json.loads(message.pop("parameters")) == {
        "hyperparameters.epochs": 50,
        "csv": "gs://rows/b=c.csv",
    }
    assert message == {"event": "März", "version": "", "actor": "me", "attempt": 2}
    assert (
        capsys.readouterr().out
        == f"requested a run of version {VERSION}: message 7 on {topic}, event 'März'\n"
    )


def test_the_trigger_function_understands_what_is_sent(ask, topics, spec, bucket, environment):
    ask("--event", "x", "--set", "hyperparameters.epochs=50", "--version", VERSION)
    ((_, (data,)),) = topics.calls("topics.publish")
    body = {
        "message": {
            "data": base64.b64encode(data).decode(),
            "messageId": "7",
            "publishTime": "2026-11-30T04:00:20Z",
        }
    }
    where = events.TriggerConfig(
        None, pipeline_version.templates_folder(environment), environment.incoming
    )
    message = parse(Push, json.dumps(body), "push").message
    run = events.decide(
        message,
        where,
        message.published,
        lambda version: pipeline_version.read(where.templates, version),
    ).run
    assert run.parameters["hyperparameters"]["epochs"] == 50
    assert (run.event, run.labels["actor"]) == ("x", "me")


def test_set_is_for_the_run_and_not_for_project_yaml(ask, topics, monkeypatch):
    monkeypatch.setenv("SET", "hyperparameters.epochs=50 threshold=0.5 label='a b'")
    ask("--set", "threshold=0.6")
    (message,) = sent(topics)
    assert json.loads(message["parameters"]) == {
        "hyperparameters.epochs": 50,
        "threshold": 0.6,
        "label": "a b",
    }


def test_without_an_event_each_is_one_of_its_own(ask, topics):
    ask()
    ask()
    first, second = (message["event"] for message in sent(topics))
    assert first != second
    assert re.fullmatch(r"request me \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first)


def test_a_dry_run_shows_the_message_and_sends_nothing(ask, topics, capsys):
    ask("--dry-run", "--event", "x", "--actor", "the build")
    assert json.loads(capsys.readouterr().out) == {
        "event": "x",
        "version": "",
        "parameters": "{}",
        "actor": "the build",
        "attempt": 1,
    }
    assert topics.received == []


WRONG = [
    (["--set", "treshold=0.5"], "treshold: unknown parameter; did you mean 'threshold'?"),
    (["--set", "threshold=high"], "the value is not valid JSON"),
    (["--set", "threshold"], "expected KEY=VALUE"),
    (["--set", "hyperparameters.epochs=0"], "epochs: Input should be greater than or equal to 1"),
    (["--set", "hyperparameters.epoch=5"], "epoch"),
    (["--set", "jobs=[]"], "jobs cannot be changed"),
    (["--set", "csv=rows.csv"], "csv: expected the address of an object"),
    (["--version", "f" * 16], f"version {'f' * 16} is not published"),
    (["--version", "latest"], "'latest' is not a version; expected 16 digits"),
    (["--version", OTHER], "csv is missing: set data.source"),
    (["--event", " "], "event: Value error, expected text"),
    (["--attempt", "0"], "attempt: Input should be greater than or equal to 1"),
    (["--environment", "test"], "ENVIRONMENT=test"),
]


@pytest.mark.parametrize(("given", "told"), WRONG, ids=[" ".join(given) for given, _ in WRONG])
def test_a_mistake_is_told_before_anything_is_sent(ask, topics, given, told):
    with pytest.raises(UserError) as caught:
        ask(*given)
    assert told in str(caught.value)
    assert topics.received == []


def test_nothing_published_yet_is_told(ask, topics, bucket, environment):
    (
        bucket.root
        / environment.storage.removeprefix("gs://")
        / "templates/train-and-register/current.json"
    ).unlink()
    with pytest.raises(UserError, match="nothing is published yet"):
        ask()
    assert topics.received == []


def test_an_environment_made_by_hand_has_no_function(ask, topics, monkeypatch):
    settings = load_settings(f"{PROJECT} cloud.environments.dev.bucket=mine")
    monkeypatch.setattr(request_run, "load_settings", lambda overrides=None: settings)
    with pytest.raises(UserError, match="no trigger function"):
        ask()


def test_a_topic_that_is_not_there_is_told_with_what_makes_it(ask, topics):
    topics.known.clear()
    with pytest.raises(
        UserError,
        match=r"topic projects/my-project/topics/.*-requests not found\. .*make foundation ENVIRONMENT=dev",
    ):
        ask()


@pytest.mark.parametrize(
    "fault",
    [{"status": 503}, {"status": 0}, {"status": 503, "done": True}, {"status": 0, "done": True}],
)
def test_an_answer_that_is_lost_is_asked_for_again(ask, topics, fault):
    topics.fail("topics.publish", **fault)
    ask("--event", "x")
    assert {message["event"] for message in sent(topics)} == {"x"}


def test_a_refusal_is_one_line(ask, topics):
    topics.fail("topics.publish", status=403, message="User not authorized to perform this action.")
    with pytest.raises(
        UserError, match=r"requesting a run at projects/.*-requests failed: User not authorized"
    ):
        ask()


def test_a_build_sends_what_it_composes_and_a_field_that_is_wrong_is_told(topics, environment):
    request_run.publish(
        environment, request_run.compose("a push", {"threshold": 0.5}, VERSION, "the build")
    )
    (message,) = sent(topics)
    assert message == {
        "event": "a push",
        "version": VERSION,
        "parameters": '{"threshold": 0.5}',
        "actor": "the build",
        "attempt": 1,
    }
    with pytest.raises(UserError, match="event: Value error, expected text"):
        request_run.publish(environment, request_run.compose(""))
    with pytest.raises(UserError, match="colour: Extra inputs"):
        request_run.publish(environment, {**message, "colour": "red"})
    assert len(sent(topics)) == 1


def test_the_schema_is_the_one_home_of_the_fields():
    """Publisher, topic, function and pipeline: the same names, the same kinds."""
    schema = json.loads(SCHEMA.read_text())
    fields = {field["name"]: field["type"] for field in schema["fields"]}
    message = request_run.compose("x")
    assert list(message) == list(fields) == list(RunMessage.model_fields)
    assert {
        name: {str: "string", int: "int"}[type(value)] for name, value in message.items()
    } == fields
    assert all(field["doc"] for field in schema["fields"])
    assert parse(RunMessage, json.dumps(message), "request").model_dump() == message


def test_what_cannot_be_asked_for_are_parameters_of_the_pipeline(spec):
    declared = spec["root"]["inputDefinitions"]["parameters"]
    assert {*FIXED, "csv", "hyperparameters"} <= set(declared)


def test_make_request_is_the_command(bucket, topics, tmp_path, project):
    """As a person types it."""
    text = (project / "project.yaml").read_text()
    (project / "project.yaml").write_text(
        text.replace('dev: {project: ""', 'dev: {project: "my-project"')
    )
    levels = ("level_1_pipeline", "level_2_cicd")
    for name in ("Makefile", "pyproject.toml", "requirements", *levels):
        (project / name).symlink_to(ROOT / name)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    variables = {**environment, "PYTHONPATH": "src"}
    command = [
        "make",
        "request",
        "-o",
        "setup",
        f"RUN_PYTHON={sys.executable}",
        "SET=hyperparameters.epochs=50",
        "EVENT=by make",
    ]
    done = subprocess.run(
        command, cwd=project, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (message,) = sent(topics)
    assert (message["event"], message["parameters"]) == (
        "by make",
        '{"hyperparameters.epochs": 50}',
    )
