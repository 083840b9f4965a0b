"""Vertex AI's REST format: protobuf messages as JSON, resource names, filters and pages."""

import operator
import re
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from google.protobuf import json_format

from level_2_cicd.rehearsal.transport import ApiError, Json, Request

# gcloud uses v1beta1 and ui for some calls; the messages are the same.
LOCATION = r"/(?:v1|v1beta1|ui)/(?P<parent>projects/[^/:]+/locations/[^/:]+)"
# Every call of Google's APIs accepts these parameters; they are no fields of a message.
SYSTEM_PARAMETERS = {"alt", "$alt", "key", "fields", "prettyPrint", "quotaUser"}
LABEL_KEY, LABEL_VALUE = r"[a-z][a-z0-9_-]{0,62}", r"[a-z0-9_-]{0,63}"
PAGE = 100  # items per page by default


def parse(kind: Any, body: bytes) -> Any:
    """Parse a body strictly: reject unknown fields and invalid values."""
    message = kind()
    try:
        # kind.pb() unwraps proto-plus, because json_format accepts plain protobuf only.
        json_format.Parse(body or b"{}", kind.pb(message))
    except (json_format.ParseError, ValueError) as error:
        raise ApiError(400, f"Invalid JSON payload received. {error}") from None
    return message


def parse_query(kind: Any, request: Request, **fields: Any) -> Any:
    """Build a request message from other fields and the query, which is parsed strictly."""
    query: Json = {key: text for key, text in request.query.items() if key not in SYSTEM_PARAMETERS}
    if "updateMask" in query:
        query["updateMask"] = camel_case(query["updateMask"])  # clients send both forms
    message = kind()
    try:
        json_format.ParseDict(query, kind.pb(message))
    except (json_format.ParseError, ValueError) as error:
        raise ApiError(400, f"Invalid query parameter. {error}") from None
    # Last: fields of the path override the query.
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def camel_case(name: str) -> str:
    """Convert a field's name to its form in JSON."""
    return re.sub(r"_([a-z])", lambda match: match[1].upper(), name)


def as_json(message: Any) -> Json:
    """Convert a message to JSON."""
    document: Json = json_format.MessageToDict(type(message).pb(message))
    return document


def require(message: Any, *paths: str) -> None:
    """Reject a message without one of these fields ("container_spec.image_uri")."""
    for path in paths:
        if not operator.attrgetter(path)(message):
            raise ApiError(400, f"{type(message).__name__}: the field {path} is required")


def check_id(field: str, value: str, pattern: str) -> None:
    """Reject an id that does not match its pattern."""
    if not re.fullmatch(pattern, value):
        raise ApiError(400, f"{field} is {value!r}: it must match {pattern}")


def check_labels(labels: Any) -> None:
    """Reject invalid labels."""
    for key, value in labels.items():
        if not re.fullmatch(LABEL_KEY, key) or not re.fullmatch(LABEL_VALUE, value):
            rule = "lower case letters, digits, - and _, at most 63; a key begins with a letter"
            raise ApiError(400, f"labels: {key!r}: {value!r}: {rule}")
    if len(labels) > 64:
        raise ApiError(400, f"labels: got {len(labels)}, expected at most 64")


def canonical(name: str) -> str:
    """Replace the project's id by its number, as Vertex AI does in all resource names."""

    def number(match: re.Match[str]) -> str:
        project = match[1]
        # Any number is valid, but it must always be the same.
        crc = 100_000_000_000 + zlib.crc32(project.encode())
        return f"projects/{project if project.isdigit() else crc}/"

    return re.sub(r"^projects/([^/]+)/", number, name)


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


def paginate(items: Sequence[Any], size: int, token: str) -> tuple[Sequence[Any], Json]:
    """Return one page, and its nextPageToken unless it is the last page."""
    if token and not token.isdigit():
        raise ApiError(400, f"page_token: invalid value {token!r}")
    start = int(token or 0)
    end = start + (size or PAGE)
    return items[start:end], {"nextPageToken": str(end)} if end < len(items) else {}


def list_page(messages: list[Any], query: Any, field: str) -> Json:
    """Return one page of the messages that match a query's filter, newest first, as `field`."""
    # Fail rather than ignore the order: a test must not pass with a wrong one.
    if getattr(query, "order_by", ""):
        raise ApiError(501, f"order_by: not supported here: {query.order_by!r}")
    messages = [message for message in messages if matches(message, query.filter)]
    messages.sort(key=operator.attrgetter("create_time"), reverse=True)
    page, token = paginate(messages, query.page_size, query.page_token)
    return {field: [as_json(message) for message in page], **token}


def matches(message: Any, condition: str) -> bool:
    """Return whether a message matches a filter: `labels.run="a" AND display_name="b"`."""
    # A subset of Google's filters: what the project and gcloud send.
    for term in re.split(r"\s+AND\s+", condition) if condition else []:
        match = re.fullmatch(r"""\s*([\w.-]+)\s*=\s*("[^"]*"|'[^']*'|[^\s"'()]+)\s*""", term)
        if not match:
            raise ApiError(400, f"filter: cannot parse {term!r}")
        if field_value(message, match[1]) != match[2].strip("\"'"):
            return False
    return True


def field_value(message: Any, name: str) -> str | None:
    """Return the value of a filter's field: display_name, state or labels.KEY."""
    if name.startswith("labels."):
        label: str | None = message.labels.get(name.removeprefix("labels."))
        return label
    if camel_case(name) not in {"displayName", "state"}:
        raise ApiError(400, f"filter: unknown field {name}")
    return str(as_json(message).get(camel_case(name), ""))
