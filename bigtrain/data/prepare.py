"""What `bigtrain.launch` runs before it starts ranks: ``python -m bigtrain.data.prepare RUN``.

Where data.prepare.inputs is not empty, it trains the tokenizer and builds the shards that are not there yet. Then it
opens the data as the ranks will, so that what is wrong with them is said once and now. Importing it is cheap: no torch.

The tokenizer and the shards may serve many runs, so nothing of one run (its seed) goes into them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import bigtrain.config
from bigtrain.config import locations
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config, DataConfig, PrepareConfig, TokenizerConfig
from bigtrain.data import build, claim, data_report, held_out, inputs, order, readers, shards, sides
from bigtrain.data import tokenizer_training as training
from bigtrain.data.progress import bar
from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer
from bigtrain.data.shard_format import INDEX
from bigtrain.data.shards import Dataset
from bigtrain.data.sides import Census
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.workers import default_workers

Say = Callable[[str], None]
_POLL_S = 1.0


def prepare(
    data: DataConfig,
    tokenizer_config: TokenizerConfig,
    *,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
    say: Say = print,
) -> None:
    """Train the tokenizer to tokenizer.path and build data.prepare.out, each where it is not there yet.

    One line through `say` for each of the two. Nothing where data.prepare.inputs is empty. `seed` is that of the
    sampling and the shuffle. Raises UserError where what is there was made in another way than the config asks for, and
    where the text has too few documents for data.num_lanes: as soon as it has been read once.
    """
    wanted = data.prepare
    if not wanted.inputs:
        return
    out = Path(wanted.out)
    is_trained_on = any(Path(source.path) == out / "train" for source in data.train)
    num_lanes = data.num_lanes if is_trained_on else 1
    made = _tokenizer(wanted, tokenizer_config, seed, num_lanes, progress, say)
    if (out / "train" / INDEX).exists():
        _check_shards(out, wanted, made, say)
        return
    options = build.BuildOptions(
        inputs=list(wanted.inputs),
        exclude=list(wanted.exclude),
        field=wanted.json_field,
        prompt_field=wanted.prompt_field,
        held_out=wanted.held_out,
        seed=seed,
    )
    workers = default_workers() if num_workers is None else num_workers
    report = _build_or_wait(
        out,
        lambda: build.build(
            options, tokenizer=made, out=out, num_workers=workers, num_lanes=num_lanes, progress=progress, say=say
        ),
        say,
    )
    if report is None:
        _check_shards(out, wanted, made, say)
        return
    for line in report.lines():
        say(f"built {out}: {line}")


def _build_or_wait(out: Path, begin: Callable[[], build.BuildReport], say: Say) -> build.BuildReport | None:
    """What `begin` built; None where another launch has built it, which this one waits for."""
    waited = False
    while True:
        try:
            return begin()
        except claim.Busy as error:
            if not waited:
                say(f"waiting: {error}")
            waited = True
        except UserError:
            if not (out / "train" / INDEX).exists():
                raise
        if (out / "train" / INDEX).exists():
            return None
        time.sleep(_POLL_S)


def check(config: Config) -> list[str]:
    """Open the data of a run as its ranks will. Returns lines that say what there is.

    Raises UserError for data that are missing, too few for the lanes, of another tokenizer, or with more tokens than
    the model has rows."""
    made = check_tokenizer(config)
    length = config.train.sequence_length
    ordered = order.training_order(config.data, seed=config.run.seed, sequence_length=length, tokenizer=made)
    sets = held_out.held_out(config.data, sequence_length=length, tokenizer=made) if config.data.valid else {}
    told = list(data_report.lines(config, ordered, sets))
    return [*told, f"note: {made.caveat}"] if made.caveat else told


def check_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a run. Raises UserError where it is unfit, or has more tokens than the model has rows."""
    made, rows = shards.tokenizer_of(config), config.model.vocab_size
    if made.vocab_size > rows:
        raise UserError(
            f"model.vocab_size is {rows}, but tokenizer {locations.shown(config.tokenizer.path)} has "
            f"{made.vocab_size} pieces. Set model.vocab_size={made.vocab_size} or more."
        )
    return made


