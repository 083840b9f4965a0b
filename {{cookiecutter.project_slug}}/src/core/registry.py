"""The model registry: versions, the champion and its history.

`LocalRegistry` is a folder on this machine; `gcp.model_registry` writes the same files to a bucket.
Standard library only, so that any step can import it.
"""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core import manifest, paths
from core.errors import UserError

try:
    import fcntl
except ImportError:  # not POSIX: no lock, so the user must avoid concurrent runs
    fcntl = None  # type: ignore[assignment]


class StaleChampion(UserError):
    """Stale comparison: the champion has changed since."""

    def __init__(
        self, number: int, compared: int | None, champion: int | None, option: str = ""
    ) -> None:
        """Format the message; `option` is appended to the rollback command."""
        super().__init__(
            f"compared with champion {compared or 'none'}, but another run has made"
            f" {champion or 'none'} the champion; to choose it anyway:"
            f" make rollback VERSION={number}{option}"
        )


@dataclass(frozen=True)
class Version:
    """A registered model: `model` is its folder, `metrics` are of its run's test split."""

    number: int
    model: Path
    metrics: dict[str, float]
    data_sha256: str
    code_version: str
    run: str
    created: str


class Registry(ABC):
    """Read a registry's files: versions/N/version.json, champion.json, history.jsonl.

    version.json is written last: a version exists if its version.json does.
    `where` names the registry in messages.
    """

    where: str

    def versions(self) -> list[Version]:
        """Return all complete versions, oldest first."""
        return [version for number in self._numbers() if (version := self._version(number))]

    def version(self, number: int) -> Version:
        """Return one version; an unknown number is an error."""
        version = self._version(number)
        if version is None:
            known = ", ".join(str(version.number) for version in self.versions()) or "none yet"
            raise UserError(f"there is no version {number} in {self.where}; there are: {known}.")
        return version

    def champion(self) -> Version | None:
        """Return the champion; None before the first promotion."""
        number = self.champion_number()
        return None if number is None else self.version(number)

    def champion_number(self) -> int | None:
        """Return the champion's number, even if its files are lost; None if unknown."""
        change = self.last_change()
        return change["version"] if change else None

    def last_change(self) -> dict[str, Any] | None:
        """Return the champion's last change; None if champion.json is missing or unreadable."""
        try:
            return read_change(self._text("champion.json"))
        except OSError:
            return None

    def history(self) -> list[dict[str, Any]]:
        """Return all changes of the champion, oldest first: version, replaces, reason, time."""
        return [json.loads(line) for line in (self._text("history.jsonl") or "").splitlines()]

    def _version(self, number: int) -> Version | None:
        """Return a version; None if it does not exist or is incomplete."""
        text = self._text(f"versions/{number}/version.json")
        if text is None:
            return None
        facts = json.loads(text)
        return Version(number=number, model=self._model(number, facts.pop("model", None)), **facts)

    @abstractmethod
    def _text(self, name: str) -> str | None:
        """Return a file's content; None if it does not exist."""

    @abstractmethod
    def _numbers(self) -> list[int]:
        """Return all version numbers in order, including incomplete versions."""

    @abstractmethod
    def _model(self, number: int, address: str | None) -> Path:
        """Return the path of a version's model; `address` if it is stored outside the registry."""


def read_change(text: str | None) -> dict[str, Any] | None:
    """Parse champion.json; None if it is missing or invalid."""
    try:
        change = json.loads(text or "")
        return {**change, "version": int(change["version"])}
    except (ValueError, KeyError, TypeError):
        return None


class LocalRegistry(Registry):
    """A registry in a folder: versions/N/{model/, version.json}, champion.json, history.jsonl.

    Changes need a lock. Locks do not work in a mounted bucket, so a registry there is read-only.
    """

    def __init__(self, folder: Path) -> None:
        """Open the registry; the folder is created by the first change."""
        self.folder = folder
        self.where = str(folder)

    def register(self, model: Path, metrics: Mapping[str, float], run: str) -> Version:
        """Copy a saved model into the registry as a new version, not yet the champion."""
        document = manifest.read(model)
        with self._locked():
            # Incomplete versions count too: their numbers are not used again.
            number = max(self._numbers(), default=0) + 1
            folder = self.folder / "versions" / str(number)
            shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns(".*"))
            facts = {
                "metrics": dict(metrics),
                "data_sha256": document.get("data_sha256", "unknown"),
                "code_version": document.get("code_version", "unknown"),
                "run": run,
                "created": now(),
            }
            manifest.write_json(folder / "version.json", facts)
        return self.version(number)

    def promote(self, number: int, reason: str, replaces: int | None) -> Version:
        """Make a version the champion; StaleChampion if `replaces` is not the champion any more."""
        with self._locked():
            version, before = self.version(number), self.champion_number()
            if before != replaces:
                raise StaleChampion(number, replaces, before)
            manifest.read(version.model)  # a damaged model must not become the champion
            change = {"version": number, "replaces": before, "reason": reason, "time": now()}
            manifest.write_json(self.folder / "champion.json", change)
            with (self.folder / "history.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(change, ensure_ascii=False) + "\n")
        return version

    def _text(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _numbers(self) -> list[int]:
        return sorted(
            int(path.name) for path in self.folder.glob("versions/*") if path.name.isdecimal()
        )

    def _model(self, number: int, address: str | None) -> Path:
        return (
            paths.local_path(address)
            if address
            else self.folder / "versions" / str(number) / "model"
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the registry's lock, so that runs change it one at a time."""
        if paths.in_bucket(self.folder):
            raise UserError(
                f"the registry {self.folder} is in a bucket; it is written by python -m level_1_pipeline.deploy_container.main."
            )
        (self.folder / "versions").mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as stream:
            if fcntl:
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield


MANUAL = "chosen manually"


def rollback_reason(before: int | None) -> str:
    """Return the reason that the history records for a rollback."""
    return f"{MANUAL} (rollback from version {before or 'none'})"


def now() -> str:
    """Return the current UTC time in ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
