"""The sbatch script, as submitit writes it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import random
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config.errors import UserError
from bigtrain.config.schema import ClusterConfig, Config, RunConfig
from bigtrain.launching.environment import free_port
from bigtrain.launching.slurm import link, partition_problems, refuse_live_job
from bigtrain.launching.slurm_script import JOB_END, MEET, Batch, RankTask, sbatch_script
from tests.unit.config.test_cluster_rules import SITE

FIVE = tuple(f"/shared/sweep/it's {task}" for task in range(5))
PLAIN = Path(__file__).resolve().parents[3] / "launchers" / "slurm.sbatch"


def options(script: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH --"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[name] = shlex.split(value)[0] if value else ""
    return found


def batch(**cluster: Any) -> Batch:
    settings = {"kind": "slurm", "num_nodes": 2, "procs_per_node": 8, "device": "cuda", **cluster}
    return Batch.of_run(Config(run=RunConfig(name="big", dir="/shared/big"), cluster=ClusterConfig(**settings)))


def script(**cluster: Any) -> str:
    return sbatch_script(batch(**cluster))


def test_script_asks_for_what_the_config_says() -> None:
    site: dict[str, Any] = {**SITE, "time": "2-00:00:00", "cpus_per_proc": 6}
    text = script(**site)
    found = options(text)
    expected = {
        "job-name": "big",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "a100:8",
        "gres": "nvme:1",
        "cpus-per-task": "6",
        "mem": "480G",
        "time": str(2 * 24 * 60),
        "partition": "gpu,spot",
        "account": "lab-7",
        "qos": "high",
        "reservation": "maintenance.1",
        "constraint": "a100&[rack1|rack2]",
        "exclude": "gpu[07-09],gpu31",
        "mail-user": "me@example.org",
        "mail-type": "end,FAIL",
        "nice": "100",
        "exclusive": "",
        "signal": "USR2@600",
        "requeue": "",
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["output"].startswith("/shared/big/logs/")
    assert not {"wckey", "array"} & set(found)
    lines = text.splitlines()
    setup = [lines.index(line) for line in site["setup"]]
    exports = [f"export {name}={value}" for name, value in site["env"].items()]
    code = ("run=/shared/big", "export PYTHONPATH=$run/code${PYTHONPATH:+:$PYTHONPATH}")
    order = [*setup, *map(lines.index, exports), *map(lines.index, code)]
    (ranks,) = (line for line in lines if line.startswith("srun "))
    assert order == sorted(order) and order[-1] < lines.index(ranks)
    for part in (
        "--kill-on-bad-exit=1",
        "--container-image=nvcr.io#nvidia/pytorch:25.01-py3",
        "--container-mounts=/shared/big:/shared/big,/data:/data,/scratch:/tmp:rw",
        " python3 -u -m submitit",
    ):
        assert part in ranks.replace("'", "")
    assert {field.name for field in dataclasses.fields(ClusterConfig)} - set(site) == {
        "kind",
        "num_nodes",
        "procs_per_node",
        "device",
        "device_memory_gib",
        "requeue",
        "max_restarts",
        "mtbf_h",
        "container_python",
    }, "each key of a site is above"


@pytest.mark.parametrize(
    ("cluster", "found"),
    [
        ({}, ("8", None)),
        ({"gres": "gpu:a100:8"}, (None, "gpu:a100:8")),
        ({"gres": "nvme:1"}, ("8", "nvme:1")),
        ({"gpus_per_node": "0"}, (None, None)),
        ({"device": "cpu"}, (None, None)),
    ],
)
def test_gpus_are_asked_for_once(cluster: dict[str, Any], found: tuple[str | None, str | None]) -> None:
    given = options(script(**cluster))
    assert (given.get("gpus-per-node"), given.get("gres")) == found


def test_variables_are_taken_literally() -> None:
    words = """two $words and 'more' `x`"""
    (line,) = (line for line in script(env={"WORDS": words}).splitlines() if line.startswith("export WORDS="))
    done = subprocess.run(["bash", "-c", f"{line}; printenv WORDS"], capture_output=True, text=True, timeout=20)
    assert done.stdout == f"{words}\n"


def test_a_sweep_is_one_array() -> None:
    text = sbatch_script(dataclasses.replace(batch(array_parallelism=2), run_dirs=FIVE))
    assert options(text)["array"] == "0-4%2" and "%A_%a_0_log.out" in options(text)["output"]
    assert options(sbatch_script(dataclasses.replace(batch(), run_dirs=FIVE)))["array"] == "0-4%5"
    (runs,) = (line for line in text.splitlines() if line.startswith("runs="))
    (run,) = (line for line in text.splitlines() if line.startswith("run="))
    done = subprocess.run(
        ["bash", "-c", f"SLURM_ARRAY_TASK_ID=3; {runs}\n{run}\necho $run"], capture_output=True, text=True
    )
    assert done.stdout == f"{FIVE[3]}\n"


def test_script_without_gpus_requeue_or_extras() -> None:
    text = script(device="cpu", requeue=False, setup=["module load python"])
    found = options(text)
    assert "no-requeue" in found and not {"requeue", "gpus-per-node", "partition", "account"} & set(found)
    assert text.index("module load python") < text.index("srun")


def test_flags_of_sbatch_that_take_no_value() -> None:
    found = options(script(sbatch={"exclusive": "true", "comment": "two words"}))
    assert (found["exclusive"], found["comment"]) == ("", "two words")


def test_what_the_script_does_around_the_ranks(tmp_path: Path) -> None:
    """It runs, with stand-ins for srun and for the Python of meeting.py and job_end.py; SIGTERM does not end it."""
    text = script().replace(sys.executable, "python")
    programs = {
        "python": 'case $2 in *meeting) echo head-node 12345;; *) echo "$@"; exit $4;; esac',
        "srun": "kill -TERM $PPID; echo ranks meet at $MASTER_ADDR:$MASTER_PORT; exit 75",
    }
    for name, lines in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 75
    assert done.stdout.splitlines() == [
        "ranks meet at head-node:12345",
        "-m bigtrain.launching.job_end /shared/big 75",
    ]


def test_the_plain_script_does_the_same() -> None:
    """What stands around srun, line by line."""
    lines = PLAIN.read_text(encoding="utf-8").splitlines()
    at = [lines.index(line) for line in (*MEET, *JOB_END)]
    assert at == sorted(at) and at[-1] == len(lines) - 1
    assert not any(line.startswith("set -") and "e" in line[5:] for line in lines), "srun's failure is not the end"


SHOWN = """PartitionName=short Default=YES MaxTime=01:00:00 State=UP TotalNodes=8
PartitionName=long Default=NO MaxTime=7-00:00:00 State=UP TotalNodes=4
PartitionName=free Default=NO MaxTime=UNLIMITED State=UP TotalNodes=2
"""


@pytest.mark.parametrize(
    ("cluster", "named"),
    [
        ({"time": "01:00:00"}, []),
        ({"time": "02:00:00"}, ["cluster.time"]),
        ({"time": "02:00:00", "qos": "long"}, []),
        ({"partition": "short,long"}, []),
        ({"partition": "free"}, []),
        ({"partition": "free", "num_nodes": 3}, ["cluster.num_nodes"]),
        ({"partition": "free,long", "num_nodes": 3}, []),
        ({"num_nodes": 9}, ["cluster.num_nodes", "cluster.time"]),
        ({"partition": "long,gpu"}, ["cluster.partition"]),
    ],
)
def test_jobs_that_their_partition_cannot_take(cluster: dict[str, Any], named: list[str]) -> None:
    problems = partition_problems(Config(cluster=ClusterConfig(kind="slurm", **cluster)), SHOWN)
    assert [problem.key for problem in problems] == named
    assert not partition_problems(Config(cluster=ClusterConfig(kind="slurm")), "")


@pytest.mark.parametrize(
    ("queue", "is_refused"),
    [
        ("", False),
        ("7|7|RUNNING|/home/me|{runs}/big/logs/slurm/.submission_file_1.sh", True),
        ("6|6|PENDING|/|true\n7|7|PENDING|{runs}|/home/me/slurm.sbatch big", True),
        ("7|7|RUNNING|{runs}|/home/me/slurm.sbatch bigger", False),
        ("8|8|RUNNING|{runs}|/home/me/slurm.sbatch big", False),
        ("9|7_1|RUNNING|/|/sweep/.array/7_submission.sh", True),
        ("9|7_1|RUNNING|/|/another/.array/7_submission.sh", False),
        ("9|7_2|RUNNING|/|/sweep/.array/7_submission.sh\n10|7|PENDING|/|/another/7_submission.sh", False),
    ],
)
def test_a_folder_that_a_job_trains_in(
    queue: str, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the path of submitit's script, by an argument of another, or by the link that a task of an array left. Job 8
    is where the launch itself runs."""
    (tmp_path / "big" / "logs" / "slurm").mkdir(parents=True)
    (tmp_path / "big" / "logs" / "slurm" / "7_1_submission.sh").symlink_to("/sweep/.array/7_submission.sh")
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{queue.format(runs=tmp_path)}' | grep .; true\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    config = Config(run=RunConfig(name="big", dir=str(tmp_path / "big")))
    with pytest.raises(UserError, match=r"job 7(_1)? ") if is_refused else contextlib.nullcontext():
        refuse_live_job(config)


def test_task_travels_to_the_nodes() -> None:
    task = RankTask("/shared/big")
    assert pickle.loads(pickle.dumps(task)) == task


def test_a_port_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        ports = [taken.getsockname()[1]] * 3 + [free_port()]
        expected = ports[-1]
        monkeypatch.setattr(random.SystemRandom, "randrange", lambda *_: ports.pop(0))
        assert free_port() == expected


def test_nothing_fails_behind_a_submission(tmp_path: Path) -> None:
    """Neither a link of an earlier cluster, which gave the number before, nor a folder that takes none."""
    array = dataclasses.replace(batch(), folder=tmp_path / "sweep" / ".array")
    run_dir, submission = tmp_path / "sweep" / "lr-1", "7_0_submission.sh"
    own = run_dir / "logs" / "slurm"
    own.mkdir(parents=True)
    (own / submission).symlink_to("/elsewhere")
    link(array, run_dir, "7_0")
    assert os.readlink(own / submission) == "../../../.array/7_submission.sh"
    (tmp_path / "file").touch()
    link(array, tmp_path / "file", "7_1")
