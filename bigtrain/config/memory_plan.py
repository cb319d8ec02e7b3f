"""The memory plan: the training state that a device surely holds, against what it has.

Weights, gradients and optimizer state by the formula of docs/memory.md. Activations are not in it, so a run that passes
may still be too large; one that does not pass is. Pure: `launching/machine.py` finds what the devices have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bigtrain.config.check import check
from bigtrain.config.derive import state_bytes, with_unit, world_size
from bigtrain.config.problem import Problem
from bigtrain.config.schema import Config

TIGHT = 0.9
"""Share of a device above which the training state alone is worth a warning. What is proposed stays below it."""
ELSEWHERE = "where the run is for other machines, set cluster.device_memory_gib to what theirs have"
MOST = 4096
"""Ranks or nodes up to which a larger run is looked for that fits."""


@dataclass(frozen=True)
class Room:
    """What a device has."""

    size_bytes: int
    is_shared: bool
    """By all ranks of a machine, as its main memory is. A GPU is one rank's."""
    of: str
    """Whose memory it is, and in brackets who says so, where that is a setting or a program."""


def held_bytes(config: Config, *, is_shared: bool, data: int | None = None) -> int:
    """Bytes that a device surely holds at the end of a step's accumulation, before the update: the GPU of a rank on the
    fullest stage; where ranks share, a machine on average, so that one holds no less. `data`: data ranks, other than
    the config's own."""
    parallel = config.parallel
    data = data or world_size(config) // (parallel.tensor * parallel.pipeline)
    keeps_gathered = parallel.gather == "step"  # with auto it may
    held = [
        stage.weights + stage.gradients + stage.optimizer + keeps_gathered * stage.gathered
        for stage in state_bytes(config, data)
    ]
    return sum(held) * parallel.tensor * data // config.cluster.num_nodes if is_shared else max(held)


def problems(config: Config, room: Room | None) -> Iterator[Problem]:
    """A run that cannot fit. `config`: one that `check` finds nothing wrong with. `room`: None where nobody knows."""
    if room is None or (held := held_bytes(config, is_shared=room.is_shared)) <= room.size_bytes:
        return
    parallel = config.parallel
    layout = f"{config.precision.dtype}, ZeRO-{parallel.zero_stage} over {_data(config)} data ranks"
    machine = "this machine" if config.cluster.kind == "local" else "each machine"
    where = machine if room.is_shared else "each rank"
    message = (
        f"its weights, gradients and optimizer state take {with_unit(held)} on {where} ({layout}), activations not "
        f"counted, and {room.of} has {with_unit(room.size_bytes)}"
    )
    yield Problem("model.name", config.model.name, message, f"{_fix(config, room)}; {ELSEWHERE}")


def told(config: Config, room: Room | None) -> list[str]:
    """The line of the plan, and a warning where it does not fit or little is left for activations."""
    is_shared = config.cluster.device == "cpu" if room is None else room.is_shared
    held = held_bytes(config, is_shared=is_shared)
    line = f"{'training state':<20} {with_unit(held)} {'a machine' if is_shared else 'a rank'} before the update, "
    if room is None:
        device = "node" if is_shared else "GPU"
        return [f"{line}without activations; what a {device} has is not known: cluster.device_memory_gib"]
    share, size = held / room.size_bytes, _gib(room.size_bytes)
    lines = [f"{line}without activations: {share:.1%} of {size}"]
    if refused := next(problems(config, room), None):
        lines.append(f"warning: without dry_run this is refused: {refused}")
    elif share > TIGHT:
        lines.append(
            f"warning: {room.of} has {size}, of which weights, gradients and optimizer state alone take {share:.0%}; "
            f"activations come on top. {_fix(config, room)}."
        )
    return lines


def _fix(config: Config, room: Room) -> str:
    """What makes it fit with a tenth left, as the formula says: other settings, else more ranks or nodes."""
    most, smaller = int(TIGHT * room.size_bytes), "choose a smaller model"
    for settings, leaner in _leaner(config):
        if (held := held_bytes(leaner, is_shared=room.is_shared)) <= most:
            return f"Set {' '.join(settings)}, which takes {_gib(held)}, or {smaller}"
    return next((f"{way}, or {smaller}" for way in _larger(config, room, most)), smaller.capitalize())


def _leaner(config: Config) -> Iterator[tuple[list[str], Config]]:
    """Settings that take less on the same ranks, those first that change least. They change no number of the run:
    bf16 is not among them, and takes 18 bytes a weight where fp32 takes 20."""
    parallel = config.parallel
    changes: list[dict[str, Any]] = [{"zero_stage": stage} for stage in range(parallel.zero_stage + 1, 4)]
    if parallel.gather == "step":
        changes.append({**(changes[-1] if changes else {}), "gather": "microbatch"})
    for change in changes:
        named = {f"parallel.{key}": value for key, value in change.items()}
        yield _written(named), replace(config, parallel=replace(parallel, **change))


def _larger(config: Config, room: Room, most: int) -> Iterator[str]:
    """The smallest larger run of this model that fits."""
    parallel, cluster = config.parallel, config.cluster
    changed = {"zero_stage": 3, **({"gather": "microbatch"} if parallel.gather == "step" else {})}
    named = {f"parallel.{key}": value for key, value in changed.items() if getattr(parallel, key) != value}
    lean, group = replace(config, parallel=replace(parallel, **changed)), parallel.tensor * parallel.pipeline
    if cluster.kind == "slurm":
        yield from _more_nodes(lean, named, room, most)
    elif not room.is_shared:
        for data in range(_data(config) + 1, MOST // group + 1):
            if (held := held_bytes(lean, is_shared=False, data=data)) <= most:
                also = f" with {' '.join(_written(named))}" if named else ""
                yield f"Start {data * group} ranks or more{also}, which takes {_gib(held)} on each"
                return


def _more_nodes(lean: Config, named: dict[str, Any], room: Room, most: int) -> Iterator[str]:
    """The smallest number of whole nodes on which `lean` fits and is sound; where none is, the smallest on which it
    fits. `named`: what makes it lean."""
    cluster, group = lean.cluster, lean.parallel.tensor * lean.parallel.pipeline
    each, smallest = "machine" if room.is_shared else "rank", ""
    for nodes in range(cluster.num_nodes + 1, MOST // cluster.procs_per_node + 1):
        larger = replace(lean, cluster=replace(cluster, num_nodes=nodes))
        if world_size(larger) % group or (held := held_bytes(larger, is_shared=room.is_shared)) > most:
            continue
        settings = " ".join(_written({"cluster.num_nodes": nodes, **named}))
        fix = f"Set {settings}, which takes {_gib(held)} on each {each}"
        if not check(larger, world_size(larger)):
            yield fix
            return
        whole = f"with a train.global_batch_size and data.num_lanes that {_data(larger)} data ranks divide"
        smallest = smallest or f"{fix}, {whole}"
    if smallest:
        yield smallest


def _written(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def _data(config: Config) -> int:
    return world_size(config) // (config.parallel.tensor * config.parallel.pipeline)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.1f} GiB"
