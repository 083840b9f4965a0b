"""The messages of Pub/Sub as pydantic models, and the parameters of a requested run.

request.avsc has the same fields as `RunMessage`: the topic refuses messages that do not match it.
"""

import base64
import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import pydantic_core
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic import ValidationError as PydanticError

from core.errors import UserError
from gcp import pipeline_template
from gcp.pipeline_version import PipelineVersion

# What a request cannot change: it follows from the build, or from the run itself.
FIXED = ("jobs", "registry", "run", "serving")
OBJECT = r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]/[^\x00-\x1f\x7f]+"
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)"
MAX_DEPTH = 20
MAX_INTEGER = 2**53  # parameters travel as doubles, which hold no larger integer exactly


class InvalidMessage(UserError):
    """The message can never start a run."""


def _decode(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError("expected base64 text")
    return base64.b64decode(text, validate=True)


def _utc(text: Any) -> datetime:
    if not isinstance(text, str) or not re.fullmatch(TIME, text, re.ASCII):
        raise ValueError("expected a time, such as 2026-11-30T04:00:00Z")
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except OverflowError:
        raise ValueError("expected a time between the years 1 and 9999") from None


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("expected text that identifies what happened")
    return text


Model = TypeVar("Model", bound=BaseModel)
Time = Annotated[datetime, BeforeValidator(_utc)]


class PubsubMessage(BaseModel):
    """A message as Pub/Sub pushes it."""

    model_config = ConfigDict(strict=True, frozen=True)
    id: str = Field("", alias="messageId")
    published: Time = Field(alias="publishTime")
    data: Annotated[bytes, BeforeValidator(_decode)] = b""
    attributes: dict[str, str] = {}


class Push(BaseModel):
    """The body of a push."""

    message: PubsubMessage


class Notification(BaseModel):
    """The attributes of a Cloud Storage notification."""

    model_config = ConfigDict(frozen=True)
    kind: str = Field(alias="eventType", pattern=r"^OBJECT_[A-Z_]{1,40}$")
    bucket: str = Field(alias="bucketId", min_length=1)
    name: str = Field(alias="objectId", min_length=1)
    generation: str = Field(alias="objectGeneration", pattern=r"^[0-9]{1,20}$")
    happened: Time | None = Field(None, alias="eventTime")
    overwritten_by: str = Field("", alias="overwrittenByGeneration")


class DeletedObject(BaseModel):
    """The data of a notification, as far as it is read."""

    deleted: Time = Field(alias="timeDeleted")


class RunMessage(BaseModel):
    """A request for a run of the published pipeline.

    Attributes:
        event: what happened; the same event never starts two runs.
        version: a published version; empty for the current one.
        parameters: a JSON object of changes to the published parameters.
        actor: who requests it; a label of the run.
        attempt: 2 and more for a deliberate rerun of the same event.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    event: Annotated[str, AfterValidator(_not_blank)] = Field(max_length=1000)
    version: str
    parameters: str = Field(max_length=100_000)
    actor: str
    attempt: int = Field(ge=1, lt=1_000_000)


def parse(model: type[Model], content: Any, what: str) -> Model:
    """Validate JSON (text or bytes) or a mapping; the error names each invalid field."""
    try:
        if isinstance(content, str | bytes):
            return model.model_validate_json(content)
        return model.model_validate(content)
    except PydanticError as error:
        problems = [
            ": ".join(filter(None, [".".join(map(str, e["loc"]))[:80], e["msg"]]))
            for e in error.errors(include_input=False, include_url=False, include_context=False)
        ]
        raise InvalidMessage(f"invalid {what}:\n  " + "\n  ".join(problems[:10])) from None


def parse_parameters(text: str) -> dict[str, Any]:
    """Parse a JSON object whose values can be sent to Vertex AI."""
    try:
        values = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidMessage(f"parameters: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidMessage("parameters: expected a JSON object, such as {}.")
    _check_values(values)
    return values


def _check_values(value: Any, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise InvalidMessage(f"parameters: nested deeper than {MAX_DEPTH} levels.")
    too_large = isinstance(value, int) and abs(value) > MAX_INTEGER
    if too_large or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidMessage("parameters: a number is too large.")
    children = value.values() if isinstance(value, dict) else value
    for child in children if isinstance(value, dict | list) else ():
        _check_values(child, depth + 1)


def merge_parameters(version: PipelineVersion, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Apply changes to the published parameters and check the result.

    Args:
        changes: key → value; a key may be a path into a mapping: hyperparameters.epochs.

    Returns:
        All parameters of the run but its own name, `run`.
    """
    fixed = sorted({key.split(".")[0] for key in changes} & set(FIXED))
    if fixed:
        raise UserError(
            f"parameters: {', '.join(fixed)} cannot be changed: the build determines it."
        )
    values: dict[str, Any] = json.loads(json.dumps(version.values))
    for key, value in changes.items():
        pipeline_template.put(values, key, value, "parameters")
    declared = pipeline_template.signature(version.spec)
    if "csv" in declared and "csv" not in values and "defaultValue" not in declared["csv"]:
        raise UserError(
            "parameters: csv is missing: set data.source in project.yaml to a gs:// address, "
            "or request the run with csv=gs://BUCKET/rows.csv."
        )
    run = {"run": "set at the start"} if "run" in declared else {}
    pipeline_template.check_parameters(version.spec, {**values, **run})
    if "csv" in values and not is_object_address(values["csv"]):
        raise UserError(
            "parameters: csv: expected the address of an object, such as gs://BUCKET/rows.csv; "
            f"got {values['csv'][:100]!r}."
        )
    if "hyperparameters" in values:
        from trainer.config import Hyperparameters

        Hyperparameters.from_parameter(values["hyperparameters"])
    return values


def is_object_address(address: str) -> bool:
    """Whether a mounted bucket shows this object as a file."""
    parts = set(address.removeprefix("gs://").split("/"))
    return bool(re.fullmatch(OBJECT, address)) and not {"", ".", ".."} & parts
