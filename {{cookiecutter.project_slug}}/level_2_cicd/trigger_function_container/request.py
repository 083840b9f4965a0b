"""A request for a run, as it travels through Pub/Sub, and whether what it asks for fits what is published.

Its fields have one home, level_2_cicd/trigger_function_container/request.avsc: Pub/Sub's topic refuses other messages, whoever
asks writes these fields, and the trigger function reads them.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import UserError
from gcp import command_line, pipeline_template
from gcp.pipeline_version import Published

KINDS: dict[str, type] = {"string": str, "int": int}  # Avro's names for them
# What a request cannot change: it follows from what was built and published, or is the run's own.
FIXED = ("jobs", "registry", "run", "serving")
ROWS = r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]/[^\x00-\x1f\x7f]+"
LONGEST_EVENT = 1000
LONGEST_PARAMETERS = 100_000
DEEPEST = 20
LARGEST = 2**53  # numbers become doubles on their way, which hold no larger whole number exactly


def read_fields(schema: Path) -> dict[str, type]:
    """The fields of a request, and what each holds.

    Raises:
        UserError: the schema cannot be read, or has a type that is not known here.
    """
    document = command_line.read_json(str(schema), "the schema")
    try:
        return {field["name"]: KINDS[field["type"]] for field in document["fields"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{schema} is no Avro record of {' and '.join(KINDS)}: {error}.") from None


# ── on its way ──────────────────────────────────────────────────────────────────────────────────────────────────────
def encode(message: Mapping[str, Any], fields: Mapping[str, type]) -> bytes:
    """A request as Pub/Sub takes it.

    Raises:
        UserError: a field is wrong; names it.
    """
    check(message, fields)
    return json.dumps(message, ensure_ascii=False).encode()


def decode(data: bytes, fields: Mapping[str, type]) -> dict[str, Any]:
    """A request that came.

    Raises:
        UserError: it is none; names each field that is wrong.
    """
    message = parse(data, "the message")
    check(message, fields)
    return message


def parse(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object of which everything can be sent on.

    Raises:
        UserError: it is none; or holds what is no text, or too large a number, or is nested too deep.
    """
    try:
        document = command_line.parse(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is no JSON: {str(error)[:100]}.") from None
    if not isinstance(document, dict):
        raise UserError(f"{what} wants a JSON object, such as {{}}.")
    check_sendable(document, what)
    return document


def check_sendable(value: Any, what: str, depth: int = 0) -> None:
    """Refuse what JSON in general can hold, and a run's parameters cannot.

    Raises:
        UserError: says what.
    """
    if depth > DEEPEST:
        raise UserError(f"{what} is nested more than {DEEPEST} times.")
    if isinstance(value, str) and not _is_text(value):
        raise UserError(f"{what} holds a text with half a character.")
    if isinstance(value, (int, float)) and not (
        math.isfinite(value) if isinstance(value, float) else abs(value) <= LARGEST
    ):
        raise UserError(f"{what} holds a number that is too large.")
    inside = (
        [*value, *value.values()]
        if isinstance(value, dict)
        else value
        if isinstance(value, list)
        else []
    )
    for one in inside:
        check_sendable(one, what, depth + 1)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check(message: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    """Compare a request with the schema, and look at those of its values that need nothing else to be judged.

    Raises:
        UserError: names each field that is missing, unknown or wrong.
    """
    problems = [f"{name}: is missing." for name in fields if name not in message]
    problems += [
        f"{name[:40]}: there is no such field; there are {', '.join(fields)}."
        for name in message
        if name not in fields
    ]
    for name, kind in fields.items():
        if name in message and type(message[name]) is not kind:
            problems.append(f"{name}: wants {'a text' if kind is str else 'a whole number'}.")
    if not problems:
        rules = {
            "event: wants some words that name what happened.": message["event"].strip(),
            f"event: is longer than {LONGEST_EVENT} characters.": len(message["event"])
            <= LONGEST_EVENT,
            f"parameters: are longer than {LONGEST_PARAMETERS} characters.": len(
                message["parameters"]
            )
            <= LONGEST_PARAMETERS,
            "attempt: wants 1, 2, 3 …": 1 <= message["attempt"] < 1_000_000,
        }
        problems = [rule for rule, holds in rules.items() if not holds]
    if problems:
        raise UserError("the request is none:\n  " + "\n  ".join(problems[:10]))


# ── what it asks for ────────────────────────────────────────────────────────────────────────────────────────────────
def values(found: Published, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The published parameters with the changes put over them, all checked: all that a run needs but its own name.

    Args:
        changes: key → value; a key may go into a mapping: hyperparameters.epochs.

    Raises:
        UserError: a change is not allowed, or the parameters do not fit the template; names each.
    """
    fixed = sorted({key.split(".")[0] for key in changes} & set(FIXED))
    if fixed:
        raise UserError(
            f"parameters: {', '.join(fixed)} cannot be asked for: that follows from what was built and published."
        )
    changed: dict[str, Any] = json.loads(json.dumps(found.values))
    for key, value in changes.items():
        pipeline_template.put(changed, key, value, "parameters")
    declared = pipeline_template.signature(found.spec)
    if "csv" in declared and "csv" not in changed and "defaultValue" not in declared["csv"]:
        raise UserError(
            "parameters: csv is missing, and none was published: set data.source in project.yaml to a gs:// address, or ask "
            "with csv=gs://BUCKET/rows.csv."
        )
    pipeline_template.check_parameters(
        found.spec, {**changed, "run": "given at the start"} if "run" in declared else changed
    )
    if "csv" in changed:
        check_rows(changed["csv"])
    if "hyperparameters" in changed:
        from trainer.config import Hyperparameters

        Hyperparameters.from_parameter(changed["hyperparameters"])
    return changed


def check_rows(address: str) -> None:
    """Refuse what is no object that a mounted bucket shows as a file.

    Raises:
        UserError: says what is wanted.
    """
    if not re.fullmatch(ROWS, address) or {"", ".", ".."} & set(
        address.removeprefix("gs://").split("/")
    ):
        raise UserError(
            f"parameters: csv: wants an object's address, such as gs://BUCKET/rows.csv; it is {address[:100]!r}."
        )
