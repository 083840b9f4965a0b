"""A lease on a registry: one deployment at a time."""

# Object generations protect champion.json, but not the endpoint: concurrent deployments would
# change each other's traffic and undeploy each other's canary during its check.

import json
import threading
import time
import uuid
from typing import Self

from core.errors import UserError
from gcp import client as api
from gcp import storage
from gcp.storage import StoredObject

SECONDS = 90.0  # until another process can acquire it; clocks differ far less
TIMEOUT = 3600.0  # seconds to wait for another deployment
LONGEST_WAIT = 5.0  # seconds between polls


def clock() -> float:
    """Return wall-clock seconds, which are comparable between machines."""
    return time.time()


class Lease:
    """Hold the lease of a registry: `with Lease(registry, run) as lease: … lease.check() …`.

    lock.json contains the owner and the expiry time. A thread renews it; another process can
    acquire it after its expiry.
    """

    def __init__(self, registry: str, run: str) -> None:
        self._address, self._run, self._token = f"{registry}/lock.json", run, uuid.uuid4().hex
        self._current, self._ends = StoredObject(), 0.0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Self:
        start, wait = time.monotonic(), api.FIRST_WAIT
        while not self._take(current := storage.get(self._address)):
            owner = current.document.get("run", "unknown")
            if wait == api.FIRST_WAIT:
                api.report(f"waiting for run {owner}, which is deploying")
            if time.monotonic() - start > TIMEOUT:
                raise UserError(
                    f"run {owner} has been deploying for {TIMEOUT / 60:.0f} minutes. Retry later."
                )
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._thread.join()
        try:
            self._write(self._current, ends=0.0)
        except UserError as error:  # not fatal: the lease expires
            api.report(f"{error} The next deployment waits up to {SECONDS:.0f} s.")

    def check(self) -> None:
        """Raise UserError if the lease has expired. Call this before each change."""
        if clock() >= self._ends:
            raise UserError(
                "this deployment paused for so long that another may have begun. Retry."
            )

    def _take(self, current: StoredObject) -> bool:
        expired = clock() >= float(current.document.get("ends", 0))
        return expired and self._write(current, clock() + SECONDS)

    def _write(self, current: StoredObject, ends: float) -> bool:
        # The token makes the content unique to this owner.
        content = json.dumps({"run": self._run, "token": self._token, "ends": ends}).encode()
        written = storage.replace(self._address, content, current)
        if written:
            self._current, self._ends = written, ends
        return written is not None

    def _renew(self) -> None:
        while not self._released.wait(SECONDS / 3):
            try:
                if not self._write(self._current, clock() + SECONDS):
                    self._ends = 0.0  # another process took over: let `check` fail
                    return
            except UserError:
                continue  # retry until the lease expires
