"""The containers' images: what goes into each, the tag that follows from it, building and pushing.

python -m level_1_pipeline.containers [NAME …] [--push | --print] [--digests FILE] [--pin-base]

A container is a folder `level_*/NAME_container/` with a Dockerfile. Its Dockerfile.dockerignore lists what goes in, and
the tag is a hash of just that: whoever has the same files has the same tag, with git or without.
"""

import argparse
import hashlib
import os
import platform
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from core import manifest
from core.errors import UserError, run_command
from core.paths import project_root
from gcp import environment as environments
from gcp.environment import resolve_environment
from level_1_pipeline import together
from project import git
from project.doctor import START_DOCKER
from project.settings import Settings, load_settings

BASE = Path("level_1_pipeline/base_image.txt")
LOGS = Path("build/containers")
# Where packages come from, in pip's own variables and in uv's, which does not know pip's.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
PIP_AS_UV = {
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
}


@dataclass(frozen=True)
class Container:
    """A folder with a Dockerfile, relative to the project's root."""

    root: Path
    folder: Path

    @property
    def name(self) -> str:
        """What people call it."""
        return self.folder.name.removesuffix("_container")

    @property
    def dockerfile(self) -> Path:
        """What builds it."""
        return self.folder / "Dockerfile"

    def inputs(self) -> list[Path]:
        """The files that go into the image, in order.

        Raises:
            UserError: the list names a path that is not there.
        """
        lines = (
            (self.root / f"{self.dockerfile}.dockerignore").read_text(encoding="utf-8").splitlines()
        )
        found: set[Path] = set()
        for path in (self.root / line[1:] for line in lines if line.startswith("!")):
            files = (
                [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            )
            if not files:
                raise UserError(
                    f"{self.dockerfile}.dockerignore names {path.relative_to(self.root)}, which is not there."
                )
            found.update(
                file.relative_to(self.root) for file in files if "__pycache__" not in file.parts
            )
        return sorted(found)

    def arguments(self) -> dict[str, str]:
        """What the Dockerfile lets one choose: which build of torch (TORCH: cpu, or a CUDA version such as cu130)."""
        chooses = re.search(
            r"^ARG TORCH", (self.root / self.dockerfile).read_text(encoding="utf-8"), re.MULTILINE
        )
        return {"TORCH": torch_build()} if chooses else {}

    def tag(self) -> str:
        """A hash of all that decides what the image holds. Where packages come from does not: they are pinned."""
        total = hashlib.sha256(f"{target_platform()} {self.arguments()}\n".encode())
        for path in (BASE, self.dockerfile, *self.inputs()):
            content = (self.root / path).read_bytes()
            runs = os.access(self.root / path, os.X_OK)
            total.update(
                f"{path.as_posix()} {runs} {hashlib.sha256(content).hexdigest()}\n".encode()
            )
        return total.hexdigest()[:16]


def torch_build() -> str:
    """Which torch goes into the training image: cpu, or a CUDA version such as cu130."""
    return os.environ.get("TORCH") or "cpu"


def target_platform() -> str:
    """Docker's own variable, or this machine's."""
    machine = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64"}.get(
        platform.machine(), platform.machine()
    )
    return os.environ.get("DOCKER_DEFAULT_PLATFORM") or f"linux/{machine}"


def find(root: Path, names: Sequence[str] = ()) -> list[Container]:
    """All containers, or those that are named.

    Raises:
        UserError: there is no container of that name.
    """
    every = [
        Container(root, path.parent.relative_to(root))
        for path in root.glob("level_*/*_container/Dockerfile")
    ]
    known = {
        container.name: container
        for container in sorted(every, key=lambda container: container.name)
    }
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"there is no container {', '.join(unknown)}; there are {', '.join(known)}."
        )
    return [known[name] for name in names or known]


def image(container: Container, prefix: str) -> str:
    """The image's name: PREFIX/NAME:TAG, where the prefix is the project's name, or a registry's address."""
    return f"{prefix}/{container.name}:{container.tag()}"


