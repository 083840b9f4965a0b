"""What commands are given: JSON as text, in a file or in a bucket, and KEY=VALUE. Only the standard library is needed, but
for a bucket.
"""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.errors import UserError


def read_json(given: str, option: str) -> Any:
    """A JSON document: the text itself, or a file or gs:// address that holds it.

    Args:
        option: what it was given for, for the message: "--jobs".

    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    text = given if given.lstrip()[:1] in {"{", "["} else read_text(given, option)
    try:
        return parse(text)
    except ValueError as error:
        raise UserError(
            f"{option}: wants JSON, or a file or gs:// address with JSON: {error}."
        ) from None


def read_text(address: str, what: str) -> str:
    """The text of a file, or of an object in a bucket.

    Raises:
        UserError: it cannot be had.
    """
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


def parse(text: str) -> Any:
    """JSON without what only Python knows.

    Raises:
        ValueError: it is no JSON, or holds NaN or Infinity.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    return json.loads(text, parse_constant=refuse)


def pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """KEY=VALUE, given again and again, as a mapping.

    Raises:
        UserError: one is none.
    """
    found = [text.partition("=") for text in texts]
    for key, equals, value in found:
        if not key or not equals:
            raise UserError(
                f"{option} {key}{equals}{value}: is not KEY=VALUE, such as commit=1a2b3c."
            )
    return {key: value for key, _, value in found}
