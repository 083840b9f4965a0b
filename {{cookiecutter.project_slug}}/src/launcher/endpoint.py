"""The endpoint: which versions are deployed to it, and how requests are shared among them."""

import math
import time
from typing import Any

from launcher import api
from launcher.vertex_registry import Serving
from project.errors import UserError

ANSWERS = 5  # of a new version, before it gets all requests
TOLERATED = 3  # requests that nobody answered, meanwhile


class Unfit(UserError):
    """A new version does not answer as it should."""


class Endpoint:
    """This project's endpoint. Nothing else is deployed to it: what is not the champion or its challenger is removed.

    A version is deployed under an id that is its number, so that it cannot be deployed twice.
    """

    def __init__(self, serving: Serving) -> None:
        """Find the endpoint; by hand (level 1), make it if there is none.

        Raises:
            UserError: there is none, and Terraform makes it.
        """
        self.serving = serving
        self._endpoints = api.client("EndpointService", serving.region)
        self.name: str = api.once(self._find, self._create).name

    def deploy(self, version: int) -> str:
        """Deploy a version, which gets no requests yet; returns its id."""
        what = f"deploying version {version}"

        def deploy() -> str:
            request = deploy_request(self.serving, self.name, version)
            api.finish(api.call(self._endpoints.deploy_model, request, what, repeatable=False), what)
            return str(version)

        return api.once(lambda: self._id(version), deploy)

    def try_out(self, deployed: str, champion: int | None) -> None:
        """Give a deployed version the canary's share of the requests, and the champion the rest."""
        other = self._id(champion) if champion else None
        self._share(share_requests(deployed, other, self.serving.canary_percent))

    def check(self, deployed: str, instance: Any) -> None:
        """Ask until the deployed version has answered a few times.

        Raises:
            Unfit: a request failed, or the version got none of them.
        """
        from google.cloud.aiplatform_v1 import PredictRequest

        request = PredictRequest(endpoint=self.name)
        request.instances.append(instance)  # not given above: there proto-plus takes no plain values
        predictions = api.client("PredictionService", self.serving.region)
        share = dict(self._state().traffic_split).get(deployed, 0)
        limit = math.ceil(6 * ANSWERS * 100 / max(share, 1))  # six times what is needed on average
        answers, lost = 0, 0
        for _ in range(limit):
            try:
                found = api.call(predictions.predict, request, "asking the new version", repeatable=False)
            except api.ApiError as error:
                lost += 1
                if error.code == 500 or not error.transient or lost > TOLERATED:
                    raise Unfit(str(error)) from None
                time.sleep(api.FIRST_WAIT)
                continue
            if found.deployed_model_id != deployed:
                continue
            if len(found.predictions) != 1:
                raise Unfit(f"the new version answered one instance with {len(found.predictions)} predictions.")
            answers += 1
            if answers == ANSWERS:
                return
        raise Unfit(f"of {limit} requests, the new version answered {answers}; it must answer {ANSWERS}.")

    def settle(self, champion: int | None) -> None:
        """Serve the champion alone: all requests go to it, and all else is removed."""
        keep = None if champion is None else self.deploy(champion)
        self._share({keep: 100} if keep else {})
        for deployed in [model.id for model in self._state().deployed_models]:
            if deployed != keep:
                self._undeploy(deployed)

    def _find(self) -> Any:
        request = {"parent": self.serving.parent, "filter": f'display_name="{self.serving.endpoint}"'}
        found = list(api.call(self._endpoints.list_endpoints, request, "looking for the endpoint"))
        return found[0] if found else None

    def _create(self) -> Any:
        if self.serving.service_account:
            raise UserError(
                f"there is no endpoint {self.serving.endpoint} in {self.serving.parent}. Terraform makes it; has it run?"
            )
        request = {
            "parent": self.serving.parent,
            "endpoint_id": self.serving.endpoint,
            "endpoint": {"display_name": self.serving.endpoint, **self.serving.encryption},
        }
        what = "making the endpoint"
        return api.finish(api.call(self._endpoints.create_endpoint, request, what, repeatable=False), what)

    def _state(self) -> Any:
        return api.call(self._endpoints.get_endpoint, {"name": self.name}, "looking at the endpoint")

    def _id(self, version: int) -> str | None:
        """The id under which a version is deployed."""
        own = f"/models/{self.serving.endpoint}"
        for model in self._state().deployed_models:
            if model.model.partition("@")[0].endswith(own) and model.model_version_id == str(version):
                return str(model.id)
        return None

    def _share(self, split: dict[str, int]) -> None:
        """Share the requests so; the percentages add up to 100, or there are none."""

        def find() -> Any:
            state = self._state()
            shared = {deployed: share for deployed, share in state.traffic_split.items() if share}
            return state if shared == split else None

        def change() -> Any:
            # The etag: should somebody else have changed the endpoint since it was read, this is refused.
            endpoint = {"name": self.name, "traffic_split": split, "etag": self._state().etag}
            request = {"endpoint": endpoint, "update_mask": {"paths": ["traffic_split"]}}
            return api.call(self._endpoints.update_endpoint, request, "sharing the requests", repeatable=False)

        api.once(find, change)

    def _undeploy(self, deployed: str) -> None:
        what = f"removing what is deployed as {deployed}"

        def gone() -> bool | None:
            return True if deployed not in {model.id for model in self._state().deployed_models} else None

        def undeploy() -> bool:
            request = {"endpoint": self.name, "deployed_model_id": deployed}
            api.finish(api.call(self._endpoints.undeploy_model, request, what, repeatable=False), what)
            return True

        api.once(gone, undeploy)


def deploy_request(serving: Serving, endpoint: str, version: int | str) -> dict[str, Any]:
    """What is sent to deploy a version.

    It says nothing of how requests are shared: that would come about when the deployment is done, which may be long after
    whoever asked for it has been cut off.
    """
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


def share_requests(new: str, other: str | None, percent: int) -> dict[str, int]:
    """The canary's share, and the rest for the champion; all where it is alone."""
    if other is None or other == new or percent == 100:
        return {new: 100}
    return {new: percent, other: 100 - percent}
