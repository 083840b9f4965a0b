"""Fake of Vertex AI's endpoints: deployed models, traffic split, and predictions."""

import json
from collections import Counter
from typing import Any

from google.cloud.aiplatform_v1 import types

from level_2_cicd.rehearsal.containers import ModelServer
from level_2_cicd.rehearsal.protojson import (
    check_id,
    check_labels,
    now,
    parse,
    parse_query,
    require,
)
from level_2_cicd.rehearsal.server import (
    ApiError,
    Json,
    Request,
    Response,
    failed_precondition,
    route,
)
from level_2_cicd.rehearsal.vertex_resources import ONE, Collection

ENDPOINT_ID = r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?|[1-9][0-9]{0,8}|0"
DEPLOYED_MODEL_ID = r"[0-9]{1,10}"
MUTABLE = {"display_name", "description", "labels", "traffic_split"}
NEW = "0"  # in a traffic split, the model that is being deployed


class Endpoints(Collection):
    """Endpoints: {name: message}."""

    plural, kind = "endpoints", types.Endpoint

    def __init__(self, vertex: Any) -> None:
        super().__init__(vertex)
        self.servers: dict[tuple[str, str], ModelServer] = {}  # by endpoint, deployed model
        self._shares: dict[str, Counter[str]] = {}

    def deployments(self, model: str, version: str) -> list[Any]:
        """Return the deployments of a model version."""
        return [
            types.DeployedModelRef(endpoint=endpoint.name, deployed_model_id=deployed.id)
            for endpoint in self.by_name.values()
            for deployed in endpoint.deployed_models
            if (deployed.model, deployed.model_version_id) == (model, version)
        ]

    @route("POST", "", "create")
    def create(self, request: Request) -> Any:
        message = request.message = parse(types.Endpoint, request.body)
        identity = parse_query(types.CreateEndpointRequest, request).endpoint_id
        require(message, "display_name")
        check_labels(message.labels)
        if identity:
            check_id("endpoint_id", identity, ENDPOINT_ID)
        if message.deployed_models or message.traffic_split:
            raise ApiError(400, "deployed_models and traffic_split cannot be set: use deployModel")
        name = message.name = self.name(request, identity or self.vertex.new_id())
        self.check_new(name)

        def apply() -> Any:
            endpoint = self.by_name[name] = types.Endpoint(message)
            endpoint.create_time = now()
            return self.touch(endpoint)

        return self.vertex.start_operation(name, "CreateEndpoint", apply)

    @route("PATCH", ONE, "patch")
    def patch(self, request: Request) -> Json:
        changes = parse(types.Endpoint, request.body)
        message = parse_query(types.UpdateEndpointRequest, request, endpoint=changes)
        endpoint = self.find(request)
        message.endpoint.name = endpoint.name
        request.message, paths = message, message.update_mask.paths
        check_mask(paths)
        # The etag detects concurrent changes; without one, the last update wins.
        if changes.etag and changes.etag != endpoint.etag:
            state = f"{endpoint.name} has changed since and has {endpoint.etag!r}"
            raise ApiError(409, f"etag is {changes.etag!r}, but {state}", name="ABORTED")
        check_labels(changes.labels)
        if "traffic_split" in paths:
            check_traffic(dict(changes.traffic_split), deployed_ids(endpoint))
        for path in paths:
            setattr(endpoint, path, getattr(changes, path))
        return self.view(self.touch(endpoint))

    @route("POST", f"{ONE}:deployModel", "deployModel")
    def deploy(self, request: Request) -> Any:
        """Deploy a model version, and set the traffic split if given."""
        message = request.message = parse(types.DeployModelRequest, request.body)
        endpoint = self.find(request)
        message.endpoint = endpoint.name
        deployed, model = self._new_deployed_model(message)
        split, key = dict(message.traffic_split), (endpoint.name, deployed.id)
        traffic_after_deploy(endpoint, deployed.id, split)  # fail now rather than in the operation
        if self.vertex.is_pending(key):
            problem = f"is being deployed to {endpoint.name} already"
            raise ApiError(409, f"The DeployedModel {deployed.id} {problem}")
        # Start the server only after all checks: a rejected call must leave no container.
        containers = self.vertex.containers
        server = containers.start_server(model, deployed) if containers else None

        def apply() -> Any:
            # Check again: the endpoint may have changed since the operation started.
            traffic = traffic_after_deploy(endpoint, deployed.id, split)
            deployed.create_time = now()
            endpoint.deployed_models.append(deployed)
            if traffic:
                endpoint.traffic_split = traffic
            self.touch(endpoint)
            # The server gets predictions only from now on: it was not healthy before.
            if server is not None:
                self.servers[key] = server
            return types.DeployModelResponse(deployed_model=deployed)

        return self.vertex.start_operation(endpoint.name, "DeployModel", apply, server, key)

    def _new_deployed_model(self, message: Any) -> tuple[Any, Any]:
        """Complete and check a deployed model; return it and its model."""
        deployed = types.DeployedModel(message.deployed_model)
        require(deployed, "model")
        model = self.vertex.models.find_version(deployed.model)
        # Store the version's number, because an alias may move later.
        deployed.model, deployed.model_version_id = model.name, model.version_id
        deployed.display_name = deployed.display_name or model.display_name
        check_resources(deployed)
        if deployed.id:
            check_id("deployed_model.id", deployed.id, DEPLOYED_MODEL_ID)
        deployed.id = deployed.id or self.vertex.new_id(10)
        return deployed, model

    @route("POST", f"{ONE}:undeployModel", "undeployModel")
    def undeploy(self, request: Request) -> Any:
        """Undeploy a model that has no traffic, or the last model."""
        message = request.message = parse(types.UndeployModelRequest, request.body)
        endpoint = self.find(request)
        message.endpoint = endpoint.name
        require(message, "deployed_model_id")
        identity, split = message.deployed_model_id, dict(message.traffic_split)
        traffic_after_undeploy(endpoint, identity, split)  # fail now rather than in the operation

        def apply() -> Any:
            traffic = traffic_after_undeploy(endpoint, identity, split)
            others = [one for one in endpoint.deployed_models if one.id != identity]
            endpoint.deployed_models, endpoint.traffic_split = others, traffic
            self.touch(endpoint)
            if server := self.servers.pop((endpoint.name, identity), None):
                server.stop()
            return types.UndeployModelResponse()

        return self.vertex.start_operation(endpoint.name, "UndeployModel", apply)

    def choose(self, endpoint: Any) -> Any:
        """Return the next deployed model; of 100 predictions each model gets exactly its share."""
        split = {key: share for key, share in endpoint.traffic_split.items() if share}
        if not split:
            problem = "has no deployed model with traffic"
            raise failed_precondition(f"The Endpoint {endpoint.name} {problem}")
        # Smooth weighted round-robin: add the shares, select the largest sum, subtract the total.
        shares = self._shares.setdefault(endpoint.name, Counter())
        # Forget models without traffic, so that they start fresh when they get traffic again.
        for key in set(shares) - set(split):
            del shares[key]
        shares.update(split)
        winner = max(split, key=lambda key: shares[key])
        shares[winner] -= sum(split.values())
        return next(one for one in endpoint.deployed_models if one.id == winner)

    @route("POST", f"{ONE}:predict", "predict")
    def predict(self, request: Request) -> Response:
        """Predict with the next deployed model and add its identity to the response."""
        request.message = parse(types.PredictRequest, request.body)
        deployed, response = self._predict(request)
        model = self.vertex.models.find_version(f"{deployed.model}@{deployed.model_version_id}")

        def complete() -> Response:
            result = response()
            content = result.body
            if result.status != 200:
                text = content.decode(errors="replace") if isinstance(content, bytes) else content
                # Vertex AI returns 500 for all other statuses of a container.
                status = result.status if result.status in {400, 429, 503, 504} else 500
                raise ApiError(status, text if isinstance(text, str) else json.dumps(text))
            source = {
                "deployedModelId": deployed.id,
                "model": deployed.model,
                "modelVersionId": deployed.model_version_id,
                "modelDisplayName": model.display_name,
            }
            body = json.loads(content) if isinstance(content, bytes) else content
            return Response({**body, **source})

        return Response(complete)

    @route("POST", f"{ONE}:rawPredict", "rawPredict")
    def raw_predict(self, request: Request) -> Response:
        """Pass the body to the next deployed model and return its response unchanged."""
        request.message = request.body
        deployed, response = self._predict(request)

        def complete() -> Response:
            result: Response = response()
            result.headers["X-Vertex-AI-Deployed-Model-Id"] = deployed.id
            return result

        return Response(complete)

    def _predict(self, request: Request) -> tuple[Any, Any]:
        """Return the next deployed model and a function that returns its response."""
        # The function runs without the lock, because a prediction takes time.
        endpoint = self.find(request)
        deployed = self.choose(endpoint)
        if server := self.servers.get((endpoint.name, deployed.id)):
            return deployed, lambda: server.predict(request.body)
        predictor = self.vertex.predictor
        if predictor is None:
            message = "no containers run here: set FakeVertex.predictor, or pass Containers"
            raise ApiError(501, message)
        return deployed, lambda: predictor(deployed, request.body)