def _tokenizer(
    wanted: PrepareConfig, config: TokenizerConfig, seed: int, num_lanes: int, progress: bool, say: Say
) -> Tokenizer:
    path = Path(config.path)
    if path.exists() or config.kind == "file":
        made = Tokenizer.load(path)
        _check_is_wanted(made, config)
        say(f"tokenizer {path} is there: {made.kind}, {made.vocab_size} pieces")
        return made
    files = readers.find_files(wanted.inputs, wanted.exclude)
    readers.check_prompts(files, wanted.prompt_field)
    texts = training_texts(
        files,
        field=wanted.json_field,
        prompt_field=wanted.prompt_field,
        held_out=wanted.held_out,
        num_lanes=num_lanes,
        needs_valid=True,
        progress=progress,
    )
    model = training.train(texts, vocab_size=config.vocab_size, kind=config.kind, specials=config.specials, seed=seed)
    training.save(model, path)
    say(f"trained tokenizer {path}: {config.kind}, {config.vocab_size} pieces, from {len(files)} files")
    return SentencePieceTokenizer(model, str(path))


def _check_is_wanted(made: Tokenizer, config: TokenizerConfig) -> None:
    """A tokenizer that is there must be what the config asks for."""
    other = "" if config.kind == "file" else ", or another tokenizer.path, or remove the file"
    if config.vocab_size not in (0, made.vocab_size):
        raise UserError(
            f"tokenizer.vocab_size is {config.vocab_size}, but {made.name} is there with {made.vocab_size} pieces. Set "
            f"tokenizer.vocab_size={made.vocab_size}{other}."
        )
    if missing := [name for name in config.specials if name not in made.specials]:
        raise UserError(
            f"tokenizer.specials has {', '.join(missing)}, but {made.name} is there without. Set another "
            "tokenizer.path, or remove the file to train it again."
        )


def training_texts(
    files: list[str],
    *,
    field: str,
    prompt_field: str = "",
    held_out: float,
    num_lanes: int = 1,
    needs_valid: bool = False,
    progress: bool,
) -> Iterator[str]:
    """The text of every document that is not held out: what a tokenizer may see. Behind the last one it raises
    UserError where they are too few for the lanes, or (`needs_valid`) none is held out."""
    sides.check_share(held_out)
    census = Census()
    with bar("reading for the tokenizer", readers.total_bytes(files), in_bytes=True, shown=progress) as advance:
        yield from sides.training_side(_texts(files, field, prompt_field, census.dropped, advance), held_out, census)
    census.check(held_out, num_lanes=num_lanes, needs_valid=needs_valid)


def _texts(
    files: list[str], field: str, prompt_field: str, dropped: readers.Drops, advance: Callable[[int], None]
) -> Iterable[str]:
    for record in readers.read_records(files, field):
        advance(record.num_bytes)
        try:
            prompt, text = readers.pair_of(record, field, prompt_field)
            yield (prompt or "") + text
        except readers.Drop as reason:
            dropped.add(str(reason), record.source)


def _check_shards(out: Path, wanted: PrepareConfig, made: Tokenizer, say: Say) -> None:
    """What is there must be what the config asks for."""
    dataset = Dataset.open(out / "train")
    index = dataset.index
    if index.tokenizer != made.fingerprint:
        raise UserError(
            f"{out} was built with the tokenizer {index.tokenizer}, but tokenizer.path is {made.fingerprint}. "
            "Remove the folder to build it again, or set another data.prepare.out."
        )
    asked = {
        "inputs": [inputs.without_secrets(name) for name in wanted.inputs],
        "exclude": list(wanted.exclude),
        "field": wanted.json_field,
        "prompt_field": wanted.prompt_field,
        "held_out": wanted.held_out,
    }
    for name, now in asked.items():
        if (before := index.made.get(name, "")) != now:
            raise UserError(
                f"{out} was built with {name}={before}, but data.prepare says {now}. Set another "
                "data.prepare.out, or remove the folder to build it again; data.prepare.inputs=[] uses it as it is."
            )
    say(f"shards {out} are there: {index.num_documents:,} documents, {index.num_tokens:,} tokens in train/")


def main(arguments: list[str]) -> int:
    """`arguments` is one path: the run's folder, or its config.yaml."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m bigtrain.data.prepare RUN    (the run's folder, or its config.yaml)", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    path = Path(arguments[0])
    try:
        config = bigtrain.config.load(path.parent if path.suffix == ".yaml" else path)
        if Path(config.tokenizer.path).exists():
            check_tokenizer(config)  # before hours of tokenising
        prepare(config.data, config.tokenizer, say=_say)
        for line in check(config):
            _say(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
