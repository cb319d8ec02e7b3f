"""What is filled in from this machine, and what a rank finds in its environment."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config.schema import (
    CacheConfig,
    CheckpointConfig,
    ClusterConfig,
    Config,
    DataConfig,
    RunConfig,
    SourceConfig,
)
from bigtrain.launching import machine
from bigtrain.launching.environment import Place, free_port, rank_environment
from bigtrain.launching.local import rank_commands

GIB = 2**30


def resolved(cluster: ClusterConfig, num_gpus: int) -> tuple[str, int]:
    config = machine.resolve(Config(cluster=cluster), cwd=Path("/here"), num_gpus=num_gpus)
    return config.cluster.device, config.cluster.procs_per_node


def test_ranks_and_device_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "torch_is_cpu_build", lambda: False)
    assert resolved(ClusterConfig(), 0) == ("cpu", 4)
    assert resolved(ClusterConfig(), 8) == ("cuda", 8)
    assert resolved(ClusterConfig(device="cpu"), 8) == ("cpu", 4)
    assert resolved(ClusterConfig(procs_per_node=2), 8) == ("cuda", 2)
    assert resolved(ClusterConfig(kind="slurm"), 8) == ("auto", 0)
    monkeypatch.setattr(machine, "torch_is_cpu_build", lambda: True)
    assert resolved(ClusterConfig(), 8) == ("cpu", 4)


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 4), ("", 0), ("-1", 0), ("1,3", 2), ("0,9,1", 1), ("GPU-aa,MIG-bb", 2), ("0, 1", 2)]
)
def test_gpus_that_are_visible(
    visible: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: NVIDIA H100 (UUID: GPU-$i)"; done\n', encoding="utf-8"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert machine.count_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


def room_of(**cluster: Any) -> tuple[int, bool, str] | None:
    found = machine.room(Config(cluster=ClusterConfig(**cluster)))
    return found and (found.size_bytes, found.is_shared, found.of)


@pytest.mark.parametrize(
    ("says", "ranks", "gib"),
    [
        ("echo 81920; echo 24576; echo 81920", 1, 80),
        ("echo 81920; echo 24576; echo 81920", 2, 80),
        ("echo 81920; echo 24576; echo 81920", 3, 24),
        ("echo 81920", 2, None),
        ("echo 81920; echo '[N/A]'", 1, None),
        ("echo 81920; exit 9", 1, None),
        (r"printf '81920\n\377\n'", 1, None),
        (r"printf '81920\n\302\262\n'", 1, None),  # a raised 2
        ("", 1, None),
    ],
)
def test_memory_of_the_smallest_gpu_that_a_rank_must_take(
    says: str, ranks: int, gib: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of nvidia-smi's answer, in MiB. A stand-in for it: not yet run on a GPU."""
    tool = tmp_path / "nvidia-smi"
    asked = '"$*" = "--query-gpu=memory.total --format=csv,noheader,nounits"'
    tool.write_text(f"#!/bin/sh\n[ {asked} ] || exit 3\n{says}\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = room_of(device="cuda", procs_per_node=ranks)
    assert found == (gib and (gib * GIB, False, "a GPU of this machine (nvidia-smi)"))


def test_memory_that_a_setting_or_this_machine_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert room_of(device="cuda", procs_per_node=1) is None
    assert room_of(device="cuda", device_memory_gib=0.5) == (GIB // 2, False, "a GPU (cluster.device_memory_gib)")
    assert room_of(device="cpu", device_memory_gib=7) == (7 * GIB, True, "a machine (cluster.device_memory_gib)")
    monkeypatch.setattr(machine, "host_bytes", lambda: 5)
    assert room_of(device="cpu", procs_per_node=4) == (5, True, "this machine")
    slurm: dict[str, Any] = {"kind": "slurm", "procs_per_node": 8}
    assert room_of(**slurm, device="cpu", memory="480G") == (480 * GIB, True, "a machine (cluster.memory)")
    for unknown in ({"device": "cpu"}, {"device": "cpu", "memory": "0"}, {"device": "cuda", "memory": "480G"}):
        assert room_of(**slurm, **unknown) is None


def test_paths_are_absolute_from_where_the_command_was_given() -> None:
    paths = ["x/../y", "/z", "file:///my%20text", "s3://bucket/z", "https://h/../z", "pipe:cat z/{file}", "file://no"]
    config = Config(
        run=RunConfig(dir="runs/a"),
        data=DataConfig(train=[SourceConfig(path) for path in paths], cache=CacheConfig("cache")),
        checkpoint=CheckpointConfig(resume="auto"),
    )
    config = machine.resolve(config, cwd=Path("/here"), num_gpus=0)
    assert config.run.dir == "/here/runs/a"
    assert [source.path for source in config.data.train] == ["/here/y", "/z", "/my text", *paths[3:]]
    assert config.data.cache.dir == "/here/cache"
    assert config.tokenizer.path == "" and config.checkpoint.resume == "auto"


def test_environment_of_a_rank() -> None:
    place = Place(rank=5, local_rank=1, world=8, local_world=4, address="node7", port=1234)
    found = rank_environment(place, "cpu", {"PATH": "/bin"})
    assert {name: found[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
    }
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("node7", "1234")
    assert int(found["OMP_NUM_THREADS"]) == max(1, machine.num_cores() // 4)
    assert "PATH" not in found
    assert rank_environment(place, "cpu", {"SLURM_CPUS_PER_TASK": "8"})["OMP_NUM_THREADS"] == "8"
    assert int(found["MALLOC_MMAP_THRESHOLD_"]) >= 32 << 20
    assert "MALLOC_MMAP_THRESHOLD_" not in rank_environment(place, "cuda", {})


def test_what_the_user_has_set_stays() -> None:
    place = Place(0, 0, 1, 1, "127.0.0.1", 1)
    user = {"OMP_NUM_THREADS": "7", "MALLOC_TRIM_THRESHOLD_": "1"}
    assert not set(user).intersection(rank_environment(place, "cpu", user))


def test_free_port_can_be_listened_on() -> None:
    with socket.create_server(("", free_port())):
        pass


def test_every_rank_is_the_same_command_with_its_own_place() -> None:
    config = Config(run=RunConfig(dir="/here/run"), cluster=ClusterConfig(procs_per_node=3, device="cpu"))
    commands = rank_commands(config)
    assert {tuple(command.arguments) for command in commands} == {(sys.executable, "-m", "bigtrain.train", "/here/run")}
    assert [command.environment["RANK"] for command in commands] == ["0", "1", "2"]
    assert len({command.environment["MASTER_PORT"] for command in commands}) == 1
    assert [command.log for command in commands] == [None, *(Path(f"/here/run/logs/rank-{n}.log") for n in (1, 2))]
