#!/usr/bin/env python
"""Checkpoints, without ranks and without a GPU: what is in them, whether they are whole, where two differ, cut anew, to
Hugging Face and from there."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/ is no package of the installation

from bigtrain.config.errors import exit_status
from tools import checkpoint_commands

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

exit status: 0 done, 1 inspect or verify found damage or diff a difference, 2 something is wrong and nothing was
written, 130 Ctrl-C"""


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
    from bigtrain.checkpoint.hf_folder import load_settings
    from bigtrain.checkpoint.hf_import import PRESET, import_folder
    from bigtrain.data.tokenizer import HUGGING_FACE, Tokenizer

    folder = Path(options.folder)
    load_settings(folder)  # what is no such model is refused before its tokenizer is
    tokenizer = None if options.no_tokenizer else Tokenizer.load(options.tokenizer or folder, first=HUGGING_FACE)
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
    *(Command(*each) for each in checkpoint_commands.COMMANDS),
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


def _progress(line: str) -> None:
    """On a terminal, over the line before."""
    if sys.stderr.isatty():
        width = max(os.get_terminal_size(sys.stderr.fileno()).columns - 1, 10)
        print(f"\r{line[:width]:<{width}}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
