"""The model registry in Google Cloud: Vertex AI's own, which holds the models, and a few small files in the storage bucket,
which hold the decision.

gs://…/registry/versions/N/version.json   a version's metrics and origin; N is Vertex AI's number of it
gs://…/registry/champion.json             which version is served, and why: THE decision
gs://…/registry/history.jsonl             every such decision
gs://…/registry/lock.json                 who deploys at this moment

They are laid out as on a laptop, so that a step that finds the bucket mounted reads them with `LocalRegistry`. Files are
written under the condition that nobody else has changed them. Vertex AI's alias `champion` follows from champion.json.
"""

import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Self

from core import manifest, paths
from core.errors import UserError
from core.registry import LocalRegistry, Overtaken, Registry, Version, now, read_change
from gcp import client as api
from gcp import storage

LEASE_SECONDS = (
    90.0  # after so long without a sign of life, another may deploy; clocks differ by far less
)
LEASE_PATIENCE = 3600.0  # seconds to wait for another deployment …
LONGEST_LOOK = 5.0  # … looking this often

CHAMPION, HISTORY, LOCK = "champion.json", "history.jsonl", "lock.json"
PORT, PREDICT, HEALTH = 8080, "/predict", "/health"  # where the predictor's container answers


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    Attributes:
        endpoint: the endpoint's display name, and the id of the model in Vertex AI's registry.
        image: the predictor's container, by digest; needed only to register.
        replicas: fewest and most.
        canary_percent: a new version's share of the requests until it has proved itself.
        service_account, key: empty where a person made everything by hand.
    """

    project: str
    region: str
    endpoint: str
    machine: str
    replicas: tuple[int, int]
    canary_percent: int
    image: str = ""
    service_account: str = ""
    key: str = ""

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Self:
        """From a pipeline's parameter, in which every number is a double.

        Raises:
            UserError: names what is missing, unknown or wrong.
        """
        known = cls.__dataclass_fields__
        missing = [
            name
            for name, field in known.items()
            if name not in document and field.default is MISSING
        ]
        unknown = [name for name in document if name not in known]
        if missing or unknown:
            problems = [f"{name} is missing" for name in missing] + [
                f"there is no {name}" for name in unknown
            ]
            raise UserError(f"serving: {'; '.join(problems)}. It has {', '.join(known)}.")
        try:
            low, high = (int(number) for number in document["replicas"])
            percent = int(document["canary_percent"])
        except (ValueError, TypeError):
            raise UserError(
                "serving: replicas are two whole numbers, as [1, 3], and canary_percent is one."
            ) from None
        if not (1 <= low <= high and 1 <= percent <= 100):
            raise UserError(
                "serving: replicas are [fewest, most], from 1; canary_percent is from 1 to 100."
            )
        return cls(**{**document, "replicas": (low, high), "canary_percent": percent})

    @property
    def parent(self) -> str:
        """Project and region, as Google's APIs name them."""
        return f"projects/{self.project}/locations/{self.region}"

    @property
    def model(self) -> str:
        """The model's name in Vertex AI's registry, without a version."""
        return f"{self.parent}/models/{self.endpoint}"

    @property
    def encryption(self) -> dict[str, Any]:
        """The field of a request that names the key; none where Google's own keys are used."""
        return {"encryption_spec": {"kms_key_name": self.key}} if self.key else {}


# ── objects ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Held:
    """A JSON object's content, and its generation: which of its contents this is. 0: there is no object."""

    content: bytes = b""
    generation: int = 0

    @property
    def document(self) -> dict[str, Any]:
        """The content as a dict; empty when it is none."""
        try:
            document = json.loads(self.content)
        except ValueError:
            return {}
        return document if isinstance(document, dict) else {}


def read(address: str) -> Held:
    """An object as it is."""
    return Held(*(storage.read(address) or ()))


def replace(address: str, content: bytes, held: Held) -> Held | None:
    """Write an object in the place of what was read; None when something else is there by now."""
    try:
        return Held(content, storage.write(address, content, if_generation_match=held.generation))
    except storage.Conflict:
        return None


