"""make serve: what is answered, what is refused and how, and that a change of the champion drops no request."""

import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from core import manifest
from core.errors import UserError
from core.onnx_model import Model
from core.registry import LocalRegistry
from jsonschema import Draft202012Validator
from level_2_cicd.rehearsal.storage import FakeStorage
from predictor import contract, models, server
from predictor.models import ChampionModel, StaticModel
from predictor.server import Options, create_server, listen

ROWS = [
    {"width": 3.0, "height": 50, "colour": "red"},
    {"width": None, "height": 12.5, "colour": "never seen"},
    {"height": 99},
]
ARRAYS = [[row.get(name) for name in ("width", "height", "colour")] for row in ROWS]


@contextlib.contextmanager
def serving(source, **options):
    """A server in a thread, on a port of its own, and a client of it."""
    settings = Options(**options)
    server = create_server(source, settings)
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx.Client(
                base_url=f"http://127.0.0.1:{listener.getsockname()[1]}",
                timeout=30,
                trust_env=False,
            ) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def client(trained):
    """A client of a server of the trained model."""
    with serving(StaticModel(trained / "model")) as client:
        yield client


@pytest.fixture(scope="module")
def validator(client):
    """Checks a document against a schema of the server's own OpenAPI."""
    components = client.get("/openapi.json").json()["components"]

    def make(name):
        return Draft202012Validator(
            {"$ref": f"#/components/schemas/{name}", "components": components}
        )

    return make


def ask(client, instances, **parameters):
    """The response's document for good instances."""
    response = client.post("/predict", json={"instances": instances, "parameters": parameters})
    assert response.status_code == 200, response.text
    return response.json()


