"""Cloud model registry: models in Vertex AI, metrics and champion in Cloud Storage.

gs://…/registry/versions/N/version.json   metrics and origin of model version N in Vertex AI
gs://…/registry/champion.json             the champion: the served version, and the reason
gs://…/registry/history.jsonl             all champion changes
"""

# Same layout as LocalRegistry, so pipeline steps can read a mounted bucket as a local registry.
# Each write is conditional on the generation that was read, so concurrent changes are not lost.
# champion.json is the source of truth; the aliases in Vertex AI are updated from it.

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Self

from core import manifest, paths
from core.errors import UserError
from core.registry import LocalRegistry, Registry, StaleChampion, Version, now, read_change
from gcp import client as api
from gcp import storage

PORT, PREDICT, HEALTH = 8080, "/predict", "/health"  # of the predictor container
RUNNER = " RUNNER=vertex"  # option of the make targets for this registry


@dataclass(frozen=True)
class Serving:
    """Serving settings of a model.

    Attributes:
        endpoint: display name of the endpoint, also the model id in Vertex AI.
        image: predictor image by digest; required only to register.
        replicas: minimum and maximum.
        canary_percent: traffic of a new version during its check.
        service_account: email; empty at level 1.
        key: Cloud KMS key; empty at level 1.
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
        """Parse a pipeline parameter; pipelines pass every number as a double."""
        fields = cls.__dataclass_fields__
        problems = [
            f"{name} is missing"
            for name, field in fields.items()
            if name not in document and field.default is MISSING
        ] + [f"unknown key {name}" for name in document if name not in fields]
        if problems:
            raise UserError(f"serving: {'; '.join(problems)}. Its keys are {', '.join(fields)}.")
        try:
            low, high = (int(number) for number in document["replicas"])
            percent = int(document["canary_percent"])
        except (ValueError, TypeError):
            raise UserError(
                "serving: replicas must be two integers, as [1, 3], and canary_percent one."
            ) from None
        if not (1 <= low <= high and 1 <= percent <= 100):
            raise UserError(
                "serving: replicas must be [minimum, maximum] from 1, canary_percent from 1 to 100."
            )
        return cls(**{**document, "replicas": (low, high), "canary_percent": percent})

    @property
    def parent(self) -> str:
        """Return projects/PROJECT/locations/REGION."""
        return f"projects/{self.project}/locations/{self.region}"

    @property
    def model(self) -> str:
        """Return the resource name of the model, without a version."""
        return f"{self.parent}/models/{self.endpoint}"

    @property
    def encryption(self) -> dict[str, Any]:
        """Return the request field for a customer-managed key; empty without a key."""
        return {"encryption_spec": {"kms_key_name": self.key}} if self.key else {}


class VertexRegistry(Registry):
    """Registry in a bucket and in Vertex AI.

    Writing needs `serving` and a lease. All methods are idempotent: retry after any failure.
    """

    def __init__(self, address: str, serving: Serving | None = None) -> None:
        self.where = address.rstrip("/")
        self._serving = serving

    @property
    def serving(self) -> Serving:
        """Return the serving settings, which are required for writing."""
        if self._serving is None:
            raise UserError(f"the registry {self.where} is in the cloud: --serving is missing.")
        return self._serving

    def register(
        self, model: Path, metrics: Mapping[str, float], run: str, address: str | None = None
    ) -> Version:
        """Register the model of a run as a version, or return its existing version.

        Args:
            address: gs:// address of the model; not needed if `model` is in a mounted bucket.
        """
        serving, what = self.serving, "registering the model"
        request = upload_request(serving, model, run, address)
        service = api.client("ModelService", serving.region)

        def find() -> int | None:
            number = self._registered(service, request["model"])
            # The upload of an interrupted call may still be pending.
            if number is None and api.wait_for_pending_operations(service, serving.model, what):
                number = self._registered(service, request["model"])
            return number

        def upload() -> int | None:
            exists = self._look_up(service, serving.model)
            target = {"parent_model": serving.model} if exists else {"model_id": serving.endpoint}
            upload_model = service.upload_model
            operation = api.call(upload_model, {**request, **target}, what, repeatable=False)
            api.wait_for_operation(operation, what)
            return find()

        number = api.get_or_create(find, upload)
        if number is None:
            raise UserError(f"{serving.model} was uploaded but is not listed yet. Retry.")
        self._describe(number, model, metrics, run, request["model"]["artifact_uri"])
        return self.version(number)

    def promote(self, number: int, reason: str, replaces: int | None) -> Version:
        """Make a version the champion if the current champion is `replaces` (None: no champion).

        Otherwise raise StaleChampion: another run has changed the champion.
        """
        version, address = self.version(number), f"{self.where}/champion.json"
        while True:
            current = storage.get(address)
            last = read_change(current.content.decode(errors="replace"))
            champion = last["version"] if last else None
            if champion == number:
                return version
            if champion != replaces:
                raise StaleChampion(number, replaces, champion, RUNNER)
            if last:
                self._remember(last)  # the process that wrote it may have died before this step
            change = {"version": number, "replaces": replaces, "reason": reason, "time": now()}
            if storage.replace(address, _line(change), current):
                return version

    def follow(self) -> None:
        """Update the history and the aliases in Vertex AI from champion.json."""
        change = self.last_change()
        if change is None:
            return
        self._remember(change)
        service = api.client("ModelService", self.serving.region)
        request = {
            "name": f"{self.serving.model}@{change['version']}",
            "version_aliases": ["champion", "default"],
        }
        api.call(service.merge_version_aliases, request, "setting the champion's aliases")

    def image(self, number: int) -> str:
        """Return the predictor image of a version; empty if Vertex AI no longer has it."""
        service = api.client("ModelService", self.serving.region)
        model = self._look_up(service, f"{self.serving.model}@{number}")
        return str(model.container_spec.image_uri) if model else ""

    def address(self, number: int) -> str:
        """Return the gs:// address of a version's saved model folder."""
        self.version(number)
        return str(storage.get(self._file(number)).document["model"])

    def document(self, number: int) -> dict[str, Any]:
        """Return the manifest of a version's saved model."""
        address = self.address(number)
        document = storage.get(f"{address}/{manifest.NAME}").document
        if "schema" not in document:
            raise UserError(f"version {number}: {manifest.NAME} not found in {address}.")
        return document

    def _registered(self, service: Any, model: Mapping[str, Any]) -> int | None:
        """Return the version number of a registered model, or None if it is not registered."""
        name, labels = self.serving.model, model["labels"]
        version = self._look_up(service, f"{name}@{model['version_aliases'][0]}")
        if version is None:
            return None
        own = f'labels.run="{labels["run"]}" AND labels.manifest="{labels["manifest"]}"'

        def list_all(**options: Any) -> list[Any]:  # all pages, so the retry covers each
            return list(service.list_model_versions(**options))

        versions = api.call(list_all, {"name": name, "filter": own}, "listing the model's versions")
        # A retry after a lost response may have created a second version: the lowest one counts.
        return min(int(one.version_id) for one in [version, *versions])

    def _look_up(self, service: Any, name: str) -> Any:
        try:
            return api.call(service.get_model, {"name": name}, "looking up the model")
        except api.ApiError as error:
            if error.code == 404:
                return None
            raise

    def _describe(
        self, number: int, model: Path, metrics: Mapping[str, float], run: str, address: str
    ) -> None:
        """Write version.json, which completes a registration."""
        current = storage.get(self._file(number))
        if current.document.get("model") == address:
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
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        storage.replace(self._file(number), text.encode(), current)

    def _file(self, number: int) -> str:
        return f"{self.where}/versions/{number}/version.json"

    def _remember(self, change: dict[str, Any]) -> None:
        """Append a champion change to the history, unless it is already there."""
        line, address = _line(change), f"{self.where}/history.jsonl"
        # A failed replace means a concurrent write: read again and retry.
        while line not in (current := storage.get(address)).content.splitlines(keepends=True):
            storage.replace(address, current.content + line, current)

    def _text(self, name: str) -> str | None:
        current = storage.get(f"{self.where}/{name}")
        return current.content.decode() if current.generation else None

    def _numbers(self) -> list[int]:
        names = "\n".join(storage.names(f"{self.where}/versions"))
        return sorted(map(int, re.findall(r"/(\d+)/version\.json$", names, re.MULTILINE)))

    def _model(self, number: int, address: str | None) -> Path:
        return paths.mounted(str(address))


