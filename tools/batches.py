#!/usr/bin/env python
"""What a run was fed: the documents and the text of any step, and the proof that nothing was repeated or left out."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bigtrain import config as configs
from bigtrain.checkpoint import folder as checkpoints
from bigtrain.config.errors import UserError, exit_status
from bigtrain.config.schema import Config
from bigtrain.data import ledger, passed_over
from bigtrain.data.audit import Audit, audit
from bigtrain.data.lanes import Piece
from bigtrain.data.order import Cursor, Order, training_order
from bigtrain.data.progress import bar
from bigtrain.data.shards import tokenizer_of
from bigtrain.data.text_tars import is_text

EXAMPLES = """examples:
  python tools/batches.py show runs/default --step 100
  python tools/batches.py show runs/default --step 100 --sequence 3 --characters 4000
  python tools/batches.py audit runs/default

show works for any step, also for one that is still to come: which tokens are in it follows from the data, the seed and
the mixture. audit reads the run's ledger, where each data rank wrote down what it was fed; exit status 1 where it
contradicts the data."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return exit_status(lambda: options.run(options))


def show_command(options: argparse.Namespace) -> int:
    config, order = open_run(Path(options.folder))
    size = config.train.global_batch_size
    if options.step < 1:
        raise UserError(f"--step {options.step}: steps count from 1")
    if options.sequence is not None and not 0 <= options.sequence < size:
        raise UserError(f"--sequence {options.sequence}: a step has sequences 0 to {size - 1}")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    first = first_of(Path(options.folder), options.step, size)
    numbers = range(first, first + size) if options.sequence is None else [first + options.sequence]
    console.print(f"step {options.step}: global sequences {first:,} to {first + size - 1:,}", style="bold")
    tokenizer = tokenizer_of(config)
    for number in numbers:
        window = order.sequence(number)
        console.print(f"\nsequence {number - first} of the step, {window.num_tokens} tokens", style="bold")
        begin = 0
        for piece in window.pieces:
            console.print(f"  {told(order, piece)}", style="cyan")
            end = begin + piece.count
            asked = next((stop for start, stop in window.prompts if start == begin), begin)
            for name, tokens in (("prompt", window.tokens[begin:asked]), ("", window.tokens[asked:end])):
                if name and len(tokens):
                    console.print(f"  its prompt, {len(tokens)} tokens that are not learned:", style="cyan")
                elif asked > begin:
                    console.print(f"  then {len(tokens)} tokens that are:", style="cyan")
                if len(tokens):
                    text = tokenizer.decode(tokens.tolist())
                    shown = text[: options.characters]
                    console.print(shown + "..." * (len(shown) < len(text)), style="dim")
            begin = end
    return 0


def first_of(folder: Path, step: int, size: int) -> int:
    """The global sequence that a step begins with: as the ledger says, or as it will for a step to come."""
    entries = ledger.read(folder) if any((folder / ledger.FOLDER).glob("rank-*.jsonl")) else []
    known = next((entry for entry in entries if entry.step == step), None)
    if known is not None:
        return known.first
    begin = ledger.read_begin(folder)
    done = max(((entry.step, entry.first + entry.size) for entry in entries), default=(begin.step, begin.num_sequences))
    if step <= begin.step:
        raise UserError(f"--step {step}: the run began with step {begin.step + 1}, from another run's checkpoint")
    return passed_over.first_of_step(passed_over.read(folder), done[1], size, step - 1 - done[0])


def told(order: Order, piece: Piece) -> str:
    """Where a piece comes from."""
    dataset = order.datasets[piece.source]
    key, metadata = dataset.describe(piece.document)
    return (
        f"{dataset.name}/{dataset.file_of(piece.document)}: document {piece.document} ({key}), tokens {piece.start} to "
        f"{piece.start + piece.count - 1}, epoch {piece.epoch}, from {metadata['source']}"
    )


def audit_command(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    found = audited(folder, shown=True)
    for problem in found.problems:
        print(f"wrong: {problem}", file=sys.stderr)
    print("\n".join(summary(found)))
    for window in passed_over.read(folder) if found.passed_over else ():
        where = f"sequences {window.first:,} to {window.end - 1:,}, behind step {window.to_step}"
        print(f"passed over: {where}, for step {window.from_step}: {window.reason}")
    for reason, count in ledger.skipped(folder).most_common():
        print(f"passed over: {count:,} bad documents: {reason} ({folder / ledger.FOLDER}/skipped-*.jsonl names them)")
    return 1 if found.problems else 0


def audited(folder: Path, *, shown: bool = False) -> Audit:
    """What the audit of a run finds; `shown`: with its progress on the terminal. Raises UserError."""
    _, order = open_run(folder)
    entries, newest = ledger.read(folder), checkpoints.newest(folder / "checkpoints")
    saved_step = checkpoints.state_of(newest)["step"] if newest is not None else 0
    with bar("auditing", len(entries), shown=shown) as advance:
        return audit(
            order,
            entries,
            begin=ledger.read_begin(folder),
            saved_step=saved_step,
            passed_over=passed_over.read(folder),
            advance=advance,
        )


def summary(found: Audit) -> list[str]:
    lines = [f"{found.steps:,} steps, {found.sequences:,} sequences, {found.tokens:,} predicted tokens"]
    if found.passed_over:
        lines.append(f"{found.passed_over:,} sequences passed over on purpose ({passed_over.FILE})")
    for path, epochs in found.epochs.items():
        for epoch, (whole, part) in enumerate(epochs):
            lines.append(f"{path}: epoch {epoch}: {whole:,} documents whole, {part:,} in part")
    proven = "every step once, what was fed is what the data say, and no token was repeated in or left out of an epoch"
    return [*lines, "NOT proven" if found.problems else f"proven: {proven}"]


def open_run(folder: Path) -> tuple[Config, Order]:
    """The run's config and order, with the mixtures that its newest checkpoint remembers. Raises UserError."""
    config = configs.load(folder)
    tokenizer = tokenizer_of(config) if any(is_text(source.path) for source in config.data.train) else None
    # what was passed over in the run is passed over here, and none of the rest is to stop this
    data = replace(config.data, max_bad_fraction=config.data.max_bad_fraction and float("inf"))
    order = training_order(
        data, seed=config.run.seed, sequence_length=config.train.sequence_length, tokenizer=tokenizer
    )
    newest = checkpoints.newest(folder / "checkpoints")
    if newest is not None:
        order.go_on_from(Cursor.from_dict(checkpoints.state_of(newest)["cursor"]), accept_change=True)
    return config, order


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="show | audit")

    command = commands.add_parser("show", help="documents and decoded text of a step")
    command.add_argument("folder", metavar="RUN", help="the run's folder")
    command.add_argument("--step", type=int, required=True, help="from 1 on")
    command.add_argument("--sequence", type=int, help="one of the step's sequences, from 0 on (all)")
    command.add_argument("--characters", type=int, default=200, help="of each piece of a document to show (200)")
    command.set_defaults(run=show_command)

    command = commands.add_parser("audit", help="prove from the ledger that steps 1 to N repeated and left out nothing")
    command.add_argument("folder", metavar="RUN", help="the run's folder")
    command.set_defaults(run=audit_command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
