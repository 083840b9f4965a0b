"""Build the images that the registry lacks, each in a child build, in parallel.

python -m level_2_cicd.builds [NAME …]                      make images: write build/images.json
python -m level_2_cicd.builds NAME --image IMAGE --tag TAG  make image: in its child build

An environment with `promote_from` copies the images that passed there instead of building.
"""

import argparse
import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from core import manifest
from core.errors import UserError, run_command
from core.paths import project_root
from gcp import client as api
from gcp import pipeline_template, storage
from gcp.environment import Environment, resolve_environment
from gcp.pipeline_template import ask_registry
from level_1_pipeline import containers
from level_1_pipeline.containers import Container
from level_2_cicd import submit_build
from project.settings import Settings, load_settings

DIGESTS = Path("build/images.json")
LOGS = Path("build/images")
# Manifests of Docker and OCI, for one platform or several.
MANIFESTS = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "docker.distribution.manifest.v2",
        "docker.distribution.manifest.list.v2",
        "oci.image.manifest.v1",
        "oci.image.index.v1",
    )
)
CHUNK = 8 * 1024 * 1024


# ── images of a push ──────────────────────────────────────────────────────────────────────────
def provide_images(
    selection: Sequence[Container], settings: Settings, environment: Environment
) -> dict[str, str]:
    """Build or copy missing images in parallel; return container → image by digest."""
    submit_build.require_level_2(environment)
    source = environment.promote_from and resolve_environment(settings, environment.promote_from)

    def provide(container: Container) -> str:
        name = containers.image(container, environment.images)
        # The tag is a hash of the image's inputs, so an existing tag needs no build.
        digest = find_digest(name)
        if digest:
            log(f"= {container.name:<12} unchanged   {name}")
        elif source:
            digest = promote(container, source, name)
        else:
            digest = build(container, environment, name)
        return f"{environment.images}/{container.name}@{digest}"

    # One failure does not stop the other images.
    return containers.run_parallel({one.name: partial(provide, one) for one in selection})


def build(container: Container, environment: Environment, name: str) -> str:
    """Build and push an image in a child build; return its digest."""
    path = LOGS / f"{container.name}.log"
    log(f"▶ {container.name:<12} building …  (log: {path})")
    values = submit_build.image_substitutions(environment, container)
    command = submit_build.submit_command(environment, submit_build.IMAGE, values)
    failure: UserError | None = None
    try:
        submit_build.run(command, path)
    except UserError as error:
        # Tags are immutable, so the push also fails if a parallel build pushed the same image:
        # only a missing image is an error.
        failure = error
    digest = find_digest(name)
    if digest is None:
        raise failure or UserError(
            f"the build succeeded, but {name} is not in the registry. Log: {path}"
        )
    log(f"↑ {container.name:<12} pushed      {name}@{digest}")
    return digest


def promote(container: Container, source: Environment, name: str) -> str:
    """Copy an image that passed in another environment; return its digest."""
    image = containers.image(container, source.images)
    digest = find_digest(image)
    if digest is None:
        raise UserError(
            f"{image} not found: this code has not been built in {source.environment} yet. "
            f"Push it there first, or run: make submit ENVIRONMENT={source.environment}"
        )
    # An image in the registry is built but not necessarily tested; promote tested ones only.
    if storage.read(passed_uri(source, container.name, digest)) is None:
        raise UserError(
            f"{image} has not passed in {source.environment} yet. Wait until its build there has "
            "succeeded, then start this one again."
        )
    log(f"▶ {container.name:<12} copying from {source.environment} …")
    copy_image(f"{source.images}/{container.name}@{digest}", name)
    log(f"↑ {container.name:<12} copied      {name}@{digest}")
    return digest


def passed_uri(environment: Environment, container: str, digest: str) -> str:
    """Return the URI of the record that an image passed all tests in an environment."""
    return f"{environment.builds}/passed/{container}/{digest.removeprefix('sha256:')}"


def record_passed(images: Mapping[str, str], environment: Environment) -> None:
    """Record that images passed all tests, so that other environments may copy them."""
    for container, image in images.items():
        uri = passed_uri(environment, container, image.partition("@")[2])
        # Generation 0 creates only: an existing record keeps its commit.
        with contextlib.suppress(storage.Conflict):
            storage.write(uri, f"{submit_build.commit()}\n".encode(), if_generation_match=0)


def build_here(container: Container, settings: Settings, address: str, tag: str) -> None:
    """Build an image with the local Docker; Cloud Build pushes it."""
    # A different tag means different inputs: the image would be stored under a wrong hash.
    if container.tag() != tag:
        raise UserError(
            f"the files of {container.name} have the tag {container.tag()}, expected {tag}: the "
            "uploaded files differ. Does .gcloudignore exclude one of them?"
        )
    containers.build(container, f"{address}:{tag}", settings)


def log(line: str) -> None:
    """Print a line."""
    # One write including the newline: parallel builds do not mix their lines.
    print(f"{line}\n", end="", flush=True)


def save_digests(images: Mapping[str, str], environment: Environment) -> None:
    """Write the images by digest to build/images.json and to the bucket."""
    DIGESTS.parent.mkdir(exist_ok=True)
    manifest.write_json(DIGESTS, dict(images))
    # The copy in the bucket serves `make apply` on a machine that built no images.
    content = (json.dumps(images, indent=2, sort_keys=True) + "\n").encode()
    storage.write(f"{environment.builds}/images.json", content)


