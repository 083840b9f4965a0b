"""inference/: one row, rows as they come, a file of rows; with servers that are busy, killed and started again."""

import contextlib
import csv
import importlib.util
import io
import itertools
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import urllib3
from core.errors import UserError
from core.onnx_model import Model
from google.auth.exceptions import DefaultCredentialsError
from google.oauth2.credentials import Credentials
from level_2_cicd.rehearsal.server import ApiError as Denied
from level_2_cicd.rehearsal.server import FakeServer, Response
from predictor import batch, client, cloud, contract
from predictor.batch import read_rows
from predictor.client import Endpoint, RequestRejected

from tests.units.project import ROOT

FOLDER = ROOT / "level_1_pipeline" / "inference"


# ── servers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Predictor:
    """The real server as a process, which can be killed and started again at the same port."""

    def __init__(self, model, **environment):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.command = [
            sys.executable,
            "-m",
            "predictor.server",
            "--model-dir",
            model,
            "--port",
            str(self.port),
        ]
        self.environment = {**os.environ, **environment}
        self.start()
        assert "serving" in self.process.stderr.readline()

    def start(self):
        self.process = subprocess.Popen(
            self.command, env=self.environment, stderr=subprocess.PIPE, text=True
        )

    def kill(self):
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def serving(model, **environment):
    predictor = Predictor(model, **environment)
    try:
        yield predictor
    finally:
        predictor.kill()


@pytest.fixture(scope="module")
def address(trained):
    """A server that nobody disturbs."""
    with serving(trained / "model") as predictor:
        yield predictor.address


@pytest.fixture
def stub(trained):
    """Start a server that describes itself as the real one does, and answers as it is told: call(body) → status, headers."""
    document = contract.openapi(Model.load(trained / "model").schema, 1, "/predict", "/health")
    prediction = {"label": "dog", "score": 1.0, "scores": {"dog": 1.0}}

    with contextlib.ExitStack() as stack:

        def start(call):
            class Handler(BaseHTTPRequestHandler):
                protocol_version = "HTTP/1.1"

                def do_GET(self):
                    self.answer(200, {}, document)

                def do_POST(self):
                    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    status, headers = call(body)
                    predictions = {"predictions": [prediction for _ in body.get("instances", [])]}
                    self.answer(
                        status, headers, predictions if status == 200 else {"error": "not now"}
                    )

                def answer(self, status, headers, content):
                    text = json.dumps(content).encode()
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(text))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text)

                def log_message(self, *_):
                    """Nothing."""

            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start


# ── commands ────────────────────────────────────────────────────────────────────────────────────────────────────────


def command(name, *arguments):
    return [sys.executable, FOLDER / f"{name}.py", *map(str, arguments)]


