"""The one exception for a user's mistake."""


class UserError(Exception):
    """Something that the user can fix: the message says what, where, the value and the fix.

    Commands print it without a traceback and exit with status 2."""