def eventually(condition, seconds=30):
    """Wait for something that is to come; fail when it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("instances", [ROWS, ARRAYS])
def test_answers_are_the_models(client, trained, validator, instances):
    document = ask(client, instances)
    validator("Response").validate(document)
    assert document["version"] is None
    table = {name: [row.get(name) for row in ROWS] for name in ("width", "height", "colour")}
    for prediction, expected in zip(
        document["predictions"], Model.load(trained / "model").probabilities(table), strict=True
    ):
        assert prediction["scores"] == dict(
            zip(("cat", "dog", "emu"), expected.tolist(), strict=True)
        )
        assert list(prediction["scores"].values()) == sorted(expected.tolist(), reverse=True)
        assert prediction["label"] == ("cat", "dog", "emu")[expected.argmax()]
        assert prediction["score"] == expected.max()


def test_a_large_batch_is_answered_like_single_rows(client):
    rows = [
        {"width": number / 700, "height": number % 90, "colour": "red"} for number in range(2100)
    ]
    assert len(json.dumps(rows)) > server.THREAD_BYTES
    many = ask(client, rows)["predictions"]
    for number in (0, 1000, 2099):
        (one,) = ask(client, [rows[number]])["predictions"]
        assert one["label"] == many[number]["label"]
        assert one["scores"] == pytest.approx(many[number]["scores"], abs=1e-5)


@pytest.mark.parametrize(
    ("top", "told"), [(1, 1), (2, 2), (2.0, 2), (3, 3), (100, 3), (10**400, 3), (None, 3)]
)
def test_parameter_top(client, top, told):
    (whole,), (some,) = (
        ask(client, ROWS[:1])["predictions"],
        ask(client, ROWS[:1], top=top)["predictions"],
    )
    assert list(some["scores"].items()) == list(whole["scores"].items())[:told]
    assert (some["label"], some["score"]) == (whole["label"], whole["score"])


def test_many_classes_are_told_in_part():
    probabilities = np.arange(42, dtype=np.float32).reshape(2, 21)
    classes = range(100, 121)
    for asked, told in ((None, 5), ({"top": 21}, 21), ({}, 5)):
        top = contract._read_top(asked, len(classes))
        first, second = contract._predictions(probabilities, classes, top)
        assert first["label"] == 120
        assert second["score"] == 41.0
        assert list(first["scores"]) == [str(120 - environment) for environment in range(told)]


def test_large_and_tiny_numbers_are_answered(client, validator):
    extremes = [1.7e308, -1.7e308, 5e-324, -0.0, 10**300, 2**63]
    validator("Response").validate(
        ask(client, [{"width": value, "height": value} for value in extremes])
    )


@pytest.mark.parametrize(
    "body",
    [
        {"instances": ROWS},
        {"instances": ROWS, "parameters": None},
        {"instances": ROWS, "parameters": {}},
        {"instances": ROWS, "labels": "whatever the cloud adds one day"},
    ],
)
@pytest.mark.parametrize(
    "kind", ["application/json", "text/plain", "application/x-www-form-urlencoded", None]
)
def test_json_is_json_whatever_its_label(client, body, kind):
    for content in (json.dumps(body).encode(), "\ufeff".encode() + json.dumps(body).encode()):
        response = client.post(
            "/predict", content=content, headers={"content-type": kind} if kind else {}
        )
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────


def one(**values):
    """A body whose second instance differs from a good one."""
    return {"instances": [ROWS[0], {**ROWS[0], **values}]}


BAD = [
    # columns
    ({"instances": [ROWS[0], {"width": 1}]}, "instance 2, column 'height'", "missing"),
    (one(height=None), "instance 2, column 'height'", "missing"),
    (one(heigth=1), "instance 2, column 'heigth'", "no such column"),
    (one(**{"\ud800": 1}), "instance 2, column '\\ud800'", "no such column"),
    (one(width=float("nan")), "instance 2, column 'width'", "NaN is not a number"),
    (one(width=float("-inf")), "instance 2, column 'width'", "-Infinity is not a number"),
    (one(colour=float("inf")), "instance 2, column 'colour'", "Infinity is not text"),
    (
        b'{"instances": [[1, 2, "red"], [1e999, 2, "red"]]}',
        "instance 2, column 'width'",
        "not a finite number",
    ),
    (one(height=10**400), "instance 2, column 'height'", "not a finite number"),
    (one(height="tall"), "instance 2, column 'height'", "'tall' is not a number"),
    (one(height="50"), "instance 2, column 'height'", "'50' is not a number"),
    (one(height=""), "instance 2, column 'height'", "'' is not a number"),
    (one(height=True), "instance 2, column 'height'", "true is not a number"),
    (one(colour=False), "instance 2, column 'colour'", "false is not text"),
    (one(height=[50]), "instance 2, column 'height'", "an array is not a number"),
    (one(width={"value": 1}), "instance 2, column 'width'", "an object is not a number"),
    (one(colour=["red"]), "instance 2, column 'colour'", "an array is not text"),
    # rows
    ({"instances": [[1, 2, "red"], [1, 2]]}, "instance 2", "2 values for 3 columns", "'colour'"),
    ({"instances": [[1, 2, "red"], [1, 2, "red", 4]]}, "instance 2", "4 values for 3 columns"),
    ({"instances": [[1, 2, "red"], []]}, "instance 2", "0 values for 3 columns", "'width'"),
    ({"instances": [[1, 2, "red"], [1, None, "red"]]}, "instance 2, column 'height'", "missing"),
    (
        {"instances": [[1, 2, "red"], ["red", 1, 2]]},
        "instance 2, column 'width'",
        "'red' is not a number",
    ),
    ({"instances": [{}]}, "instance 1, column 'height'", "missing"),
    ({"instances": [ROWS[0], [1, 2, "red"]]}, "instances", "one form"),
    ({"instances": [ROWS[0], 7]}, "instance 2", "7 is neither an object nor an array"),
    ({"instances": [ROWS[0], None]}, "instance 2", "null is neither"),
    ({"instances": ["x" * 5000]}, "instance 1", "neither"),
    # the body
    ({"instances": []}, "instances", "0 of them"),
    ({"instances": [[1, 2, "red"]] * (contract.MAX_INSTANCES + 1)}, "instances", "10001 of them"),
    ({"instances": ROWS[0]}, "instances", "an object is not an array"),
    ({"instances": None}, "instances", "null is not an array"),
    ({"instance": ROWS}, 'no "instances"'),
    ({}, 'no "instances"'),
    ([ROWS], "the body is an array", "must be an object"),
    (7, "the body is 7"),
    (b"", "not JSON"),
    (b'{"instances": [', "not JSON"),
    (b'{"instances": [[1, 2, "red"]]} x', "not JSON"),
    (b"width=1&height=2", "not JSON"),
    (b"9" * 5000, "not JSON"),
    (b'{"instances": [["\xff"]]}', "not UTF-8"),
    (json.dumps({"instances": ROWS}).encode("utf-16"), "not UTF-8"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"instances": ' + b'{"a": ' * 100_000, "nested too deeply"),
    (b'{"instances": [' + b"[" * 300 + b"]" * 300 + b"]}", "instance 1", "1 values for 3 columns"),
    # parameters
    ({"instances": ROWS, "parameters": {"topp": 1}}, "parameters", "'topp' is unknown", "top"),
    ({"instances": ROWS, "parameters": [1]}, "parameters", "an array is not an object"),
    *[
        ({"instances": ROWS, "parameters": {"top": top}}, "parameters, top")
        for top in (0, -1, 1.5, "2", True, [1])
    ],
    ({"instances": ROWS, "parameters": {"top": float("nan")}}, "parameters, top: NaN"),
    (b'{"instances": [[1, 2, "red"]], "parameters": {"top": 1e999}}', "parameters, top"),
]


@pytest.mark.parametrize(
    ("body", "words"), [(body, words) for body, *words in BAD], ids=lambda value: repr(value)[:60]
)
def test_bad_bodies_are_told(client, body, words):
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    response = client.post("/predict", content=content)
    assert response.status_code == 400, response.text
    assert list(response.json()) == ["error"]
    for word in words:
        assert word in response.json()["error"]
    assert len(response.json()["error"]) <= 520


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_body(trained, chunked):
    with serving(StaticModel(trained / "model"), max_bytes=1000) as client:
        large = json.dumps({"instances": ROWS * 50_000}).encode()
        response = client.post("/predict", content=iter([large]) if chunked else large)
        assert response.status_code == 413
        assert "larger than 1,000 bytes" in response.json()["error"]
        ask(client, ROWS)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("POST", "/predict/", 404),
        ("GET", "/pr%C3%A9dict", 404),
        ("GET", "/predict", 405),
        ("PUT", "/predict", 405),
        ("POST", "/health", 405),
        ("DELETE", "/openapi.json", 405),
    ],
)
def test_wrong_addresses_are_told(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    assert "POST /predict, GET /health" in response.json()["error"]
    assert ("allow" in response.headers) == (status == 405)


def test_an_error_of_ours_is_json_too(trained, monkeypatch):
    with serving(StaticModel(trained / "model")) as client:
        monkeypatch.setattr(contract, "answer", lambda *_: 1 / 0)
        response = client.post("/predict", json={"instances": ROWS})
        assert (response.status_code, response.json()) == (
            500,
            {"error": "internal error; see the server's log."},
        )


# ── connections ─────────────────────────────────────────────────────────────────────────────────────────────────────


def head(body):
    """The head of a request with such a body."""
    return f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()


def open_connection(client):
    """A connection of its own to the client's server."""
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)


