"""The watchdogs of real processes that hang, each in its own way. No model and no torch: they start in no time, all
scenes at once. With a model, and waiting in collectives: test_failures.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bigtrain.config.status import HUNG
from bigtrain.telemetry import failures
from tests.integration.test_local_ranks import wait_for

RANK = """
import ctypes, os, sys, threading, time
from pathlib import Path
from bigtrain.config.schema import WatchdogConfig
from bigtrain.telemetry import failures
from bigtrain.trainer import hang, watchdog as module

module.POLL_S, module.SILENT_S, hang.ANSWER_S = 0.1, 1.0, 4.0
run_dir, rank, world, what = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
watchdog = module.Watchdog(WatchdogConfig(startup_s=20, data_s=2, step_s=2, eval_s=2, save_s=2))
watchdog.start(run_dir, rank=rank, world=world)

def evaluate():
    with watchdog.phase("eval"):
        time.sleep(100)

def save():
    with watchdog.phase("save"):
        time.sleep(100)

def keep():
    ctypes.PyDLL(None).sleep(100)

def wait():
    time.sleep(100)

def lose_the_disk():
    module.ENDS_S = 3.0
    os.mkfifo(failures.hang_file(run_dir, hang.alarm_of(failures.start_of())))  # opening it waits for ever
    time.sleep(100)

def save_behind():
    threading.Thread(target=save, name="checkpoint_0").start()

for step in watchdog.steps(range(10 ** 9), done=0):
    with watchdog.phase("save"), watchdog.phase("eval"):
        time.sleep(0.02)
    if step == 5:
        (run_dir / f"there-{rank}").touch()
        if what != "go":
            globals()[what]()
"""
SCENES = {
    "evaluation": ["go", "evaluate", "wait"],
    "save behind the training": ["go", "save_behind"],
    "rank 0 is stopped": ["go", "wait"],
    "the interpreter is kept": ["wait", "keep"],
    "the disk does not answer": ["lose_the_disk"],
    "one never started": ["wait", "go", ""],
    "an old alarm": ["go"],
    "stopped for a while": ["go"],
}
"""What each rank does after its sixth step; nothing: it is not there."""


class Scene:
    def __init__(self, run_dir: Path, acts: list[str]) -> None:
        self.run_dir = run_dir
        environment = os.environ | {"MASTER_PORT": "1", failures.SPOKEN_FOR: ""}
        arguments = [[str(run_dir), str(rank), str(len(acts)), act] for rank, act in enumerate(acts) if act]
        self.ranks = [
            subprocess.Popen([sys.executable, "-c", RANK, *each], env=environment, stderr=subprocess.PIPE, text=True)
            for each in arguments
        ]

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.communicate()

    def said(self) -> str:
        """Of all ranks on stderr, once all have ended."""
        return "".join(rank.communicate(timeout=60)[1] for rank in self.ranks)

    def statuses(self) -> list[int]:
        return [rank.wait(60) for rank in self.ranks]

    def verdict(self) -> str:
        path = failures.hang_file(self.run_dir, "verdict.json")
        wait_for(path.exists, 60)
        return json.loads(path.read_text())["verdict"]

    def places(self) -> str:
        """The verdict without the numbers of lines."""
        return re.sub(r":\d+", "", self.verdict())


def leave_alarm(run_dir: Path, *, age_s: float) -> None:
    start = failures.start_of(os.environ | {"MASTER_PORT": "1"})
    alarm = {"start": start, "time": time.time() - age_s, "rank": 0, "phase": "step", "step": 1, "seconds": 9.0}
    failures.write_json(failures.hang_file(run_dir, f"alarm-{start}.json"), {**alarm, "limit_s": 8.0})


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Scene]]:
    folder = tmp_path_factory.mktemp("scenes")
    leave_alarm(folder / "an-old-alarm", age_s=5)
    found = {name: Scene(folder / name.replace(" ", "-"), acts) for name, acts in SCENES.items()}
    for name in ("rank 0 is stopped", "stopped for a while"):
        scene = found[name]
        wait_for((scene.run_dir / "there-0").exists, 60)
        scene.ranks[0].send_signal(signal.SIGSTOP)
    yield found.__getitem__
    for scene in found.values():
        scene.kill()


def test_an_evaluation_that_does_not_end(scenes: Callable[[str], Scene]) -> None:
    """All ranks end, also the one that would have gone on."""
    scene = scenes("evaluation")
    assert scene.statuses() == [HUNG] * 3
    verdict = scene.verdict()
    assert "; rank 1 is in <string> (evaluate); rank 2 is in <string> (wait); step 6: " in scene.places()
    answers = {path.name for path in failures.hang_file(scene.run_dir, "").glob("rank-*.json")}
    assert answers == {"rank-0.json", "rank-1.json", "rank-2.json"}
    event = json.loads((scene.run_dir / "metrics.jsonl").read_text())
    assert (event["kind"], event["name"], event["verdict"]) == ("event", "hang", verdict)
    assert scene.said().count(f"hang: {verdict}. All stacks: ") == 1, "no launcher speaks: the ranks do, once"


def test_a_save_behind_the_training_that_does_not_end(scenes: Callable[[str], Scene]) -> None:
    scene = scenes("save behind the training")
    assert scene.statuses() == [HUNG] * 2
    assert "rank 1 is in <string> (save)" in scene.places()
    assert "save has taken 2 s and may take 2" in scene.verdict()


def test_rank_0_may_be_the_one_that_does_not_answer(scenes: Callable[[str], Scene]) -> None:
    scene = scenes("rank 0 is stopped")
    assert scene.places().startswith("rank 0 does not answer (state T: stopped); rank 1 is in <string> (wait); ")
    assert scene.ranks[1].wait(60) == HUNG
    assert scene.ranks[0].poll() is None, "whoever started it has to end it"


def test_a_rank_that_keeps_the_interpreter_has_its_stacks_written_in_c(scenes: Callable[[str], Scene]) -> None:
    scene = scenes("the interpreter is kept")
    assert scene.places().startswith(
        "rank 1 is in <string> (keep), and keeps Python's interpreter; rank 0 is in <string> (wait); "
    )
    assert scene.ranks[0].wait(60) == HUNG


def test_a_disk_that_does_not_answer(scenes: Callable[[str], Scene]) -> None:
    """Nobody can be told, not even by this rank's own thread: it ends all the same, and as a rank that hung."""
    assert scenes("the disk does not answer").statuses() == [HUNG]


def test_a_rank_that_never_started(scenes: Callable[[str], Scene]) -> None:
    scene = scenes("one never started")
    assert scene.places().startswith("rank 2 has never started; ") and scene.statuses() == [HUNG] * 2


def test_an_alarm_of_an_earlier_start_is_none(scenes: Callable[[str], Scene]) -> None:
    """A file system that others share may show it again, though each rank removes it first."""
    scene = scenes("an old alarm")
    wait_for((scene.run_dir / "there-0").exists, 60)
    leave_alarm(scene.run_dir, age_s=3600)
    time.sleep(1)
    assert scene.ranks[0].poll() is None


def test_a_rank_that_was_stopped_goes_on(scenes: Callable[[str], Scene]) -> None:
    """Its watchdog stood still too: a job that was suspended is not one that hangs."""
    scene = scenes("stopped for a while")
    time.sleep(3)
    scene.ranks[0].send_signal(signal.SIGCONT)
    time.sleep(2)
    assert scene.ranks[0].poll() is None and not failures.hang_file(scene.run_dir, "verdict.json").exists()
