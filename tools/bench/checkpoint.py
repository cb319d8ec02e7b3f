"""Speed of saving and loading a checkpoint, against what a user would pick instead, and against the disk.

    make bench-checkpoint                                             all of it; 25 minutes on 2 cores, 15 GB of disk
    python tools/bench/checkpoint.py --ranks 1 --only save,async:ours       some parts, or some contenders of a part
    python tools/bench/checkpoint.py --params 1e6 --rounds 1 --dir /dev/shm   a quick look

The weights and Adam moments of a 205 M parameter model, 2.5 GB (checkpoint_state.py), on one process and on two gloo
ranks that share the bytes. Each contender (checkpoint_contenders.py) runs in fresh processes, one after the other, in
interleaved rounds; ours as bigtrain's launcher starts it, with its malloc settings, the others as they come. Before the
clock starts it has saved and loaded a toy state, and no unwritten page is left in the machine. Ratios are of the same
round: their median, and the lowest and highest. Nothing else should run on the machine meanwhile.

save    until it is durable; what os.sync still finds to write is shown as "left". "direct" is a raw O_DIRECT write.
load    into memory that is there, cold (its files dropped from the page cache) and warm (read once before). What was
        loaded is compared with what was saved, outside the clock.
async   the stall of the second save and later ones, against a plain copy into touched memory just before it, and what
        a loop of matrix products on the same threads loses while the save runs behind it: seconds of the save, less
        the steps done in it at the speed before it.
reshard tools/checkpoint.py's, to as many files and to four, against a copy of the folder with its files fsynced; on one
        process, from the plan to the commit.
memory  highest resident set while it saves or loads, above what was there before; the highest of the ranks. Of load
        safetensors part of it is the mapped file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
from checkpoint_tables import Found, tables
from step import malloc_settings, run

BASELINE_S = 2.0
PARTS = {
    "save": ("raw", "direct", "torch.save", "safetensors", "dcp", "ours", "ours-unhashed"),
    "load": ("raw", "torch.load", "safetensors", "dcp", "dcp-of-ours", "ours", "ours-unchecked"),
    "async": ("dcp", "dcp-kept", "ours"),
    "reshard": ("copy", "ours", "ours-4-files"),
}
SOURCES = {"torch.load": "torch.save", "dcp-of-ours": "ours", "ours-unchecked": "ours"}
SOURCES |= dict.fromkeys(PARTS["reshard"], "ours")
"""Whose files are read, where they are not its own name's."""


def main() -> int:
    options = parse()
    if options.command == "contender":
        from checkpoint_measure import barrier, contend

        figures = contend(options)
        if int(os.environ["RANK"]) == 0:
            options.json.write_text(json.dumps(figures), encoding="utf-8")
        barrier()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads abort a rank at times that takes its process group down while the others do
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends, and files go
    wanted = chosen(options.only)
    try:
        options.dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=options.dir) as folder:
            check_room(Path(folder), wanted, options.params)
            found = rounds(options, wanted, Path(folder))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(tables(found))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["run", "contender"], default="run")
    parser.add_argument("label", nargs="?", help="contender: PART:NAME")
    parser.add_argument("--params", type=lambda text: int(float(text)), default=205_000_000, help="parameters (205e6)")
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="over all ranks")
    parser.add_argument("--dir", type=Path, default=Path(), help="folder in which a temporary one is made (here)")
    parser.add_argument("--only", type=lambda text: text.split(","), help="PART or PART:NAME, with commas between")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--baseline", type=float, default=BASELINE_S, help="seconds of steps before an async save")
    return parser.parse_args()


