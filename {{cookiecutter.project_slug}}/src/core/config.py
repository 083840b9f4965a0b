"""Read project.yaml strictly; base class of its blocks."""

import difflib
import os
import shlex
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from core.errors import UserError
from core.paths import PROJECT_FILE, project_root


class Block(BaseModel):
    """Base class of the blocks of project.yaml: frozen, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StrictLoader(yaml.SafeLoader):
    """Load YAML and reject duplicate keys, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_project_file(overrides: str | None = None) -> dict[str, Any]:
    """Read project.yaml and apply the overrides of one run.

    Overrides look like "hyperparameters.epochs=50 data.split_seed=1"; None uses the variable SET.
    """
    path = project_root() / PROJECT_FILE
    try:
        # StrictLoader is a SafeLoader: it creates no arbitrary Python objects.
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{PROJECT_FILE} is not valid YAML: {str(error).replace('<unicode string>', PROJECT_FILE)}"
        ) from None
    if not isinstance(document, dict):
        raise UserError(f"{PROJECT_FILE} is empty, or not a mapping of keys to values.")
    _override(document, os.environ.get("SET", "") if overrides is None else overrides)
    return document


def _override(document: dict[str, Any], overrides: str) -> None:
    """Apply KEY=VALUE assignments to the document in place."""
    try:
        assignments = shlex.split(overrides)
    except ValueError as error:
        raise UserError(f"SET: {overrides!r} cannot be read: {error}.") from None
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        *parents, key = path.split(".")
        block: Any = document
        for parent in parents:
            block = block.get(parent) if isinstance(block, dict) else None
        if not equals or not isinstance(block, dict) or not key:
            near = difflib.get_close_matches(path, _paths(document), 1, 0.7)
            hint = (
                f"did you mean '{near[0]}'?"
                if equals and near
                else 'for example SET="hyperparameters.epochs=50".'
            )
            raise UserError(
                f"SET: '{assignment}' is not KEY=VALUE with a key of {PROJECT_FILE}; {hint}"
            )
        try:
            # Parsed as YAML, so that numbers, booleans and lists get the same types as in the file.
            block[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            hint = "Blanks separate settings: write [a,b] and not [a, b]."
            raise UserError(f"SET: the value of '{assignment}' is not valid YAML. {hint}") from None


def _paths(block: dict[str, Any], prefix: str = "") -> list[str]:
    """Return all keys of nested blocks as dotted paths."""
    paths = []
    for key, value in block.items():
        paths.append(f"{prefix}{key}")
        if isinstance(value, dict):
            paths += _paths(value, f"{prefix}{key}.")
    return paths
