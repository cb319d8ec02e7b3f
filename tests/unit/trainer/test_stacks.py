"""Where real threads are."""

from __future__ import annotations

import inspect
import json
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bigtrain.trainer.stacks import last_collectives, short, threads


def test_each_thread_is_where_it_waits() -> None:
    leave = threading.Event()

    def here() -> None:
        leave.wait(20)

    thread = threading.Thread(target=here, name="waits here")
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while True:
            found = {each["name"]: each for each in threads()}
            frames = found["waits here"]["frames"]
            if [frame[2] for frame in frames[:2]] == ["wait", "wait"] or time.monotonic() > deadline:
                break
    finally:
        leave.set()
        thread.join()
    assert frames[0][0] == "threading.py", "the innermost comes first"
    _, first_line = inspect.getsourcelines(here)
    assert [frame[1] for frame in frames if frame[2] == "here"] == [first_line + 1]
    assert found["waits here"]["ident"] == thread.ident
    assert found[threading.current_thread().name]["frames"][0][2] == "threads"


def entry(name: str, at: int, *, retired: bool = True, group: tuple[str, str] = ("0", "default_pg")) -> dict[str, Any]:
    """As torch 2.13 writes it."""
    return {
        "profiling_name": name,
        "time_created_ns": at,
        "thread_id": "7",
        "collective_seq_id": at + 10,
        "p2p_seq_id": at + 20,
        "is_p2p": "recv" in name,
        "process_group": list(group),
        "retired": retired,
    }


@pytest.mark.parametrize(
    ("nccl", "gloo", "expected"),
    [
        ([], [entry("gloo:all_reduce", 1)], ("all_reduce", 11, "default_pg", False)),
        ([entry("nccl:all_reduce", 1)], [entry("gloo:barrier", 2)], ("barrier", 12, "default_pg", False)),
        (
            [entry("nccl:recv 0<-1", 3, retired=False)],
            [entry("gloo:barrier", 2)],
            ("recv 0<-1", 23, "default_pg", True),
        ),
        ([entry("nccl:all_gather", 1, group=("4", "undefined"))], [], ("all_gather", 11, "group 4", False)),
        # NCCL's queue: the oldest that is under way is what the others behind it wait for
        (
            [
                entry("nccl:all_gather", 1),
                entry("nccl:all_reduce", 2, retired=False),
                entry("nccl:reduce_scatter", 3, retired=False),
            ],
            [entry("gloo:barrier", 4, group=("1", "host"))],
            ("all_reduce", 12, "default_pg", True),
        ),
        # torch retires a batch of sends and receives, not its parts
        (
            [entry("nccl:recv 0<-1", 1, retired=False), entry("nccl:coalesced", 2), entry("nccl:all_reduce", 3)],
            [],
            ("all_reduce", 13, "default_pg", False),
        ),
    ],
)
def test_the_last_collective_of_a_thread(
    monkeypatch: pytest.MonkeyPatch, nccl: list[Any], gloo: list[Any], expected: tuple[Any, ...]
) -> None:
    def dump(entries: list[Any]) -> Callable[..., str]:
        return lambda **options: json.dumps({"entries": entries})

    recorders = SimpleNamespace(_dump_nccl_trace_json=dump(nccl), _dump_fr_trace_json=dump(gloo))
    monkeypatch.setitem(sys.modules, "torch._C._distributed_c10d", recorders)
    assert tuple(last_collectives()[7].values()) == expected
    monkeypatch.setitem(sys.modules, "torch._C._distributed_c10d", SimpleNamespace(_dump_fr_trace_json=dump(gloo)))
    assert (7 in last_collectives()) == bool(gloo), "a build without NCCL"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("/home/me/src/bigtrain/data/loader.py", "bigtrain/data/loader.py"),
        ("/opt/venv/lib/python3.11/site-packages/bigtrain/data/loader.py", "bigtrain/data/loader.py"),
        ("/opt/venv/lib/python3.11/site-packages/torch/nn/linear.py", "torch/nn/linear.py"),
        ("/usr/lib/python3.12/concurrent/futures/thread.py", "concurrent/futures/thread.py"),
        ("/home/bigtrain/src/bigtrain/trainer/loop.py", "bigtrain/trainer/loop.py"),
        ("<frozen runpy>", "<frozen runpy>"),
    ],
)
def test_short(file: str, name: str) -> None:
    assert short(file) == name