# ── the lease ───────────────────────────────────────────────────────────────────────────────────────────────────────
def clock() -> float:
    """Seconds, on a clock that all machines share."""
    return time.time()


class Lease:
    """The right to deploy, which one run has at a time: `with Lease(objects, run) as lease: … lease.check() …`.

    It is an object with an owner and an end, and is prolonged in the background while it is held. Whoever finds one whose
    end has passed takes it over. A run that was asleep for so long, and has lost it, is told so by `check`.
    """

    def __init__(self, registry: str, run: str, tell: Callable[[str], None]) -> None:
        self._lock, self._run, self._tell = f"{registry}/{LOCK}", run, tell
        self._token = uuid.uuid4().hex
        self._held, self._ends = Held(), 0.0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._prolong, daemon=True)

    def __enter__(self) -> Self:
        began, wait = time.monotonic(), api.FIRST_WAIT
        while not self._take(found := read(self._lock)):
            owner = found.document.get("run", "unknown")
            if wait == api.FIRST_WAIT:
                self._tell(f"waiting for run {owner}, which is deploying")
            if time.monotonic() - began > LEASE_PATIENCE:
                raise UserError(
                    f"run {owner} has been deploying for {LEASE_PATIENCE / 60:.0f} minutes. Wait for it, then type this again."
                )
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_LOOK)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._thread.join()
        try:
            self._write(self._held, ends=0.0)
        except UserError as error:  # it ends by itself
            self._tell(f"{error} The next deployment waits up to {LEASE_SECONDS:.0f} s.")

    def check(self) -> None:
        """Before anything is changed.

        Raises:
            UserError: the lease was lost.
        """
        if clock() >= self._ends:
            raise UserError(
                "this deployment was interrupted for so long that another may have begun. Type the same again."
            )

    def _take(self, found: Held) -> bool:
        return clock() >= float(found.document.get("ends", 0)) and self._write(
            found, clock() + LEASE_SECONDS
        )

    def _write(self, replaces: Held, ends: float) -> bool:
        content = json.dumps({"run": self._run, "token": self._token, "ends": ends}).encode()
        written = replace(self._lock, content, replaces)
        if written:
            self._held, self._ends = written, ends
        return written is not None

    def _prolong(self) -> None:
        while not self._released.wait(LEASE_SECONDS / 3):
            try:
                if not self._write(self._held, clock() + LEASE_SECONDS):
                    self._ends = 0.0
                    return
            except UserError:
                continue  # once more, until it has ended


