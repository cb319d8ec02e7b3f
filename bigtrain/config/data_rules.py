"""What is wrong with the data and tokenizer settings of a config. Pure: `bigtrain.config.check` asks it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from bigtrain.config import epochs, locations
from bigtrain.config.problem import Problem
from bigtrain.config.schema import Config, DataConfig, SourceConfig

_SET_NAME = re.compile(r"[A-Za-z0-9_-]+")


def data_problems(config: Config, world: int) -> Iterator[Problem]:
    """Of data and tokenizer."""
    data, tokenizer = config.data, config.tokenizer
    yield from _train(data.train)
    yield from _valid(data.valid)
    yield from _raw_text(data)
    yield from _prompts(data)
    if not tokenizer.path:
        fix = "Choose a preset (tokenizer=bpe) or name a file; +experiment=finetune wants checkpoint.init_from=FOLDER"
        yield Problem("tokenizer.path", tokenizer.path, "is empty", fix)
    elif locations.is_remote(tokenizer.path):
        yield from _place("tokenizer.path", tokenizer.path, locations.split_file(tokenizer.path)[0])
    if not data.prepare.inputs:
        return
    if tokenizer.kind == "file" and tokenizer.specials:
        message = "these are for a tokenizer that data.prepare trains, not for one that is there"
        yield Problem("tokenizer.specials", tokenizer.specials, message, "Set tokenizer.specials=[]")
    if tokenizer.kind != "file" and not tokenizer.vocab_size:
        yield Problem("tokenizer.vocab_size", 0, "must be at least 1", "Set it to the pieces that it shall have")
    if not data.prepare.out:
        yield Problem("data.prepare.out", data.prepare.out, "is empty, but data.prepare.inputs is not", "Name a folder")
    elif locations.is_remote(data.prepare.out):
        message = "shards are built on a disk"
        fix = "Name a folder, and copy it there once it is built"
        yield Problem("data.prepare.out", locations.shown(data.prepare.out), message, fix)
    if config.model.vocab_size < tokenizer.vocab_size:
        message = f"is smaller than tokenizer.vocab_size={tokenizer.vocab_size}"
        yield Problem(
            "model.vocab_size", config.model.vocab_size, message, f"Set model.vocab_size={tokenizer.vocab_size} or more"
        )


def _train(sources: list[SourceConfig]) -> Iterator[Problem]:
    if not sources:
        fix = "Choose a preset (data=stdlib) or set data.train=[{path: FOLDER}]"
        yield Problem("data.train", sources, "there is nothing to train on", fix)
    sound = bool(sources)
    for index, source in enumerate(sources):
        key = f"data.train.{index}"
        yield from _place(f"{key}.path", source.path)
        if source.set:
            fix = "Leave it out: sets are of data.valid"
            yield Problem(f"{key}.set", source.set, "training data are not in evaluation sets", fix)
        wrong = list(_weights(key, source))
        yield from wrong
        sound = sound and not wrong
    for tokens in epochs.changes(sources) if sound else ():
        if not any(epochs.weight_at(source, tokens) for source in sources):
            message = f"no source has a weight above 0 from token {tokens:,} on"
            places = [locations.shown(source.path) for source in sources]
            yield Problem("data.train", places, message, "Give one of them a weight there")
            return


def _weights(key: str, source: SourceConfig) -> Iterator[Problem]:
    """A source may have weight 0: until a later one begins, or for ever, to look up what it gave before."""
    named = [(f"{key}.weight", source.weight)]
    named += [(f"{key}.then.{place}.weight", change.weight) for place, change in enumerate(source.then)]
    for name, weight in named:
        if not (math.isfinite(weight) and weight >= 0):
            yield Problem(name, weight, "must be a finite number, 0 or more", "Set it to the share that it is to have")
    begins = [change.from_tokens for change in source.then]
    for place, tokens in enumerate(begins):
        name = f"{key}.then.{place}.from_tokens"
        if tokens < 1:
            yield Problem(name, tokens, "must be at least 1", f"Set {key}.weight for what holds from the beginning")
        elif tokens in begins[:place]:
            yield Problem(name, tokens, "two weights begin there", "Leave one of them out")


def _valid(sources: list[SourceConfig]) -> Iterator[Problem]:
    for index, source in enumerate(sources):
        key = f"data.valid.{index}"
        yield from _place(f"{key}.path", source.path)
        if not (math.isfinite(source.weight) and source.weight > 0):
            message = "must be a finite number, more than 0"
            yield Problem(f"{key}.weight", source.weight, message, "Leave out sources of no weight")
        if source.set and not _SET_NAME.fullmatch(source.set):
            message = "a set's name has letters, digits, _ and - only"
            yield Problem(f"{key}.set", source.set, message, "Choose another name")
        if not source.set and any(other.set for other in sources):
            yield Problem(
                f"{key}.set", "", "other sources of data.valid name their set", "Name the set of this one too"
            )


def _raw_text(data: DataConfig) -> Iterator[Problem]:
    """What tars of text, which have no index, cannot be used for."""
    for index, source in enumerate(data.valid):
        if source.path.endswith(".tar"):
            message = "is raw text, and an evaluation needs tokenised shards"
            place = locations.shown(source.path)
            yield Problem(f"data.valid.{index}.path", place, message, "Build them: tools/shards.py build")
    text = next((source.path for source in data.train if source.path.endswith(".tar")), None)
    if text and data.pack == "best_fit":
        message = f"needs the sizes of all documents, and {locations.shown(text)} is raw text"
        yield Problem("data.pack", data.pack, message, "Set data.pack=concat, or build shards of the text")


def _prompts(data: DataConfig) -> Iterator[Problem]:
    """A prompt and what follows it are two fields."""
    named = [("data.prepare.prompt_field", data.prepare.prompt_field, data.prepare.json_field)]
    named += [(f"data.train.{n}.prompt_field", each.prompt_field, each.field) for n, each in enumerate(data.train)]
    for key, prompt_field, field in named:
        if prompt_field and prompt_field == field:
            yield Problem(key, prompt_field, "is the field of the text too", "Name the one that is not to be learned")


def _place(key: str, path: str, folder: str | None = None) -> Iterator[Problem]:
    """Of a folder of shards, which may be remote; `folder` where `path` is a file in it."""
    if not path:
        yield Problem(key, path, "is empty", "Name a folder of shards")
        return
    folder = path if folder is None else folder
    try:
        locations.parse(folder)
    except ValueError as error:
        yield Problem(key, locations.shown(path), str(error), "Name a folder of shards or its URL")
    if found := locations.literal_secret(folder):
        message = f"{found} is written out, and the run's config.yaml would keep it"
        fix = "Write the name of an environment variable for it: https://$USER:$PASSWORD@HOST/FOLDER?$QUERY"
        yield Problem(key, locations.shown(path), message, fix)
