"""A generated project, used as its owner would: set up, tested, trained on several datasets, broken."""

import csv
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.heavy

Make = Callable[..., subprocess.CompletedProcess[str]]


def make(project: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run make in a project as a person would; nothing of this test run's own environment counts."""
    own = (
        "VIRTUAL_ENV",
        "PYTHONPATH",
        "MAKEFLAGS",
        "MAKELEVEL",
        "RUFF_CACHE_DIR",
        "MYPY_CACHE_DIR",
    )
    environment = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(
        ["make", *arguments], cwd=project, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, (
        f"make {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def project(generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project from the default answers, set up from its own lock."""
    folder = generate(tmp_path_factory.mktemp("used"))
    make(folder, "setup")
    return folder


@pytest.fixture
def settings(project: Path):
    """Change the data block of project.yaml; put back afterwards."""
    path = project / "project.yaml"
    before = path.read_text(encoding="utf-8")

    def change(**data: object) -> None:
        document = yaml.safe_load(before)
        document["data"].update(data)
        path.write_text(yaml.safe_dump(document), encoding="utf-8")

    yield change
    path.write_text(before, encoding="utf-8")


def newest_run(project: Path) -> Path:
    return max((project / "runs").iterdir(), key=lambda run: run.stat().st_mtime)


def metrics(project: Path) -> dict[str, float]:
    content: dict[str, float] = json.loads((newest_run(project) / "evaluation.json").read_text())
    return content


def test_the_projects_own_tests_and_linters_pass(project: Path) -> None:
    done = make(project, "test")
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
    make(project, "lint")


def test_they_pass_at_level_2_too_where_a_push_depends_on_them(project: Path) -> None:
    """As in a build: with the project's own environments, and with what cloudbuild.yaml gives to each step."""
    path = project / "project.yaml"
    before = path.read_text(encoding="utf-8")
    own = {
        r"    dev: .*\n    prod: .*\n": "    lab: {project: lab-12345}\n",
        r'region: "[a-z0-9-]+"': 'region: "us-central1"',
        "encryption: google-managed": "encryption: customer-managed",
        "private: false": "private: true",
        'repository: {name: "", id: ""': 'repository: {name: "owner/name", id: "12345"',
        'schedule: ""': 'schedule: "0 4 * * 1"',
        "canary_percent: 10": "canary_percent: 25",
        r"jobs: \[.*\]": "jobs: [cpu]",
    }
    text = before
    for pattern, replacement in own.items():
        text, count = re.subn(pattern, replacement, text, count=1)
        assert count == 1, pattern
    path.write_text(text, encoding="utf-8")
    try:
        make(project, "lint")
        done = make(project, "test", "ENVIRONMENT=lab", "COMMIT=1a2b3c4d", "JOB_SPEC=cpu")
    finally:
        path.write_text(before, encoding="utf-8")
    assert " passed" in done.stdout


def test_level_0_reads_digits_and_answers_in_a_picture(project: Path) -> None:
    done = make(project, "level0")
    for name in ("data", "model", "train", "evaluate"):
        assert f"{name}.html" in done.stdout
        assert (newest_run(project) / f"{name}.html").stat().st_size > 100_000
    assert metrics(project)["accuracy"] >= 0.97
    answer = make(project, "predict", "ROW=1").stdout
    assert "██" in answer
    assert "truth" in answer
    assert newest_run(project).name in make(project, "runs").stdout


def test_level_0_on_other_real_data_by_editing_the_data_block_alone(
    project: Path, settings
) -> None:
    settings(source="sample:breast_cancer", label="diagnosis")
    make(project, "level0", "SET=hyperparameters.epochs=15")
    assert metrics(project)["accuracy"] > 0.93
    assert (
        json.loads((newest_run(project) / "settings.json").read_text())["hyperparameters"]["epochs"]
        == 15
    )


def mixed_rows() -> list[list[object]]:
    chance = random.Random(0)
    rows: list[list[object]] = [["id", "weight kg", "colour", "note", "kind"]]
    for number in range(400):
        kind = chance.choice(["apple", "pear"])
        weight = chance.gauss({"apple": 0.2, "pear": 0.3}[kind], 0.03)
        colour = chance.choice({"apple": ["red", "green"], "pear": ["green", "yellow"]}[kind])
        cells = ["" if chance.random() < 0.1 else cell for cell in (f"{weight:.3f}", colour)]
        rows.append([f"fruit {number}", *cells, chance.choice(["", "a, b", "größer"]), kind])
    return rows


def test_level_0_on_a_mixed_file_with_strings_blanks_and_an_id(
    project: Path, settings, tmp_path: Path
) -> None:
    rows = mixed_rows()
    with (project / "fruit.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    settings(source="fruit.csv", label="kind", ignore=["id"])
    make(project, "level0")
    assert metrics(project)["accuracy"] > 0.85
    row = '{"weight kg": 0.31, "colour": "yellow", "note": "never seen before"}'
    assert "prediction  pear" in make(project, "predict", f"ROW={row}").stdout
    new = tmp_path / "new.csv"
    with new.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([cells[1:4] for cells in rows[:30]])
    answers = list(csv.DictReader(io.StringIO(make(project, "predict", f"CSV={new}").stdout)))
    assert len(answers) == 29
    right = sum(
        answer["prediction"] == row[4] for answer, row in zip(answers, rows[1:30], strict=True)
    )
    assert right >= 24


def test_a_notebook_out_of_sync_stops_training_and_sync_mends_it(project: Path) -> None:
    module = project / "src" / "trainer" / "model.py"
    before = module.read_bytes()
    module.write_bytes(before.replace(b"min(50,", b"min(40,"))
    runs = len(list((project / "runs").glob("*")))
    assert "model.ipynb and src/trainer/model.py" in make(project, "level0", code=2).stderr
    assert len(list((project / "runs").glob("*"))) == runs
    make(project, "sync", code=2)  # which side is right?
    make(project, "sync", "FROM=module")
    assert b"min(40," in (project / "level_0_manual" / "model.ipynb").read_bytes()
    module.write_bytes(before)
    make(project, "sync", "FROM=module")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("level0", "SET=hyperparameters.epochs=many"), "hyperparameters.epochs"),
        (("level0", "SET=gate.threshold=1.5"), "gate.threshold: should be less than or equal to 1"),
        (("level0", "SET=data.label=colour"), "no label column 'colour'"),
        (("predict",), "give ROW"),
        (("predict", "ROW=1", "RUN=nowhere"), "no run 'nowhere'"),
        (("predict", "CSV=nowhere.csv"), "no file nowhere.csv"),
    ],
)
def test_a_mistake_is_one_message(project: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in make(project, *arguments, code=2).stderr


def test_doctor_finds_level_0_complete(project: Path) -> None:
    out = make(project, "doctor").stdout
    assert "✓ environment  torch" in out
    assert "Levels 0 and 1 can start on this machine." in out


@pytest.mark.parametrize(
    "answers",
    [
        {
            "project_name": "Änderung & Co: 50 %",
            "project_slug": "change",
            "description": 'Says "no" \\ maybe: {1}',
        },
        {"gpu": "none", "ci": "gitlab", "data_ingestion": "none", "license": "Proprietary"},
    ],
    ids=["nasty texts", "other choices"],
)
def test_projects_of_other_answers_are_clean(
    project: Path, generate: Callable[..., Path], tmp_path: Path, answers: dict[str, str]
) -> None:
    other = generate(tmp_path, **answers)
    (other / ".venv").symlink_to(project / ".venv")  # the hooks find their programs there
    environment = {**os.environ, "PYTHONPATH": "src:."}
    command = ["make", "lint", "-o", ".venv/.ready"]
    done = subprocess.run(command, cwd=other, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    code = "from project.settings import load_settings; print(load_settings('').description)"
    python = project / ".venv" / "bin" / "python"
    read = subprocess.run(
        [python, "-c", code], cwd=other, env=environment, capture_output=True, text=True
    )
    assert read.stdout.rstrip("\n") == answers.get("description", "Reads handwritten digits."), (
        read.stderr
    )


@pytest.fixture
def jupyter(project: Path, tmp_path: Path):
    """`make notebook`, with its server's address and token; no browser is opened."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"allow_root": True, "open_browser": False, "port": port, "token": "secret"}
    (tmp_path / "jupyter_server_config.json").write_text(
        json.dumps({"ServerApp": options, "IdentityProvider": {"token": "secret"}})
    )
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path), "HOME": str(tmp_path)}
    command = ["make", "notebook"]
    server = subprocess.Popen(
        command,
        cwd=project,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def call(path: str, content: object = None) -> dict[str, Any]:
        body = None if content is None else json.dumps(content).encode()
        method = "GET" if content is None else "PUT"
        headers = {"Authorization": "token secret", "Content-Type": "application/json"}
        address = f"http://127.0.0.1:{port}/api/{path}"
        with urllib.request.urlopen(
            urllib.request.Request(address, body, headers, method=method)
        ) as answer:
            document: dict[str, Any] = json.load(answer)
        return document

    try:
        for _ in range(120):
            try:
                call("status")
                break
            except OSError:
                assert server.poll() is None, server.stderr.read() if server.stderr else ""
                time.sleep(0.5)
        yield call
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=30)


def test_a_save_in_jupyter_writes_the_module_too(project: Path, jupyter) -> None:
    notebook, module = "level_0_manual/model.ipynb", project / "src" / "trainer" / "model.py"
    before = {path: path.read_bytes() for path in (project / notebook, module)}
    programs = set((project / "level_0_manual").glob("*.py"))
    opened = jupyter(f"contents/{notebook}")
    for cell in opened["content"]["cells"]:
        cell["source"] = cell["source"].replace("min(50,", "min(45,")
    jupyter(
        f"contents/{notebook}", {"type": "notebook", "format": "json", "content": opened["content"]}
    )
    assert "min(45," in module.read_text()
    assert "in sync" in make(project, "sync", "FROM=notebook").stdout
    assert set((project / "level_0_manual").glob("*.py")) == programs
    for path, content in before.items():
        path.write_bytes(content)


def test_a_notebook_of_ones_own_gets_no_module(project: Path, jupyter) -> None:
    cells = [
        {"cell_type": "code", "source": "1", "metadata": {}, "outputs": [], "execution_count": None}
    ]
    content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    before = set((project / "src" / "trainer").iterdir())
    jupyter(
        "contents/level_0_manual/mine.ipynb",
        {"type": "notebook", "format": "json", "content": content},
    )
    (project / "level_0_manual" / "mine.ipynb").unlink()
    assert set((project / "src" / "trainer").iterdir()) == before