# ── the registry ────────────────────────────────────────────────────────────────────────────────────────────────────
class VertexRegistry(Registry):
    """The registry in a bucket; with `serving` it can be written.

    Whoever writes holds the lease. Each method finishes what an earlier one, cut off anywhere, has left: calling it again
    is always right.
    """

    def __init__(self, address: str, serving: Serving | None = None) -> None:
        self.where = address.rstrip("/")
        self._serving = serving

    def register(
        self, model: Path, metrics: Mapping[str, float], run: str, address: str | None = None
    ) -> Version:
        """Make a saved model a version of this project's model; the same one of the same run once only.

        Args:
            address: where the model is in Cloud Storage; without it, `model` is a path in a mounted bucket.

        Raises:
            UserError: the model is damaged, or in no bucket.
            ApiError: Google refused.
        """
        request = upload_request(self.serving, model, run, address)
        models, what = api.client("ModelService", self.serving.region), "registering the model"

        def find() -> int | None:
            number = self._registered(models, request["model"])
            if number is None and api.wait_for_pending_operations(models, self.serving.model, what):
                number = self._registered(models, request["model"])
            return number

        def upload() -> int | None:
            there = self._look_up(models, self.serving.model)
            which = (
                {"parent_model": self.serving.model}
                if there
                else {"model_id": self.serving.endpoint}
            )
            api.wait_for_operation(
                api.call(models.upload_model, {**request, **which}, what, repeatable=False), what
            )
            return find()

        number = api.get_or_create(find, upload)
        if number is None:
            raise UserError(
                f"{self.serving.model} was uploaded, and is not to be found yet. Type the same again."
            )
        self._describe(number, model, metrics, run, request["model"]["artifact_uri"])
        return self.version(number)

    def promote(self, number: int, reason: str, replaces: int | None) -> Version:
        """Make a version the champion, if the champion still is `replaces` (None: there was none).

        Raises:
            UserError: there is no such version.
            Overtaken: another run has changed the champion in the meantime.
        """
        version = self.version(number)
        while True:
            held = read(f"{self.where}/{CHAMPION}")
            before = read_change(held.content.decode(errors="replace"))
            if before and before["version"] == number:
                break
            if (before["version"] if before else None) != replaces:
                raise overtaken(number, replaces, before["version"] if before else None)
            if before:
                self._remember(before)  # in case that whoever decided it got no further
            change = {"version": number, "replaces": replaces, "reason": reason, "time": now()}
            if replace(f"{self.where}/{CHAMPION}", _line(change), held):
                break
        return version

    def follow(self) -> None:
        """Let the history and Vertex AI's aliases say what champion.json says."""
        change = self.last_change()
        if change is None:
            return
        self._remember(change)
        models = api.client("ModelService", self.serving.region)
        request = {
            "name": f"{self.serving.model}@{change['version']}",
            "version_aliases": ["champion", "default"],
        }
        api.call(models.merge_version_aliases, request, "marking the champion")

    def image(self, number: int) -> str:
        """The predictor's image with which a version is served; empty where Vertex AI has no such version any more."""
        models = api.client("ModelService", self.serving.region)
        found = self._look_up(models, f"{self.serving.model}@{number}")
        return str(found.container_spec.image_uri) if found else ""

    def address(self, number: int) -> str:
        """Where a version's saved model is in Cloud Storage.

        Raises:
            UserError: there is no such version.
        """
        self.version(number)
        return str(read(self._file(number)).document["model"])

    def document(self, number: int) -> dict[str, Any]:
        """The manifest of a version's saved model.

        Raises:
            UserError: there is no such version, or its model is gone.
        """
        address = self.address(number)
        document = read(f"{address}/{manifest.NAME}").document
        if "schema" not in document:
            raise UserError(
                f"the model of version {number} is not in {address} any more: there is no {manifest.NAME}."
            )
        return document

    @property
    def serving(self) -> Serving:
        """How models of this registry are served.

        Raises:
            UserError: nobody said so, and the registry can only be read.
        """
        if self._serving is None:
            raise UserError(
                f"the registry {self.where} is in the cloud; say how a model is served, with --serving."
            )
        return self._serving

    def _registered(self, models: Any, model: Mapping[str, Any]) -> int | None:
        """The number under which a run's model is registered: the lowest, should an answer that was lost have made two."""
        aliased = self._look_up(models, f"{self.serving.model}@{model['version_aliases'][0]}")
        if aliased is None:
            return None
        own = " AND ".join(
            f'labels.{name}="{model["labels"][name]}"' for name in ("run", "manifest")
        )
        request, what = (
            {"name": self.serving.model, "filter": own},
            "looking for the model's versions",
        )
        found = api.call(lambda **how: list(models.list_model_versions(**how)), request, what)
        return min(int(version.version_id) for version in [aliased, *found])

    def _look_up(self, models: Any, name: str) -> Any:
        """A model or its version; None when there is none."""
        try:
            return api.call(models.get_model, {"name": name}, "looking for the model")
        except api.ApiError as error:
            if error.code == 404:
                return None
            raise

    def _describe(
        self, number: int, model: Path, metrics: Mapping[str, float], run: str, address: str
    ) -> None:
        """Write version.json, after which the version is there."""
        held = read(self._file(number))
        if held.document.get("model") == address:
            return
        document = manifest.read(model)
        facts = {
            "metrics": dict(metrics),
            "data_sha256": document.get("data_sha256", "unknown"),
            "code_version": document.get("code_version", "unknown"),
            "run": run,
            "created": now(),
            "model": address,
        }
        replace(
            self._file(number),
            (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode(),
            held,
        )

    def _file(self, number: int) -> str:
        return f"{self.where}/versions/{number}/version.json"

    def _remember(self, change: dict[str, Any]) -> None:
        """Write a decision into the history, unless it is there."""
        line, address = _line(change), f"{self.where}/{HISTORY}"
        while line not in (held := read(address)).content.splitlines(keepends=True):
            replace(address, held.content + line, held)

    def _text(self, name: str) -> str | None:
        held = read(f"{self.where}/{name}")
        return held.content.decode() if held.generation else None

    def _numbers(self) -> list[int]:
        found = (
            re.search(r"/(\d+)/version\.json$", address)
            for address in storage.names(f"{self.where}/versions")
        )
        return sorted(int(match[1]) for match in found if match)

    def _model(self, number: int, address: str | None) -> Path:
        """Where the model would be if its bucket were mounted."""
        return paths.mounted(str(address))


def overtaken(number: int, compared: int | None, champion: int | None) -> Overtaken:
    """The challenger was compared with a champion that is none any more."""
    return Overtaken(
        f"it was compared with champion {compared or 'none'}, and meanwhile another run made {champion or 'none'} the champion; "
        f"to choose it all the same: make rollback VERSION={number} RUNNER=vertex"
    )


def upload_request(
    serving: Serving, model: Path, run: str, address: str | None = None
) -> dict[str, Any]:
    """What is sent to register a saved model, but for whether it is the first version.

    Raises:
        UserError: the model is damaged, or in no bucket; nobody said in which image it answers.
    """
    if not serving.image:
        raise UserError(
            "serving: image is missing. To register a model, name the predictor's container there, by digest."
        )
    document = manifest.read(model)
    address = (address or paths.address(model)).rstrip("/")
    if not address.startswith("gs://"):
        raise UserError(
            f"the model in {model} is in no bucket. Type: gcloud storage cp {model} gs://BUCKET/FOLDER/ --recursive; "
            "then name that address."
        )
    digest = manifest.sha256(model / manifest.NAME)
    # A label has at most 63 characters, a hash 64: half of it says enough.
    labels = {
        "run": run,
        "manifest": digest[:32],
        "data": document.get("data_sha256", "unknown")[:32],
        "commit": document.get("code_version", "unknown"),
    }
    return {
        "parent": serving.parent,
        "model": {
            "display_name": serving.endpoint,
            "version_aliases": [version_alias(run, digest)],
            "version_description": f"run {run}",
            "artifact_uri": address,
            "container_spec": {
                "image_uri": serving.image,
                "predict_route": PREDICT,
                "health_route": HEALTH,
                "ports": [{"container_port": PORT}],
            },
            "labels": {name: api.label(value) for name, value in labels.items()},
            **serving.encryption,
        },
    }


def version_alias(run: str, digest: str) -> str:
    """A version's alias: a run's model has the same one however often it is registered."""
    return f"v-{re.sub('[^a-z0-9]+', '-', run.lower()).strip('-')[:80]}-{digest[:12]}"


def _line(change: Mapping[str, Any]) -> bytes:
    return (json.dumps(change, ensure_ascii=False) + "\n").encode()


def open_registry(address: str) -> Registry:
    """The registry at an address, to be read: a folder, or gs://… in the cloud.

    A bucket is read as a folder where it is mounted, as in the pipeline's steps, and through Google's client elsewhere.

    Raises:
        UserError: the bucket is not mounted, and there is no client.
    """
    try:
        return LocalRegistry(paths.local_path(address))
    except UserError as error:
        try:
            import google.cloud.storage  # noqa: F401
        except ImportError:
            raise error from None
    return VertexRegistry(address)
