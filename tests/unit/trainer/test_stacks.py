"""Where real threads are."""

from __future__ import annotations

import inspect
import threading
import time

import pytest

from bigtrain.trainer.stacks import short, threads


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