def images(root: Path, settings: Settings) -> dict[str, str]:
    """Container → its image's name on this machine."""
    return {container.name: image(container, settings.name) for container in find(root)}


# ── docker ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# What docker says → what a person can do.
CAUSES = {
    r"docker\.sock.*permission denied|permission denied.*docker\.sock": (
        "you may not use Docker's engine. Type: sudo usermod -aG docker $USER, then log in anew."
    ),
    r"no space left on device": "the disk is full. `docker system prune` removes what no container uses any more.",
    r"requires BuildKit|buildx.*(missing|broken|not found)": (
        "this Docker cannot build with BuildKit. Install its buildx plugin: see docs.docker.com/build/buildx."
    ),
    r"Cannot connect to the Docker daemon|failed to connect to the docker API": (
        f"Docker's engine does not run: {START_DOCKER}"
    ),
    r"unauthorized|denied: |access.* denied|no basic auth|authentication required": (
        "the registry refuses you. For Google's: gcloud auth configure-docker {host}; does the repository exist?"
    ),
    r"certificate signed by unknown authority|UnknownIssuer|CERTIFICATE_VERIFY_FAILED": (
        "a certificate is not known. In a network with certificates of its own set cloud.mirrors.certificates in project.yaml."
    ),
    r"connection refused|no such host|server gave HTTP response|i/o timeout|\bEOF$": "the registry {host} does not answer.",
    r"Could not find a version|Failed to fetch|error sending request": (
        "the Python packages cannot be had. In a closed network set cloud.mirrors.python_index in project.yaml."
    ),
    r"manifest unknown|not found: manifest|pull access denied|failed to resolve source metadata": (
        "the base image cannot be had. In a closed network set cloud.mirrors.base_images in project.yaml."
    ),
}


def docker(*arguments: str, log: Path | None = None, host: str = "") -> str:
    """Run docker; returns what it wrote to standard output, or writes all to a log.

    Raises:
        UserError: it is not there, or fails; one line that says what to do.
    """
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    command = ["docker", *arguments]
    try:
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w", encoding="utf-8") as stream:
                stream.write(f"$ {shlex.join(command)}\n")
                stream.flush()
                done = subprocess.run(
                    command,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    check=False,
                    text=True,
                )
            said = log.read_text(encoding="utf-8", errors="replace")
        else:
            done = subprocess.run(
                command, capture_output=True, env=environment, check=False, text=True
            )
            said = done.stderr
    except FileNotFoundError:
        raise UserError(
            "Docker is not installed: see docs.docker.com/get-docker. Without it: make level1 RUNNER=local"
        ) from None
    if done.returncode != 0:
        raise UserError(explain(said, host) + (f" The whole log: {log}" if log else ""))
    return done.stdout or ""


def explain(said: str, host: str = "") -> str:
    """Docker's failure as a line that says what to do, or else the line that tells most."""
    last = said[-4000:]
    of_commands = r"^#\d+ [\d.]+ (.*)$"  # what the commands within a build wrote: their network's trouble is no registry's
    own = [
        line.strip()
        for line in re.findall(of_commands, last, re.MULTILINE)
        if re.search(r"\berror\b", line, re.IGNORECASE)
    ]
    told = "\n".join(own) if own else last
    for pattern, advice in CAUSES.items():
        if re.search(pattern, told, re.IGNORECASE) and not (own and "{host}" in advice):
            return advice.format(host=host or "that project.yaml names")
    lines = own or [
        line.strip()
        for line in last.splitlines()
        if re.search(r"error|failed", line, re.IGNORECASE)
    ]
    lines = (
        lines
        or [line.strip() for line in last.splitlines() if line.strip()]
        or ["it does not say why"]
    )
    return f"docker failed: {lines[0 if own else -1]}"


def engine() -> str:
    """The address of the engine that the docker command talks to."""
    return (
        os.environ.get("DOCKER_HOST")
        or docker("context", "inspect", "--format", "{{.Endpoints.docker.Host}}").strip()
    )


