"""Images: what a change rebuilds, and what a person reads when Docker refuses. None is built here: that needs Docker."""

import os
import shutil
import stat
import threading
import time
from pathlib import Path

import pytest
from core.errors import UserError
from level_1_pipeline import containers
from project.settings import load_settings

from tests.units.project import ROOT


@pytest.fixture
def copy(tmp_path) -> Path:
    """This project's files, to change."""
    folder = tmp_path / "copy"
    ignored = shutil.ignore_patterns(
        "__pycache__", "*.egg-info", ".*", "runs", "data", "registry", "build", "scratch"
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def tags(root: Path) -> dict[str, str]:
    return {container.name: container.tag() for container in containers.find(root)}


ALL = {"train", "predict", "deploy", "vertex_train", "kfp_compile", "kfp_run", "trigger_function"}
GOOGLE_CLOUD = ALL - {"train", "predict"}
REBUILT = [
    ("src/trainer/model.py", {"train"}),
    ("src/trainer/csv_reader.py", {"train"}),
    ("src/predictor/server.py", {"predict"}),
    ("level_0_manual/predict.py", set()),
    ("src/core/onnx_model.py", ALL),
    ("src/trainer/config.py", {"train", "vertex_train", "kfp_compile", "trigger_function"}),
    ("src/core/registry.py", ALL),
    ("src/core/errors.py", ALL),
    ("src/gcp/deployment.py", GOOGLE_CLOUD),
    ("level_1_pipeline/run.py", set()),
    ("src/gcp/storage.py", GOOGLE_CLOUD | {"predict"}),
    ("level_2_cicd/trigger_function_container/events.py", {"trigger_function"}),
    ("level_2_cicd/trigger_function_container/request.py", {"trigger_function"}),
    ("level_2_cicd/request.py", set()),
    ("src/gcp/pipeline_version.py", GOOGLE_CLOUD),
    ("level_2_cicd/trigger_function_container/main.py", {"trigger_function"}),
    ("level_2_cicd/trigger_function_container/request.avsc", {"trigger_function"}),
    ("requirements/trigger.txt", {"trigger_function"}),
    ("level_2_cicd/kfp_compile_container/main.py", {"kfp_compile"}),
    ("level_1_pipeline/component.py", {"kfp_compile"}),
    ("level_2_cicd/vertex_train_container/main.py", {"vertex_train"}),
    ("level_2_cicd/kfp_run_container/main.py", {"kfp_run"}),
    ("level_1_pipeline/deploy_container/main.py", {"deploy"}),
    ("requirements/train.txt", {"train"}),
    ("requirements/torch.txt", {"train"}),
    ("requirements/predict.txt", {"predict"}),
    ("requirements/kfp.txt", {"train", "deploy", "vertex_train"}),
    ("requirements/compile.txt", {"kfp_compile"}),
    ("requirements/uv.txt", ALL),
    ("requirements/dev.txt", set()),
    ("requirements/train.in", set()),
    ("level_1_pipeline/base_image.txt", ALL),
    ("level_1_pipeline/install_packages.sh", ALL),
    ("level_1_pipeline/pipeline.py", set()),
    ("level_1_pipeline/train_container/Dockerfile", {"train"}),
    ("level_1_pipeline/train_container/README.md", set()),
    ("level_0_manual/train.ipynb", set()),
    ("project.yaml", set()),
    ("pyproject.toml", set()),
    ("README.md", set()),
    ("Makefile", set()),
    ("tests/test_model.py", set()),
]


@pytest.mark.parametrize(("changed", "rebuilt"), REBUILT, ids=[path for path, _ in REBUILT])
def test_a_change_rebuilds_just_the_images_that_it_goes_into(copy, changed, rebuilt):
    before = tags(copy)
    with (copy / changed).open("a", encoding="utf-8") as stream:
        stream.write("\n# changed\n")
    after = tags(copy)
    assert {name for name in after if after[name] != before[name]} == rebuilt


def test_a_new_file_a_lost_one_and_a_mode_count(copy):
    before = tags(copy)
    (copy / "src/trainer/new.py").write_text("")
    added = tags(copy)
    assert added["train"] != before["train"]
    (copy / "src/trainer/new.py").unlink()
    assert tags(copy) == before
    script = copy / "level_1_pipeline/install_packages.sh"
    script.chmod(script.stat().st_mode & ~stat.S_IXUSR & ~stat.S_IXGRP & ~stat.S_IXOTH)
    assert tags(copy)["predict"] != before["predict"]


def test_caches_and_dates_do_not_count(copy):
    before = tags(copy)
    cache = copy / "src/trainer/__pycache__"
    cache.mkdir()
    (cache / "model.pyc").write_bytes(b"x")
    os.utime(copy / "src/trainer/model.py", (0, 0))
    assert tags(copy) == before


def test_another_torch_or_platform_is_another_training_image(copy, monkeypatch):
    before = tags(copy)
    monkeypatch.setenv("TORCH", "cu130")
    with_gpu = tags(copy)
    assert {name for name in before if with_gpu[name] != before[name]} == {"train"}
    monkeypatch.delenv("TORCH")
    monkeypatch.setenv("DOCKER_DEFAULT_PLATFORM", "linux/s390x")
    assert not set(tags(copy).values()) & set(before.values())


def test_a_listed_file_that_is_not_there_is_told(copy):
    (copy / "requirements/train.txt").unlink()
    with pytest.raises(
        UserError,
        match=r"train_container/Dockerfile\.dockerignore: requirements/train\.txt not found",
    ):
        tags(copy)


def test_an_unknown_container_is_told_with_those_that_are_there():
    with pytest.raises(
        UserError,
        match=r"unknown container trian; expected: deploy, kfp_compile, kfp_run, predict, train, ",
    ):
        containers.find(ROOT, ["train", "trian"])


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        (
            "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is it running?",
            "start Docker Desktop",
        ),
        ("dial unix /var/run/docker.sock: connect: permission denied", "usermod -aG docker"),
        ("write /var/lib/docker/tmp/x: no space left on device", "docker system prune"),
        ("the --mount option requires BuildKit.", "buildx plugin"),
        (
            "denied: Permission denied for repository",
            "gcloud auth configure-docker europe-docker.pkg.dev",
        ),
        (
            "dial tcp 127.0.0.1:5000: connect: connection refused",
            "no response from the registry europe-docker.pkg.dev",
        ),
        (
            "python:3.11-slim: failed to resolve source metadata for docker.io/library/python:3.11-slim",
            "mirrors.base_images",
        ),
        ("#5 ERROR: process did not complete: exit code 1", "docker failed: #5 ERROR"),
    ],
)
def test_what_docker_says_becomes_one_line_that_helps(said, advice):
    told = containers.explain(said, "europe-docker.pkg.dev")
    assert advice in told
    assert "\n" not in told


