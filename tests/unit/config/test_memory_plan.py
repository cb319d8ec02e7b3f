"""A run whose training state is larger than what it would run on is refused, and one that just fits is not."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from bigtrain.config import memory_plan
from bigtrain.config.check import check
from bigtrain.config.cluster import ClusterConfig
from bigtrain.config.cluster_rules import memory_bytes
from bigtrain.config.compose import compose
from bigtrain.config.derive import count_parameters
from bigtrain.config.memory_plan import Room, held_bytes
from bigtrain.config.schema import Config, ParallelConfig, PrecisionConfig

GIB = 2**30


def config_of(
    *, ranks: int = 4, nodes: int = 1, dtype: str = "bf16", device: str = "cuda", kind: str = "slurm", **parallel: Any
) -> Config:
    cluster = ClusterConfig(kind=kind, num_nodes=nodes, procs_per_node=ranks, device=device)
    return dataclasses.replace(
        Config(), cluster=cluster, parallel=ParallelConfig(**parallel), precision=PrecisionConfig(dtype)
    )


TINY = count_parameters(Config().model)
"""A multiple of every number of ranks here."""


def gpu(size_bytes: int) -> Room:
    return Room(size_bytes, False, "a GPU")


@pytest.mark.parametrize(
    ("dtype", "parallel", "bytes_of_four_weights"),
    [
        ("bf16", {"zero_stage": 0}, 8 + 24 + 48),
        ("fp32", {"zero_stage": 0}, 16 + 16 + 48),
        ("bf16", {"zero_stage": 1}, 8 + 24 + 12),
        ("bf16", {"zero_stage": 2}, 8 + 4 + 12),
        ("bf16", {"zero_stage": 3}, 2 + 4 + 12),
        ("bf16", {"zero_stage": 3, "gather": "microbatch"}, 2 + 4 + 12),
        ("bf16", {"zero_stage": 3, "gather": "step"}, 8 + 2 + 4 + 12),
    ],
)
def test_what_four_ranks_hold_is_refused_from_one_byte_less_on(
    dtype: str, parallel: dict[str, Any], bytes_of_four_weights: int
) -> None:
    """Weights that ZeRO-3 gathers count only where they are sure to be kept."""
    config, held = config_of(dtype=dtype, **parallel), TINY // 4 * bytes_of_four_weights
    assert held_bytes(config, is_shared=False) == held
    assert list(memory_plan.problems(config, gpu(held))) == []
    (problem,) = memory_plan.problems(config, gpu(held - 1))
    assert problem.key == "model.name" and f"{dtype}, ZeRO-{parallel['zero_stage']} over 4 data ranks" in str(problem)
    assert list(memory_plan.problems(config, None)) == [], "nobody knows what it has"


def test_ranks_of_a_machine_share_its_memory_and_machines_do_not() -> None:
    """tiny on two stages is not halved evenly: the fullest stage counts where it has a GPU of its own."""
    for nodes, ranks in ((1, 4), (2, 2), (4, 1)):
        config = config_of(ranks=ranks, nodes=nodes, device="cpu", dtype="fp32")
        assert held_bytes(config, is_shared=True) == 20 * TINY // nodes
    config = config_of(device="cpu", dtype="fp32", pipeline=2)
    assert 4 * held_bytes(config, is_shared=False) > held_bytes(config, is_shared=True) == 20 * TINY
    copies = config_of(device="cpu", dtype="fp32", zero_stage=0)
    assert held_bytes(copies, is_shared=True) == 4 * 20 * TINY


def proposed(config: Config, room: Room) -> tuple[str, Config]:
    """The fix, and the config that it makes of this one."""
    (problem,) = memory_plan.problems(config, room)
    changed = config
    for group, key, value in re.findall(r"(\w+)\.(\w+)=(\w+)", problem.fix):
        given = int(value) if value.isdigit() else value
        changed = dataclasses.replace(changed, **{group: dataclasses.replace(getattr(changed, group), **{key: given})})
    if ranks := re.match(r"Start (\d+) ranks", problem.fix):
        cluster = dataclasses.replace(changed.cluster, num_nodes=1, procs_per_node=int(ranks[1]))
        changed = dataclasses.replace(changed, cluster=cluster)
    return problem.fix, changed


@pytest.mark.parametrize(
    ("has", "begin", "keys"),
    [
        (40, {"zero_stage": 0}, "Set parallel.zero_stage=2,"),
        (20, {"zero_stage": 1}, "Set parallel.zero_stage=3,"),
        (20, {"zero_stage": 3, "gather": "step"}, "Set parallel.gather=microbatch,"),
        (20, {"zero_stage": 1, "gather": "step"}, "Set parallel.zero_stage=3 parallel.gather=microbatch,"),
        (24, {"dtype": "fp32", "zero_stage": 1}, "Set parallel.zero_stage=3,"),
        (15, {"kind": "local", "zero_stage": 3}, "Start 6 ranks or more,"),
        (15, {"kind": "local", "zero_stage": 1, "pipeline": 2}, "Start 6 ranks or more with parallel.zero_stage=3,"),
    ],
)
def test_what_is_proposed_fits_with_a_tenth_left(has: int, begin: dict[str, Any], keys: str) -> None:
    """On GPUs of `has` bytes for every four weights."""
    room = gpu(TINY * has // 4)
    fix, changed = proposed(config_of(**begin), room)
    fix, comma, elsewhere = fix.partition("; ")
    assert comma and elsewhere.startswith("where the run is for other machines, set cluster.device_memory_gib")
    assert fix.startswith(keys) and fix.endswith("GiB, or choose a smaller model") != fix.startswith("Start")
    assert held_bytes(changed, is_shared=False) <= 0.9 * room.size_bytes
    if ranks := re.match(r"Start (\d+) ranks", fix):
        fewer = int(ranks[1]) - changed.parallel.tensor * changed.parallel.pipeline
        cluster = dataclasses.replace(changed.cluster, procs_per_node=fewer)
        less = dataclasses.replace(changed, cluster=cluster)
        assert held_bytes(less, is_shared=False) > 0.9 * room.size_bytes, "the smallest number"


def test_more_nodes_where_ranks_share_the_memory_of_theirs() -> None:
    config, room = config_of(device="cpu", zero_stage=1), Room(10 * TINY, True, "a machine")
    fix, changed = proposed(config, room)
    assert fix.startswith("Set cluster.num_nodes=2 parallel.zero_stage=3,")
    assert 0.5 * room.size_bytes < held_bytes(changed, is_shared=True) <= 0.9 * room.size_bytes
    here = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, kind="local"))
    (problem,) = memory_plan.problems(here, room)
    assert problem.fix.startswith("Choose a smaller model; ") and "on this machine" in problem.message


@pytest.mark.parametrize(
    ("batch", "lanes", "begin"),
    [
        (16, 16, "Set cluster.num_nodes=4, which"),
        (48, 48, "Set cluster.num_nodes=3, which"),
        (48, 16, "Set cluster.num_nodes=4, which"),
        (8, 8, "Set cluster.num_nodes=3, which"),
    ],
)
def test_whole_nodes_of_gpus_that_the_batch_divides_over(batch: int, lanes: int, begin: str) -> None:
    """12 ranks take 1.5 bytes a weight in ZeRO-3; 8 take 2.25, which is too much."""
    config = compose([f"train.global_batch_size={batch}", f"data.num_lanes={lanes}", "train.micro_batch_size=1"])
    sound = config_of(zero_stage=3, gather="microbatch")
    config = dataclasses.replace(
        config, cluster=sound.cluster, parallel=sound.parallel, precision=sound.precision, model=sound.model
    )
    assert check(config, 4) == []
    room = gpu(TINY * 2)
    fix, changed = proposed(config, room)
    assert fix.startswith(begin), fix
    assert held_bytes(changed, is_shared=False) <= 0.9 * room.size_bytes
    is_sound = check(changed, changed.cluster.num_nodes * 4) == []
    assert is_sound != ("global_batch_size and data.num_lanes that 12 data ranks divide" in fix)


def test_what_a_tiny_run_takes_is_told_to_the_byte() -> None:
    config = config_of(zero_stage=3)
    held = held_bytes(config, is_shared=False)
    (problem,) = memory_plan.problems(config, gpu(held - 1))
    assert f"({held:,} bytes) on each rank" in str(problem) and f"({held - 1:,} bytes)" in str(problem)


def test_a_dry_run_says_that_the_launch_is_refused() -> None:
    config = config_of(zero_stage=3)
    room = gpu(held_bytes(config, is_shared=False) - 1)
    _, warning = memory_plan.told(config, room)
    assert warning == f"warning: without dry_run this is refused: {next(memory_plan.problems(config, room))}"


def test_the_line_of_the_plan() -> None:
    config = config_of(dtype="fp32", zero_stage=3)
    (line,) = memory_plan.told(config, gpu(10 * TINY))
    when = "before the update, without activations"
    assert re.fullmatch(rf"training state +31\.1 MiB \({5 * TINY:,} bytes\) a rank {when}: 50\.0% of 0\.1 GiB", line)
    (line,) = memory_plan.told(config, None)
    assert line.endswith("what a GPU has is not known: cluster.device_memory_gib")
    assert len(memory_plan.told(config, gpu(int(5 * TINY / 0.89)))) == 1
    line, warning = memory_plan.told(config, gpu(int(5 * TINY / 0.92)))
    assert line.endswith(" GiB") and "92.0% of" in line
    assert (
        warning.startswith("warning: a GPU has ")
        and "alone take 92%; activations come on top. Set cluster.num_nodes=2," in warning
    )


def test_what_a_site_says() -> None:
    assert compose(["+cluster=slurm", "cluster.device_memory_gib=79.6"]).cluster.device_memory_gib == 79.6
    (problem,) = check(compose(["+cluster=slurm", "cluster.device_memory_gib=0"]), 16)
    assert problem.key == "cluster.device_memory_gib" and "must be more than 0" in str(problem)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("480G", 480 * GIB), ("2048", 2 * GIB), ("5M", 5 << 20), ("1T", 1 << 40), ("0", None), ("", None), ("x", None)],
)
def test_memory_as_slurm_has_it(text: str, size_bytes: int | None) -> None:
    assert memory_bytes(text) == size_bytes
