"""What this machine is, and a config with the answers filled in. No torch: the driver is asked directly."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bigtrain.config import locations
from bigtrain.config.cluster_rules import memory_bytes
from bigtrain.config.memory_plan import Room
from bigtrain.config.schema import Config, SourceConfig
from bigtrain.distributed.host_memory import host_bytes

CPU_RANKS = 4
"""Ranks on a machine without a GPU, where cluster.procs_per_node does not say."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """NVIDIA GPUs that a process started here would see: those of the driver that CUDA_VISIBLE_DEVICES lets through."""
    present = _gpus_of_driver()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or present == 0:
        return present
    count = 0
    for name in visible.split(","):  # CUDA stops at the first name that it does not know
        name = name.strip()
        if not (name.startswith(("GPU-", "MIG-")) or (name.isdigit() and int(name) < present)):
            break
        count += 1
    return count


def torch_is_cpu_build() -> bool:
    """Whether the installed torch was built without CUDA, by its version, which costs no import."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def room(config: Config) -> Room | None:
    """What the devices of a resolved config have, as far as it can be known from here; None where it cannot."""
    cluster = config.cluster
    is_shared = cluster.device == "cpu"
    if cluster.device_memory_gib is not None:
        whose = "a machine" if is_shared else "a GPU"
        return Room(int(cluster.device_memory_gib * 2**30), is_shared, f"{whose} (cluster.device_memory_gib)")
    if cluster.kind == "slurm":
        size = memory_bytes(cluster.memory or "") if is_shared else None
        return None if size is None else Room(size, True, "a machine (cluster.memory)")
    if is_shared:
        return Room(host_bytes(), True, "this machine")
    sizes = sorted(_gpu_bytes(shutil.which("nvidia-smi")), reverse=True)
    ranks = cluster.procs_per_node
    if len(sizes) < ranks:
        return None
    # whichever of several kinds of GPU the ranks get, one rank has no larger one than this
    return Room(sizes[ranks - 1], False, "a GPU of this machine (nvidia-smi)")


def resolve(config: Config, *, cwd: Path, num_gpus: int | None = None) -> Config:
    """`config` with nothing left open: paths absolute (from `cwd`), the device and the ranks of this machine as found.

    `num_gpus` is counted where it is not given. A Slurm config keeps its cluster group: its nodes are elsewhere.
    """
    return _with_machine(_with_paths(config, cwd), num_gpus)


def _with_machine(config: Config, num_gpus: int | None) -> Config:
    cluster = config.cluster
    if cluster.kind != "local" or (cluster.device != "auto" and cluster.procs_per_node):
        return config
    if cluster.device == "cpu":
        found = 0
    else:
        found = count_gpus() if num_gpus is None else num_gpus
        if cluster.device == "auto" and torch_is_cpu_build():
            found = 0
    device = ("cuda" if found else "cpu") if cluster.device == "auto" else cluster.device
    ranks = cluster.procs_per_node or (found if device == "cuda" else CPU_RANKS)
    return replace(config, cluster=replace(cluster, device=device, procs_per_node=ranks))


def _with_paths(config: Config, cwd: Path) -> Config:
    def absolute(path: str) -> str:
        if not path or locations.is_remote(path):
            return path
        if path.startswith("file://"):
            try:
                path = locations.parse(path).text
            except ValueError:
                return path  # the check of the config says what is wrong with it
        return os.path.normpath(cwd / Path(path).expanduser())

    def sources(entries: list[SourceConfig]) -> list[SourceConfig]:
        return [replace(entry, path=absolute(entry.path)) for entry in entries]

    prepare = config.data.prepare
    prepare = replace(prepare, inputs=[absolute(path) for path in prepare.inputs], out=absolute(prepare.out))
    cache = replace(config.data.cache, dir=absolute(config.data.cache.dir))
    train, valid = sources(config.data.train), sources(config.data.valid)
    data = replace(config.data, train=train, valid=valid, cache=cache, prepare=prepare)
    resume = config.checkpoint.resume
    return replace(
        config,
        run=replace(config.run, dir=absolute(config.run.dir)),
        data=data,
        tokenizer=replace(config.tokenizer, path=absolute(config.tokenizer.path)),
        checkpoint=replace(
            config.checkpoint,
            resume=resume if resume in ("auto", "never") else absolute(resume),
            init_from=absolute(config.checkpoint.init_from),
        ),
    )


def _gpus_of_driver() -> int:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    try:
        listed = _output([tool, "-L"], timeout_s=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


@functools.cache
def _gpu_bytes(tool: str | None) -> tuple[int, ...]:
    """Memory of each GPU, as `tool` (nvidia-smi) says; none where it does not. Not yet run on a GPU."""
    command = [str(tool), "--query-gpu=memory.total", "--format=csv,noheader,nounits"]  # in MiB
    try:
        listed = _output(command, timeout_s=5) if tool else None
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = listed.stdout.splitlines() if listed and not listed.returncode else []
    return tuple(int(line) << 20 for line in lines) if all(line.strip().isdecimal() for line in lines) else ()


def _output(command: Sequence[str], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
