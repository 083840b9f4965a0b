"""The model registry: versions, which of them is the champion, and the gate that a challenger must pass.

`LocalRegistry` is a folder on this machine. Standard library only, so that any step can import it. The
cloud's form has the same files in a bucket, and is written by `gcp.model_registry`.
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
except (
    ImportError
):  # not a POSIX system; there a second run at the same moment must be avoided by hand
    fcntl = None  # type: ignore[assignment]


class StaleChampion(UserError):
    """The champion has changed since the challenger was compared with it."""

    def __init__(
        self, number: int, compared: int | None, champion: int | None, option: str = ""
    ) -> None:
        """Name the versions; `option` is the end of the rollback command."""
        super().__init__(
            f"compared with champion {compared or 'none'}, but another run has made"
            f" {champion or 'none'} the champion; to choose it anyway:"
            f" make rollback VERSION={number}{option}"
        )


@dataclass(frozen=True)
class Version:
    """A registered model.

    Attributes:
        model: the saved model's folder.
        metrics: on the test rows of the run that made it.
    """

    number: int
    model: Path
    metrics: dict[str, float]
    data_sha256: str
    code_version: str
    run: str
    created: str


class Registry(ABC):
    """What a registry's files say, wherever they lie: versions/N/version.json, champion.json, history.jsonl.

    A version is there when its version.json is: it is written last.

    Attributes:
        where: the registry, for messages.
    """

    where: str

    def versions(self) -> list[Version]:
        """All versions, oldest first."""
        return [version for number in self._numbers() if (version := self._version(number))]

    def version(self, number: int) -> Version:
        """One version."""
        version = self._version(number)
        if version is None:
            known = ", ".join(str(version.number) for version in self.versions()) or "none yet"
            raise UserError(f"there is no version {number} in {self.where}; there are: {known}.")
        return version

    def champion(self) -> Version | None:
        """The version that is served; None before the first."""
        number = self.champion_number()
        return None if number is None else self.version(number)

    def champion_number(self) -> int | None:
        """Its number, also when the version itself is lost; None before the first, and when nobody can tell."""
        change = self.last_change()
        return change["version"] if change else None

    def last_change(self) -> dict[str, Any] | None:
        """When and why the champion became it; None when there is none, or champion.json cannot be read."""
        try:
            return read_change(self._text("champion.json"))
        except OSError:
            return None

    def history(self) -> list[dict[str, Any]]:
        """Every change of the champion, oldest first: version, replaces, reason, time."""
        return [json.loads(line) for line in (self._text("history.jsonl") or "").splitlines()]

    def _version(self, number: int) -> Version | None:
        text = self._text(f"versions/{number}/version.json")
        if text is None:
            return None
        facts = json.loads(text)
        return Version(number=number, model=self._model(number, facts.pop("model", None)), **facts)

    @abstractmethod
    def _text(self, name: str) -> str | None:
        """A file's content, if it is there."""

    @abstractmethod
    def _numbers(self) -> list[int]:
        """The versions' numbers in order, and those of versions that are not complete."""

    @abstractmethod
    def _model(self, number: int, address: str | None) -> Path:
        """A version's saved model; its address is given where the model is kept elsewhere."""


def read_change(text: str | None) -> dict[str, Any] | None:
    """What champion.json says; None when that is nothing."""
    try:
        change = json.loads(text or "")
        return {**change, "version": int(change["version"])}
    except (ValueError, KeyError, TypeError):
        return None


class LocalRegistry(Registry):
    """A registry in a folder: versions/N/{model/, version.json}, champion.json, history.jsonl.

    Changes are made under a lock, one run at a time. In a mounted bucket, where locks mean nothing, it can only be read.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is written before something is registered."""
        self.folder = folder
        self.where = str(folder)

    def register(self, model: Path, metrics: Mapping[str, float], run: str) -> Version:
        """Keep a copy of a saved model as a new version; it is not champion yet."""
        document = manifest.read(model)
        with self._locked():
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
        """Make a version the champion, if the champion still is `replaces` (None: there was none).

        Raises StaleChampion if another run has changed the champion.
        """
        with self._locked():
            version, before = self.version(number), self.champion_number()
            if before != replaces:
                raise StaleChampion(number, replaces, before)
            manifest.read(version.model)
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
    """Format the reason of a rollback."""
    return f"{MANUAL} (rollback from version {before or 'none'})"


def now() -> str:
    """The time, as the registry writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
