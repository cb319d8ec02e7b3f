"""The commands of tools/checkpoint.py that look at checkpoints and write them anew: arguments, work, words."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from bigtrain.config.errors import UserError

INSPECT = """examples:
  python tools/checkpoint.py inspect runs/default
  python tools/checkpoint.py inspect runs/default/checkpoints/step-00000300 --tensors
  python tools/checkpoint.py inspect runs/default --json | jq .num_sequences

Reads no tensor, so it answers at once. Files that are missing or have another size than manifest.json says are named;
bytes that changed are not seen: that is verify's.

exit status: 0, 1 where something of it cannot be read or a file is not as long as it was, 2 for no checkpoint"""
VERIFY = """examples:
  python tools/checkpoint.py verify runs/default/checkpoints/step-00000300
  python tools/checkpoint.py verify runs/default --all --files-only

Checks COMMITTED against manifest.json, every file's size and hash, and of every tensor shape, dtype, chunks and the
hash of its numbers. Reads in blocks: little memory, whatever the size.

exit status: 0 whole, 1 damaged, 2 no checkpoint"""
DIFF = """examples:
  python tools/checkpoint.py diff runs/a/checkpoints/step-00000300 runs/b/checkpoints/step-00000300
  python tools/checkpoint.py diff runs/a runs/b --values

Compares what the manifests say, so it is instant: hashes do not depend on the layout that wrote a checkpoint. Also the
entries of state.json. exit status as diff: 0 the same, 1 different, 2 trouble"""
RESHARD = """examples:
  python tools/checkpoint.py reshard runs/default out --tensor 2 --data 4 --dry-run
  python tools/checkpoint.py reshard runs/default out --files 8
  python tools/checkpoint.py reshard runs/default out --weights-only --dtype bf16

