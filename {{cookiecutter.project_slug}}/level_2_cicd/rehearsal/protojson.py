"""Vertex AI's REST form: bodies, queries and answers as protobuf messages, names, pages and filters."""

import operator
import re
import zlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from google.protobuf import json_format

from rehearsal.server import ApiError, Request, Response

PLACE = r"/(?:v1|v1beta1|ui)/(?P<parent>projects/(?P<project>[^/:]+)/locations/(?P<region>[^/:]+))"
SYSTEM = {"alt", "$alt", "key", "fields", "prettyPrint", "quotaUser"}  # every call of Google's takes these
LABEL_KEY, LABEL_VALUE = r"[a-z][a-z0-9_-]{0,62}", r"[a-z0-9_-]{0,63}"
PAGE = 100  # items of a list, if nothing is said
SORTABLE = ("create_time", "update_time", "display_name")


def read(kind: Any, body: bytes) -> Any:
    """A body as a message.

    Raises:
        ApiError: it is no JSON, or has a field or a value that the message does not take; the text names it.
    """
    message = kind()
    try:
        json_format.Parse(body or b"{}", kind.pb(message))
    except (json_format.ParseError, ValueError) as error:
        raise ApiError(400, f"Invalid JSON payload received. {error}") from None
    return message


def read_query(kind: Any, request: Request, **fields: Any) -> Any:
    """A request message out of the query and what the path says; refuses a parameter that the message lacks."""
    query: dict[str, Any] = {name: value for name, value in request.query.items() if name not in SYSTEM}
    for name in ("updateMask", "readMask", "update_mask", "read_mask"):
        if name in query:
            query[name] = camel(query[name])
    message = kind()
    try:
        json_format.ParseDict(query, kind.pb(message))
    except (json_format.ParseError, ValueError) as error:
        raise ApiError(400, f"Invalid query parameter. {error}") from None
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def camel(name: str) -> str:
    """A field's name as JSON has it."""
    return re.sub(r"_([a-z])", lambda letter: letter[1].upper(), name)


def written(message: Any) -> dict[str, Any]:
    """A message as JSON."""
    found: dict[str, Any] = json_format.MessageToDict(type(message).pb(message))
    return found


def answer(message: Any) -> Response:
    """A response that carries a message."""
    return Response(written(message))


def need(message: Any, *paths: str) -> None:
    """Refuse a message that lacks one of these fields ("container_spec.image_uri")."""
    for path in paths:
        value = message
        for part in path.split("."):
            value = getattr(value, part)
        if not value:
            raise ApiError(400, f"{type(message).__name__}: the field {path} is required")


def check_labels(labels: Any) -> None:
    """Refuse labels that Google refuses."""
    for key, value in labels.items():
        if not re.fullmatch(LABEL_KEY, key) or not re.fullmatch(LABEL_VALUE, value):
            text = f"labels: {key!r}: {value!r}: lower case letters, digits, - and _, at most 63; a key begins with a letter"
            raise ApiError(400, text)
    if len(labels) > 64:
        raise ApiError(400, f"labels: {len(labels)} are too many: at most 64")


def number_of(project: str) -> str:
    """A project's number: Vertex AI answers with it, whatever it was asked with."""
    return project if project.isdigit() else str(100_000_000_000 + zlib.crc32(project.encode()))


def canonical(name: str) -> str:
    """A resource's name as Vertex AI writes it: with the project's number."""
    return re.sub(r"^projects/([^/]+)/", lambda found: f"projects/{number_of(found[1])}/", name)


def place_of(found: re.Match[str]) -> str:
    """projects/NUMBER/locations/REGION of a path."""
    return canonical(f"{found['parent']}/").rstrip("/")


def now() -> datetime:
    """The time, as messages carry it."""
    return datetime.now(UTC)