def run(name, *arguments, code=0, **options):
    """A command as a process, to its end."""
    done = subprocess.run(
        command(name, *arguments),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def call(monkeypatch):
    """A command within this process; its exit code, unless it raises."""

    def call(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            module.main()
        except SystemExit as end:
            return end.code
        return 0

    return call


def rows(count):
    """Rows that differ, as a CSV file has them; their answers tell them apart."""
    yield ["id", "width", "height", "colour", "animal"]
    colours = itertools.cycle(["red", "grey", "", "brown", "never seen"])
    for number, colour in zip(range(count), colours, strict=False):
        yield [
            f"n{number}",
            "" if number % 7 == 0 else f"{1 + number % 1000 / 500:.4f}",
            str(10 + number % 89),
            colour,
            "",
        ]


@pytest.fixture
def make_rows(tmp_path):
    """A CSV file of so many rows."""

    def make(count):
        path = tmp_path / "rows.csv"
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows(rows(count))
        return path

    return make


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def eventually(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def expected(path, model):
    """The best score of each row of a CSV file, from the model itself."""
    with path.open(newline="") as stream:
        records = list(csv.DictReader(stream))
    table = {name: [record[name] for record in records] for name in records[0]}
    return Model.load(model).probabilities(table).max(axis=1)


# ── one row ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_row_is_answered_readably_or_as_json(address, trained, call, capsys):
    assert (
        call("single", "--endpoint", address, '{"width": 3.0, "height": 50, "colour": "red"}') == 0
    )
    readable = capsys.readouterr().out
    assert readable.startswith("Your row\n")
    assert "prediction  dog" in readable
    assert call("single", "--endpoint", f"{address}/predict", '[3.0, 50, "red"]', "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["label"], next(iter(answer["scores"])), len(answer["scores"])) == (
        "dog",
        "dog",
        3,
    )
    assert f"{answer['score']:.2%}" in readable
    path = trained / "animals.csv"
    for number in (1, 300):
        assert call("single", "--endpoint", address, "--csv", path, "--row", number, "--json") == 0
        assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(
            expected(path, trained / "model")[number - 1], abs=1e-6
        )
    assert "truth" in run("single", "--endpoint", address, "--csv", path, "--row", 4).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a row"),
        (("{", "--csv", "x.csv"), "give a row"),
        (("{",), "nor JSON"),
        (("[1",), "ROW is not JSON"),
        (("[1]",), "ROW has 1 values; the model has 3 columns: width, height, colour"),
        (('{"wdith": 1}',), "no column wdith"),
        (('{"width": 1}',), "not in the data: height"),
        (('{"width": 1, "height": "tall"}',), "column 'height': 'tall'"),
        (("[1, null, null]",), "the server rejects.*column 'height'"),
        (("--csv", "nowhere.csv"), "no file nowhere.csv"),
        (("--csv", "CSV", "--row", "301"), "numbered 1 to 300"),
    ],
)
def test_a_wrong_row_is_told(call, address, trained, arguments, message):
    with pytest.raises(UserError, match=message):
        call(
            "single",
            "--endpoint",
            address,
            *(str(trained / "animals.csv") if word == "CSV" else word for word in arguments),
        )


# ── whom to ask ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_endpoint_is_told(call, address, monkeypatch):
    monkeypatch.setattr(client, "FIRST_SECONDS", 0.3)
    with pytest.raises(
        UserError, match=r"127.0.0.1:9 does not respond: .*refused.*make serve.*--endpoint"
    ):
        call("single", "[]", "--endpoint", "http://127.0.0.1:9")
    for wrong in ("127.0.0.1:8080", "ftp://x", "http://", "http://[", ""):
        with pytest.raises(UserError, match="expected an address such as"):
            call("single", "[]", "--endpoint", wrong)
    with pytest.raises(UserError, match=rf"the server there predicts at {address}/predict"):
        call("single", "[]", "--endpoint", f"{address}/v1/predict")
    # JSON, but another document
    monkeypatch.setattr(
        Endpoint,
        "get",
        lambda self, path: self._request("GET", "/health", None),
    )
    with pytest.raises(UserError, match=r"/openapi.json is not a predictor's"):
        call("single", "[]", "--endpoint", address)


def test_another_kind_of_server_is_told(call, tmp_path):
    handler = type("Quiet", (BaseHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=r"responds to GET /openapi.json with status 501"):
            call(
                "stream",
                "--endpoint",
                f"http://127.0.0.1:{server.server_port}",
                FOLDER / "stream.py",
            )
        server.shutdown()


# ── an endpoint in the cloud ────────────────────────────────────────────────────────────────────────────────────────

ENDPOINT = "projects/p/locations/europe-west4/endpoints/7"


class Cloud(FakeServer):
    """Passes requests for predictions on to a server, and its errors as they are, or as the text of Google's own."""

    def __init__(self, address, wrapped):
        super().__init__()
        self.pool, self.predict, self.wrapped = urllib3.PoolManager(), f"{address}/predict", wrapped
        self.routes = [("POST", f"/v1/{ENDPOINT}:rawPredict", "endpoints.rawPredict", self.forward)]

    def forward(self, request):
        request.message = json.loads(request.body)
        answer = self.pool.request("POST", self.predict, body=request.body)
        if answer.status != 200 and self.wrapped:
            raise Denied(answer.status, answer.data.decode())
        return Response(answer.data, answer.status)


@pytest.fixture(params=[False, True], ids=["errors as they are", "errors wrapped"])
def vertex(address, monkeypatch, request):
    """A double of Vertex AI with one endpoint."""
    with Cloud(address, request.param) as double:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", double.address)
        yield double


def test_an_endpoint_in_the_cloud_is_asked_as_a_server_is(
    vertex, address, call, capsys, make_rows, tmp_path
):
    answers = []
    for endpoint in (address, ENDPOINT, f"{vertex.address}/v1/{ENDPOINT}"):
        call("single", "--endpoint", endpoint, '{"width": 3.0, "height": 50, "colour": "red"}')
        call("stream", "--endpoint", endpoint, make_rows(20))
        call("batch", "--endpoint", endpoint, make_rows(50), tmp_path / "out.jsonl")
        answers.append((capsys.readouterr().out, (tmp_path / "out.jsonl").read_text()))
        (tmp_path / "out.jsonl").unlink()
    assert answers[0] == answers[1] == answers[2]
    asked = vertex.calls("endpoints.rawPredict")
    assert asked[0] == {"openapi": True}
    assert len(asked[1]["instances"]) == 1
    assert len(asked) == 2 * (2 + 21 + 2)


def test_what_is_wrong_with_a_row_is_told_through_an_endpoint(vertex, call, tmp_path):
    with pytest.raises(
        UserError, match="the server rejects rows 1 to 1: instance 1, column 'height'"
    ):
        call("single", "--endpoint", ENDPOINT, "[1, null, null]")
    path, output = tmp_path / "rows.csv", tmp_path / "out.jsonl"
    path.write_text("width,height,colour\n1,2,red\n1,,red\n1,3,red\n")
    assert call("batch", "--endpoint", ENDPOINT, path, output) == 1
    assert [line["key"] for line in lines(output)] == [1, 3]
    assert lines(tmp_path / "out.jsonl.errors.jsonl")[0]["error"].startswith("column 'height'")


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"status": 429}, {"status": 0}, {"status": None, "fraction": 0.5}]
)
@pytest.mark.parametrize("after", [0, 1])
def test_an_endpoint_that_fails_once_is_asked_again(vertex, call, capsys, fault, after):
    vertex.fail(after=after, **fault)
    assert call("single", "--endpoint", ENDPOINT, '[3.0, 50, "red"]', "--json") == 0
    assert json.loads(capsys.readouterr().out)["label"] == "dog"
    assert vertex.faults[0].times == 0


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "auth application-default login"),
        (403, "roles/aiplatform.user"),
        (404, "gcloud ai endpoints list"),
        (500, "oh no"),
    ],
)
def test_googles_refusals_are_told_with_what_to_do(vertex, call, status, told):
    vertex.fail(status=status, message="oh no")
    with pytest.raises(
        UserError, match=f"status {status}: oh no.*{told}" if told != "oh no" else told
    ):
        call("single", "--endpoint", ENDPOINT, "[1, 2, null]")


