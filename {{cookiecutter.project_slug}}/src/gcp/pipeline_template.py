"""Compiled pipelines and their parameters: read, override, check.

Google's packages are imported only for a download: invalid parameters are reported before that.
"""

import difflib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from core.errors import UserError


def is_number(value: Any) -> bool:
    """Whether it is a JSON number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Parameter type of a compiled pipeline → its description, and a check of a value.
TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "STRING": ("text", lambda value: isinstance(value, str)),
    "BOOLEAN": ("true or false", lambda value: isinstance(value, bool)),
    "NUMBER_INTEGER": (
        "an integer",
        lambda value: is_number(value) and float(value).is_integer(),
    ),
    "NUMBER_DOUBLE": ("a number", is_number),
    "LIST": ("a list, such as [1, 2]", lambda value: isinstance(value, list)),
    "STRUCT": ('a mapping, such as {"epochs": 40}', lambda value: isinstance(value, dict)),
}


def parse(text: str) -> Any:
    """Parse JSON; refuse NaN and Infinity, which only Python accepts."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    return json.loads(text, parse_constant=refuse)


def read_text(address: str, what: str) -> str:
    """Read a file, or an object in a bucket."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(address)
        if address.startswith("gs://"):
            from gcp import storage

            path = storage.fetch(address, Path(folder))
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{what} {address}: cannot be read: {reason}.") from None


def read_json(source: str, option: str) -> Any:
    """Read JSON: the text itself, or a file or gs:// address that contains it."""
    text = source if source.lstrip()[:1] in {"{", "["} else read_text(source, option)
    try:
        return parse(text)
    except ValueError as error:
        raise UserError(
            f"{option}: expected JSON, or a file or gs:// address with JSON: {error}."
        ) from None


def pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """Parse repeated KEY=VALUE options."""
    items = [text.partition("=") for text in texts]
    for key, equals, value in items:
        if not key or not equals:
            raise UserError(
                f"{option} {key}{equals}{value}: expected KEY=VALUE, such as commit=1a2b3c."
            )
    return {key: value for key, _, value in items}


def read(address: str) -> dict[str, Any]:
    """Read a compiled pipeline (PipelineSpec as JSON or YAML).

    Args:
        address: a file, gs://BUCKET/OBJECT, or https://REGION-kfp.pkg.dev/PROJECT/REPOSITORY/NAME/VERSION.
    """
    if address.startswith(("https://", "http://")):
        content = str(ask_registry("GET", address, f"reading the template {address}").text)
    else:
        content = read_text(address, "--template")
    return parse_spec(content, address)


def parse_spec(content: str, address: str) -> dict[str, Any]:
    """Parse a compiled pipeline.

    Args:
        address: its origin, for the error message.
    """
    try:
        spec = parse(content) if content.lstrip().startswith("{") else _parse_yaml(content)
    except ValueError as error:
        raise UserError(f"{address} is not a compiled pipeline: {error}.") from None
    if (
        not isinstance(spec, dict)
        or not {"pipelineInfo", "root", "components", "deploymentSpec"} <= spec.keys()
    ):
        raise UserError(f"{address} is not a compiled pipeline; kfp_compile_container makes one.")
    return spec


