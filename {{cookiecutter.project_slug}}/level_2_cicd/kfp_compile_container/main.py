"""Compiles the pipeline for the cloud, checks it, and publishes it with its parameters; nothing runs yet.

python -m level_2_cicd.kfp_compile_container.main --images '{"train": "ADDRESS@sha256:…", …}'          kfp_compile_container runs it

It works in the project's folder. It prints one line of JSON: where the template and its parameters are. Their folder is
named by their content, so what was published is never changed, and the same again is the same place. The commit stands
beside the parameters: each run with them bears it as a label, and each model as its code's version.
"""

import argparse
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core import manifest
from core.errors import UserError, run_command
from gcp import pipeline_template, pipeline_version, storage
from gcp.environment import Environment, resolve_environment
from level_1_pipeline import parameters
from level_1_pipeline.parameters import IMAGES
from project import git
from project.settings import Settings, load_settings


@dataclass(frozen=True)
class PipelineRelease:
    """What is published.

    Attributes:
        name: the pipeline's.
        template: the compiled pipeline, as YAML, for the registry; pipeline: the same as JSON, for the bucket.
        values: its parameters and its labels, as JSON; see kfp_template.read_parameters.
    """

    name: str
    template: bytes
    pipeline: bytes
    values: bytes

    @property
    def version(self) -> str:
        """A hash of all of it."""
        return hashlib.sha256(self.pipeline + b"\n" + self.values).hexdigest()[:16]


