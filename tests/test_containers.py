"""The containers, with a real engine: built, run as their READMEs say, asked, stopped, killed and pushed."""

import dataclasses
import http.client
import http.server
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
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from core import manifest
from core.errors import UserError
from level_1_pipeline import containers
from level_2_cicd import sbom
from level_2_cicd.rehearsal.storage import FakeStorage
from packaging.requirements import Requirement
from trainer.data import find_csv, prepare
from trainer.distributed import load_checkpoint

pytestmark = pytest.mark.heavy

NAMES = ["deploy", "kfp_compile", "kfp_run", "predict", "train", "trigger_function", "vertex_train"]
BASE = "python:3.11-slim"
REMOTE = "https://git.example.com/team/digits.git"
MEGABYTE = 1_000_000
ANY_USER = ("--user", "12345:12345", "--read-only", "--tmpfs", "/tmp")
Done = subprocess.CompletedProcess[str]


def run(*command: object, **options: object) -> Done:
    """Run a command; whoever called looks at how it ended."""
    words = [str(word) for word in command]
    done: Done = subprocess.run(words, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    return done


def engine(*arguments: object) -> str:
    """What a docker command that must succeed writes."""
    done = run("docker", *arguments)
    assert done.returncode == 0, f"docker {arguments}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def inspect(what: str, field: str) -> object:
    """One field of an image or a container."""
    return json.loads(engine("inspect", "--format", f"{{{{json {field}}}}}", what))


def eventually(holds: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something holds."""
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, "this never came about"
        time.sleep(0.05)


def one_line(done: Done) -> str:
    """The line with which a person's mistake, or the world's, is told."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@dataclasses.dataclass(frozen=True)
class Project:
    """A generated project whose images nobody else has."""

    folder: Path

    def environment(self, **variables: str) -> dict[str, str]:
        """The project's code in this environment."""
        return {
            **os.environ,
            "PYTHONPATH": f"{self.folder / 'src'}:{self.folder}",
            **variables,
        }

    def build(self, *arguments: str, **variables: str) -> Done:
        """Run level_1_pipeline.containers."""
        command = [sys.executable, "-m", "level_1_pipeline.containers", *arguments]
        return run(*command, cwd=self.folder, env=self.environment(**variables))

    def built(self, *arguments: str, **variables: str) -> str:
        """The output of a build that succeeds."""
        done = self.build(*arguments, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def images(self) -> dict[str, str]:
        """The images on this machine: name and tag → ID."""
        listed = engine("image", "ls", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}")
        lines = [line.split() for line in listed.splitlines()]
        return {name: number for name, number in lines if name.startswith(f"{self.folder.name}/")}

    def image(self, name: str) -> str:
        """The image's present name."""
        return self.built("--print", name).strip()

    def copy(self, name: str, target: Path) -> "Project":
        """Another project of the same files, under another name."""
        ignored = shutil.ignore_patterns(
            "__pycache__", ".venv", "data", "runs", "scratch", "registry", "build"
        )
        folder = shutil.copytree(self.folder, target / name, ignore=ignored)
        settings = folder / "project.yaml"
        before = settings.read_text(encoding="utf-8")
        settings.write_text(before.replace(self.folder.name, name), encoding="utf-8")
        return Project(folder)

    def set(self, before: str, after: str) -> None:
        """Change project.yaml."""
        path = self.folder / "project.yaml"
        text = path.read_text(encoding="utf-8")
        assert before in text
        path.write_text(text.replace(before, after), encoding="utf-8")


@pytest.fixture(scope="module")
def slug(docker: str) -> Iterator[str]:
    """A name of which this machine has no image; what was made under it is removed afterwards."""
    name = f"test-{os.getpid()}"
    yield name
    listed = engine("image", "ls", "--format", "{{.Repository}}:{{.Tag}}").splitlines()
    own = [image for image in listed if name in image]
    if own:
        engine("image", "rm", "--force", *own)


@pytest.fixture(scope="module")
def project(
    slug: str, generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Project:
    """A project from the default answers, with its data; no image is built yet."""
    folder = generate(tmp_path_factory.mktemp("containers"), project_slug=slug)
    find_csv("sample:digits", folder / "data")
    (folder / ".venv").symlink_to(sys.prefix)  # the READMEs call .venv/bin/python
    for command in ("init --quiet", f"remote add origin {REMOTE.replace('://', '://ada:secret@')}"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    for path in (folder / "src").rglob("*"):  # a careful person's files are nobody else's
        path.chmod(path.stat().st_mode & 0o700)
    return Project(folder)


@pytest.fixture(scope="module")
def first_build(project: Project) -> str:
    """What the first build of all containers writes."""
    assert project.images() == {}
    return project.built()


@pytest.fixture(scope="module")
def images(project: Project, first_build: str) -> dict[str, str]:
    """Container → its image."""
    return {name: project.image(name) for name in NAMES}


# ── building ────────────────────────────────────────────────────────────────────────────────────────────
def test_all_are_built_and_a_second_time_none(project: Project, first_build: str) -> None:
    before = project.images()
    assert sorted(re.findall(r"^✓ (\w+) .* s +(\S+)", first_build, re.MULTILINE)) == [
        (name, project.image(name)) for name in NAMES
    ]
    assert sorted(before) == [project.image(name) for name in NAMES]
    again = project.built()
    assert re.findall(r"^= (\w+) +unchanged", again, re.MULTILINE) == NAMES
    assert "building" not in again
    assert project.images() == before


def test_a_change_of_the_trainer_builds_its_image_alone_and_installs_nothing(
    project: Project, first_build: str
) -> None:
    before = project.images()
    module = project.folder / "src" / "trainer" / "model.py"
    text = module.read_text(encoding="utf-8")
    module.write_text(text + "# changed\n", encoding="utf-8")
    try:
        told = project.built()
        new = set(project.images()) - set(before)
        assert new == {project.image("train")}
    finally:
        module.write_text(text, encoding="utf-8")
    assert re.findall(r"^([=✓]) (\w+)", told, re.MULTILINE) == [
        ("✓" if name == "train" else "=", name) for name in NAMES
    ]
    log = (project.folder / "build" / "containers" / "train.log").read_text(encoding="utf-8")
    install = re.search(r"^#(\d+) .*install_packages\.sh", log, re.MULTILINE)
    assert install
    assert f"#{install[1]} CACHED" in log
    engine("image", "rm", *new)


def test_named_ones_are_built_alone_and_an_unknown_name_builds_nothing(
    project: Project, first_build: str
) -> None:
    before = project.images()
    module = project.folder / "src" / "core" / "errors.py"
    text = module.read_text(encoding="utf-8")
    module.write_text(text + "# changed\n", encoding="utf-8")  # it goes into all
    try:
        assert f"expected: {', '.join(NAMES)}." in one_line(project.build("deploy", "trian"))
        printed = project.built("--print").split()
        assert project.images() == before
        project.built("deploy")
        new = set(project.images()) - set(before)
        assert new == {project.image("deploy")}
        assert new < set(printed)
    finally:
        module.write_text(text, encoding="utf-8")
    assert len(printed) == len(NAMES)
    assert project.built("--print").split() == [project.image(name) for name in NAMES]
    engine("image", "rm", *new)


@pytest.mark.parametrize("name", NAMES)
def test_docker_sends_just_the_files_that_the_tag_is_made_of(
    project: Project, name: str, tmp_path: Path
) -> None:
    strays = [
        "src/trainer/__pycache__/x.pyc",
        "src/core/__pycache__/x.pyc",
        ".env",
        "registry/1/model.onnx",
    ]
    copy = project.copy("sent", tmp_path)
    for stray in strays:
        (copy.folder / stray).parent.mkdir(parents=True, exist_ok=True)
        (copy.folder / stray).write_text("secret")
    container = containers.find(copy.folder, [name])[0]
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("FROM scratch\nCOPY . .\n")
    shutil.copy(copy.folder / f"{container.dockerfile}.dockerignore", f"{dockerfile}.dockerignore")
    command = ["docker", "build", "--file", dockerfile, "--output", tmp_path / "out", copy.folder]
    done = run(*command, env={**os.environ, "DOCKER_BUILDKIT": "1"})
    assert done.returncode == 0, done.stderr
    sent = [
        path.relative_to(tmp_path / "out")
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    ]
    assert sorted(sent) == container.inputs()
    for path in sent:
        assert (tmp_path / "out" / path).read_bytes() == (copy.folder / path).read_bytes()


# ── what is in an image ─────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", NAMES)
def test_an_image_runs_under_any_user_and_says_what_it_is(
    images: dict[str, str], slug: str, name: str
) -> None:
    image = images[name]
    user = str(inspect(image, ".Config.User"))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert (
        inspect(image, ".Config.Entrypoint") is None
    )  # it would swallow a pipeline step's command
    labels = inspect(image, ".Config.Labels")
    assert isinstance(labels, dict)
    own = {
        key.removeprefix("org.opencontainers.image."): value
        for key, value in labels.items()
        if key.startswith("org.opencontainers.image.")
    }
    assert own["title"] == f"{slug}/{name}"
    assert own["source"] == REMOTE  # without the password
    assert own["revision"]
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", own["created"])
    done = run("docker", "run", "--rm", *ANY_USER, image)
    if name == "predict":
        assert "AIP_STORAGE_URI" in one_line(done)
    elif name == "trigger_function":
        assert done.returncode == 1
        assert done.stderr.startswith(
            "error: invalid environment variables of the function:\n  PROJECT="
        )
    else:
        assert done.returncode == 0, done.stderr
        assert "usage: python -m" in done.stdout


def test_the_predictor_is_small_and_holds_nothing_to_train_with(images: dict[str, str]) -> None:
    packages = ["torch", "trainer", "kfp", "gcp", "predictor", "onnxruntime", "level_1_pipeline"]
    packages += ["level_2_cicd"]
    code = f"from importlib.util import find_spec; print(*[n for n in {packages} if find_spec(n)])"
    held = {
        name: engine("run", "--rm", image, "python", "-c", code) for name, image in images.items()
    }
    assert held == {
        "predict": "gcp predictor onnxruntime",  # of gcp the storage client only
        "deploy": "kfp gcp level_1_pipeline",
        "train": "torch trainer kfp onnxruntime",
        "vertex_train": "trainer kfp gcp level_2_cicd",  # of the trainer its hyperparameters only
        "kfp_compile": "trainer kfp gcp level_1_pipeline level_2_cicd",
        "kfp_run": "gcp level_2_cicd",
        "trigger_function": "trainer gcp level_2_cicd",
    }
    size, base = (int(str(inspect(image, ".Size"))) for image in (images["predict"], BASE))
    assert 50 * MEGABYTE < size - base <= 220 * MEGABYTE


@pytest.mark.parametrize(
    ("name", "locks"), [("predict", ["predict"]), ("train", ["train", "kfp", "torch"])]
)
def test_the_list_of_what_an_image_holds_is_what_its_locks_say(
    project: Project, images: dict[str, str], name: str, locks: list[str]
) -> None:
    text = "".join(
        (project.folder / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")
        for lock in locks
    )
    wanted = [Requirement(line.rstrip(" \\")) for line in re.findall(r"^\w.*$", text, re.MULTILINE)]
    here = {
        (one.name, str(one.specifier))
        for one in wanted
        if one.marker is None or one.marker.evaluate()
    }
    held = sbom.list_packages(images[name])
    python = [one for one in held if one.type == "pypi"]
    found = {
        (re.sub(r"[-_.]+", "-", one.name).lower(), f"=={one.version.partition('+')[0]}")
        for one in python
    }
    assert found == here
    assert {"libc6", "dpkg"} <= {one.name for one in held if one.type == "deb"}


class EmptyIndex(http.server.BaseHTTPRequestHandler):
    """A Python index that holds nothing, and notes who asks."""

    asked: list[str]

    def do_GET(self) -> None:
        """There is no such package."""
        self.asked.append(self.headers.get("Authorization") or "")
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Be silent."""


@contextmanager
def empty_index(asked: list[str]) -> Iterator[int]:
    """Such an index on a free port."""
    handler = type("Handler", (EmptyIndex,), {"asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_a_password_of_the_python_index_is_used_and_nowhere_kept(
    project: Project, tmp_path: Path
) -> None:
    password = "hunter2-hunter2"
    copy = project.copy(f"{project.folder.name}-index", tmp_path)
    script = copy.folder / "level_1_pipeline" / "install_packages.sh"
    # An unchanged step would be taken from the cache, and the password never be used.
    script.write_text(f"{script.read_text()}# {copy.folder}\n")
    asked: list[str] = []
    with empty_index(asked) as port:
        index = f"http://somebody:{password}@127.0.0.1:{port}/simple"
        more = f"{os.environ.get('PIP_EXTRA_INDEX_URL', '')} {index}".strip()
        copy.built("deploy", PIP_EXTRA_INDEX_URL=more, BUILD_NETWORK="host")
    assert any(header.startswith("Basic ") for header in asked)
    image = copy.image("deploy")
    assert password not in engine("history", "--no-trunc", image) + engine("inspect", image)
    assert password not in (copy.folder / "build" / "containers" / "deploy.log").read_text()
    search = ["grep", "-r", "-l", "-e", password, "/", "--exclude-dir=proc", "--exclude-dir=sys"]
    found = run("docker", "run", "--rm", "--user", "0:0", image, *search)
    assert (found.returncode, found.stdout) == (1, "")  # grep found nothing
    positive = run(
        "docker",
        "run",
        "--rm",
        "--user",
        "0:0",
        image,
        *search[:4],
        "hunter2|^import",
        "-E",
        "/app",
    )
    assert "/app/gcp/deployment.py" in positive.stdout  # it can find something


# ── by hand, as the READMEs say ─────────────────────────────────────────────────────────────────────────
def readme_block(project: Project, name: str, number: int = 0) -> str:
    """A block of commands in a container's README."""
    readme = project.folder / "level_1_pipeline" / f"{name}_container" / "README.md"
    found: list[str] = re.findall(
        r"^```bash\n(.*?)^```", readme.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    return found[number]


def bash(project: Project, commands: str) -> Done:
    """Run commands of a README in the project's folder; the first that fails ends them."""
    return run(
        "bash", "-euo", "pipefail", "-c", commands, cwd=project.folder, env=project.environment()
    )


@pytest.fixture(scope="module")
def by_hand(project: Project, images: dict[str, str]) -> Done:
    """train_container/README.md's commands, as they stand there."""
    return bash(project, readme_block(project, "train"))


@pytest.fixture(scope="module")
def model(project: Project, by_hand: Done) -> Path:
    """The model that they made, as a run's."""
    assert by_hand.returncode == 0, by_hand.stdout + by_hand.stderr
    folder = project.folder / "runs" / "by-hand"
    folder.mkdir(parents=True)
    shutil.copytree(project.folder / "scratch" / "model", folder / "model")
    shutil.copy(project.folder / "scratch" / "evaluation.json", folder)
    return folder / "model"


def test_a_model_is_trained_by_hand_as_the_readme_says(project: Project, by_hand: Done) -> None:
    assert by_hand.returncode == 0, by_hand.stdout + by_hand.stderr
    scores = json.loads((project.folder / "scratch" / "evaluation.json").read_text())
    assert scores["accuracy"] > 0.95
    made = {path: path.stat().st_uid for path in (project.folder / "scratch").rglob("*")}
    assert set(made.values()) == {os.getuid()}
    assert {path.name for path in made} >= {
        "train.parquet",
        "test.parquet",
        "model.json",
        "model.onnx",
    }


def test_a_model_is_registered_by_hand_as_the_readme_says(project: Project, model: Path) -> None:
    commands = readme_block(project, "deploy")
    for version in (1, 2):
        done = bash(project, commands)
        assert done.returncode == 0, done.stdout + done.stderr
        champion = json.loads((project.folder / "registry" / "champion.json").read_text())
        assert champion["version"] == version


# ── the predictor ───────────────────────────────────────────────────────────────────────────────────────
def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def started(image: str, *options: object, command: tuple[object, ...] = ()) -> Iterator[str]:
    """A container in the background; it is removed afterwards, however it ended."""
    container = engine("run", "--detach", *options, image, *command)
    try:
        yield container
    finally:
        run("docker", "rm", "--force", "--volumes", container)


def output(container: str) -> str:
    """All that a container has written."""
    done = run("docker", "logs", container)
    return done.stdout + done.stderr


def serving(model: Path, *options: object) -> tuple[object, ...]:
    """Options with which the predictor's image serves a model."""
    return (*options, "--volume", f"{model}:/model:ro", "--env", "AIP_STORAGE_URI=/model")


def test_the_predictor_fetches_its_model_from_a_bucket(
    images: dict[str, str], model: Path, tmp_path: Path
) -> None:
    saved = shutil.copytree(model, tmp_path / "cloud" / "models" / "1" / "model")
    with FakeStorage(tmp_path / "cloud") as bucket:
        told = {
            "STORAGE_EMULATOR_HOST": bucket.address,
            "AIP_STORAGE_URI": "gs://models/1/model/",
            "AIP_HTTP_PORT": str(free_port()),
        }
        options = [
            *ANY_USER,
            "--network",
            "host",
            *(word for pair in told.items() for word in ("--env", "=".join(pair))),
        ]
        bucket.fail("objects.get", after=1)  # one answer is lost
        with started(images["predict"], *options) as container:
            eventually(lambda: "serving a model at" in output(container))
            answer = urllib.request.urlopen(
                f"http://127.0.0.1:{told['AIP_HTTP_PORT']}/health", timeout=30
            )
            assert json.load(answer)["manifest_sha256"] == manifest.sha256(model / manifest.NAME)
        (saved / "model.onnx").write_bytes(b"half")
        assert "damaged: model.onnx has 4 bytes" in one_line(
            run("docker", "run", "--rm", *options, images["predict"])
        )


def test_the_predictor_answers_as_the_readme_says(project: Project, model: Path) -> None:
    port = free_port()
    local = {
        "127.0.0.1:8080:": f"127.0.0.1:{port}:",
        "localhost:8080": f"localhost:{port}",
    }

    def here(commands: str) -> str:
        for before, after in local.items():
            commands = commands.replace(before, after)
        return commands

    server = subprocess.Popen(
        ["bash", "-euc", here(readme_block(project, "predict"))],
        cwd=project.folder,
        env=project.environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stderr
    try:
        line = server.stderr.readline()
        assert line.startswith("serving a model at "), line
        done = bash(project, here(readme_block(project, "predict", 1)))
        assert done.returncode == 0, done.stderr
        health, description = map(json.loads, done.stdout.splitlines())
        assert health["status"] == "ok"
        assert set(description["paths"]) == {"/health", "/predict"}
        answer = bash(
            project, here(line.partition("try: ")[2])
        )  # the line that the server itself proposes
        assert answer.returncode == 0, answer.stderr
        assert len(json.loads(answer.stdout)["predictions"]) == 1
    finally:
        os.killpg(server.pid, signal.SIGINT)  # Ctrl-C
        rest = server.communicate(timeout=30)[1]
    assert (server.returncode, rest) == (0, "")


def test_the_predictor_becomes_healthy_under_any_user_and_ends_well(
    images: dict[str, str], model: Path
) -> None:
    with started(images["predict"], *serving(model, *ANY_USER)) as container:
        eventually(lambda: inspect(container, ".State.Health.Status") == "healthy")
        engine("kill", "--signal", "TERM", container)
        assert engine("wait", container) == "0"
        assert output(container).count("\n") == 1  # its greeting


def test_a_predictor_whose_routes_are_others_is_healthy_too(
    images: dict[str, str], model: Path
) -> None:
    # A company's laptop hands its proxy to every container.
    proxy = ["--env", "http_proxy=http://127.0.0.1:9"]
    others = ["--env", "AIP_HEALTH_ROUTE=/up", "--env", "AIP_HTTP_PORT=9000", *proxy]
    with started(images["predict"], *serving(model, *others)) as container:
        eventually(lambda: inspect(container, ".State.Health.Status") == "healthy")


def damage(model: Path, how: str) -> None:
    """Spoil a saved model."""
    graph = model / "model.onnx"
    content = bytearray(graph.read_bytes())
    if how == "missing":
        shutil.rmtree(model)
        model.mkdir()
    elif how == "truncated":
        graph.write_bytes(content[: len(content) // 2])
    elif how == "tampered":
        content[len(content) // 2] ^= 1  # one bit
        graph.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no saved model"),
        ("truncated", "model.onnx has"),
        ("tampered", "model.onnx was changed after it was saved"),
    ],
)
def test_a_predictor_with_a_spoilt_model_says_so_and_does_not_listen(
    images: dict[str, str], model: Path, tmp_path: Path, how: str, message: str
) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    damage(copy, how)
    done = run("docker", "run", "--rm", *serving(copy, *ANY_USER), images["predict"])
    assert message in one_line(done)
    assert "serving" not in done.stdout + done.stderr


class Asking:
    """Clients that ask one question after another, and what became of them."""

    def __init__(self, host: str, port: int, body: str) -> None:
        self.host, self.port, self.body = host, port, body
        self.answered = 0
        self.dropped: list[str] = []

    def client(self, connections: str) -> None:
        """Ask until no new connection is taken; note every failed or incomplete response.

        Args:
            connections: keep-alive: one connection while the server keeps it; or close: a new one each time.
        """
        while True:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
            try:
                connection.connect()
            except OSError:
                return  # refused: nothing was sent
            try:
                self.ask(connection, {"Connection": connections})
            finally:
                connection.close()

    def ask(self, connection: http.client.HTTPConnection, headers: dict[str, str]) -> None:
        """Ask over one connection until the server closes it."""
        while True:
            try:
                connection.request("POST", "/predict", self.body, headers)
                answer = connection.getresponse()
                json.loads(answer.read())["predictions"]
            except ConnectionError:
                return  # closed before any response: HTTP clients send the request again
            except (OSError, http.client.HTTPException, KeyError, ValueError) as error:
                self.dropped.append(repr(error))
                return
            self.answered += 1
            if answer.will_close:
                return


def test_a_predictor_that_is_stopped_under_load_cuts_no_response(
    images: dict[str, str], model: Path
) -> None:
    with started(images["predict"], *serving(model)) as container:
        eventually(lambda: "try: " in output(container))
        body = re.search(r"-d '(.*)'", output(container))
        assert body
        # Straight to the container: Docker's own proxy takes connections that nobody then answers.
        host = str(inspect(container, ".NetworkSettings.IPAddress"))
        asking = Asking(host, 8080, body[1])
        with ThreadPoolExecutor(32) as pool:
            clients = [pool.submit(asking.client, how) for how in ("keep-alive", "close") * 16]
            eventually(lambda: asking.answered > 1000)
            engine("kill", "--signal", "TERM", container)
            assert engine("wait", container) == "0"
        for client in clients:
            client.result()
        assert asking.dropped == []
        assert output(container).count("\n") == 1


# ── training that is interrupted ────────────────────────────────────────────────────────────────────────
EPOCHS = 60


@pytest.fixture(scope="module")
def work(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows to train on."""
    folder = tmp_path_factory.mktemp("work")
    csv = project.folder / "data" / "digits.csv"
    prepare(csv, "digit", folder / "train.parquet", folder / "test.parquet")
    return folder


def training(work: Path, name: str, epochs: int, *more: object) -> dict[str, tuple[object, ...]]:
    """Options and command of a container that trains into a folder of that name, with checkpoints."""
    hyperparameters = {
        "seed": 0,
        "threads": 1,
        "epochs": epochs,
        "batch_size": 128,
        "learning_rate": 0.003,
    }
    options = json.dumps({**hyperparameters, "patience": epochs})
    folders = ["--model-dir", f"{name}/model", "--checkpoint-dir", f"{name}/checkpoints"]
    command = [
        "python",
        "-m",
        "trainer.train",
        "--train",
        "train.parquet",
        *folders,
        "--hyperparameters",
        options,
    ]
    user = f"{os.getuid()}:{os.getgid()}"
    mounted = ["--volume", f"{work}:/work", "--workdir", "/work"]
    return {
        "options": ("--user", user, "--read-only", "--tmpfs", "/tmp", *mounted, *more),
        "command": tuple(command),
    }


def epochs_done(checkpoints: Path) -> int:
    """How far the checkpoint is."""
    saved = load_checkpoint(checkpoints)
    return len(saved[1]["history"]) if saved else 0


def train_to_the_end(image: str, work: Path, name: str) -> str:
    """Train until it is done; returns what it wrote."""
    how = training(work, name, EPOCHS)
    return engine("run", "--rm", *how["options"], image, *how["command"])


def test_a_training_killed_ten_times_ends_with_the_weights_of_an_undisturbed_one(
    images: dict[str, str], work: Path
) -> None:
    train_to_the_end(images["train"], work, "undisturbed")
    chance = random.Random(0)
    # Just started, eight times on the way, and while the model is saved.
    moments = [0, *sorted(chance.sample(range(1, EPOCHS), 8)), EPOCHS]
    checkpoints, model = work / "killed" / "checkpoints", work / "killed" / "model"
    how = training(work, "killed", EPOCHS)
    for moment in moments:
        before = epochs_done(checkpoints)
        with started(images["train"], *how["options"], command=how["command"]) as container:
            eventually(lambda until=moment: epochs_done(checkpoints) >= until)
            time.sleep(chance.random() * 0.3)
            engine("kill", "--signal", "KILL", container)
            assert engine("wait", container) == "137"
            assert (
                before == 0
                or moment <= before
                or f"Resuming after epoch {before} " in output(container)
            )
        with pytest.raises(UserError):  # what is half-written is no model
            manifest.read(model if model.is_dir() else work)
    assert "Resuming after epoch 60" in train_to_the_end(images["train"], work, "killed")
    weights = [work / name / "model" / "model.safetensors" for name in ("undisturbed", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    manifest.read(model)


def test_a_training_that_is_stopped_ends_by_itself_and_says_how_to_go_on(
    images: dict[str, str], work: Path
) -> None:
    how = training(work, "stopped", 100_000)
    checkpoints = work / "stopped" / "checkpoints"
    for beginning in ("", "Resuming after epoch "):
        before = epochs_done(checkpoints)
        with started(images["train"], *how["options"], command=how["command"]) as container:
            eventually(lambda limit=before: epochs_done(checkpoints) > limit)
            engine("stop", "--time", "60", container)
            assert engine("wait", container) == "143"  # 137 if it had to be killed
            last = output(container).splitlines()
        assert any(line.startswith(beginning) for line in last)
        advice = "a checkpoint is in stopped/checkpoints: the same command goes on from there."
        assert f"stopped by SIGTERM; {advice}" in last
        assert not any("Traceback" in line for line in last)


def test_a_training_on_two_machines_is_stopped_too(
    images: dict[str, str], work: Path, slug: str
) -> None:
    engine("network", "create", slug)
    cluster = {"workerpool0": ["node0:29500"], "workerpool1": ["node1:29500"]}
    try:
        with (
            node(images["train"], work, slug, cluster, 0) as first,
            node(images["train"], work, slug, cluster, 1) as second,
        ):
            eventually(lambda: epochs_done(work / "cluster" / "checkpoints") > 0, 120)
            engine("stop", "--time", "60", first, second)
            assert "137" not in engine("wait", first, second).split()
            assert "stopped by SIGTERM; a checkpoint is in" in output(first)
    finally:
        engine("network", "rm", slug)


@contextmanager
def node(
    image: str, work: Path, network: str, cluster: dict[str, list[str]], index: int
) -> Iterator[str]:
    """One of the machines that train together, as the cloud announces them."""
    spec = json.dumps({"cluster": cluster, "task": {"type": f"workerpool{index}", "index": 0}})
    there = ["--network", network, "--hostname", f"node{index}", "--network-alias", f"node{index}"]
    how = training(work, "cluster", 100_000, *there, "--env", f"CLUSTER_SPEC={spec}")
    with started(image, *how["options"], command=how["command"]) as container:
        yield container


# ── registries ──────────────────────────────────────────────────────────────────────────────────────────
@contextmanager
def registry(folder: Path, **more: object) -> Iterator[str]:
    """A registry of images on a free port of this machine; its address."""
    if not shutil.which("docker-registry"):
        (pytest.fail if os.environ.get("REQUIRE_DOCKER") else pytest.skip)(
            "this test needs docker-registry"
        )
    address = f"127.0.0.1:{free_port()}"
    options = {"storage": {"filesystem": {"rootdirectory": str(folder)}}, "http": {"addr": address}}
    config = folder / "config.yml"
    config.write_text(
        json.dumps({"version": 0.1, "log": {"level": "error"}, **options, **more})
    )  # JSON is YAML too
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    try:
        host, port = address.split(":")
        eventually(lambda: takes_connections(host, int(port)))
        yield address
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder)  # half a gigabyte


def takes_connections(host: str, port: int) -> bool:
    """Whether somebody listens."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def open_registry(docker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that everybody may use."""
    with registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


def test_push_sends_all_and_prints_digests_that_can_be_pulled(
    project: Project, images: dict[str, str], open_registry: str
) -> None:
    prefix = f"{open_registry}/{project.folder.name}"
    project.set('registry: ""', f'registry: "{prefix}"')
    try:
        pushed = re.findall(r"^↑ (\w+) +pushed +(\S+)", project.built("--push"), re.MULTILINE)
        again = re.findall(r"^↑ (\w+) +pushed +(\S+)", project.built("--push"), re.MULTILINE)
    finally:
        project.set(f'registry: "{prefix}"', 'registry: ""')
    assert [name for name, _ in pushed] == NAMES
    assert again == pushed
    for name, digest in pushed:
        assert re.fullmatch(rf"{prefix}/{name}@sha256:[0-9a-f]{{64}}", digest)
        log = (project.folder / "build" / "containers" / f"{name}.push.log").read_text()
        assert "Layer already exists" in log
        assert ": Pushed" not in log
        tag = images[name].rpartition(":")[2]
        engine("image", "rm", f"{prefix}/{name}:{tag}")
        engine("pull", "--quiet", digest)
        assert inspect(digest, ".Id") == inspect(images[name], ".Id")
        engine("image", "rm", digest)


def test_the_base_image_is_pinned_to_the_mirrors_and_built_upon(
    project: Project, open_registry: str, tmp_path: Path
) -> None:
    mirrored = f"{open_registry}/{BASE}"
    engine("tag", BASE, mirrored)
    engine("push", "--quiet", mirrored)
    engine("image", "rm", mirrored)
    copy = project.copy(f"{project.folder.name}-mirror", tmp_path)
    copy.set("mirrors: {}", f'mirrors: {{base_images: "{open_registry}"}}')
    told = copy.built("deploy", "--pin-base")
    pinned = (copy.folder / "level_1_pipeline" / "base_image.txt").read_text().strip()
    assert re.fullmatch(rf"{BASE}@sha256:[0-9a-f]{{64}}", pinned)
    assert f"base image: {pinned}" in told
    log = (copy.folder / "build" / "containers" / "deploy.log").read_text()
    assert f"FROM {open_registry}/{pinned}" in log
    image = copy.image("deploy")
    assert "usage: python -m level_1_pipeline.deploy_container.main" in engine("run", "--rm", image)
    assert copy.built("deploy", "--pin-base").splitlines()[-1].startswith("= deploy")
    engine("image", "rm", image, mirrored)


def test_a_registry_that_does_not_answer_or_refuses_is_told_in_one_line(
    project: Project, first_build: str, tmp_path: Path
) -> None:
    dead = f"127.0.0.1:{free_port()}"
    folder = tmp_path / "registry"
    folder.mkdir()
    nobody = folder / "htpasswd"
    nobody.write_text("")
    with registry(folder, auth={"htpasswd": {"realm": "here", "path": str(nobody)}}) as refusing:
        for address, message in (
            (dead, f"no response from the registry {dead}"),
            (refusing, "the registry denied access"),
        ):
            project.set('registry: ""', f'registry: "{address}/{project.folder.name}"')
            try:
                assert message in one_line(project.build("deploy", "--push"))
            finally:
                project.set(f'registry: "{address}/{project.folder.name}"', 'registry: ""')
    assert "Set containers.registry" in one_line(project.build("--push"))


def test_a_base_image_or_an_index_that_cannot_be_reached_is_told_for_what_it_is(
    project: Project, first_build: str, tmp_path: Path
) -> None:
    dead = f"127.0.0.1:{free_port()}"
    copy = project.copy(f"{project.folder.name}-dead", tmp_path)
    script = copy.folder / "level_1_pipeline" / "install_packages.sh"
    script.write_text(f"{script.read_text()}# {copy.folder}\n")
    told = one_line(
        copy.build(
            "deploy", PIP_INDEX_URL=f"http://{dead}/simple", BUILD_NETWORK="host", PIP_RETRIES="0"
        )
    )
    assert "the Python packages cannot be downloaded" in told
    copy.set("mirrors: {}", f'mirrors: {{base_images: "{dead}"}}')
    assert f"no response from the registry {dead}" in one_line(copy.build("deploy"))


def test_without_docker_one_line_tells_the_way_around(project: Project, tmp_path: Path) -> None:
    assert "Docker is not installed" in one_line(project.build(PATH=str(tmp_path)))
    assert "daemon is not running" in one_line(project.build(DOCKER_HOST="unix:///nowhere.sock"))
