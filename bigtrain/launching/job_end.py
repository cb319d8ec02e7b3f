"""``python -m bigtrain.launching.job_end RUN STATUS``: what the batch script of a Slurm job does when srun has ended.

STATUS is srun's, the highest of all ranks. A run that was warned ahead of the time limit has saved and ends with
COME_BACK: the job is queued again, also where Slurm has ended it at its limit meanwhile. One that SIGTERM stopped has
saved too (STOPPED): at the limit it is queued again likewise; a preempted job Slurm queues again itself, unless it ends
within the GraceTime that it was given; then this does. A run that failed is dealt with as on one
machine (`bigtrain.launching.attempts`): the cause is found in what the ranks left, and told in metrics.jsonl and as the
last line of the job's output; the job is queued again up to cluster.max_restarts times, where that can help.
RUN/logs/slurm_failures.json keeps the failures meanwhile. What Slurm itself has ended (cancelled, preempted, a lost
node) is left to Slurm.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bigtrain.config import frozen
from bigtrain.config.errors import UserError, exit_status
from bigtrain.config.schema import Config
from bigtrain.config.status import COME_BACK, STOPPED
from bigtrain.launching import failure
from bigtrain.launching.failure import RankEnd
from bigtrain.launching.meeting import fields_of, scontrol
from bigtrain.launching.restarts import Failure, refused
from bigtrain.telemetry import failures

IS_ENDING = "Slurm has ended the job ({state}); if that was a preemption, it queues it again itself"
AT_LIMIT = "not queued again: Slurm has ended the job at its time limit, before it was saved"

NO_TIME = ("None", "0", "Unknown", "N/A", "")
REQUEUE_WAITS_S = (5, 10, 20, 40, 60, 60)
LASTING = re.compile(r"disabled|invalid|denied|permission|finished", re.IGNORECASE)
"""What Slurm says of a requeue that it will never do."""
OUT_OF_MEMORY = 128 + 125
"""srun's status where Slurm's own watch over a node's memory has seen the kernel kill (SIG_OOM of its slurm.h)."""
MAX_IDLE = 5
"""Starts in a row that are warned of the time limit before they have done a step: more would do no better."""
IS_IDLE = f"not queued again: no step was done in {MAX_IDLE} starts: ask for more time (cluster.time)"
WAS_STOPPED = "not queued again: a signal has stopped the run, which is saved; the same command goes on"


@dataclass(frozen=True)
class Job:
    """A Slurm job in its batch script."""

    id: str
    world: int
    """Ranks."""
    start: str
    """Of this start of the ranks: `failures.start_of`."""

    @staticmethod
    def of(names: Mapping[str, str]) -> Job:
        """In an array SLURM_JOB_ID may be the number of the whole array."""
        array, task = names.get("SLURM_ARRAY_JOB_ID"), names.get("SLURM_ARRAY_TASK_ID")
        job_id = f"{array}_{task}" if array and task else names["SLURM_JOB_ID"]
        return Job(job_id, int(names["SLURM_NTASKS"]), failures.start_of(names))


def end(config: Config, job: Job, status: int) -> int:
    """Tell why the ranks ended, and queue the job again where it is to go on. Returns the job's exit status."""
    run_dir, cluster = Path(config.run.dir), config.cluster
    ends = [RankEnd.from_record(record) for record in failures.ends(run_dir, job.start, job.world)]
    saved = _saved(ends, status)
    if status == 0 and not saved:
        return 0
    shown = _shown(job.id)
    state = shown.get("JobState", "RUNNING")  # as long as Slurm has not ended it
    is_at_limit = shown.get("Reason") == "TimeLimit"
    if state != "RUNNING" and not (saved and is_at_limit):
        print(AT_LIMIT if is_at_limit else IS_ENDING.format(state=state), file=sys.stderr, flush=True)
        return saved or status
    if saved:
        is_over = saved == COME_BACK or is_at_limit
        is_preempted = shown.get("PreemptTime", "None") not in NO_TIME
        idle = _idle(run_dir, job) if is_over and not is_preempted else 0
        _keep(run_dir, job.id, [], idle=idle)
        if cluster.requeue and idle >= MAX_IDLE:
            print(IS_IDLE, file=sys.stderr, flush=True)
        elif cluster.requeue and (is_over or is_preempted):
            return _queue_again(job.id, saved)
        elif saved == STOPPED:
            print(WAS_STOPPED, file=sys.stderr, flush=True)
        return saved
    found = cause(run_dir, ends, job, status)
    failed = [*_kept(run_dir, job.id), found]
    if found.kind != "user":  # it may be that another job trains in the folder, which keeps its own there
        _keep(run_dir, job.id, failed)
    why_not = refused(failed, cluster.max_restarts, has_trained=failure.has_trained(run_dir))
    why_not = why_not or ("" if cluster.requeue else "cluster.requeue=false")
    if found.kind == "crash":
        with contextlib.suppress(OSError):  # the disk may be full
            failures.append_event(run_dir, "crash", rank=found.rank, cause=found.cause, step=found.step)
    again = f"queued again: restart {len(failed)} of {cluster.max_restarts}"
    print(f"not queued again: {why_not}" if why_not else again, file=sys.stderr)
    print(f"error: {failure.told(found, _log(run_dir, job.id, found))}", file=sys.stderr, flush=True)
    return found.status if why_not else _queue_again(job.id, found.status)


def _saved(ends: Sequence[RankEnd], status: int) -> int:
    """COME_BACK or STOPPED, where rank 0 has saved and ended so, whatever the others end with; else 0."""
    said = [status, *(each.returncode for each in ends if each.rank == 0)]
    return next((one for one in (COME_BACK, STOPPED) if one in said), 0)


