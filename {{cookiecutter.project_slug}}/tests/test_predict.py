"""make predict: a test row, a row of one's own, a file."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest

from core.errors import UserError
from core.onnx_model import Model
from core.schema import Column, Schema
from level_0_manual import predict
from trainer.data import read_rows


@pytest.fixture
def ask(trained, tmp_path, monkeypatch, capsys):
    """Call the command line in a project whose newest run is the trained model."""
    (tmp_path / "project.yaml").write_text("")
    run = tmp_path / "runs" / "r1"
    run.parent.mkdir()
    run.symlink_to(trained, target_is_directory=True)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["predict", *arguments])
        predict.main()
        return capsys.readouterr().out

    return call


def test_a_test_row_is_answered_beside_the_truth(ask, trained):
    truth = read_rows(trained / "test.parquet")["animal"][2]
    out = ask("--row", "3")
    assert out.startswith("Test row 3")
    assert f"truth       {truth}" in out
    prediction = next(line.split()[1] for line in out.splitlines() if "prediction" in line)
    assert ("right" in out) == (prediction == truth)


def test_a_row_of_ones_own(ask):
    out = ask("--row", json.dumps({"width": 3.0, "height": 50, "colour": "red"}))
    assert "prediction  dog" in out
    assert "truth" not in out


def test_a_file_gives_a_file(ask, trained, make_csv):
    with (trained / "animals.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    answers = list(csv.DictReader(io.StringIO(ask("--csv", str(trained / "animals.csv")))))
    assert [int(answer["row"]) for answer in answers] == list(range(1, 301))
    right = sum(
        answer["prediction"] == row["animal"] for answer, row in zip(answers, rows, strict=True)
    )
    assert right > 240
    model = Model.load(trained / "model")
    table = {name: [row[name] for row in rows] for name in rows[0]}
    assert [float(answer["score"]) for answer in answers] == pytest.approx(
        model.probabilities(table).max(axis=1), abs=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give ROW"),
        (("--row", "1", "--csv", "x.csv"), "give ROW"),
        (("--row", "0"), "numbered 1 to"),
        (("--row", "100000"), "numbered 1 to"),
        (("--row", "{"), "neither a row's number nor JSON"),
        (("--row", "[1]"), "one JSON object"),
        (("--row", '{"heigth": 1}'), "no column heigth"),
        (("--row", '{"width": 1}'), "not in the data: height"),
        (("--row", '{"width": 1, "height": "tall"}'), "row 1, column 'height': 'tall'"),
        (("--row", '{"width": 1, "height": null}'), "row 1, column 'height'.*missing"),
        (("--csv", "nowhere.csv"), "no file nowhere.csv"),
        (("--run", "r9", "--row", "1"), "no run 'r9'"),
    ],
)
def test_mistakes_are_told(ask, arguments, message):
    with pytest.raises(UserError, match=message):
        ask(*arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("width,height\n", "no rows"),
        ("width,height,colour\n1,abc,red\n", "row 1, column 'height': 'abc'"),
        ("width,height,colour\n1,2\n", "line 2: has 2 cells, but the header has 3"),
        ("width,width\n1,2\n", "stands twice"),
        (b"width,height\n\xff,2\n", "UTF-8"),
    ],
)
def test_a_bad_file_is_told(ask, make_csv, content, message):
    with pytest.raises(UserError, match=message):
        ask("--csv", str(make_csv(content)))


def test_a_mistake_exits_with_2_and_no_traceback(tmp_path):
    command = [
        sys.executable,
        "-m",
        "level_0_manual.predict",
        "--model-dir",
        tmp_path,
        "--row",
        "{}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "no saved model" in done.stderr
    assert "Traceback" not in done.stderr


def test_reading_only_the_first_lines_is_no_failure(trained):
    command = [
        sys.executable,
        "-m",
        "level_0_manual.predict",
        "--model-dir",
        trained / "model",
        "--csv",
        trained / "animals.csv",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_the_predictor_needs_no_torch(trained):
    code = (
        f"import sys, pathlib; from level_0_manual.predict import Model; Model.load(pathlib.Path({str(trained / 'model')!r})); "
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'trainer', 'duckdb')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_images_are_drawn(trained):
    assert predict.draw([0, 16, 8, 0], (2, 2)) == ["  ██", "▒▒  "]
    columns = tuple(
        Column(f"pixel_{row}_{column}", "numeric") for row in range(2) for column in range(2)
    )

    class Fixed:
        """Answers the second class."""

        schema = Schema("digit", columns, (3, 8))

        def probabilities(self, _):
            return np.array([[0.25, 0.75]])

    text = predict.show_row(
        Fixed(), {**{c.name: [1] for c in columns}, "digit": ["3"]}, "Test row 1"
    )
    assert "████" in text
    assert "WRONG" in text
    assert "75.00%" in text
