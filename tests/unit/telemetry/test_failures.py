"""What failed ranks leave behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from bigtrain.telemetry import failures
from bigtrain.telemetry.metrics import MetricsFile, read_metrics


def test_a_start_is_the_same_on_all_ranks_and_another_after_a_restart() -> None:
    here = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "RANK": "0", "SLURM_JOB_ID": "7"}
    assert failures.start_of(here) == failures.start_of({**here, "RANK": "3", "LOCAL_RANK": "3"})
    for other in ({"MASTER_PORT": "2"}, {"SLURM_RESTART_COUNT": "1"}, {"TORCHELASTIC_RESTART_COUNT": "1"}):
        assert failures.start_of(here) != failures.start_of({**here, **other})


def test_a_file_of_another_start_is_none(tmp_path: Path) -> None:
    path = failures.crash_file(tmp_path, 3)
    assert failures.read_json(path, "one") is None
    failures.write_json(path, {"start": "one", "rank": 3})
    assert failures.read_json(path, "one") == {"start": "one", "rank": 3}
    assert failures.read_json(path, "two") is None
    path.write_text("{")
    assert failures.read_json(path, "one") is None
    assert [each.name for each in path.parent.iterdir()] == ["rank-3.json"], "nothing is left aside"


def test_a_file_that_nfs_thinks_missing_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No NFS here: this one shows what another machine wrote once the folder is opened, as NFS does."""
    path, open_ = failures.end_file(tmp_path, 0, "one"), os.open

    def opened(name: os.PathLike[str], flags: int) -> int:
        if Path(name) == path.parent:
            path.write_text('{"start": "one", "rank": 0}')
        return open_(name, flags)

    path.parent.mkdir(parents=True)
    monkeypatch.setattr(os, "open", opened)
    assert [end["rank"] for end in failures.ends(tmp_path, "one", 1)] == [0]


def test_a_crash_has_its_first_line_and_its_traceback(tmp_path: Path) -> None:
    written = failures.write_crash(tmp_path, 1, ValueError("one\ntwo"), "the traceback", step=9)
    assert failures.read_json(failures.crash_file(tmp_path, 1), failures.start_of()) == written
    assert failures.named(written) == "rank 1: ValueError: one" and written["traceback"] == "the traceback"
    assert failures.named(failures.write_crash(tmp_path, 1, MemoryError(), "", step=9)) == "rank 1: MemoryError"


# As torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp and NCCLUtils.cpp put them together.
NCCL_TIMEOUT = (
    "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=466119168, "
    "NumelOut=466119168, Timeout(ms)=600000) ran for 600060 milliseconds before timing out."
)
ENDED = "Process group watchdog thread terminated with exception:"
NCCL_CUDA = ", NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2"


@pytest.mark.parametrize(
    ("error", "is_peer"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:4321"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Read error [10.0.0.2]:3: Connection timed out"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Read error [10.0.0.2]:3: No route to host"), True),
        (RuntimeError("[pair.cc:78] Timed out waiting 1800000ms for recv operation to complete"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("NCCL error in: x, unhandled system error (run with NCCL_DEBUG=INFO for details)"), True),
        (RuntimeError("Timed out after 1801 seconds waiting for clients. 3/4 clients joined."), True),
        (RuntimeError("[pair.cc:553] Read error [127.0.0.1]:1234: Connection reset by peer"), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (dist.DistBackendError(f"[Rank 1] {NCCL_TIMEOUT}"), True),
        (dist.DistBackendError(f"[PG ID 0 PG GUID 0(default_pg) Rank 1] {ENDED} [Rank 1] {NCCL_TIMEOUT}"), True),
        (dist.DistBackendError(f"NCCL communicator was aborted on rank 1. Original reason: {NCCL_TIMEOUT}"), True),
        (dist.DistBackendError("NCCL timeout in communicator initialization."), True),
        (dist.DistStoreError("wait timeout after 600000ms, keys: /default_pg/0//cuda//0"), True),
        (
            dist.DistNetworkError("The client socket has timed out after 60000ms while trying to connect to (n, 1)"),
            False,  # nobody was ever there
        ),
        (RuntimeError("CUDA out of memory"), False),
        (dist.DistBackendError(f"NCCL error in: NCCLUtils.cpp:93, unhandled cuda error{NCCL_CUDA}"), False),
        (dist.DistBackendError(f"[PG ID 0 PG GUID 0(default_pg) Rank 1] {ENDED} CUDA error: an illegal access"), False),
        (dist.DistBackendError("NCCL error in: NCCLUtils.cpp:94, invalid usage, NCCL version 2.27.5"), False),
        (TimeoutError("wait timeout after 5 s"), False),  # the data's
        (RuntimeError("shapes do not match"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # the data's, say
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_who_only_lost_a_peer(error: BaseException, is_peer: bool) -> None:
    assert failures.blames_a_peer(error) == is_peer


def test_an_event_from_outside_stands_beside_a_line_that_was_cut(tmp_path: Path) -> None:
    failures.append_event(tmp_path, "crash", rank=1, step=3)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    failures.append_event(tmp_path, "hang", step=4)
    lines = path.read_text().splitlines()
    assert [json.loads(lines[index])["name"] for index in (0, 2)] == ["crash", "hang"]


def test_how_an_attempt_ended_stays_when_its_steps_are_computed_again(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    for step in (1, 2, 3):
        file.append({"kind": "train", "step": step})
    file.close()
    failures.append_event(tmp_path, "crash", step=4)
    failures.append_event(tmp_path, "hang", step=4)
    failures.append_event(tmp_path, "checkpoint", step=3)
    for resume_step, left in ((2, [1, 2, 4, 4]), (0, [4, 4])):
        MetricsFile(tmp_path / "metrics.jsonl", resume_step=resume_step).close()
        assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == left
