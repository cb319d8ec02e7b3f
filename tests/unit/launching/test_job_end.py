"""What the batch script of a Slurm job does when its ranks have ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.config.errors import UserError
from bigtrain.config.schema import ClusterConfig, Config, RunConfig
from bigtrain.config.status import COME_BACK, HUNG, STOPPED, USER_ERROR
from bigtrain.launching import job_end
from bigtrain.launching.failure import RankEnd, told
from bigtrain.launching.job_end import Job, cause, end, missing
from bigtrain.telemetry import failures
from tests.unit.launching.test_failure import steps

WORLD = 4
NAMES = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": str(WORLD), "MASTER_PORT": "1"}
JOB = Job.of(NAMES)


def ended(run_dir: Path, *ends: RankEnd, job: Job = JOB) -> None:
    for each in ends:
        failures.write_end(run_dir, each.rank, job.start, each.to_record())


def begun(run_dir: Path, *, job: Job = JOB, ranks_per_node: int = 2) -> None:
    """What the watchdog of each rank writes at its start."""
    for rank in range(WORLD):
        place = {"start": job.start, "host": f"node{rank // ranks_per_node}", "metrics": failures.stamp(run_dir)}
        failures.write_json(failures.place_file(run_dir, rank), place)


def crashed(
    run_dir: Path, rank: int, error: Exception, monkeypatch: pytest.MonkeyPatch, *, step: int, job: Job = JOB
) -> None:
    """As the rank itself leaves it."""
    with monkeypatch.context() as patch:
        patch.setattr(failures, "start_of", lambda: job.start)
        failures.write_crash(run_dir, rank, error, "", step=step)


LOST_PEER = RuntimeError("Connection closed by peer [127.0.0.1]:1")


@pytest.mark.parametrize(
    ("ended_ranks", "hosts", "lost"),
    [
        ([0, 1], "aabb", [2, 3]),
        ([0, 1, 2], "aabb", [3]),
        ([0], "aabb", [2, 3]),  # rank 1 was killed with the rest of the job
        ([], "aabb", [0, 1, 2, 3]),
        ([0, 1, 2, 3], "aabb", []),
        ([0, 1, 2], ["a", "a", "b", ""], [3]),
    ],
)
def test_the_ranks_that_are_lost(ended_ranks: list[int], hosts: list[str], lost: list[int]) -> None:
    assert missing(ended_ranks, dict(enumerate(hosts))) == lost


def test_the_cause_among_those_that_it_took_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path)
    steps(tmp_path, 3)
    for rank in (0, 2, 3):
        crashed(tmp_path, rank, LOST_PEER, monkeypatch, step=4)
    ended(tmp_path, *(RankEnd(rank, 1) for rank in (0, 2, 3)), RankEnd(1, -9, 1))
    found = cause(tmp_path, [RankEnd.from_record(each) for each in failures.ends(tmp_path, JOB.start, WORLD)], JOB, 137)
    assert found.cause.startswith("rank 1 was killed by SIGKILL (out of memory, it seems") and found.step == 4
    assert (found.rank, found.sign, found.status, found.has_stepped) == (1, "SIGKILL", 137, True)


def test_the_cause_is_who_fell_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the lowest rank, and not one that NCCL's watchdog has aborted."""

    def told() -> str:
        ends = [RankEnd.from_record(each) for each in failures.ends(tmp_path, JOB.start, WORLD)]
        return cause(tmp_path, ends, JOB, 134).cause

    ended(tmp_path, RankEnd(1, -6))  # its clock may be wrong
    crashed(tmp_path, 3, ValueError("no"), monkeypatch, step=6)
    time.sleep(0.01)
    crashed(tmp_path, 0, RuntimeError("something of NCCL"), monkeypatch, step=6)
    ended(tmp_path, RankEnd(0, 1))
    time.sleep(0.01)
    ended(tmp_path, RankEnd(3, 1), RankEnd(2, -11))
    assert told() == "rank 3: ValueError: no", "its exception was first, though its process ended later"
    ended(tmp_path, RankEnd(0, 2))
    assert told() == "rank 0 says why", "a mistake of the user"


