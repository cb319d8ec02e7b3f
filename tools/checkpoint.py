#!/usr/bin/env python
"""Checkpoints, without ranks and without a GPU: what is in them, whether they are whole, where two differ, cut anew, to
Hugging Face and from there."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bigtrain.config.errors import UserError, exit_status

if TYPE_CHECKING:
    from bigtrain.data.tokenizer import Tokenizer

EXAMPLES = """examples:
  python tools/checkpoint.py inspect runs/default                        # all of a run's, and what is in the newest
  python tools/checkpoint.py verify runs/default --all                   # is every byte what was saved?
  python tools/checkpoint.py diff runs/a runs/b --values                 # which tensors differ, and by how much
  python tools/checkpoint.py reshard runs/default small --weights-only --dtype bf16
  python tools/checkpoint.py export-hf runs/default hf/mine              # the run's newest checkpoint
  python tools/checkpoint.py export-hf runs/default/checkpoints/step-00000300 hf/mine --dtype bf16 --shard-gb 2
  python tools/checkpoint.py import-hf ~/Llama-3.2-1B imported/llama --vocab-multiple 128

CKPT is a checkpoint (runs/default/checkpoints/step-00000300), a run's folder or its checkpoints/latest: then the
newest. COMMAND --help tells more. docs/checkpoints.md tells what is in one.

exit status: 0 done, 1 verify found damage or diff a difference, 2 something is wrong and nothing was written,
130 Ctrl-C"""


INSPECT = """examples:
  python tools/checkpoint.py inspect runs/default
  python tools/checkpoint.py inspect runs/default/checkpoints/step-00000300 --tensors
  python tools/checkpoint.py inspect runs/default --json | jq .num_sequences

Reads no tensor, so it answers at once. exit status: 0, 1 where something of it cannot be read, 2 for no checkpoint"""
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
of a layout reads alone and from front to back. It streams: under 1 GiB of memory, whatever the size. The tensors'
hashes must come out as they were, or nothing is committed. --dtype wants --weights-only: a run goes on from fp32
masters, and rounded ones would make it another run."""


class Command(NamedTuple):
    """A row of COMMANDS."""

    name: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    examples: str = ""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # beside a training run the threads of torch would wait for each other, seven times as long as one of them works
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")  # torch's, of being alone
    logging.disable(logging.WARNING)
    return exit_status(lambda: options.run(options), "stopped; nothing was written")


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
        print(f"damaged: {problem}", file=sys.stderr)
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
    from bigtrain.checkpoint import compare, describe

    a, b = describe.find_committed(Path(options.a)), describe.find_committed(Path(options.b))
    with _bar("reading", compare.bytes_that_differ(a, b) if options.values else 0) as advance:
        found = compare.compare(a, b, values=options.values, progress=advance)
    if options.json:
        print(json.dumps(compare.as_json(found), indent=1))
    else:
        for line in compare.lines(found, str(a), str(b)):
            print(line)
    return 0 if found.is_equal else 1


def reshard(options: argparse.Namespace) -> int:
    from bigtrain.checkpoint import describe
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
        describe.find_committed(Path(options.checkpoint)),
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


