"""The trigger function: what a message means, and what is received when it is delivered. The servers are doubles."""

import base64
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import functions_framework
import pytest
import yaml
from core.errors import UserError
from gcp import client as api
from gcp import pipeline_version, storage
from gcp.environment import resolve_environment
from gcp.pipeline_version import PipelineVersion
from level_1_pipeline import compile as pipeline_compiler
from level_1_pipeline import parameters
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex
from level_2_cicd.trigger_function_container import events
from level_2_cicd.trigger_function_container.events import InvalidMessage, NotPublished
from level_2_cicd.trigger_function_container.request import PubsubMessage, Push, RunMessage, parse
from project.settings import load_settings
from pydantic import ValidationError

from tests.units.project import ROOT

FOLDER = ROOT / "level_2_cicd/trigger_function_container"
TEMPLATES, INCOMING = "gs://storage/templates/train-and-register", "gs://rows/incoming"
VARIABLES = {
    "PROJECT": "my-project",
    "REGION": "europe-west4",
    "PIPELINE_ROOT": "gs://root",
    "TEMPLATES": TEMPLATES,
    "SERVICE_ACCOUNT": "digit-reader-pipeline@my-project.iam.gserviceaccount.com",
    "KMS_KEY": "projects/p/locations/l/keyRings/r/cryptoKeys/k",
    "INCOMING": INCOMING,
    "NETWORK_ATTACHMENT": "projects/p/regions/r/networkAttachments/a",
    "DATA_SOURCE": "gs://rows/digits.csv",
    "BATCH_WINDOW_MINUTES": "0",
}
PLACE = events.read_config(VARIABLES)
EACH_FILE = replace(PLACE, source="")  # data.source is in no bucket
IMAGES = {name: f"example.com/{name}@sha256:{'a' * 64}" for name in parameters.STEP_IMAGES}
TRAIN = {"seed": 0, "threads": 1, "epochs": 40, "batch_size": 128, "learning_rate": 0.003}
VALUES = {
    "csv": "gs://rows/digits.csv",
    "label": "digit",
    "ignore": [],
    "categorical": [],
    "test_fraction": 0.2,
    "split_seed": 0,
    "hyperparameters": TRAIN,
    "jobs": [{"workerPoolSpecs": []}],
    "metric": "accuracy",
    "threshold": 0.95,
    "max_regression": 0.0,
    "registry": "gs://storage/registry",
    "serving": {"machine": "n2-standard-2"},
}
WITHOUT_CSV = {name: value for name, value in VALUES.items() if name != "csv"}
NOW = datetime(2026, 11, 30, 4, 0, 30, tzinfo=UTC)
VERSION, OTHER = "0" * 15 + "1", "0" * 15 + "2"


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> dict:
    """The pipeline, compiled for the cloud."""
    path = tmp_path_factory.mktemp("template") / "pipeline.yaml"
    pipeline_compiler.compile_for_cloud(IMAGES, path)
    return yaml.safe_load(path.read_text())


def request(**fields) -> dict:
    """A request; fields that are not given have values that fit."""
    return {
        "event": "a push",
        "version": "",
        "parameters": "{}",
        "actor": "Me@example.com",
        "attempt": 1,
        **fields,
    }


def notification(kind="OBJECT_FINALIZE", name="incoming/a.csv", **attributes) -> dict:
    """The attributes of a notification of Cloud Storage."""
    told = {
        "bucketId": "rows",
        "objectId": name,
        "objectGeneration": "17",
        "eventTime": "2026-11-30T04:00:10.123456Z",
    }
    return {"eventType": kind, **told, "payloadFormat": "JSON_API_V1", **attributes}


