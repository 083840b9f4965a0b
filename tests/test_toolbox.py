"""Build the toolbox and run build steps in it, with real Docker and a real registry.

Its base images are not available everywhere: a mirror has images of the same names with this machine's programs. So the
Dockerfile is tested, the official images are not.
"""

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from level_1_pipeline import containers
from level_2_cicd import builds as images
from level_2_cicd.rehearsal import build_steps, cloud_build
from level_2_cicd.rehearsal.cloud_build import FakeCloudBuild
from level_2_cicd.rehearsal.storage import FakeStorage

from tests.push import edit
from tests.test_containers import registry

pytestmark = pytest.mark.heavy

Done = subprocess.CompletedProcess[str]
MIRROR = "toolbox.test/mirror"
SCRIPT = "level_2_cicd/toolbox/toolbox.sh"
SDK = "usr/lib/google-cloud-sdk"
# Docker queries a plugin's metadata; the local engine builds without the plugin.
BUILDX = """#!/bin/sh
if [ "$1" = docker-cli-plugin-metadata ]; then echo '{"SchemaVersion":"0.1.0","Vendor":"test","Version":"0"}'; fi
"""


def run(*command: object, cwd: Path | None = None, **variables: str) -> Done:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def must(*command: object, cwd: Path | None = None, **variables: str) -> str:
    done = run(*command, cwd=cwd, **variables)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def program(name: str) -> str:
    """Return the path of a program; skip or fail without it."""
    found = shutil.which(name)
    if not found:
        (pytest.fail if os.environ.get("REQUIRE_DOCKER") else pytest.skip)(
            f"this test needs {name}"
        )
    return found


def stand_in(name: str, *options: object) -> None:
    """Create an image of this name from local files."""
    with subprocess.Popen(["tar", *map(str, options)], stdout=subprocess.PIPE) as packed:
        subprocess.run(
            ["docker", "import", "-", f"{MIRROR}/{name}"],
            stdin=packed.stdout,
            check=True,
            capture_output=True,
        )