def _idle(run_dir: Path, job: Job) -> int:
    """Starts of the job in a row, with this one, that have done no step: an evaluation that is owed takes longer than
    the time limit, say, and each start breaks it off."""
    _, has_stepped = failure.progress(run_dir, _metrics_before(run_dir, job.start))
    kept = failures.read_json(_history(run_dir), job.id) or {}
    return 0 if has_stepped else kept.get("idle", 0) + 1


def cause(run_dir: Path, ends: Sequence[RankEnd], job: Job, status: int) -> Failure:
    """Why the ranks failed, by how those ended that were there to tell, and by which are missing."""
    metrics = _metrics_before(run_dir, job.start)
    failed = [each for each in ends if each.returncode != 0 and not each.was_told]
    failed.sort(key=lambda each: failure.likeliness(each.returncode, failure.fell(run_dir, each, job.start)))
    by_themselves = [each for each in failed if not failure.is_effect(run_dir, each, job.start)]
    if by_themselves:
        return failure.find(run_dir, by_themselves, job.start, metrics)
    step, has_stepped = failure.progress(run_dir, metrics)
    verdict = failure.hang(run_dir, job.start, has_stepped=has_stepped)
    if verdict is not None:
        return verdict
    if not ends and not any(_hosts(run_dir, job).values()):
        text = f"the ranks never began, srun ended with status {status}: see its lines above"
        return Failure("crash", text, failure.NEVER_BEGAN, status, None, 0, False)
    lost = missing([each.rank for each in ends], _hosts(run_dir, job))
    if not lost and failed:  # a collective that timed out, say
        found = failure.find(run_dir, failed, job.start, metrics)
        return replace(found, cause=f"{found.cause} (every rank that failed blames another; this one did first)")
    if not lost:
        text = f"srun ended with status {status}, and no rank says why"
        return Failure("crash", text, f"status {status}", status, None, step, has_stepped)
    names = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))}"
    hosts = sorted({host for rank, host in _hosts(run_dir, job).items() if rank in lost and host})
    where = f" ({', '.join(hosts)})" if hosts else ""
    text = f"{names}{where} left without a word: {_why_lost(status)}"
    return Failure("crash", text, "lost", status, lost[0], step + 1, has_stepped)


def _why_lost(status: int) -> str:
    """By srun's status. Without accounting Slurm keeps no more, and only where it limits the memory of jobs itself it
    sees what the kernel does."""
    if status == OUT_OF_MEMORY:
        return "out of memory, says Slurm. cluster.memory asks for more"
    return "out of memory, where the kernel kills all of a task (cluster.memory asks for more), or the node is lost"


def missing(ended: Sequence[int], hosts: Mapping[int, str]) -> list[int]:
    """The ranks that are lost, where nobody says so: those that left no note of their end. Slurm kills what is left on
    the other nodes, so where all ranks of a node are missing, and not all of another, it is those of that node.

    `hosts`: where each rank was; empty where it never began."""
    gone = [rank for rank in hosts if rank not in ended]
    seen = {hosts[rank] for rank in ended}
    return [rank for rank in gone if hosts[rank] not in seen] or gone


def _hosts(run_dir: Path, job: Job) -> dict[int, str]:
    places = {rank: failures.read_json(failures.place_file(run_dir, rank), job.start) for rank in range(job.world)}
    return {rank: "" if place is None else place["host"] for rank, place in places.items()}


def _metrics_before(run_dir: Path, start: str) -> tuple[int, int]:
    """metrics.jsonl when rank 0 began; as it is now where rank 0 did not: nothing was done then."""
    place = failures.read_json(failures.place_file(run_dir, 0), start)
    if place is None:
        return failures.stamp(run_dir)
    size, time_ns = place["metrics"]
    return size, time_ns


def _shown(job_id: str) -> Mapping[str, str]:
    """What Slurm says of the job, by name."""
    try:
        return fields_of(scontrol("--oneliner", "show", "job", job_id))
    except UserError:  # Slurm does not answer; if it does not at the requeue either, that says so
        return {}


def _queue_again(job_id: str, status: int) -> int:
    """Slurm kills the batch script at once. A controller that is away for some minutes is waited for."""
    for wait_s in (*REQUEUE_WAITS_S, 0):
        try:
            scontrol("requeue", job_id)
            return status
        except UserError as error:
            if LASTING.search(str(error)) or not wait_s:
                print(f"error: the job is not queued again: {error}", file=sys.stderr, flush=True)
                return status
            print(f"tried again in {wait_s} s: {error}", file=sys.stderr, flush=True)
        time.sleep(wait_s)
    return status


def _log(run_dir: Path, job_id: str, found: Failure) -> Path | None:
    """What the rank wrote, where the launcher submitted the job."""
    log = run_dir / "logs" / "slurm" / f"{job_id}_{found.rank}_log.err"
    return log if log.is_file() else None


def _kept(run_dir: Path, job_id: str) -> list[Failure]:
    """The failures of this job; of another, none."""
    found = failures.read_json(_history(run_dir), job_id) or {"failures": []}
    return [Failure(**each) for each in found["failures"]]


def _keep(run_dir: Path, job_id: str, failed: Sequence[Failure], *, idle: int = 0) -> None:
    """`idle`: of `_idle`."""
    record = {"start": job_id, "failures": [asdict(each) for each in failed], "idle": idle}
    with contextlib.suppress(OSError):
        failures.write_json(_history(run_dir), record)


def _history(run_dir: Path) -> Path:
    return run_dir / "logs" / "slurm_failures.json"


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2 or not argv[1].isdecimal():
        raise UserError("usage: python -m bigtrain.launching.job_end RUN STATUS, in the batch script of a Slurm job")
    return end(frozen.load(argv[0]), Job.of(os.environ), int(argv[1]))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