def push(content=b"", /, attributes=None, **fields) -> bytes:
    """The body of a delivery."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    message = {
        "data": base64.b64encode(content).decode(),
        "attributes": attributes or {},
        "messageId": "12",
        "message_id": "12",
        "publishTime": "2026-11-30T04:00:20.5Z",
        **fields,
    }
    return json.dumps(
        {
            "message": message,
            "subscription": "projects/my-project/subscriptions/x",
            "deliveryAttempt": 1,
        }
    ).encode()


@pytest.fixture
def decide(spec):
    """What a message means, with a published version whose parameters are given."""

    def decide(body: bytes, values=VALUES, environment=PLACE, now=NOW):
        def find(version: str) -> PipelineVersion:
            if version not in ("", VERSION):
                raise NotPublished("there is none")
            return PipelineVersion(
                VERSION,
                f"{TEMPLATES}/{VERSION}/pipeline.json",
                spec,
                dict(values),
                {"commit": "1a2b"},
            )

        return events.decide(parse(Push, body, "push").message, environment, now, find)

    return decide


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_request_is_a_run_of_what_is_published(decide):
    run = decide(push(request())).run
    assert (run.event, run.attempt, run.parameters, run.template) == (
        "a push",
        1,
        VALUES,
        f"{TEMPLATES}/{VERSION}/pipeline.json",
    )
    assert run.labels == {"commit": "1a2b", "actor": "Me@example.com"}
    assert decide(push(request(version=VERSION, attempt=2))).run == replace(run, attempt=2)


def test_parameters_are_put_over_the_published_ones(decide):
    asked = {
        "hyperparameters.epochs": 50,
        "threshold": 0.5,
        "csv": "gs://other/rows of May.csv",
        "ignore": ["id"],
    }
    run = decide(push(request(parameters=json.dumps(asked)))).run
    assert run.parameters == {
        **VALUES,
        "threshold": 0.5,
        "csv": "gs://other/rows of May.csv",
        "ignore": ["id"],
        "hyperparameters": {**TRAIN, "epochs": 50},
    }


def test_what_is_published_is_never_changed_by_a_request(decide, spec):
    before = json.dumps([VALUES, spec])
    decide(
        push(request(parameters='{"hyperparameters.epochs": 50, "hyperparameters.dropout": 0.5}'))
    )
    assert json.dumps([VALUES, spec]) == before


def test_the_scheduler_sends_the_same_words_and_the_minute_makes_them_an_event(decide):
    body = push(request(event="schedule", actor="schedule"))
    assert decide(body).run.event == "schedule 2026-11-30T04:00Z"
    later = push(request(event="schedule"), publishTime="2026-12-07T05:00:59.999999999+01:00")
    assert decide(later).run.event == "schedule 2026-12-07T04:00Z"
    assert decide(push(request(event="schedule of May"))).run.event == "schedule of May"


WRONG = [
    (
        {"parameters": '{"treshold": 0.5}'},
        "treshold: unknown parameter; did you mean 'threshold'?",
    ),
    ({"parameters": '{"threshold": "0.5"}'}, "threshold: expected a number"),
    ({"parameters": '{"csv": 5}'}, "csv: expected text"),
    ({"parameters": '{"csv": "/etc/passwd"}'}, "csv: expected the address of an object"),
    ({"parameters": '{"csv": "gs://rows/../../x.csv"}'}, "csv: expected the address of an object"),
    ({"parameters": '{"csv.x": 5}'}, "'csv' is not a mapping"),
    ({"parameters": '{"hyperparameters.epoch": 5}'}, "epoch"),
    (
        {"parameters": '{"hyperparameters.epochs": 0}'},
        "epochs: Input should be greater than or equal to 1",
    ),
    ({"parameters": '{"hyperparameters.epochs": true}'}, "epochs"),
    ({"parameters": '{"hyperparameters": {"epochs": 5}}'}, "seed"),
    ({"parameters": '{"hyperparameters.": 5}'}, "is not a key"),
    ({"parameters": '{"run": "mine"}'}, "run cannot be changed"),
    (
        {"parameters": '{"jobs": [], "serving.image": "mine", "registry": "gs://mine"}'},
        "jobs, registry, serving cannot be changed",
    ),
    ({"parameters": "[]"}, "parameters: expected a JSON object"),
    ({"parameters": "{"}, "parameters: not valid JSON"),
    ({"parameters": '{"threshold": NaN}'}, "parameters: not valid JSON"),
    ({"parameters": '{"threshold": 1e999}'}, "too large"),
    ({"parameters": '{"split_seed": 1' + 400 * "0" + "}"}, "too large"),
    ({"parameters": '{"ignore": ' + 30 * "[" + 30 * "]" + "}"}, "nested"),
    (
        {"parameters": '{"ignore": ' + 100_000 * "[" + "}"},
        "parameters: String should have at most 100000 characters",
    ),
    ({"parameters": '{"label": "\\ud800"}'}, "parameters: not valid JSON"),
    ({"parameters": {}}, "parameters: Input should be a valid string"),
    ({"event": " \n"}, "event: Value error, expected text"),
    ({"event": "x" * 1001}, "event: String should have at most 1000 characters"),
    ({"attempt": 0}, "attempt: Input should be greater than or equal to 1"),
    ({"attempt": True}, "attempt: Input should be a valid integer"),
    ({"attempt": 1.0}, "attempt: Input should be a valid integer"),
    ({"version": OTHER}, "there is none"),
    ({"version": "../../x"}, "there is none"),
    ({"version": None}, "version: Input should be a valid string"),
    (
        {"colour": "red"},
        "colour: Extra inputs are not permitted",
    ),
]


@pytest.mark.parametrize(("change", "told"), WRONG, ids=[str(change)[:60] for change, _ in WRONG])
def test_a_request_that_can_never_be_a_run_is_poison(decide, change, told):
    with pytest.raises(InvalidMessage) as caught:
        decide(push(request(**change)))
    assert told in str(caught.value)


@pytest.mark.parametrize("missing", RunMessage.model_fields)
def test_every_field_of_a_request_must_be_there(decide, missing):
    with pytest.raises(InvalidMessage, match=f"{missing}: Field required"):
        decide(push({name: value for name, value in request().items() if name != missing}))


def test_a_request_without_rows_says_where_they_are_named(decide):
    with pytest.raises(InvalidMessage, match=r"csv is missing.*data\.source in project\.yaml"):
        decide(push(request()), values=WITHOUT_CSV)
    run = decide(push(request(parameters='{"csv": "gs://rows/a.csv"}')), values=WITHOUT_CSV).run
    assert run.parameters == {**WITHOUT_CSV, "csv": "gs://rows/a.csv"}


# ── pushes that are none ────────────────────────────────────────────────────────────────────────────────────────────
BODIES = [
    b"",
    b"{",
    b"\xff",
    b"[]",
    b"null",
    b"5",
    b"{}",
    b'{"message": 5}',
    b'{"message": {}}',
    100_000 * b"[",
    100_000 * b'{"a":',
    push(request(), messageId=5),
    push(request(), data="*"),
    push(request(), data=5),
    push(request(), publishTime=None),
    push(request(), publishTime="yesterday"),
    push(request(), publishTime="0001-01-01T00:00:00+23:00"),
    push(request(), publishTime="2026-02-30T00:00:00Z"),
    push(request(), attributes=["eventType"]),
    push(request(), attributes={"a": 5}),
    push(b"\xff"),
    push(b""),
    push(b"5"),
    push([]),
]


@pytest.mark.parametrize(
    "body", BODIES, ids=[str(body[:40]) + str(index) for index, body in enumerate(BODIES)]
)
def test_a_body_that_is_no_delivery_is_poison(decide, body):
    with pytest.raises(InvalidMessage):
        decide(body)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("values", [VALUES, WITHOUT_CSV])
def test_a_new_file_is_an_event_and_its_address_the_rows_where_project_yaml_names_none_in_a_bucket(
    decide, values
):
    """Also where a push has published rows of its own, such as a sample's."""
    run = decide(push(attributes=notification()), values, EACH_FILE).run
    assert run.event == "data rows/incoming/a.csv#17 OBJECT_FINALIZE"
    assert run.parameters == {**WITHOUT_CSV, "csv": "gs://rows/incoming/a.csv"}
    assert run.labels["actor"] == "data"


