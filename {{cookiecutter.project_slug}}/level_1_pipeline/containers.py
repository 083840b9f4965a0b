"""Build and push the container images: make containers.

A container is a folder level_*/NAME_container/ with a Dockerfile. Its Dockerfile.dockerignore lists
the input files; the image tag is a hash of them, so an unchanged image is not rebuilt.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from core import manifest
from core.errors import UserError, run_command
from core.paths import project_root
from gcp.environment import names_a_project, resolve_environment
from project import git
from project.doctor import START_DOCKER
from project.settings import Settings, load_settings

BASE = Path("level_1_pipeline/base_image.txt")
LOGS = Path("build/containers")
# pip's package source variables → uv's: uv ignores those of pip.
PIP_AS_UV = {
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
}
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
PACKAGE_VARIABLES = (
    "PIP_TRUSTED_HOST",
    *PIP_AS_UV,
    *PIP_AS_UV.values(),
    *PROXIES,
    *map(str.lower, PROXIES),
)

# Docker's error → advice.
CAUSES = {
    r"docker\.sock.*permission denied|permission denied.*docker\.sock": (
        "no permission to use the Docker daemon. Run `sudo usermod -aG docker $USER`, "
        "then log out and back in."
    ),
    r"no space left on device": "the disk is full. `docker system prune` removes unused images.",
    r"requires BuildKit|buildx.*(missing|broken|not found)": (
        "this Docker cannot build with BuildKit. Install its buildx plugin: see "
        "docs.docker.com/build/buildx."
    ),
    r"Cannot connect to the Docker daemon|failed to connect to the docker API": (
        f"the Docker daemon is not running: {START_DOCKER}"
    ),
    r"unauthorized|denied: |access.* denied|no basic auth|authentication required": (
        "the registry denied access. For Google's, run `gcloud auth configure-docker {host}`, "
        "and check that the repository exists."
    ),
    r"certificate signed by unknown authority|UnknownIssuer|CERTIFICATE_VERIFY_FAILED": (
        "unknown certificate. In a network with its own certificates set "
        "cloud.mirrors.certificates in project.yaml."
    ),
    r"connection refused|no such host|server gave HTTP response|i/o timeout|\bEOF$": (
        "no response from the registry {host}."
    ),
    r"Could not find a version|Failed to fetch|error sending request": (
        "the Python packages cannot be downloaded. In a closed network set "
        "cloud.mirrors.python_index in project.yaml."
    ),
    r"manifest unknown|not found: manifest|pull access denied|failed to resolve source metadata": (
        "the base image cannot be pulled. In a closed network set cloud.mirrors.base_images "
        "in project.yaml."
    ),
}

Result = TypeVar("Result")


def run_parallel(
    work: Mapping[str, Callable[[], Result]], done: Callable[[Result], None] | None = None
) -> dict[str, Result]:
    """Call functions in parallel threads; return name → result, or report all errors together.

    `done` is called with each result in the order of the names. Only UserErrors are collected.
    """
    results: dict[str, Result] = {}
    failures: dict[str, list[str]] = {}  # message → names: a shared error is reported once
    with ThreadPoolExecutor(max_workers=max(1, len(work))) as pool:
        futures = {name: pool.submit(function) for name, function in work.items()}
        for name, future in futures.items():
            try:
                results[name] = future.result()
            except UserError as error:
                failures.setdefault(str(error), []).append(name)
            else:
                if done:
                    done(results[name])
    if failures:
        lines = [f"{', '.join(names)}: {message}" for message, names in failures.items()]
        raise UserError("\n       ".join(lines))
    return results


# ── the image's name ──────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Container:
    """A folder with a Dockerfile, relative to the project's root."""

    root: Path
    folder: Path

    @property
    def name(self) -> str:
        """Return the folder's name without its suffix: train for train_container."""
        return self.folder.name.removesuffix("_container")

    @property
    def dockerfile(self) -> Path:
        return self.folder / "Dockerfile"

    def inputs(self) -> list[Path]:
        """Return the sorted files that the image contains."""
        # The ignore file excludes everything and re-includes inputs with "!" lines.
        allowlist = self.root / f"{self.dockerfile}.dockerignore"
        files: set[Path] = set()
        for line in allowlist.read_text(encoding="utf-8").splitlines():
            if not line.startswith("!"):
                continue
            path = self.root / line[1:]
            matches = [file for file in (path, *path.rglob("*")) if file.is_file()]
            if not matches:
                raise UserError(f"{self.dockerfile}.dockerignore: {line[1:]} not found.")
            files.update(matches)
        return sorted(
            file.relative_to(self.root) for file in files if "__pycache__" not in file.parts
        )

    def arguments(self) -> dict[str, str]:
        """Return the Dockerfile's build arguments: TORCH, if it declares it."""
        dockerfile = (self.root / self.dockerfile).read_text(encoding="utf-8")
        return {"TORCH": torch_build()} if re.search(r"(?m)^ARG TORCH", dockerfile) else {}

    def tag(self) -> str:
        """Return a hash of the image's inputs."""
        # Mirrors are left out: packages are pinned, so their source does not change the image.
        digest = hashlib.sha256(f"{target_platform()} {self.arguments()}\n".encode())
        for path in (BASE, self.dockerfile, *self.inputs()):
            content = hashlib.sha256((self.root / path).read_bytes()).hexdigest()
            executable = os.access(self.root / path, os.X_OK)
            digest.update(f"{path.as_posix()} {executable} {content}\n".encode())
        return digest.hexdigest()[:16]


