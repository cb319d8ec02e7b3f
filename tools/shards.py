#!/usr/bin/env python
"""Turn text into shards of tokens to train on, look at them, or prove that they are whole."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bigtrain.config import locations
from bigtrain.config.errors import UserError, exit_status
from bigtrain.data.build import SHARD_TOKENS, BuildOptions, build
from bigtrain.data.faults import BadDocument
from bigtrain.data.progress import bar
from bigtrain.data.shards import Dataset
from bigtrain.data.text_tars import TextTars, is_text
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.verify import splits_of, verify
from bigtrain.data.workers import default_workers

EXAMPLES = """examples:
  python tools/shards.py build corpus/ --tokenizer corpus.model --out data/corpus
  python tools/shards.py build 'web/*.jsonl.zst' --field body --held-out 0.01 --tokenizer t.model --out data/web
  python tools/shards.py build 's3://bucket/web/*.parquet' https://host/a.jsonl.gz --tokenizer t.model --out data/two
  python tools/shards.py build qa.jsonl --prompt-field prompt --field completion --tokenizer t.model --out data/qa
  python tools/shards.py inspect data/corpus
  python tools/shards.py inspect s3://bucket/corpus/train
  python tools/shards.py verify data/corpus
  python tools/shards.py verify 'web/shard-{000..127}.tar'                  # raw text that others packed
  python -m bigtrain.launch data=shards data.prepare.out=data/corpus        # train on them

The end of a file's name tells what is in it. .jsonl: a document a line. .parquet: a document a row. Any other file is
text: one document, or above 256 KiB many, cut at blank lines. .jsonl and .txt may be packed: .gz or .zst (.json.gz and
.json.zst are lines, too). OUT gets train/ and valid/, each a folder of WebDataset tars with an index. The hash of a
document's text decides on which side it is.

A build that was stopped or killed leaves a hidden folder beside OUT. The same command goes on with it, and the result
is the same, byte for byte."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    stopped = "stopped; a build goes on where it was when the same command is given again"
    return exit_status(lambda: options.run(options), stopped)


def build_command(options: argparse.Namespace) -> int:
    tokenizer = Tokenizer.load(options.tokenizer)
    if tokenizer.caveat:
        print(f"note: {tokenizer.caveat}")
    report = build(
        BuildOptions(
            inputs=options.inputs,
            exclude=options.exclude,
            field=options.field,
            prompt_field=options.prompt_field,
            held_out=options.held_out,
            seed=options.seed,
            shard_tokens=options.shard_tokens,
        ),
        tokenizer=tokenizer,
        out=options.out,
        num_workers=options.workers,
        fresh=options.fresh,
        say=lambda line: print(line, flush=True),
    )
    for line in report.lines():
        print(f"{options.out}: {line}")
    return 0


