"""Exit statuses of a rank and of the launcher, beside 0 and 128 + n of a signal n, as a shell says it."""

CRASHED = 1
"""An exception that no user can fix, as Python has it."""
USER_ERROR = 2
"""Something that the user can fix (`bigtrain.config.errors.UserError`): the same start would end the same way."""
COME_BACK = 75
"""Of rank 0 (the others': 0) where SIGUSR2 stopped the run: it is saved, and goes on when it is started again: queue it
(EX_TEMPFAIL of sysexits.h)."""
STOPPED = 77
"""Of rank 0 (the others': 0) where SIGTERM, SIGINT or SIGHUP stopped the run: it is saved, not finished, and whoever
sent it decides whether it goes on."""
HUNG = 76
"""The watchdog ended a rank that hung, or that waited for one. Started again, the run goes on from its newest
checkpoint."""