@pytest.mark.parametrize("head", [b"HELLO\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000])
def test_invalid_http_gets_400(client, head):
    with open_connection(client) as wrong, wrong.makefile("rb") as stream:
        wrong.sendall(head)
        assert stream.read().startswith(b"HTTP/1.1 400 Bad Request")


def test_too_many_connections_are_refused(trained, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    with serving(StaticModel(trained / "model")) as client:
        ask(client, ROWS)
        with (
            open_connection(client),
            open_connection(client) as third,
            third.makefile("rb") as stream,
        ):
            third.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"503 Service Unavailable" in stream.read()
        eventually(lambda: client.get("/health").status_code == 200)


# ── OpenAPI, and bodies that nobody thought of ──────────────────────────────────────────────────────────────────────


def test_openapi_is_made_from_the_columns(client, trained, validator):
    document = client.get("/openapi.json").json()
    assert document["info"] == {"title": "Predict animal", "version": "unversioned"}
    assert set(document["paths"]) == {"/predict", "/health"}
    schemas = document["components"]["schemas"]
    schema = Model.load(trained / "model").schema
    assert (
        schemas["Instance"]["required"]
        == [column.name for column in schema.columns if not column.optional]
        == ["height"]
    )
    assert list(schemas["Instance"]["properties"]) == ["width", "height", "colour"]
    assert schemas["Instance"]["properties"]["height"] == {"type": "number"}
    assert schemas["Instance"]["properties"]["colour"]["examples"] == [
        "black",
        "brown",
        "grey",
        "red",
    ]
    assert schemas["Prediction"]["properties"]["label"] == {"enum": ["cat", "dog", "emu"]}
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    (example,) = schemas["Request"]["examples"]
    validator("Request").validate(example)
    ask(client, example["instances"])
    validator("Health").validate(client.get("/health").json())


VALUES = [
    None,
    0,
    -1.5,
    1e308,
    2**70,
    True,
    "",
    " ",
    "red",
    "50",
    "nan",
    "\ud83d",
    "\x00",
    [],
    {},
    [1],
    *ROWS,
    *ARRAYS,
]


def mutate(chance: random.Random, request):
    """Change a document in one random place."""
    places = [(request, key) for key in request]
    for container, key in places:
        inner = container[key]
        if isinstance(inner, (dict, list)):
            places += [
                (inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner)))
            ]
    container, key = chance.choice(places)
    action, value = (
        chance.choice(["replace", "delete", "add"]),
        copy.deepcopy(chance.choice(VALUES)),
    )
    if action == "replace":
        container[key] = value
    elif action == "delete":
        del container[key]
    elif isinstance(container, list):
        container.insert(key, value)
    else:
        container[chance.choice(["width", "top", "instances", "", "\udc00"])] = value


def test_random_bodies_are_answered_as_openapi_says(client, validator):
    """1,000 changed documents, and the same as damaged bytes: never a 5xx, and 200 just where the document is valid."""
    chance, request, statuses = random.Random(3), validator("Request"), []
    for _ in range(1000):
        instances = chance.choice([ROWS, ARRAYS])
        document = json.loads(json.dumps({"instances": instances, "parameters": {"top": 2}}))
        for _ in range(chance.randint(1, 2)):
            mutate(chance, document or {"instances": []})
        text = json.dumps(document)
        response = client.post("/predict", content=text)
        assert response.status_code == (200 if request.is_valid(document) else 400), (
            text,
            response.text,
        )
        statuses.append(response.status_code)
        damaged = bytearray(text.encode())
        for _ in range(chance.randint(1, 3)):
            position = chance.randrange(len(damaged) + 1)
            damaged[position : position + chance.randint(0, 2)] = bytes(
                [chance.choice(b'[]{}",:e-+.019tn\\u\x00\xc3\xff ')]
            )
        response = client.post("/predict", content=bytes(damaged))
        assert response.status_code in {200, 400}, (damaged, response.text)
        assert set(response.json()) in ({"error"}, {"predictions", "version"})
    assert 50 < statuses.count(200) < 950  # both sides are seen


def test_a_long_answer_does_not_hold_up_the_others(trained, monkeypatch):
    go, real = threading.Event(), contract.answer

    def slow(model, version, body):
        assert len(body) < server.THREAD_BYTES or go.wait(30)
        return real(model, version, body)

    with serving(StaticModel(trained / "model")) as client, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(contract, "answer", slow)
        long = pool.submit(ask, client, ROWS * 1000)
        for _ in range(5):
            ask(client, ROWS)
            told = client.get("/health").json()
            assert (told["status"], told["version"]) == ("ok", None)
        assert not long.done()
        go.set()
        assert len(long.result()["predictions"]) == 3000


# ── the process ─────────────────────────────────────────────────────────────────────────────────────────────────────


def command(*arguments):
    """The command line of the server."""
    return [sys.executable, "-m", "predictor.server", *map(str, arguments)]


def environment(**variables):
    """This environment without the server's variables, and with these."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AIP_", "PREDICT_"))
    }
    return {**kept, **variables}


@contextlib.contextmanager
def process(*arguments, **variables):
    """A server process, its first line, and a client of it."""
    started = subprocess.Popen(
        command(*arguments), env=environment(**variables), stderr=subprocess.PIPE, text=True
    )
    try:
        line = started.stderr.readline()
        port = re.search(r"http://[\w.]+:(\d+)", line)
        assert port, line + started.stderr.read()
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port[1]}", timeout=30, trust_env=False
        ) as client:
            yield started, line, client
    finally:
        started.kill()
        started.wait()
        started.stderr.close()


def refused(*arguments, **variables):
    """The one line with which a server does not start."""
    done = subprocess.run(
        command(*arguments),
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_the_clouds_contract_and_a_graceful_end(trained):
    names = {
        "AIP_HTTP_PORT": "0",
        "AIP_HEALTH_ROUTE": "/up",
        "AIP_PREDICT_ROUTE": "/v1/endpoints/1/deployedModels/2:predict",
    }
    with process(AIP_STORAGE_URI=str(trained / "model"), **names) as (server, line, client):
        assert client.get("/up").json()["status"] == "ok"
        assert client.get("/health").status_code == 404
        assert client.post(names["AIP_PREDICT_ROUTE"], json={"instances": ROWS}).status_code == 200
        # The first line's command is one that works, and the server is reached from other machines.
        assert "http://localhost:" in line
        body = re.search(r"curl \S+ -d '(.*)'$", line.strip())[1]
        assert client.post(names["AIP_PREDICT_ROUTE"], content=body).status_code == 200

        address = (client.base_url.host, client.base_url.port)
        head = f"POST {names['AIP_PREDICT_ROUTE']} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(address) as hung_up:
            hung_up.sendall(f"{head}\r\n{body[:5]}".encode())
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 100")  # the request is under way
            server.send_signal(signal.SIGTERM)
            eventually(lambda: not reachable(address))
            connection.sendall(body.encode())
            with connection.makefile("rb") as stream:
                answer = stream.read()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"predictions"' in answer
        assert server.wait(30) == 0
        assert server.stderr.read() == ""


def reachable(address) -> bool:
    """Whether a new connection is taken."""
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError:
        return False
    return True


def test_control_c_is_no_failure(trained):
    with process("--model-dir", trained / "model", "--port", "0") as (server, line, client):
        ask(client, ROWS)
        assert line.startswith(
            f"serving a model at http://127.0.0.1:{client.base_url.port}/predict"
        )
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
        assert server.stderr.read() == ""


def test_what_cannot_be_served_is_told_before_it_listens(trained, model_copy, tmp_path):
    good = trained / "model"
    assert "--registry FOLDER" in refused()
    assert "no saved model" in refused("--model-dir", tmp_path)
    assert "no saved model" in refused(AIP_STORAGE_URI=str(tmp_path))
    assert "gs://BUCKET/FOLDER" in refused(AIP_STORAGE_URI="s3://bucket/model")
    assert "make level1" in refused("--registry", tmp_path)
    assert "AIP_HTTP_PORT is 'http'" in refused("--model-dir", good, AIP_HTTP_PORT="http")
    assert "AIP_PREDICT_ROUTE is 'predict'" in refused(
        "--model-dir", good, AIP_PREDICT_ROUTE="predict"
    )
    assert "PREDICT_MAX_BYTES" in refused("--model-dir", good, PREDICT_MAX_BYTES="10MB")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert (
            f"cannot listen on 127.0.0.1, port {port}: Address already in use. Another"
            in refused("--model-dir", good, "--port", port)
        )
    (model_copy / "model.onnx").write_bytes((model_copy / "model.onnx").read_bytes()[:-1])
    assert "damaged" in refused("--model-dir", model_copy)


@pytest.fixture
def bucket(trained, tmp_path, monkeypatch):
    """A double of Cloud Storage with the saved model at gs://models/runs/1/model, beside other files."""
    shutil.copytree(trained / "model", tmp_path / "cloud" / "models" / "runs" / "1" / "model")
    (tmp_path / "cloud" / "models" / "runs" / "1" / "model" / "note.txt").write_text("of somebody")
    with FakeStorage(tmp_path / "cloud") as double:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", double.address)
        yield double


@pytest.mark.parametrize("end", ["", "/"])
def test_a_buckets_model_is_fetched_before_it_listens(bucket, end):
    with process(AIP_STORAGE_URI=f"gs://models/runs/1/model{end}", AIP_HTTP_PORT="0") as (
        _,
        _,
        client,
    ):
        wanted = {"model.json", *manifest.parse(bucket.root / "models/runs/1/model")["files"]}
        assert {Path(received.path).name for received in bucket.received} == wanted
        shutil.rmtree(bucket.root / "models")  # nothing more is needed of it
        ask(client, ROWS)


def serve_once(uri):
    """A started model's version, fetched as the process does."""
    options = SimpleNamespace(registry=None, model_dir=None)
    return models.open_source(options, {"AIP_STORAGE_URI": uri}).current


def test_a_buckets_model_that_cannot_be_served_is_told(bucket):
    folder, uri = bucket.root / "models" / "runs" / "1" / "model", "gs://models/runs/1/model"
    with pytest.raises(UserError, match="bucket does not exist"):
        serve_once("gs://no-models/runs/1/model")
    with pytest.raises(UserError, match=r"gs://models/runs/2/model/model\.json not found"):
        serve_once("gs://models/runs/2/model")
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-1])
    assert f"in {uri} is damaged: model.onnx has" in refused(AIP_STORAGE_URI=uri)
    (folder / "model.onnx").unlink()  # as while it is written
    with pytest.raises(UserError, match=r"gs://models/runs/1/model/model\.onnx not found"):
        serve_once(uri)


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"status": 0}, {"status": None, "fraction": 0.5}]
)
def test_each_request_for_a_buckets_model_is_repeated(bucket, trained, fault):
    uri, whole = "gs://models/runs/1/model", manifest.sha256(trained / "model" / manifest.NAME)
    assert serve_once(uri).manifest_sha256 == whole
    requests = len(bucket.received)
    for index in range(requests):
        bucket.fail(after=index, **fault)
        assert serve_once(uri).manifest_sha256 == whole
        assert bucket.faults.pop().times == 0  # it was met


