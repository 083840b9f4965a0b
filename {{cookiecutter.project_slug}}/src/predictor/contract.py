"""What a request may say and what is answered: parsing, answering, and both described as OpenAPI.

    {"instances": [{"width": 3.1, "colour": "red"}, …], "parameters": {"top": 2}}      or arrays, in the columns' order
    {"predictions": [{"label": "dog", "score": 0.9, "scores": {"dog": 0.9, "cat": 0.1}}, …], "version": 3}

Nothing in a request can raise anything but `BadRequest`.
"""

import json
from collections.abc import Sequence
from types import NoneType
from typing import Any, NoReturn

import numpy as np

from core import manifest
from core.errors import UserError
from core.onnx_model import Model
from core.schema import Column, Schema

MAX_INSTANCES = 10_000  # in one request; a file of rows is better sent in several
FEW_CLASSES = 20  # up to here the scores of all classes are told, above it …
TOP = 5  # … those of the best, unless the request says how many
EXAMPLES = 20  # categories shown for a column

# Strict, unlike a CSV file's cells: JSON has types, and text for a number is a client's mistake.
TYPES: dict[str, set[type]] = {
    "numeric": {int, float, NoneType},
    "categorical": {str, int, float, NoneType},
}
WANTED = {"numeric": "a number", "categorical": "text"}


class BadRequest(Exception):
    """The request cannot be answered, and the client can mend it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message if len(message) <= 500 else f"{message[:400]} … {message[-99:]}")
        self.status = status


class _Constant:
    """NaN or an infinity: JSON knows none, Python's parser takes them; kept, so that the field can be named."""

    def __init__(self, name: str) -> None:
        self.name = name


def answer(model: Model, version: int | None, body: bytes) -> bytes:
    """The response's body for a request's body."""
    request = _parse(body)
    top = _read_top(request.get("parameters"), len(model.schema.classes))
    table = _read_instances(request, model.schema)
    try:
        probabilities = model.probabilities(table)
    except UserError as error:
        raise BadRequest(
            f"instance{str(error).removeprefix('row')}"
        ) from None  # what a file calls row 3 is instance 3 here
    finite = np.isfinite(probabilities).all(axis=1)
    if not finite.all():
        raise BadRequest(f"instance {finite.argmin() + 1}: the model has no answer to such values.")
    return json.dumps(
        {"predictions": _predictions(probabilities, model.schema.classes, top), "version": version}
    ).encode()


def asks_for_openapi(body: bytes) -> bool:
    """Whether the request is {"openapi": true}: a cloud's endpoint passes on nothing but requests for predictions."""
    try:
        return len(body) < 100 and bool(json.loads(body) == {"openapi": True})
    except (ValueError, RecursionError):
        return False


def _parse(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body.decode("utf-8-sig"), parse_constant=_Constant)
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8.") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply.") from None
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}.") from None
    if not isinstance(request, dict):
        raise BadRequest(
            f'the body is {_show(request)}; it must be an object: {{"instances": […]}}.'
        )
    return request


def _read_top(parameters: object, classes: int) -> int:
    """How many classes' scores are told."""
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise BadRequest(f"parameters: {_show(parameters)} is not an object.")
    unknown = [name for name in parameters if name != "top"]
    if unknown:
        raise BadRequest(f"parameters: {_show(unknown[0])} is unknown; there is only top.")
    top = parameters.get("top")
    if top is None:
        return classes if classes <= FEW_CLASSES else TOP
    # 2.0 is welcome: the cloud's API passes every number on as a double.
    if type(top) not in {int, float} or top < 1 or top != top // 1:
        raise BadRequest(f"parameters, top: {_show(top)} is not a whole number from 1.")
    return int(min(top, classes))


def _read_instances(request: dict[str, Any], schema: Schema) -> dict[str, Sequence[Any]]:
    """Column name → values of the right types; whether they are allowed is for the schema to say."""
    if "instances" not in request:
        raise BadRequest('the body has no "instances".')
    instances = request["instances"]
    if not isinstance(instances, list):
        raise BadRequest(f"instances: {_show(instances)} is not an array.")
    if not 1 <= len(instances) <= MAX_INSTANCES:
        raise BadRequest(
            f"instances: has {len(instances)} of them; 1 to {MAX_INSTANCES} are answered in one request."
        )
    kinds = set(map(type, instances))
    if kinds == {dict}:
        table = _from_objects(instances, schema)
    elif kinds == {list}:
        table = _from_arrays(instances, schema)
    else:
        _refuse_kinds(instances)
    for column in schema.columns:
        _check_types(column, table[column.name])
    return table


def _from_objects(instances: list[dict[str, Any]], schema: Schema) -> dict[str, Sequence[Any]]:
    names = {column.name for column in schema.columns}
    for number, instance in enumerate(instances, start=1):
        if not instance.keys() <= names:
            extra = next(name for name in instance if name not in names)
            raise BadRequest(
                f"instance {number}, column {_show(extra)}: the model has no such column."
            )
    return {
        column.name: [instance.get(column.name) for instance in instances]
        for column in schema.columns
    }


def _from_arrays(instances: list[list[Any]], schema: Schema) -> dict[str, Sequence[Any]]:
    columns = schema.columns
    for number, instance in enumerate(instances, start=1):
        if len(instance) != len(columns):
            end = (
                f"there is none for column '{columns[len(instance)].name}'"
                if len(instance) < len(columns)
                else "too many"
            )
            raise BadRequest(
                f"instance {number}: has {len(instance)} values for {len(columns)} columns; {end}."
            )
    return {
        column.name: values
        for column, values in zip(columns, zip(*instances, strict=True), strict=True)
    }