def inspect_command(options: argparse.Namespace) -> int:
    console = Console()
    if is_text(options.folder):
        return _inspect_text(_text_tars(options), console, options.characters)
    for folder in splits_of(options.folder):
        dataset = Dataset.open(folder)
        index = dataset.index
        table = Table(title=escape(dataset.name), title_justify="left", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        for name, value in {
            "documents": f"{index.num_documents:,}",
            "tokens": f"{index.num_tokens:,} ({index.dtype}, vocabulary {index.vocab_size:,})",
            **({"of prompts": f"{dataset.num_prompt_tokens:,} tokens, not learned"} if dataset.has_prompts else {}),
            "text": f"{index.text_bytes:,} bytes, {index.text_bytes / index.num_tokens:.2f} a token",
            "shards": f"{len(index.shards):,}, {sum(shard.size_bytes for shard in index.shards):,} bytes",
            "tokenizer": index.tokenizer,
            "fingerprint": dataset.fingerprint,
            "dropped": ", ".join(f"{count:,} {reason}" for reason, count in index.dropped.items()) or "none",
            **{f"built: {name}": str(value) for name, value in index.made.items()},
        }.items():
            table.add_row(name, escape(value))
        console.print(table)
        _show_first_document(console, dataset, options.characters)
    return 0


def _inspect_text(tars: TextTars, console: Console, characters: int) -> int:
    """The tars of raw text, and the first document that can be used."""
    counts = [tars.num_documents(tar) for tar in range(len(tars.files))]
    what = f"{tars.name}: {len(tars.files):,} tars of raw text, {tars.size_bytes:,} bytes"
    console.print(what, markup=False, soft_wrap=True)
    console.print(f"{sum(counts):,} documents; verify tells which of them cannot be used", markup=False)
    for tar, count in enumerate(counts):
        for document in range(tar << 32, (tar << 32) + count):
            with contextlib.suppress(BadDocument):
                text = tars.text(document)
                console.print(f"{tars.files[tar]}, sample {tars.describe(document)[0]}:", markup=False, soft_wrap=True)
                console.print(text[:characters], markup=False, highlight=False, style="dim")
                return 0
    return 0


def _verify_text(tars: TextTars) -> int:
    """Every document of raw text is read."""
    found: Counter[str] = Counter()
    good = 0
    with bar("verifying", len(tars.files), shown=True) as advance:
        for tar in range(len(tars.files)):
            for document in range(tar << 32, (tar << 32) + tars.num_documents(tar)):
                try:
                    tars.text(document)
                    good += 1
                except BadDocument as bad:
                    found[bad.reason] += 1
                    print(f"bad: {bad}", file=sys.stderr)
            advance(1)
    for reason, count in found.most_common():
        print(f"{tars.name}: {count:,} bad documents: {reason}")
    print(f"{tars.name}: {good:,} documents of {len(tars.files):,} tars can be used")
    return 1 if found else 0


def _text_tars(options: argparse.Namespace) -> TextTars:
    return TextTars.open(options.folder, None, field=options.field, prompt_field=options.prompt_field)


def _show_first_document(console: Console, dataset: Dataset, characters: int) -> None:
    key, metadata = dataset.describe(0)
    tokens = dataset.tokens(0)
    asked = f" ({prompt} of them the prompt)" if (prompt := dataset.prompt_tokens(0)) else ""
    console.print(f"first document: {key}, {len(tokens)} tokens{asked}, from {metadata['source']}", markup=False)
    console.print(dataset.tokenizer.decode(tokens.tolist())[:characters], markup=False, highlight=False, style="dim")


def verify_command(options: argparse.Namespace) -> int:
    bad = False
    if is_text(options.folder):
        return _verify_text(_text_tars(options))
    if locations.is_remote(options.folder):
        raise UserError(
            f"{locations.shown(options.folder)}: verify reads a folder on a disk. Remote shards are checked against "
            "the sha256 in their index whenever they are fetched."
        )
    for folder in splits_of(options.folder):
        problems = verify(Path(folder))
        for problem in problems:
            print(f"damaged: {problem}", file=sys.stderr)
        if not problems:
            print(f"{folder}: whole, {len(Dataset.open(folder)):,} documents")
        bad = bad or bool(problems)
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="build | inspect | verify")

    command = commands.add_parser("build", help="text -> OUT/train and OUT/valid")
    command.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder, URL, or quoted glob of them")
    command.add_argument("--tokenizer", required=True, metavar="FILE", help="any that tools/tokenizer.py inspect reads")
    command.add_argument("--out", required=True, metavar="DIR", help="folder to make; it must not be there")
    command.add_argument(
        "--field", default="text", help="key in JSON lines or column in parquet that holds the text (text)"
    )
    command.add_argument(
        "--prompt-field",
        default="",
        help="key in JSON lines that holds a prompt: read before the text, and not learned",
    )
    command.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="paths to leave out")
    command.add_argument("--held-out", type=float, default=0.05, help="share of documents for valid/ (0.05)")
    command.add_argument("--seed", type=int, default=0, help="of the shuffle (0)")
    command.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, help=f"tokens after which a shard ends ({SHARD_TOKENS:,})"
    )
    command.add_argument("--workers", type=int, default=default_workers(), help="processes; 0: this one (all cores)")
    command.add_argument("--fresh", action="store_true", help="discard what builds of OUT left that were stopped")
    command.set_defaults(run=build_command)

    command = commands.add_parser("inspect", help="what is there, and the first document as text")
    command.add_argument(
        "folder", metavar="DIR", help="a built folder, or its train/ or valid/; or tars of raw text; or a URL"
    )
    command.add_argument("--field", default="text", help="of raw text: key in .json members that holds it (text)")
    command.add_argument("--prompt-field", default="", help="of raw text: key that holds a prompt before it")
    command.add_argument("--characters", type=int, default=400, help="of the first document to show (400)")
    command.set_defaults(run=inspect_command)

    command = commands.add_parser("verify", help="read every byte against the index; exit status 1 on damage")
    command.add_argument("folder", metavar="DIR", help="a built folder, or its train/ or valid/; or tars of raw text")
    command.add_argument("--field", default="text", help="of raw text: key in .json members that holds it (text)")
    command.add_argument("--prompt-field", default="", help="of raw text: key that holds a prompt before it")
    command.set_defaults(run=verify_command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
