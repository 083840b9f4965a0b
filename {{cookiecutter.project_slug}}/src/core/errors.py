"""Mistakes that a person can mend are told in one message, never as a traceback."""

import errno
import os
import sys
from collections.abc import Callable

# What a disk answers that is full, or that is not to be written or read, wherever in a program it is met.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


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
    except OSError as error:
        if error.errno not in DISK:
            raise
        told = f"{error.filename or 'writing'}: {error.strerror}"
        print(
            f"error: {told}. `df -h` shows free space, `ls -l` whose a file is; then type the same again.",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
