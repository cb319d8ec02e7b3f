"""`python -m bigtrain.launch --multirun` on this machine: one run after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.runs import build_shards, records
from tests.integration.slurm.test_train_on_slurm import settings
from tests.integration.test_launch_cli import launch, refused

SWEEP = ["--multirun", "optim.lr=1e-3,3e-4", "cluster.procs_per_node=1", "parallel.tensor=1", "train.num_steps=5"]


def test_the_dry_run_shows_the_table_and_the_first_run(tmp_path: Path) -> None:
    done = launch(tmp_path, "--multirun", "cluster.device=cpu", "run.seed=1,2", "run.name=s", "dry_run=true")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["0", "runs/s/seed-1", "run.seed=1"],
        ["1", "runs/s/seed-2", "run.seed=2"],
    ]
    assert f"run folder           {tmp_path}/runs/s/seed-1" in lines and "nothing was started" in lines[-1]
    slurm = launch(tmp_path, "--multirun", "+cluster=slurm", "run.seed=1,2", "run.name=s", "dry_run=true").stdout
    assert "#SBATCH --array=0-1%2" in slurm and f"runs=({tmp_path}/runs/s/seed-1 {tmp_path}/runs/s/seed-2)" in slurm
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--multirun"], "no setting has several values"),
        (["--multirun", "run.seed=1,2", "--cfg", "job"], "goes with neither"),
        (["--multirun", "run.seed=1,2", "model.hiden_size=3"], "model.hidden_size"),
        (["--multirun", "run.seed=1,2", "cluster.device=cpu", "train.global_batch_size=16,18"], "global_batch_size=18"),
        (["run.seed=1,2"], "--multirun"),
    ],
)
def test_mistakes_are_told_before_the_first_run(tmp_path: Path, arguments: list[str], says: str) -> None:
    message = refused(tmp_path, *arguments)
    assert says in message and message.count(says) == 1


@pytest.mark.slow
def test_each_run_in_a_folder_of_its_own_and_then_nothing_is_left_to_do(tmp_path: Path) -> None:
    data = build_shards(tmp_path / "shards")
    command = [*settings(data, "s"), *SWEEP]
    done = launch(tmp_path, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [tmp_path / "runs" / "s" / label for label in ("lr-0.001", "lr-0.0003")]
    for place, run_dir in enumerate(runs):
        assert [record["step"] for record in records(run_dir, "train")] == list(range(1, 6))
        assert f"run {place} of 2: s-{run_dir.name}" in done.stdout
        assert not (run_dir / "code").exists(), "only what starts later has a copy of the code"
    assert [max(record["lr"] for record in records(run_dir, "train")) for run_dir in runs] == pytest.approx(
        [1e-3, 3e-4]
    )
    assert "python tools/report.py runs/s/*" in done.stdout
    again = launch(tmp_path, *command)
    assert again.stdout.splitlines() == [f"runs/s/{run.name}: already finished" for run in runs]