def exists(name: str) -> bool:
    """Whether this machine has the image."""
    return bool(docker("image", "ls", "--quiet", name).strip())


# ── building ────────────────────────────────────────────────────────────────────────────────────────────────────────
def base_image(root: Path, settings: Settings) -> str:
    """The image that all are built on, from the mirror if there is one."""
    name = (root / BASE).read_text(encoding="utf-8").strip()
    mirror = settings.cloud.mirrors.base_images
    return f"{mirror}/{name}" if mirror else name


def pin_base(root: Path, settings: Settings) -> str:
    """Write the base image's present digest beside its name: everybody builds on the same bytes from now on."""
    name = base_image(root, settings).partition("@")[0]
    docker("pull", "--quiet", name, host=registry_of(name))
    digest = digest_of(name)
    plain = (root / BASE).read_text(encoding="utf-8").strip().partition("@")[0]
    (root / BASE).write_text(f"{plain}@{digest}\n", encoding="utf-8")
    return f"{plain}@{digest}"


def registry_of(name: str) -> str:
    """The registry in an image's name; Docker's own where it names none."""
    first, _, rest = name.partition("/")
    return first if rest and re.search(r"[.:]|^localhost$", first) else "docker.io"


def digest_of(name: str) -> str:
    """sha256:… of an image that was pulled or pushed by this name.

    Raises:
        UserError: the registry gave it none.
    """
    digests = docker("image", "inspect", "--format", '{{join .RepoDigests "\\n"}}', name).split()
    # Docker leaves out its own registry's name, and that of its library.
    repository = re.sub(r"^(docker\.io/)?(library/)?", "", name.rpartition(":")[0])
    found = [digest.partition("@")[2] for digest in digests if digest.startswith(f"{repository}@")]
    if not found:
        raise UserError(f"{name} has no digest: it was made here, and comes from no registry.")
    return found[0]


@contextmanager
def secrets(settings: Settings) -> Iterator[list[str]]:
    """Options of `docker build` that hand on where packages come from; as secrets, so they are in no image and no history.

    Raises:
        UserError: there is no file of certificates where project.yaml says.
    """
    mirrors = settings.cloud.mirrors
    certificates = project_root() / mirrors.certificates
    if mirrors.certificates and not certificates.is_file():
        raise UserError(
            f"cloud.mirrors.certificates in project.yaml: there is no file {certificates}."
        )
    variables = dict(os.environ)
    if mirrors.python_index:
        variables["PIP_INDEX_URL"] = mirrors.python_index
    for pip, uv in PIP_AS_UV.items():
        for name, other in ((pip, uv), (uv, pip)):
            if name in variables:
                variables.setdefault(other, variables[name])
    wanted = (
        "PIP_TRUSTED_HOST",
        *PIP_AS_UV,
        *PIP_AS_UV.values(),
        *PROXIES,
        *map(str.lower, PROXIES),
    )
    lines = [
        f"export {name}={shlex.quote(variables[name])}" for name in wanted if name in variables
    ]
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder, "index")
        index.write_text("\n".join(lines) + "\n", encoding="utf-8")
        options = ["--secret", f"id=index,src={index}"]
        if mirrors.certificates:
            options += ["--secret", f"id=certificates,src={certificates}"]
        yield options


