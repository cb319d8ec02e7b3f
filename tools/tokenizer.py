#!/usr/bin/env python
"""Train a tokenizer on text, or look at one of any kind."""

from __future__ import annotations

import argparse
import sys

from bigtrain.config.errors import exit_status
from bigtrain.data import readers
from bigtrain.data import tokenizer_training as training
from bigtrain.data.prepare import training_texts
from bigtrain.data.tokenizer import Tokenizer, describe
from bigtrain.data.tokenizer_training import SAMPLE_BYTES

EXAMPLES = """examples:
  python tools/tokenizer.py train corpus/ --vocab-size 32000 --out corpus.model
  python tools/tokenizer.py train 'books/**/*.txt' web.jsonl.gz --kind unigram --vocab-size 8192 --out t.model
  python tools/tokenizer.py train corpus/ --vocab-size 32000 --special '<|user|>' --special '<|end|>' --out t.model
  python tools/tokenizer.py inspect corpus.model --text 'def f(x): return x'
  python tools/tokenizer.py inspect gpt2/tokenizer.json
  python tools/tokenizer.py inspect cl100k_base.tiktoken

One that it trains gives back every byte of any UTF-8 text, and the same inputs and options give the same file. A
line of .jsonl and a row of .parquet is a document, any other file is one, or above 256 KiB many, cut at blank lines;
.jsonl and .txt may be packed (.gz, .zst), and each may be a URL."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return exit_status(lambda: options.run(options), "stopped; nothing was written")


def train(options: argparse.Namespace) -> int:
    files = readers.find_files(options.inputs, options.exclude)
    texts = training_texts(files, field=options.field, held_out=options.held_out, progress=True)
    sample_bytes = None if options.sample_mb is None else options.sample_mb * 1_000_000
    model = training.train(
        texts,
        vocab_size=options.vocab_size,
        kind=options.kind,
        specials=options.special,
        seed=options.seed,
        sample_bytes=sample_bytes,
    )
    training.save(model, options.out)
    print(f"wrote {options.out}: {options.kind}, {options.vocab_size} pieces, from {len(files)} files")
    return 0


def inspect(options: argparse.Namespace) -> int:
    for name, value in describe(Tokenizer.load(options.file), options.text, specials=options.specials):
        print(f"{name:<16} {value}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="train | inspect")

    command = commands.add_parser("train", help="train a sentencepiece model with byte fallback")
    command.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or quoted glob of text or JSON lines")
    command.add_argument("--vocab-size", type=int, required=True, help="pieces, specials and 256 byte pieces included")
    command.add_argument("--out", required=True, metavar="FILE", help="model file to write")
    command.add_argument("--kind", choices=sorted(SAMPLE_BYTES), default="bpe", help="algorithm (bpe)")
    command.add_argument(
        "--special",
        action="append",
        default=[],
        metavar="NAME",
        help="a token that no text becomes, such as '<|user|>'",
    )
    command.add_argument("--field", default="text", help="key of the text in JSON lines (text)")
    command.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="paths to leave out")
    command.add_argument(
        "--held-out", type=float, default=0.05, help="share of documents not to see, as of tools/shards.py (0.05)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    command.add_argument("--sample-mb", type=int, help="text to train on at most, in MB (bpe 67, unigram 4)")
    command.set_defaults(run=train)

    command = commands.add_parser("inspect", help="size, special tokens, longest pieces, and how it cuts a text")
    command.add_argument(
        "file", metavar="FILE", help="sentencepiece model, tokenizer.json, tiktoken file, or a folder with one in it"
    )
    command.add_argument("--text", default="for i in range(10):\n    print(i)\n", help="text to cut")
    command.add_argument("--specials", action="store_true", help="names of special tokens in TEXT are these tokens")
    command.set_defaults(run=inspect)
    return parser


if __name__ == "__main__":
    sys.exit(main())