def test_a_model_that_verifies_but_cannot_work_is_told(model_copy):
    document = manifest.read(model_copy)
    manifest.write(model_copy, {**document, "schema": {**document["schema"], "classes": ["cat"]}})
    with pytest.raises(UserError, match="does not answer"):
        StaticModel(model_copy)
    (model_copy / "model.onnx").write_bytes(b"not a network")
    manifest.write(model_copy, document)
    with pytest.raises(UserError, match="no model that this code can read"):
        StaticModel(model_copy)
    manifest.write(model_copy, {**document, "schema": []})
    with pytest.raises(UserError, match="no model that this code can read"):
        StaticModel(model_copy)


def test_a_laptops_server_is_for_the_laptop_alone(trained):
    arguments = server.parser().parse_args(["--model-dir", str(trained)])
    assert Options.read(arguments, {}) == Options(
        "127.0.0.1", 8080, "/health", "/predict", 10_000_000
    )
    cloud = Options.read(arguments, {"AIP_HTTP_PORT": "80"})
    assert (cloud.host, cloud.port) == ("0.0.0.0", 80)


def test_the_server_needs_no_trainer(trained):
    code = (
        f"import sys, pathlib; from predictor import models, server; server.create_app(models.StaticModel(pathlib.Path({str(trained / 'model')!r})), server.Options()); "
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'trainer', 'duckdb', 'kfp')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ── the champion ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def registry(trained, tmp_path) -> LocalRegistry:
    """A registry of three versions whose classes tell them apart (cat-v1, cat-v2 …); version 1 is champion."""
    registry = LocalRegistry(tmp_path / "registry")
    document = manifest.read(trained / "model")
    for number in (1, 2, 3):
        folder = Path(shutil.copytree(trained / "model", tmp_path / f"v{number}"))
        classes = [f"{name}-v{number}" for name in document["schema"]["classes"]]
        manifest.write(folder, {**document, "schema": {**document["schema"], "classes": classes}})
        assert registry.register(folder, {"accuracy": 0.9}, run=f"r{number}").number == number
    registry.promote(1, "the first", None)
    return registry