def test_an_endpoint_of_another_predictor_is_told(vertex, call, stub):
    vertex.predict = stub(lambda body: (400, {}))  # it knows no description
    with pytest.raises(UserError, match="is not this project's predictor"):
        call("single", "--endpoint", ENDPOINT, "[1, 2, null]")


def test_an_endpoint_is_told_who_asks(address, call, monkeypatch):
    monkeypatch.delenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", raising=False)
    with Cloud(address, wrapped=False) as double:
        monkeypatch.setattr(cloud, "TRUSTED", re.escape(double.address))
        own = f"{double.address}/v1/{ENDPOINT}"  # an endpoint may have a server of its own
        monkeypatch.setattr("google.auth.default", lambda scopes: (Credentials("secret"), None))
        call("single", "--endpoint", own, "[1, 2, null]")
        assert {received.headers["authorization"] for received in double.received} == {
            "Bearer secret"
        }

        def absent(scopes):
            raise DefaultCredentialsError

        monkeypatch.setattr("google.auth.default", absent)
        with pytest.raises(
            UserError, match=r"no credentials.*gcloud auth application-default login"
        ):
            call("single", "--endpoint", own, "[1, 2, null]")


@pytest.mark.parametrize(
    "server",
    [
        "http://europe-west4-aiplatform.googleapis.com",
        "https://example.com",
        "https://europe-west4-aiplatform.googleapis.com.example.com",
        "https://europe-west4-aiplatform.googleapis.com:8443",
    ],
)
def test_nobody_but_google_is_shown_credentials(server, monkeypatch):
    monkeypatch.delenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", raising=False)
    with pytest.raises(UserError, match="must not get your credentials"):
        cloud.parse(f"{server}/v1/{ENDPOINT}")
    assert cloud.parse(ENDPOINT) == (
        "https://europe-west4-aiplatform.googleapis.com",
        f"/v1/{ENDPOINT}:rawPredict",
    )
    own = "https://1234.europe-west4-567.prediction.vertexai.goog"
    assert cloud.parse(f"{own}/v1/{ENDPOINT}") == (own, f"/v1/{ENDPOINT}:rawPredict")