def test_a_rank_that_was_told_to_end_is_no_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm kills what is left when it sees one rank fail."""
    crashed(tmp_path, 2, ValueError("no"), monkeypatch, step=4)
    found = cause(tmp_path, [RankEnd(0, -15, was_told=True), RankEnd(2, 1)], JOB, 143)
    assert found.cause == "rank 2: ValueError: no"


def test_a_lost_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path)
    steps(tmp_path, 3)
    for rank in (0, 1):
        crashed(tmp_path, rank, LOST_PEER, monkeypatch, step=4)
    found = cause(tmp_path, [RankEnd(0, 1), RankEnd(1, 1)], JOB, 137)
    assert found.cause == (
        "ranks 2, 3 (node1) left without a word: out of memory, where the kernel kills all of a task (cluster.memory "
        "asks for more), or the node is lost"
    )
    assert (found.sign, found.step, found.has_stepped) == ("lost", 4, True)
    found = cause(tmp_path, [RankEnd(0, 1), RankEnd(1, 1)], JOB, 253)
    assert found.cause == (
        "ranks 2, 3 (node1) left without a word: out of memory, says Slurm. cluster.memory asks for more"
    )


def test_where_all_blame_another_the_first_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's watchdogs time out on all ranks at once."""
    begun(tmp_path)
    steps(tmp_path, 7)
    for rank in (2, 0, 1, 3):
        error = RuntimeError(f"[Rank {rank}] Watchdog caught collective operation timeout: OpType=ALLREDUCE")
        crashed(tmp_path, rank, error, monkeypatch, step=8)
        ended(tmp_path, RankEnd(rank, 1))
        time.sleep(0.01)
    found = cause(tmp_path, [RankEnd.from_record(each) for each in failures.ends(tmp_path, JOB.start, WORLD)], JOB, 1)
    assert found.cause == (
        "rank 2: RuntimeError: [Rank 2] Watchdog caught collective operation timeout: OpType=ALLREDUCE "
        "(every rank that failed blames another; this one did first)"
    )
    assert (found.rank, found.sign, found.step, found.has_stepped) == (2, "RuntimeError", 8, True)


def test_srun_could_not_start_a_rank(tmp_path: Path) -> None:
    """An image that is not there, say."""
    steps(tmp_path, 9)
    failures.write_json(failures.place_file(tmp_path, 1), {"start": "earlier", "host": "node0"})
    found = cause(tmp_path, [], JOB, 1)
    assert told(found) == "the ranks never began, srun ended with status 1: see its lines above"
    assert (found.rank, found.step, found.has_stepped) == (None, 0, False)


def test_nobody_says_why(tmp_path: Path) -> None:
    found = cause(tmp_path, [RankEnd(rank, 0) for rank in range(WORLD)], JOB, 9)
    assert (found.cause, found.rank) == ("srun ended with status 9, and no rank says why", None)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The requeues that Slurm was asked for; the job runs."""
    asked: list[tuple[str, ...]] = []

    def answer(*arguments: str) -> str:
        if arguments[0] == "requeue":
            asked.append(arguments)
        return "JobId=7 JobState=RUNNING Requeue=1"

    monkeypatch.setattr(job_end, "scontrol", answer)
    return asked


@pytest.fixture
def config(tmp_path: Path) -> Config:
    cluster = ClusterConfig(kind="slurm", num_nodes=2, procs_per_node=2, device="cpu", max_restarts=2)
    return Config(run=RunConfig(dir=str(tmp_path / "run")), cluster=cluster)


@pytest.fixture
def attempt(config: Config, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """An attempt of the job that goes from one step to another, where a rank fails; srun's status is 137."""
    run_dir, ports = Path(config.run.dir), iter(range(100))

    def fail(error: Exception | None, *, of: Config = config, done: int, to: int, job_id: str = "7") -> int:
        job = Job.of({**NAMES, "SLURM_JOB_ID": job_id, "MASTER_PORT": str(next(ports))})
        run_dir.mkdir(exist_ok=True)
        begun(run_dir, job=job)
        steps(run_dir, to - done, resume_step=done)
        if error is not None:
            crashed(run_dir, 2, error, monkeypatch, step=to + 1, job=job)
        ended(run_dir, RankEnd(2, 1 if error is not None else -9), job=job)
        return end(of, job, 137)

    return fail