@pytest.mark.parametrize("kind", ["OBJECT_FINALIZE", "OBJECT_ARCHIVE", "OBJECT_DELETE"])
def test_where_project_yaml_names_rows_in_a_bucket_every_change_starts_a_run_on_those(decide, kind):
    run = decide(push(attributes=notification(kind))).run
    assert run.event == f"data rows/incoming/a.csv#17 {kind}"
    assert run.parameters == VALUES


@pytest.mark.parametrize("kind", ["OBJECT_ARCHIVE", "OBJECT_DELETE"])
def test_a_file_that_is_gone_is_nothing_to_train_on(decide, kind):
    decision = decide(push(attributes=notification(kind)), environment=EACH_FILE)
    assert (decision.run, decision.wait) == (None, False)
    assert decision.why == "gs://rows/incoming/a.csv was deleted: nothing to train on"


@pytest.mark.parametrize("kind", ["OBJECT_ARCHIVE", "OBJECT_DELETE"])
@pytest.mark.parametrize("environment", [PLACE, EACH_FILE])
def test_an_overwrite_is_one_event(decide, kind, environment):
    old = decide(
        push(attributes=notification(kind, overwrittenByGeneration="18")), environment=environment
    )
    new = decide(
        push(attributes=notification(objectGeneration="18", overwroteGeneration="17")),
        environment=environment,
    )
    assert old.run is None
    assert "overwritten" in old.why
    assert new.run.event == "data rows/incoming/a.csv#18 OBJECT_FINALIZE"


