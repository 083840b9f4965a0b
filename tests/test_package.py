"""A project as a package: what the wheel and the sdist hold, and that the wheel predicts on its own."""

import ast
import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trainer.config import Hyperparameters
from trainer.data import prepare
from trainer.train import train

from tests.projects import makefile_text

from .conftest import ROOT

pytestmark = pytest.mark.heavy

# pip's variables for a closed network; the Makefiles hand them to uv in the same way.
UV = {
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command without anything of this test run's own environment; what it prints."""
    own = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    environ = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(
        command, cwd=cwd, env={**environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(source: Path, output: Path, *what: str) -> None:
    """As `make package` does, whose command is read from the Makefile."""
    found = re.search(
        r"^package:.*\n\t@\$\(RUN_PYTHON\) (-m build .*) --outdir dist \.$",
        makefile_text(),
        re.MULTILINE,
    )
    assert found
    run(sys.executable, *found[1].split(), *what, "--outdir", output, source, cwd=source)


@pytest.fixture(scope="module")
def project(generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which somebody has worked."""
    folder = generate(tmp_path_factory.mktemp("packaged"))
    for path in (
        "data/own.csv",
        "runs/r1/model/model.json",
        "registry/champion.json",
        ".env",
        "scratch/a.py",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("{}")
    for path in (
        "src/trainer/__pycache__/model.cpython-311.pyc",
        "tests/__pycache__/test_data.cpython-311.pyc",
    ):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(b"\0")
    return folder


@pytest.fixture(scope="module")
def built(project: Path) -> Path:
    """The folder of the sdist and the wheel."""
    build(project, project / "dist")
    assert len(list((project / "dist").iterdir())) == 2
    return project / "dist"


@pytest.fixture(scope="module")
def modules(project: Path) -> set[str]:
    """Every module of the project, below src/."""
    return {
        path.relative_to(project / "src").as_posix() for path in (project / "src").glob("*/*.py")
    }


@pytest.fixture(scope="module")
def python(project: Path, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an empty environment, into which the wheel was installed in the lock's versions."""
    uv = shutil.which("uv") or ROOT / ".uv" / "bin" / "uv"
    folder = tmp_path_factory.mktemp("installed")
    python = folder / "venv" / "bin" / "python"
    sources = {
        new: os.environ[old]
        for old, new in UV.items()
        if old in os.environ and new not in os.environ
    }
    run(uv, "venv", "--quiet", "--python", sys.executable, folder / "venv", cwd=folder)
    constraint = ["--constraint", project / "requirements" / "dev.txt"]
    install = (
        uv,
        "pip",
        "install",
        "--quiet",
        "--python",
        python,
        *constraint,
        *built.glob("*.whl"),
    )
    run(*install, cwd=folder, **sources)
    return python


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that tells small from large."""
    folder = tmp_path_factory.mktemp("model")
    chance = random.Random(0)
    with (folder / "sizes.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = [
            (chance.gauss(size, 0.2), ("small", "large")[size])
            for _ in range(60)
            for size in (0, 1)
        ]
        csv.writer(stream).writerows([("width", "size"), *rows])
    prepare(folder / "sizes.csv", "size", folder / "train.parquet", folder / "test.parquet")
    options = Hyperparameters(seed=0, threads=1, epochs=8, batch_size=16, learning_rate=0.05)
    train(folder / "train.parquet", folder / "model", options)
    return folder / "model"


def test_the_package_holds_the_code_and_nothing_else(built: Path, modules: set[str]) -> None:
    (wheel,) = built.glob("*.whl")
    name = wheel.name.removesuffix("-py3-none-any.whl")
    about = ["licenses/LICENSE", "METADATA", "RECORD", "WHEEL", "top_level.txt"]
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == modules | {f"{name}.dist-info/{file}" for file in about}
    about = ["LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"]
    with tarfile.open(built / f"{name}.tar.gz") as archive:
        files = {member.name.removeprefix(f"{name}/") for member in archive if member.isfile()}
    written = {path for path in files if path.startswith(f"src/{name.rsplit('-', 1)[0]}.egg-info/")}
    assert files - written == {f"src/{path}" for path in modules} | set(about)


def test_the_sdist_builds_the_same_wheel(built: Path, project: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    build(tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "again", "--wheel")
    build(project, tmp_path / "direct", "--wheel")
    contents = []
    for folder in (built, tmp_path / "again", tmp_path / "direct"):
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            contents.append((wheel.name, {name: archive.read(name) for name in archive.namelist()}))
    assert contents[0] == contents[1] == contents[2]


def test_what_the_code_imports_is_declared(project: Path, modules: set[str]) -> None:
    package = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {"pyyaml": "yaml", "scikit-learn": "sklearn", "cyclonedx-python-lib": "cyclonedx"}
    parts = [package["dependencies"], *package["optional-dependencies"].values()]
    declared = {re.split("[=>]", requirement)[0] for part in parts for requirement in part}
    # What comes with others: fastapi's, pydantic's, kfp's, cyclonedx's.
    allowed = {names.get(name, name.replace("-", "_")) for name in declared} | {
        "starlette",
        "pydantic_core",
        "google",
        "packageurl",
    }
    own = {module.split("/")[0] for module in modules} | set(sys.stdlib_module_names)
    imported = {
        name.split(".")[0] for module in modules for name in imports(project / "src" / module)
    }
    assert imported - own <= allowed
    locked = (project / "requirements" / "dev.txt").read_text(encoding="utf-8")
    assert {name for name in declared if not re.search(rf"^{name}==", locked, re.MULTILINE)} == {
        "torch"
    }


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_the_wheel_predicts_in_an_empty_environment(
    python: Path, model: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from core.onnx_model import Model\n"
        "model = Model.load(Path(sys.argv[1]))\n"
        "scores = model.probabilities({'width': [1.1, -0.1]})\n"
        "print(*(model.schema.classes[best] for best in scores.argmax(axis=1)))"
    )
    assert run(python, "-c", code, model, cwd=tmp_path).strip() == "large small"
    installed = run(
        python,
        "-c",
        "import importlib.metadata as m; print([d.name for d in m.distributions()])",
        cwd=tmp_path,
    )
    assert not {"torch", "kfp", "duckdb", "pytest"} & set(ast.literal_eval(installed))


def test_the_wheel_serves_and_asks(python: Path, model: Path, tmp_path: Path) -> None:
    command = [python, "-m", "predictor.server", "--model-dir", model, "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            greeting = server.stderr.readline() if server.stderr else ""
            found = re.search(r"http://127\.0\.0\.1:\d+", greeting)
            assert found, greeting
            body = json.dumps({"instances": [{"width": 1.1}, {"width": -0.1}]}).encode()
            with urllib.request.urlopen(f"{found[0]}/predict", body) as response:
                assert [answer["label"] for answer in json.load(response)["predictions"]] == [
                    "large",
                    "small",
                ]
            code = (
                "import sys; from predictor.client import Server; import predictor.batch; "
                "answers = Server.open(sys.argv[1], 1).predict({'width': [1.1, -0.1]}); "
                "print([answer['label'] for answer in answers])"
            )
            assert run(python, "-c", code, found[0], cwd=tmp_path) == "['large', 'small']\n"
        finally:
            server.terminate()
