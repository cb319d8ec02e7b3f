"""The runs of a sweep, before any of them starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bigtrain.checkpoint import folder as folders
from bigtrain.config import frozen
from bigtrain.config.compose import compose
from bigtrain.config.errors import UserError
from bigtrain.config.sweep import points
from bigtrain.launching import machine
from bigtrain.launching.slurm import QueuedJob
from bigtrain.launching.sweep import (
    Sweep,
    copy_code_of_array,
    open_runs,
    problems,
    submitted,
    table,
    with_data_of_their_own,
)


def sweep_of(folder: Path, *overrides: str) -> Sweep:
    def composed(one: tuple[str, ...] | list[str]) -> object:
        return machine.resolve(compose(one), cwd=folder)

    return Sweep.of(points(list(overrides)), composed)  # type: ignore[arg-type]


def test_each_run_has_a_folder_in_the_sweep_s(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "run.name=s", "optim.lr=1e-3,3e-4", "+cluster=slurm")
    assert [(run.config.run.name, run.config.run.dir) for run in sweep.runs] == [
        ("s-lr-0.001", f"{tmp_path}/runs/s/lr-0.001"),
        ("s-lr-0.0003", f"{tmp_path}/runs/s/lr-0.0003"),
    ]
    assert [run.config.optim.lr for run in sweep.runs] == [1e-3, 3e-4]
    assert (sweep.name, sweep.folder, len(sweep.batch.run_dirs)) == ("s", tmp_path / "runs" / "s", 2)
    assert list(problems(sweep)) == []


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = sweep_of(tmp_path, "run.name=s", "optim.lr=1e-3,3e-4", "run.seed=1,2", "+cluster=slurm")
    rows = table(sweep, [f"7_{task}" for task in range(4)]).splitlines()
    assert [row.split() for row in rows[1:3]] == [
        ["7_0", "runs/s/lr-0.001-seed-1", "optim.lr=0.001", "run.seed=1"],
        ["7_1", "runs/s/lr-0.001-seed-2", "optim.lr=0.001", "run.seed=2"],
    ]
    assert "submitted job array 7: 4 runs, each 2 nodes x 8 ranks" in submitted(sweep, [f"7_{n}" for n in range(4)])


def test_what_a_sweep_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.name and run\.dir are the sweep's"):
        sweep_of(tmp_path, "run.seed=1,2", "run.name='s${run.seed}'")
    (found,) = problems(sweep_of(tmp_path, "+cluster=slurm", "cluster.num_nodes=1,2"))
    assert "tasks of a job array are alike" in str(found)
    assert not list(problems(sweep_of(tmp_path, "cluster.procs_per_node=1,2")))
    sweep = sweep_of(tmp_path, "run.seed=1,2")
    sweep.folder.mkdir(parents=True)
    frozen.save(sweep.first, sweep.folder)
    (found,) = problems(sweep)
    assert "holds a run" in str(found)


def test_what_is_finished_or_in_the_queue_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = sweep_of(tmp_path, "run.name=s", "run.seed=1,2,3", "train.num_steps=9", "schedule.warmup_steps=1")
    done, queued, _ = (run.run_dir for run in sweep.runs)
    folders.prepare(done / "checkpoints", 9, 0)
    checkpoint = folders.commit(done / "checkpoints", 9, {}, {"tokenizer.model": b"t"})
    (done / "summary.json").write_text(json.dumps({"steps": 9}), encoding="utf-8")
    (queued / "logs" / "slurm").mkdir(parents=True)
    (queued / "logs" / "slurm" / "7_1_submission.sh").symlink_to("../../../.array/7_submission.sh")
    queue = [QueuedJob("7_1", "PENDING", (sweep.folder / ".array" / "7_submission.sh",))]
    left, told = open_runs(sweep, queue)
    assert [run.swept for run in left.runs] == [("run.seed=3",)] and len(left.batch.run_dirs) == 1
    expected = ["runs/s/seed-1: already finished", "runs/s/seed-2: job 7_1 (PENDING) is in the queue"]
    assert told == expected
    (checkpoint / "tokenizer.model").unlink()
    finished, warning, in_queue = open_runs(sweep, queue)[1]
    assert [finished, in_queue] == expected and "tokenizer.model: the file is missing" in warning
    (done / "summary.json").unlink()
    left, told = open_runs(sweep, queue)
    assert len(left.runs) == 2 and told == [warning, in_queue], "it goes on, and says so"


def test_data_that_runs_share_are_prepared_once(tmp_path: Path) -> None:
    assert len(with_data_of_their_own(sweep_of(tmp_path, "run.seed=1,2", "optim.lr=1,2"))) == 1
    assert len(with_data_of_their_own(sweep_of(tmp_path, "run.seed=1,2", "data.pack=concat,best_fit"))) == 2


def test_one_copy_of_the_code_which_a_waiting_job_keeps(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "run.name=s", "run.seed=1,2")
    for run in sweep.runs:
        run.run_dir.mkdir(parents=True)
    waiting = [QueuedJob("7_1", "PENDING", (sweep.folder / ".array" / "7_submission.sh",))]
    copy_code_of_array(sweep, [])
    copy_code_of_array(sweep, waiting)
    code = sweep.folder / ".array" / "code"
    assert {(run.run_dir / "code").resolve() for run in sweep.runs} == {code.resolve()}
    (code / "bigtrain" / "launch.py").write_text("of an older checkout", encoding="utf-8")
    with pytest.raises(UserError, match=r"job 7_1 .* the code has changed since"):
        copy_code_of_array(sweep, waiting)
    copy_code_of_array(sweep, [dataclasses.replace(waiting[0], paths=(tmp_path / "other",))])
    assert "of an older checkout" not in (code / "bigtrain" / "launch.py").read_text()