@pytest.mark.parametrize(
    ("gone", "runs"),
    [
        ("2026-08-30T04:00:00Z", False),
        ("2026-11-30T04:00:10.1Z", True),
        ("soon", True),
        (None, True),
        (5, True),
    ],
)
def test_an_old_generation_that_a_bucket_clears_away_starts_nothing(decide, gone, runs):
    """A bucket with versions tells of those too, months after they were overwritten."""
    resource = {"name": "incoming/a.csv", "generation": "17"} | (
        {} if gone is None else {"timeDeleted": gone}
    )
    decision = decide(push(resource, notification("OBJECT_DELETE")))
    assert bool(decision.run) is runs
    assert runs or decision.why == "a noncurrent version was deleted; the dataset is unchanged"
    assert decide(
        push(resource, notification("OBJECT_ARCHIVE"))
    ).run  # what is archived was there until now


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        (notification(name="incoming/a.txt"), "does not end in .csv"),
        (notification(name="incoming/a.CSV"), "does not end in .csv"),
        (notification(name="elsewhere/a.csv"), "is not below gs://rows/incoming"),
        (notification(name="incoming.csv"), "is not below gs://rows/incoming"),
        (notification(bucketId="other"), "is not below gs://rows/incoming"),
        (notification("OBJECT_METADATA_UPDATE"), "changes no data"),
        (notification(name="incoming/../secret.csv"), "not a valid file name"),
        (notification(name="incoming//a.csv"), "not a valid file name"),
        (notification(name="incoming/a\nb.csv"), "not a valid file name"),
    ],
)
def test_what_concerns_no_rows_starts_nothing(decide, attributes, why):
    decision = decide(push(attributes=attributes))
    assert (decision.run, decision.wait) == (None, False)
    assert why in decision.why


@pytest.mark.parametrize(
    "attributes",
    [
        notification("finalized"),
        notification(""),
        notification(objectGeneration="x"),
        notification(objectGeneration=""),
        notification(bucketId=""),
        notification(name=""),
        {"eventType": "OBJECT_FINALIZE"},
    ],
)
def test_a_notification_that_is_none_is_poison(decide, attributes):
    with pytest.raises(InvalidMessage, match="invalid notification of Cloud Storage"):
        decide(push(attributes=attributes))


# ── files, gathered ─────────────────────────────────────────────────────────────────────────────────────────────────
BATCHED = replace(PLACE, batch_window_minutes=15)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_files_of_one_window_are_one_event_and_wait_until_it_is_closed(decide):
    bodies = [
        push(attributes=notification(name=f"incoming/{index}.csv", eventTime=time))
        for index, time in enumerate(
            ["2026-11-30T04:00:00Z", "2026-11-30T05:07:10+01:00", "2026-11-30T04:14:59.999999Z"]
        )
    ]
    early = [decide(body, environment=BATCHED, now=at("2026-11-30T04:14:59.9")) for body in bodies]
    assert {(it.event, it.run, it.wait) for it in early} == {
        ("data window 2026-11-30T04:00Z", None, True)
    }
    assert early[0].why == "files are batched until 2026-11-30T04:15Z"
    ripe = [decide(body, environment=BATCHED, now=at("2026-11-30T04:15:00")) for body in bodies]
    assert {it.run.event for it in ripe} == {"data window 2026-11-30T04:00Z"}
    assert {it.run.identity for it in ripe} == {ripe[0].run.identity}
    assert ripe[0].run.parameters == VALUES
    following = push(attributes=notification(eventTime="2026-11-30T04:15:00Z"))
    assert (
        decide(following, environment=BATCHED, now=at("2026-11-30T05:00:00")).run.event
        == "data window 2026-11-30T04:15Z"
    )


