"""What our own Python costs in a training step: a run of `python -m bigtrain.launch` with a profiler on rank 0.

    python tools/bench/glue.py                                 the defaults of this machine, model=tiny
    python tools/bench/glue.py parallel.pipeline=2 cluster.procs_per_node=4     any settings of the launcher

Glue is everything of bigtrain in a step but the model's own arithmetic: engine, hooks, patches to the vendors, data,
loop, records. Its time is what its functions take themselves, and what they call, up to the work itself: Megatron's
schedule, DeepSpeed's forward and step, and autograd. Collectives stand apart: most of their time is the wait for the
other ranks. The profiler slows Python down, so the share is an upper bound.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bigtrain

GLUE = ("engine", "distributed", "trainer", "data", "telemetry", "optim")
"""Folders of bigtrain/ that are not the model's arithmetic."""
WORK = ("forward_backward_", "_call_impl", "_wrapped_call_impl", "run_backward", "backward", "step")
"""Beginnings of the names of functions that are work when glue calls them."""
COLLECTIVES = ("_reduce_scatter", "_all_gather", "wait", "all_reduce", "_Works")
"""Our functions that are collectives, and what else is one: all of torch.distributed."""
SHOWN = 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="profiled")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--rank", type=Path, metavar="RUN", help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of python -m bigtrain.launch")
    arguments = parser.parse_args()
    if arguments.rank:
        return profiled_rank(arguments.rank, arguments.warmup, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        return profile_run(Path(folder), arguments)


def profile_run(folder: Path, arguments: argparse.Namespace) -> int:
    from bigtrain.config.frozen import load
    from bigtrain.launching import local

    steps = arguments.warmup + arguments.steps + 1  # the last one ends with an evaluation and a save
    settings = [
        *arguments.settings,
        f"run.dir={folder}/run",
        "tracker=none",
        "eval.interval=0",
        "checkpoint.interval=0",
    ]
    settings += [f"train.num_steps={steps}", "checkpoint.resume=never"]
    launch = [sys.executable, "-m", "bigtrain.launch", "--freeze", *settings]
    if status := subprocess.run(launch).returncode:
        return status
    first, *others = local.rank_commands(load(folder / "run"))
    command = [sys.executable, __file__, f"--rank={folder}/run"]
    command += [f"--warmup={arguments.warmup}", f"--steps={arguments.steps}"]
    if status := local.run([replace(first, arguments=command), *others]):
        return status
    print(table(pstats.Stats(str(folder / "run" / "profile")), arguments.steps))
    return 0


def profiled_rank(run_dir: Path, warmup: int, steps: int) -> int:
    """Rank 0: bigtrain.train with the profiler on while `steps` steps run behind `warmup` others."""
    from bigtrain import train
    from bigtrain.trainer import loop

    profiler = cProfile.Profile()
    original = loop.timed

    def timed(batches: Iterable[Any]) -> Iterator[Any]:
        for done, item in enumerate(original(batches)):
            if done == warmup:
                profiler.enable()
            if done == warmup + steps:
                profiler.disable()
                profiler.dump_stats(run_dir / "profile")
            yield item

    loop.timed = timed
    return train.main([str(run_dir)])


def table(stats: pstats.Stats, steps: int) -> str:
    entries: dict[Any, Any] = stats.stats  # type: ignore[attr-defined]
    total = stats.total_tt  # type: ignore[attr-defined]
    glue: Counter[str] = Counter()
    collectives: Counter[str] = Counter()
    for function, (_, _, own, _, callers) in entries.items():
        if is_glue(function):
            (collectives if is_collective(function) else glue)[label(function)] += own
        elif not (function[2].startswith(WORK) or is_model(function)):
            for caller, (_, _, _, with_callees) in callers.items():
                if is_glue(caller):
                    apart = is_collective(function) or is_collective(caller)
                    (collectives if apart else glue)[label(caller)] += with_callees
    rows = [f"a step takes {total / steps * 1e3:.1f} ms under the profiler; of them ours, in ms:"]
    rows += [f"{spent / steps * 1e3:8.2f}  {name}" for name, spent in glue.most_common(SHOWN)]
    rows.append(f"{glue.total() / steps * 1e3:8.2f}  all of it: {glue.total() / total:.2%} of a step")
    rows.append(f"{collectives.total() / steps * 1e3:8.2f}  in collectives that ours call: waits, mostly")
    return "\n".join(rows)


HOME = Path(bigtrain.__file__).parent


def is_glue(function: tuple[str, int, str]) -> bool:
    path = Path(function[0])
    return path.is_relative_to(HOME) and path.relative_to(HOME).parts[0] in GLUE


def is_model(function: tuple[str, int, str]) -> bool:
    return Path(function[0]).is_relative_to(HOME / "model")


def is_collective(function: tuple[str, int, str]) -> bool:
    path, _, name = function
    return "torch/distributed" in path or (is_glue(function) and name in COLLECTIVES) or "ProcessGroup" in name


def label(function: tuple[str, int, str]) -> str:
    path, line, name = function
    return f"{Path(path).relative_to(HOME)}:{line} {name}"


if __name__ == "__main__":
    sys.exit(main())
