"""Where the ranks run: the group cluster of the schema.

A cluster's site is a preset of this group, one file: launchers/README.md shows how. Keys have the names of sbatch's
options, or the string under the field says which one it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ClusterConfig:
    """Where the ranks run. Without +cluster=..., on this machine."""

    kind: str = field(default="local", metadata={"choices": ("local", "slurm")})
    """This machine, or a job of a Slurm cluster. Keys that say Slurm are for the latter."""
    num_nodes: int = 1
    """Machines."""
    procs_per_node: int = 0
    """Ranks a node. 0: as many as there are GPUs, or 4 on a machine without (local only)."""
    device: str = field(default="auto", metadata={"choices": ("auto", "cpu", "cuda")})
    """auto: GPUs where there are any."""
    device_memory_gib: float | None = None
    """GiB that each GPU has, such as 80; with device=cpu each node. A run whose weights, gradients and optimizer state
    take more is refused. null: as found on this machine; on Slurm memory with device=cpu, and nothing of GPUs."""
    partition: str | None = None
    """Slurm's partition; several with commas between: whichever starts first."""
    account: str | None = None
    """Slurm's account."""
    qos: str | None = None
    """Slurm's quality of service."""
    reservation: str | None = None
    """Slurm's reservation."""
    constraint: str | None = None
    """Slurm: features that the nodes must have, such as 'a100&ib'."""
    exclude: str | None = None
    """Slurm: nodes not to run on, such as gpu[07-09],gpu31."""
    time: str = "1-00:00:00"
    """Slurm's time limit, D-HH:MM:SS."""
    requeue: bool = True
    """Slurm: queue the job again at the time limit, on preemption, on node failure, and after a crash or a hang as
    often as max_restarts says; it goes on where it was."""
    signal_s: int = 90
    """Slurm: seconds ahead of the time limit at which it warns the run, which then saves: more than a batch of an
    evaluation, a step and a save take together."""
    mtbf_h: float = 24.0
    """Hours between failures of the whole job, for checkpoint.interval=auto; once the run has failed three times, its
    own mean counts instead. For orientation: 1,024 GPUs fail about every 8 hours, 16,384 every 2 to 3
    (https://arxiv.org/abs/2410.21680, https://arxiv.org/abs/2407.21783)."""
    max_restarts: int = 0
    """How often a run that crashed or hung is started again, from its newest checkpoint. Not after a failure that would
    only come again: a mistake in the settings, before a new run's first step, twice at the same step. With
    +cluster=slurm it is 3, and they are counted anew when the run was saved at the time limit."""
    gpus_per_node: str | None = None
    """Slurm: GPUs of each node as the site names them, such as 8 or a100:8. null: procs_per_node, with device=cuda and
    no gpu in gres. 0: do not ask, the nodes are given whole."""
    gres: str | None = None
    """Slurm: generic resources of each node, such as gpu:a100:8 or nvme:1."""
    cpus_per_proc: int = 8
    """Slurm's cpus-per-task: CPUs of each rank."""
    memory: str | None = None
    """Slurm's mem: memory of each node, such as 480G. 0: all of it. null: what the site gives."""
    array_parallelism: int | None = None
    """Slurm: runs of a sweep (--multirun) that train at once. null: as many as there is room for."""
    mail_user: str | None = None
    """Slurm: who gets mail about the job; null: its owner, where mail_type is set."""
    mail_type: str | None = None
    """Slurm: what about, such as END,FAIL,REQUEUE. null: no mail."""
    setup: list[str] = field(default_factory=list[str])
    """Slurm: shell lines on the first node before the ranks start: modules, environments."""
    env: dict[str, str] = field(default_factory=dict[str, str])
    """Slurm: environment variables of the ranks, taken literally: NCCL_DEBUG: INFO. No secrets: config.yaml and the
    script keep them. A variable of the shell that submits reaches the ranks by itself."""
    container_image: str | None = None
    """Slurm with pyxis: the ranks run in this image, a file or REGISTRY#NAME:TAG. It has the Python environment, and
    the run's folder is mounted into it."""
    container_mounts: list[str] = field(default_factory=list[str])
    """Slurm with pyxis: HOST:CONTAINER or HOST:CONTAINER:FLAGS each; the data and the checkpoints at the same path."""
    container_python: str = "python3"
    """Slurm with pyxis: the interpreter in the image."""
    sbatch: dict[str, str] = field(default_factory=dict[str, str])
    """Slurm: any other sbatch option, by its long name; true for one that takes no value."""