def torch_build() -> str:
    """Return the torch build of the training image: cpu, or a CUDA version such as cu130."""
    return os.environ.get("TORCH") or "cpu"


def target_platform() -> str:
    """Return the platform of the images: Docker's variable, or else this machine's."""
    names = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64"}
    machine = names.get(platform.machine(), platform.machine())
    return os.environ.get("DOCKER_DEFAULT_PLATFORM") or f"linux/{machine}"


def find(root: Path, names: Sequence[str] = ()) -> list[Container]:
    """Return the named containers, or all of them."""
    folders = [
        file.parent.relative_to(root) for file in root.glob("level_*/*_container/Dockerfile")
    ]
    containers = [Container(root, folder) for folder in folders]
    known = {one.name: one for one in sorted(containers, key=lambda one: one.name)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"unknown container {', '.join(unknown)}; expected: {', '.join(known)}.")
    return [known[name] for name in names or known]


def image(container: Container, prefix: str) -> str:
    """Return PREFIX/NAME:TAG; the prefix is the project's name or a registry's address."""
    return f"{prefix}/{container.name}:{container.tag()}"


def registry_of(name: str) -> str:
    """Return the registry of an image name; docker.io by default."""
    # As in Docker: the first part is a host only with a dot, a port, or as localhost.
    first, _, rest = name.partition("/")
    return first if rest and re.search(r"[.:]|^localhost$", first) else "docker.io"


# ── docker ────────────────────────────────────────────────────────────────────────────────────────
def docker(*arguments: str, log: Path | None = None, host: str = "") -> str:
    """Run docker; return its standard output, or write all output to `log`."""
    command = ["docker", *arguments]
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    run = partial(subprocess.run, command, env=environment, check=False, text=True)
    try:
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w", encoding="utf-8") as stream:
                print("$", shlex.join(command), file=stream, flush=True)
                done = run(stdout=stream, stderr=subprocess.STDOUT)
            errors = log.read_text(encoding="utf-8", errors="replace")
        else:
            done = run(capture_output=True)
            errors = done.stderr
    except FileNotFoundError:
        raise UserError(
            "Docker is not installed: see docs.docker.com/get-docker. "
            "Without it: make level1 RUNNER=local"
        ) from None
    if done.returncode != 0:
        raise UserError(explain(errors, host) + (f" The whole log: {log}" if log else ""))
    return done.stdout or ""