def test_a_window_goes_by_when_it_happened_and_not_by_when_it_was_told(decide):
    """Cloud Storage may tell the same twice, and late; only an old message without that time goes by Pub/Sub's."""
    late = push(
        attributes=notification(eventTime="2026-11-30T03:59:59Z"),
        publishTime="2026-11-30T09:00:00Z",
    )
    assert (
        decide(late, environment=BATCHED, now=at("2026-11-30T09:01:00")).run.event
        == "data window 2026-11-30T03:45Z"
    )
    attributes = notification()
    del attributes["eventTime"]
    untimed = push(attributes=attributes, publishTime="2026-11-30T09:00:00Z")
    assert (
        decide(untimed, environment=BATCHED, now=at("2026-11-30T10:00:00")).run.event
        == "data window 2026-11-30T09:00Z"
    )


def test_a_window_does_not_wait_for_what_starts_nothing(decide):
    for attributes in (
        notification(name="incoming/a.txt"),
        notification("OBJECT_DELETE", overwrittenByGeneration="18"),
    ):
        decision = decide(
            push(attributes=attributes), environment=BATCHED, now=at("2026-11-30T04:01:00")
        )
        assert (decision.run, decision.wait) == (None, False)


def test_windows_need_rows_in_a_bucket(decide):
    with pytest.raises(
        InvalidMessage, match=r"cloud\.events\.batch_window_minutes needs one dataset"
    ):
        decide(push(attributes=notification()), environment=replace(BATCHED, source=""))


@pytest.mark.parametrize("time", ["9999-12-31T23:59:00Z", "2026-12-02T04:00:00Z", "soon"])
def test_a_window_that_will_never_close_is_poison(decide, time):
    with pytest.raises(InvalidMessage):
        decide(push(attributes=notification(eventTime=time)), environment=BATCHED)


def test_a_request_is_never_batched(decide):
    assert decide(push(request()), environment=BATCHED).run.event == "a push"


# ── the environment ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_environment_is_what_the_settings_say(monkeypatch):
    """Each variable is one address of gcp.environment."""
    where = resolve_environment(load_settings("cloud.environments.dev.project=my-project"), "dev")
    environment = events.read_config(
        {
            "PROJECT": where.project,
            "REGION": where.region,
            "PIPELINE_ROOT": where.pipeline_root,
            "TEMPLATES": pipeline_version.templates_folder(where),
            "SERVICE_ACCOUNT": where.account("pipeline"),
            "KMS_KEY": where.key,
            "INCOMING": where.incoming,
            "NETWORK_ATTACHMENT": where.network_attachment,
            "DATA_SOURCE": "",
            "BATCH_WINDOW_MINUTES": "15",
        }
    )
    assert environment.target.root == where.pipeline_root
    assert environment.target.service_account.endswith(
        "-pipeline@my-project.iam.gserviceaccount.com"
    )
    assert environment.batch_window_minutes == 15


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_that_is_missing_or_wrong_is_told_by_its_name(name):
    for variables in (
        {**VARIABLES, name: "Nonsense value"},
        {key: it for key, it in VARIABLES.items() if key != name},
    ):
        if (
            name in ("SERVICE_ACCOUNT", "KMS_KEY", "NETWORK_ATTACHMENT", "DATA_SOURCE")
            and name not in variables
        ):
            continue  # Google's own
        with pytest.raises(UserError, match=f"{name}="):
            events.read_config(variables)


def test_the_template_s_folder_bears_the_pipelines_name():
    assert pipeline_version.NAME == pipeline_compiler.load_definition().NAME


# ── delivered ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def vertex(monkeypatch):
    """A double of Vertex AI."""
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    with FakeVertex() as vertex:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", vertex.address)
        yield vertex


@pytest.fixture
def bucket(tmp_path, monkeypatch, spec):
    """A double of Cloud Storage, with two versions, of which the first is current."""
    pipeline_version._version.cache_clear()
    with FakeStorage(tmp_path) as double:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", double.address)
        double.create_bucket("storage")
        for version, values in ((VERSION, VALUES), (OTHER, {**VALUES, "threshold": 0.5})):
            storage.write(f"{TEMPLATES}/{version}/pipeline.json", json.dumps(spec).encode())
            document = {"labels": {"commit": "1A2b"}, "parameters": values}
            storage.write(f"{TEMPLATES}/{version}/parameters.json", json.dumps(document).encode())
        point(VERSION)
        yield double


