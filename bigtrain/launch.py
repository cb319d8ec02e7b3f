"""``python -m bigtrain.launch``: compose the config, check it, freeze it, start the ranks. ``--help`` teaches it.

Everything up to the start answers in a second on a login node: no torch here.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bigtrain import config as configs
from bigtrain.config import memory_plan
from bigtrain.config.check import Problem, check
from bigtrain.config.compose import as_hydra_takes, compose, conf_dir
from bigtrain.config.derive import world_size
from bigtrain.config.errors import UserError
from bigtrain.config.help import help_text, keys_text
from bigtrain.config.schema import Config
from bigtrain.config.status import COME_BACK, STOPPED
from bigtrain.config.sweep import points
from bigtrain.config.vendors import check_versions
from bigtrain.launching import attempts, init_from, local, machine, outcome, slurm, sweep
from bigtrain.launching.code_copy import CODE, copy_code
from bigtrain.launching.lock import only_launch
from bigtrain.launching.plan import numbers, plan, prepare_command
from bigtrain.launching.preflight import preflight
from bigtrain.launching.slurm_script import Batch
from bigtrain.launching.sweep import Sweep
from bigtrain.telemetry.streams import tolerant_output

ENDS_SWEEP = (COME_BACK, STOPPED, *(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)))
"""Statuses of a run that was told to stop: the next one would be in the way of whoever said so."""


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    overrides: list[str]
    config_dirs: list[Path]
    help: bool
    keys: bool
    freeze: bool
    """Stop before the ranks: another launcher starts them."""
    multirun: bool
    """A sweep: a run for each combination of values."""
    for_hydra: bool
    """Hydra answers: --cfg, --info and its like."""
    resolved: bool
    """--cfg job --resolve: Hydra cannot, the sources in data.train are read-only for it."""

    @property
    def settings(self) -> list[str]:
        """What a command takes over that is to be like this one."""
        return [*(f"--config-dir={folder}" for folder in self.config_dirs), *self.overrides]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for what the user can fix, 130 for Ctrl-C, 75 where SIGUSR2 stopped the run, 77
    where a rank alone was told to stop, else that of the rank that failed first."""
    began = time.monotonic()
    with tolerant_output():  # a run does not end because nobody watches any more
        return _main(list(sys.argv[1:] if argv is None else argv), began)


def _main(argv: list[str], began: float) -> int:
    try:
        arguments = parse(argv)
        if arguments.help:
            print(help_text(arguments.config_dirs))
            return 0
        if arguments.keys:
            print(keys_text())
            return 0
        if arguments.multirun:
            return launch_sweep(arguments)
        config = compose(arguments.overrides, arguments.config_dirs)
        if arguments.resolved:
            print(configs.to_yaml(config).rstrip())
            return 0
        if arguments.for_hydra:
            return _ask_hydra(argv, arguments.overrides)
        return launch(init_from.settled(_resolved(config)), arguments, began=began)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _resolved(config: Config) -> Config:
    return machine.resolve(config, cwd=Path.cwd())


def launch(config: Config, arguments: Arguments, *, began: float) -> int:
    """Check, freeze and run a resolved config, or only make it ready to run (--freeze); returns the exit status.

    `began`: when the command was given, of time.monotonic."""
    check_versions()
    _refuse(_problems(config))
    if config.dry_run:
        print(plan(config))
        return 0
    if arguments.freeze or not outcome.already_finished(config, arguments.settings):
        _refuse(_memory(config))
    if config.cluster.kind == "slurm" and not arguments.freeze:
        slurm.require(Batch.of_run(config))
    slurm.refuse_live_job(config)
    with only_launch(Path(config.run.dir)):
        finished = outcome.already_finished(config, arguments.settings)
        if finished and not arguments.freeze:
            print("\n".join([*outcome.damage(Path(config.run.dir)), *finished]))
            return 0
        print("".join(f"{line}\n" for line in outcome.damage(Path(config.run.dir))), end="", flush=True)
        _freeze(config)
        if arguments.freeze or config.cluster.kind == "slurm":
            copy_code(Path(config.run.dir) / CODE)
        status = _prepare(config)
        return status if status or arguments.freeze else _start(config, arguments.settings, began)


def launch_sweep(arguments: Arguments) -> int:
    """The runs of --multirun: one job array on Slurm, one after the other here. All are checked before the first
    starts. Returns the exit status: that of the first run that fails, though the others run."""
    check_versions()
    asked = Sweep.of(
        points(arguments.overrides, arguments.config_dirs),
        lambda overrides: _resolved(compose(overrides, arguments.config_dirs)),
    )
    config, is_slurm = asked.first, asked.first.cluster.kind == "slurm"
    _refuse([*sweep.problems(asked), *(problem for run in asked.runs for problem in _problems(run.config))])
    if not config.dry_run:
        _refuse([problem for run in asked.runs for problem in _memory(run.config)])
    if config.dry_run:
        print(f"{sweep.table(asked)}\n\nthe first of them:\n\n{plan(config, asked.batch)}")
        return 0
    if is_slurm and not arguments.freeze:
        slurm.require(asked.batch)
    queue = slurm.queue(config)
    found, done = sweep.open_runs(asked, queue)
    print("".join(f"{line}\n" for line in done), end="")
    if not found.runs:
        return 0
    with ExitStack() as locks:
        for run in found.runs:
            locks.enter_context(only_launch(run.run_dir))
            _freeze(run.config)
        if arguments.freeze or is_slurm:
            sweep.copy_code_of_array(found, queue)
        for one in sweep.with_data_of_their_own(found):
            if status := _prepare(one):
                return status
        if arguments.freeze:
            print(f"\n{sweep.table(found)}")
            return 0
        if is_slurm:
            print(sweep.submitted(found, slurm.submit(found.batch)))
            return 0
        return _one_by_one(found)


