"""A published pipeline: read from where it was published, and asked whether parameters fit it.

Only the standard library is imported at the top: a mistake in a parameter is told before Google's packages are loaded.
"""

import difflib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from core.errors import UserError
from gcp.command_line import parse, read_json, read_text


def is_number(value: Any) -> bool:
    """Whether it is a number that JSON knows; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# What a compiled pipeline calls its parameters' types: what a person calls them, and how a value is recognised.
TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "STRING": ("a text", lambda value: isinstance(value, str)),
    "BOOLEAN": ("true or false", lambda value: isinstance(value, bool)),
    "NUMBER_INTEGER": (
        "a whole number",
        lambda value: is_number(value) and float(value).is_integer(),
    ),
    "NUMBER_DOUBLE": ("a number", is_number),
    "LIST": ("a list, such as [1, 2]", lambda value: isinstance(value, list)),
    "STRUCT": ('a mapping, such as {"epochs": 40}', lambda value: isinstance(value, dict)),
}


# ── the template ────────────────────────────────────────────────────────────────────────────────────────────────────
def read(address: str) -> dict[str, Any]:
    """A compiled pipeline (PipelineSpec as JSON or YAML).

    Args:
        address: a file, gs://BUCKET/OBJECT, or https://REGION-kfp.pkg.dev/PROJECT/REPOSITORY/NAME/VERSION.

    Raises:
        UserError: it cannot be had, or is no pipeline.
    """
    if address.startswith(("https://", "http://")):
        content = str(ask_registry("GET", address, f"reading the template {address}").text)
    else:
        content = read_text(address, "--template")
    return parse_spec(content, address)


def parse_spec(content: str, address: str) -> dict[str, Any]:
    """A compiled pipeline, from its text.

    Args:
        address: where it came from, for the message.

    Raises:
        UserError: it is none.
    """
    try:
        spec = parse(content) if content.lstrip().startswith("{") else _parse_yaml(content)
    except ValueError as error:
        raise UserError(f"{address} is no compiled pipeline: {error}.") from None
    if (
        not isinstance(spec, dict)
        or not {"pipelineInfo", "root", "components", "deploymentSpec"} <= spec.keys()
    ):
        raise UserError(
            f"{address} is no compiled pipeline: level_2_cicd.kfp_compile_container.main makes one."
        )
    return spec


def ask_registry(method: str, address: str, what: str, **options: Any) -> Any:
    """One request to a template registry, with a deadline, and again when the world failed; http:// is one without credentials.

    What is uploaded is named by its content, so an upload may be repeated too.

    Raises:
        ApiError: it was refused, or not answered.
        UserError: there are no credentials.
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

    def ask() -> requests.Response:
        response = session.request(method, address, timeout=api.DEADLINE, **options)
        if not response.ok:
            raise exceptions.from_http_response(response)
        return response

    try:
        with session:
            return api.retry_policy()(ask)()
    except Exception as error:
        raise api.explain(error, what) from error


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 (both are safe)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def tasks(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every task of the pipeline, those within conditions too; to read or to change."""
    graphs = [spec["root"], *spec["components"].values()]
    return [task for graph in graphs for task in graph.get("dag", {}).get("tasks", {}).values()]


def steps(spec: Mapping[str, Any]) -> list[str]:
    """The names of the tasks that are containers: what people call steps."""
    containers = {
        name for name, component in spec["components"].items() if "executorLabel" in component
    }
    graphs = [spec["root"], *spec["components"].values()]
    named = [item for graph in graphs for item in graph.get("dag", {}).get("tasks", {}).items()]
    return [name for name, task in named if task["componentRef"]["name"] in containers]


# ── its parameters ──────────────────────────────────────────────────────────────────────────────────────────────────
def signature(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters that the pipeline declares: name → parameterType, and defaultValue or isOptional where it has them."""
    declared: dict[str, dict[str, Any]] = (
        spec["root"].get("inputDefinitions", {}).get("parameters", {})
    )
    return declared


def read_parameters(source: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Parameters, and the labels that every run with them bears.

    Args:
        source: JSON, or a file or gs:// address with JSON: what level_2_cicd.kfp_compile_container.main wrote, {"labels": …, "parameters": …},
            or the parameters alone, which bring no labels.

    Raises:
        UserError: it is no JSON object.
    """
    document = read_json(source, "--parameters")
    published = (
        document
        if isinstance(document, dict) and set(document) == {"labels", "parameters"}
        else None
    )
    values, labels = (published["parameters"], published["labels"]) if published else (document, {})
    if not isinstance(values, dict) or not isinstance(labels, dict):
        raise UserError('--parameters: wants a JSON object, such as {"csv": "gs://…"}.')
    return values, {key: str(value) for key, value in labels.items()}


def override(
    spec: Mapping[str, Any], values: Mapping[str, Any], assignments: list[str]
) -> dict[str, Any]:
    """The values with KEY=VALUE put over them; VALUE is JSON, except for a text, and KEY may go into a mapping: hyperparameters.epochs.

    Raises:
        UserError: an assignment is none, or its value is no JSON where JSON is wanted.
    """
    changed: dict[str, Any] = json.loads(json.dumps(values))
    for assignment in assignments:
        path, value = assigned(spec, assignment)
        put(changed, path, value, f"--set {assignment}")
    return changed


def assigned(spec: Mapping[str, Any], assignment: str) -> tuple[str, Any]:
    """KEY=VALUE as the key and the value that it means; see `override`.

    Raises:
        UserError: it is none, or its value is no JSON where JSON is wanted.
    """
    path, equals, text = assignment.partition("=")
    if not equals:
        raise UserError(
            f"--set {assignment}: is not KEY=VALUE, such as threshold=0.9 or hyperparameters.epochs=50."
        )
    if signature(spec).get(path, {}).get("parameterType") == "STRING":
        return path, text
    try:
        return path, parse(text)
    except ValueError:
        raise UserError(
            f"--set {assignment}: the value is no JSON; a text in a mapping wants quotes: '\"text\"'."
        ) from None


def put(values: dict[str, Any], path: str, value: Any, what: str) -> None:
    """Set one value; its path may go into a mapping: hyperparameters.epochs.

    Args:
        what: where this was asked for, for the message.

    Raises:
        UserError: the path goes into what is no mapping.
    """
    *parents, key = path.split(".")
    if not all([*parents, key]):
        raise UserError(f"{what}: '{path}' is no key, such as threshold or hyperparameters.epochs.")
    block: Any = values
    for parent in parents:
        block = block.setdefault(parent, {}) if isinstance(block, dict) else None
    if not isinstance(block, dict):
        raise UserError(f"{what}: '{'.'.join(parents)}' is no mapping.")
    block[key] = value


def check_parameters(spec: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Compare parameters with those that the template declares.

    Raises:
        UserError: names all that are unknown, missing or of another type.
    """
    declared = signature(spec)
    problems = [_unknown(name, list(declared)) for name in values if name not in declared]
    for name, parameter in declared.items():
        if name in values:
            problems += _mistyped(name, parameter, values[name])
        elif "defaultValue" not in parameter and not parameter.get("isOptional"):
            problems.append(
                f"{name}: is missing; it wants {TYPES.get(parameter['parameterType'], ('a value',))[0]}."
            )
    if problems:
        name = spec["pipelineInfo"]["name"]
        raise UserError(
            f"the parameters do not fit the pipeline {name}; nothing was sent:\n  "
            + "\n  ".join(problems)
        )


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"{name}: there is no such parameter; " + (
        f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}."
    )


def _mistyped(name: str, parameter: Mapping[str, Any], value: Any) -> list[str]:
    wanted, fits = TYPES.get(parameter["parameterType"], ("", lambda _: True))
    if not fits(value):
        shown = json.dumps(value, ensure_ascii=False)
        return [
            f"{name}: wants {wanted}; it is {shown if len(shown) <= 60 else shown[:60] + ' …'}."
        ]
    literals = parameter.get("literals")
    return (
        [f"{name}: must be one of {', '.join(map(str, literals))}; it is {value}."]
        if literals and value not in literals
        else []
    )