def check_mask(paths: Any) -> None:
    """Reject an update of immutable fields."""
    if not paths:
        raise ApiError(400, "update_mask is required")
    if fixed := ", ".join(sorted(set(paths) - MUTABLE)):
        known = ", ".join(sorted(MUTABLE))
        raise ApiError(400, f"update_mask: {fixed} cannot be changed; {known} can")


def deployed_ids(endpoint: Any) -> set[str]:
    """Return the IDs of the deployed models."""
    return {deployed.id for deployed in endpoint.deployed_models}


def traffic_after_deploy(endpoint: Any, identity: str, split: dict[str, int]) -> dict[str, int]:
    """Check a deployment against the endpoint's current state; return the new traffic split."""
    ids = deployed_ids(endpoint)
    if identity in ids:
        raise ApiError(409, f"The DeployedModel {identity} already exists on {endpoint.name}")
    if split:
        check_traffic(split, {*ids, NEW})
    return {identity if key == NEW else key: share for key, share in split.items()}


def traffic_after_undeploy(endpoint: Any, identity: str, split: dict[str, int]) -> dict[str, int]:
    """Check an undeployment against the endpoint's current state; return the new traffic split."""
    ids = deployed_ids(endpoint)
    if identity not in ids:
        raise ApiError(404, f"The DeployedModel {identity} does not exist on {endpoint.name}")
    if split:
        check_traffic(split, ids)
    traffic = split or dict(endpoint.traffic_split)
    if ids == {identity}:
        return {}  # without models, an endpoint has no traffic split
    if share := traffic.get(identity):
        message = f"The DeployedModel {identity} still has {share} % of the traffic"
        raise failed_precondition(message)
    return {key: share for key, share in traffic.items() if key in ids - {identity}}


def check_traffic(split: dict[str, int], ids: set[str]) -> None:
    """Reject a traffic split with unknown models, or with shares that do not add up to 100."""
    if unknown := ", ".join(sorted(set(split) - ids)):
        raise ApiError(400, f"traffic_split: there is no DeployedModel {unknown}")
    total = sum(split.values())
    if any(share < 0 for share in split.values()) or (split and total != 100):
        raise ApiError(400, f"traffic_split: {total} is the sum of {split}; it must be 100")


def check_resources(deployed: Any) -> None:
    """Check the dedicated resources and set the default of max_replica_count."""
    require(deployed, "dedicated_resources.machine_spec.machine_type")
    resources = deployed.dedicated_resources
    least, most = resources.min_replica_count, resources.max_replica_count
    if least < 1:
        raise ApiError(400, "dedicated_resources.min_replica_count must be at least 1")
    if most and most < least:
        problem = "dedicated_resources.max_replica_count is less than min_replica_count"
        raise ApiError(400, problem)
    resources.max_replica_count = most or least