def _one_by_one(found: Sweep) -> int:
    print(f"\n{sweep.table(found)}", flush=True)
    first_failure = 0
    for place, run in enumerate(found.runs):
        print(f"\nrun {place} of {len(found.runs)}: {run.config.run.name}", flush=True)
        began = time.monotonic()
        ended = attempts.run(run.config)
        if ended.status in ENDS_SWEEP or ended.was_warned:
            return ended.status
        first_failure = first_failure or ended.status
        print("\n".join(outcome.summary(run.run_dir, took_s=time.monotonic() - began)), flush=True)
    print(f"\nall in one report:\n  python tools/report.py {outcome.short(found.folder)}/*")
    return first_failure


def _problems(config: Config) -> list[Problem]:
    prepared = not config.data.prepare.inputs
    return [*check(config, world_size(config)), *preflight(config, prepared=prepared)]


def _memory(config: Config) -> list[Problem]:
    """Of a config with no `_problems`: the formula wants a sound layout."""
    return list(memory_plan.problems(config, machine.room(config)))


def _freeze(config: Config) -> None:
    init_from.copy_tokenizer(config)
    configs.save(config, config.run.dir)


def _prepare(config: Config) -> int:
    print(f"run {config.run.name}\n" + "\n".join(numbers(config)), flush=True)
    status = local.run([prepare_command(config)])
    if not status:
        _refuse(preflight(config, prepared=True))
    return status


def _start(config: Config, settings: Sequence[str], began: float) -> int:
    if config.cluster.kind == "slurm":
        (job,) = slurm.submit(Batch.of_run(config))
        print(slurm.told(config, job))
        return 0
    return attempts.train(config) or _finish(config, settings, began)


def _finish(config: Config, settings: Sequence[str], began: float) -> int:
    run_dir = Path(config.run.dir)
    checkpoint = outcome.newest_checkpoint(run_dir)
    print("\n".join(["", *outcome.summary(run_dir, took_s=time.monotonic() - began)]), flush=True)
    if checkpoint is not None:
        print(f"{'checkpoint':<14} {outcome.short(checkpoint)}\n\nthe model writes:", flush=True)
        if status := local.run([outcome.generate_command(config, checkpoint)]):
            return status
    print("\n".join(["", *outcome.next_steps(config, checkpoint, settings)]))
    return 0


def _refuse(problems: Sequence[Problem]) -> None:
    if problems:  # the runs of a sweep have many in common
        raise UserError("\nerror: ".join(dict.fromkeys(str(problem) for problem in problems)))


def parse(argv: Sequence[str]) -> Arguments:
    """Raises UserError for a flag that does not exist."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--keys", action="store_true")
    parser.add_argument("--freeze", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=Path, action="append", default=[])
    for flag, short in (("--cfg", "-c"), ("--package", "-p")):
        parser.add_argument(flag, short)
    parser.add_argument("--info", "-i", nargs="?", const="all")
    for flag in ("--resolve", "--hydra-help"):
        parser.add_argument(flag, action="store_true")
    found = parser.parse_intermixed_args(argv)
    if (found.package and not found.cfg) or (found.resolve and (found.cfg != "job" or found.package)):
        raise UserError("--resolve and --package go with --cfg job, one at a time.")
    for folder in found.config_dir:
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder}: no such folder")
    for_hydra = bool(found.cfg or found.info or found.hydra_help)
    if found.multirun and for_hydra:
        raise UserError("--multirun starts runs: it goes with neither --cfg nor --info.")
    return Arguments(
        found.overrides,
        found.config_dir,
        found.help,
        found.keys,
        found.freeze,
        found.multirun,
        for_hydra,
        found.resolve,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `python -m bigtrain.launch --help` shows what there is.")


def _ask_hydra(argv: Sequence[str], overrides: Sequence[str]) -> int:
    """Let Hydra answer its own flags; the config has been composed once, so it finds nothing wrong."""
    import hydra

    flags = list(argv)
    for override in overrides:  # Hydra wants them together, behind its flags
        flags.remove(override)

    def nothing(_: object) -> None:
        return None

    before, sys.argv[1:] = sys.argv[1:], [*flags, *map(as_hydra_takes, overrides)]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(nothing)()
    finally:
        sys.argv[1:] = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
