"""What each image of a push holds (SBOM), written in CycloneDX's form beside the builds: make sbom.

The image itself is asked, because it alone knows what was installed in the end: Debian's packages, and Python's, torch among
them. PLACE/builds/contents/NAME/DIGEST.json is written once, for the image that has this digest.
"""

import argparse
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot5
from packageurl import PackageURL

from core.errors import UserError, run_command
from gcp import storage
from gcp.environment import Environment, resolve_environment
from level_1_pipeline import together
from level_2_cicd import builds, submit_build
from project.settings import load_settings

# Runs in the image, with its own Python and nothing else.
ASK = """
import json, pathlib, re
from importlib import metadata
status = pathlib.Path("/var/lib/dpkg/status")
packages = re.split(r"\\n{2,}", status.read_text(encoding="utf-8")) if status.exists() else []
fields = [dict(re.findall(r"^(\\S+): (.*)$", package, re.MULTILINE)) for package in packages]
found = [("deb", one["Package"], one["Version"]) for one in fields if one.get("Status", "").endswith(" installed")]
found += [("pypi", one.metadata["Name"], one.version) for one in metadata.distributions()]
print(json.dumps(sorted(set(found))))
"""


@dataclass(frozen=True, order=True)
class Package:
    """What an image holds: kind is deb or pypi."""

    kind: str
    name: str
    version: str

    @property
    def address(self) -> PackageURL:
        """The package's name all over the world (github.com/package-url/purl-spec)."""
        name = self.name.lower().replace("_", "-") if self.kind == "pypi" else self.name
        return PackageURL(self.kind, "debian" if self.kind == "deb" else None, name, self.version)


def ask(image: str) -> list[Package]:
    """What an image says that it holds; Docker fetches it, if it is not here.

    Raises:
        UserError: there is no Docker, the image cannot be had, or it has no Python.
    """
    command = [
        "docker",
        "run",
        "--rm",
        "--network=none",
        "--read-only",
        "--entrypoint=python",
        image,
        "-c",
        ASK,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("docker is not installed: see docs.docker.com/engine/install") from None
    if done.returncode != 0:
        raise UserError(
            f"{image} does not say what it holds: {(done.stderr.strip().splitlines() or ['no reason is told'])[-1]}"
        )
    return [Package(*one) for one in json.loads(done.stdout)]


def document(name: str, image: str, packages: Sequence[Package]) -> str:
    """The list in CycloneDX 1.5, as JSON."""
    own = Component(
        name=name, version=image.partition("@")[2], type=ComponentType.CONTAINER, bom_ref=image
    )
    parts = [
        Component(
            name=one.name,
            version=one.version,
            purl=one.address,
            type=ComponentType.LIBRARY,
            bom_ref=str(one.address),
        )
        for one in packages
    ]
    made = Bom(components=parts)
    made.metadata.component = own
    made.register_dependency(own, parts)
    return JsonV1Dot5(made).output_as_string(indent=1)


def address(environment: Environment, name: str, image: str) -> str:
    """Where an image's list is kept."""
    return f"{environment.builds}/contents/{name}/{image.rpartition(':')[2]}.json"


def keep(images: Mapping[str, str], environment: Environment) -> None:
    """Keep the list of each image, unless it is there.

    Args:
        images: container → its image by digest.

    Raises:
        UserError: tells every failure.
    """

    def keep_one(name: str, image: str) -> None:
        kept = address(environment, name, image)
        if storage.generation(kept) is None:
            packages = ask(image)
            storage.write(kept, document(name, image, packages).encode())
            builds.tell(f"✓ {name:<12} {len(packages)} packages  {kept}")

    together.gather({name: partial(keep_one, name, image) for name, image in images.items()})


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(
        prog="make sbom", description="Keep a list of what each image of this push holds."
    ).parse_args()
    environment = resolve_environment(load_settings())
    submit_build.level_2(environment)
    keep(builds.read(), environment)


if __name__ == "__main__":
    run_command(main)
