"""The model that the server answers with: one folder, a bucket's, or the registry's champion."""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from core import manifest
from core.errors import UserError
from core.onnx_model import Model
from core.registry import LocalRegistry, Registry, Version
from gcp import storage
from predictor import contract

POLL_SECONDS = 0.25  # between two looks at the registry's champion


@dataclass(frozen=True)
class LoadedModel:
    """A model that has answered once, and its version in the registry, if any."""

    model: Model
    manifest_sha256: str
    version: int | None = None

    @classmethod
    def load(cls, folder: Path, version: int | None = None) -> "LoadedModel":
        """Verify and load the saved model, and warm it up with one prediction."""
        model = Model.load(folder)
        body = json.dumps({"instances": [contract.example(model.schema)]}).encode()
        try:
            contract.answer(model, version, body)
        except Exception as error:
            raise UserError(f"the model in {folder} loads but does not answer: {error}") from None
        return cls(model, manifest.sha256(folder / manifest.NAME), version)


class StaticModel:
    """One model for the server's lifetime."""

    def __init__(self, folder: Path) -> None:
        self.current = LoadedModel.load(folder)

    async def follow(self) -> None:
        """Return at once: the model does not change."""


class ChampionModel:
    """The registry's champion. A new one is loaded beside the old one, then one reference changes."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._invalid: object = None
        version = registry.champion()
        if version is None:
            raise UserError(
                "the registry has no champion yet. `make level1` trains, tests and registers one."
            )
        self._fingerprint = _fingerprint(version)
        self.current = LoadedModel.load(version.model, version.number)

    async def follow(self) -> None:
        """Poll for a new champion; keep serving the old one if the new one is invalid."""
        logged = ""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            problem = ""
            try:
                await asyncio.to_thread(self.update)
            except Exception as error:
                problem = str(error) or repr(error)
                if problem != logged:
                    number = self.current.version
                    log(f"still serving version {number}; cannot load the new champion: {problem}")
            logged = problem

    def update(self) -> None:
        """Load the champion if it has changed; do not retry an invalid one until it changes."""
        version = self.registry.champion()
        if version is None:
            raise UserError("the registry has no champion any more")
        if (fingerprint := _fingerprint(version)) in (self._fingerprint, self._invalid):
            return
        try:
            loaded = LoadedModel.load(version.model, version.number)
        except UserError:
            self._invalid = fingerprint
            raise
        self.current, self._fingerprint = loaded, fingerprint
        log(f"serving version {version.number}")


def _fingerprint(version: Version) -> tuple[int, int]:
    # The number alone is not enough: a registry may be deleted and start again at version 1.
    try:
        return version.number, (version.model / manifest.NAME).stat().st_mtime_ns
    except OSError:
        return version.number, 0


def open_source(
    arguments: argparse.Namespace, environ: Mapping[str, str]
) -> StaticModel | ChampionModel:
    """Load the model that the command line or AIP_STORAGE_URI names."""
    if arguments.registry:
        try:
            return ChampionModel(LocalRegistry(arguments.registry))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read the registry {arguments.registry}: {error!r}.") from None
    if arguments.model_dir:
        return StaticModel(arguments.model_dir)
    uri = environ.get("AIP_STORAGE_URI")
    if not uri:
        raise UserError(
            "no model: give --registry FOLDER, --model-dir FOLDER, or the variable AIP_STORAGE_URI."
        )
    if "://" not in uri:
        return StaticModel(Path(uri))
    if not uri.startswith("gs://"):
        raise UserError(f"AIP_STORAGE_URI is {uri!r}; it must be a folder, or gs://BUCKET/FOLDER.")
    with _temporary_folder(uri) as folder:
        try:
            return StaticModel(_download(uri.rstrip("/"), folder))
        except UserError as error:
            raise UserError(str(error).replace(str(folder), uri)) from None


@contextlib.contextmanager
def _temporary_folder(uri: str) -> Iterator[Path]:
    try:
        temporary = tempfile.TemporaryDirectory(prefix="model-")
    except OSError as error:
        hint = "In a read-only container, add --tmpfs /tmp."
        raise UserError(f"cannot copy {uri} here: {error.strerror}. {hint}") from None
    with temporary as folder:
        yield Path(folder)


def _download(uri: str, folder: Path) -> Path:
    # Only the files that the manifest names: the bucket's folder may hold others.
    model = storage.fetch(f"{uri}/{manifest.NAME}", folder).parent
    for name in manifest.parse(model)["files"]:
        storage.fetch(f"{uri}/{name}", folder)
    return model


def log(line: str) -> None:
    """Write one line to standard error."""
    print(line.replace("\n", " "), file=sys.stderr, flush=True)
