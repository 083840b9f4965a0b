"""Vertex AI's Model Registry: models with versions, numbered from 1, and aliases, each on one version."""

import re
from typing import Any

from google.cloud.aiplatform_v1 import types

from rehearsal.protojson import (
    PLACE,
    answer,
    canonical,
    check_labels,
    field_of,
    need,
    now,
    page,
    place_of,
    read,
    read_query,
)
from rehearsal.server import ApiError, Handler, Request, Response

ALIAS = r"[a-z][a-zA-Z0-9-]{0,126}[a-z0-9]"
MODEL_ID = r"[a-z_][a-z0-9_-]{0,62}"
CHANGEABLE = {"display_name", "description", "version_description", "labels"}


class Models:
    """Models: {name: {version: message}}; a version's message carries its aliases, `default` among them."""

    def __init__(self, vertex: Any) -> None:
        self.vertex = vertex
        self.models: dict[str, dict[str, Any]] = {}
        self.last: dict[str, int] = {}  # the last version's number: a number is never given twice

    def routes(self) -> list[tuple[str, str, str, Handler]]:
        """Paths and their handlers."""
        one = rf"{PLACE}/models/(?P<id>[^/:]+)"
        return [
            ("POST", f"{PLACE}/models:upload", "models.upload", self.upload),
            ("GET", f"{PLACE}/models", "models.list", self.search),
            ("GET", one, "models.get", self.get),
            ("GET", f"{one}:listVersions", "models.listVersions", self.versions),
            ("POST", f"{one}:mergeVersionAliases", "models.mergeVersionAliases", self.merge_aliases),
            ("PATCH", one, "models.patch", self.patch),
            ("DELETE", one, "models.delete", self.delete),
            ("DELETE", f"{one}:deleteVersion", "models.deleteVersion", self.delete_version),
        ]

    def upload(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """A new model, or a new version of `parent_model`."""
        asked = read(types.UploadModelRequest, request.body)
        asked.parent = found["parent"]
        model = asked.model
        need(model, "display_name")
        if "container_spec" in model:
            need(model, "container_spec.image_uri")
        elif not model.artifact_uri:
            raise ApiError(400, "model: container_spec or artifact_uri is required")
        check_labels(model.labels)
        for alias in model.version_aliases:
            check_alias(alias)
        name = self.new_name(asked, found)

        def apply() -> Any:
            version = self.add(name, types.Model(model))
            return types.UploadModelResponse(model=name, model_version_id=version)

        return asked, self.vertex.operate(name, "UploadModelOperationMetadata", apply)

    def new_name(self, asked: Any, found: re.Match[str]) -> str:
        """The name of the model that an upload makes or adds to."""
        if asked.parent_model:
            name = canonical(asked.parent_model.split("@")[0])
            if name not in self.models:
                raise ApiError(404, f"The Model does not exist: {asked.parent_model}")
            return name
        identity = asked.model_id or self.vertex.new_id()
        if asked.model_id and not re.fullmatch(MODEL_ID, identity):
            raise ApiError(400, f"model_id is {identity!r}: it must match {MODEL_ID}")
        name = f"{place_of(found)}/models/{identity}"
        if name in self.models:
            raise ApiError(409, f"The Model {name} already exists; parent_model adds a version to it")
        return name

    def add(self, name: str, model: Any) -> str:
        """Keep a version; returns its number."""
        versions = self.models.setdefault(name, {})
        number = str(self.last.get(name, 0) + 1)
        self.last[name] = int(number)
        aliases = list(model.version_aliases)
        model.name, model.version_id, model.version_aliases = name, number, []
        model.create_time = next(iter(versions.values())).create_time if versions else now()
        model.update_time = model.version_create_time = model.version_update_time = now()
        model.etag = self.vertex.new_id()
        model.supported_deployment_resources_types = [types.Model.DeploymentResourcesType.DEDICATED_RESOURCES]
        versions[number] = model
        self.give(name, number, aliases if number != "1" or "default" in aliases else [*aliases, "default"])
        return number

    def give(self, name: str, version: str, aliases: list[str]) -> None:
        """Let aliases name this version, and no other."""
        for model in self.models[name].values():
            kept = [alias for alias in model.version_aliases if alias not in aliases]
            model.version_aliases = [*kept, *aliases] if model.version_id == version else kept

    def find(self, name: str) -> Any:
        """The version that NAME, NAME@VERSION or NAME@ALIAS means; NAME means the default.

        Raises:
            ApiError: there is none.
        """
        base, _, version = canonical(name).partition("@")
        for model in self.models.get(base, {}).values():
            if model.version_id == version or (version or "default") in model.version_aliases:
                return model
        raise ApiError(404, f"The Model does not exist: {name}")

    def named(self, found: re.Match[str]) -> str:
        """The model name of a path, with its version if one was given."""
        return f"{place_of(found)}/models/{found['id']}"

    def shown(self, model: Any) -> Any:
        """A version as it is answered: with where it is deployed."""
        model.deployed_models = self.vertex.endpoints.where(model.name, model.version_id)
        return model

    def get(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """One version."""
        self.vertex.tick()
        name = self.named(found)
        return read_query(types.GetModelRequest, request, name=name), answer(self.shown(self.find(name)))

    def search(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """The default version of each model that fits."""
        asked = read_query(types.ListModelsRequest, request, parent=found["parent"])
        here = [self.shown(self.find(name)) for name in self.models if name.startswith(f"{place_of(found)}/")]
        return asked, page(here, asked, "models", model_field)

    def versions(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """The versions of one model."""
        name = self.named(found)
        asked = read_query(types.ListModelVersionsRequest, request, name=name)
        versions = self.models[self.find(name).name].values()
        return asked, page([self.shown(model) for model in versions], asked, "models", model_field)

    def merge_aliases(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Move aliases here; "-alias" takes one away."""
        asked = read(types.MergeVersionAliasesRequest, request.body)
        asked.name = self.named(found)
        need(asked, "version_aliases")
        if "@" not in asked.name:
            raise ApiError(400, f"name is {asked.name}: a version must be named, as in {asked.name}@1")
        model = self.find(asked.name)
        removed = [alias.removeprefix("-") for alias in asked.version_aliases if alias.startswith("-")]
        added = [alias for alias in asked.version_aliases if not alias.startswith("-") and alias not in removed]
        for alias in added:
            check_alias(alias)
        if "default" in removed:
            raise ApiError(400, "version_aliases: `default` cannot be removed; give it to another version")
        self.give(model.name, model.version_id, added)
        model.version_aliases = [alias for alias in model.version_aliases if alias not in removed]
        model.version_update_time = now()
        return asked, answer(self.shown(model))

    def patch(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Change what may be changed."""
        model = read(types.Model, request.body)
        asked = read_query(types.UpdateModelRequest, request, model=model)
        kept = self.find(self.named(found))
        check_mask(asked.update_mask.paths, CHANGEABLE)
        check_etag(model, kept)
        check_labels(model.labels)
        for path in asked.update_mask.paths:
            setattr(kept, path, getattr(model, path))
        kept.update_time, kept.etag = now(), self.vertex.new_id()
        return asked, answer(self.shown(kept))

    def delete(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Delete a model with all its versions, if none is deployed."""
        name = self.find(self.named(found)).name
        asked = read_query(types.DeleteModelRequest, request, name=name)

        def apply() -> None:
            for version in self.models[name]:
                self.refuse_deployed(name, version)
            del self.models[name]

        return asked, self.vertex.operate(name, "DeleteOperationMetadata", apply)

    def delete_version(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Delete one version: not a deployed one, not the default, so never the only one."""
        model = self.find(self.named(found))
        asked = read_query(types.DeleteModelVersionRequest, request, name=self.named(found))
        if "@" not in found["id"]:
            raise ApiError(400, f"name is {asked.name}: a version must be named, as in {asked.name}@1")

        def apply() -> None:
            self.refuse_deployed(model.name, model.version_id)
            if "default" in model.version_aliases:
                text = f"The default version {model.name}@{model.version_id} cannot be deleted: give `default` to another"
                raise ApiError(400, text, name="FAILED_PRECONDITION")
            del self.models[model.name][model.version_id]

        return asked, self.vertex.operate(model.name, "DeleteOperationMetadata", apply)

    def refuse_deployed(self, name: str, version: str) -> None:
        """Refuse to delete what is deployed."""
        if places := self.vertex.endpoints.where(name, version):
            text = f"The Model {name}@{version} cannot be deleted: it is deployed to {places[0].endpoint}; undeploy it first"
            raise ApiError(400, text, name="FAILED_PRECONDITION")


def model_field(model: Any, name: str) -> str | None:
    """A model's field for a filter; `model` is its id."""
    return model.name.split("/")[-1] if name == "model" else field_of(model, name)


def check_alias(alias: str) -> None:
    """Refuse what cannot be an alias."""
    if not re.fullmatch(ALIAS, alias):
        raise ApiError(400, f"version_aliases: {alias!r} must match {ALIAS}")


def check_mask(paths: Any, changeable: set[str]) -> None:
    """Refuse a change of what cannot be changed."""
    if not paths:
        raise ApiError(400, "update_mask is required")
    if wrong := sorted(set(paths) - changeable):
        raise ApiError(400, f"update_mask: {', '.join(wrong)} cannot be changed; {', '.join(sorted(changeable))} can")


def check_etag(sent: Any, kept: Any) -> None:
    """Refuse a change of what has changed since it was read; without an etag nothing is compared."""
    if sent.etag and sent.etag != kept.etag:
        raise ApiError(409, f"etag is {sent.etag!r}, but {kept.name} has changed since and has {kept.etag!r}", name="ABORTED")