def page(messages: Iterable[Any], asked: Any, field: str, lookup: Callable[[Any, str], str | None]) -> Response:
    """A page of a list: filtered, ordered (the newest first, if nothing is said), cut.

    Args:
        asked: the request message: filter, order_by, page_size, page_token.
        field: the answer's field that holds the list.
        lookup: a message's value for a field of the filter; raises KeyError for a field that cannot be filtered on.
    """
    chosen = [message for message in messages if matches(asked.filter, message, lookup)] if asked.filter else list(messages)
    chosen = ordered(chosen, getattr(asked, "order_by", "") or "create_time desc")
    if asked.page_token and not asked.page_token.isdigit():
        raise ApiError(400, f"page_token: {asked.page_token!r} is none of this list's")
    start = int(asked.page_token or 0)
    end = start + (asked.page_size or PAGE)
    body: dict[str, Any] = {field: [written(message) for message in chosen[start:end]]}
    if end < len(chosen):
        body["nextPageToken"] = str(end)
    return Response(body)


def ordered(messages: list[Any], order: str) -> list[Any]:
    """Messages by "create_time desc, display_name"."""
    for term in reversed(order.split(",")):
        field, _, way = term.strip().partition(" ")
        if field not in SORTABLE or way not in {"", "asc", "desc"}:
            raise ApiError(400, f"order_by: {term.strip()!r}; known are {', '.join(SORTABLE)}")
        messages = sorted(messages, key=operator.attrgetter(field), reverse=way == "desc")
    return messages


TOKEN = re.compile(
    r"""\s*(?:(?P<word>AND|OR|NOT)\b | (?P<mark>[()-])
    | (?P<field>[A-Za-z_]\w*(?:\.(?:"[^"]*"|[\w-]+))*)\s*(?P<sign>!=|>=|<=|=|:|<|>)\s*(?P<value>"[^"]*"|'[^']*'|[^\s()]+))""",
    re.VERBOSE,
)


def matches(text: str, message: Any, lookup: Callable[[Any, str], str | None]) -> bool:
    """Whether a message fits a filter: `labels.a="b" AND (state="X" OR NOT display_name:"run-*")`."""
    tokens: list[re.Match[str]] = []
    position = 0
    while text[position:].strip():
        token = TOKEN.match(text, position)
        if token is None:
            raise ApiError(400, f"filter: {text[position:].strip()!r} is not understood")
        tokens.append(token)
        position = token.end()

    def take(word: str) -> bool:
        here = bool(tokens) and (tokens[0]["word"] == word or tokens[0]["mark"] == word)
        if here:
            tokens.pop(0)
        return here

    def every() -> bool:
        result = either()
        while take("AND") or (tokens and tokens[0]["mark"] != ")"):
            result = either() and result
        return result

    def either() -> bool:
        result = one()
        while take("OR"):
            result = one() or result
        return result

    def one() -> bool:
        if take("NOT") or take("-"):
            return not one()
        if take("("):
            result = every()
            if not take(")"):
                raise ApiError(400, f"filter: a ) is missing in {text!r}")
            return result
        if not tokens or not tokens[0]["field"]:
            raise ApiError(400, f"filter: {text!r} is not understood")
        token = tokens.pop(0)
        try:
            value = lookup(message, token["field"].replace('"', ""))
        except KeyError:
            raise ApiError(400, f"filter: the field {token['field']} is not known") from None
        return compare(value, token["sign"], token["value"].strip("\"'"))

    result = every()
    if tokens:
        raise ApiError(400, f"filter: {text!r} is not understood")
    return result


def compare(value: str | None, sign: str, wanted: str) -> bool:
    """Whether a value stands in this relation; `:` takes * for any text, < and > compare times."""
    if sign in {"=", "!="}:
        return (value == wanted) == (sign == "=")
    if value is None:
        return False
    if sign == ":":
        return re.fullmatch(".*".join(map(re.escape, wanted.split("*"))), value) is not None
    try:
        left, right = datetime.fromisoformat(value), datetime.fromisoformat(wanted)
    except ValueError:
        raise ApiError(400, f"filter: {sign} compares times, not {value!r} with {wanted!r}") from None
    return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[sign]


def field_of(message: Any, name: str, *known: str) -> str | None:
    """A message's field for a filter: display_name, state, create_time, labels.KEY and those named."""
    if name.startswith("labels."):
        label: str | None = message.labels.get(name.removeprefix("labels."))
        return label
    name = re.sub(r"[A-Z]", lambda letter: f"_{letter[0].lower()}", name)  # Google takes both forms
    if name in {*SORTABLE, *known}:
        return str(written(message).get(camel(name), ""))
    raise KeyError(name)