def _refuse_kinds(instances: list[Any]) -> NoReturn:
    for number, instance in enumerate(instances, start=1):
        if not isinstance(instance, (dict, list)):
            raise BadRequest(
                f"instance {number}: {_show(instance)} is neither an object nor an array of values."
            )
    raise BadRequest(
        "instances: some are objects and some are arrays; use one form within a request."
    )


def _check_types(column: Column, values: Sequence[Any]) -> None:
    allowed = TYPES[column.kind]
    if not allowed.issuperset(map(type, values)):
        row, value = next(
            (row, value) for row, value in enumerate(values) if type(value) not in allowed
        )
        raise BadRequest(
            f"instance {row + 1}, column '{column.name}': {_show(value)} is not {WANTED[column.kind]}."
        )


def _show(value: object) -> str:
    """A JSON value in a few words; never its whole content, which may be large and deep."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    if isinstance(value, _Constant):
        return value.name
    return repr(value[:60]) if isinstance(value, str) else json.dumps(value)[:60]


def _predictions(
    probabilities: np.ndarray, classes: Sequence[int | str], top: int
) -> list[dict[str, Any]]:
    """For each row the best class, its score, and the best classes' scores, best first."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    scores = np.take_along_axis(probabilities, best, axis=1).tolist()
    return [
        {
            "label": classes[row[0]],
            "score": values[0],
            "scores": {str(classes[p]): v for p, v in zip(row, values, strict=True)},
        }
        for row, values in zip(best.tolist(), scores, strict=True)
    ]


def example(schema: Schema) -> dict[str, Any] | list[Any]:
    """An instance that is answered; an array where an object would be too long to read."""
    return manifest.example(schema.to_json())


def openapi(schema: Schema, version: int | None, predict: str, health: str) -> dict[str, Any]:
    """The API as an OpenAPI document, made from the model's own columns."""

    def body(name: str) -> dict[str, Any]:
        return {
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        }

    responses = {
        "200": {
            "description": "One prediction for each instance, in their order",
            **body("Response"),
        },
        "400": {
            "description": "The request is at fault; the error names the instance and the column",
            **body("Error"),
        },
        "413": {"description": "The body is too large", **body("Error")},
    }
    asking = {
        "summary": f"Predict {schema.label}",
        "requestBody": {"required": True, **body("Request")},
        "responses": responses,
    }
    healthy = {
        "summary": "Whether a model is served",
        "responses": {"200": {"description": "It is", **body("Health")}},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"Predict {schema.label}",
            "version": "unversioned" if version is None else str(version),
        },
        "paths": {predict: {"post": asking}, health: {"get": healthy}},
        "components": {"schemas": _components(schema)},
    }


def _components(schema: Schema) -> dict[str, Any]:
    columns = {column.name: _column_schema(column) for column in schema.columns}
    label = {"enum": list(schema.classes)}
    score = {"type": "number", "minimum": 0, "maximum": 1}
    version = {
        "type": ["integer", "null"],
        "description": "The model's version; null when it was served without a registry",
    }
    many = {"type": "array", "minItems": 1, "maxItems": MAX_INSTANCES}
    told = f"the scores of all classes up to {FEW_CLASSES} classes, of the best {TOP} above"
    top = {
        "type": ["integer", "null"],
        "minimum": 1,
        "description": f"How many of the best classes' scores; otherwise {told}",
    }
    instances = {
        "oneOf": [
            {**many, "items": {"$ref": f"#/components/schemas/{name}"}}
            for name in ("Instance", "InstanceArray")
        ]
    }
    parameters = {
        "type": ["object", "null"],
        "properties": {"top": top},
        "additionalProperties": False,
    }
    return {
        "Instance": {
            "type": "object",
            "properties": columns,
            "required": [column.name for column in schema.columns if not column.optional],
            "additionalProperties": False,
        },
        "InstanceArray": {
            "type": "array",
            "description": f"In this order: {', '.join(columns)}",
            "prefixItems": list(columns.values()),
            "minItems": len(columns),
            "maxItems": len(columns),
        },
        "Request": {
            "type": "object",
            "properties": {"instances": instances, "parameters": parameters},
            "required": ["instances"],
            "examples": [{"instances": [example(schema)]}],
        },
        "Prediction": {
            "type": "object",
            "properties": {
                "label": label,
                "score": score,
                "scores": {"type": "object", "additionalProperties": score},
            },
            "required": ["label", "score", "scores"],
        },
        "Response": {
            "type": "object",
            "properties": {
                "predictions": {
                    "type": "array",
                    "items": {"$ref": "#/components/schemas/Prediction"},
                },
                "version": version,
            },
            "required": ["predictions", "version"],
        },
        "Health": {
            "type": "object",
            "properties": {
                "status": {"const": "ok"},
                "version": version,
                "manifest_sha256": {
                    "type": "string",
                    "description": "The SHA-256 of the saved model's model.json",
                },
            },
            "required": ["status", "version", "manifest_sha256"],
        },
        "Error": {
            "type": "object",
            "properties": {"error": {"type": "string"}},
            "required": ["error"],
        },
    }


def _column_schema(column: Column) -> dict[str, Any]:
    """Categories are examples, not an enum: one that training never saw is answered too."""
    types = ["number"] if column.kind == "numeric" else ["string", "number"]
    types += ["null"] * column.optional
    document: dict[str, Any] = {"type": types if len(types) > 1 else types[0]}
    if column.values:
        document["examples"] = list(column.values[:EXAMPLES])
    if column.kind == "categorical" and not column.optional:
        document["minLength"] = 1
    return document