def test_without_docker_the_way_around_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="RUNNER=local"):
        containers.docker("info")


def test_where_packages_come_from_is_handed_over_as_secrets(own_root, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", "https://user:pass word@example.com/simple")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with containers.secrets(load_settings("cloud.mirrors.certificates=README.md")) as options:
        text = Path(options[1].split("src=")[1]).read_text()
        assert options[2:] == ["--secret", f"id=certificates,src={own_root / 'README.md'}"]
        assert "pass" not in " ".join(options)
    assert text.splitlines() == [
        "export PIP_INDEX_URL='https://user:pass word@example.com/simple'",
        "export UV_DEFAULT_INDEX='https://user:pass word@example.com/simple'",
    ]
    assert not Path(options[1].split("src=")[1]).exists()


def test_images_go_to_the_registry_of_the_settings_or_of_the_cloud():
    project = "cloud.environments.dev.project=my-project"
    assert (
        containers.push_registry(load_settings(f"containers.registry=localhost:5000/x {project}"))
        == "localhost:5000/x"
    )
    assert containers.push_registry(load_settings(project)).endswith(
        f"-docker.pkg.dev/my-project/{load_settings('').name}"
    )
    with pytest.raises(UserError, match=r"--push: no registry\. Set containers\.registry"):
        containers.push_registry(load_settings(""))


def test_certificates_that_are_not_there_are_told_by_their_setting():
    settings = load_settings("cloud.mirrors.certificates=nowhere.pem")
    with (
        pytest.raises(UserError, match=r"cloud\.mirrors\.certificates .*nowhere\.pem"),
        containers.secrets(settings),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "registry"),
    [
        ("python:3.11-slim", "docker.io"),
        ("library/python:3.11-slim", "docker.io"),
        ("localhost/python:3", "localhost"),
        ("localhost:5000/a/b:3", "localhost:5000"),
        ("europe-docker.pkg.dev/p/r/train:1", "europe-docker.pkg.dev"),
    ],
)
def test_the_registry_in_an_images_name(name, registry):
    assert containers.registry_of(name) == registry


@pytest.mark.parametrize(
    "name", ["user/train:1", "docker.io/user/train:1", "docker.io/library/user/train:1"]
)
def test_a_digest_is_found_as_docker_writes_it(name, monkeypatch):
    monkeypatch.setattr(
        containers, "docker", lambda *_: "user/train@sha256:abc\nuser/other@sha256:def\n"
    )
    assert containers.digest_of(name) == "sha256:abc"
    with pytest.raises(UserError, match="no digest"):
        containers.digest_of("user/missing:1")


# ── run_parallel ────────────────────────────────────────────────────────────────────────────────
def fail(message):
    """Raise."""
    raise UserError(message)


def test_run_parallel_returns_results_in_the_order_of_their_names():
    barrier, told = threading.Barrier(3, timeout=30), []

    def call(number):
        barrier.wait()  # breaks where one waits for another
        time.sleep((3 - number) * 0.01)
        return number

    made = containers.run_parallel(
        {name: lambda number=number: call(number) for number, name in enumerate("cab")}, told.append
    )
    assert made == {"c": 0, "a": 1, "b": 2}
    assert told == [0, 1, 2]


def test_every_failure_is_reported_and_the_others_finish():
    done = []
    work = {
        "a": lambda: fail("no Docker"),
        "b": lambda: 2,
        "c": lambda: fail("no Docker"),
        "d": lambda: fail("no space"),
    }
    with pytest.raises(UserError) as told:
        containers.run_parallel(work, done.append)
    assert str(told.value) == "a, c: no Docker\n       d: no space"
    assert done == [2]


def test_another_exception_passes_through_when_the_others_have_ended():
    ended, done = threading.Event(), threading.Event()

    def last():
        ended.wait(30)
        done.set()

    def broken():
        ended.set()
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError, match="a mistake of ours"):
        containers.run_parallel({"broken": broken, "last": last})
    assert done.is_set()


def test_run_parallel_of_nothing():
    assert containers.run_parallel({}) == {}
