"""Manage the Vertex AI endpoint: deployed versions and their traffic."""

import contextlib
import math
import time
from typing import Any

from core.errors import UserError
from gcp import client as api
from gcp.model_registry import Serving

RESPONSES = 5  # required from a new version before it gets all traffic
CHECK = 300.0  # seconds for these responses
STARTING = 60.0  # seconds in which BUSY is accepted: a traffic change takes effect late
PAUSE = 2.0  # seconds between rounds of requests
BUSY = {0, 429, 502, 503, 504}  # HTTP statuses while starting; 0: no response


class UnhealthyDeployment(UserError):
    """A new version failed its check."""


class EndpointNotFound(UserError):
    """Endpoint not found; it is created by Terraform."""


class Endpoint:
    """The project's endpoint: serves the champion and, during a deployment, its challenger."""

    # The version number is also the id of the deployed model, so a version cannot be deployed
    # twice. Pending operations (after a lost response or a dead process) must finish before new
    # ones start.

    def __init__(self, serving: Serving) -> None:
        """Look up the endpoint; create it at level 1 if it does not exist."""
        self.serving = serving
        self._service = api.client("EndpointService", serving.region)
        self._last = "VERSION"  # last version that this process started to deploy
        self.name: str = api.get_or_create(self._find, self._create).name
        self._deployed_models()  # fails on a shared endpoint before any change

    def deploy(self, version: int) -> str:
        """Deploy a version without traffic; return its deployed model id."""
        what = f"deploying version {version}"

        def find() -> str | None:
            deployed = self._id(version)
            if deployed is None and self._wait(what):
                deployed = self._id(version)
            return deployed

        def deploy() -> str:
            self._last = str(version)
            self._operate("deploy_model", deploy_request(self.serving, self.name, version), what)
            return str(version)

        return api.get_or_create(find, deploy)

    def start_canary(self, deployed: str, champion: int | None) -> None:
        """Route the canary share of the traffic to a deployed version, the rest to the champion."""
        other = self._id(champion) if champion else None
        self._set_traffic(split_traffic(deployed, other, self.serving.canary_percent))

    def check(self, deployed: str, instance: Any) -> None:
        """Send requests until the deployed version has responded RESPONSES times.

        Raise UnhealthyDeployment on an invalid response, or after CHECK seconds.
        """
        from google.cloud.aiplatform_v1 import PredictRequest

        request = PredictRequest(endpoint=self.name)
        # Appended here because proto-plus rejects plain values in the constructor.
        request.instances.append(instance)
        service = api.client("PredictionService", self.serving.region)
        percent = dict(self._state().traffic_split).get(deployed, 0)
        # The number of requests that gives RESPONSES responses of the canary, on average.
        round_size = math.ceil(RESPONSES * 100 / max(percent, 1))
        start, requests, responses = time.monotonic(), 0, 0
        while time.monotonic() - start < CHECK:
            requests += 1
            try:
                response = api.call(
                    service.predict, request, "querying the new version", repeatable=False
                )
            except api.ApiError as error:
                if error.code not in BUSY or time.monotonic() - start > STARTING:
                    raise UnhealthyDeployment(str(error)) from None
                time.sleep(PAUSE)
                continue
            # The champion serves the other requests.
            if response.deployed_model_id == deployed:
                count = len(response.predictions)
                if count != 1:
                    raise UnhealthyDeployment(
                        f"the new version returned {count} predictions for one instance."
                    )
                responses += 1
                if responses == RESPONSES:
                    return
            if requests % round_size == 0:
                time.sleep(PAUSE)
        raise UnhealthyDeployment(
            f"the new version responded to {responses} of {requests} requests in {CHECK:.0f} s;"
            f" {RESPONSES} are required."
        )

    def settle(self, champion: int | None) -> None:
        """Route all traffic to the champion and undeploy all other versions."""
        current = None if champion is None else self.deploy(champion)
        self._set_traffic({current: 100} if current else {})
        self._cancel_deployments()
        for model in self._deployed_models():
            if model.id != current:
                self._undeploy(model.id)

    def _cancel_deployments(self) -> None:
        # A pending deployment would finish later: without traffic, but billed.
        deployments = [
            operation
            for operation in api.pending_operations(self._service, self.name)
            if operation.metadata.type_url.endswith(".DeployModelOperationMetadata")
        ]
        if deployments:
            api.report(
                "cancelling a pending deployment and waiting for its end. If this is interrupted,"
                f" version {self._last} may still come up; to remove it: "
                + undeploy_command(self.serving, self.name, self._last)
            )
        for operation in deployments:
            # Cancellation is best effort; the wait below covers a failure.
            with contextlib.suppress(api.ApiError):
                request = {"name": operation.name}
                api.call(self._service.cancel_operation, request, "cancelling a deployment")
        self._wait("waiting for the endpoint")

    def _find(self) -> Any:
        endpoints = self._list()
        if not endpoints and not self.serving.service_account:  # creation may be pending
            name = f"{self.serving.parent}/endpoints/{self.serving.endpoint}"
            if api.wait_for_pending_operations(self._service, name, "looking for the endpoint"):
                endpoints = self._list()
        if len(endpoints) > 1:
            names = ", ".join(endpoint.name for endpoint in endpoints)
            raise UserError(
                f"{len(endpoints)} endpoints have the name {self.serving.endpoint}: {names}."
                " Rename all but this project's, or change the project's name in project.yaml."
            )
        return endpoints[0] if endpoints else None

    def _list(self) -> list[Any]:
        name = self.serving.endpoint
        request = {"parent": self.serving.parent, "filter": f'display_name="{name}"'}

        def list_all(**options: Any) -> list[Any]:  # all pages, so the retry covers each
            return list(self._service.list_endpoints(**options))

        return list(api.call(list_all, request, "looking for the endpoint"))

    def _create(self) -> Any:
        serving = self.serving
        if serving.service_account:
            raise EndpointNotFound(
                f"endpoint {serving.endpoint} not found in {serving.parent}. Terraform creates it:"
                " run `make apply`."
            )
        request = {
            "parent": serving.parent,
            "endpoint_id": serving.endpoint,
            "endpoint": {"display_name": serving.endpoint, **serving.encryption},
        }
        return self._operate("create_endpoint", request, "creating the endpoint")

    def _operate(self, method: str, request: Any, what: str) -> Any:
        operation = api.call(getattr(self._service, method), request, what, repeatable=False)
        return api.wait_for_operation(operation, what)

    def _wait(self, what: str) -> bool:
        return api.wait_for_pending_operations(self._service, self.name, what)

    def _state(self) -> Any:
        return api.call(self._service.get_endpoint, {"name": self.name}, "reading the endpoint")

    def _deployed_models(self) -> list[Any]:
        models = list(self._state().deployed_models)
        for model in models:
            if not self._is_own(model):
                raise UserError(
                    f"endpoint {self.name} also serves {model.model}, which is not this project's;"
                    " nothing was changed. If it is not needed: "
                    + undeploy_command(self.serving, self.name, model.id)
                )
        return models

    def _is_own(self, model: Any) -> bool:
        return bool(model.model.partition("@")[0].endswith(f"/models/{self.serving.endpoint}"))

    def _id(self, version: int) -> str | None:
        for model in self._state().deployed_models:
            if self._is_own(model) and model.model_version_id == str(version):
                return str(model.id)
        return None

    def _set_traffic(self, split: dict[str, int]) -> None:
        def find() -> Any:
            state = self._state()
            traffic = {key: percent for key, percent in state.traffic_split.items() if percent}
            return state if traffic == split else None

        def change() -> Any:
            # The etag rejects this update if the endpoint has changed in the meantime.
            endpoint = {"name": self.name, "traffic_split": split, "etag": self._state().etag}
            request = {"endpoint": endpoint, "update_mask": {"paths": ["traffic_split"]}}
            update = self._service.update_endpoint
            return api.call(update, request, "changing the traffic", repeatable=False)

        api.get_or_create(find, change)

    def _undeploy(self, deployed: str) -> None:
        what = f"undeploying {deployed}"

        def is_gone() -> bool:
            return deployed not in {model.id for model in self._state().deployed_models}

        # None, not False, makes `get_or_create` undeploy.
        def find() -> bool | None:
            return is_gone() or (self._wait(what) and is_gone()) or None

        def undeploy() -> bool:
            request = {"endpoint": self.name, "deployed_model_id": deployed}
            self._operate("undeploy_model", request, what)
            return True

        api.get_or_create(find, undeploy)


def undeploy_command(serving: Serving, endpoint: str, deployed: str) -> str:
    """Return the gcloud command that undeploys a version."""
    return (
        f"gcloud ai endpoints undeploy-model {endpoint.rsplit('/', 1)[1]}"
        f" --deployed-model-id={deployed} --project={serving.project} --region={serving.region}"
    )


def deploy_request(serving: Serving, endpoint: str, version: int | str) -> dict[str, Any]:
    """Return the request that deploys a version."""
    # No traffic_split: it would take effect when the operation ends, even if this process has been
    # interrupted long before.
    return {
        "endpoint": endpoint,
        "deployed_model": {
            "id": str(version),
            "model": f"{serving.model}@{version}",
            "display_name": f"{serving.endpoint}-{version}",
            "service_account": serving.service_account,
            "dedicated_resources": {
                "machine_spec": {"machine_type": serving.machine},
                "min_replica_count": serving.replicas[0],
                "max_replica_count": serving.replicas[1],
            },
        },
    }


def split_traffic(new: str, other: str | None, percent: int) -> dict[str, int]:
    """Return the traffic split: `percent` to the new version, the rest to the other, if any."""
    if other is None or other == new or percent == 100:
        return {new: 100}
    return {new: percent, other: 100 - percent}
