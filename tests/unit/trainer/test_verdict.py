"""One sentence out of what the ranks say."""

from __future__ import annotations

from typing import Any

import pytest

from bigtrain.trainer.verdict import ranks, verdict, where

ALARM = {"rank": 0, "phase": "data", "step": 57, "seconds": 610.4, "limit_s": 600.0}
ENDING = "step 57: data has taken 610 s and may take 600 (watchdog.data_s)"
C10D = "torch/distributed/distributed_c10d.py"


def thread(*frames: tuple[str, int, str], collective: Any = None, ident: int = 1, name: str = "MainThread") -> Any:
    return {"ident": ident, "name": name, "frames": [list(frame) for frame in frames], "collective": collective}


def issued(op: str, sequence: int, group: str = "default_pg", under_way: bool = True) -> dict[str, Any]:
    return {"op": op, "sequence": sequence, "group": group, "under_way": under_way}


def report(*threads: Any) -> dict[str, Any]:
    return {"thread": 1, "threads": list(threads)}


READING = report(
    thread(
        ("urllib3/connection.py", 9, "recv"),
        ("bigtrain/data/remote.py", 120, "read"),
        ("bigtrain/trainer/loop.py", 80, "fit"),
        collective=issued("all_reduce", 11, under_way=False),
    )
)
WAITING = report(
    thread((C10D, 3018, "all_gather"), ("bigtrain/trainer/peers.py", 60, "_told"), collective=issued("all_gather", 12))
)


def test_the_rank_that_all_others_wait_for() -> None:
    found = verdict(ALARM, {0: WAITING, 1: WAITING, 2: WAITING, 3: READING}, {})
    assert found == (
        "rank 3 is in bigtrain/data/remote.py:120 (read), in urllib3/connection.py:9 (recv); "
        f"ranks 0-2 wait for it in all_gather (12 of default_pg); {ENDING}"
    )


def test_two_that_are_waited_for_in_two_groups() -> None:
    other = report(thread((C10D, 1, "recv"), collective=issued("recv", 4, "PIPELINE")))
    found = verdict(ALARM, {0: READING, 1: READING, 2: other, 3: WAITING}, {})
    assert found.startswith("ranks 0-1 are in bigtrain/data/remote.py:120 (read)")
    assert (
        "; rank 2 waits for it in recv (4 of PIPELINE); rank 3 waits for it in all_gather (12 of default_pg); " in found
    )


def test_a_rank_that_does_not_answer() -> None:
    found = verdict(ALARM, {0: WAITING}, {1: "does not answer (state T: stopped)", 2: "has ended", 3: "has ended"})
    assert found == (
        "rank 1 does not answer (state T: stopped); ranks 2-3 have ended; "
        f"rank 0 waits for it in all_gather (12 of default_pg); {ENDING}"
    )


def test_a_thread_of_ours_that_the_main_thread_waits_for() -> None:
    main = thread(("threading.py", 320, "wait"), ("bigtrain/data/loader.py", 144, "_ahead"))
    idle = thread(("threading.py", 320, "wait"), ident=2, name="data_0")
    reads = thread(("bigtrain/data/rows.py", 57, "read"), ident=3, name="data_1")
    found = verdict(ALARM, {0: WAITING, 1: report(main, idle, reads)}, {})
    assert found.startswith(
        "rank 1 is in bigtrain/data/loader.py:144 (_ahead), which waits for thread data_1 in bigtrain/data/rows.py:57 "
        "(read); rank 0 waits for it in all_gather"
    )
    assert "which waits" not in verdict(ALARM, {0: WAITING, 1: report(main, idle)}, {})


def test_all_are_in_a_collective_and_one_is_behind() -> None:
    behind = report(thread((C10D, 5, "all_reduce"), collective=issued("all_reduce", 11)))
    found = verdict(ALARM, {0: WAITING, 1: behind, 2: WAITING}, {})
    assert found == (
        "rank 1 is behind, in all_reduce (11 of default_pg); ranks 0, 2 are in all_gather (12 of default_pg); " + ENDING
    )


def test_all_wait_and_none_is_behind() -> None:
    found = verdict(ALARM, {0: WAITING, 1: WAITING}, {})
    assert found == f"no rank is behind, all wait: ranks 0-1 are in all_gather (12 of default_pg); {ENDING}"


def test_without_torchs_record_the_stack_says_which_collective() -> None:
    stack = report(thread((C10D, 5, "barrier"), ("torch/distributed/c10d_logger.py", 83, "wrapper")))
    assert "; rank 0 waits for it in barrier; " in verdict(ALARM, {0: stack, 1: READING}, {})


def test_a_collective_that_the_thread_of_autograd_has_issued() -> None:
    """On a GPU the main thread is in backward, or waits for the device."""
    autograd = thread(ident=5, name="Dummy-3", collective=issued("reduce_scatter", 40, "dp"))
    backward = thread(("torch/autograd/graph.py", 841, "_engine_run_backward"))
    found = verdict(ALARM, {0: report(backward, autograd), 1: READING}, {})
    assert "; rank 0 waits for it in " in found
    saving = {**autograd, "name": "checkpoint_0"}
    assert "ranks 0-1" not in (found := verdict(ALARM, {0: report(backward, saving), 1: READING}, {}))
    assert found.startswith("rank 0 is in torch/autograd/graph.py:841 (_engine_run_backward); rank 1 is in ")


def test_before_the_first_step() -> None:
    alarm = {**ALARM, "phase": "startup", "step": 0}
    assert verdict(alarm, {0: READING}, {}).endswith(
        "; before the first step: startup has taken 610 s and may take 600 (watchdog.startup_s)"
    )


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([0, 2], "ranks 0, 2"), ([5, 1, 2, 3], "ranks 1-3, 5")],
)
def test_ranks(numbers: list[int], text: str) -> None:
    assert ranks(numbers) == text


def test_a_place_outside_of_ours() -> None:
    assert where(thread(("torch/nn/linear.py", 7, "forward"))) == "torch/nn/linear.py:7 (forward)"
    assert where(thread()) == "an unknown place"
