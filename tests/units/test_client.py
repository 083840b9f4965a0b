"""make predict asks a running server as it asks a saved model."""

import csv
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from core.errors import UserError
from core.onnx_model import Model
from core.registry import LocalRegistry
from level_0_manual import predict
from predictor.client import Endpoint, Server
from project import runs


@pytest.fixture
def port(project, trained):
    """A server of version 1, which came from run r1; its port."""
    registry = LocalRegistry(runs.registry_folder())
    registry.register(trained / "model", {"accuracy": 0.9}, "r1")
    registry.promote(1, "the first", None)
    (project / "runs").mkdir()
    (project / "runs" / "r1").symlink_to(trained, target_is_directory=True)
    command = [sys.executable, "-m", "predictor.server", "--registry", "registry", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        greeting = server.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", greeting)
        assert found, greeting
        yield int(found[1])
        server.terminate()


@pytest.fixture
def ask(port, monkeypatch, capsys):
    """The command line, with that server's port."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["predict", "--port", str(port), *arguments])
        predict.main()
        return capsys.readouterr()

    return call


def test_the_server_answers_as_the_saved_model(ask, trained):
    served = ask("--row", "3")
    assert "Asking the server at http://127.0.0.1:" in served.err
    assert "version 1" in served.err
    direct = ask("--row", "3", "--run", "r1")
    assert "Asking the model of run r1" in direct.err
    assert served.out == direct.out
    assert served.out.startswith("Test row 3")
    files = [
        list(csv.DictReader(io.StringIO(ask("--csv", str(trained / "animals.csv"), *more).out)))
        for more in ((), ("--run", "r1"))
    ]
    assert [row["prediction"] for row in files[0]] == [row["prediction"] for row in files[1]]
    assert np.allclose(
        [float(row["score"]) for row in files[0]],
        [float(row["score"]) for row in files[1]],
        atol=1e-5,
    )


def test_many_rows_go_in_several_requests(port, trained):
    server = Server.find(port, LocalRegistry(runs.registry_folder()))
    table = {
        "width": ["1.5", "", 3] * 400,
        "height": [50] * 1200,
        "colour": ["red", None, "new"] * 400,
    }
    assert np.allclose(
        server.probabilities(table), Model.load(trained / "model").probabilities(table), atol=1e-6
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"width": 1}, "not in the data: height"),
        ({"width": 1, "height": "tall"}, "column 'height': 'tall'"),
        ({"width": 1, "height": None}, "the server rejects.*instance 1, column 'height'"),
    ],
)
def test_a_wrong_row_is_told(ask, row, message):
    with pytest.raises(UserError, match=message):
        ask("--row", json.dumps(row))


def test_a_server_that_has_gone_is_told(port, monkeypatch):
    server = Server.find(port, LocalRegistry(runs.registry_folder()))
    gone = Server(Endpoint("http://127.0.0.1:9"), server.version, server.schema)
    with pytest.raises(UserError, match="does not respond"):
        gone.probabilities({"width": [1], "height": [2], "colour": ["red"]})


def test_a_server_is_known_by_its_own_description(port, trained):
    server = Server.open(f"http://127.0.0.1:{port}/predict", 1)
    assert (server.address, server.version) == (f"http://127.0.0.1:{port}", 1)
    assert (
        server.schema == Model.load(trained / "model").schema
    )  # few categories: all are among the examples
    assert (
        server.predict({"width": ["3.0"], "height": [50], "colour": ["red"]})[0]["label"] == "dog"
    )


def test_zero_is_no_missing_category(port, monkeypatch):
    server = Server.open(f"http://127.0.0.1:{port}", 1)
    sent = []
    monkeypatch.setattr(
        Endpoint, "predict", lambda _, instances, **__: sent.extend(instances) or []
    )
    server.predict({"width": ["na", " 2 ", None], "height": [1, 2.5, "3"], "colour": [0, "", None]})
    assert sent == [[None, 1, 0], [2, 2.5, None], [None, 3, None]]


def test_without_a_server_or_with_somebody_elses_there_is_none(port, tmp_path, model_copy):
    assert Server.find(9, LocalRegistry(runs.registry_folder())) is None
    other = LocalRegistry(tmp_path / "other")
    assert Server.find(port, other) is None
    (model_copy / "model.json").write_text(
        (model_copy / "model.json").read_text().replace("unknown", "another")
    )
    other.register(model_copy, {}, "r1")  # a version 1 too, of another project
    assert Server.find(port, other) is None
