"""What a dry run prints: the layout, the derived numbers, and what would start."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from bigtrain.config import epochs, locations, memory_plan
from bigtrain.config.derive import derive, describe, num_steps, tokens_per_step, world_size
from bigtrain.config.schema import Config
from bigtrain.launching import init_from, machine
from bigtrain.launching.local import Command, rank_commands
from bigtrain.launching.preflight import totals_of
from bigtrain.launching.slurm_script import Batch, sbatch_script

SHOWN_RANKS = 8


def prepare_command(config: Config) -> Command:
    """Make the tokenizer and the shards that data.prepare asks for, where they are not there yet, and open the data."""
    return Command("data preparation", [sys.executable, "-m", "bigtrain.data.prepare", config.run.dir])


def plan(config: Config, batch: Batch | None = None) -> str:
    """The text of a dry run of a config that is resolved and sound. `batch`: the sweep that it belongs to."""
    lines = [
        f"run {config.run.name}: model {config.model.name}, {config.precision.dtype}, "
        f"ZeRO-{config.parallel.zero_stage}, on {config.cluster.device}",
        f"{'run folder':<20} {config.run.dir}",
        *([f"{'weights from':<20} {config.checkpoint.init_from}"] if init_from.is_used(config) else []),
        *numbers(config),
        *_epochs(config),
        "",
    ]
    if config.data.prepare.inputs:
        lines += [
            "would first prepare the data, where it is not there yet:",
            "  " + _shown(prepare_command(config)),
            "",
        ]
    if config.cluster.kind == "slurm":
        lines += ["would submit this script with sbatch:", "", sbatch_script(batch or Batch.of_run(config)).rstrip()]
    else:
        lines += _local(rank_commands(config, port=0))
    return "\n".join([*lines, "", "dry run: nothing was started or written."])


def numbers(config: Config) -> list[str]:
    """Every number that follows from a config that is resolved and sound, a line each, and the memory plan."""
    return [*describe(derive(config, world_size(config))), *memory_plan.told(config, machine.room(config))]


def _epochs(config: Config) -> list[str]:
    """How often the run goes through its sources, where all of them are on this file system and built."""
    paths = [source.path for source in config.data.train]
    sizes = [0 if locations.is_remote(path) else totals_of(path).get("num_tokens", 0) for path in paths]
    if not all(sizes):
        return []
    counts = epochs.planned(config.data.train, sizes, num_steps(config.train) * tokens_per_step(config.train))
    of_paths = dict(zip(paths, counts, strict=True))
    return [f"{'epochs':<20} {epochs.told(of_paths)}", *epochs.warnings(of_paths)]


def _local(commands: Sequence[Command]) -> list[str]:
    shared = dict.fromkeys(commands[0].environment.items())
    for command in commands:
        shared = {item: None for item in shared if item in command.environment.items()}
    lines = [f"would start {len(commands)} ranks on this machine, with"]
    lines += [f"  {name}={_value(name, value)}" for name, value in shared]
    for command in commands[:SHOWN_RANKS]:
        own = [f"{name}={value}" for name, value in command.environment.items() if (name, value) not in shared]
        output = f"  > {shlex.quote(str(command.log))}" if command.log is not None else ""
        lines.append(f"  {' '.join(own)} {_shown(command)}{output}")
    if len(commands) > SHOWN_RANKS:
        lines.append(f"  and {len(commands) - SHOWN_RANKS} more alike")
    return lines


def _value(name: str, value: str) -> str:
    if name == "MASTER_PORT":
        return "(a free port)"
    if name == "PATH":
        return value.replace(os.environ.get("PATH", "") or "\0", "$PATH")
    return shlex.quote(value)


def _shown(command: Command) -> str:
    return shlex.join(command.arguments)
