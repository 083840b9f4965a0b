"""Exit cleanly on SIGTERM and Ctrl-C while following work on Google Cloud."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """Exit with 143 or 130 on SIGTERM or SIGINT; deferred inside `held`."""

    def __init__(self) -> None:
        self.code = 0
        self.holding = False

    def __call__(self, number: int, _: object) -> None:
        """Handle a signal: store its exit code, and exit unless held."""
        self.code = 128 + number
        self.check()

    def check(self) -> None:
        """Exit if a signal has arrived; call this in every loop that waits."""
        # Python drops an exception that a handler raises while a finalizer runs.
        if self.code and not self.holding:
            raise SystemExit(self.code)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Defer the exit until the block has ended."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
            self.check()


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Handle both signals inside the block and restore the previous handlers after it."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    tell = sys.unraisablehook
    # An exit dropped in a finalizer is raised again by `check`; its traceback would be noise.
    sys.unraisablehook = lambda lost: None if isinstance(lost.exc_value, SystemExit) else tell(lost)
    try:
        yield stop
    finally:
        sys.unraisablehook = tell
        for number, handler in before.items():
            signal.signal(number, handler)
