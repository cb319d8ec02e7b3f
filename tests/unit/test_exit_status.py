"""What a command makes of a mistake and of Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bigtrain.config.errors import UserError, exit_status


def raising(error: BaseException) -> int:
    raise error


def test_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: 7) == 7
    assert exit_status(lambda: raising(UserError("no such file"))) == 2
    assert exit_status(lambda: raising(KeyboardInterrupt()), "stopped; it goes on") == 130
    assert exit_status(lambda: raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: no such file\nstopped; it goes on\n"
    with pytest.raises(ZeroDivisionError):  # a defect of ours is no mistake of the user
        exit_status(lambda: 1 // 0)


def test_a_rank_ends_though_a_thread_of_it_does_not() -> None:
    program = """
import runpy, sys, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
sys.argv = ["train"]
runpy.run_module("bigtrain.train", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2 and "One rank of a training run" in done.stderr


@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_a_reader_that_has_seen_enough(num_lines: int) -> None:
    """Whether the output is written in between or at the end."""
    program = f"""
import sys
from bigtrain.config.errors import exit_status
sys.exit(exit_status(lambda: [print("a line") for _ in range({num_lines})] and 0))
"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_broke_is_told() -> None:
    with pytest.raises(BrokenPipeError):
        exit_status(lambda: raising(BrokenPipeError()))