def point(version: str) -> None:
    pipeline_version.write_pointer(
        TEMPLATES, dict.fromkeys(pipeline_version.FIELDS, "") | {"version": version}
    )


@pytest.fixture
def deliver(bucket, vertex, capsys):
    """Deliver a body through functions-framework; the status, and the line in the log."""
    main = str(FOLDER / "main.py")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        client = functions_framework.create_app("handle", main).test_client()

    def deliver(body: bytes, method: str = "POST"):
        capsys.readouterr()
        answer = client.open("/", method=method, data=body, content_type="application/json")
        (line,) = capsys.readouterr().out.splitlines()
        told = json.loads(line)
        assert told["status"] == answer.status_code
        return answer.status_code, told

    return deliver


def test_a_delivered_request_is_received_by_vertex_ai(deliver, vertex):
    status, told = deliver(push(request(parameters='{"hyperparameters.epochs": 50}')))
    (job,) = vertex.calls("pipelineJobs.create")
    assert (status, told["severity"], told["event"], told["messageId"]) == (
        200,
        "NOTICE",
        "a push",
        "12",
    )
    assert told["run"].split("/")[-1] == job.name.split("/")[-1]
    assert told["run"].split("/")[-1] in told["message"]
    received = json.loads(type(job).to_json(job))
    assert received["runtimeConfig"]["parameterValues"] == {
        **VALUES,
        "hyperparameters": {**TRAIN, "epochs": 50},
        "run": job.name.split("/")[-1],
    }
    assert job.runtime_config.gcs_output_directory == "gs://root"
    assert job.service_account == VARIABLES["SERVICE_ACCOUNT"]
    assert job.encryption_spec.kms_key_name == VARIABLES["KMS_KEY"]
    assert {"commit": "1a2b", "actor": "me-example-com", "event": "a-push"}.items() <= dict(
        job.labels
    ).items()


def test_the_pointer_says_what_an_event_starts_and_a_version_is_named_to_start_another(
    deliver, vertex
):
    deliver(push(request(event="one")))
    deliver(push(request(event="two", version=OTHER)))
    point(OTHER)
    deliver(push(request(event="three")))
    deliver(push(request(event="four", version=VERSION)))
    jobs = [json.loads(type(job).to_json(job)) for job in vertex.calls("pipelineJobs.create")]
    assert [job["runtimeConfig"]["parameterValues"]["threshold"] for job in jobs] == [
        0.95,
        0.5,
        0.5,
        0.95,
    ]


def test_the_same_again_starts_nothing(deliver, vertex):
    first = deliver(push(request()))
    again = deliver(push(request()))
    assert (again[0], again[1]["severity"], again[1]["run"]) == (200, "INFO", first[1]["run"])
    assert again[1]["message"].startswith("already started: ")
    point(OTHER)
    late = deliver(push(request()))
    assert late[0] == 200
    assert late[1]["message"].startswith(
        "already started with another template or other parameters"
    )
    assert len(vertex.calls("pipelineJobs.create")) == 1
    deliver(push(request(attempt=2)))
    identities = [job.name.split("/")[-1] for job in vertex.calls("pipelineJobs.create")]
    assert identities[1] == f"{identities[0]}-a2"


def test_many_at_once_are_one_run(deliver, bucket, vertex):
    function = events.Function(PLACE)
    with ThreadPoolExecutor(16) as pool:
        bodies = [push(request())] * 64
        while (
            bodies
        ):  # what met a machine too busy to answer in time is delivered again, as Pub/Sub does
            statuses = [
                status for _, status in pool.map(lambda body: function.handle("POST", body), bodies)
            ]
            assert set(statuses) <= {200, 503}
            bodies = bodies[: statuses.count(503)]
    assert len(vertex.calls("pipelineJobs.create")) == 1


