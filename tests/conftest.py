"""What the template's tests share: where the template lies, and how a project is made from it."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cookiecutter.main import cookiecutter
from hypothesis import settings

# CI draws the same examples each time; --hypothesis-profile=explore draws others, and remembers what failed.
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("same")

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "{{cookiecutter.project_slug}}"


@pytest.fixture(scope="session")
def root() -> Path:
    """The template's repository."""
    return ROOT


@pytest.fixture(scope="session")
def template() -> Path:
    """The folder that becomes a project."""
    return ROOT / FOLDER


@pytest.fixture(scope="session")
def questions() -> dict[str, Any]:
    """cookiecutter.json."""
    content: dict[str, Any] = json.loads((ROOT / "cookiecutter.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user configuration of no content, so that nobody's own changes the tests or is changed by them."""
    folder = tmp_path_factory.mktemp("cookiecutter")
    settings = {name: str(folder / name) for name in ("cookiecutters_dir", "replay_dir")}
    path = folder / "config.yaml"
    path.write_text(
        json.dumps({**settings, "default_context": {}}), encoding="utf-8"
    )  # JSON is YAML too
    return path


@pytest.fixture(scope="session")
def generate(config: Path) -> Callable[..., Path]:
    """Make a project below a folder; answers that are not given have their defaults."""

    def generate(output: Path, *, repository: Path | str = ROOT, **answers: Any) -> Path:
        project = cookiecutter(
            str(repository),
            no_input=True,
            extra_context=answers,
            output_dir=str(output),
            config_file=str(config),
        )
        return Path(project)

    return generate


@pytest.fixture(scope="session")
def default_project(
    generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A project from the default answers; to be read, not changed."""
    return generate(tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="session")
def docker() -> str:
    """The version of Docker's engine. Without one a test is skipped; where REQUIRE_DOCKER is set it fails."""
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        problem = "docker is not installed"
    else:
        if done.returncode == 0:
            return done.stdout.strip()
        problem = done.stderr.strip()
    if os.environ.get("REQUIRE_DOCKER"):
        pytest.fail(f"this test needs Docker: {problem}")
    pytest.skip(f"this test needs Docker: {problem}")