def explain(output: str, host: str = "") -> str:
    """Return one line about a failure of Docker: advice, or else Docker's own error."""
    tail = output[-4000:]
    # Network errors of commands inside a build do not come from the registry: skip its advice.
    inner = re.findall(r"(?im)^#\d+ [\d.]+ (.*\berror\b.*)$", tail)
    for pattern, advice in CAUSES.items():
        if inner and "{host}" in advice:
            continue
        if re.search(pattern, "\n".join(inner) or tail, re.IGNORECASE):
            return advice.format(host=host or "in project.yaml")
    lines = inner or [line for line in tail.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error|failed", line, re.IGNORECASE)]
    return f"docker failed: {(inner or (errors or lines or ['no reason given'])[-1:])[0].strip()}"


def engine() -> str:
    """Return the address of the daemon that the docker command uses."""
    inspect = ("context", "inspect", "--format", "{{.Endpoints.docker.Host}}")
    return os.environ.get("DOCKER_HOST") or docker(*inspect).strip()


def digest_of(name: str) -> str:
    """Return the digest (sha256:…) of an image that was pulled or pushed by this name."""
    digests = docker("image", "inspect", "--format", '{{join .RepoDigests "\\n"}}', name).split()
    # Docker omits docker.io/ and library/ in RepoDigests.
    repository = re.sub(r"^(docker\.io/)?(library/)?", "", name.rpartition(":")[0])
    for digest in digests:
        if digest.startswith(f"{repository}@"):
            return digest.partition("@")[2]
    raise UserError(f"{name} has no digest: it was built here and not pushed.")


# ── building ──────────────────────────────────────────────────────────────────────────────────────
def base_image(root: Path, settings: Settings) -> str:
    """Return the base image of all images, from the mirror if one is set."""
    name = (root / BASE).read_text(encoding="utf-8").strip()
    mirror = settings.cloud.mirrors.base_images
    return f"{mirror}/{name}" if mirror else name


def pin_base(root: Path, settings: Settings) -> str:
    """Write the base image's current digest beside its name."""
    name = base_image(root, settings).partition("@")[0]
    docker("pull", "--quiet", name, host=registry_of(name))
    plain = (root / BASE).read_text(encoding="utf-8").strip().partition("@")[0]
    # The mirror is a setting of its own, so the file does not contain it.
    pinned = f"{plain}@{digest_of(name)}"
    (root / BASE).write_text(f"{pinned}\n", encoding="utf-8")
    return pinned


@contextmanager
def secrets(settings: Settings) -> Iterator[list[str]]:
    """Yield the options of `docker build` for package sources and certificates."""
    # As secrets they stay out of the image, unlike build arguments.
    mirrors = settings.cloud.mirrors
    certificates = project_root() / mirrors.certificates
    if mirrors.certificates and not certificates.is_file():
        raise UserError(f"cloud.mirrors.certificates in project.yaml: {certificates} not found.")
    variables = dict(os.environ)
    if mirrors.python_index:
        variables["PIP_INDEX_URL"] = mirrors.python_index
    for pip, uv in PIP_AS_UV.items():
        for name, other in ((pip, uv), (uv, pip)):
            if name in variables:
                variables.setdefault(other, variables[name])
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder, "index")
        exports = [
            f"export {name}={shlex.quote(variables[name])}\n"
            for name in PACKAGE_VARIABLES
            if name in variables
        ]
        index.write_text("".join(exports), encoding="utf-8")
        options = ["--secret", f"id=index,src={index}"]
        if mirrors.certificates:
            options += ["--secret", f"id=certificates,src={certificates}"]
        yield options


