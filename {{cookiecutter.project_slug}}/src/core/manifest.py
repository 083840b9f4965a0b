"""Manifest of a saved model, model.json; a folder with a valid manifest is complete.

The manifest is written last. It marks completeness because a mounted bucket cannot rename folders.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from core.errors import UserError

NAME = "model.json"
FORMAT = 1  # increment when the folder's layout changes


def sha256(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file atomically."""
    write_bytes(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: to a temporary name, flushed to disk, then renamed."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        flush(partial)
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Free some space, or choose another folder."
        ) from None
    finally:
        with contextlib.suppress(OSError):  # keep the first error, which has the cause
            partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file's content to disk; without it, a rename may reach the disk first."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def write(folder: Path, document: dict[str, Any]) -> None:
    """Write the manifest: `document`, and name, size and SHA-256 of each file in the folder."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name not in {NAME, NAME + ".partial"}
        and not path.name.startswith(".")  # an interrupted run may leave temporary files
    }
    write_json(folder / NAME, {"format": FORMAT, **document, "files": files})


def parse(folder: Path) -> dict[str, Any]:
    """Return the manifest of a saved model without checking the files that it lists."""
    path = folder / NAME
    if not path.is_file():
        raise UserError(
            f"{folder} holds no saved model: there is no {NAME} in it. Train one with `make level0`."
        )
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = document["files"]
        document["format"], document["schema"]
        for name, entry in files.items():
            # A name with a path could point outside the folder.
            if Path(name).name != name or not {"bytes", "sha256"} <= entry.keys():
                raise ValueError(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a model's manifest ({error!r}). Train again, or take another copy."
        ) from None
    if document["format"] != FORMAT:
        raise UserError(f"{path} has format {document['format']}; this code reads format {FORMAT}.")
    return document


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest of a saved model after checking every file against it."""
    document = parse(folder)
    files: dict[str, dict[str, Any]] = document["files"]
    problems = [
        problem for name, entry in files.items() if (problem := _compare(folder / name, entry))
    ]
    # Ignore hidden files: a desktop creates its own, such as .DS_Store.
    present = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    problems += [f"{name} is not in the manifest" for name in sorted(present - {NAME, *files})]
    if problems:
        raise UserError(
            f"the saved model in {folder} is damaged: {'; '.join(problems)}. Train again, or take another copy."
        )
    return document


def example(schema: dict[str, Any]) -> dict[str, Any] | list[Any]:
    """Return an example instance for the manifest's schema; an array if it has over 12 columns."""
    values = {
        column["name"]: column["values"][0] if column["values"] else 0
        for column in schema["columns"]
    }
    return values if len(values) <= 12 else list(values.values())


def _compare(path: Path, entry: dict[str, Any]) -> str | None:
    """Return how a file differs from its manifest entry; None if it does not."""
    if not path.is_file():
        return f"{path.name} is missing"
    # The size comes first: it finds a truncated file without reading it.
    if path.stat().st_size != entry["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    return (
        None if sha256(path) == entry["sha256"] else f"{path.name} was changed after it was saved"
    )
