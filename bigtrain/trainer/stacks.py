"""Where the threads of this process are, and their last collectives. Reads no file: a disk may be what hangs."""

from __future__ import annotations

import json
import re
import sys
import threading
from types import FrameType
from typing import Any

_INSTALLED = re.compile(r".*/(?:site-packages|dist-packages|lib/python3\.\d+)/(.*)|.*/(bigtrain/.*)")
_DEEPEST = 64
"""Frames of a thread that are kept, from the innermost."""


def threads() -> list[dict[str, Any]]:
    """Each thread of Python: `ident`, `name`, `frames` (file, line and function, the innermost first) and `collective`,
    the last that it issued: `op`, `sequence` in its `group`, whether it is `under_way`; None where it issued none."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    issued = last_collectives()
    return [
        {
            "ident": ident,
            "name": names.get(ident, ""),
            "frames": _frames(frame),
            "collective": issued.get(ident),
        }
        for ident, frame in sys._current_frames().items()
    ]


def last_collectives() -> dict[int, dict[str, Any]]:
    """By thread, from torch's flight recorders, which are on by default: one of NCCL, one of gloo. NCCL's are put in a
    queue: of several that are under way it is the oldest, which all behind it wait for; where none is, the newest."""
    c10d = sys.modules.get("torch._C._distributed_c10d")
    entries: list[dict[str, Any]] = []
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        try:
            entries += json.loads(getattr(c10d, name)(includeCollectives=True, onlyActive=False))["entries"]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):  # not there: the stacks must do
            continue
    entries.sort(key=_created)
    over = _over(entries)
    last: dict[int, dict[str, Any]] = {}
    for entry in entries:
        thread, group = int(entry.get("thread_id") or 0), _group(entry.get("process_group") or [""])
        if thread in last and last[thread]["under_way"]:
            continue
        last[thread] = {
            "op": _op(entry),
            "sequence": entry.get("p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id", 0),
            "group": group,
            "under_way": not entry.get("retired", True) and _created(entry) > over.get(group, -1),
        }
    return last


def _over(entries: list[dict[str, Any]]) -> dict[str, int]:
    """By group, up to when all is over, whatever the entries say: its collectives end in order, and torch never retires
    the parts of a coalesced one."""
    in_order = (each for each in entries if not each.get("is_p2p") or _op(each) == "coalesced")
    return {_group(each.get("process_group") or [""]): _created(each) for each in in_order if each.get("retired", True)}


def _created(entry: dict[str, Any]) -> int:
    return entry.get("time_created_ns", 0)


def _op(entry: dict[str, Any]) -> str:
    return str(entry.get("profiling_name", "")).partition(":")[2] or "collective"


def _group(names: list[str]) -> str:
    """Its description, or its number where it has none."""
    return f"group {names[0]}" if names[-1] == "undefined" else names[-1]


def _frames(frame: FrameType | None) -> list[list[Any]]:
    found: list[list[Any]] = []
    while frame is not None and len(found) < _DEEPEST:
        code = frame.f_code
        found.append([short(code.co_filename), frame.f_lineno, code.co_name])
        frame = frame.f_back
    return found


def short(file: str) -> str:
    """Ours from bigtrain/ on, a library's without the folder that it is installed in."""
    found = _INSTALLED.fullmatch(file)
    return (found[1] or found[2]) if found else file
