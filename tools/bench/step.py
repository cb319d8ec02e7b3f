"""Speed of a training step, and of the start, against what a user would pick instead. On CPU ranks.

    python tools/bench/step.py                       rounds of all contenders in turn, a table at the end
    python tools/bench/step.py --startup             seconds from the command to the end of the first step, by phase
    python tools/bench/step.py --layouts             ZeRO stages and layouts of ours against ZeRO-1 data parallel
    python tools/bench/step.py contender plain       one contender alone, in this process

All contenders train the same shape (checked by its number of parameters) on the same random tokens in fp32 with AdamW
and clipping, each in fresh processes, on the same number of threads in all. Only what is measured in the same round is
compared: a ratio is the median over the rounds of the ratios within each round, and stands with the lowest and
highest. Nothing else may run on the machine meanwhile.

Contenders are started as their users start them: one rank by `python`, more by torchrun, ours as bigtrain's launcher
does, which also sets glibc's malloc thresholds. `NAME+malloc` is a contender with those same settings, so
that the table shows what is ours and what is malloc. A layout's name (z3-t2-p2-d1, as in tools/layouts.py) is ours
in that layout, on as many ranks as it has.
"""

from __future__ import annotations

import time

STARTED_AT = time.time()  # before the imports below, which are part of a contender's start

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from dataclasses import asdict, dataclass, field, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from common import Clock, Job  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tools.certificate.matrix import Layout  # noqa: E402
from tools.certificate.matrix import parse as parse_layout  # noqa: E402

LINE_UP = ["plain@1", "plain+malloc@1", "trainer@1", "ours@1", "ddp@2", "fsdp2@2"]
LINE_UP += ["trainer-zero3@2", "deepspeed-zero3@2", "deepspeed-zero3+malloc@2", "ours@2"]
TARGETS = (("ours@1", ("plain@1", "trainer@1"), 1.0), ("ours@2", ("trainer-zero3@2", "deepspeed-zero3@2"), 1.1))
"""Ours, of the faster of which others, at least what share in tokens a second."""
LAYOUTS = ["z1-d2", "z0-d2", "z2-d2", "z3-d2", "z1-t2", "z1-t2s", "z3-t2", "z1-p2", "z3-p2", "z3-p2v2"]
LAYOUTS += ["z1-d4", "z0-d4", "z2-d4", "z3-d4", "z1-t2-d2", "z3-t2-d2", "z1-p2-d2", "z3-p2-d2", "z3-p2v2-d2"]
LAYOUTS += ["z3-t2s-p2", "z1-t4", "z1-p4"]
LAYOUT_BATCH_SIZE = 16
"""Sequences a step: two microbatches or more for each of four data ranks."""
LIMIT_S = 600.0


@dataclass
class Line:
    """What one contender did, one entry a round."""

    steps_s: list[float] = field(default_factory=list)
    """Median of the measured steps of a round, seconds."""
    cpu_s: list[float] = field(default_factory=list)
    """The same of rank 0's processor time."""
    phases_s: list[dict[str, float]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)


def main() -> int:
    arguments = parse()
    if arguments.command == "contender":
        return contend(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that run() ends what it started
    names = arguments.only or (LAYOUTS if arguments.layouts else LINE_UP)
    lines: dict[str, Line] = {name: Line() for name in (*names, *([] if arguments.layouts else ["gemm@1"]))}
    for number in range(arguments.rounds):
        for name, line in lines.items():
            print(f"round {number + 1} of {arguments.rounds}: {name}", end="", file=sys.stderr, flush=True)
            result = launch(name, arguments)
            line.phases_s.append(result["phases_s"])
            line.notes.append(result["notes"])
            line.steps_s.append(statistics.median(result["steps_s"][arguments.warmup :] or [0.0]))
            line.cpu_s.append(statistics.median(result["cpu_s"][arguments.warmup :] or [0.0]))
            peak = result["notes"].get("peak_flops")
            found = f"{peak / 1e9:.0f} GFLOP/s" if peak else f"{line.steps_s[-1] * 1e3:.0f} ms a step"
            print(f"  {found}", file=sys.stderr)
    if arguments.layouts:
        print(layouts_table(lines))
    else:
        print(startup_table(lines) if arguments.startup else step_table(lines, Job()))
    if arguments.json:
        report = {name: asdict(line) for name, line in lines.items()}
        arguments.json.write_text(
            json.dumps({"threads": arguments.threads, "lines": report}, indent=1), encoding="utf-8"
        )
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["run", "contender"], default="run")
    parser.add_argument("name", nargs="?", help="of the contender; contenders.py lists them")
    parser.add_argument("--ranks", type=int, default=1, help="contender: processes, as torchrun started them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="measured steps a round")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="over all ranks")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), help=f"some of {','.join(LINE_UP)}, or any NAME@RANKS"
    )
    parser.add_argument("--startup", action="store_true", help="measure the way to the first step instead")
    parser.add_argument("--layouts", action="store_true", help="our ZeRO stages and layouts instead")
    parser.add_argument("--layout", default="", help="contender ours: its layout")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--launched-at", type=float, default=STARTED_AT, help="contender: seconds since the epoch")
    arguments = parser.parse_args()
    if arguments.command == "contender" and not arguments.name:
        parser.error("contender needs a name")
    if arguments.startup:
        arguments.steps, arguments.warmup = 1, 0
    return arguments


