"""Which of the ranks that fell is the cause, by what they left."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from bigtrain.config.status import HUNG
from bigtrain.launching import failure
from bigtrain.launching.failure import RankEnd, find, is_effect
from bigtrain.launching.restarts import PORT_TAKEN
from bigtrain.telemetry import failures
from bigtrain.telemetry.metrics import MetricsFile

START = failures.start_of()


def steps(run_dir: Path, count: int, *, resume_step: int = 0) -> None:
    file = MetricsFile(run_dir / "metrics.jsonl", resume_step=resume_step)
    if resume_step:
        file.append({"kind": "event", "name": "resume", "step": resume_step})
    for step in range(resume_step + 1, resume_step + count + 1):
        file.append({"kind": "train", "step": step})
    file.close()


def test_an_exception_is_told_by_the_rank(tmp_path: Path) -> None:
    before = failures.stamp(tmp_path)
    steps(tmp_path, 3)
    failures.write_crash(tmp_path, 1, ValueError("no"), "", step=4)
    found = find(tmp_path, [RankEnd(1, 1)], START, before)
    assert (found.kind, found.cause, found.sign) == ("crash", "rank 1: ValueError: no", "ValueError")
    assert (found.rank, found.step, found.status, found.has_stepped) == (1, 4, 1, True)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """As PyTorch itself says it."""
    with socket.create_server(("", 0)) as other:
        with pytest.raises(dist.DistNetworkError) as error:
            dist.TCPStore("127.0.0.1", other.getsockname()[1], 2, is_master=True)
        failures.write_crash(tmp_path, 0, error.value, "", step=0)
    assert find(tmp_path, [RankEnd(0, 1)], START, failures.stamp(tmp_path)).sign == PORT_TAKEN


def test_whether_a_run_has_ever_trained(tmp_path: Path) -> None:
    assert not failure.has_trained(tmp_path)
    steps(tmp_path, 2)
    assert failure.has_trained(tmp_path)


def test_what_an_earlier_start_left_does_not_count(tmp_path: Path) -> None:
    steps(tmp_path, 3)
    failures.write_crash(tmp_path, 1, ValueError("no"), "", step=4)
    failures.write_json(failures.hang_file(tmp_path, "verdict.json"), {"start": START, "verdict": "x"})
    found = find(tmp_path, [RankEnd(1, 1)], "another", failures.stamp(tmp_path))
    assert (found.kind, found.cause, found.has_stepped) == ("crash", "rank 1 ended with status 1", False)


@pytest.mark.parametrize(
    ("new_kills", "says"),
    [(2, "out of memory, it seems: the kernel's oom_kill went up by 2"), (0, "as far as it is seen here")],
)
def test_a_rank_that_was_killed(tmp_path: Path, new_kills: int, says: str) -> None:
    before = failures.stamp(tmp_path)
    steps(tmp_path, 3)
    found = find(tmp_path, [RankEnd(2, -signal.SIGKILL, new_kills)], START, before)
    assert found.cause.startswith("rank 2 was killed by SIGKILL (") and says in found.cause
    assert (found.sign, found.step, found.status) == ("SIGKILL", 4, 137)
    assert find(tmp_path, [RankEnd(2, -signal.SIGSEGV)], START, before).cause == "rank 2 was killed by SIGSEGV"


def test_a_hang_has_its_verdict(tmp_path: Path) -> None:
    before = failures.stamp(tmp_path)
    steps(tmp_path, 3)
    record = {"start": START, "phase": "data", "step": 4, "verdict": "rank 1 is in x"}
    failures.write_json(failures.hang_file(tmp_path, "verdict.json"), record)
    found = find(tmp_path, [RankEnd(0, HUNG)], START, before)
    assert (found.kind, found.cause, found.sign, found.step) == ("hang", "rank 1 is in x", "hang in data", 4)


def test_a_mistake_of_the_user(tmp_path: Path) -> None:
    assert find(tmp_path, [RankEnd(0, 2)], START, failures.stamp(tmp_path)).kind == "user"


def test_whether_an_attempt_has_done_a_step(tmp_path: Path) -> None:
    """Its own: what it computes again, or found there, are steps of others."""

    def has_stepped(before: tuple[int, int]) -> tuple[int, bool]:
        found = find(tmp_path, [RankEnd(0, 9)], START, before)
        return found.step, found.has_stepped

    before = failures.stamp(tmp_path)
    assert has_stepped(before) == (0, False)
    steps(tmp_path, 5)
    assert has_stepped(before) == (5, True)
    before = failures.stamp(tmp_path)
    assert has_stepped(before) == (5, False), "it did not come as far as metrics.jsonl"
    steps(tmp_path, 0, resume_step=4)
    assert has_stepped(before) == (4, False)
    before = failures.stamp(tmp_path)
    steps(tmp_path, 1, resume_step=4)
    assert has_stepped(before) == (5, True)


def test_a_rank_that_another_took_along(tmp_path: Path) -> None:
    failures.write_crash(tmp_path, 0, RuntimeError("Connection closed by peer [127.0.0.1]:1"), "", step=4)
    failures.write_crash(tmp_path, 1, ValueError("no"), "", step=4)
    assert is_effect(tmp_path, RankEnd(0, 1), START)
    assert not is_effect(tmp_path, RankEnd(0, 1), "another")
    assert not is_effect(tmp_path, RankEnd(0, -9), START)
    assert not is_effect(tmp_path, RankEnd(1, 1), START) and not is_effect(tmp_path, RankEnd(2, 1), START)


def test_the_kernels_count_is_read_here() -> None:
    assert failure.oom_kills() >= 0
