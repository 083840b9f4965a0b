"""Store an SBOM (software bill of materials, CycloneDX) of each image of a push: make sbom.

SBOMs are stored in the bucket as builds/contents/CONTAINER/DIGEST.json, once per digest.
"""

import argparse
import json
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot5
from packageurl import PackageURL

from core.errors import UserError, run_command
from gcp import storage
from gcp.environment import Environment, resolve_environment
from level_1_pipeline import containers
from level_2_cicd import builds, submit_build
from project.settings import load_settings

# Runs inside the image, because only the image shows which Debian and Python packages were
# installed. Uses the standard library only; prints a list of [kind, name, version].
LIST_PACKAGES = """
import json, pathlib, re
from importlib import metadata
status = pathlib.Path("/var/lib/dpkg/status")
texts = re.split(r"\\n{2,}", status.read_text(encoding="utf-8")) if status.exists() else []
debs = [dict(re.findall(r"^(\\S+): (.*)$", text, re.MULTILINE)) for text in texts]
packages = {("deb", deb["Package"], deb["Version"])
            for deb in debs if deb.get("Status", "").endswith(" installed")}
packages |= {("pypi", one.metadata["Name"], one.version) for one in metadata.distributions()}
print(json.dumps(sorted(packages)))
"""


def list_packages(image: str) -> list[PackageURL]:
    """Return the packages in an image; Docker pulls the image if needed."""
    # Listing files needs neither network nor write access.
    options = ["--rm", "--network=none", "--read-only", "--entrypoint=python"]
    command = ["docker", "run", *options, image, "-c", LIST_PACKAGES]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("docker is not installed: see docs.docker.com/engine/install") from None
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"cannot list the packages of {image}: {reason}")
    return [
        PackageURL(kind, "debian" if kind == "deb" else None, name, version)
        for kind, name, version in json.loads(result.stdout)
    ]


def format_sbom(name: str, image: str, packages: Sequence[PackageURL]) -> str:
    """Return the SBOM as CycloneDX 1.5 JSON."""
    kind, digest = ComponentType.CONTAINER, image.partition("@")[2]
    component = Component(name=name, version=digest, type=kind, bom_ref=image)
    parts = [
        Component(
            name=package.name,
            version=package.version,
            purl=package,
            type=ComponentType.LIBRARY,
            bom_ref=str(package),
        )
        for package in packages
    ]
    # CycloneDX describes the image as the root component that depends on its packages.
    bom = Bom(components=parts)
    bom.metadata.component = component
    bom.register_dependency(component, parts)
    return JsonV1Dot5(bom).output_as_string(indent=1)


def sbom_uri(environment: Environment, name: str, image: str) -> str:
    """Return the URI of an image's SBOM."""
    return f"{environment.builds}/contents/{name}/{image.rpartition(':')[2]}.json"


def store_sboms(images: Mapping[str, str], environment: Environment) -> None:
    """Store the missing SBOMs of container → image by digest; one failure stops no other."""

    def store(name: str, image: str) -> None:
        uri = sbom_uri(environment, name, image)
        # A digest names fixed content, so an existing SBOM is never outdated.
        if storage.generation(uri) is None:
            packages = list_packages(image)
            storage.write(uri, format_sbom(name, image, packages).encode())
            builds.log(f"✓ {name:<12} {len(packages)} packages  {uri}")

    containers.run_parallel({name: partial(store, name, image) for name, image in images.items()})


def main() -> None:
    """Store the SBOMs of the images in build/images.json."""
    argparse.ArgumentParser(
        prog="make sbom", description="Store the packages of each image of this push."
    ).parse_args()
    environment = resolve_environment(load_settings())
    submit_build.require_level_2(environment)
    store_sboms(builds.read_digests(), environment)


if __name__ == "__main__":
    run_command(main)
