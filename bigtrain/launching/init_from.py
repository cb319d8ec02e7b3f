"""Where the weights of a new run come from, as the disks tell it before any rank starts. No torch.

`checkpoint.init_from` is a checkpoint of ours, a run's folder or a Hugging Face folder. Here its settings and its
tokenizer are held against the run's; the tensors are looked at where they are read (`engine/open_model.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import hf_config
from bigtrain.config import locations
from bigtrain.config.errors import UserError
from bigtrain.config.problem import Problem
from bigtrain.config.schema import Config, ModelConfig
from bigtrain.data.tokenizer import FILES, HUGGING_FACE, Tokenizer

KEY = "checkpoint.init_from"
_HF_SETTINGS = "config.json"
_MAY_DIFFER = {"name", "attention_dropout", "hidden_dropout", "init_std"}
"""Settings of a model that change neither its weights nor what it computes from them in an evaluation."""


def settled(config: Config) -> Config:
    """`config` with the checkpoint that is a run's newest now in place of the run's folder; also in tokenizer.path,
    where that is to be the checkpoint's (as in +experiment=finetune)."""
    named = config.checkpoint.init_from
    newest = (folders.newest(Path(named) / "checkpoints") or folders.newest(Path(named))) if named else None
    if newest is None:
        return config
    tokenizer = config.tokenizer
    if tokenizer.path == named:
        tokenizer = replace(tokenizer, path=str(newest))
    return replace(config, tokenizer=tokenizer, checkpoint=replace(config.checkpoint, init_from=str(newest)))


def problems(config: Config) -> Iterator[Problem]:
    """What is wrong with checkpoint.init_from. Nothing where the run has a checkpoint of its own, from which it goes
    on."""
    named = config.checkpoint.init_from
    if not named or folders.newest(Path(config.run.dir) / "checkpoints") is not None:
        return
    try:
        folder, model = _opened(Path(named))
        yield from _other_model(config.model, model)
        yield from _other_tokenizer(config, folder)
    except UserError as error:
        yield Problem(KEY, named, str(error).rstrip("."), "Name a checkpoint, a run's folder or a Hugging Face folder")


def _opened(path: Path) -> tuple[Path, ModelConfig]:
    """Raises UserError for what is neither."""
    settings = path / _HF_SETTINGS
    if settings.is_file() and not (path / folders.STATE).is_file():
        try:
            return path, hf_config.from_theirs(json.loads(settings.read_bytes()), str(settings))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{settings}: it cannot be read: {error!s:.200}") from error
    if not path.is_dir():
        raise UserError("there is no such folder")
    folder = folders.resolve(path)
    state = folders.state_of(folder)
    try:
        return folder, ModelConfig(**state["config"]["model"])
    except (KeyError, TypeError) as error:
        raise UserError(f"its model is not one that this version knows ({type(error).__name__}: {error})") from error


def _other_model(ours: ModelConfig, theirs: ModelConfig) -> Iterator[Problem]:
    """The first setting that makes it another model, and all of them in the fix."""
    free = _MAY_DIFFER | (set() if theirs.position == "learned" else {"max_positions"})
    names = [each.name for each in fields(ModelConfig) if each.name not in free]
    other = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
    if other:
        first = other[0]
        wanted = " ".join(f"model.{name}={_written(getattr(theirs, name))}" for name in other)
        padded = ". A Hugging Face vocabulary is padded by tools/checkpoint.py import-hf --vocab-multiple"
        yield Problem(
            f"model.{first}",
            getattr(ours, first),
            f"the model of {KEY} has {_written(getattr(theirs, first))}",
            f"To start from its weights, set {wanted}{padded if other == ['vocab_size'] else ''}",
        )


def _other_tokenizer(config: Config, folder: Path) -> Iterator[Problem]:
    """Ids must mean the same to the data and to the weights. Of a folder without a tokenizer the ranks warn."""
    tokenizer, path = config.tokenizer, config.tokenizer.path
    if not any((folder / name).is_file() for name in FILES):
        return
    fix = f"Set tokenizer.path={folder} tokenizer.kind=file tokenizer.vocab_size=0, and shards that it made"
    if locations.is_remote(path):
        return  # the ranks compare it
    if not Path(path).exists():
        if tokenizer.kind != "file":
            yield Problem("tokenizer.path", path, f"a new one would be trained, and {KEY} has its own", fix)
        return
    theirs, ours = Tokenizer.load(folder, first=HUGGING_FACE), Tokenizer.load(path)
    if not ours.means_the_same(theirs):
        yield Problem("tokenizer.path", path, f"is not the tokenizer of {KEY}, {theirs.fingerprint[:16]}", fix)


def _written(value: object) -> str:
    """As on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)
