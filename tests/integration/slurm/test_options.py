"""What a site sets reaches Slurm: a job is submitted with it and read back."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.integration.slurm.cluster import Cluster
from tests.integration.slurm.test_submit import refused
from tests.integration.slurm.test_train_on_slurm import LAUNCH, TWO_NODES, settings, submitted

pytestmark = pytest.mark.slow
SITE = """
defaults: [slurm]
num_nodes: 1
procs_per_node: 2
partition: main,spot
account: lab-7
qos: high
reservation: ours
constraint: 'cpu&even'
exclude: node1
time: '00:20:00'
gpus_per_node: fake:2
gres: nvme:1
cpus_per_proc: 3
memory: 2G
mail_user: me@example.org
mail_type: END,FAIL
array_parallelism: 1
setup: ["echo set up on $SLURMD_NODENAME", "export SEEN=$(hostname)"]
env: {NCCL_DEBUG: INFO, WORDS: 'two $words'}
sbatch: {nice: '100', comment: 'of a site', hold: 'true'}
signal_s: 120
"""


@pytest.fixture
def reservation(cluster: Cluster) -> None:
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    command = ["starttime=now", "duration=10", "nodes=node0", f"users={user}", "flags=ignore_jobs"]
    cluster.ask("scontrol", "create", "reservation", "reservationname=ours", *command)


def test_the_options_of_a_site(cluster: Cluster, data: Path, tmp_path: Path, reservation: None) -> None:
    """Accounts and quality of service need Slurm's database: the local cluster takes the former as a text, and
    drops the latter."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "site.yaml").write_text(SITE, encoding="utf-8")
    command = ["--config-dir", tmp_path, *settings(data, "run"), "+cluster=site", "cluster.device=cuda"]
    dry_run = cluster.ask(*LAUNCH, *command, "dry_run=true", cwd=tmp_path)
    job_id = submitted(cluster.ask(*LAUNCH, *command, cwd=tmp_path))
    shown = cluster.ask("scontrol", "--oneliner", "show", "job", job_id)
    script = cluster.ask("scontrol", "write", "batch_script", job_id, "-")
    cluster.ask("scancel", job_id)
    cluster.ask("scontrol", "delete", "reservationname=ours")
    for part in (
        "JobName=run ",
        "JobState=PENDING Reason=JobHeldUser",
        "Partition=main,spot ",
        "Account=lab-7 ",
        "Reservation=ours ",
        "Features=cpu&even ",
        "ExcNodeList=node1 ",
        "TimeLimit=00:20:00 ",
        "NumNodes=1",
        "NumTasks=2 ",
        "CPUs/Task=3 ",
        "MinMemoryNode=2G ",
        "TresPerNode=gres:gpu:fake:2,gres:nvme:1 ",
        "MailUser=me@example.org MailType=END,FAIL",
        "Nice=100 ",
        "Comment=of a site ",
        "Requeue=1 ",
    ):
        assert part in shown, (part, shown)
    assert script.strip() in dry_run
    for line in ("#SBATCH --qos=high", "#SBATCH --signal=USR2@120", "export WORDS='two $words'"):
        assert line in script.splitlines(), script
    assert script.index("echo set up on") < script.index("export NCCL_DEBUG=INFO") < script.index("srun ")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("cluster.constraint=a100", "Invalid feature specification"),
        ("cluster.exclude=node7", "Invalid node name specified"),
        ("cluster.reservation=theirs", "Requested reservation is invalid"),
        ("cluster.gres=lustre:1", "Invalid generic resource"),
    ],
)
def test_what_slurm_does_not_know_is_one_line_before_anything_is_written(
    setting: str, says: str, cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    line = refused(cluster, tmp_path, *settings(data, "run"), *TWO_NODES, setting)
    assert line.startswith("error: sbatch refuses the job: ") and says in line
    assert not list(tmp_path.iterdir())


def test_what_only_the_submission_refuses_is_one_line_and_may_be_corrected(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    command = [*settings(data, "run"), *TWO_NODES]
    done = cluster.run(*LAUNCH, *command, "cluster.memory=900G", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: sbatch refuses the job: Memory specification can not be satisfied; ")
    held = ["optim.lr=0.5", "+cluster.sbatch.hold=true"]
    job_id = re.search(r"job (\d+)", cluster.ask(*LAUNCH, *command, *held, cwd=tmp_path))
    assert job_id and cluster.job(job_id[1])["JobState"] == "PENDING"
    cluster.ask("scancel", job_id[1])