def crashes(config: Config) -> list[str]:
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [record["cause"] for record in map(json.loads, lines) if record.get("name") == "crash"]


def test_a_failure_is_told_and_the_job_queued_again(
    config: Config, attempt: Callable[..., int], slurm: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert attempt(ValueError("no"), done=0, to=3) == 1
    assert slurm == [("requeue", "7")]
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "queued again: restart 1 of 2",
        "error: rank 2: ValueError: no, at step 4",
    ]
    assert crashes(config) == ["rank 2: ValueError: no"]


def test_not_twice_at_the_same_step(
    attempt: Callable[..., int], slurm: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Though a requeue lies between the two."""
    attempt(ValueError("no"), done=0, to=3)
    assert attempt(ValueError("no"), done=2, to=3) == 1
    assert len(slurm) == 1
    assert "not queued again: it failed so at step 4 before" in capsys.readouterr().err


def test_so_often_and_anew_in_another_job(attempt: Callable[..., int], slurm: list[tuple[str, ...]]) -> None:
    for number, step in enumerate((3, 5, 7)):
        attempt(None, done=number, to=step)
    assert len(slurm) == 2
    attempt(None, done=4, to=9, job_id="8")
    assert slurm[2:] == [("requeue", "8")]


def test_what_was_saved_does_not_count(
    config: Config, attempt: Callable[..., int], slurm: list[tuple[str, ...]]
) -> None:
    for number, step in enumerate((3, 5)):
        attempt(None, done=number, to=step)
    assert end(config, JOB, COME_BACK) == COME_BACK
    attempt(None, done=6, to=7)
    assert len(slurm) == 4


def test_rank_0_has_saved_whatever_the_others_end_with(config: Config, slurm: list[tuple[str, ...]]) -> None:
    ended(Path(config.run.dir), RankEnd(0, COME_BACK), RankEnd(1, -9))
    assert end(config, JOB, 137) == COME_BACK
    assert slurm == [("requeue", "7")]


def test_a_job_that_does_no_step_is_not_queued_again_for_ever(
    config: Config, slurm: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    """An evaluation that is owed takes longer than the time limit: each start breaks it off."""
    run_dir = Path(config.run.dir)
    run_dir.mkdir()

    def start(done: int, to: int) -> int:
        begun(run_dir)
        steps(run_dir, to - done, resume_step=done)
        return end(config, JOB, COME_BACK)

    start(0, 3)
    for _ in range(4):
        start(3, 3)
    start(3, 4)  # counted anew
    for _ in range(4):
        start(4, 4)
    assert len(slurm) == 10
    assert start(4, 4) == COME_BACK and len(slurm) == 10
    assert "not queued again: no step was done in 5 starts: ask for more time" in capsys.readouterr().err


def test_a_run_that_was_told_to_stop_is_saved_and_not_done(
    config: Config, slurm: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    """scancel --signal=TERM, say. Neither a failure nor COMPLETED."""
    ended(Path(config.run.dir), RankEnd(0, STOPPED), RankEnd(1, -9))
    assert end(config, JOB, 137) == STOPPED and not slurm
    assert "not queued again: a signal has stopped the run" in capsys.readouterr().err
    assert not (Path(config.run.dir) / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("preempted", "requeue", "calls"),
    [("2026-11-22T19:00:00", True, 1), ("2026-11-22T19:00:00", False, 0), ("0", True, 0)],
)
def test_preempted_with_a_grace_time(
    config: Config, monkeypatch: pytest.MonkeyPatch, preempted: str, requeue: bool, calls: int
) -> None:
    """To Slurm a job that ends within it has ended well, by itself."""
    asked: list[tuple[str, ...]] = []

    def answer(*arguments: str) -> str:
        asked.append(arguments)
        return f"JobId=7 JobState=RUNNING PreemptTime={preempted}"

    monkeypatch.setattr(job_end, "scontrol", answer)
    again = replace(config, cluster=replace(config.cluster, requeue=requeue))
    assert end(again, JOB, STOPPED) == STOPPED
    assert asked.count(("requeue", "7")) == calls


@pytest.mark.parametrize(
    ("answers", "tries"),
    [
        (["Unable to contact slurm controller (connect failure)"] * 2, 3),
        (["Unable to contact slurm controller (connect failure)"] * 9, 7),
        (["Requested operation is presently disabled for job 7"] * 9, 1),
    ],
)
def test_a_controller_that_is_away_is_waited_for(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answers: list[str],
    tries: int,
) -> None:
    waits, asked, left = list[float](), list[tuple[str, ...]](), list(answers)

    def answer(*arguments: str) -> str:
        if arguments[0] == "requeue":
            asked.append(arguments)
        if arguments[0] == "requeue" and left:
            raise UserError(f"scontrol requeue 7: {left.pop()}")
        return ""

    monkeypatch.setattr(job_end, "scontrol", answer)
    monkeypatch.setattr(job_end.time, "sleep", waits.append)
    assert end(config, JOB, COME_BACK) == COME_BACK
    assert asked == [("requeue", "7")] * tries and len(waits) == tries - 1
    assert ("error: the job is not queued again" in capsys.readouterr().err) == bool(left)


def test_a_hang(config: Config, slurm: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = Path(config.run.dir)
    verdict = {"start": JOB.start, "phase": "step", "step": 4, "verdict": "rank 1 does not answer"}
    failures.write_json(failures.hang_file(run_dir, "verdict.json"), verdict)
    ended(run_dir, RankEnd(0, HUNG), RankEnd(2, HUNG), RankEnd(3, HUNG))
    assert end(config, JOB, 137) == HUNG
    assert slurm == [("requeue", "7")]
    assert capsys.readouterr().err.splitlines()[-1] == "error: rank 1 does not answer"


def test_a_mistake_of_the_user_is_never_queued_again(
    config: Config, slurm: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    ended(Path(config.run.dir), RankEnd(1, USER_ERROR), RankEnd(0, 1), RankEnd(2, -9))
    assert end(config, JOB, 137) == USER_ERROR
    assert not slurm and "the same settings would fail again" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "calls"), [(0, 0), (COME_BACK, 0), (137, 0)])
def test_a_job_that_is_not_to_come_back(config: Config, slurm: list[tuple[str, ...]], status: int, calls: int) -> None:
    once = replace(config, cluster=replace(config.cluster, requeue=False))
    Path(config.run.dir).mkdir()
    assert end(once, JOB, status) == status
    assert len(slurm) == calls


def test_what_slurm_has_ended_is_left_to_it(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_end, "scontrol", lambda *_: "JobId=7 JobState=CANCELLED")  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    ended(Path(config.run.dir), RankEnd(1, -15, was_told=True))
    assert end(config, JOB, 143) == 143
    assert capsys.readouterr().err.startswith("Slurm has ended the job (CANCELLED); ")
    assert not (Path(config.run.dir) / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("shown", "saved", "calls"),
    [
        ("JobState=COMPLETING Reason=TimeLimit", COME_BACK, 1),  # the save took longer than cluster.signal_s
        ("JobState=COMPLETING Reason=TimeLimit", STOPPED, 1),
        ("JobState=COMPLETING Reason=TimeLimit", 137, 0),
        ("JobState=COMPLETING Reason=None", COME_BACK, 0),  # cancelled, or preempted
        ("JobState=COMPLETING Reason=None", STOPPED, 0),
    ],
)
def test_a_save_that_ends_behind_the_time_limit(
    config: Config, monkeypatch: pytest.MonkeyPatch, shown: str, saved: int, calls: int
) -> None:
    asked: list[tuple[str, ...]] = []

    def answer(*arguments: str) -> str:
        asked.append(arguments)
        return f"JobId=7 {shown}"

    monkeypatch.setattr(job_end, "scontrol", answer)
    Path(config.run.dir).mkdir()
    assert end(config, JOB, saved) == saved
    assert asked.count(("requeue", "7")) == calls


def test_one_task_of_an_array() -> None:
    """Its SLURM_JOB_ID may be that of the whole array, and by that all of it would be queued again."""
    names = {**NAMES, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert Job.of(names).id == "7_3"
