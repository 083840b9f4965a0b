"""Register a saved model as a version, make it the champion, and serve it.

Cloud steps: register, deploy as canary, check, write champion.json, settle. Each step is
idempotent: repeat the same command to finish an interrupted deployment.
"""

# champion.json is written before the traffic moves. In the opposite order, a crash could leave all
# traffic on a version that is not the champion. Before the write, the new version has at most the
# canary traffic; after it, `settle` of any deployment completes the move.

import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core import manifest
from core.errors import UserError
from core.registry import LocalRegistry, StaleChampion, rollback_reason
from gcp import storage
from gcp.client import report
from gcp.endpoint import Endpoint
from gcp.lease import Lease
from gcp.model_registry import RUNNER, Serving, VertexRegistry, upload_request


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, so that a stopped deployment restores the traffic."""
    if threading.current_thread() is not threading.main_thread():  # only it can set signal handlers
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


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
    """Register a model and make it the champion if the current champion is `replaces`.

    Args:
        registry: folder, or gs:// address in the cloud.
        serving: serving settings, cloud only; a local server watches the registry itself.
        address: gs:// address of the model if `model` is a downloaded copy.

    Returns:
        {version: number, champion: True if it is the champion, problem: reason if not}.
    """
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    if not registry.startswith("gs://"):
        local = LocalRegistry(Path(registry))
        number = local.register(model, numbers, run).number
        return _outcome(number, lambda: local.promote(number, reason, replaces))
    cloud = VertexRegistry(registry, Serving.parse(serving or {}))
    upload_request(cloud.serving, model, run, address)  # rejects a damaged model before any call
    with Lease(registry, run) as lease:
        number = cloud.register(model, numbers, run, address).number
        report(f"registered version {number}: {cloud.serving.model}@{number}")
        return _outcome(number, lambda: _serve(cloud, lease, number, reason, replaces))


@interruptible()
def rollback(registry: str, number: int, serving: Mapping[str, Any]) -> dict[str, Any]:
    """Make a version of the cloud registry the champion without comparing metrics; see `deploy`."""
    cloud = VertexRegistry(registry, Serving.parse(serving))
    cloud.version(number)
    with Lease(registry, f"rollback-{number}") as lease:
        current = cloud.champion_number()
        reason = rollback_reason(current)
        return _outcome(number, lambda: _serve(cloud, lease, number, reason, current))


def redeploy(registry: str, serving: Mapping[str, Any]) -> dict[str, Any] | None:
    """Serve the champion with another predictor image, as a new version; see `deploy`.

    Return None if there is no champion, or if it already has this image.
    """
    cloud = VertexRegistry(registry, Serving.parse(serving))
    champion = cloud.champion()
    if champion is None or cloud.image(champion.number) == cloud.serving.image:
        return None
    address = cloud.address(champion.number)
    # The suffix makes this a new version; `origin` removes it.
    run = f"{origin(champion.run)}+{cloud.serving.image.rpartition(':')[2][:8]}"
    reason = f"the model of version {champion.number}, with another predictor image"
    with tempfile.TemporaryDirectory() as folder:
        model = storage.fetch(address, Path(folder))
        return deploy(
            registry, model, champion.metrics, run, reason, champion.number, serving, address
        )


def origin(run: str) -> str:
    """Return the id of the training run, without the suffix that `redeploy` adds."""
    return run.partition("+")[0]


def _outcome(number: int, promote: Callable[[], Any]) -> dict[str, Any]:
    try:
        promote()
    except StaleChampion as error:
        return {"version": number, "champion": False, "problem": str(error)}
    return {"version": number, "champion": True, "problem": None}


def _serve(
    cloud: VertexRegistry, lease: Lease, number: int, reason: str, replaces: int | None
) -> None:
    """Deploy, check, promote and settle; after any failure, settle on the current champion."""
    endpoint = Endpoint(cloud.serving)
    champion = cloud.champion_number()
    try:
        if champion != number:
            if not _is_same_model(cloud, champion, replaces):
                raise StaleChampion(number, replaces, champion, RUNNER)
            # The lease may have expired during a long step, so it is checked before each change.
            lease.check()
            report(f"deploying version {number} to {endpoint.name}: this takes some minutes")
            deployed = endpoint.deploy(number)
            lease.check()
            endpoint.start_canary(deployed, champion)
            endpoint.check(deployed, manifest.example(cloud.document(number)["schema"]))
            lease.check()
            cloud.promote(number, reason, champion)
            report(f"version {number} responds, and is the champion")
    except BaseException as error:  # also KeyboardInterrupt from SIGTERM or Ctrl-C
        try:
            _settle(cloud, lease, endpoint)
        except UserError as failure:
            cause = str(error) or f"Interrupted by {type(error).__name__}."
            raise UserError(
                f"{cause} Restoring the traffic failed too, so version {number} may still get"
                f" some: {failure}"
            ) from None
        raise
    _settle(cloud, lease, endpoint)


def _is_same_model(cloud: VertexRegistry, champion: int | None, other: int | None) -> bool:
    """Return whether two versions have the same model, ignoring the predictor image."""
    if champion is None or other is None or champion == other:
        return champion == other
    return origin(cloud.version(champion).run) == origin(cloud.version(other).run)


def _settle(cloud: VertexRegistry, lease: Lease, endpoint: Endpoint) -> None:
    """Update traffic, aliases and history from champion.json."""
    lease.check()
    champion = cloud.champion_number()
    endpoint.settle(champion)
    cloud.follow()
    report(f"version {champion} gets all traffic" if champion else "nothing is served")