def read_digests() -> dict[str, str]:
    """Read build/images.json: container → image by digest."""
    if not DIGESTS.is_file():
        raise UserError(f"{DIGESTS} not found. Run first: make images")
    images = pipeline_template.read_json(str(DIGESTS), str(DIGESTS))
    return {name: str(image) for name, image in images.items()}


# ── registry (Docker Registry HTTP API V2) ────────────────────────────────────────────────────
def split_name(name: str) -> tuple[str, str]:
    """Split an image name into its repository URL and a tag or digest."""
    match = re.fullmatch(r"([^/]+)/([^@]+?)(?::([\w][\w.-]*)|@(sha256:[0-9a-f]{64}))", name)
    if not match or containers.registry_of(name) == "docker.io":
        raise UserError(
            f"invalid image '{name}'; expected REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:…"
        )
    host, repository, tag, digest = match.groups()
    # A local registry (rehearsals) has no TLS.
    scheme = "http" if re.match(r"(localhost|127\.0\.0\.1)(:|$)", host) else "https"
    return f"{scheme}://{host}/v2/{repository}", tag or digest


def request_manifest(method: str, name: str, what: str, **options: Any) -> Any:
    """Send a request for an image's manifest."""
    repository, reference = split_name(name)
    # A registry does not convert manifests, so accept each kind.
    options.setdefault("headers", {"Accept": MANIFESTS})
    return ask_registry(method, f"{repository}/manifests/{reference}", what, **options)


def find_digest(name: str) -> str | None:
    """Return the digest of an image in its registry; None if not found."""
    try:
        response = request_manifest("HEAD", name, f"looking for {name}")
    except api.ApiError as error:
        if error.code == 404:
            return None
        raise
    return str(response.headers["Docker-Content-Digest"])


def copy_image(source: str, target: str) -> None:
    """Copy an image from REGISTRY/NAME@sha256:… to REGISTRY/NAME:TAG byte for byte."""
    # No `docker pull` and `docker push`: Docker compresses layers again, which changes the digest.
    response = request_manifest("GET", source, f"reading {source}")
    document = response.json()
    if "manifests" in document:
        raise UserError(f"{source} has several platforms; the project's images have one.")
    # Blobs first: a registry rejects a manifest whose blobs are missing.
    for blob in (document["config"], *document["layers"]):
        copy_blob(source, target, blob["digest"])
    headers = {"Content-Type": response.headers["Content-Type"].partition(";")[0]}
    what = f"copying {target}"
    response = request_manifest("PUT", target, what, data=response.content, headers=headers)
    digest = response.headers["Docker-Content-Digest"]
    if digest != source.rpartition("@")[2]:
        raise UserError(f"{what} changed its digest to {digest}; check the registry.")


def copy_blob(source: str, target: str, digest: str) -> None:
    """Copy a layer or an image configuration unless the target has it."""
    repository, what = split_name(target)[0], f"copying {target}"

    def find() -> bool | None:
        try:
            ask_registry("HEAD", f"{repository}/blobs/{digest}", what)
        except api.ApiError as error:
            if error.code == 404:
                return None
            raise
        return True

    def send() -> bool:
        with tempfile.TemporaryDirectory() as folder:
            blob = Blob(folder)
            blob.download(f"{split_name(source)[0]}/blobs/{digest}", f"reading {source}")
            uploads = f"{repository}/blobs/uploads/"
            # The URL in Location may be relative and may have a query already.
            upload = urljoin(uploads, ask_registry("POST", uploads, what).headers["Location"])
            upload += f"{'&' if '?' in upload else '?'}digest={digest}"
            headers = {"Content-Type": "application/octet-stream"}
            try:
                ask_registry("PUT", upload, what, data=blob, headers=headers)
            except api.ApiError as error:
                if error.code != 404:
                    raise
                # A retry after a lost response finds the upload completed and its URL gone.
                # Report a conflict, so that get_or_create looks for the blob again.
                raise api.ApiError(str(error), 409, transient=False) from error
        return True

    api.get_or_create(find, send)


class Blob:
    """A file-backed request body that can be sent again on a retry."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder, "blob")

    def download(self, url: str, what: str) -> None:
        """Download the content in chunks."""
        # No digest check here: the registry that receives the blob verifies it.
        response = ask_registry("GET", url, what, stream=True)
        try:
            with response, self.path.open("wb") as stream:
                for chunk in response.iter_content(CHUNK):
                    stream.write(chunk)
        except Exception as error:
            raise api.explain(error, what) from error

    def __len__(self) -> int:
        return self.path.stat().st_size

    def __iter__(self) -> Iterator[bytes]:
        with self.path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk


# ── command line ──────────────────────────────────────────────────────────────────────────────
def main() -> None:
    """Build the missing images, or one image with --image and --tag."""
    parser = argparse.ArgumentParser(
        prog="make images", description="Build and push the images that the registry lacks."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="containers; default: all")
    parser.add_argument("--image", help="build one image locally, with this name without a tag")
    parser.add_argument("--tag", help="with --image: the expected tag")
    options = parser.parse_args()
    settings = load_settings()
    selection = containers.find(project_root(), options.names)
    if options.image or options.tag:
        if not (options.image and options.tag and len(selection) == 1):
            raise UserError("expected one container: make image NAME=train IMAGE=IMAGE TAG=TAG")
        build_here(selection[0], settings, options.image, options.tag)
        return
    environment = resolve_environment(settings)
    images = provide_images(selection, settings, environment)
    # images.json must list all containers, so a partial build does not write it.
    if not options.names:
        save_digests(images, environment)
        print(f"{DIGESTS}: {len(images)} images by digest")


if __name__ == "__main__":
    run_command(main)
