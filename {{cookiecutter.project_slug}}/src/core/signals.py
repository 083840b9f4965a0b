"""SIGTERM and Ctrl-C: a program that watches something in the cloud ends in an orderly way, and says what goes on."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """SIGTERM and Ctrl-C end the program with 143 or 130; while `held`, afterwards."""

    def __init__(self) -> None:
        self.code = 0
        self.holding = False

    def __call__(self, number: int, _: object) -> None:
        """The signals' handler."""
        self.code = 128 + number
        self.check()

    def check(self) -> None:
        """End the program if it has been told to.

        Whoever waits in a loop calls this: what a handler raises is lost where Python runs a finaliser at that moment.
        """
        if self.code and not self.holding:
            raise SystemExit(self.code)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What must not be interrupted."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
            self.check()


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Catch the signals, and give them back."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    tell = sys.unraisablehook
    # What is lost in a finaliser comes again with `check`: nobody needs its traceback.
    sys.unraisablehook = lambda lost: None if isinstance(lost.exc_value, SystemExit) else tell(lost)
    try:
        yield stop
    finally:
        sys.unraisablehook = tell
        for number, handler in before.items():
            signal.signal(number, handler)
