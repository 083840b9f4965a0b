"""Ten thousand hostile deliveries to the trigger function: it makes no mistake of its own, and starts no run whose parameters
nobody checked. Good ones are changed at random; hypothesis makes others.
"""

import base64
import collections
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import functions_framework
import pytest
from core.errors import UserError
from gcp import pipeline_run, pipeline_template, pipeline_version
from gcp.pipeline_run import SubmittedRun
from gcp.pipeline_version import NotPublished, PipelineVersion
from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from level_2_cicd import request as request_run
from level_2_cicd.trigger_function_container import events
from trainer.config import Hyperparameters

from tests import published
from tests.published import VERSION, Cloud

pytestmark = pytest.mark.heavy

COUNT = 10_000
DEEP: Any = 5
for _ in range(60):
    DEEP = [DEEP]
# What a careless or a hostile sender puts in the place of a value.
STRANGE: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        2**31,
        2**63,
        10**400,
        1e308,
        -0.0,
        math.nan,
        math.inf,
        -math.inf,
        DEEP,
    ),
    *(
        "",
        " ",
        "x",
        "\0",
        "\n",
        "\ud800",
        "\udfff\ud800",
        "é" * 600,
        "x" * 200_000,
        "../../etc",
        "{}",
        "[]",
        "null",
        "NaN",
        "1e999",
    ),
    *(
        "gs://",
        "gs:///x",
        "gs://b",
        "gs://rows/../x.csv",
        "gs://rows/a.csv",
        "gs://rows//a.csv",
        "/etc/passwd",
        "file:///x",
    ),
    *(
        "{{$.inputs.parameters['csv']}}",
        "{{channel:x}}",
        "$(id)",
        "';--",
        "${jndi:ldap://x}",
        "<script>",
        "%00",
        "%s%n",
        "\u202e",
    ),
    *(
        "2026-11-30T04:00:00Z",
        "9999-12-31T23:59:59Z",
        "0001-01-01T00:00:00+14:00",
        "2026-11-30",
        "now",
        VERSION,
        "f" * 16,
    ),
    *(
        [],
        {},
        [[]],
        {"": ""},
        {"a": {"b": {"c": 1}}},
        [None],
        {"__class__": "x"},
        {"seed": 0},
        [1, "2", {}],
        b"",
    ),
]
KEYS = [
    *(
        "csv",
        "label",
        "ignore",
        "categorical",
        "test_fraction",
        "split_seed",
        "hyperparameters",
        "metric",
        "threshold",
        "max_regression",
    ),
    *(
        "jobs",
        "registry",
        "serving",
        "run",
        "register",
        "hyperparameters.epochs",
        "hyperparameters.seed",
        "hyperparameters.x",
    ),
    *(
        "serving.image",
        "jobs.0",
        "threshold.x",
        "",
        ".",
        "a.b.c",
        "__proto__",
        "csv=x",
        "hyperparameters.",
        "\ud800",
        "x" * 5000,
    ),
    *(
        "hyperparameters.learning_rate",
        "hyperparameters.dropout",
        "hyperparameters.threads",
        "HYPERPARAMETERS.epochs",
    ),
]
# Values that fit, so that much of what is tried gets far.
FITTING = [1, 5, 0.5, "rows", "gs://rows/a.csv", [], ["id"], {"epochs": 5}, True, 0.9, 3.0]


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


