"""The published pipelines, as whoever starts a run finds them: which version is current, and what is in a version.

Their folder is gs://…/templates/train-and-register. level_2_cicd.kfp_compile_container.main writes VERSION/pipeline.json and
VERSION/parameters.json there, which never change; current.json names the version that an event starts. Only the standard
library is imported until something is read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from core.errors import UserError
from gcp import command_line, pipeline_template, storage
from gcp.environment import Environment

NAME = "train-and-register"  # as level_1_pipeline/pipeline.py calls the pipeline
POINTER = "current.json"
VERSION = r"[0-9a-f]{16}"
FIELDS = (
    "version",
    "pipeline",
    "parameters",
    "template",
    "sha256",
    "commit",
    "began",
)  # of the pointer


class NotPublished(UserError):
    """There is no such version, or none is current yet."""


class Damaged(UserError):
    """What says which version is current cannot be read."""

    def __init__(self, message: str, generation: int) -> None:
        super().__init__(f"{message}. The next build that passes its tests writes it anew.")
        self.generation = generation


@dataclass(frozen=True)
class Published:
    """A version; not to be changed.

    Attributes:
        address: where the compiled pipeline is; spec: the pipeline.
        values, labels: its parameters, and what every run with them bears.
    """

    version: str
    address: str
    spec: dict[str, Any]
    values: dict[str, Any]
    labels: dict[str, str]


def read(folder: str, version: str = "") -> Published:
    """A version, or the current one.

    Args:
        folder: the gs:// address below which the versions are.

    Raises:
        NotPublished: there is none.
        UserError: it cannot be read, or is no pipeline.
    """
    if not version:
        pointer = read_pointer(folder)
        if pointer is None:
            raise NotPublished(
                f"nothing is published yet: there is no {folder}/{POINTER}. The first build that passes its tests writes it."
            )
        version = pointer["version"]
    if not re.fullmatch(VERSION, version):
        raise NotPublished(
            f"'{version[:40]}' is no version; one has 16 digits, such as 0123456789abcdef."
        )
    return _version(folder, version)


@lru_cache(maxsize=4)  # a version never changes
def _version(folder: str, version: str) -> Published:
    address = f"{folder}/{version}/pipeline.json"
    found = [storage.read(f"{folder}/{version}/{name}.json") for name in ("pipeline", "parameters")]
    if found[0] is None or found[1] is None:
        raise NotPublished(f"version {version} is not published: there is no {address}.")
    try:
        pipeline, parameters = found[0][0].decode(), found[1][0].decode()
    except UnicodeDecodeError:
        raise UserError(f"what is in {folder}/{version} is no JSON.") from None
    values, labels = pipeline_template.read_parameters(parameters)
    return Published(
        version, address, pipeline_template.parse_spec(pipeline, address), values, labels
    )


def read_pointer(folder: str) -> dict[str, Any] | None:
    """What current.json says; None where nothing is current yet.

    Raises:
        Damaged: it is no JSON, or names no version.
        UserError: it cannot be read.
    """
    return _read_pointer(folder)[0]


def _read_pointer(folder: str) -> tuple[dict[str, Any] | None, int]:
    """The same, and the object's generation; 0 where it is not there."""
    address = f"{folder}/{POINTER}"
    found = storage.read(address)
    if found is None:
        return None, 0
    content, generation = found
    try:
        document = command_line.parse(content.decode())
    except ValueError as error:
        raise Damaged(f"{address} is no JSON: {error}", generation) from None
    if not isinstance(document, dict) or not re.fullmatch(VERSION, str(document.get("version"))):
        raise Damaged(f"{address} names no version", generation)
    return document, generation


def is_later(told: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    """Whether one's build began after the other's: of two builds that end out of order, the later push counts."""
    return other is None or str(told["began"]) >= str(other.get("began", ""))


def write_pointer(folder: str, told: Mapping[str, Any]) -> bool:
    """Make a version the current one: from now on, events start it. What a later build has released stays.

    Args:
        told: the line that level_2_cicd.kfp_compile_container.main printed, the commit, and when the build began, in ISO 8601 and UTC.

    Returns:
        Whether it is the current one.

    Raises:
        UserError: a field is missing, or the object cannot be written.
    """
    missing = [name for name in FIELDS if name not in told]
    if missing:
        raise UserError(f"{POINTER} wants {', '.join(FIELDS)}; {', '.join(missing)} is missing.")
    if not re.fullmatch(VERSION, str(told["version"])):
        raise UserError(
            f"{POINTER}: '{told['version']}' is no version; one has 16 digits, such as 0123456789abcdef."
        )
    content = (json.dumps({name: told[name] for name in FIELDS}, indent=1) + "\n").encode()
    while True:
        try:
            there, generation = _read_pointer(folder)
        except Damaged as error:
            there, generation = None, error.generation
        if not is_later(told, there):
            return False
        try:
            storage.write(f"{folder}/{POINTER}", content, if_generation_match=generation)
        except storage.Conflict:
            continue  # somebody else was quicker: which of the two is later?
        return True


def templates_folder(environment: Environment) -> str:
    """The gs:// folder of the published versions, and of current.json."""
    return f"{environment.storage}/templates/{NAME}"


def read_current(environment: Environment) -> dict[str, Any] | None:
    """What is told of the version that events start: see published.FIELDS; None: there is none yet, or that is damaged.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_pointer(templates_folder(environment))
    except Damaged:
        return None  # a build writes it anew


def write_current(environment: Environment, told: Mapping[str, Any]) -> bool:
    """Let events start another version from now on; see published.write_pointer."""
    return write_pointer(templates_folder(environment), told)
