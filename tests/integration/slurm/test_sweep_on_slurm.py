"""A sweep as a job array on a real Slurm, from a checkout that changes while it waits."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.integration.runs import committed, records
from tests.integration.slurm.cluster import SOURCE, Cluster
from tests.integration.slurm.test_train_on_slurm import LAUNCH, TWO_NODES, at_step, logs, settings

pytestmark = pytest.mark.slow
STEPS = 300
SWEEP = [
    "--multirun",
    "optim.lr=1e-3,3e-4",
    "parallel.tensor=1",
    f"train.num_steps={STEPS}",
    *TWO_NODES,
    "cluster.num_nodes=1",
    "cluster.procs_per_node=1",
    "+cluster.sbatch.hold=true",
    "cluster.setup=['echo set up on $SLURMD_NODENAME']",
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Of our own, to edit. Jobs are submitted from it, so it is the folder that they start in, too."""
    folder = tmp_path / "checkout"
    for part in ("bigtrain", "conf"):
        shutil.copytree(SOURCE / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_two_runs_of_one_array_one_is_queued_again_the_checkout_is_edited(
    cluster: Cluster, data: Path, checkout: Path
) -> None:
    command = [*LAUNCH, *settings(data, "sweep"), *SWEEP]
    said = cluster.ask(*command, cwd=checkout, PYTHONPATH=str(checkout))
    array = re.search(r"submitted job array (\d+): 2 runs, each 1 nodes x 1 ranks\n\n(.*)\n(.*)\n(.*)\n", said)
    assert array, said
    runs = [checkout / "runs" / "sweep" / label for label in ("lr-0.001", "lr-0.0003")]
    for task, (run_dir, lr) in enumerate(zip(runs, ("0.001", "0.0003"), strict=True)):
        assert array[3 + task].split() == [f"{array[1]}_{task}", f"runs/sweep/{run_dir.name}", f"optim.lr={lr}"]

    # All of the package breaks, while the array waits. The same launch again submits nothing.
    (checkout / "bigtrain" / "__init__.py").write_text("raise SystemExit('edited')", encoding="utf-8")
    again = cluster.ask(*command, cwd=checkout, PYTHONSAFEPATH="1")
    assert again.splitlines() == [
        f"runs/sweep/{run.name}: job {array[1]}_{n} (PENDING) is in the queue" for n, run in enumerate(runs)
    ]
    cluster.ask("scontrol", "release", array[1])
    jobs = [cluster.wait(f"{array[1]}_{task}", lambda job: job["JobState"] != "PENDING") for task in (0, 1)]
    (stopped,) = (task for task in (0, 1) if jobs[task]["JobId"] == array[1])  # by this number, Slurm means them all
    at_step(runs[stopped], 1)
    cluster.ask("scancel", "--signal=USR2", f"{array[1]}_{stopped}")
    ends = [cluster.ended(f"{array[1]}_{task}") for task in (0, 1)]
    for task, (run_dir, job) in enumerate(zip(runs, ends, strict=True)):
        said = logs(run_dir)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", str(int(task == stopped))), said
        assert [record["step"] for record in records(run_dir, "train")] == list(range(1, STEPS + 1)), said
        assert committed(run_dir)[-1] == STEPS and "step 300" in said and "set up on node" in said
        assert [event["signal"] for event in records(run_dir, "event") if event["name"] == "stop"] == (
            ["SIGUSR2"] if task == stopped else []
        )
    peaks = [max(record["lr"] for record in records(run_dir, "train")) for run_dir in runs]
    assert peaks == pytest.approx([1e-3, 3e-4])
    finished = cluster.ask(*command, cwd=checkout, PYTHONSAFEPATH="1")
    assert finished.splitlines() == [f"runs/sweep/{run.name}: already finished" for run in runs]
