"""Who hung, and who waited for it: one sentence out of what every rank says of itself. Pure.

A rank that waits for others is inside of a collective. Who is not, or does not answer, is who they wait for. Where all
are inside of one, the rank that is behind in the count of a group's collectives has left one out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_WAITS_FOR_RANKS = (
    "torch/distributed/distributed_c10d",
    "torch/distributed/c10d_logger",
    "torch/distributed/rendezvous",
    "deepspeed/comm/",
    "megatron/core/pipeline_parallel/p2p_communication",
)
_PYTHON_WAITS = ("threading.py", "queue.py", "concurrent/futures/thread.py", "selectors.py")
_OUR_THREADS = ("data", "read-ahead", "download", "checkpoint")
_WRAPPERS = ("wrapper", "inner", "log_wrapper", "wait")


def verdict(alarm: Mapping[str, Any], reports: Mapping[int, Mapping[str, Any]], silent: Mapping[int, str]) -> str:
    """`alarm`: `phase`, `step`, `seconds` and `limit_s` of the rank that saw it first; `reports`: of the ranks that
    answered (`thread`: ident of the one, in `threads`, that is in the phase); `silent`: why the others did not."""
    threads = {rank: _thread(report) for rank, report in sorted(reports.items())}
    waiting = {rank: _collective(thread) for rank, thread in threads.items() if _waits(reports[rank], thread)}
    stuck = {
        rank: f"is in {_of_threads(reports[rank], thread)}" for rank, thread in threads.items() if rank not in waiting
    }
    causes = _together(silent) + _together(stuck)
    if causes:
        waits = _together({rank: f"wait for it in {_told(each)}" for rank, each in waiting.items()})
    else:
        causes, waits = _all_wait(waiting), []
    step = f"step {alarm['step']}" if alarm["step"] else "before the first step"
    key = f"watchdog.{'startup' if alarm['phase'] == 'end' else alarm['phase']}_s"
    took = f"{alarm['phase']} has taken {alarm['seconds']:.0f} s and may take {alarm['limit_s']:.0f} ({key})"
    return "; ".join([*causes, *waits, f"{step}: {took}"])


def where(thread: Mapping[str, Any]) -> str:
    """The innermost line of ours, and what it has called."""
    frames: Sequence[Sequence[Any]] = thread["frames"]
    if not frames:
        return "an unknown place"
    ours = next((frame for frame in frames if _is_ours(frame)), frames[0])
    inside = f", in {_line(frames[0])}" if ours is not frames[0] else ""
    return _line(ours) + inside


def _of_threads(report: Mapping[str, Any], thread: Mapping[str, Any]) -> str:
    """Where the thread is, or where the one is that it waits for in Python: one of ours that reads data, or saves."""
    if _is_idle(thread):
        for each in report["threads"]:
            if each is not thread and not _is_idle(each) and each["name"].startswith(_OUR_THREADS):
                ours = next((frame for frame in thread["frames"] if _is_ours(frame)), thread["frames"][0])
                return f"{_line(ours)}, which waits for thread {each['name']} in {where(each)}"
    return where(thread)


def _is_idle(thread: Mapping[str, Any]) -> bool:
    return bool(thread["frames"]) and str(thread["frames"][0][0]) in _PYTHON_WAITS


def _is_ours(frame: Sequence[Any]) -> bool:
    return str(frame[0]).startswith("bigtrain/")


def ranks(numbers: Iterable[int]) -> str:
    """rank 3; ranks 0-2, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return ("rank " if "," not in text and "-" not in text else "ranks ") + text


def _thread(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one that is in the phase."""
    nothing = {"ident": 0, "name": "", "frames": [], "collective": None}
    return next((each for each in report["threads"] if each["ident"] == report["thread"]), nothing)


def _waits(report: Mapping[str, Any], thread: Mapping[str, Any]) -> bool:
    """Whether the thread, or the one of autograd that it waits for, is inside of a collective."""
    if thread["frames"] and str(thread["frames"][0][0]).startswith(_WAITS_FOR_RANKS):
        return True
    of_autograd = [each for each in report["threads"] if not each["name"] or each["name"].startswith("Dummy")]
    return any(each["collective"] and each["collective"]["under_way"] for each in (thread, *of_autograd))


def _collective(thread: Mapping[str, Any]) -> Mapping[str, Any]:
    """What torch recorded, or else what the stack says."""
    issued = thread["collective"]
    if issued and issued["under_way"]:
        return issued
    inside = [frame[2] for frame in thread["frames"] if str(frame[0]).startswith(_WAITS_FOR_RANKS)]
    names = [name for name in inside if name not in _WRAPPERS]
    return {"op": names[0] if names else "a collective", "sequence": 0, "group": ""}


def _told(collective: Mapping[str, Any]) -> str:
    number = f" ({collective['sequence']} of {collective['group']})" if collective["sequence"] else ""
    return f"{collective['op']}{number}"


def _together(said: Mapping[int, str]) -> list[str]:
    """Ranks that say the same in one part, their verb in the plural where they are several."""
    found: dict[str, list[int]] = defaultdict(list)
    for rank, text in sorted(said.items()):
        found[text].append(rank)
    return [f"{ranks(numbers)} {_verb(text, len(numbers))}" for text, numbers in found.items()]


def _verb(text: str, count: int) -> str:
    verb, _, rest = text.partition(" ")
    one, many = {"wait": ("waits", "wait"), "is": ("is", "are"), "does": ("does", "do"), "has": ("has", "have")}.get(
        verb, (verb, verb)
    )
    return f"{one if count == 1 else many} {rest}"


def _all_wait(waiting: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Who is behind in a group; or nobody."""
    counted: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, each in waiting.items():
        if each["sequence"]:
            counted[each["group"]][rank] = each["sequence"]
    for numbers in counted.values():
        if min(numbers.values()) < max(numbers.values()):
            behind = {rank: waiting[rank] for rank, number in numbers.items() if number == min(numbers.values())}
            others = {rank: each for rank, each in waiting.items() if rank not in behind}
            return [
                *_together({rank: f"is behind, in {_told(each)}" for rank, each in behind.items()}),
                *_together({rank: f"is in {_told(each)}" for rank, each in others.items()}),
            ]
    return [
        "no rank is behind, all wait: " + ", ".join(_together({r: f"is in {_told(w)}" for r, w in waiting.items()}))
    ]


def _line(frame: Sequence[Any]) -> str:
    return f"{frame[0]}:{frame[1]} ({frame[2]})"