def test_a_notification_of_the_double_of_cloud_storage_starts_a_run(
    deliver, bucket, vertex, monkeypatch
):
    """What the double of Cloud Storage publishes is what the function reads; tests of the template bring it over Pub/Sub."""
    sent = []
    monkeypatch.setattr(bucket.notifications, "publish", lambda _, message: sent.append(message))
    bucket.create_bucket("rows")
    bucket.notifications.configs["rows"] = {
        "1": {"topic": "t", "payload_format": "JSON_API_V1", "object_name_prefix": "incoming/"}
    }
    storage.write("gs://rows/incoming/a.csv", b"a,b\n")
    storage.write("gs://rows/incoming/a.csv", b"a,b\n1,2\n")
    storage.write("gs://rows/elsewhere.csv", b"a,b\n")
    assert [message["attributes"]["eventType"] for message in sent] == [
        "OBJECT_FINALIZE",
        "OBJECT_DELETE",
        "OBJECT_FINALIZE",
    ]
    for message in sent:
        assert deliver(push(base64.b64decode(message["data"]), message["attributes"]))[0] == 200
    assert len(vertex.calls("pipelineJobs.create")) == 2


def test_a_window_that_is_open_is_429_and_nothing_is_sent(bucket, vertex, capsys):
    function = events.Function(BATCHED)
    now = datetime.now(UTC)
    text, status = function.handle(
        "POST", push(attributes=notification(eventTime=f"{now:%Y-%m-%dT%H:%M:%SZ}"))
    )
    assert status == 429
    assert "files are batched until" in text
    assert vertex.received == []
    past = now - timedelta(minutes=30)
    assert (
        function.handle(
            "POST", push(attributes=notification(eventTime=f"{past:%Y-%m-%dT%H:%M:%SZ}"))
        )[1]
        == 200
    )
    assert len(vertex.calls("pipelineJobs.create")) == 1


def test_poison_is_400_and_nothing_is_sent(deliver, vertex):
    status, told = deliver(push(request(parameters='{"treshold": 1}')))
    assert (status, told["severity"]) == (400, "ERROR")
    assert "did you mean 'threshold'?" in told["message"]
    assert vertex.received == []


def test_what_starts_nothing_is_200_and_said(deliver, vertex):
    status, told = deliver(push(attributes=notification(name="incoming/a.txt")))
    assert (status, told["severity"], told["event"]) == (
        200,
        "INFO",
        "data rows/incoming/a.txt#17 OBJECT_FINALIZE",
    )
    assert "does not end in .csv" in told["message"]
    assert vertex.received == []


def test_nothing_published_yet_is_503(deliver, bucket, vertex):
    (bucket.root / "storage/templates/train-and-register/current.json").unlink()
    status, told = deliver(push(request()))
    assert (status, told["severity"]) == (503, "WARNING")
    assert "nothing is published yet" in told["message"]
    assert deliver(push(request(version=VERSION)))[0] == 200


def test_a_version_that_is_not_there_is_poison(deliver, vertex):
    status, told = deliver(push(request(version="f" * 16)))
    assert status == 400
    assert f"version {'f' * 16} is not published" in told["message"]


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"version": "../x"}'])
def test_a_pointer_that_is_damaged_is_503_and_the_next_build_mends_it(deliver, content):
    storage.write(f"{TEMPLATES}/current.json", content)
    assert deliver(push(request()))[0] == 503
    point(VERSION)
    assert deliver(push(request()))[0] == 200


@pytest.fixture
def impatient(monkeypatch):
    """What fails again and again is given up soon."""
    monkeypatch.setattr(events, "TIMEOUT", 1.0)


def test_an_error_of_vertex_ai_is_tried_again_here_and_then_left_to_pubsub(deliver, vertex):
    vertex.fail("pipelineJobs.create", status=503)
    assert deliver(push(request(event="one")))[0] == 200
    vertex.fail("pipelineJobs.create", status=503, times=10_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events, "TIMEOUT", 1.0)
        status, told = deliver(push(request(event="two")))
    assert (status, told["severity"]) == (503, "WARNING")
    vertex.faults.clear()
    assert deliver(push(request(event="two")))[0] == 200
    assert len(vertex.calls("pipelineJobs.create")) == 2


def test_an_answer_that_was_lost_starts_no_second_run(deliver, vertex):
    vertex.fail("pipelineJobs.create", status=0, done=True)
    assert deliver(push(request()))[0] == 200
    assert len(vertex.calls("pipelineJobs.create")) == 1