class Judge:
    """The function behind functions-framework, and what becomes of what it is sent."""

    def __init__(self, cloud: Cloud, spec: dict[str, Any], project: Path) -> None:
        self.spec, self.cloud = spec, cloud
        self.published = published.values(cloud)
        self.csv = True
        self.runs: list[dict[str, Any]] = []
        self.answers: collections.Counter[tuple[int, bool]] = collections.Counter()
        main = project / "level_2_cicd/trigger_function_container/main.py"
        self.client = functions_framework.create_app("handle", str(main)).test_client()

    def read(self, _: str, version: str = "") -> PipelineVersion:
        """In the place of the bucket: one version is there."""
        if version not in ("", VERSION):
            raise NotPublished("there is none")
        values = {
            name: value for name, value in self.published.items() if self.csv or name != "csv"
        }
        return PipelineVersion(
            VERSION, "gs://x", self.spec, json.loads(json.dumps(values)), {"commit": "1a2b"}
        )

    def submit(self, sent: dict[str, Any], _: float | None = None) -> SubmittedRun:
        """In the place of Vertex AI: what arrives is parsed as there, and judged by rules that are written here anew."""
        message = types.CreatePipelineJobRequest(
            parent=sent["parent"], pipeline_job_id=sent["pipelineJobId"]
        )
        json_format.ParseDict(
            sent["pipelineJob"], types.CreatePipelineJobRequest.pb(message).pipeline_job
        )
        types.CreatePipelineJobRequest.to_json(message).encode()
        assert re.fullmatch(r"[a-z][-a-z0-9]{0,127}", sent["pipelineJobId"])
        job = sent["pipelineJob"]
        assert all(re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", key) for key in job["labels"])
        assert all(re.fullmatch(r"[a-z0-9_-]{0,63}", value) for value in job["labels"].values())
        values = job["runtimeConfig"]["parameterValues"]
        self.judge(values)
        assert values["run"] == sent["pipelineJobId"]
        assert job["serviceAccount"] == self.cloud.variables["SERVICE_ACCOUNT"]
        assert job["runtimeConfig"]["gcsOutputDirectory"] == self.cloud.variables["PIPELINE_ROOT"]
        self.runs.append(values)
        return SubmittedRun(f"{sent['parent']}/pipelineJobs/{sent['pipelineJobId']}", new=True)

    def judge(self, values: dict[str, Any]) -> None:
        """Every parameter is there, and of its kind; what nobody may choose is what was published."""
        declared = pipeline_template.signature(self.spec)
        assert set(values) <= set(declared)
        assert {name for name, one in declared.items() if "defaultValue" not in one} <= set(values)
        kinds = {"STRING": str, "LIST": list, "STRUCT": dict, "BOOLEAN": bool}
        for name, value in values.items():
            kind = declared[name]["parameterType"]
            if kind in kinds:
                assert type(value) is kinds[kind], (name, value)
            else:
                assert type(value) in (int, float)
                assert abs(value) <= 1e308
            if kind == "NUMBER_INTEGER":
                assert value == int(value)
        for name in ("jobs", "registry", "serving"):
            assert values[name] == self.published[name]
        whole = {
            name: int(it) if it == int(it) else it for name, it in values["hyperparameters"].items()
        }  # 3.0 is 3 as JSON
        assert Hyperparameters(**whole).epochs >= 1
        assert re.fullmatch(r"gs://[a-z0-9._-]{3,}/\S.*", values["csv"])
        assert ".." not in values["csv"].split("/")

    def send(self, body: bytes) -> int:
        """Deliver it; every answer is one of those that are meant."""
        before = len(self.runs)
        status = self.client.post("/", data=body, content_type="application/json").status_code
        ran = len(self.runs) - before
        assert (status, ran) in ((200, 1), (200, 0), (400, 0)), (status, body[:2000])
        self.answers[status, bool(ran)] += 1
        return status


@pytest.fixture
def judge(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """The function, in this process."""
    cloud = published.prepare(project)
    for name, value in cloud.variables.items():
        monkeypatch.setenv(name, value)
    judge = Judge(cloud, published.compiled(tmp_path), project)
    monkeypatch.setattr(pipeline_version, "read", judge.read)
    monkeypatch.setattr(pipeline_run, "submit", judge.submit)
    return judge


def wrapped(data: Any, attributes: Any = None) -> dict[str, Any]:
    """A push of Pub/Sub's."""
    content = data if isinstance(data, bytes) else json.dumps(data).encode()
    message = {
        "data": base64.b64encode(content).decode(),
        "messageId": "1",
        "publishTime": "2026-11-30T04:00:00.123Z",
    }
    return {
        "message": {**message, "attributes": attributes or {}},
        "subscription": "projects/p/subscriptions/s",
    }


def changed(document: dict[str, Any], chance: random.Random, names: list[str]) -> dict[str, Any]:
    """A mapping in which something is lost, strange, doubled or too much."""
    document = dict(document)
    for _ in range(chance.choice([0, 1, 1, 2])):
        name = chance.choice(names or [""])
        way = chance.randrange(4)
        if way == 0:
            document.pop(name, None)
        elif way == 1:
            document[chance.choice([*names, "more", "\ud800", ""])] = chance.choice(STRANGE)
        else:
            document[name] = chance.choice(STRANGE)
    return document


def parameters(chance: random.Random) -> str:
    """What a request asks for."""
    if chance.random() < 0.15:
        return str(
            chance.choice(
                [
                    "",
                    "{",
                    "[]",
                    "null",
                    "[" * 5000,
                    '{"a":' * 5000,
                    '{"threshold": 1e999}',
                    '{"a": NaN}',
                    "\ud800",
                    "5",
                ]
            )
        )
    asked = {
        chance.choice(KEYS): chance.choice(STRANGE if chance.random() < 0.5 else FITTING)
        for _ in range(chance.randrange(3))
    }
    return json.dumps(asked, default=str)


def delivery(chance: random.Random, bucket: str) -> bytes:
    """A body, made of a good one."""
    if chance.random() < 0.5:
        request = {
            **request_run.compose(f"event {chance.random()}"),
            "parameters": parameters(chance),
        }
        push = wrapped(json.dumps(changed(request, chance, list(request)), default=str).encode())
    else:
        kind = chance.choice(
            [
                "OBJECT_FINALIZE",
                "OBJECT_FINALIZE",
                "OBJECT_ARCHIVE",
                "OBJECT_DELETE",
                "OBJECT_METADATA_UPDATE",
                "X",
            ]
        )
        told = {
            "bucketId": bucket,
            "objectId": f"incoming/{chance.random()}.csv",
            "objectGeneration": "5",
            "eventTime": "2026-11-30T04:00:00Z",
        }
        notification = {"eventType": kind, **told}
        push = wrapped(
            b"",
            changed(
                notification,
                chance,
                [*notification, "overwrittenByGeneration", "overwroteGeneration"],
            ),
        )
        if chance.random() < 0.2:
            push["message"]["attributes"]["objectId"] = (
                "incoming/" + str(chance.choice(STRANGE)) + ".csv"
            )
    if chance.random() < 0.2:
        push["message"] = changed(push["message"], chance, list(push["message"]))
    if chance.random() < 0.05:
        push = changed(push, chance, list(push))
    body = json.dumps(push, default=str).encode()
    if chance.random() < 0.1:
        broken = bytearray(body)
        for _ in range(chance.choice([1, 1, 3])):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        body = bytes(broken) if chance.random() < 0.7 else body[: chance.randrange(len(body))]
    return body


def test_ten_thousand_hostile_deliveries(judge: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(0)
    bucket = judge.cloud.bucket(judge.cloud.environment.data)
    for _ in range(COUNT):
        judge.csv = chance.random() < 0.5
        judge.send(delivery(chance, bucket))
    assert sum(judge.answers.values()) == COUNT
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == COUNT  # whatever was sent, one line each
    assert {line["severity"] for line in lines} <= {"INFO", "NOTICE", "ERROR"}
    with capsys.disabled():
        print(f"\n{dict(judge.answers)}")
    assert all(
        judge.answers[way] > COUNT / 20 for way in ((200, True), (200, False), (400, False))
    )  # each is really met


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=10) | st.sampled_from(KEYS), inner, max_size=3)
    ),
    max_leaves=10,
)


