"""Registers a saved model as a new version, and deploys it: makes it the champion, which is what is served.

python -m level_1_pipeline.deploy_container.main --model-dir runs/ID/model --metrics runs/ID/evaluation.json --registry registry --run ID
python -m level_1_pipeline.deploy_container.main … --model-dir gs://… --registry gs://… --serving serving.json     in the cloud; --dry-run sends nothing
python -m level_1_pipeline.deploy_container.main --rollback 3 --registry gs://… --serving serving.json

In the cloud, under a lease, so that two deployments follow one another:

1. register     the model becomes a version in Vertex AI, and version.json describes it
2. deploy       the version gets a machine, then the canary's share of the requests, and the champion the rest; the first gets all
3. check        it must answer; if it does not, go to 5
4. decide       champion.json names it, unless another was named since the gate compared them
5. settle       requests, aliases, history and machines follow champion.json, whatever it says

Each step looks first at what is there. So whoever is cut off leaves something that the same command, typed again, finishes:
before 4 the champion is the old one and at most the canary's share of the requests goes to the new one, from 4 on the new
one is the champion and 5 brings it the rest. A deployment of another run settles too, and removes what it finds beside.
The decision comes before the traffic: the other way round, a crash could leave all requests with a version that nobody chose.
"""

import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core import manifest
from core.errors import UserError
from core.registry import LocalRegistry, Overtaken, by_hand
from gcp import storage
from gcp.endpoint import Endpoint, tell
from gcp.model_registry import Lease, Serving, VertexRegistry, overtaken, upload_request


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM, as Ctrl-C, is an exception: who ends a deployment, also in a pipeline, finds served what was served."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@interruptible()
def deploy(
    registry: str,
    model: Path,
    metrics: Mapping[str, Any],
    run: str,
    reason: str,
    replaces: int | None,
    serving: Mapping[str, Any] | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Register a model, and make it the champion unless the champion is no longer `replaces`.

    Args:
        registry: a folder; or gs://…, the cloud's.
        serving: in the cloud, the endpoint and its machine; on a laptop a server looks into the registry by itself.
        address: where the model is in Cloud Storage, if `model` is a copy of it.

    Returns:
        version: its number; champion: whether it is served; problem: why not.

    Raises:
        UserError: the model is damaged, or does not answer where it is deployed.
    """
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    if registry.startswith("gs://"):
        cloud = VertexRegistry(registry, Serving.parse(serving or {}))
        upload_request(
            cloud.serving, model, run, address
        )  # a damaged model is told before anything is asked
        with Lease(registry, run, tell) as lease:
            number = cloud.register(model, numbers, run, address).number
            tell(f"version {number} is registered: {cloud.serving.model}@{number}")
            return _outcome(number, lambda: _serve(cloud, lease, number, reason, replaces))
    models = LocalRegistry(Path(registry))
    number = models.register(model, numbers, run).number
    return _outcome(number, lambda: models.promote(number, reason, replaces))


@interruptible()
def rollback(registry: str, number: int, serving: Mapping[str, Any]) -> dict[str, Any]:
    """Make a version of the cloud's registry the champion again, whatever its scores; returns what `deploy` does.

    Raises:
        UserError: there is no such version, or it does not answer.
    """
    cloud = VertexRegistry(registry, Serving.parse(serving))
    cloud.version(number)
    with Lease(registry, f"rollback-{number}", tell) as lease:
        before = cloud.champion_number()
        return _outcome(number, lambda: _serve(cloud, lease, number, by_hand(before), before))


def redeploy(registry: str, serving: Mapping[str, Any]) -> dict[str, Any] | None:
    """Serve the champion with another image of the predictor: the same model as a new version, deployed like any other.

    It may be repeated: a model and an image are one version, and an image that serves already is left alone.

    Returns:
        What `deploy` does; None where there is no champion, or the image serves it already.

    Raises:
        UserError: it does not answer with that image; what was served before is served.
    """
    cloud = VertexRegistry(registry, Serving.parse(serving))
    champion = cloud.champion()
    if champion is None or cloud.image(champion.number) == cloud.serving.image:
        return None
    address = cloud.address(champion.number)
    run = f"{origin(champion.run)}+{cloud.serving.image.rpartition(':')[2][:8]}"
    reason = f"the model of version {champion.number}, with another image of the predictor"
    with tempfile.TemporaryDirectory() as folder:
        model = storage.fetch(address, Path(folder))
        return deploy(
            registry, model, champion.metrics, run, reason, champion.number, serving, address
        )


def origin(run: str) -> str:
    """The run that made a model, however often it was deployed anew."""
    return run.partition("+")[0]


def _outcome(number: int, promote: Any) -> dict[str, Any]:
    try:
        promote()
    except Overtaken as error:
        return {"version": number, "champion": False, "problem": str(error)}
    return {"version": number, "champion": True, "problem": None}


def _serve(
    cloud: VertexRegistry, lease: Lease, number: int, reason: str, replaces: int | None
) -> None:
    """Steps 2 to 5.

    Raises:
        Overtaken: the champion is no longer the model of `replaces`.
        UserError: the version does not answer; what was served before is served.
    """
    endpoint = Endpoint(cloud.serving)
    champion = cloud.champion_number()
    try:
        if champion != number:
            if not _is_same_model(cloud, champion, replaces):
                raise overtaken(number, replaces, champion)
            lease.check()
            tell(f"deploying version {number} to {endpoint.name}: this takes some minutes")
            deployed = endpoint.deploy(number)
            lease.check()
            endpoint.try_out(deployed, champion)
            endpoint.check(deployed, manifest.example(cloud.document(number)["schema"]))
            lease.check()
            cloud.promote(number, reason, champion)
            tell(f"version {number} answers, and is the champion")
    except BaseException as error:
        _return(cloud, lease, endpoint, str(error) or f"It was ended by {type(error).__name__}.")
        raise
    _settle(cloud, lease, endpoint)


def _is_same_model(cloud: VertexRegistry, champion: int | None, other: int | None) -> bool:
    """Whether two versions are one model, perhaps with another image of the predictor."""
    if champion is None or other is None:
        return champion == other
    return champion == other or origin(cloud.version(champion).run) == origin(
        cloud.version(other).run
    )


def _settle(cloud: VertexRegistry, lease: Lease, endpoint: Endpoint) -> None:
    """Step 5: what is served follows from champion.json."""
    lease.check()
    champion = cloud.champion_number()
    endpoint.settle(champion)
    cloud.follow()
    tell(f"version {champion} gets all requests" if champion else "nothing is served")


def _return(cloud: VertexRegistry, lease: Lease, endpoint: Endpoint, reason: str) -> None:
    """After a failure, serve what was served before.

    Raises:
        UserError: that failed as well; it says what remains.
    """
    try:
        _settle(cloud, lease, endpoint)
    except UserError as error:
        raise UserError(
            f"{reason} Going back failed too, so some requests may go to it still: {error}"
        ) from None
