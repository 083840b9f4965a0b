"""The images of a push: each that the registry lacks is built in a build of its own, in parallel; the rest is left alone.

python -m level_2_cicd.builds [NAME …]                           make images: all; writes their digests to build/images.json
python -m level_2_cicd.builds NAME --image ADDRESS --tag TAG     make image: builds one, here; Cloud Build pushes it

An image's tag is a hash of what goes into it (level_1_pipeline.containers), so the registry itself tells what is missing. An environment
with promote_from in project.yaml builds nothing: it copies what passed where it promotes from, byte for byte, so that what
runs there is what was tried.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from core import manifest
from core.errors import UserError, run_command
from core.paths import project_root
from gcp import command_line, storage
from gcp.environment import Environment, resolve_environment
from level_1_pipeline import containers, together
from level_1_pipeline.containers import Container
from level_2_cicd import image_registry, submit_build
from project.settings import Settings, load_settings

DIGESTS = Path("build/images.json")
LOGS = Path("build/images")


def make(
    wanted: Sequence[Container], settings: Settings, environment: Environment
) -> dict[str, str]:
    """Let the environment's registry have the images; what can be had is had, also when another fails.

    Returns:
        Container → its image by digest.

    Raises:
        UserError: tells every failure.
    """
    submit_build.level_2(environment)
    source = (
        resolve_environment(settings, environment.promote_from)
        if environment.promote_from
        else None
    )

    def make_one(container: Container) -> str:
        name = containers.image(container, environment.images)
        there = image_registry.digest(name)
        if there:
            tell(f"= {container.name:<12} unchanged   {name}")
        elif source:
            there = promote(container, source, name)
        else:
            there = build_elsewhere(container, environment, name)
        return f"{environment.images}/{container.name}@{there}"

    return together.gather({container.name: partial(make_one, container) for container in wanted})


def build_elsewhere(container: Container, environment: Environment, name: str) -> str:
    """Build an image in a build of its own, which pushes it; returns its digest.

    Raises:
        UserError: the build failed, or the image is not there afterwards.
    """
    log = LOGS / f"{container.name}.log"
    tell(f"▶ {container.name:<12} building …  (log: {log})")
    told = submit_build.substitutions_of_image(environment, container)
    problem: UserError | None = None
    try:
        submit_build.run(submit_build.submit_command(environment, submit_build.IMAGE, told), log)
    except UserError as error:
        problem = error  # or another build has sent the same image meanwhile, and tags never move
    there = image_registry.digest(name)
    if there is None:
        raise problem or UserError(
            f"the build succeeded, and {name} is not in the registry. Its log: {log}"
        )
    tell(f"↑ {container.name:<12} pushed      {name}@{there}")
    return there


def promote(container: Container, source: Environment, name: str) -> str:
    """Copy an image from the registry of another environment; returns its digest, which is the same.

    Raises:
        UserError: it is not there yet, or has not passed there.
    """
    passed = containers.image(container, source.images)
    there = image_registry.digest(passed)
    if there is None:
        raise UserError(
            f"{passed} is not there: this code has not been built in {source.environment} yet, and is built nowhere else. "
            f"Push it there first, or type: make submit ENVIRONMENT={source.environment}"
        )
    if storage.read(passed_address(source, container.name, there)) is None:
        raise UserError(
            f"{passed} is there, and has not passed in {source.environment} yet: its tests and its functional test must, first. "
            "When the build there has ended well, start this one again."
        )
    tell(f"▶ {container.name:<12} copying from {source.environment} …")
    copied = image_registry.copy(f"{source.images}/{container.name}@{there}", name)
    tell(f"↑ {container.name:<12} copied      {name}@{copied}")
    return copied


def passed_address(environment: Environment, container: str, digest: str) -> str:
    """Where an environment notes that an image has passed."""
    return f"{environment.builds}/passed/{container}/{digest.removeprefix('sha256:')}"


def note_passed(images: Mapping[str, str], environment: Environment) -> None:
    """Note that these images have passed all tests here: other environments may run them."""
    for container, image in images.items():
        with contextlib.suppress(storage.Conflict):
            address = passed_address(environment, container, image.partition("@")[2])
            storage.write(address, f"{submit_build.commit()}\n".encode(), if_generation_match=0)


def build_here(container: Container, settings: Settings, address: str, tag: str) -> None:
    """Build an image with this machine's Docker, under the name that it has in a registry; it is not pushed.

    Raises:
        UserError: the files here are not those of the tag, or Docker failed.
    """
    if container.tag() != tag:
        raise UserError(
            f"the files that go into {container.name} make the tag {container.tag()} here, and {tag} is asked for: "
            "what was sent is not what is meant. Does .gcloudignore leave out a file that goes in?"
        )
    containers.build(container, f"{address}:{tag}", settings)


def tell(line: str) -> None:
    """A line of progress, written at once: others are written meanwhile."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def keep(made: Mapping[str, str], environment: Environment) -> None:
    """Write the digests to build/images.json, and beside the builds in the bucket."""
    DIGESTS.parent.mkdir(exist_ok=True)
    manifest.write_json(DIGESTS, dict(made))
    content = (json.dumps(made, indent=2, sort_keys=True) + "\n").encode()
    storage.write(f"{environment.builds}/images.json", content)


def read() -> dict[str, str]:
    """What `keep` has written.

    Raises:
        UserError: it has not.
    """
    if not DIGESTS.is_file():
        raise UserError(f"there is no {DIGESTS}. Type first: make images")
    return {
        name: str(image)
        for name, image in command_line.read_json(str(DIGESTS), str(DIGESTS)).items()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="make images", description="Let the registry have the images of this code."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a container, such as train; otherwise all"
    )
    parser.add_argument("--image", help="build one image here, for this address without a tag")
    parser.add_argument("--tag", help="with --image: the tag that its files must make")
    asked = parser.parse_args()
    settings = load_settings()
    wanted = containers.find(project_root(), asked.names)
    if asked.image or asked.tag:
        if not (asked.image and asked.tag and len(wanted) == 1):
            raise UserError("to build one image here: make image NAME=train IMAGE=ADDRESS TAG=TAG")
        build_here(wanted[0], settings, asked.image, asked.tag)
        return
    environment = resolve_environment(settings)
    made = make(wanted, settings, environment)
    if not asked.names:
        keep(made, environment)
        print(f"{DIGESTS}: {len(made)} images by digest")


if __name__ == "__main__":
    run_command(main)
