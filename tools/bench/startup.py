"""Seconds from the command to the end of the first training step, and of the start, where they go.

    python tools/bench/startup.py                one and two ranks, five rounds
    python tools/bench/startup.py --ranks 2 --rounds 3

ours  `python -m bigtrain.launch` as a user types it, until the line of step 1 stands in metrics.jsonl. Its data are
      prepared before. The console tells how long each phase took; what is left are two interpreters, the launcher's
      checks, and what is not a phase.
bare  startup_bare.py, by torchrun where there are more ranks than one: it imports the same packages (every module of
      others that a rank of ours has loaded, in the same order), joins the ranks over gloo, and trains the first step
      of the same model, batch and optimizer, written by hand in plain PyTorch.

Each runs in fresh processes, in turn. A ratio is of the same round: their median, and the lowest and highest. Nothing
else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from bigtrain.config.frozen import load

WANTED = 1.3
LIMIT_S = 300.0
SETTINGS = ["model=tiny", "tracker=none", "eval.interval=0", "checkpoint.interval=0", "cluster.device=cpu"]
OF_TRAIN = ("global_batch_size", "micro_batch_size", "sequence_length", "grad_clip")
LAST_OF_BARE = "model and first step"
LISTING = """
import json, os, sys
from bigtrain.telemetry.recorder import Recorder
from bigtrain.train import main
def listed(*arguments, **options):
    names = [name for name in sys.modules if name.partition(".")[0] not in ("bigtrain", "__main__", "__mp_main__")]
    with open(sys.argv[2], "w") as file:
        json.dump(names, file)
    os._exit(0)
Recorder.train = listed
main(sys.argv[1:2])
"""


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as name:
        folder = Path(name)
        job = folder / "job.json"
        write_job(folder, job)
        for ranks in options.ranks:
            rounds = [measure(folder, job, ranks, number) for number in range(options.rounds)]
            print(table(ranks, rounds), flush=True)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def command(folder: Path, name: str, ranks: int, *more: str) -> list[str]:
    placed = [f"run.dir={folder / name}", f"cluster.procs_per_node={ranks}"]
    return [sys.executable, "-m", "bigtrain.launch", *SETTINGS, *placed, *more]


def write_job(folder: Path, job: Path) -> None:
    """The data are prepared, and `job` gets what startup_bare.py takes: the modules of others that a rank has loaded by
    the end of step 1, the model and the batch."""
    modules = folder / "modules.json"
    subprocess.run(command(folder, "listing", 1, "--freeze"), cwd=folder, check=True, stdout=subprocess.DEVNULL)
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    arguments = [sys.executable, "-c", LISTING, str(folder / "listing"), str(modules)]
    subprocess.run(arguments, cwd=folder, env=os.environ | place, stdout=subprocess.DEVNULL)
    if not modules.exists():
        raise SystemExit("error: no step was trained to list what it imports")
    config = load(folder / "listing")
    asked = {
        "modules": json.loads(modules.read_text(encoding="utf-8")),
        "model": asdict(config.model),
        "lr": config.optim.lr,
        **{name: getattr(config.train, name) for name in OF_TRAIN},
    }
    job.write_text(json.dumps(asked), encoding="utf-8")


def measure(folder: Path, job: Path, ranks: int, number: int) -> dict[str, float]:
    """Seconds of one round: `bare` and `ours`, with the phases of each by name."""
    bare, bare_phases = bare_s(folder, job, ranks)
    total, phases = ours_s(folder, f"run-{ranks}-{number}", ranks)
    print(f"{ranks} ranks, round {number + 1}: bare {bare:.2f} s, ours {total:.2f} s", file=sys.stderr)
    return {"bare": bare, **{f"bare: {name}": took for name, took in bare_phases.items()}, "ours": total, **phases}


def bare_s(folder: Path, job: Path, ranks: int) -> tuple[float, dict[str, float]]:
    """Seconds until all ranks have done the first step, and of each phase on the slowest rank."""
    done = folder / "done"
    done.unlink(missing_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    began = time.time()
    process = subprocess.Popen(
        [sys.executable, *torchrun, str(Path(__file__).with_name("startup_bare.py")), str(job), str(done)],
        env=os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(process, lambda: done.exists() and done.read_text().count(LAST_OF_BARE) == ranks, "the bare script")
    process.wait()
    ended: dict[str, float] = {}  # of each phase, on the last rank to get there
    for line in done.read_text(encoding="utf-8").splitlines():
        mark = json.loads(line)
        ended[mark["phase"]] = max(mark["time"], ended.get(mark["phase"], 0.0))
    spans = zip([began, *ended.values()], ended.items(), strict=False)
    return max(ended.values()) - began, {name: end - before for before, (name, end) in spans}


def ours_s(folder: Path, name: str, ranks: int) -> tuple[float, dict[str, float]]:
    """Seconds to the end of the first step, and of each phase that the console names."""
    metrics, log = folder / name / "metrics.jsonl", folder / f"{name}.log"
    with log.open("wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command(folder, name, ranks), cwd=folder, stdout=output, stderr=output)
        try:
            wait_for(process, lambda: metrics.exists() and '"kind": "train"' in metrics.read_text(), "bigtrain")
            took = time.perf_counter() - began
        finally:
            process.kill()  # its ranks end with it
            process.wait()
    said = re.findall(r"^(.+?) \.\.\. ([\d.]+) s$", log.read_text(encoding="utf-8"), re.MULTILINE)
    phases = {phase: float(seconds) for phase, seconds in said}
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    phases["first step"] = next(record["step_time_s"] for record in steps if record["kind"] == "train")
    phases["the rest: two interpreters, settings, checks"] = took - sum(phases.values())
    return took, phases


def wait_for(process: subprocess.Popen[bytes], is_there: Callable[[], bool], who: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_there():
        if process.poll() not in (None, 0) or time.monotonic() > deadline:
            process.kill()
            raise SystemExit(f"error: {who} did not get there (status {process.poll()})")
        time.sleep(0.01)


def table(ranks: int, rounds: Sequence[dict[str, float]]) -> str:
    """The medians of the phases, and the ratio."""
    ratios = [each["ours"] / each["bare"] for each in rounds]
    rows = [f"{ranks} ranks:"]
    for name in rounds[0]:
        seconds = [each.get(name, 0.0) for each in rounds]
        indent = "  " if name in ("bare", "ours") else "      "
        shown = name.removeprefix("bare: ")
        rows.append(f"{indent}{statistics.median(seconds):6.2f} ({min(seconds):.2f} to {max(seconds):.2f})  {shown}")
    spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
    rows.append(f"  ours of bare: {statistics.median(ratios):.2f} {spread}; wanted: at most {WANTED}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