def build(container: Container, name: str, settings: Settings) -> None:
    """Build one image and write its log to build/containers/."""
    root = container.root
    base = base_image(root, settings)
    labels = {
        "title": f"{settings.name}/{container.name}",
        "source": git.remote(),
        # Cloud Build sets COMMIT: its copy of the code has no .git folder.
        "revision": os.environ.get("COMMIT") or git.version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    options = [f"--build-arg={key}={value}" for key, value in container.arguments().items()]
    options += [
        f"--label=org.opencontainers.image.{key}={value}" for key, value in labels.items() if value
    ]
    if network := os.environ.get("BUILD_NETWORK"):  # host, for a mirror on this machine
        options.append(f"--network={network}")
    options += [f"--build-arg=BASE={base}", "--progress=plain", f"--tag={name}"]
    options.append(f"--file={root / container.dockerfile}")
    log = root / LOGS / f"{container.name}.log"
    with secrets(settings) as hidden:
        docker("build", *options, *hidden, str(root), log=log, host=registry_of(base))


def make(container: Container, settings: Settings, registry: str | None) -> tuple[list[str], str]:
    """Build one image unless it exists, and push it if a registry is given.

    Return lines to print, and the image name: by digest if pushed, else the local name.
    """
    # The tag is a hash of the inputs, so an existing image is up to date.
    name, start, label = image(container, settings.name), time.monotonic(), f"{container.name:<12}"
    if docker("image", "ls", "--quiet", name).strip():
        lines = [f"= {label} unchanged   {name}"]
    else:
        print(f"▶ {label} building …  (log: {LOGS / container.name}.log)", flush=True)
        build(container, name, settings)
        size = int(docker("image", "inspect", "--format", "{{.Size}}", name)) / 1e6
        lines = [f"✓ {label} {time.monotonic() - start:6.1f} s    {name}  ({size:,.0f} MB)"]
    if registry:
        log = LOGS / f"{container.name}.push.log"
        print(f"▶ {label} pushing …  (log: {log})", flush=True)
        remote = image(container, registry)
        docker("tag", name, remote)
        docker("push", remote, log=container.root / log, host=registry_of(remote))
        name = f"{registry}/{container.name}@{digest_of(remote)}"
        lines.append(f"↑ {label} pushed      {name}")
    return lines, name


def make_all(
    containers: Sequence[Container], settings: Settings, registry: str | None = None
) -> dict[str, str]:
    """Build (and push, if a registry is given) in parallel; return container → image name."""
    work = {one.name: partial(make, one, settings, registry) for one in containers}
    results = run_parallel(work, lambda result: print("\n".join(result[0]), flush=True))
    return {name: image for name, (_, image) in results.items()}


def push_registry(settings: Settings) -> str:
    """Return the registry for --push: containers.registry, or the cloud project's repository."""
    if not settings.containers.registry and not names_a_project(settings):
        raise UserError(
            "--push: no registry. Set containers.registry in project.yaml, for example to "
            "localhost:5000/digit-reader, or the Google Cloud project under cloud.environments."
        )
    return settings.containers.registry or resolve_environment(settings).images


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m level_1_pipeline.containers", description="Build the containers' images."
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="a container, such as train; otherwise all")
    add("--push", action="store_true", help="push to the registry of project.yaml")
    add("--digests", type=Path, metavar="FILE", help="with --push: write the digests as JSON")
    add("--pin-base", action="store_true", help="write the base image's digest to base_image.txt")
    add("--print", action="store_true", help="build nothing; print the images' local names")
    arguments = parser.parse_args()
    root, settings = project_root(), load_settings()
    containers = find(root, arguments.names)
    if arguments.print:
        print("\n".join(image(container, settings.name) for container in containers))
        return
    if arguments.digests and not arguments.push:
        raise UserError("--digests: only a registry assigns digests; add --push.")
    registry = push_registry(settings) if arguments.push else None
    if arguments.pin_base:
        print(f"base image: {pin_base(root, settings)}")
    names = make_all(containers, settings, registry)
    if arguments.digests:
        manifest.write_json(arguments.digests, names)


if __name__ == "__main__":
    run_command(main)
