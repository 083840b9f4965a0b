"""Published pipeline versions, and which of them is current.

Their folder is gs://…/templates/train-and-register. kfp_compile_container writes
VERSION/pipeline.json and VERSION/parameters.json there, which never change; current.json names the
version that an event starts.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from core.errors import UserError
from gcp import pipeline_template, storage
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
    """The version does not exist, or none is current yet."""


class InvalidPointer(UserError):
    """current.json cannot be read."""

    def __init__(self, message: str, generation: int) -> None:
        super().__init__(f"{message}. The next build that passes its tests rewrites it.")
        self.generation = generation


@dataclass(frozen=True)
class PipelineVersion:
    """A published version; immutable.

    Attributes:
        address: of the compiled pipeline; spec: its content.
        values, labels: the parameters, and the labels of every run.
    """

    version: str
    address: str
    spec: dict[str, Any]
    values: dict[str, Any]
    labels: dict[str, str]


def read(folder: str, version: str = "") -> PipelineVersion:
    """Read a version, by default the current one.

    Args:
        folder: the gs:// folder of the versions.
    """
    if not version:
        pointer = read_pointer(folder)
        if pointer is None:
            raise NotPublished(
                f"nothing is published yet: {folder}/{POINTER} does not exist. "
                "The first build that passes its tests writes it."
            )
        version = pointer["version"]
    if not re.fullmatch(VERSION, version):
        raise NotPublished(
            f"'{version[:40]}' is not a version; expected 16 digits, such as 0123456789abcdef."
        )
    return _version(folder, version)


@lru_cache(maxsize=4)  # a version never changes
def _version(folder: str, version: str) -> PipelineVersion:
    address = f"{folder}/{version}/pipeline.json"
    objects = [
        storage.read(f"{folder}/{version}/{name}.json") for name in ("pipeline", "parameters")
    ]
    if objects[0] is None or objects[1] is None:
        raise NotPublished(f"version {version} is not published: {address} does not exist.")
    try:
        pipeline, parameters = objects[0][0].decode(), objects[1][0].decode()
    except UnicodeDecodeError:
        raise UserError(f"{folder}/{version} is not valid JSON.") from None
    values, labels = pipeline_template.read_parameters(parameters)
    return PipelineVersion(
        version, address, pipeline_template.parse_spec(pipeline, address), values, labels
    )


def read_pointer(folder: str) -> dict[str, Any] | None:
    """Read current.json; None if nothing is current yet."""
    return _read_pointer(folder)[0]


def _read_pointer(folder: str) -> tuple[dict[str, Any] | None, int]:
    """Read current.json and its generation; 0 if it does not exist."""
    address = f"{folder}/{POINTER}"
    current = storage.read(address)
    if current is None:
        return None, 0
    content, generation = current
    try:
        document = pipeline_template.parse(content.decode())
    except ValueError as error:
        raise InvalidPointer(f"{address} is not valid JSON: {error}", generation) from None
    if not isinstance(document, dict) or not re.fullmatch(VERSION, str(document.get("version"))):
        raise InvalidPointer(f"{address} names no version", generation)
    return document, generation


def is_later(pointer: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    """Whether one build began after the other: if they end out of order, the later push wins."""
    return other is None or str(pointer["began"]) >= str(other.get("began", ""))


def write_pointer(folder: str, pointer: Mapping[str, Any]) -> bool:
    """Make a version the current one, unless a later build has released another.

    Args:
        pointer: the output of kfp_compile_container, the commit, and the start of the build
            (ISO 8601, UTC).

    Returns:
        Whether it is the current one now.
    """
    missing = [name for name in FIELDS if name not in pointer]
    if missing:
        raise UserError(f"{POINTER}: missing {', '.join(missing)}.")
    if not re.fullmatch(VERSION, str(pointer["version"])):
        raise UserError(f"{POINTER}: '{pointer['version']}' is not a version; expected 16 digits.")
    content = (json.dumps({name: pointer[name] for name in FIELDS}, indent=1) + "\n").encode()
    while True:
        try:
            current, generation = _read_pointer(folder)
        except InvalidPointer as error:
            current, generation = None, error.generation
        if not is_later(pointer, current):
            return False
        try:
            storage.write(f"{folder}/{POINTER}", content, if_generation_match=generation)
        except storage.Conflict:
            continue  # another build wrote meanwhile: compare again
        return True


def templates_folder(environment: Environment) -> str:
    """Return the gs:// folder of the published versions and current.json."""
    return f"{environment.storage}/templates/{NAME}"


def read_current(environment: Environment) -> dict[str, Any] | None:
    """Read the pointer to the version that events start; None if missing or invalid."""
    try:
        return read_pointer(templates_folder(environment))
    except InvalidPointer:
        return None  # the next build rewrites it


def write_current(environment: Environment, pointer: Mapping[str, Any]) -> bool:
    """Make a version the current one; see `write_pointer`."""
    return write_pointer(templates_folder(environment), pointer)
