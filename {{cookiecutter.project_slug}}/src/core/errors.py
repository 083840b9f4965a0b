"""Report user errors as one message, without a traceback."""

import errno
import os
import sys
from collections.abc import Callable

# Full, read-only or inaccessible disks can fail any read or write, so they are handled once here.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


class UserError(Exception):
    """A user error: the message names the problem, what is allowed and the next command."""

    def _render_traceback_(self) -> list[str]:
        """Return the message alone; IPython calls this instead of printing a traceback."""
        return [f"error: {self}"]


def run_command(command: Callable[[], None]) -> None:
    """Run a command line's main function; on a user error print one message and exit with 2."""
    try:
        command()
        sys.stdout.flush()  # flush here, so that a closed pipe is caught below, not at exit
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # not an error: the reader has closed the pipe, as `head` does
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
