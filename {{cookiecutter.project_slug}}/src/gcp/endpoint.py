"""The endpoint: which versions are deployed to it, and how requests are shared among them."""

import contextlib
import math
import sys
import time
from typing import Any

from core.errors import UserError
from gcp import client as api
from gcp.model_registry import Serving

ANSWERS = 5  # of a new version, before it gets all requests
CHECK = 300.0  # seconds that it has for them
STARTING = 60.0  # seconds for which it may be overloaded, or not be there: a new share takes effect after a while
PAUSE = 2.0  # seconds between rounds of requests
BUSY = {0, 429, 502, 503, 504}  # HTTP statuses of one that is not there yet; 0: nobody answered


class Unfit(UserError):
    """A new version does not answer as it should."""


class NotThere(UserError):
    """There is no endpoint, and it is not this program's to make."""


class Endpoint:
    """This project's endpoint. Nothing else is deployed to it: a version that is not the champion or its challenger is removed.

    A version is deployed under an id that is its number, so that it cannot be deployed twice. What was begun and lost sight
    of, by a lost answer or a death, is looked for before anything is begun, and waited for.
    """

    def __init__(self, serving: Serving) -> None:
        """Find the endpoint; by hand (level 1), make it if there is none.

        Raises:
            NotThere: there is none, and Terraform makes it.
            UserError: there are several, or it serves another model.
        """
        self.serving = serving
        self._endpoints = api.client("EndpointService", serving.region)
        self._begun = "VERSION"  # the last one whose deployment was begun here
        self.name: str = api.get_or_create(self._find, self._create).name
        self._deployed()  # before anything is changed

    def deploy(self, version: int) -> str:
        """Deploy a version, which gets no requests yet; returns its id."""
        what = f"deploying version {version}"

        def find() -> str | None:
            found = self._id(version)
            if found is None and api.wait_for_pending_operations(self._endpoints, self.name, what):
                found = self._id(version)
            return found

        def deploy() -> str:
            self._begun = str(version)
            request = deploy_request(self.serving, self.name, version)
            api.wait_for_operation(
                api.call(self._endpoints.deploy_model, request, what, repeatable=False), what
            )
            return str(version)

        return api.get_or_create(find, deploy)

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
        request.instances.append(
            instance
        )  # not given above: there proto-plus takes no plain values
        predictions = api.client("PredictionService", self.serving.region)
        share = dict(self._state().traffic_split).get(deployed, 0)
        size = math.ceil(ANSWERS * 100 / max(share, 1))  # of a round: so many are needed on average
        began, asked, answers = time.monotonic(), 0, 0
        while time.monotonic() - began < CHECK:
            asked += 1
            try:
                found = api.call(
                    predictions.predict, request, "asking the new version", repeatable=False
                )
            except api.ApiError as error:
                if error.code not in BUSY or time.monotonic() - began > STARTING:
                    raise Unfit(str(error)) from None
                time.sleep(PAUSE)
                continue
            if found.deployed_model_id == deployed:
                if len(found.predictions) != 1:
                    raise Unfit(
                        f"the new version answered one instance with {len(found.predictions)} predictions."
                    )
                answers += 1
                if answers == ANSWERS:
                    return
            if asked % size == 0:
                time.sleep(PAUSE)
        raise Unfit(
            f"in {CHECK:.0f} s the new version answered {answers} of {asked} requests; it must answer {ANSWERS}."
        )

    def settle(self, champion: int | None) -> None:
        """Serve the champion alone: all requests go to it, and all else is removed."""
        keep = None if champion is None else self.deploy(champion)
        self._share({keep: 100} if keep else {})
        self._end_deployments()
        for deployed in [model.id for model in self._deployed()]:
            if deployed != keep:
                self._undeploy(deployed)

    def _end_deployments(self) -> None:
        """End deployments that go on still: they would come alive later, unserved and paid for."""
        mark, everything = (
            ".DeployModelOperationMetadata",
            api.pending_operations(self._endpoints, self.name),
        )
        going = [
            operation for operation in everything if operation.metadata.type_url.endswith(mark)
        ]
        if going:
            tell(
                "a deployment goes on; it is cancelled, and waited for. Should that be cut off, version "
                f"{self._begun} may still come up; to remove it: {remove_command(self.serving, self.name, self._begun)}"
            )
        for operation in going:
            with contextlib.suppress(
                api.ApiError
            ):  # whether it can be cancelled is up to Google; it is waited for anyway
                api.call(
                    self._endpoints.cancel_operation,
                    {"name": operation.name},
                    "cancelling a deployment",
                )
        api.wait_for_pending_operations(self._endpoints, self.name, "waiting for the endpoint")

    def _find(self) -> Any:
        found = self._named()
        if not found and not self.serving.service_account:  # it may be in the making
            made = f"{self.serving.parent}/endpoints/{self.serving.endpoint}"
            found = (
                self._named()
                if api.wait_for_pending_operations(
                    self._endpoints, made, "looking for the endpoint"
                )
                else []
            )
        if len(found) > 1:
            raise UserError(
                f"{len(found)} endpoints bear the name {self.serving.endpoint}: {', '.join(one.name for one in found)}. One must "
                "be this project's alone; rename the others, or give this project another name in project.yaml."
            )
        return found[0] if found else None

    def _named(self) -> list[Any]:
        request = {
            "parent": self.serving.parent,
            "filter": f'display_name="{self.serving.endpoint}"',
        }
        # All pages, so that each is asked for again if need be.
        return list(
            api.call(
                lambda **how: list(self._endpoints.list_endpoints(**how)),
                request,
                "looking for the endpoint",
            )
        )

    def _deployed(self) -> list[Any]:
        """What is deployed.

        Raises:
            UserError: something that is not this project's, which would lose its requests.
        """
        found = list(self._state().deployed_models)
        for model in found:
            if not self._is_own(model):
                raise UserError(
                    f"the endpoint {self.name} also serves {model.model}, which is not this project's; nothing is changed there. "
                    f"If nobody needs it: {remove_command(self.serving, self.name, model.id)}"
                )
        return found

    def _is_own(self, model: Any) -> bool:
        return bool(model.model.partition("@")[0].endswith(f"/models/{self.serving.endpoint}"))

    def _create(self) -> Any:
        if self.serving.service_account:
            raise NotThere(
                f"there is no endpoint {self.serving.endpoint} in {self.serving.parent}. Terraform makes it; has it run?"
            )
        request = {
            "parent": self.serving.parent,
            "endpoint_id": self.serving.endpoint,
            "endpoint": {"display_name": self.serving.endpoint, **self.serving.encryption},
        }
        what = "making the endpoint"
        return api.wait_for_operation(
            api.call(self._endpoints.create_endpoint, request, what, repeatable=False), what
        )

    def _state(self) -> Any:
        return api.call(
            self._endpoints.get_endpoint, {"name": self.name}, "looking at the endpoint"
        )

    def _id(self, version: int) -> str | None:
        """The id under which a version is deployed."""
        for model in self._state().deployed_models:
            if self._is_own(model) and model.model_version_id == str(version):
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
            return api.call(
                self._endpoints.update_endpoint, request, "sharing the requests", repeatable=False
            )

        api.get_or_create(find, change)

    def _undeploy(self, deployed: str) -> None:
        what = f"removing what is deployed as {deployed}"

        def is_gone() -> bool:
            return deployed not in {model.id for model in self._state().deployed_models}

        def gone() -> bool | None:
            return (
                is_gone()
                or (api.wait_for_pending_operations(self._endpoints, self.name, what) and is_gone())
                or None
            )

        def undeploy() -> bool:
            request = {"endpoint": self.name, "deployed_model_id": deployed}
            api.wait_for_operation(
                api.call(self._endpoints.undeploy_model, request, what, repeatable=False), what
            )
            return True

        api.get_or_create(gone, undeploy)


def tell(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def remove_command(serving: Serving, endpoint: str, deployed: str) -> str:
    """What a person types to remove what is deployed."""
    return (
        f"gcloud ai endpoints undeploy-model {endpoint.rsplit('/', 1)[1]} --deployed-model-id={deployed} "
        f"--project={serving.project} --region={serving.region}"
    )


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
