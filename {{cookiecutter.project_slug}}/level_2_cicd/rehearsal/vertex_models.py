"""Fake of Vertex AI's Model Registry: numbered versions, and aliases, each on one version."""

from collections import Counter
from typing import Any

from google.cloud.aiplatform_v1 import types

from level_2_cicd.rehearsal.protojson import (
    as_json,
    canonical,
    check_id,
    check_labels,
    list_page,
    now,
    parse,
    parse_query,
    require,
)
from level_2_cicd.rehearsal.server import ApiError, Json, Request, route
from level_2_cicd.rehearsal.vertex_resources import ONE, Collection

ALIAS = r"[a-z][a-zA-Z0-9-]{0,126}[a-z0-9]"
MODEL_ID = r"[a-z_][a-z0-9_-]{0,62}"


class Models(Collection):
    """Models: {name: {version: message}}; messages have their aliases, including `default`."""

    plural, kind = "models", types.Model

    def __init__(self, vertex: Any) -> None:
        super().__init__(vertex)
        self._last_version: Counter[str] = Counter()  # version numbers are never reused

    @route("POST", ":upload", "upload")
    def upload(self, request: Request) -> Any:
        """Create a model, or a new version of `parent_model`."""
        message = request.message = parse(types.UploadModelRequest, request.body)
        message.parent = request["parent"]
        model = message.model
        require(model, "display_name")
        if "container_spec" in model:
            require(model, "container_spec.image_uri")
        elif not model.artifact_uri:
            raise ApiError(400, "model: container_spec or artifact_uri is required")
        check_labels(model.labels)
        for alias in model.version_aliases:
            check_id("version_aliases", alias, ALIAS)
        # Find the name now, so that an unknown parent fails in the call, not in the operation.
        name = self._upload_name(request)

        def apply() -> Any:
            version = self._add(name, types.Model(model))
            return types.UploadModelResponse(model=name, model_version_id=version)

        return self.vertex.start_operation(name, "UploadModel", apply)

    def _upload_name(self, request: Request) -> str:
        message = request.message
        if message.parent_model:
            name = canonical(message.parent_model.split("@")[0])
            if name not in self.by_name:
                raise self.not_found(message.parent_model)
            return name
        if message.model_id:
            check_id("model_id", message.model_id, MODEL_ID)
        name = self.name(request, message.model_id or self.vertex.new_id())
        self.check_new(name, "; parent_model adds a version to it")
        return name

    def _add(self, name: str, model: Any) -> str:
        versions = self.by_name.setdefault(name, {})
        self._last_version[name] += 1
        model.name, model.version_id = name, str(self._last_version[name])
        aliases, model.version_aliases = list(model.version_aliases), []
        # All versions share the creation time of the model.
        first = next(iter(versions.values())) if versions else None
        model.create_time = first.create_time if first else now()
        model.version_create_time = model.version_update_time = now()
        dedicated = types.Model.DeploymentResourcesType.DEDICATED_RESOURCES
        model.supported_deployment_resources_types = [dedicated]
        versions[model.version_id] = self.touch(model)
        # A model always has a default version, so the first version becomes it.
        if model.version_id == "1" and "default" not in aliases:
            aliases.append("default")
        self._move_aliases(model, aliases)
        return str(model.version_id)

    def _move_aliases(self, model: Any, aliases: list[str]) -> None:
        """Move aliases to this version."""
        # An alias names one version, so Vertex AI removes it from the others.
        for version in self.by_name[model.name].values():
            others = [alias for alias in version.version_aliases if alias not in aliases]
            version.version_aliases = [*others, *aliases] if version is model else others

    def find_version(self, name: str) -> Any:
        """Return the version named NAME (the default one), NAME@VERSION or NAME@ALIAS."""
        base, _, version = canonical(name).partition("@")
        for model in self.by_name.get(base, {}).values():
            if model.version_id == version or (version or "default") in model.version_aliases:
                return model
        raise self.not_found(name)

    def find(self, request: Request) -> Any:
        """Return the version named by a request's path."""
        return self.find_version(self.name(request))

    def in_location(self, request: Request) -> list[Any]:
        """Return the default version of each model in a location."""
        models = [next(iter(versions.values())) for versions in super().in_location(request)]
        return [self._with_deployments(self.find_version(model.name)) for model in models]

    def view(self, message: Any) -> Json:
        """Convert a version with its deployments to JSON."""
        return as_json(self._with_deployments(message))

    def _with_deployments(self, model: Any) -> Any:
        model.deployed_models = self.vertex.endpoints.deployments(model.name, model.version_id)
        return model

    @route("GET", f"{ONE}:listVersions", "listVersions")
    def list_versions(self, request: Request) -> Json:
        name = self.name(request)
        query = request.message = parse_query(types.ListModelVersionsRequest, request, name=name)
        versions = self.by_name[self.find(request).name].values()
        models = [self._with_deployments(model) for model in versions]
        return list_page(models, query, "models")

    @route("POST", f"{ONE}:mergeVersionAliases", "mergeVersionAliases")
    def merge_aliases(self, request: Request) -> Json:
        """Move aliases to a version; "-ALIAS" removes an alias."""
        message = request.message = parse(types.MergeVersionAliasesRequest, request.body)
        message.name = self.name(request)
        require(message, "version_aliases")
        # Aliases move to an explicit version, never to "the default one".
        if "@" not in message.name:
            rule = f"a version is required, as in {message.name}@1"
            raise ApiError(400, f"name is {message.name}: {rule}")
        model = self.find(request)
        aliases = list(message.version_aliases)
        removed = {alias.removeprefix("-") for alias in aliases if alias.startswith("-")}
        added = [alias for alias in aliases if alias[0] != "-" and alias not in removed]
        for alias in added:
            check_id("version_aliases", alias, ALIAS)
        if "default" in removed:
            rule = "`default` cannot be removed; move it to another version"
            raise ApiError(400, f"version_aliases: {rule}")
        self._move_aliases(model, added)
        model.version_aliases = [name for name in model.version_aliases if name not in removed]
        model.version_update_time = now()
        return self.view(model)