@pytest.fixture(scope="module")
def project(
    docker: str, generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A project, with the toolbox's base images in the mirror."""
    folder = tmp_path_factory.mktemp("stand-ins")
    gcloud = Path(program("gcloud")).resolve()
    for name in ("docker", "terraform"):
        target = folder / name / {"docker": "usr/local/bin", "terraform": "bin"}[name]
        target.mkdir(parents=True)
        shutil.copy(program(name), target)
    plugin = folder / "docker/usr/local/libexec/docker/cli-plugins/docker-buildx"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(BUILDX)
    plugin.chmod(0o755)
    made = generate(tmp_path_factory.mktemp("project"))
    wanted = dict(
        line[4:].split("=")
        for line in (made / "level_2_cicd/toolbox/Dockerfile").read_text().splitlines()
        if ":" in line and line.startswith("ARG ")
    )
    stand_in(wanted["DOCKER"], "-C", folder / "docker", "-c", ".")
    stand_in(wanted["TERRAFORM"], "-C", folder / "terraform", "-c", ".")
    large = [
        "--exclude=*emulator*",
        "--exclude=anthoscli",
        "--exclude=kuberun",
        "--exclude=__pycache__",
        "--exclude=gsutil",
    ]
    sdk = gcloud.parents[1]
    stand_in(
        wanted["GCLOUD"],
        "-C",
        sdk.parent,
        *large,
        f"--transform=s,^{sdk.name},{SDK},",
        "-c",
        sdk.name,
    )
    base = (made / "level_1_pipeline/base_image.txt").read_text().strip()
    must("docker", "tag", base, f"{MIRROR}/{base}")
    edit(made / "project.yaml", 'dev: {project: ""', 'dev: {project: "my-project"')
    yield made
    names = [f"{MIRROR}/{name}" for name in (*wanted.values(), base) if name]
    run("docker", "rmi", "--force", *names, "toolbox")


@pytest.fixture(scope="module")
def address(docker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A repository in a local registry."""
    with registry(tmp_path_factory.mktemp("registry")) as host:
        repository = f"{host}/demo-{uuid.uuid4().hex[:8]}"
        yield repository
        left = must("docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()
        run(
            "docker",
            "rmi",
            "--force",
            *(name for name in left if name.startswith(f"{repository}/")),
        )


@pytest.fixture(scope="module")
def toolbox(project: Path, address: str) -> str:
    """The toolbox in the registry; its local name is `toolbox`."""
    must("sh", SCRIPT, address, MIRROR, cwd=project)
    return must("sh", SCRIPT, "--name", address, cwd=project).strip()


def test_toolbox_is_built_once_and_then_pulled(project: Path, address: str, toolbox: str) -> None:
    assert images.find_digest(toolbox)
    must("docker", "rmi", "--force", toolbox, "toolbox")
    assert "pulled from the registry" in must("sh", SCRIPT, address, MIRROR, cwd=project)
    assert must("docker", "image", "inspect", "--format", "{{.Id}}", "toolbox") == must(
        "docker", "image", "inspect", "--format", "{{.Id}}", toolbox
    )


def test_pull_request_does_not_push_a_changed_toolbox(
    project: Path, address: str, toolbox: str, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(project, tmp_path / "other"))
    edit(other / "level_2_cicd/toolbox/Dockerfile", "# The image of", "# Changed: the image of")
    name = must("sh", SCRIPT, "--name", address, cwd=other).strip()
    assert name != toolbox
    must("sh", SCRIPT, "--no-push", address, MIRROR, cwd=other)
    assert images.find_digest(name) is None
    must("docker", "tag", toolbox, "toolbox")


def test_other_files_do_not_change_the_tag(
    project: Path, address: str, toolbox: str, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(project, tmp_path / "other"))
    (other / "README.md").write_text("other")
    (other / "src/trainer/model.py").write_text("# other\n")
    assert must("sh", SCRIPT, "--name", address, cwd=other).strip() == toolbox


@pytest.mark.parametrize("words", [["--nmae"], ["--name"]])
def test_invalid_option_is_reported(project: Path, words: list[str]) -> None:
    done = run("sh", SCRIPT, *words, cwd=project)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --n")


def test_toolbox_has_the_programs_of_the_steps(project: Path, toolbox: str) -> None:
    """Its Python has Google's clients and runs the project's files."""
    say = "make --version && git --version && docker --version && terraform version && gcloud --version && make -C /workspace help"
    must("docker", "run", "--rm", f"--volume={project}:/workspace", "toolbox", "sh", "-ec", say)
    asked = [
        "docker",
        "run",
        "--rm",
        f"--volume={project}:/workspace",
        "--env=VENV=/opt/venv",
        "toolbox",
        "make",
    ]
    assert "l4-spot" in must(*asked, "gpu-jobs")
    done = run(*asked, "submit", "DRY_RUN=1")
    assert done.returncode == 2
    assert "COMMIT=1a2b3c" in done.stderr  # there is no git repository


def test_build_steps_build_an_image(
    project: Path, address: str, toolbox: str, tmp_path: Path
) -> None:
    """cloudbuild.container.yaml in containers: its gcloud starts cloudbuild.image.yaml, whose step builds with this engine."""
    workspace = Path(shutil.copytree(project, tmp_path / "workspace"))
    edit(workspace / "project.yaml", 'registry: ""', f'registry: "{address}"')
    variables = {
        name: os.environ[name]
        for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "BUILD_NETWORK")
        if name in os.environ
    }

    def push(name: str) -> str:
        must("docker", "push", name)
        return str(images.find_digest(name))

    outcomes: list[build_steps.Outcome] = []
    with FakeStorage(tmp_path / "buckets") as storage, FakeCloudBuild() as builds:
        storage.create_bucket("my-project-digit-reader-storage")
        variables |= {
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_CLOUDBUILD": f"{builds.address}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{storage.address}/storage/v1/",
            "STORAGE_EMULATOR_HOST": storage.address,
        }
        builds.work = cloud_build.build_worker(
            tmp_path / "buckets",
            tmp_path / "children",
            lambda folder: build_steps.as_container(variables, folder),
            push,
            lambda _, outcome: outcomes.append(outcome),
        )
        substitutions = {
            "_ENVIRONMENT": "dev",
            "_REGISTRY": address,
            "_BASE_IMAGES": MIRROR,
            "_PYTHON_INDEX": "",
            "_COMMIT": "1a2b",
            "_CONTAINER": "deploy",
        }
        build = build_steps.read(
            workspace / "level_2_cicd/cloudbuild.container.yaml", substitutions
        )
        in_toolbox = build_steps.as_container(variables, workspace)

        def command(build: build_steps.Json, step: build_steps.Json) -> build_steps.Command:
            # Cloud Build's docker image is not available: run its step as a local process.
            return (
                build_steps.as_process({})(build, step)
                if step["id"] == "toolbox"
                else in_toolbox(build, step)
            )

        outcome = build_steps.run(build, workspace, command)
        assert outcome.status == "SUCCESS", outcome.failures() + "\n".join(
            child.failures() for child in outcomes
        )
        [child] = builds.calls("builds.create")
        assert child.substitutions["_TOOLBOX"] == toolbox
        [kept] = builds.builds.values()
        [image] = kept.results.images
    [deploy] = containers.find(workspace, ["deploy"])
    assert image.name == f"{address}/deploy:{deploy.tag()}"
    assert image.digest == images.find_digest(image.name)
    assert "pushed" in outcome.step("images").output
    must(
        "docker",
        "run",
        "--rm",
        image.name,
        "python",
        "-m",
        "level_1_pipeline.deploy_container.main",
        "--help",
    )
