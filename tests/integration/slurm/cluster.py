"""Real Slurm for the tests: launchers/localslurm brings up two nodes on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from bigtrain.launching.meeting import fields_of

SOURCE = Path(__file__).resolve().parents[3]
LOCALSLURM = SOURCE / "launchers" / "localslurm" / "localslurm"
SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
WHY_SKIPPED = f"{', '.join(MISSING)}: not installed, and tests/install_system_packages.sh could not install it"
DEADLINE_S = 240.0


@dataclass(frozen=True)
class Cluster:
    """Two nodes with 8 CPUs each, node0 and node1; partitions main (the default), spot and off."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PYTHONPATH": str(SOURCE),
            "PATH": SYSTEM_PATH,
            "PYTHONDONTWRITEBYTECODE": "",
        }

    def control(self, action: str) -> subprocess.CompletedProcess[str]:
        """localslurm's own answer."""
        return subprocess.run(
            [LOCALSLURM, action, self.folder], capture_output=True, text=True, timeout=120, env=self.environment
        )

    def run(self, *command: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **variables}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)

    def ask(self, *command: str | Path, cwd: Path | None = None, **variables: str) -> str:
        """Of a command that must end well."""
        done = self.run(*command, cwd=cwd, **variables)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm says of a job, by name."""
        return fields_of(self.ask("scontrol", "--oneliner", "show", "job", job_id))

    def lose(self, node: str) -> None:
        """The node dies with all that runs there, and Slurm hears of it."""
        dying = [each for each in psutil.process_iter() if _is_of(each, node, self.folder)]
        for process in [*dying, *(child for each in dying for child in each.children(recursive=True))]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def bring_back(self, node: str) -> None:
        self.ask("slurmd", "-N", node, "-f", self.folder / "slurm.conf", cwd=Path("/"), LOCALSLURM=str(self.folder))
        self.run("scontrol", "update", f"nodename={node}", "state=resume")  # refused where it has come back by itself

    def wait(self, job_id: str, until: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """The job as it is once `until` says so."""
        deadline = time.monotonic() + DEADLINE_S
        while not until(job := self.job(job_id)):
            assert time.monotonic() < deadline, job
            time.sleep(0.3)
        return job

    def ended(self, job_id: str) -> dict[str, str]:
        return self.wait(job_id, lambda job: job["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"))


def _is_of(process: psutil.Process, node: str, folder: Path) -> bool:
    """Whether it is a daemon of the node, or the parent of its tasks."""
    try:
        if process.name() == "slurmstepd":
            return Path(process.cwd()).is_relative_to(folder / node)
        return process.cmdline() == ["slurmd", "-N", node, "-f", str(folder / "slurm.conf")]
    except psutil.Error:
        return False