def build(container: Container, name: str, settings: Settings) -> None:
    """Build one image; its log is in build/containers/.

    Raises:
        UserError: docker's failure, in one line.
    """
    root = container.root
    log = LOGS / f"{container.name}.log"
    given = {"BASE": base_image(root, settings), **container.arguments()}
    labels = {
        "title": f"{settings.name}/{container.name}",
        "source": git.remote(),
        "revision": os.environ.get("COMMIT")
        or git.version(),  # a build in the cloud is told; git is not there
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    options = [f"--build-arg={key}={value}" for key, value in given.items()]
    options += [
        f"--label=org.opencontainers.image.{key}={value}" for key, value in labels.items() if value
    ]
    if network := os.environ.get("BUILD_NETWORK"):  # host, where the mirror is on this very machine
        options.append(f"--network={network}")
    with secrets(settings) as hidden:
        where = ["--file", str(root / container.dockerfile), "--tag", name, str(root)]
        docker(
            "build",
            "--progress=plain",
            *options,
            *hidden,
            *where,
            log=root / log,
            host=registry_of(given["BASE"]),
        )


def push(container: Container, local: str, registry: str) -> str:
    """Send an image to a registry; returns its name there, by digest."""
    remote = image(container, registry)
    docker("tag", local, remote)
    docker(
        "push",
        remote,
        log=container.root / LOGS / f"{container.name}.push.log",
        host=registry_of(remote),
    )
    return f"{registry}/{container.name}@{digest_of(remote)}"


def make(container: Container, settings: Settings, registry: str | None) -> tuple[list[str], str]:
    """Build one image unless it is there, push it if a registry is given.

    Returns:
        Lines that tell it; and the image's name: in the registry by digest, or else on this machine.
    """
    name, began = image(container, settings.name), time.monotonic()
    if exists(name):
        lines = [f"= {container.name:<12} unchanged   {name}"]
    else:
        print(f"▶ {container.name:<12} building …  (log: {LOGS / container.name}.log)", flush=True)
        build(container, name, settings)
        size = int(docker("image", "inspect", "--format", "{{.Size}}", name)) / 1e6
        lines = [
            f"✓ {container.name:<12} {time.monotonic() - began:6.1f} s    {name}  ({size:,.0f} MB)"
        ]
    if registry:
        print(
            f"▶ {container.name:<12} pushing …  (log: {LOGS / container.name}.push.log)", flush=True
        )
        name = push(container, name, registry)
        lines.append(f"↑ {container.name:<12} pushed      {name}")
    return lines, name


def make_all(
    containers: Sequence[Container], settings: Settings, registry: str | None = None
) -> dict[str, str]:
    """Build in parallel, and push if a registry is given; what can be built is built, also when another fails.

    Returns:
        Container → its image's name: in the registry by digest, or else on this machine.

    Raises:
        UserError: tells every failure.
    """
    work = {
        container.name: partial(make, container, settings, registry) for container in containers
    }
    made = together.gather(
        work, lambda result: print("\n".join(result[0]), flush=True), told_once=True
    )
    return {name: image for name, (_, image) in made.items()}


def chosen_registry(settings: Settings) -> str:
    """Where images are sent: containers.registry, or else the repository of the Google Cloud project.

    Raises:
        UserError: project.yaml names neither.
    """
    if not settings.containers.registry and not environments.names_a_project(settings):
        raise UserError(
            "--push: where to? Set containers.registry in project.yaml, for example to localhost:5000/digit-reader, "
            "or the Google Cloud project under cloud.environments."
        )
    return settings.containers.registry or resolve_environment(settings).images


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m level_1_pipeline.containers", description="Build the containers' images."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a container, such as train; otherwise all"
    )
    parser.add_argument(
        "--push", action="store_true", help="send them to the registry that project.yaml names"
    )
    parser.add_argument(
        "--digests",
        type=Path,
        metavar="FILE",
        help="with --push: write their names by digest there, as JSON",
    )
    parser.add_argument(
        "--pin-base",
        action="store_true",
        help="write the base image's present digest into base_image.txt",
    )
    parser.add_argument(
        "--print",
        action="store_true",
        help="build nothing; print the images' names on this machine",
    )
    arguments = parser.parse_args()
    root, settings = project_root(), load_settings()
    containers = find(root, arguments.names)
    if arguments.print:
        print("\n".join(image(container, settings.name) for container in containers))
        return
    if arguments.digests and not arguments.push:
        raise UserError("--digests: only a registry gives digests; add --push.")
    registry = chosen_registry(settings) if arguments.push else None
    if arguments.pin_base:
        print(f"base image: {pin_base(root, settings)}")
    made = make_all(containers, settings, registry)
    if arguments.digests:
        manifest.write_json(arguments.digests, made)


if __name__ == "__main__":
    run_command(main)