def contend(arguments: argparse.Namespace) -> int:
    """One rank of a contender. Rank 0 writes the figures as JSON to `--json` or to stdout."""
    clock = Clock(launched_at=arguments.launched_at)
    clock.mark("interpreter and launcher")
    from contenders import CONTENDERS

    job = Job(ranks=arguments.ranks, num_warmup=arguments.warmup, num_steps=arguments.steps, layout=arguments.layout)
    if job.layout:
        heads = {"num_attention_heads": 8, "num_query_groups": 8}  # a number that tensor 4 divides
        job = replace(job, batch_size=LAYOUT_BATCH_SIZE, model=replace(job.model, **heads))
    CONTENDERS[arguments.name](job, clock)
    if int(os.environ.get("RANK", "0")) == 0:
        text = json.dumps(asdict(clock) | {"name": arguments.name, "parameters": job.num_parameters})
        arguments.json.write_text(text, encoding="utf-8") if arguments.json else print(text)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
    return 0


def launch(label: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs `NAME[+malloc]@RANKS`, or a layout, in fresh processes. Raises SystemExit with its last output where it
    fails."""
    name, _, ranks = label.partition("@")
    name, _, malloc = name.partition("+")
    world = int(ranks or 1)
    layout = ""
    if arguments.layouts:
        name, layout, world = "ours", label, parse_layout(label).world
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [str(Path(__file__)), "contender", name, f"--ranks={world}", f"--json={out}"]
        command += [f"--steps={arguments.steps}", f"--warmup={arguments.warmup}", f"--launched-at={time.time()}"]
        command += [f"--layout={layout}"] if layout else []
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, arguments.threads // world)), "DS_ACCELERATOR": "cpu"}
        if name == "ours":
            code, output = run_as_our_launcher(command, world, environment)
        else:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
            environment |= malloc_settings() if malloc else {}
            code, output = run([[sys.executable, *torchrun, *command]], [environment])
        if code or not out.exists():
            raise SystemExit(f"{label} failed with status {code}; its last output:\n{output[-4000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def run_as_our_launcher(command: list[str], world: int, environment: dict[str, str]) -> tuple[int, str]:
    from bigtrain.launching.environment import Place, free_port, rank_environment

    port = free_port()
    environments = [
        environment | rank_environment(Place(rank, rank, world, world, "127.0.0.1", port), "cpu", environment)
        for rank in range(world)
    ]
    return run([[sys.executable, *command]] * world, environments)


def malloc_settings() -> dict[str, str]:
    """What bigtrain's launcher gives to glibc's malloc."""
    from bigtrain.launching.environment import Place, rank_environment

    ours = rank_environment(Place(0, 0, 1, 1, "127.0.0.1", 0), "cpu", {})
    return {name: value for name, value in ours.items() if name.startswith("MALLOC_")}


def run(commands: list[list[str]], environments: list[dict[str, str]]) -> tuple[int, str]:
    """Runs the commands side by side: the first status that is not 0, and all that they wrote."""
    with tempfile.TemporaryFile() as log:
        processes = [
            subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
            for command, environment in zip(commands, environments, strict=True)
        ]
        try:
            deadline = time.monotonic() + LIMIT_S
            while any(process.poll() is None for process in processes):
                if time.monotonic() > deadline or any(process.poll() for process in processes):
                    break
                time.sleep(0.02)
        finally:
            codes = end(processes)
        log.seek(0)
        return next((code for code in codes if code), 0), log.read().decode(errors="replace")


def end(processes: list[subprocess.Popen[bytes]], grace_s: float = 15.0) -> list[int]:
    """Ends those that still run, first by SIGTERM: torchrun then ends its ranks, which have sessions of their own."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + grace_s
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return [process.wait() for process in processes]


def step_table(lines: dict[str, Line], job: Job) -> str:
    """Tokens a second, share of the peak and of plain PyTorch, and how far ours is from its targets."""
    peak = max(notes["peak_flops"] for notes in lines["gemm@1"].notes)
    rows = [f"{'contender':26}{'ms a step':>22}{'CPU ms':>8}{'tokens/s':>10}{'of peak':>9}   speed of plain@1's"]
    for name, line in lines.items():
        if name == "gemm@1":
            continue
        median = statistics.median(line.steps_s)
        milliseconds = f"{median * 1e3:.0f} ({min(line.steps_s) * 1e3:.0f} to {max(line.steps_s) * 1e3:.0f})"
        cpu = statistics.median(line.cpu_s) * 1e3
        share = job.flops_per_step / median / peak
        plain = lines.get("plain@1")
        ratio = speed_ratio(line, [plain]) if plain else "-"
        rows.append(
            f"{name:26}{milliseconds:>22}{cpu:>8.0f}{job.tokens_per_step / median:>10.0f}{share:>9.1%}   {ratio}"
        )
    rows.append("In brackets the lowest and the highest of the rounds. CPU ms: rank 0's, all its threads.")
    rows.append(f"GEMM peak {peak / 1e9:.0f} GFLOP/s fp32; {job.num_parameters / 1e6:.2f} M parameters; "
                f"{job.batch_size} sequences of {job.sequence_length} tokens a step")  # fmt: skip
    for name, others, target in TARGETS:
        if name in lines and all(other in lines for other in others):
            ratio = speed_ratio(lines[name], [lines[other] for other in others])
            rows.append(f"{name} of the faster of {' and '.join(others)}: {ratio}; wanted: at least {target:.1f}")
    return "\n".join(rows)


def speed_ratio(ours: Line, others: list[Line]) -> str:
    """Median, lowest and highest over the rounds of our speed over the fastest of the others' in the same round."""
    fastest = [min(times) for times in zip(*(line.steps_s for line in others), strict=True)]
    ratios = [other / mine for mine, other in zip(ours.steps_s, fastest, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def layouts_table(lines: dict[str, Line]) -> str:
    """Each layout's speed as a share of ZeRO-1 data parallel on the same number of ranks."""
    rows = [f"{'layout':14}{'ranks':>6}{'ms a step':>24}{'tokens/s':>10}   speed of ZeRO-1 data parallel's"]
    for name, line in lines.items():
        layout = parse_layout(name)
        reference = next(
            (other for key, other in lines.items() if parse_layout(key) == Layout(zero=1, data=layout.world)), None
        )
        median = statistics.median(line.steps_s)
        milliseconds = f"{median * 1e3:.0f} ({min(line.steps_s) * 1e3:.0f} to {max(line.steps_s) * 1e3:.0f})"
        tokens = Job().sequence_length * LAYOUT_BATCH_SIZE / median
        ratio = speed_ratio(line, [reference]) if reference else "-"
        rows.append(f"{layout!s:14}{layout.world:>6}{milliseconds:>24}{tokens:>10.0f}   {ratio}")
    return "\n".join(rows)


def startup_table(lines: dict[str, Line]) -> str:
    """Median seconds of each phase, in the order in which the phases came."""
    rows: list[str] = []
    for name, line in lines.items():
        if name == "gemm@1":
            continue
        totals = [sum(phases.values()) for phases in line.phases_s]
        rows.append(f"{name}: {statistics.median(totals):.1f} s ({min(totals):.1f} to {max(totals):.1f})")
        for phase in line.phases_s[0]:
            rows.append(f"    {statistics.median(phases[phase] for phases in line.phases_s):6.2f}  {phase}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