def crown(registry: LocalRegistry, number: int) -> None:
    """Make a version the champion."""
    registry.promote(number, "test", registry.champion().number)


def test_the_champion_changes_under_load(registry):
    """Four clients, 200 requests in a second together, through 1 → 2 → 3 → 1: each is answered, by one whole model."""
    answers, stop = [], threading.Event()

    def load(url):
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            due = time.monotonic()
            while not stop.is_set():
                document = ask(client, ROWS[:1])
                answers.append(document["version"])
                assert document["predictions"][0]["label"].endswith(f"-v{document['version']}")
                due += 0.02
                time.sleep(max(0, due - time.monotonic()))

    def answered(number):
        return lambda: answers.count(number) >= wanted or any(client.done() for client in clients)

    with (
        process("--registry", registry.folder, "--port", "0") as (server, line, client),
        ThreadPoolExecutor(4) as pool,
    ):
        assert "serving version 1 " in line
        clients = [pool.submit(load, client.base_url) for _ in range(4)]
        try:
            for number in (2, 3, 1):
                wanted = answers.count(number) + 150
                crown(registry, number)
                eventually(answered(number))
        finally:
            stop.set()
        for done in clients:
            done.result()
        assert set(answers) == {1, 2, 3}
        assert len(answers) >= 450
        assert client.get("/health").json()["version"] == 1
        assert client.get("/openapi.json").json()["info"]["version"] == "1"
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        assert server.stderr.read().split("\n") == [
            "serving version 2",
            "serving version 3",
            "serving version 1",
            "",
        ]


