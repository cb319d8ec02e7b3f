"""Every second of a run is of one part, over kills, replays and pauses."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config.errors import UserError
from bigtrain.telemetry.console import Console
from bigtrain.telemetry.goodput import (
    PARTS,
    Account,
    Attempt,
    Clock,
    account,
    attempts_in,
    mean_time_between_failures_s,
)
from bigtrain.telemetry.metrics import read_metrics
from bigtrain.telemetry.recorder import Recorder
from bigtrain.telemetry.report import write_report

from .records import config_of


class Time:
    """A clock on the wall that is turned by hand, and what it was turned for."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.told = dict.fromkeys(PARTS, 0.0)

    def __call__(self) -> float:
        return self.now

    def pass_(self, part: str, seconds: float) -> None:
        self.now += seconds
        self.told[part] += seconds


class Killed(BaseException):
    pass


def attempt(
    run_dir: Path, time: Time, *, start: int, end: int, save_every: int, kill_at: int = 0, before: int = 0
) -> None:
    """An attempt as the loop makes it: steps `start` + 1 to `end`, of which those up to `before` are computed again."""
    begin = time.now
    time.pass_("start_up", 7.0)
    clock = Clock(begin, now=time, seconds=time)
    time.pass_("start_up", 3.0)
    recorder = Recorder(
        run_dir, config_of(), num_steps=end, resume_step=start, console=Console(enabled=False), clock=clock
    )
    clock.go_on_with("compute")
    for step in range(start + 1, end + 1):
        again = step <= before
        step_begin = time.now
        with clock.part("data_wait"):
            time.pass_("replay" if again else "data_wait", 0.5)
        time.pass_("replay" if again else "compute", 2.0)
        took = time.now - step_begin
        recorder.train(
            step, tokens=step, loss=1.0, lr=1.0, grad_norm=1.0, step_time_s=took, tokens_per_second=1.0, mfu=None
        )
        if step == kill_at:
            recorder._metrics.close()  # type: ignore[union-attr]
            return
        if step % 4 == 0 and not (step + 1 <= before):
            with clock.part("evaluation"):
                time.pass_("evaluation", 1.5)
        if step % save_every == 0:
            with clock.part("save_stall"):
                time.pass_("save_stall", 0.25)
            recorder.saved([Saved(step)])
    recorder.close()


class Saved:
    seconds, stall_s, num_bytes, error = 1.0, 0.25, 10, ""

    def __init__(self, step: int) -> None:
        self.step = step


def of(run_dir: Path) -> Account:
    return account(attempts_in(read_metrics(run_dir / "metrics.jsonl")))


def test_the_parts_are_what_the_time_went_to(tmp_path: Path) -> None:
    """One attempt through; against what the wall clock was turned for."""
    time = Time()
    attempt(tmp_path, time, start=0, end=10, save_every=5)
    found = of(tmp_path)
    assert found.parts == pytest.approx({part: time.told[part] for part in PARTS})
    assert found.wall_s == pytest.approx(time.now - 1_000_000.0) and found.num_attempts == 1


def test_across_a_kill_and_a_pause(tmp_path: Path) -> None:
    """Killed at step 13 of which 10 are saved; what is computed again is replay, what comes between is lost."""
    time = Time()
    attempt(tmp_path, time, start=0, end=20, save_every=5, kill_at=13)
    time.pass_("lost", 100.0)
    attempt(tmp_path, time, start=10, end=20, save_every=5, before=13)
    time.pass_("lost", 5.0)
    attempt(tmp_path, time, start=20, end=30, save_every=5)
    found = of(tmp_path)
    assert found.wall_s == pytest.approx(time.now - 1_000_000.0) and found.num_attempts == 3
    told = {part: time.told[part] for part in PARTS}
    # of the steps behind the last note of a killed attempt only the whole time is known, and that of evaluations is not
    told["compute"], told["data_wait"] = told["compute"] + 1.5, told["data_wait"] - 1.5
    told["lost"], told["evaluation"] = told["lost"] + 1.5, told["evaluation"] - 1.5
    assert found.parts == pytest.approx(told)
    events = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record.get("name") == "goodput"]
    assert [event["ended"] for event in events if event["begin"] == 1_000_000.0][-1] is False
    assert mean_time_between_failures_s(attempts_in(events)) is None


