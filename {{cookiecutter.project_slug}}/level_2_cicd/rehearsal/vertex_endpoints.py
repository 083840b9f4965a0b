"""Vertex AI's endpoints: models deployed to them, the traffic between these, and predictions."""

import json
import re
from collections import Counter
from typing import Any

from google.cloud.aiplatform_v1 import types

from rehearsal.containers import ModelServer
from rehearsal.protojson import (
    PLACE,
    answer,
    check_labels,
    field_of,
    need,
    now,
    page,
    place_of,
    read,
    read_query,
)
from rehearsal.server import ApiError, Handler, Request, Response, error_response
from rehearsal.vertex_models import check_etag, check_mask

ENDPOINT_ID = r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?|[1-9][0-9]{0,8}|0"
DEPLOYED_MODEL_ID = r"[0-9]{1,10}"
CHANGEABLE = {"display_name", "description", "labels", "traffic_split"}
NEW = "0"  # in a traffic split: the model that is being deployed


class Endpoints:
    """Endpoints: {name: message}."""

    def __init__(self, vertex: Any) -> None:
        self.vertex = vertex
        self.endpoints: dict[str, Any] = {}
        self.running: dict[tuple[str, str], ModelServer] = {}  # (endpoint, deployed model) → what really serves it
        self.turns: dict[str, Counter[str]] = {}

    def routes(self) -> list[tuple[str, str, str, Handler]]:
        """Paths and their handlers."""
        one = rf"{PLACE}/endpoints/(?P<id>[^/:]+)"
        return [
            ("POST", f"{PLACE}/endpoints", "endpoints.create", self.create),
            ("GET", f"{PLACE}/endpoints", "endpoints.list", self.search),
            ("GET", one, "endpoints.get", self.get),
            ("PATCH", one, "endpoints.patch", self.patch),
            ("DELETE", one, "endpoints.delete", self.delete),
            ("POST", f"{one}:deployModel", "endpoints.deployModel", self.deploy),
            ("POST", f"{one}:undeployModel", "endpoints.undeployModel", self.undeploy),
            ("POST", f"{one}:predict", "endpoints.predict", self.predict),
            ("POST", f"{one}:rawPredict", "endpoints.rawPredict", self.raw_predict),
        ]

    def find(self, found: re.Match[str]) -> Any:
        """The endpoint of a path."""
        name = f"{place_of(found)}/endpoints/{found['id']}"
        if name not in self.endpoints:
            raise ApiError(404, f"The Endpoint does not exist: {name}")
        return self.endpoints[name]

    def where(self, model: str, version: str) -> list[Any]:
        """Where a version is deployed."""
        return [
            types.DeployedModelRef(endpoint=endpoint.name, deployed_model_id=deployed.id)
            for endpoint in self.endpoints.values()
            for deployed in endpoint.deployed_models
            if deployed.model == model and deployed.model_version_id == version
        ]

    def changed(self, endpoint: Any) -> Any:
        """Note that an endpoint has changed."""
        endpoint.update_time, endpoint.etag = now(), self.vertex.new_id()
        return endpoint

    def create(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """A new endpoint, without models."""
        message = read(types.Endpoint, request.body)
        identity = read_query(types.CreateEndpointRequest, request).endpoint_id or self.vertex.new_id()
        need(message, "display_name")
        check_labels(message.labels)
        if request.query.get("endpointId") and not re.fullmatch(ENDPOINT_ID, identity):
            raise ApiError(400, f"endpoint_id is {identity!r}: it must match {ENDPOINT_ID}")
        if message.deployed_models or message.traffic_split:
            raise ApiError(400, "deployed_models and traffic_split are not set here: use deployModel")
        message.name = f"{place_of(found)}/endpoints/{identity}"
        if message.name in self.endpoints:
            raise ApiError(409, f"The Endpoint {message.name} already exists")

        def apply() -> Any:
            endpoint = self.endpoints[message.name] = types.Endpoint(message)
            endpoint.create_time = now()
            return self.changed(endpoint)

        return message, self.vertex.operate(message.name, "CreateEndpointOperationMetadata", apply)

    def get(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """One endpoint."""
        self.vertex.tick()
        endpoint = self.find(found)
        return read_query(types.GetEndpointRequest, request, name=endpoint.name), answer(endpoint)

    def search(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Those that fit."""
        asked = read_query(types.ListEndpointsRequest, request, parent=found["parent"])
        here = [endpoint for name, endpoint in self.endpoints.items() if name.startswith(f"{place_of(found)}/")]
        return asked, page(here, asked, "endpoints", endpoint_field)

    def patch(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Change what may be changed; the traffic must be that of deployed models."""
        sent = read(types.Endpoint, request.body)
        asked = read_query(types.UpdateEndpointRequest, request, endpoint=sent)
        kept = self.find(found)
        asked.endpoint.name = kept.name
        check_mask(asked.update_mask.paths, CHANGEABLE)
        check_etag(sent, kept)
        check_labels(sent.labels)
        if "traffic_split" in asked.update_mask.paths:
            check_traffic(dict(sent.traffic_split), {deployed.id for deployed in kept.deployed_models})
        for path in asked.update_mask.paths:
            setattr(kept, path, getattr(sent, path))
        return asked, answer(self.changed(kept))

    def delete(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Delete an endpoint that has no models."""
        endpoint = self.find(found)
        asked = read_query(types.DeleteEndpointRequest, request, name=endpoint.name)

        def apply() -> None:
            if endpoint.deployed_models:
                text = f"The Endpoint {endpoint.name} cannot be deleted: models are deployed to it; undeploy them first"
                raise ApiError(400, text, name="FAILED_PRECONDITION")
            self.endpoints.pop(endpoint.name, None)

        return asked, self.vertex.operate(endpoint.name, "DeleteOperationMetadata", apply)

    def deploy(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Deploy a version, and set the traffic if it is given."""
        asked = read(types.DeployModelRequest, request.body)
        endpoint = self.find(found)
        asked.endpoint = endpoint.name
        deployed = types.DeployedModel(asked.deployed_model)
        need(deployed, "model")
        model = self.vertex.models.find(deployed.model)
        deployed.model, deployed.model_version_id = model.name, model.version_id
        deployed.display_name = deployed.display_name or model.display_name
        check_resources(deployed)
        if deployed.id and not re.fullmatch(DEPLOYED_MODEL_ID, deployed.id):
            raise ApiError(400, f"deployed_model.id is {deployed.id!r}: 1 to 10 digits")
        deployed.id = deployed.id or self.vertex.new_id(10)

        def check() -> dict[str, int]:
            here = {other.id for other in endpoint.deployed_models}
            if deployed.id in here:
                raise ApiError(409, f"The DeployedModel {deployed.id} already exists on {endpoint.name}")
            traffic = dict(asked.traffic_split)
            if traffic:
                check_traffic(traffic, {*here, NEW})
            return {deployed.id if key == NEW else key: share for key, share in traffic.items()}

        def apply() -> Any:
            traffic = check()
            deployed.create_time = now()
            endpoint.deployed_models.append(deployed)
            if traffic:
                endpoint.traffic_split = traffic
            self.changed(endpoint)
            if server is not None:
                self.running[endpoint.name, deployed.id] = server
            return types.DeployModelResponse(deployed_model=deployed)

        check()
        about = (endpoint.name, deployed.id)
        if self.vertex.under_way(about):
            raise ApiError(409, f"The DeployedModel {deployed.id} is being deployed to {endpoint.name} already")
        server = None if self.vertex.containers is None else self.vertex.containers.start_server(model, deployed)
        return asked, self.vertex.operate(endpoint.name, "DeployModelOperationMetadata", apply, server, about)

    def undeploy(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Take a deployed model away: one without traffic, or the last."""
        asked = read(types.UndeployModelRequest, request.body)
        endpoint = self.find(found)
        asked.endpoint = endpoint.name
        need(asked, "deployed_model_id")

        def check() -> dict[str, int]:
            here = {deployed.id for deployed in endpoint.deployed_models}
            if asked.deployed_model_id not in here:
                raise ApiError(404, f"The DeployedModel {asked.deployed_model_id} does not exist on {endpoint.name}")
            traffic = dict(asked.traffic_split)
            if traffic:
                check_traffic(traffic, here)
            left = traffic or dict(endpoint.traffic_split)
            if here != {asked.deployed_model_id} and left.get(asked.deployed_model_id):
                text = f"The DeployedModel {asked.deployed_model_id} still has {left[asked.deployed_model_id]} % of the traffic"
                raise ApiError(400, text, name="FAILED_PRECONDITION")
            return {} if here == {asked.deployed_model_id} else {key: share for key, share in left.items() if key in here}

        def apply() -> Any:
            traffic = check()
            traffic.pop(asked.deployed_model_id, None)
            endpoint.deployed_models = [kept for kept in endpoint.deployed_models if kept.id != asked.deployed_model_id]
            endpoint.traffic_split = traffic
            self.changed(endpoint)
            server = self.running.pop((endpoint.name, asked.deployed_model_id), None)
            if server is not None:
                server.stop()
            return types.UndeployModelResponse()

        check()
        return asked, self.vertex.operate(endpoint.name, "UndeployModelOperationMetadata", apply)

    def choose(self, endpoint: Any) -> Any:
        """The deployed model whose turn it is: each gets its share of every hundred predictions, evenly spread."""
        shares = {key: share for key, share in endpoint.traffic_split.items() if share}
        if not shares:
            raise ApiError(400, f"The Endpoint {endpoint.name} has no deployed model with traffic", name="FAILED_PRECONDITION")
        turns = self.turns.setdefault(endpoint.name, Counter())
        for key in set(turns) - set(shares):
            del turns[key]
        turns.update(shares)
        chosen = max(shares, key=lambda key: turns[key])
        turns[chosen] -= sum(shares.values())
        return next(deployed for deployed in endpoint.deployed_models if deployed.id == chosen)

    def predict(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """Predictions of the deployed model whose turn it is."""
        return self._predict(request, found, read(types.PredictRequest, request.body), raw=False)

    def raw_predict(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        """The same, with the body as the container takes and gives it."""
        return self._predict(request, found, request.body, raw=True)

    def _predict(self, request: Request, found: re.Match[str], message: Any, raw: bool) -> tuple[Any, Response]:
        endpoint = self.find(found)
        deployed = self.choose(endpoint)
        model = self.vertex.models.find(f"{deployed.model}@{deployed.model_version_id}")
        server = self.running.get((endpoint.name, deployed.id))
        predictor = self.vertex.predictor
        if server is None and predictor is None:
            raise ApiError(501, "this double runs no containers: set FakeVertex.predictor, or give it Containers")

        def later() -> Response:
            response = server.predict(request.body) if server is not None else predictor(deployed, request.body)
            if raw:
                response.headers["X-Vertex-AI-Deployed-Model-Id"] = deployed.id
                return response
            if response.status != 200:
                return refused_by_container(response)
            more = {
                "deployedModelId": deployed.id,
                "model": deployed.model,
                "modelVersionId": deployed.model_version_id,
                "modelDisplayName": model.display_name,
            }
            body = json.loads(response.body) if isinstance(response.body, bytes) else response.body
            return Response({**body, **more})

        return message, Response(later)


def refused_by_container(response: Response) -> Response:
    """An error of the container, as `predict` tells it."""
    said = response.body.decode(errors="replace") if isinstance(response.body, bytes) else json.dumps(response.body)
    return error_response(response.status if response.status in {400, 429, 503, 504} else 500, said)


def endpoint_field(endpoint: Any, name: str) -> str | None:
    """An endpoint's field for a filter; `endpoint` is its id."""
    return endpoint.name.split("/")[-1] if name == "endpoint" else field_of(endpoint, name)


def check_traffic(traffic: dict[str, int], known: set[str]) -> None:
    """Refuse shares that do not add up to 100, or go to what is not there."""
    if unknown := sorted(set(traffic) - known):
        raise ApiError(400, f"traffic_split: there is no DeployedModel {', '.join(unknown)}")
    if any(share < 0 for share in traffic.values()) or (traffic and sum(traffic.values()) != 100):
        raise ApiError(400, f"traffic_split: {sum(traffic.values())} is the sum of {traffic}; it must be 100")


def check_resources(deployed: Any) -> None:
    """Refuse resources that the API refuses; fill in what it fills in."""
    kinds = [kind for kind in ("dedicated_resources", "automatic_resources", "shared_resources") if kind in deployed]
    if len(kinds) != 1:
        raise ApiError(400, "deployed_model: one of dedicated_resources, automatic_resources or shared_resources is required")
    if kinds == ["dedicated_resources"]:
        resources = deployed.dedicated_resources
        need(resources, "machine_spec.machine_type")
        if resources.min_replica_count < 1:
            raise ApiError(400, "dedicated_resources.min_replica_count must be at least 1")
        resources.max_replica_count = resources.max_replica_count or resources.min_replica_count
        if resources.max_replica_count < resources.min_replica_count:
            raise ApiError(400, "dedicated_resources.max_replica_count is less than min_replica_count")
