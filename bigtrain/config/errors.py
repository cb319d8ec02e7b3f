"""The one exception for a user's mistake, and what a command makes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the user can fix: the message says what, where, the value and the fix.

    Commands print it without a traceback and exit with status 2."""


def exit_status(work: Callable[[], int], interrupted: str = "") -> int:
    """What `work` returns; 2 for a user's mistake, which is printed, and 130 for Ctrl-C, with the words for it."""
    try:
        return work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        return 130
