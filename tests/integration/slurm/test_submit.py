"""What the launcher and Slurm say to each other before a rank starts, and launchers/localslurm itself."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest

from tests.integration.slurm.cluster import MISSING, WHY_SKIPPED, Cluster
from tests.integration.slurm.test_train_on_slurm import LAUNCH, TWO_NODES, settings

pytestmark = pytest.mark.slow
MEETING = (sys.executable, "-m", "bigtrain.launching.meeting")


def refused(cluster: Cluster, folder: Path, *arguments: str) -> str:
    """The one error line of a launch that must be refused."""
    done = cluster.run(*LAUNCH, *arguments, cwd=folder)
    assert done.returncode == 2 and done.stdout == "", done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_an_unknown_partition_is_refused_before_anything_is_written(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    line = refused(cluster, tmp_path, *settings(data, "run"), *TWO_NODES, "cluster.partition=gpu")
    assert line == ("error: cluster.partition=gpu: Slurm has no such partition. Choose of main, spot, off.")
    assert not list(tmp_path.iterdir())


def test_a_job_that_would_wait_for_ever_is_refused(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    command = [*settings(data, "run"), *TWO_NODES, "cluster.partition=spot"]
    line = refused(cluster, tmp_path, *command, "cluster.num_nodes=4")
    assert line == "error: cluster.num_nodes=4: partition spot has 2 nodes. Ask for fewer, or choose another."
    line = refused(cluster, tmp_path, *command, "cluster.time=02:00:00")
    assert line.startswith("error: cluster.time=02:00:00: partition spot gives 60 minutes at most. ")


def test_the_dry_run_prints_a_script_that_sbatch_takes(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    shown = cluster.ask(*LAUNCH, *settings(data, "run"), *TWO_NODES, "dry_run=true", cwd=tmp_path)
    script = tmp_path / "script"
    script.write_text(shown[shown.index("#!/bin/bash") : shown.index("dry run: ")])
    assert "to start at" in cluster.run("sbatch", "--test-only", script).stderr
    cluster.ask("bash", "-n", script)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [("node[0-1]", "127.0.0.1"), ("localhost,rack[1-2]n[01-16]", "localhost"), ("node1", "127.0.0.1")],
)
def test_ranks_meet_at_the_first_node_by_a_name_that_the_others_find(
    cluster: Cluster, nodes: str, expected: str
) -> None:
    """No host is called node0: its address is Slurm's."""
    address, port = cluster.ask(*MEETING, SLURM_JOB_NODELIST=nodes).split()
    assert address == expected
    with socket.socket() as listener:
        listener.bind(("", int(port)))


@pytest.mark.parametrize(
    ("nodes", "first"), [("tux[07-09,1]", "tux07"), ("odd-name.x,b", "odd-name.x"), ("r[1-2]n[01-02]", "r1n01")]
)
def test_node_lists_with_odd_names(cluster: Cluster, nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigtrain.launching.meeting import first_node

    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    assert first_node(nodes) == first


def test_a_node_list_that_slurm_cannot_read(cluster: Cluster) -> None:
    done = cluster.run(*MEETING, SLURM_JOB_NODELIST="rack[1-2]n5")
    assert done.returncode == 2
    assert done.stderr == "error: SLURM_JOB_NODELIST=rack[1-2]n5: scontrol show hostnames cannot read it.\n"


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those that name the cluster's folder in their arguments or work there."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in part for part in process.cmdline()) or process.cwd().startswith(str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.skipif(bool(MISSING), reason=WHY_SKIPPED)
def test_the_cluster_stops_cleanly_and_starts_again_after_a_crash(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "slurm")
    try:
        assert cluster.control("start").returncode == 0
        assert "already up" in cluster.control("start").stdout
        cluster.ask("sbatch", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 600")
        for process in processes_of(cluster.folder):
            if process.name() in ("slurmctld", "munged", "slurmd"):
                os.kill(process.pid, signal.SIGKILL)
        assert cluster.control("status").returncode == 2
        started = cluster.control("start")
        assert started.returncode == 0, started.stderr
        assert cluster.ask("squeue", "--noheader") == "", "jobs of the killed one are gone"
        assert cluster.ask("srun", "--nodes=2", "--ntasks-per-node=1", "printenv", "SLURMD_NODENAME").split() in (
            ["node0", "node1"],
            ["node1", "node0"],
        )
    finally:
        stopped = cluster.control("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert processes_of(cluster.folder) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_that_another_user_has_made_is_not_trusted(tmp_path: Path) -> None:
    """Its slurm.conf names what we would run, and a link what we would delete."""
    for folder in (tmp_path / "slurm", tmp_path / "link"):
        folder.symlink_to(tmp_path) if folder.name == "link" else folder.mkdir()
        os.chown(folder, 65534, -1, follow_symlinks=False)
        done = Cluster(folder).control("start")
        assert done.returncode == 2 and done.stderr.startswith(f"error: {folder} is of another user, "), done.stderr


@pytest.mark.skipif(bool(MISSING), reason=WHY_SKIPPED)
def test_a_folder_with_other_files_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    done = Cluster(tmp_path).control("start")
    assert done.returncode == 2 and "has files that are not a cluster's" in done.stderr
    assert (tmp_path / "thesis.txt").exists()