def upload_request(
    serving: Serving, model: Path, run: str, address: str | None = None
) -> dict[str, Any]:
    """Build the upload request of a saved model, without model id or parent model."""
    if not serving.image:
        raise UserError("serving: image is missing; to register, name the predictor by digest.")
    document = manifest.read(model)
    address = (address or paths.address(model)).rstrip("/")
    if not address.startswith("gs://"):
        raise UserError(
            f"the model {model} is not in a bucket. Run"
            f" `gcloud storage cp {model} gs://BUCKET/FOLDER/ --recursive`, then pass that address."
        )
    digest = manifest.sha256(model / manifest.NAME)
    # Derived from run and content, so that a repeated registration finds the version.
    alias = f"v-{re.sub('[^a-z0-9]+', '-', run.lower()).strip('-')[:80]}-{digest[:12]}"
    # Labels are limited to 63 characters, and a SHA-256 has 64: half of it is enough.
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
            "version_aliases": [alias],
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


def _line(change: Mapping[str, Any]) -> bytes:
    return (json.dumps(change, ensure_ascii=False) + "\n").encode()


def open_registry(address: str) -> Registry:
    """Open a registry for reading: a folder, a mounted bucket, or gs://… through the API."""
    try:
        return LocalRegistry(paths.local_path(address))
    except UserError:
        try:
            import google.cloud.storage  # noqa: F401
        except ImportError:
            pass
        else:
            return VertexRegistry(address)
        raise