Any layout loads any checkpoint as it is: no run needs this. It makes small ones of large ones, and files that each rank
of a layout reads alone and from front to back. It streams: under 1 GiB of memory, also for tensors larger than that.
The tensors' hashes must come out as they were, or nothing is committed. --dtype wants --weights-only: a run goes on
from fp32 masters, and rounded ones would make it another run."""


def inspect(options: argparse.Namespace) -> int:
    from bigtrain.checkpoint import describe

    path = Path(options.checkpoint)
    listed = describe.listed(path)
    try:
        described = describe.describe(describe.find(path))
    except UserError:
        if not listed:
            raise
        described = None  # a run whose checkpoints do not count
    if options.json:
        found = describe.as_json(described) if described else {}
        listing = [{**each._asdict(), "folder": str(each.folder)} for each in listed]
        print(json.dumps({**found, **({"checkpoints": listing} if listed else {})}, indent=1))
    else:
        for line in describe.listing(listed):
            print(line)
        for line in describe.lines(described) if described else ():
            print(line)
        if options.tensors and described:
            for line in describe.tensor_lines(described):
                print(line)
    for problem in described.problems if described else ():
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if described is None or described.problems else 0


def verify(options: argparse.Namespace) -> int:
    from bigtrain.checkpoint import describe, folder
    from bigtrain.checkpoint import verify as verification

    found: list[Path] = []
    for path in map(Path, options.checkpoint):
        root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        found += (folder.committed(root) if options.all else []) or [describe.find(path)]
    is_damaged = False
    for checkpoint in found:
        with _bar(checkpoint.name, verification.bytes_to_read(checkpoint, files_only=options.files_only)) as advance:
            done = verification.verify(checkpoint, files_only=options.files_only, progress=advance)
        for problem in done.problems:
            print(f"{checkpoint}: {problem}", file=sys.stderr)
        is_damaged = is_damaged or bool(done.problems)
        what = f"{done.num_files} files" + (f", {done.num_tensors} tensors" if not options.files_only else "")
        if done.problems:
            print(f"{checkpoint}: damaged: {len(done.problems)} wrong")
        else:
            print(f"{checkpoint}: whole: {what}, {describe.size(done.num_bytes)}")
    return 1 if is_damaged else 0


def diff(options: argparse.Namespace) -> int:
    from bigtrain.checkpoint import compare, folder

    a, b = folder.resolve(Path(options.a)), folder.resolve(Path(options.b))
    with _bar("reading", compare.bytes_that_differ(a, b) if options.values else 0) as advance:
        found = compare.compare(a, b, values=options.values, progress=advance)
    if options.json:
        print(json.dumps(compare.as_json(found), indent=1))
    else:
        for line in compare.lines(found, str(a), str(b)):
            print(line)
    return 0 if found.is_equal else 1


def reshard(options: argparse.Namespace) -> int:
    from bigtrain.checkpoint import folder
    from bigtrain.checkpoint import reshard as resharding
    from bigtrain.checkpoint.layout import Layout

    sizes = {name: getattr(options, name) for name in ("tensor", "pipeline", "virtual_pipeline", "data", "zero")}
    given = {name: value for name, value in sizes.items() if value is not None}
    if options.files is not None and given:
        raise UserError("--files and a layout exclude each other: a layout says how many files there are")
    if options.files is not None and options.files < 1:
        raise UserError(f"--files {options.files}: it takes 1 or more")
    resharding.check_new(Path(options.out))
    planned = resharding.plan(
        folder.resolve(Path(options.checkpoint)),
        layout_=Layout(**given) if given else None,
        num_files=options.files or 0,
        weights_only=options.weights_only,
        dtype=options.dtype,
    )
    for line in resharding.lines(planned):
        print(line)
    if options.dry_run:
        print("dry run: nothing was written")
        return 0
    with _bar("writing", planned.num_bytes) as advance:
        written = resharding.reshard(planned, Path(options.out), advance)
    proof = "read whole, by their hashes" if planned.dtype else "the same, by their hashes"
    print(f"wrote {written}: {len(planned.tensors)} tensors, {proof}")
    return 0


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint, or a run's folder")
    parser.add_argument("--tensors", action="store_true", help="also each tensor: shape, dtype, hash, chunks")
    parser.add_argument("--json", action="store_true", help="all of it for a program")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", nargs="+", help="a checkpoint, or a run's folder (its newest)")
    parser.add_argument("--all", action="store_true", help="of a run's folder every committed one")
    parser.add_argument(
        "--files-only",
        action="store_true",
        help="compare the files alone: half the reading; finds any byte that changed",
    )


def _diff_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a checkpoint, or a run's folder (its newest)")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument(
        "--values",
        action="store_true",
        help="read the tensors that differ, and say by how much (takes as long as reading them)",
    )
    parser.add_argument("--json", action="store_true", help="for a program")


def _reshard_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint, or a run's folder (its newest)")
    parser.add_argument("out", metavar="OUT", help="folder that gets step-NNNNNNNN; must be new or empty")
    sizes = parser.add_argument_group("cut it as these ranks would write it, a file a rank (one not named is 1)")
    sizes.add_argument("--tensor", type=int, metavar="T", help="tensor ranks")
    sizes.add_argument("--pipeline", type=int, metavar="P", help="pipeline stages")
    sizes.add_argument("--virtual-pipeline", type=int, metavar="V", help="chunks a stage")
    sizes.add_argument("--data", type=int, metavar="D", help="data ranks")
    sizes.add_argument("--zero", type=int, metavar="Z", help="ZeRO stage, 0 to 3 (3)")
    parser.add_argument("--files", type=int, metavar="N", help="or into N files of equal size (as many as it has)")
    parser.add_argument("--weights-only", action="store_true", help="leave out the optimizer's state")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights, with --weights-only (as they are)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan, write nothing")


def _bar(label: str, num_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
    from bigtrain.data.progress import bar

    return bar(label, num_bytes, in_bytes=True, shown=num_bytes > 0)


COMMANDS = (
    ("inspect", "show what is in a checkpoint", _inspect_arguments, inspect, INSPECT),
    ("verify", "prove that it holds what was saved, or name what does not", _verify_arguments, verify, VERIFY),
    ("diff", "tell where two differ", _diff_arguments, diff, DIFF),
    ("reshard", "write it anew: other files, weights only, another dtype", _reshard_arguments, reshard, RESHARD),
)
"""Name, help, arguments, work, examples."""