@pytest.mark.parametrize(("refusal", "status"), [(400, 400), (403, 503), (404, 503), (429, 503)])
@pytest.mark.usefixtures("impatient")
def test_a_refusal_of_vertex_ai(deliver, vertex, refusal, status):
    """An invalid argument stays one; a right, an API or a quota can be given before the last attempt."""
    vertex.fail("pipelineJobs.create", status=refusal, message="no", times=10_000)
    assert deliver(push(request()))[0] == status
    assert vertex.calls("pipelineJobs.create") == []


def test_a_refusal_of_cloud_storage_is_503(deliver, bucket, vertex):
    bucket.fail("objects.get", status=403, times=10)
    assert deliver(push(request()))[0] == 503
    assert vertex.received == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_only_deliveries_are_answered(deliver, vertex, method):
    assert deliver(push(request()), method)[0] == 405
    assert vertex.received == []


def test_a_mistake_of_its_own_is_500_with_its_place(deliver, monkeypatch):
    monkeypatch.setattr(events, "decide", lambda *_: 1 / 0)
    status, told = deliver(push(request()))
    assert (status, told["severity"]) == (500, "CRITICAL")
    assert "ZeroDivisionError" in told["message"]
    assert "in _deliver" in told["message"]


def test_the_log_is_one_line_whatever_a_message_says(deliver):
    status, told = deliver(push(request(event='a\n{"severity": "EMERGENCY"}\u2028' + 900 * "x")))
    assert status == 200
    assert told["severity"] == "NOTICE"
    assert len(told["event"]) == 500


def test_lines_of_many_threads_do_not_mix(capfd):
    threads = [
        threading.Thread(target=lambda: [events.log("INFO", 200 * "x", 200, {}) for _ in range(50)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 400
    assert {json.loads(line)["severity"] for line in lines} == {"INFO"}


def test_a_variable_that_is_missing_ends_the_server_with_one_line(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TEMPLATES")
    with pytest.raises(SystemExit) as ended:
        functions_framework.create_app("handle", str(FOLDER / "main.py"))
    assert str(ended.value.code).startswith(
        "error: invalid environment variables of the function:\n  TEMPLATES=''"
    )


# ── the pointer ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_pointer_is_written_and_read(bucket):
    environment = replace(
        resolve_environment(load_settings("cloud.environments.dev.project=my-project"), "dev"),
        storage="gs://storage",
    )
    told = {
        "template": None,
        "sha256": None,
        "pipeline": "gs://p",
        "parameters": "gs://q",
        "version": OTHER,
        "commit": "1a2b",
    }
    told["began"] = "2026-11-30T04:00:00+00:00"
    pipeline_version.write_current(environment, {**told, "more": "than that"})
    assert pipeline_version.read_current(environment) == told
    assert pipeline_version.read(TEMPLATES).version == OTHER
    for wrong in (
        {**told, "version": "latest"},
        {name: it for name, it in told.items() if name != "commit"},
    ):
        with pytest.raises(UserError, match=r"current\.json"):
            pipeline_version.write_current(environment, wrong)
    assert pipeline_version.read_current(environment) == told
    (bucket.root / "storage/templates/train-and-register/current.json").unlink()
    assert pipeline_version.read_current(environment) is None


def test_of_two_builds_that_end_out_of_order_the_later_push_counts(bucket, monkeypatch):
    def told(version, day):
        return dict.fromkeys(pipeline_version.FIELDS, "x") | {
            "version": version,
            "began": f"2026-11-{day}T04:00:00+00:00",
        }

    first, second, third = (told(digit * 16, day) for digit, day in (("1", 1), ("2", 2), ("3", 3)))
    assert pipeline_version.write_pointer(TEMPLATES, second)
    assert not pipeline_version.write_pointer(TEMPLATES, first)
    assert pipeline_version.read_pointer(TEMPLATES) == second

    write = storage.write

    def write_late(*given, **more):
        """Another build writes between our look and our write."""
        monkeypatch.setattr(storage, "write", write)
        assert pipeline_version.write_pointer(TEMPLATES, third)
        return write(*given, **more)

    monkeypatch.setattr(storage, "write", write_late)
    assert not pipeline_version.write_pointer(TEMPLATES, second)
    assert pipeline_version.read_pointer(TEMPLATES) == third


def test_a_message_is_immutable():
    with pytest.raises(ValidationError):
        parse(PubsubMessage, {"publishTime": "2026-11-30T04:00:20Z"}, "message").data = b"x"