def make(
    settings: Settings, environment: Environment, images: Mapping[str, str], csv: str, commit: str
) -> PipelineRelease:
    """Compile the pipeline, and put its parameters beside it.

    Args:
        csv: the rows' gs:// address; empty when only an event will tell it.
        commit: the code's version; empty: none is known.

    Raises:
        UserError: an image is not named by its digest, a job is none, the pipeline has a mistake, or the parameters do not
            fit it.
    """
    from level_1_pipeline import (
        compile as pipeline_compiler,  # kfp takes a second: what is wrong with the settings is told before
    )

    missing = [
        name for name in IMAGES if not re.fullmatch(pipeline_compiler.DIGEST, images.get(name, ""))
    ]
    if missing:
        raise UserError(
            f"--images: {', '.join(missing)} must be named, as ADDRESS@sha256:… with 64 digits."
        )
    values = parameters.for_cloud(settings, environment, images, csv)
    if not csv:
        del values["csv"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pipeline.yaml")
        pipeline_compiler.compile_for_cloud(images, path)
        template = path.read_bytes()
    spec = yaml.safe_load(template)
    pipeline_template.check_parameters(
        spec, {"csv": "given by the event", **values, "run": "given at the start"}
    )
    document = {"labels": {"commit": commit} if commit else {}, "parameters": values}
    return PipelineRelease(spec["pipelineInfo"]["name"], template, _json(spec), _json(document))


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def publish(
    made: PipelineRelease, environment: Environment, templates: str, tag: str
) -> dict[str, str | None]:
    """Send it to the template registry and to the bucket; may be repeated.

    Args:
        templates: the registry's address; empty: there is none (level 1).
        tag: the template's, in the registry.

    Returns:
        template: its address, by hash; sha256: that; pipeline, parameters: their gs:// addresses; version: their folder's.

    Raises:
        UserError: something was refused, or is not there.
    """
    told: dict[str, str | None] = {"template": None, "sha256": None}
    if templates:
        version = upload(made, templates, tag)
        told = {
            "template": f"{templates}/{made.name}/{version}",
            "sha256": version.removeprefix("sha256:"),
        }
    folder = f"{pipeline_version.templates_folder(environment)}/{made.version}"
    for name, content in (("pipeline", made.pipeline), ("parameters", made.values)):
        told[name] = f"{folder}/{name}.json"
        write_once(f"{folder}/{name}.json", content)
    return {**told, "version": made.version}


def upload(made: PipelineRelease, templates: str, tag: str) -> str:
    """Send the template to its registry, as kfp's own client does; returns the version that it has there: sha256:….

    Raises:
        ApiError: it was refused, or nobody answers.
        UserError: the answer is not what was expected.
    """
    files = {"content": ("pipeline.yaml", made.template)}
    what = f"publishing the template to {templates}"
    asked = pipeline_template.ask_registry(
        "POST", templates, what, data={"tags": registry_tag(tag)}, files=files
    )
    answer = str(asked.text).strip()
    name, _, version = answer.partition("/")
    if name != made.name or not re.fullmatch(r"sha256:[0-9a-f]{64}", version):
        raise UserError(
            f"{what}: the registry answered '{answer[:100]}' instead of {made.name}/sha256:…."
        )
    return version


def registry_tag(version: str) -> str:
    """A code version as a tag."""
    return re.sub(r"[^a-z0-9._-]+", "-", version.lower()).strip("-._")[:128] or "unknown"


def version_of_code(given: str, needed: bool) -> str:
    """The commit that was given, or that git tells, or nothing.

    Raises:
        UserError: it is needed, and nobody knows it.
    """
    commit = given or git.version().removesuffix("unknown")
    if needed and not commit:
        raise UserError(
            "--commit: nobody could tell from which code a published pipeline came, because git knows no commit here. Commit the "
            "project first, or name one: --commit 1a2b3c."
        )
    return commit


def write_once(address: str, content: bytes) -> None:
    """Write an object that is there already only if it is the same.

    Raises:
        UserError: it is there, and not the same; or it cannot be written.
    """
    try:
        storage.write(address, content, if_generation_match=0)
    except storage.Conflict:
        there = storage.read(address)
        if there is None or there[0] != content:
            raise UserError(
                f"{address} is there already with other content. `gcloud storage rm {address}` removes it."
            ) from None


def read_images(text: str) -> dict[str, str]:
    """Container → its image, from JSON or where it is.

    Raises:
        UserError: it is something else.
    """
    images = pipeline_template.read_json(text, "--images")
    if not isinstance(images, dict):
        raise UserError('--images: wants a JSON object, such as {"train": "ADDRESS@sha256:…"}.')
    wrong = [name for name, image in images.items() if not isinstance(image, str)]
    if wrong:
        raise UserError(f"--images: {', '.join(wrong)}: wants an image's address.")
    return images


def rows(settings: Settings, given: str) -> str:
    """The address of the rows to train on: the one that is given, or data.source where that is in a bucket, or none yet."""
    if given and not given.startswith("gs://"):
        raise UserError(
            f"--csv {given}: wants a gs:// address; a step in the cloud sees no file of this machine."
        )
    return given or (settings.data.source if settings.data.source.startswith("gs://") else "")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m level_2_cicd.kfp_compile_container.main",
        description="Compile and publish the pipeline.",
    )
    names = ", ".join(IMAGES)
    parser.add_argument(
        "--images", required=True, help=f"JSON, or a file with it: {names} → an address by digest"
    )
    parser.add_argument("--environment", help="of project.yaml; otherwise the first one")
    parser.add_argument(
        "--csv",
        default="",
        help="the rows' gs:// address; otherwise data.source, or each event tells it",
    )
    parser.add_argument(
        "--templates",
        help="the template registry's address; otherwise it follows from project.yaml",
    )
    parser.add_argument(
        "--commit",
        default="",
        help="the code's version, which every run bears; otherwise git tells it",
    )
    parser.add_argument(
        "--tag", default="", help="of the template in its registry; otherwise the commit"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="also write pipeline.json and parameters.json there",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="compile and check, print the parameters, publish nothing",
    )
    asked = parser.parse_args()
    settings = load_settings()
    environment = resolve_environment(settings, asked.environment)
    commit = version_of_code(asked.commit, needed=not asked.dry_run)
    made = make(settings, environment, read_images(asked.images), rows(settings, asked.csv), commit)
    if asked.output:
        asked.output.mkdir(parents=True, exist_ok=True)
        manifest.write_bytes(asked.output / "pipeline.json", made.pipeline)
        manifest.write_bytes(asked.output / "parameters.json", made.values)
    if asked.dry_run:
        print(made.values.decode(), end="")
        return
    templates = (
        asked.templates
        if asked.templates is not None
        else ""
        if environment.by_hand
        else environment.templates
    )
    print(json.dumps(publish(made, environment, templates, asked.tag or commit)))


if __name__ == "__main__":
    run_command(main)
