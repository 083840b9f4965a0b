"""The saved model's manifest, model.json: written last, so that a folder with one that verifies is whole.

A bucket mounted as a folder cannot rename folders; that is why wholeness rests on this file and not on a rename.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from core.errors import UserError

NAME = "model.json"
FORMAT = 1  # raised when the folder's layout changes


def sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file as a whole or not at all."""
    write_bytes(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all: under another name, flushed to disk, then renamed."""
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
        with contextlib.suppress(OSError):  # the first reason is the one to tell
            partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file's content is on the disk; a rename may get there sooner."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def write(folder: Path, document: dict[str, Any]) -> None:
    """Complete a saved model: `document`, and name, size and hash of every other file in the folder."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name not in {NAME, NAME + ".partial"}
        and not path.name.startswith(".")  # a killed run may leave a partial one
    }
    write_json(folder / NAME, {"format": FORMAT, **document, "files": files})


def parse(folder: Path) -> dict[str, Any]:
    """The manifest of a saved model, whose other files are not looked at."""
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
    """The manifest of a saved model, after every file was compared with it."""
    document = parse(folder)
    files: dict[str, dict[str, Any]] = document["files"]
    problems = [
        problem for name, entry in files.items() if (problem := _compare(folder / name, entry))
    ]
    present = {
        entry.name for entry in folder.iterdir() if not entry.name.startswith(".")
    }  # a desktop leaves its own there
    problems += [f"{name} is not in the manifest" for name in sorted(present - {NAME, *files})]
    if problems:
        raise UserError(
            f"the saved model in {folder} is damaged: {'; '.join(problems)}. Train again, or take another copy."
        )
    return document


def example(schema: dict[str, Any]) -> dict[str, Any] | list[Any]:
    """An instance that the model answers, from the manifest's schema; an array where an object would be too long to read."""
    values = {
        column["name"]: column["values"][0] if column["values"] else 0
        for column in schema["columns"]
    }
    return values if len(values) <= 12 else list(values.values())


def _compare(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    return (
        None if sha256(path) == entry["sha256"] else f"{path.name} was changed after it was saved"
    )
