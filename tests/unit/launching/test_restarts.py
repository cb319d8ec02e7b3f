"""When a run is started again."""

from __future__ import annotations

import pytest

from bigtrain.config.status import HUNG
from bigtrain.launching.restarts import PORT_TAKEN, Failure, refused


def crash(sign: str = "ValueError", step: int = 5, *, has_stepped: bool = True, status: int = 1) -> Failure:
    return Failure("crash", "", sign, status, 1, step, has_stepped)


def hang(sign: str = "hang in data", step: int = 5, *, has_stepped: bool = True) -> Failure:
    return Failure("hang", "", sign, HUNG, None, step, has_stepped)


KILLED = crash("SIGKILL", status=137)
TAKEN = crash(PORT_TAKEN, 0, has_stepped=False)
USER = Failure("user", "", "", 2, 0, 9, True)


@pytest.mark.parametrize(
    ("attempts", "max_restarts", "why_not"),
    [
        ([KILLED], 0, "cluster.max_restarts=0"),
        ([KILLED], 1, ""),
        ([crash()], 1, ""),
        ([hang()], 1, ""),
        ([USER], 9, "the same settings"),
        ([crash(status=2)], 9, "the same settings"),
        ([KILLED, USER], 9, "the same settings"),
        # before the first step of a run that has never trained
        ([crash(step=0, has_stepped=False)], 9, "before its first step"),
        ([crash("SIGKILL", 1, has_stepped=False)], 9, "before its first step"),
        ([hang(step=0, has_stepped=False)], 9, ""),
        ([hang(step=0, has_stepped=False)] * 2, 9, "twice"),
        ([hang(step=0, has_stepped=False), hang("hang in startup", 0, has_stepped=False)], 9, "twice"),
        ([hang(step=0, has_stepped=False), hang(step=9)], 9, ""),
        # the run has trained: once more
        ([KILLED, crash(step=0, has_stepped=False)], 9, ""),
        ([KILLED, crash(step=0, has_stepped=False), crash(step=0, has_stepped=False)], 9, "its first step, twice"),
        ([KILLED, crash(step=0, has_stepped=False), crash("KeyError", 0, has_stepped=False)], 9, ""),
        ([KILLED, crash(step=0, has_stepped=False), KILLED], 9, ""),
        # the next start takes another port
        ([TAKEN], 9, ""),
        ([TAKEN, TAKEN], 9, ""),
        ([TAKEN, TAKEN], 1, "1 times"),
        ([TAKEN, crash(step=0, has_stepped=False)], 9, "before its first step"),
        ([TAKEN, hang(step=0, has_stepped=False)], 9, ""),
        # the same at the same step
        ([crash(), crash()], 9, "at step 5 before"),
        ([crash(), crash("KeyError")], 9, ""),
        ([crash(), crash(step=6)], 9, ""),
        ([KILLED, KILLED], 9, "at step 5 before"),
        ([hang(), hang()], 9, "at step 5 before"),
        ([crash(), KILLED, crash()], 9, ""),
        # how often
        ([crash(step=1), crash(step=2)], 2, ""),
        ([crash(step=1), crash(step=2), crash(step=3)], 2, "2 times"),
    ],
)
def test_refused(attempts: list[Failure], max_restarts: int, why_not: str) -> None:
    found = refused(attempts, max_restarts)
    assert (why_not in found) if why_not else found == "", found


def test_a_run_that_has_trained_in_an_earlier_job_gets_one_more_try() -> None:
    last = crash(step=0, has_stepped=False)
    assert refused([last], 9, has_trained=True) == ""
    assert "twice" in refused([last, last], 9, has_trained=True)