def test_the_parts_add_up_whatever_happens(tmp_path: Path) -> None:
    generator = random.Random(4)
    for number in range(20):
        run_dir, time, saved, reached = tmp_path / str(number), Time(), 0, 0
        for _ in range(generator.randrange(1, 6)):
            kill_at = saved + generator.randrange(1, 9)
            attempt(run_dir, time, start=saved, end=saved + 8, save_every=3, kill_at=kill_at, before=reached)
            reached = max(reached, min(kill_at, saved + 8))
            last = min(kill_at - 1, saved + 8) // 3 * 3
            saved = max(saved, last)
            time.pass_("lost", generator.choice([0.0, 11.0]))
        attempt(run_dir, time, start=saved, end=reached + 3, save_every=3, before=reached)
        found = of(run_dir)
        assert found.wall_s == pytest.approx(time.now - 1_000_000.0)
        assert all(seconds >= 0 for seconds in found.parts.values())
        assert found.parts["start_up"] == pytest.approx(time.told["start_up"])
        assert found.parts["save_stall"] == pytest.approx(time.told["save_stall"])


def test_steps_of_a_rewind_are_replay(tmp_path: Path) -> None:
    time = Time()
    clock = Clock(time.now, now=time, seconds=time)
    console = Console(enabled=False)
    with Recorder(tmp_path, config_of(), num_steps=9, resume_step=0, console=console, clock=clock) as recorder:
        clock.go_on_with("compute")
        for step in (1, 2, 3, 2, 3, 4):
            time.now += 2.0
            recorder.train(
                step, tokens=1, loss=1.0, lr=1.0, grad_norm=1.0, step_time_s=2.0, tokens_per_second=1.0, mfu=None
            )
            if step == 3 and not clock.replay_to:
                recorder.go_back(1, [])
    parts = of(tmp_path).parts
    assert (parts["compute"], parts["replay"]) == (8.0, 4.0)


@pytest.mark.parametrize(
    ("error", "ended"), [(None, True), (UserError("no data"), True), (RuntimeError("dead"), False)]
)
def test_an_error_of_the_user_is_an_end_and_a_crash_is_none(
    tmp_path: Path, error: Exception | None, ended: bool
) -> None:
    time = Time()
    clock = Clock(time.now, now=time, seconds=time)
    try:
        with Recorder(tmp_path, config_of(), num_steps=9, resume_step=0, console=Console(enabled=False), clock=clock):
            if error is not None:
                raise error
    except (UserError, RuntimeError):
        pass
    assert [each.ended for each in attempts_in(read_metrics(tmp_path / "metrics.jsonl"))] == [ended]


def test_mean_time_between_failures() -> None:
    def run(*ends: bool) -> list[Attempt]:
        return [Attempt(1e6 * number, {"compute": 3600.0}, ended) for number, ended in enumerate(ends)]

    assert mean_time_between_failures_s(run(False, False, True)) is None, "two are too few"
    assert mean_time_between_failures_s(run(False, True, False, False, False)) == 5 * 3600 / 3
    assert mean_time_between_failures_s([]) is None


def test_when_a_process_was_started() -> None:
    """Asked in a process that waits before it asks; the clock outside is the oracle."""
    begin = time.time()
    code = "import time; time.sleep(0.5); from bigtrain.telemetry.goodput import process_start; print(process_start())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert begin - 0.02 <= float(done.stdout) < time.time() - 0.45


def test_one_line() -> None:
    parts = dict.fromkeys(PARTS, 0.0) | {"compute": 75.0, "start_up": 20.0, "lost": 5.0}
    assert Account(parts, 2).told() == "goodput 75.0% of 1:40 in 2 attempts; start up 20.0%, lost 5.0%"
    assert Account(dict.fromkeys(PARTS, 0.0), 1).told() == "goodput 0.0% of 0:00"


def test_the_report_shows_a_bar(tmp_path: Path) -> None:
    time = Time()
    attempt(tmp_path, time, start=0, end=8, save_every=4)
    page = write_report([tmp_path]).read_text()
    bar = re.search(r'<div class="bar">(.*?)</div>', page)
    assert bar is not None
    widths = [float(each) for each in re.findall(r"width:([\d.]+)%", bar[1])]
    assert sum(widths) == pytest.approx(100.0, abs=0.01) and len(widths) == 5
    assert "goodput " in page and "save stall: " in bar[1]


def test_a_run_of_before(tmp_path: Path) -> None:
    """Its records have no account."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "step_time_s": 1.0}) + "\n")
    assert attempts_in(read_metrics(tmp_path / "metrics.jsonl")) == []


def test_clocks_that_differ_lose_nothing() -> None:
    """The next attempt ran on a machine whose clock is behind."""
    found: Any = account([Attempt(100.0, {"compute": 50.0}), Attempt(140.0, {"compute": 10.0})])
    assert found.parts["lost"] == 0 and found.wall_s == 60.0