def export_hf(options: argparse.Namespace) -> int:
    from bigtrain.checkpoint import folder as folders
    from bigtrain.checkpoint.hf_export import Text, export

    checkpoint = folders.resolve(Path(options.checkpoint))
    text = Text()
    if not options.no_tokenizer:
        from bigtrain.data.hf_files import hf_files
        from bigtrain.data.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(options.tokenizer or checkpoint)
        text = Text(hf_files(tokenizer), tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
    done = export(
        checkpoint,
        Path(options.folder),
        text=text,
        dtype=options.dtype,
        shard_bytes=int(options.shard_gb * 1e9),
        vocab_size=options.vocab_size,
        progress=lambda written, total: _progress(f"{written / 1e9:.2f} of {total / 1e9:.2f} GB"),
    )
    _progress("")
    size = f"{done.num_bytes / 1e9:.3g} GB in {done.num_files} file{'s' if done.num_files > 1 else ''}"
    print(f"wrote {done.folder}: {done.architecture}, {done.num_tensors} tensors, {size}")
    print(f"dtype {done.dtype}, {done.vocab_size} rows of the vocabulary, from {checkpoint}")
    for note in done.notes:
        print(f"note: {note}")
    if options.no_tokenizer:
        print("note: no tokenizer is in it")
    else:
        print("note: names of special tokens in a text are text; split_special_tokens=False makes them those tokens")
    return 0


def import_hf(options: argparse.Namespace) -> int:
    import torch

    import bigtrain
    from bigtrain.checkpoint.hf_import import PRESET, import_folder, load_settings

    folder = Path(options.folder)
    load_settings(folder)  # what is no such model is refused before its tokenizer is
    tokenizer = None if options.no_tokenizer else _tokenizer_of(folder, options.tokenizer)
    done = import_folder(
        folder,
        Path(options.checkpoint),
        files=tokenizer.files if tokenizer else {},
        tokenizer_vocab_size=tokenizer.vocab_size if tokenizer else 0,
        vocab_multiple=options.vocab_multiple,
        versions={"bigtrain": bigtrain.__version__, "torch": torch.__version__},
        progress=_progress,
    )
    _progress("")
    print(f"wrote {done.folder}: {done.num_tensors} tensors, which came as {done.dtype}; weights only, step 0")
    padded = done.model.vocab_size - done.vocab_size
    print(f"{done.model.vocab_size} rows of the vocabulary" + (f", {padded} of them padding" if padded else ""))
    if done.left_out:
        first = ", ".join(done.left_out[:3])
        print(f"left out {len(done.left_out)} that the model makes by itself or has twice: {first}")
    print(f"the model's settings, as a preset of conf/model/: {done.folder / PRESET}")
    return 0


def _tokenizer_of(folder: Path, named: str | None) -> Tokenizer:
    """Of a Hugging Face folder; tokenizer.json where there are several."""
    from bigtrain.data.tokenizer import HUGGING_FACE, Tokenizer

    file = folder / HUGGING_FACE
    return Tokenizer.load(named or (file if file.is_file() else folder))


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


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint, or a run's folder (then its newest)")
    parser.add_argument("folder", metavar="FOLDER", help="to write; must not exist")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (what the run trained in)")
    parser.add_argument("--shard-gb", type=_positive, default=4.0, help="GB (10^9 bytes) a safetensors file (4)")
    parser.add_argument("--vocab-size", type=int, help="rows of the embedding to keep, the first (all, or as imported)")
    _tokenizer_arguments(parser, "the checkpoint's")


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="config.json and safetensors of a Llama or GPT-2 model")
    parser.add_argument("checkpoint", metavar="CKPT", help="folder that gets step-00000000")
    parser.add_argument(
        "--vocab-multiple", type=int, default=1, metavar="N", help="pad the vocabulary to a multiple of N (1)"
    )
    _tokenizer_arguments(parser, "FOLDER's")


def _tokenizer_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--tokenizer", metavar="FILE", help=f"another tokenizer than {default}: a file or a folder")
    choice.add_argument("--no-tokenizer", action="store_true", help="weights and settings only")


COMMANDS = (
    Command("inspect", "show what is in a checkpoint", _inspect_arguments, inspect, INSPECT),
    Command("verify", "prove that it holds what was saved, or name what does not", _verify_arguments, verify, VERIFY),
    Command("diff", "tell where two differ", _diff_arguments, diff, DIFF),
    Command("reshard", "write it anew: other files, weights only, another dtype", _reshard_arguments, reshard, RESHARD),
    Command("export-hf", "write a folder that Transformers opens", _export_arguments, export_hf),
    Command("import-hf", "make a checkpoint of a Hugging Face folder", _import_arguments, import_hf),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(required=True, metavar=" | ".join(command.name for command in COMMANDS))
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            epilog=command.examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("a number above 0")
    return value


def _bar(label: str, num_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
    from bigtrain.data.progress import bar

    return bar(label, num_bytes, in_bytes=True, shown=num_bytes > 0)


def _progress(line: str) -> None:
    """On a terminal, over the line before."""
    if sys.stderr.isatty():
        width = max(os.get_terminal_size(sys.stderr.fileno()).columns - 1, 10)
        print(f"\r{line[:width]:<{width}}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