def test_the_proxy_of_the_environment_is_used_for_the_cloud_only(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv(cloud.OVERRIDE, "https://x")
    url = "https://europe-west4-aiplatform.googleapis.com"
    settings = cloud.open_session().merge_environment_settings(url, {}, None, None, None)
    assert settings["proxies"]["https"] == "http://proxy.example:3128"
    local = Endpoint(url).session.merge_environment_settings(url, {}, None, None, None)
    assert not local["proxies"]


def test_mistakes_exit_with_2_and_leave_nothing(tmp_path, address):
    path = tmp_path / "rows.csv"
    path.write_text("width,colour\n1,red\n")
    good = tmp_path / "good.csv"
    good.write_text("height\n1\n")
    output = tmp_path / "answers.jsonl"
    for name, arguments, message in [
        ("stream", [tmp_path / "nowhere.jsonl"], "no file"),
        ("stream", [tmp_path], ": Is a directory"),
        ("stream", [path], "1 column(s) of the model are not in the data: height"),
        ("stream", [path, "--concurrency", "0"], "'0' is not a number from 1 to 64"),
        ("stream", [path, "--wait", "nan"], "'nan' is not a number from 0 to 600"),
        ("stream", [good, "--output", tmp_path], ": Is a directory"),
        ("batch", [good, tmp_path / "no" / "folder"], ": No such file"),
        ("batch", [path, output, "--key", "id"], "no column 'id' for --key, only width, colour"),
        (
            "batch",
            [path, output, "--batch-size", "10001"],
            "'10001' is not a number from 1 to 10000",
        ),
        ("batch", [path, path], "exists"),
    ]:
        done = run(name, "--endpoint", address, *arguments, code=2)
        assert message in done.stderr
        assert done.stdout == ""
    assert sorted(tmp_path.iterdir()) == [good, path]


# ── servers that are busy ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again_when_it_says(stub, monkeypatch, status):
    pauses = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", pauses.append)
    replies = iter(
        [
            (status, {"Retry-After": "7"}),
            (status, {}),
            (status, {}),
            (status, {"Retry-After": "0"}),
            (200, {}),
        ]
    )
    received = []

    def busy(body):
        received.append(body["instances"])
        return next(replies)

    endpoint = Endpoint(stub(busy), wait=60)
    assert len(endpoint.predict([[1], [2]])) == 2
    assert received == [[[1], [2]]] * 5
    assert pauses[0] == 7
    assert 0 < pauses[1] < pauses[2] < pauses[3] < 7  # longer each time, and never none at all


def test_patience_has_an_end(stub):
    received = []
    endpoint = Endpoint(
        stub(lambda body: received.append(body) or (503, {"Retry-After": "3600"})), wait=0.2
    )
    with pytest.raises(UserError, match="status 503: not now"):
        endpoint.predict([[1]])
    assert len(received) == 2  # at once, and once after the pause
    with pytest.raises(UserError, match="does not respond"):
        Endpoint("http://127.0.0.1:9", wait=0.2).predict([[1]])


def test_other_failures_are_no_matter_of_patience(stub):
    received = []
    endpoint = Endpoint(
        stub(lambda body: received.append(body) or (len(received) == 1 and (500, {})) or (400, {})),
        wait=60,
    )
    with pytest.raises(UserError, match="responds to POST /predict with status 500: not now"):
        endpoint.predict([[1]])
    with pytest.raises(RequestRejected, match="not now"):
        endpoint.predict([[1]])
    assert len(received) == 2


def test_as_many_requests_at_a_time_as_are_asked_for_and_no_more(stub, tmp_path):
    together, most, now, lock = threading.Barrier(8), [0], [0], threading.Lock()

    def gather(_):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait(30)  # nobody is answered before eight are here …
        time.sleep(0.1)  # … and a ninth would have come
        with lock:
            now[0] -= 1
        return 200, {}

    path = tmp_path / "rows.jsonl"
    path.write_text("[1]\n" * 64)
    done = run("stream", "--endpoint", stub(gather), "--concurrency", 8, path)
    assert [json.loads(line)["key"] for line in done.stdout.splitlines()] == list(range(1, 65))
    assert most == [8]


# ── rows as they come ───────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_are_answered_in_their_order(address, make_rows, tmp_path, trained):
    path, output = make_rows(500), tmp_path / "answers.jsonl"
    assert run("stream", "--endpoint", address, path, "--output", output).stderr == ""
    answers = lines(output)
    assert [answer["key"] for answer in answers] == list(range(1, 501))
    assert np.allclose(
        [answer["score"] for answer in answers], expected(path, trained / "model"), atol=1e-6
    )
    assert len({answer["score"] for answer in answers}) > 100
    with path.open() as stream:
        piped = run("stream", "--endpoint", address, "--csv", stdin=stream)
    assert piped.stdout == output.read_text()


def test_an_answer_does_not_wait_for_the_next_row(address):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    arguments = command("stream", "--endpoint", address)
    with subprocess.Popen(
        arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        rescue = threading.Timer(30, process.kill)
        rescue.start()
        for number in range(1, 6):
            process.stdin.write(f"[{number}, 50, null]\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["key"] == number
        process.stdin.close()
        assert process.wait() == 0
        rescue.cancel()


def test_no_more_rows_are_read_than_are_needed():
    drawn, gate = [], threading.Event()

    def items():
        for number in itertools.count():
            drawn.append(number)
            yield number

    results = batch.in_order(lambda number: gate.wait(30) and number, items(), 4)
    threading.Timer(0.3, gate.set).start()
    assert next(results) == 0
    most = len(drawn)
    assert [next(results) for _ in range(100)] == list(range(1, 101))
    assert most <= 3 * 4 + 2
    assert len(drawn) <= 100 + 3 * 4 + 2


def test_a_bad_row_is_told_in_its_place(address, tmp_path):
    path = tmp_path / "rows.jsonl"
    bad = [
        b'{"width": 1',
        b"7",
        b"[1]",
        b'{"height": "tall"}',
        b'{"height": 1, "x": 2}',
        b'{"colour": "\xff", "height": 1}',
        b"[NaN,1,null]",
    ]
    good = b'{"height": 50}'
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([good, *bad[:3], b"", good, *bad[3:]]))
    done = run("stream", "--endpoint", address, path, code=1)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["error" in answer for answer in answers] == [
        False,
        True,
        True,
        True,
        False,
        True,
        True,
        True,
        True,
    ]
    assert [answer["key"] for answer in answers] == list(range(1, 10))
    for answer, message in zip(
        [answer for answer in answers if "error" in answer],
        [
            "not JSON",
            "neither a JSON object",
            "has 1 values",
            "column 'height': 'tall'",
            "column 'x'",
            "not UTF-8",
            "column 'width': NaN",
        ],
        strict=True,
    ):
        assert message in answer["error"]
        assert "instance" not in answer["error"]
    assert [
        answer["row"].encode(errors="surrogateescape") for answer in answers if "error" in answer
    ] == bad
    assert "error: 7 of 9 row(s) failed" in done.stderr


def test_a_csv_files_rows_may_be_of_several_lines_or_broken(trained):
    schema = Model.load(trained / "model").schema

    def read(text, **options):
        found = read_rows(io.StringIO(text, newline=""), "f.csv", schema, is_csv=True, **options)
        return [json.loads(row.instance) if row.instance else row.problem for row in found]

    text = 'colour,height,note\r\n"a\nb",1,"x, ""y"""\r\n\r\n c ,na,\r\nd,2\r\n"e"f,3,\r\ng,tall,\r\n h\u2028i,4,\n'
    answers = read(text)
    assert answers[:2] == [[None, 1, "a\nb"], [None, None, " c "]]
    assert answers[2] == "the row has 2 cells, but the header has 3."
    assert "not valid CSV" in answers[3]
    assert answers[4] == "column 'height': 'tall' is not a finite number."
    assert answers[5:] == [[None, 4, " h\u2028i"]]
    assert "not valid CSV" in read('height\n1\n"2\n3\n')[1]
    for text, message in [
        ("", "is empty"),
        ("height,height\n", "duplicate column"),
        ('"height"x\n', "the header is not valid CSV"),
    ]:
        with pytest.raises(UserError, match=f"f.csv.*{message}"):
            read(text)


# ── faults: nothing is lost, nothing is repeated ────────────────────────────────────────────────────────────────────


def test_a_server_killed_in_mid_stream_costs_no_row(address, trained, make_rows, tmp_path):
    path, calm, disturbed = make_rows(1500), tmp_path / "calm.jsonl", tmp_path / "disturbed.jsonl"
    run("stream", "--endpoint", address, path, "--output", calm)
    with serving(trained / "model") as predictor:
        process = subprocess.Popen(
            command("stream", "--endpoint", predictor.address, path, "--output", disturbed),
            stderr=subprocess.PIPE,
            text=True,
        )
        eventually(disturbed.exists)
        for part in (0.1, 0.4, 0.7):
            eventually(lambda part=part: disturbed.stat().st_size > part * calm.stat().st_size)
            predictor.kill()
            assert process.poll() is None
            predictor.start()
        assert process.communicate(timeout=60) == (None, "")
    assert process.returncode == 0
    assert disturbed.read_bytes() == calm.read_bytes()


@pytest.mark.parametrize("name", ["stream", "batch"])
def test_a_client_killed_goes_on_where_it_was(address, make_rows, tmp_path, name):
    path, calm, disturbed = make_rows(1200), tmp_path / "calm.jsonl", tmp_path / "disturbed.jsonl"
    path.write_text(
        path.read_text().replace("n497,,", "n497,wide,")
    )  # a row that fails must not be asked twice either
    written = disturbed if name == "stream" else tmp_path / "disturbed.jsonl.partial"

    def arguments(output):
        return [
            "--endpoint",
            address,
            path,
            *(["--output", output] if name == "stream" else [output, "--batch-size", "20"]),
        ]

    assert "1 of 1,200" in run(name, *arguments(calm), code=1).stderr
    size = 0
    for _ in range(3):
        with subprocess.Popen(
            command(name, *arguments(disturbed)), stderr=subprocess.DEVNULL
        ) as process:
            eventually(
                lambda size=size: written.exists() and written.stat().st_size > size + 20_000
            )
            process.kill()
        assert name == "stream" or not disturbed.exists()  # what has its name is whole
        with written.open("r+b") as stream:
            stream.truncate(
                written.stat().st_size - 7
            )  # as a machine that loses its power may leave it
        size = written.stat().st_size
    assert "1 of 1,200" in run(name, *arguments(disturbed), code=1).stderr
    assert disturbed.read_bytes() == calm.read_bytes()
    assert not (tmp_path / "disturbed.jsonl.partial").exists()


def test_ctrl_c_says_how_to_go_on(address, make_rows, tmp_path):
    path, output = make_rows(1500), tmp_path / "answers.jsonl"
    with subprocess.Popen(
        command("stream", "--endpoint", address, path, "--output", output),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        eventually(lambda: output.exists() and output.stat().st_size > 20_000)
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
    assert process.returncode == 130
    found = re.search(r"([\d,]+) row\(s\) are done; rerun the same command to continue", told)
    assert "Traceback" not in told
    assert abs(int(found[1].replace(",", "")) - len(lines(output))) <= 1
    run("stream", "--endpoint", address, path, "--output", output)
    assert [answer["key"] for answer in lines(output)] == list(range(1, 1501))


@pytest.mark.parametrize("cut", [1, 5, 30, 40, 41, 45, -1])
def test_a_torn_line_is_answered_anew(call, address, make_rows, tmp_path, cut):
    path, output = make_rows(3), tmp_path / "answers.jsonl"
    call("stream", "--endpoint", address, path, "--output", output)
    whole = output.read_bytes()
    first = whole.index(b"\n") + 1
    output.write_bytes(whole[: first + cut] if cut > 0 else whole[:cut])
    assert call("stream", "--endpoint", address, path, "--output", output) == 0
    assert output.read_bytes() == whole


def test_an_output_of_something_else_is_left_alone(call, address, make_rows, tmp_path):
    path, output = make_rows(5), tmp_path / "answers.jsonl"
    call("stream", "--endpoint", address, path, "--output", output)
    answers = output.read_bytes()
    path.write_text(path.read_text().replace("n3,", "m3,"))
    for content in (answers, b"mine", b"mine\n"):
        output.write_bytes(content)
        with pytest.raises(UserError, match=r"answers.jsonl does not belong to these rows"):
            call("stream", "--endpoint", address, path, "--output", output)
        assert output.read_bytes() == content
    output.write_bytes(answers)
    make_rows(4)
    with pytest.raises(UserError, match="more lines than the input has rows"):
        call("stream", "--endpoint", address, path, "--output", output)
    make_rows(5)
    with batch.open_output(output), pytest.raises(UserError, match="another run is writing"):
        call("stream", "--endpoint", address, path, "--output", output)
    assert output.read_bytes() == answers


def test_a_server_that_stays_away_ends_the_run(make_rows, tmp_path, stub):
    served = itertools.count()
    endpoint = stub(lambda _: (200 if next(served) < 20 else 503, {}))
    done = run(
        "stream",
        "--endpoint",
        endpoint,
        "--wait",
        "0.2",
        make_rows(100),
        "--output",
        tmp_path / "a.jsonl",
        code=2,
    )
    assert "status 503: not now" in done.stderr
    assert (
        f"{len(lines(tmp_path / 'a.jsonl'))} row(s) are done; rerun the same command to continue."
        in done.stderr
    )


def test_progress_is_shown_on_a_terminal_only(address, make_rows, tmp_path):
    leader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    arguments = command(
        "stream", "--endpoint", address, make_rows(20), "--output", tmp_path / "a.jsonl"
    )
    subprocess.run(arguments, stderr=terminal, timeout=60, check=True)
    assert re.search(r"20 rows \[.* rows/s\]", os.read(leader, 100_000).decode())
    os.close(terminal)
    os.close(leader)


# ── a file of rows ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_failures_have_a_file_of_their_own(address, make_rows, tmp_path, trained):
    path, output = make_rows(300), tmp_path / "answers.jsonl"
    scores = expected(path, trained / "model")
    with path.open("a") as stream:
        stream.write(
            "x,1,tall,red,\ny,1\n,1,50,red,\nz,1,,red,\n"
        )  # text, too few cells, no key, and one for the server
    for extra in ("", ".errors.jsonl", ".partial"):
        assert not (tmp_path / f"answers.jsonl{extra}").exists()
    done = run(
        "batch", "--endpoint", address, path, output, "--key", "id", "--batch-size", 64, code=1
    )
    assert "error: 4 of 304 row(s)" in done.stderr
    answers, failures = lines(output), lines(tmp_path / "answers.jsonl.errors.jsonl")
    assert [answer["key"] for answer in answers] == [f"n{number}" for number in range(300)]
    assert np.allclose([answer["score"] for answer in answers], scores, atol=1e-6)
    assert [failure["key"] for failure in failures] == ["x", 302, 303, "z"]
    assert [failure["row"] for failure in failures] == [
        "x,1,tall,red,",
        "y,1",
        ",1,50,red,",
        "z,1,,red,",
    ]
    assert "column 'height': 'tall'" in failures[0]["error"]
    assert "no key in column 'id'" in failures[2]["error"]
    assert "column 'height': '' is missing" in failures[3]["error"]
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "answers.jsonl",
        "answers.jsonl.errors.jsonl",
        "rows.csv",
    ]
    mended = tmp_path / "mended.jsonl"
    mended.write_text('{"id": {"a": 1}, "height": 1}\n{"id": 7, "height": 1}\n')
    assert (
        "1 of 2"
        in run(
            "batch", "--endpoint", address, mended, tmp_path / "more.jsonl", "--key", "id", code=1
        ).stderr
    )
    assert lines(tmp_path / "more.jsonl")[0]["key"] == 7


def test_a_refused_batch_is_divided_until_the_bad_rows_are_found(
    call, address, tmp_path, monkeypatch
):
    path, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    path.write_text(
        "".join(
            f"[1, {'null' if number in (77, 900) else number}, null]\n" for number in range(1, 1025)
        )
    )
    sizes, predict = [], Endpoint.predict_json
    monkeypatch.setattr(
        Endpoint,
        "predict_json",
        lambda self, texts: sizes.append(len(texts)) or predict(self, texts),
    )
    assert call("batch", "--endpoint", address, path, output, "--batch-size", 1024) == 1
    assert [failure["key"] for failure in lines(tmp_path / "answers.jsonl.errors.jsonl")] == [
        77,
        900,
    ]
    assert [answer["key"] for answer in lines(output)] == [
        number for number in range(1, 1025) if number not in (77, 900)
    ]
    assert sizes[0] == 1024
    assert len(sizes) == 1 + 2 * (
        10 + 9
    )  # two for each halving, of which the bad rows share the first


def test_a_body_too_large_is_divided_too(trained, call, make_rows, tmp_path):
    output = tmp_path / "answers.jsonl"
    path = make_rows(100)
    path.write_text(path.read_text() + f"big,1,50,{'x' * 2000},\n")
    with serving(trained / "model", PREDICT_MAX_BYTES="1000") as predictor:
        assert call("batch", "--endpoint", predictor.address, path, output, "--key", "id") == 1
    assert [answer["key"] for answer in lines(output)] == [f"n{number}" for number in range(100)]
    (failure,) = lines(tmp_path / "answers.jsonl.errors.jsonl")
    assert failure["key"] == "big"
    assert "larger than 1,000 bytes" in failure["error"]


def test_long_rows_go_in_smaller_batches(stub, tmp_path, call):
    sizes = []
    path = tmp_path / "rows.jsonl"
    path.write_text(f'["{"x" * 300_000}"]\n' * 10)
    address = stub(lambda body: sizes.append(len(body["instances"])) or (200, {}))
    call("batch", "--endpoint", address, path, tmp_path / "answers.jsonl")
    assert sorted(sizes) == [1, 3, 3, 3]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["answers.jsonl", "rows.jsonl"]


def test_memory_does_not_grow_with_the_file(address, make_rows, tmp_path):
    def peak(count):
        arguments = command(
            "batch", "--endpoint", address, make_rows(count), tmp_path / f"{count}.jsonl"
        )
        with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        with (tmp_path / f"{count}.jsonl").open() as stream:
            assert sum(1 for _ in stream) == count
        return usage.ru_maxrss

    assert peak(120_000) <= 1.3 * peak(20_000)
