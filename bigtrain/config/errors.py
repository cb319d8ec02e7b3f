"""The one exception for a user's mistake, and what a command makes of it."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the user can fix: the message says what, where, the value and the fix.

    Commands print it without a traceback and exit with status 2."""


def exit_status(work: Callable[[], int], interrupted: str = "") -> int:
    """What `work` returns; 2 for a user's mistake, which is printed, 130 for Ctrl-C, with the words for it, and 141
    where who reads the output, such as `head`, has seen enough."""
    try:
        status = work()
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:
        if not _output_is_closed():  # it was another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return 141
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        return 130


def _output_is_closed() -> bool:
    """Whether nobody reads stdout any more."""
    try:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)  # closed pipes are told without being asked for
        return bool(output.poll(0))
    except (OSError, ValueError):  # it is no file
        return False
