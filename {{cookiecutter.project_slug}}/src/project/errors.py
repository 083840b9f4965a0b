"""Mistakes that a person can mend are told in one message, never as a traceback."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Says what was wrong, where, what is allowed and what to do next."""

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: a notebook shows the message alone."""
        return [f"error: {self}"]


def run_command(command: Callable[[], None]) -> None:
    """Run a command line's main function; exit with code 2 and one message on a user's mistake."""
    try:
        command()
        sys.stdout.flush()  # here, where a reader that has gone is no failure
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
