"""Whether a run that failed is started again. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bigtrain.config.status import USER_ERROR


@dataclass(frozen=True)
class Failure:
    """How an attempt ended."""

    kind: str
    """crash, hang, or user: a mistake that the user can fix."""
    cause: str
    """Rank and reason, for people."""
    sign: str
    """What two failures have in common that are the same: an exception's type, a signal's name, a phase that hung."""
    status: int
    rank: int | None
    """Whose failure it was; None where the ranks do not know."""
    step: int
    """That the rank was in; 0 before the first."""
    has_stepped: bool
    """Whether the attempt had done a step."""


PORT_TAKEN = "EADDRINUSE"
"""Sign of a failure to listen where the ranks meet: the next start takes another port."""


def refused(attempts: Sequence[Failure], max_restarts: int, *, has_trained: bool = False) -> str:
    """Why the run is not started again after these failures, the last one last; empty where it is. `has_trained`:
    whether the run has ever done a step, in an earlier job perhaps.

    What would only come again is not tried: it would burn the allocation. A run that has trained has settings that
    work: what keeps it from its first step now (a busy GPU, a mount that is missing) gets one more try."""
    last, before = attempts[-1], attempts[-2] if len(attempts) > 1 else None
    if last.kind == "user" or last.status == USER_ERROR:
        return "the same settings would fail again"
    if max_restarts == 0:
        return "cluster.max_restarts=0"
    has_trained = has_trained or any(each.has_stepped for each in attempts)
    if last.sign != PORT_TAKEN:
        if last.kind == "crash" and not (last.has_stepped or has_trained):
            return "it failed before its first step, and would again"
        if before is not None and not (last.has_stepped or before.has_stepped):
            if last.kind == before.kind == "hang":
                return "it hung before its first step, twice"
            if last.sign == before.sign:
                return "it failed so before its first step, twice"
        if before is not None and (last.sign, last.step) == (before.sign, before.step):
            return f"it failed so at step {last.step} before"
    if len(attempts) > max_restarts:
        return f"it was started again {max_restarts} times (cluster.max_restarts)"
    return ""
