"""The console: a live line on a terminal, few plain lines on a pipe."""

from __future__ import annotations

import io
import os
import pty
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bigtrain.telemetry.console import Console, duration


def record(step: int, **changes: float | None) -> dict[str, float | None]:
    return {"step": step, "loss": 3.21098, "lr": 1e-3, "tokens_per_second": 12345.6, "mfu": 0.4123, **changes}


def test_a_pipe_gets_the_first_step_then_one_line_an_interval_and_the_last() -> None:
    stream = io.StringIO()
    now = [0.0]
    console = Console(log_interval=10, stream=stream, clock=lambda: now[0])
    console.start(num_steps=25, at_step=0)
    for step in range(1, 26):
        now[0] += 60.0
        console.train(record(step))
    console.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25"]
    assert lines[0] == "step  1/25    4.0%  loss 3.2110  lr 1.00e-03  12,346 tokens/s  mfu 41.2%"
    assert lines[1].endswith("mfu 41.2%  15:00 to go")
    assert lines[3].endswith("0:00 to go")


def test_the_time_to_go_counts_from_where_a_resumed_run_goes_on() -> None:
    stream = io.StringIO()
    now = [1000.0]
    console = Console(log_interval=10, stream=stream, clock=lambda: now[0])
    console.start(num_steps=100, at_step=80)
    for step in range(81, 91):
        now[0] += 500.0 if step == 81 else 2.0
        console.train(record(step))
    assert stream.getvalue().splitlines()[-1].endswith("0:20 to go")


def test_what_is_not_known_is_not_shown() -> None:
    stream = io.StringIO()
    console = Console(stream=stream)
    console.start(num_steps=2, at_step=0)
    console.train(record(1, mfu=None, loss=float("nan")))
    console.evaluation({"step": 1, "loss": 2.0, "perplexity": 7.389, "bits_per_byte": None})
    assert "mfu" not in stream.getvalue()
    assert "loss nan" in stream.getvalue()
    assert stream.getvalue().endswith("evaluation at step 1: loss 2.0000  perplexity 7.39\n")


def test_a_terminal_that_is_closed_ends_nothing() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        console = Console(stream=stream)
        console.start(num_steps=9, at_step=0)
        console.train(record(1))
        os.close(ours)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(theirs, b"x")
        for step in range(2, 5):
            console.train(record(step))
            console.note("a note")
        console.close()
        console.note("a last one")


def test_a_pipe_that_nobody_reads_ends_nothing() -> None:
    ours, theirs = os.pipe()
    with os.fdopen(theirs, "w") as stream:
        os.close(ours)
        console = Console(stream=stream)
        for _ in range(3):
            console.note("a note")


def test_a_phase_is_named_before_it_runs_and_timed_after() -> None:
    stream = io.StringIO()
    now = [0.0]
    console = Console(stream=stream, clock=lambda: now[0])
    with console.phase("building the model"):
        assert stream.getvalue() == "building the model ... "
        now[0] += 4.56
    assert stream.getvalue() == "building the model ... 4.6 s\n"
    with pytest.raises(ValueError, match="no"), console.phase("loading"):
        raise ValueError("no")
    assert stream.getvalue().endswith("loading ... failed\n")


def test_a_silent_console_writes_nothing() -> None:
    stream = io.StringIO()
    console = Console(enabled=False, stream=stream)
    with console.phase("starting"):
        console.start(num_steps=2, at_step=0)
    console.train(record(1))
    console.evaluation({"step": 1, "loss": 2.0, "perplexity": 7.4, "bits_per_byte": 1.0})
    console.note("hello")
    console.close()
    assert stream.getvalue() == ""


def on_a_terminal(play: Callable[[Console], None]) -> str:
    """What a terminal of 160 columns receives while `play` uses a console on it."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        play(Console(log_interval=1, stream=stream))
        stream.flush()
        os.set_blocking(ours, False)
        received = b""
        try:
            while chunk := os.read(ours, 65536):
                received += chunk
        except BlockingIOError:
            pass
    os.close(ours)
    return received.decode()


def test_a_terminal_gets_one_live_line_and_the_notes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")

    def play(console: Console) -> None:
        console.start(num_steps=50, at_step=10)
        for step in range(11, 51):
            console.train(record(step))
            if step == 30:
                console.evaluation({"step": 30, "loss": 2.0, "perplexity": 7.389, "bits_per_byte": 1.234})
                with console.phase("saving [step 30]"):
                    pass
        console.close()
        console.note("done")

    received = on_a_terminal(play)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received)
    assert "evaluation at step 30: loss 2.0000  perplexity 7.39  bits/byte 1.234\r\n" in text
    assert re.search(r"saving \[step 30\] \.\.\. 0\.0 s\r\n", text)
    assert "step 50/50" in text
    assert "mfu 41.2%" in text
    # The live line is redrawn in place: far fewer lines than steps, and the cursor is back at the end.
    assert text.count("\n") < 15
    assert received.rindex("\x1b[?25h") > received.rindex("\x1b[?25l")
    assert text.endswith("done\r\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (754, "12:34"),
        (3723, "1:02:03"),
        (86400, "1 day 0:00:00"),
        (200000, "2 days 7:33:20"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_note_from_a_signal_handler_begins_a_line(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        console = Console(stream=stream)
        with console.phase("loading"):
            console.note_at_once("stopping")
        console.note_at_once("again")
        Console(stream=stream, enabled=False).note_at_once("silent")
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[:2] == ["loading ... ", "stopping"] and lines[3:] == ["again"]