def test_a_damaged_champion_is_not_served(registry, capsys):
    (registry.version(2).model / "model.onnx").write_bytes(b"")
    told = []

    def says(words):
        told.extend(capsys.readouterr().err.splitlines())
        return words in "".join(told)

    with serving(ChampionModel(registry)) as client:
        manifest.write_json(registry.folder / "champion.json", {"version": 2})
        eventually(
            lambda: says("still serving version 1; cannot load the new champion: the saved model")
        )
        time.sleep(3 * models.POLL_SECONDS)
        assert ask(client, ROWS)["version"] == 1
        (registry.folder / "champion.json").write_text("not JSON")
        eventually(
            lambda: says("cannot load the new champion: the registry has no champion any more")
        )
        time.sleep(3 * models.POLL_SECONDS)
        assert ask(client, ROWS)["version"] == 1
        manifest.write_json(registry.folder / "champion.json", {"version": 3})
        eventually(lambda: says("serving version 3"))
        assert ask(client, ROWS)["version"] == 3
    assert len(told) == 3  # each is told once, however often the registry is asked
    assert "model.onnx has 0 bytes" in told[0]


def test_a_damaged_champion_is_read_once(registry):
    champion = ChampionModel(registry)
    (registry.version(2).model / "model.onnx").write_bytes(b"")
    manifest.write_json(registry.folder / "champion.json", {"version": 2})
    with pytest.raises(UserError, match="damaged"):
        champion.update()
    champion.update()  # it may be large, and the registry is asked again and again
    assert champion.current.version == 1


def test_a_registry_begun_anew_is_noticed(registry, trained):
    champion = ChampionModel(registry)
    before = champion.current
    champion.update()
    assert champion.current is before
    shutil.rmtree(registry.folder)
    with pytest.raises(UserError, match="no champion any more"):
        champion.update()
    assert champion.current is before  # no champion is no reason to stop
    registry.register(trained / "model", {}, run="new")
    registry.promote(1, "new", None)
    champion.update()
    assert champion.current.version == 1
    assert champion.current.model.schema.classes == ("cat", "dog", "emu")
