"""How ranks agree by files. With real processes: tests/integration/test_watchdogs.py."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bigtrain.telemetry import failures
from bigtrain.trainer import hang
from bigtrain.trainer.hang import Hang, state_of, where_it_is_kept
from bigtrain.trainer.verdict import verdict

ALARM = {"rank": 0, "phase": "step", "step": 3, "seconds": 9.0, "limit_s": 8.0, "time": 0.0}


def ranks(run_dir: Path, world: int) -> list[Hang]:
    found = [Hang(run_dir, rank=rank, world=world, begun=0.0, host="here") for rank in range(world)]
    for each in found:
        each.begin()
    return found


def test_one_verdict_of_many_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failures.SPOKEN_FOR, "1")

    def slow(*args: Any) -> str:
        time.sleep(0.5)  # in which the others look too
        return verdict(*args)

    monkeypatch.setattr(hang, "verdict", slow)
    everyone = ranks(tmp_path, 4)
    thread = {"ident": 1, "name": "", "frames": [["bigtrain/x.py", 7, "f"]], "collective": None}
    for each in everyone:
        each.answer({"phase": "step", "step": 3, "thread": 1}, [thread])
    concluding = [threading.Thread(target=each.conclude, args=(ALARM,)) for each in everyone]
    for each in concluding:
        each.start()
    for each in concluding:
        each.join(20)
    (event,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert event["verdict"].startswith("ranks 0-3 are in bigtrain/x.py:7 (f); step 3: ")


def test_who_claims_the_verdict_and_dies_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failures.SPOKEN_FOR, "1")
    monkeypatch.setattr(hang, "ANSWER_S", 0.2)
    monkeypatch.setattr(hang, "VERDICT_S", 0.2)
    (rank,) = ranks(tmp_path, 1)
    failures.hang_file(tmp_path, hang.claim_of(failures.start_of())).touch()
    rank.conclude(ALARM)
    verdict = failures.read_json(failures.hang_file(tmp_path, "verdict.json"), failures.start_of())
    assert verdict is not None and verdict["verdict"].startswith("rank 0 has never started; step 3: ")


def test_one_rank_alone_reads_what_the_others_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand that did would open a million files, again and again."""
    monkeypatch.setenv(failures.SPOKEN_FOR, "1")
    monkeypatch.setattr(hang, "ANSWER_S", 1.0)
    read, readers, looks = failures.read_json, list[int](), list[int]()

    def noted(path: Path, start: str) -> dict[str, Any] | None:
        if path.parent.name == "hang":
            (readers if path.name.startswith("rank-") else looks).append(threading.get_ident())
        return read(path, start)

    monkeypatch.setattr(failures, "read_json", noted)
    everyone = [Hang(tmp_path, rank=rank, world=300, begun=0.0, host="here") for rank in range(3)]
    for each in everyone:
        each.begin()
        each.answer({"phase": "step", "step": 3, "thread": 1}, [])
    concluding = [threading.Thread(target=each.conclude, args=(ALARM,)) for each in everyone]
    for each in concluding:
        each.start()
    for each in concluding:
        each.join(20)
    assert len(set(readers)) == 1 and len(readers) == 3, "who has claimed the verdict, and each answer once"
    assert len(looks) <= 10, "the others look for it every 0.7 s: the more ranks, the longer"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_silent_rank_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failures.SPOKEN_FOR, "1")
    monkeypatch.setattr(hang, "ANSWER_S", 0.2)
    first, _ = ranks(tmp_path, 2)
    place = {"start": failures.start_of(), "host": "node7", "pid": 1, "time": 1.0}
    failures.write_json(failures.place_file(tmp_path, 1), place)
    first.answer({"phase": "step", "step": 3, "thread": 1}, [])
    first.conclude(ALARM)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "rank 1 does not answer (on node7); rank 0 is in an unknown place" in text


def test_a_rank_that_has_not_begun_yet_says_nothing_by_what_it_said_in_an_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same name: Kubernetes gives every start one address and port."""
    monkeypatch.delenv(failures.SPOKEN_FOR, raising=False)
    monkeypatch.setattr(hang, "ANSWER_S", 0.2)
    now = time.time()
    first, second = (Hang(tmp_path, rank=rank, world=2, begun=now, host="here") for rank in range(2))
    second.begin()
    second.answer({"phase": "step", "step": 9, "thread": 1}, [])
    place = {"start": failures.start_of(), "host": "node7", "pid": 1, "time": now - 3600}
    failures.write_json(failures.place_file(tmp_path, 1), place)
    first.begin()
    first.answer({"phase": "startup", "step": 0, "thread": 1}, [])
    said = tmp_path / "logs" / "hang" / "rank-1.json"
    said.write_text(json.dumps({**json.loads(said.read_text()), "time": now - 3600}))
    first.conclude({**ALARM, "time": now})
    assert "rank 1 has never started; rank 0 is in" in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("is_named", [True, False])
def test_a_rank_whose_clock_is_wrong_is_not_accused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_named: bool
) -> None:
    monkeypatch.setenv(failures.SPOKEN_FOR, "1" if is_named else "")
    monkeypatch.setattr(hang, "ANSWER_S", 0.2)
    now = time.time()
    first, second = (Hang(tmp_path, rank=rank, world=2, begun=now, host="here") for rank in range(2))
    for each in (first, second):
        each.begin()
    alarm = first.raise_alarm("step", step=3, seconds=9.0, limit_s=8.0)
    first.answer({"phase": "step", "step": 3, "thread": 1}, [])
    if not is_named:
        assert second.alarm() is not None  # its answer says which it is to
    with monkeypatch.context() as patch:
        patch.setattr(hang.time, "time", lambda: now - 61)
        second.answer({"phase": "step", "step": 3, "thread": 1}, [])
    first.conclude(alarm)
    assert "ranks 0-1 are in an unknown place" in (tmp_path / "metrics.jsonl").read_text()


def test_a_rank_that_began_long_before_the_others_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the start has a name of its own: then nothing of it is of an earlier one."""
    monkeypatch.setenv(failures.SPOKEN_FOR, "1")
    monkeypatch.setattr(hang, "ANSWER_S", 0.2)
    now = time.time()
    place = {"start": failures.start_of(), "host": "node7", "pid": 1, "time": now - 3600}
    failures.write_json(failures.place_file(tmp_path, 1), place)
    first = Hang(tmp_path, rank=0, world=2, begun=now, host="here")
    first.begin()
    first.answer({"phase": "step", "step": 3, "thread": 1}, [])
    first.conclude({**ALARM, "time": now})
    assert "rank 1 does not answer (on node7)" in (tmp_path / "metrics.jsonl").read_text()


def test_state_of_a_process() -> None:
    assert state_of(os.getpid()) == "R"
    assert state_of(2**22 + 1) == "Z", "there is none"


def test_the_main_thread_is_the_last_that_faulthandler_writes(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(
        "Timeout (0:00:05)!\nThread 0x0001 (most recent call first):\n"
        '  File "/usr/lib/python3.11/threading.py", line 327 in wait\n\n'
        "Thread 0x0002 (most recent call first):\n"
        '  File "/x/lib/python3.11/site-packages/torch/nn/linear.py", line 1 in forward\n'
        '  File "/home/me/bigtrain/trainer/loop.py", line 80 in fit\n'
    )
    assert where_it_is_kept(text) == "bigtrain/trainer/loop.py:80 (fit), in torch/nn/linear.py:1 (forward)"
    text.write_text("rank 0, answered\n")
    assert where_it_is_kept(text) == where_it_is_kept(tmp_path / "none") == ""
