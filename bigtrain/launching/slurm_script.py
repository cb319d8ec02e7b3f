"""The script that goes to sbatch, from the config alone. submitit writes it and starts one task a rank.

On the first node it runs the site's set-up lines, puts the copy of the code that lies beside the run (code_copy.py) in
front of any other, finds where the ranks meet (meeting.py), starts them with srun (task.py), and at their end tells why
and queues the job again where the run is to go on (job_end.py). The same script serves a run and a sweep, whose runs
are the tasks of one job array.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bigtrain.config.cluster import ClusterConfig
from bigtrain.config.cluster_rules import asks_for_gpus, time_limit_minutes
from bigtrain.config.schema import Config
from bigtrain.launching.code_copy import CODE

MEET = (
    'meeting=$("$python" -m bigtrain.launching.meeting) || exit',
    "export MASTER_ADDR=${meeting% *} MASTER_PORT=${meeting#* }",
    "trap : TERM",
)
"""Shell lines before srun, on the first node. launchers/slurm.sbatch has the same. At the time limit Slurm sends
SIGTERM to this script too: it stays, for what is behind srun."""
JOB_END = ('"$python" -m bigtrain.launching.job_end "$run" $?',)
"""And behind it."""


@dataclass(frozen=True)
class Batch:
    """What one sbatch submits."""

    config: Config
    """Of the run, or of any run of the sweep: they have the group cluster in common."""
    name: str
    """Of the job."""
    root: Path
    """Folder that everything of it is in: the run's, or the sweep's."""
    folder: Path
    """Where submitit keeps the script, the pickled tasks and each rank's output."""
    run_dirs: tuple[str, ...]
    """More than one: the tasks of an array, in this order."""

    @staticmethod
    def of_run(config: Config) -> Batch:
        run_dir = Path(config.run.dir)
        return Batch(config, config.run.name, run_dir, slurm_folder(run_dir), (config.run.dir,))


def slurm_folder(run_dir: Path) -> Path:
    """Where a run has what Slurm wrote of it."""
    return run_dir / "logs" / "slurm"


@dataclass(frozen=True)
class RankTask:
    """What each task of the job does: it becomes one rank. submitit pickles it for the nodes."""

    run_dir: str

    def __call__(self) -> NoReturn:
        """Our task takes the place of submitit's process, whose handlers would requeue before the ranks have saved,
        and hide SIGTERM from them."""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])  # it waits until the task listens
        os.execv(sys.executable, [sys.executable, "-m", "bigtrain.launching.task", self.run_dir])


def job_parameters(batch: Batch) -> dict[str, Any]:
    """The job as submitit's SlurmExecutor takes it."""
    cluster = batch.config.cluster
    flags: dict[str, Any] = {name: True if value.lower() == "true" else value for name, value in cluster.sbatch.items()}
    more: dict[str, Any] = {"requeue" if cluster.requeue else "no-requeue": True, **flags}
    if cluster.reservation is not None:
        more["reservation"] = cluster.reservation
    parameters: dict[str, Any] = {
        "job_name": batch.name,
        "nodes": cluster.num_nodes,
        "ntasks_per_node": cluster.procs_per_node,
        "cpus_per_task": cluster.cpus_per_proc,
        "gpus_per_node": _gpus_per_node(cluster),
        "gres": cluster.gres,
        "mem": cluster.memory,
        "time": time_limit_minutes(cluster.time),
        "signal_delay_s": cluster.signal_s,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "mail_user": cluster.mail_user,
        "mail_type": cluster.mail_type,
        "array_parallelism": cluster.array_parallelism or len(batch.run_dirs),
        "setup": [*cluster.setup, *_environment(cluster), f"python={_python()}", *_run(batch), *_code(), *MEET],
        # One rank that fails ends the others. srun inherits neither the cpus of sbatch nor its open-mode, and no
        # variables where sbatch was told --export=NONE.
        "srun_args": [
            "--kill-on-bad-exit=1",
            f"--cpus-per-task={cluster.cpus_per_proc}",
            "--open-mode=append",
            "--export=ALL",
            *_container(batch),
        ],
        "teardown": list(JOB_END),
        "additional_parameters": more,
    }
    set_ones = {name: value for name, value in parameters.items() if value is not None}
    return {**set_ones, "wckey": None}  # submitit's own default is a key that a cluster may refuse


def sbatch_script(batch: Batch) -> str:
    """The script that is handed to sbatch, as submitit writes it. Touches no disk and needs no Slurm."""
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    writer = object.__new__(SlurmExecutor)  # its __init__ asks for srun, which a laptop lacks
    writer.folder, writer.python = batch.folder, python_of_ranks(batch.config.cluster)
    parameters = job_parameters(batch)
    if len(batch.run_dirs) > 1:
        parameters["map_count"] = len(batch.run_dirs)
    return _make_sbatch_string(command=writer._submitit_command_str, folder=batch.folder, **parameters)


def python_of_ranks(cluster: ClusterConfig) -> str:
    """For a shell. The launcher's own, which the nodes have at the same path, or that of the image."""
    return shlex.quote(cluster.container_python) if cluster.container_image else _python()


def _gpus_per_node(cluster: ClusterConfig) -> str | None:
    if cluster.gpus_per_node is not None:
        return None if cluster.gpus_per_node == "0" else cluster.gpus_per_node
    return str(cluster.procs_per_node) if cluster.device == "cuda" and not asks_for_gpus(cluster.gres) else None


def _environment(cluster: ClusterConfig) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]


def _run(batch: Batch) -> list[str]:
    """The folder of the run as $run."""
    if len(batch.run_dirs) == 1:
        return [f"run={shlex.quote(batch.run_dirs[0])}"]
    return [f"runs=({shlex.join(batch.run_dirs)})", "run=${runs[$SLURM_ARRAY_TASK_ID]}"]


def _code() -> list[str]:
    """Without the second variable `python -m` takes a package in the folder that the job was submitted from: the
    checkout, as it is by then."""
    return [f"export PYTHONPATH=$run/{CODE}${{PYTHONPATH:+:$PYTHONPATH}}", "export PYTHONSAFEPATH=1"]


def _container(batch: Batch) -> list[str]:
    """Options that pyxis adds to srun: https://github.com/NVIDIA/pyxis. The batch script itself stays outside."""
    cluster = batch.config.cluster
    if cluster.container_image is None:
        return []
    mounts = ",".join([f"{batch.root}:{batch.root}", *cluster.container_mounts])
    return [f"--container-image={cluster.container_image}", f"--container-mounts={mounts}"]


def _python() -> str:
    return shlex.quote(sys.executable)