def chosen(only: list[str] | None) -> dict[str, list[str]]:
    """Contenders by part, and the saves whose files the loads read. Exits with status 2 for an unknown one."""
    everything = [f"{part}:{name}" for part, names in PARTS.items() for name in names]
    for one in only or ():
        if one not in (*PARTS, *everything):
            print(f"error: --only {one}: choose of {', '.join((*PARTS, *everything))}", file=sys.stderr)
            raise SystemExit(2)
    wanted = {
        part: [name for name in names if only is None or part in only or f"{part}:{name}" in only]
        for part, names in PARTS.items()
    }
    needed = {SOURCES.get(name, name) for name in wanted["load"] + wanted["reshard"]}
    wanted["save"] = [name for name in PARTS["save"] if name in wanted["save"] or name in needed]
    return wanted


def check_room(folder: Path, wanted: dict[str, list[str]], num_parameters: int) -> None:
    """Raises OSError where the disk cannot hold what stands on it at the same time."""
    kept = {SOURCES.get(name, name) for name in wanted["load"] + wanted["reshard"]}
    needed = int((len(kept) + 1) * num_parameters * 12 * 1.02)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder.parent.resolve()} has {free / 1e9:.3g} GB free, the bench needs {needed / 1e9:.3g} GB; "
            "choose another --dir, fewer --params or fewer contenders (--only)"
        )


def rounds(options: argparse.Namespace, wanted: dict[str, list[str]], folder: Path) -> Found:
    found: Found = {
        "parameters": options.params,
        "load_before": os.getloadavg()[0],
        "figures": {
            str(ranks): {part: {name: [] for name in names} for part, names in parts_of(wanted, ranks).items()}
            for ranks in options.ranks
        },
    }
    for number in range(options.rounds):
        for ranks in options.ranks:
            for part, name in order(parts_of(wanted, ranks), number):
                figures = launch(options, f"{part}:{name}", ranks, folder)
                found["figures"][str(ranks)][part][name].append(figures)
                where = f"round {number + 1} of {options.rounds}, {ranks} ranks"
                told = "  ".join(f"{key} {value:.2f}" for key, value in figures.items() if key.endswith("_s"))
                print(f"{where}: {part} {name}  {told}", file=sys.stderr, flush=True)
            for left in folder.iterdir():
                shutil.rmtree(left)
        found["load_after"] = os.getloadavg()[0]
        if options.json:  # so that a run that is ended early leaves its rounds
            options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def parts_of(wanted: dict[str, list[str]], ranks: int) -> dict[str, list[str]]:
    """Those that have contenders. The tool that reshards has no ranks."""
    return {part: names for part, names in wanted.items() if names and (part != "reshard" or ranks == 1)}


def order(wanted: dict[str, list[str]], number: int) -> Iterator[tuple[str, str]]:
    """Of a round: each one begins with another contender, so that none always follows the same."""
    for part, names in wanted.items():
        first = number % max(len(names), 1)
        yield from ((part, name) for name in names[first:] + names[:first])


def launch(options: argparse.Namespace, label: str, ranks: int, folder: Path) -> dict[str, float]:
    """One contender in processes of its own. Raises SystemExit with its last output where it fails."""
    from bigtrain.launching.environment import Place, free_port, rank_environment

    out, port, malloc = folder / "figures.json", free_port(), malloc_settings()
    command = [sys.executable, str(Path(__file__)), "contender", label, f"--params={options.params}", f"--json={out}"]
    command += [f"--dir={folder}", f"--baseline={options.baseline}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, options.threads // ranks))}
    environments = [
        environment | rank_environment(Place(rank, rank, ranks, ranks, "127.0.0.1", port), "cpu", environment)
        for rank in range(ranks)
    ]
    if not label.partition(":")[2].startswith("ours"):
        environments = [{key: one[key] for key in one if key not in malloc} for one in environments]
    code, output = run([command] * ranks, environments)
    if code or not out.exists():
        raise SystemExit(f"{label} on {ranks} ranks failed with status {code}; its last output:\n{output[-4000:]}")
    figures = json.loads(out.read_text(encoding="utf-8"))
    out.unlink()
    return figures


if __name__ == "__main__":
    sys.exit(main())