def ask_registry(method: str, address: str, what: str, **options: Any) -> Any:
    """Send a request to a registry, with a deadline and retries; without credentials to http://.

    Uploads are named by their content, so they may be retried too.
    """
    import google.auth
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import DefaultCredentialsError
    from google.auth.transport.requests import AuthorizedSession

    from gcp import client as api

    try:
        scopes = ["https://www.googleapis.com/auth/cloud-platform"]
        session = (
            AuthorizedSession(google.auth.default(scopes)[0])
            if address.startswith("https://")
            else requests.Session()
        )
    except DefaultCredentialsError:
        raise UserError(api.NO_CREDENTIALS) from None

    def send() -> requests.Response:
        response = session.request(method, address, timeout=api.DEADLINE, **options)
        if not response.ok:
            raise exceptions.from_http_response(response)
        return response

    try:
        with session:
            return api.retry_policy()(send)()
    except Exception as error:
        raise api.explain(error, what) from error


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 (both are safe)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def tasks(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all tasks, those within conditions too; they may be changed."""
    graphs = [spec["root"], *spec["components"].values()]
    return [task for graph in graphs for task in graph.get("dag", {}).get("tasks", {}).values()]


def steps(spec: Mapping[str, Any]) -> list[str]:
    """Return the names of the tasks that run containers."""
    containers = {
        name for name, component in spec["components"].items() if "executorLabel" in component
    }
    graphs = [spec["root"], *spec["components"].values()]
    named = [item for graph in graphs for item in graph.get("dag", {}).get("tasks", {}).items()]
    return [name for name, task in named if task["componentRef"]["name"] in containers]


def signature(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the declared parameters: name → parameterType, and maybe defaultValue or isOptional."""
    declared: dict[str, dict[str, Any]] = (
        spec["root"].get("inputDefinitions", {}).get("parameters", {})
    )
    return declared


def read_parameters(source: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Read parameters, and the labels of every run with them.

    Args:
        source: JSON, or a file or gs:// address with it: {"labels": …, "parameters": …} as
            kfp_compile_container writes it, or the parameters alone.
    """
    document = read_json(source, "--parameters")
    published = (
        document
        if isinstance(document, dict) and set(document) == {"labels", "parameters"}
        else None
    )
    values, labels = (published["parameters"], published["labels"]) if published else (document, {})
    if not isinstance(values, dict) or not isinstance(labels, dict):
        raise UserError('--parameters: expected a JSON object, such as {"csv": "gs://…"}.')
    return values, {key: str(value) for key, value in labels.items()}


def override(
    spec: Mapping[str, Any], values: Mapping[str, Any], assignments: list[str]
) -> dict[str, Any]:
    """Apply KEY=VALUE assignments to a copy of the values; see `assigned` and `put`."""
    changed: dict[str, Any] = json.loads(json.dumps(values))
    for assignment in assignments:
        path, value = assigned(spec, assignment)
        put(changed, path, value, f"--set {assignment}")
    return changed


def assigned(spec: Mapping[str, Any], assignment: str) -> tuple[str, Any]:
    """Parse KEY=VALUE; VALUE is JSON, except where the pipeline declares text."""
    path, equals, text = assignment.partition("=")
    if not equals:
        raise UserError(
            f"--set {assignment}: expected KEY=VALUE, such as threshold=0.9 or hyperparameters.epochs=50."
        )
    if signature(spec).get(path, {}).get("parameterType") == "STRING":
        return path, text
    try:
        return path, parse(text)
    except ValueError:
        raise UserError(
            f"--set {assignment}: the value is not valid JSON; text in a mapping needs quotes: '\"text\"'."
        ) from None


def put(values: dict[str, Any], path: str, value: Any, what: str) -> None:
    """Set one value; its path may lead into a mapping: hyperparameters.epochs.

    Args:
        what: the origin of the value, for the error message.
    """
    *parents, key = path.split(".")
    if not all([*parents, key]):
        raise UserError(
            f"{what}: '{path}' is not a key, such as threshold or hyperparameters.epochs."
        )
    block: Any = values
    for parent in parents:
        block = block.setdefault(parent, {}) if isinstance(block, dict) else None
    if not isinstance(block, dict):
        raise UserError(f"{what}: '{'.'.join(parents)}' is not a mapping.")
    block[key] = value


def check_parameters(spec: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Check parameters against the declared ones; the error names each problem."""
    declared = signature(spec)
    problems = [_unknown(name, list(declared)) for name in values if name not in declared]
    for name, parameter in declared.items():
        if name in values:
            problems += _mistyped(name, parameter, values[name])
        elif "defaultValue" not in parameter and not parameter.get("isOptional"):
            problems.append(
                f"{name}: missing; expected {TYPES.get(parameter['parameterType'], ('a value',))[0]}."
            )
    if problems:
        name = spec["pipelineInfo"]["name"]
        raise UserError(
            f"the parameters do not fit the pipeline {name}; nothing was sent:\n  "
            + "\n  ".join(problems)
        )


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"{name}: unknown parameter; " + (
        f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}."
    )


def _mistyped(name: str, parameter: Mapping[str, Any], value: Any) -> list[str]:
    expected, fits = TYPES.get(parameter["parameterType"], ("", lambda _: True))
    if not fits(value):
        shown = json.dumps(value, ensure_ascii=False)
        return [
            f"{name}: expected {expected}; got {shown if len(shown) <= 60 else shown[:60] + ' …'}."
        ]
    literals = parameter.get("literals")
    return (
        [f"{name}: expected one of {', '.join(map(str, literals))}; got {value}."]
        if literals and value not in literals
        else []
    )