def test_deliveries_of_any_shape(judge: Judge) -> None:
    """Shapes that nobody thought of, at each level: the body, the message, the request, its parameters."""

    def dumped(value: Any) -> bytes:
        return json.dumps(value).encode()

    @settings(max_examples=1500)
    @given(
        st.binary(max_size=60)
        | JSON.map(dumped)
        | JSON.map(lambda it: dumped({"message": it}))
        | st.dictionaries(
            st.sampled_from(["data", "attributes", "messageId", "publishTime"]), JSON
        ).map(lambda it: dumped({"message": it}))
        | JSON.map(lambda it: dumped(wrapped(it)))
        | st.binary(max_size=60).map(lambda it: dumped(wrapped(it)))
        | JSON.map(
            lambda it: dumped(wrapped({**request_run.compose("x"), "parameters": json.dumps(it)}))
        )
        | st.dictionaries(st.sampled_from(KEYS), JSON, max_size=2).map(
            lambda it: dumped(wrapped(request_run.compose("x", it)))
        )
        | st.dictionaries(
            st.sampled_from(["eventType", "bucketId", "objectId", "objectGeneration"]),
            st.text(max_size=30),
        ).map(lambda it: dumped(wrapped(b"", {"eventType": "OBJECT_FINALIZE", **it})))
    )
    def any_shape(body: bytes) -> None:
        judge.send(body)

    any_shape()
    assert judge.answers[200, True] > 0


def test_any_text_is_a_name_a_file_may_have_or_starts_nothing(judge: Judge) -> None:
    """Whatever a file is called: the run that its arrival starts reads that file, or there is none."""
    judge.csv = False
    bucket = judge.cloud.bucket(judge.cloud.environment.data)

    @settings(max_examples=1000)
    @given(st.text(min_size=1, max_size=40))
    def any_name(name: str) -> None:
        told = {"bucketId": bucket, "objectId": f"incoming/{name}.csv", "objectGeneration": "5"}
        before = len(judge.runs)
        judge.send(json.dumps(wrapped(b"", {"eventType": "OBJECT_FINALIZE", **told})).encode())
        for run in judge.runs[before:]:
            assert run["csv"] == f"gs://{bucket}/incoming/{name}.csv"

    any_name()
    assert len(judge.runs) > 300


def test_the_judge_would_notice(judge: Judge) -> None:
    """A run whose parameters were not checked is refused by the judge, and a mistake of the function's own too."""
    good = {**judge.published, "run": "x"}
    judge.judge(good)
    for wrong in (
        {"threshold": "1"},
        {"jobs": []},
        {"hyperparameters": {**good["hyperparameters"], "epochs": 0}},
        {"csv": "/x"},
        {"y": 1},
    ):
        with pytest.raises((AssertionError, UserError, ValueError)):
            judge.judge({**good, **wrong})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events, "decide", lambda *_: 1 / 0)
        with pytest.raises(AssertionError):
            judge.send(json.dumps(wrapped(request_run.compose("x"))).encode())
