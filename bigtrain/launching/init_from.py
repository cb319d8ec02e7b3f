"""Where the weights of a new run come from, as the disks tell it before any rank starts. No torch.

`checkpoint.init_from` is a checkpoint of ours, a run's folder or a Hugging Face folder. Here its settings and its
tokenizer are held against the run's; the tensors are looked at where they are read (`engine/open_model.py`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import hf_config
from bigtrain.checkpoint.saved_model import saved_model
from bigtrain.config import locations
from bigtrain.config.errors import UserError
from bigtrain.config.problem import Problem
from bigtrain.config.schema import Config, ModelConfig
from bigtrain.data.tokenizer import FILES, HUGGING_FACE, Tokenizer

KEY = "checkpoint.init_from"
_OWN_TOKENIZER = "tokenizer"
"""Folder in the run's."""
_MAY_DIFFER = {"name", "attention_dropout", "hidden_dropout", "init_std"}
"""Settings of a model that change neither its weights nor what it computes from them in an evaluation."""


def settled(config: Config) -> Config:
    """`config` with the checkpoint that is a run's newest now in place of the run's folder. Where tokenizer.path is
    the weights' (as in +experiment=finetune), it becomes RUN/tokenizer: they may be gone when the run goes on."""
    named = config.checkpoint.init_from
    if not named:
        return config
    newest = named
    if not folders.is_hugging_face(Path(named)):
        with contextlib.suppress(UserError):  # `problems` tells it
            newest = str(folders.resolve(Path(named)))
    is_theirs = config.tokenizer.path in (named, newest)
    path = str(Path(config.run.dir) / _OWN_TOKENIZER) if is_theirs else config.tokenizer.path
    return replace(
        config,
        tokenizer=replace(config.tokenizer, path=path),
        checkpoint=replace(config.checkpoint, init_from=newest),
    )


def is_used(config: Config) -> bool:
    """Whether the run will start from checkpoint.init_from: it has no checkpoint of its own."""
    return bool(config.checkpoint.init_from) and folders.newest(Path(config.run.dir) / "checkpoints") is None


def will_copy_tokenizer(config: Config) -> bool:
    """Whether the run's tokenizer is still to come from the weights."""
    return config.tokenizer.path == str(Path(config.run.dir) / _OWN_TOKENIZER) and is_used(config)


def copy_tokenizer(config: Config) -> None:
    """Make RUN/tokenizer, where that is the run's."""
    if will_copy_tokenizer(config):
        own = Path(config.tokenizer.path)
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        Tokenizer.load(config.checkpoint.init_from, first=HUGGING_FACE).save(own)


def problems(config: Config) -> Iterator[Problem]:
    """What is wrong with checkpoint.init_from. A run that has a checkpoint of its own goes on from that, and must have
    begun with these weights, or an older or newer checkpoint of the run that they are of."""
    named = config.checkpoint.init_from
    if not named:
        return
    try:
        if (own := folders.newest(Path(config.run.dir) / "checkpoints")) is not None:
            yield from _other_begin(config, folders.state_of(own))
            return
        folder, model = _opened(Path(named))
        yield from _other_model(config.model, model, is_hugging_face=folders.is_hugging_face(folder))
        yield from _other_tokenizer(config, folder)
    except UserError as error:
        message = str(error).removeprefix(f"checkpoint {named}: ").rstrip(".")
        yield Problem(KEY, named, message, "Name a checkpoint, a run's folder or a Hugging Face folder")


def _other_begin(config: Config, state: Mapping[str, Any]) -> Iterator[Problem]:
    began, named = str(state.get("init_from", {}).get("from", "")), Path(config.checkpoint.init_from)
    of_one_run = Path(began).parent == named.parent and folders.step_of(named) is not None
    if not Path(began).is_relative_to(named) and not of_one_run:
        message = f"the run {config.run.name} has checkpoints, and began with {began or 'random weights'}"
        yield Problem(KEY, named, message, "Choose another run.name, or leave it out to go on")


def _opened(path: Path) -> tuple[Path, ModelConfig]:
    """Raises UserError for what is neither."""
    settings = path / folders.HF_SETTINGS
    if folders.is_hugging_face(path):
        try:
            return path, hf_config.from_theirs(json.loads(settings.read_bytes()), str(settings))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{settings}: it cannot be read: {error!s:.200}") from error
    if not path.is_dir():
        raise UserError("there is no such folder")
    folder = folders.resolve(path)
    return folder, saved_model(folder, folders.state_of(folder)).model


def _other_model(ours: ModelConfig, theirs: ModelConfig, *, is_hugging_face: bool) -> Iterator[Problem]:
    """The first setting that makes it another model, and all of them in the fix."""
    free = _MAY_DIFFER | (set() if theirs.position == "learned" else {"max_positions"})
    names = [each.name for each in fields(ModelConfig) if each.name not in free]
    other = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
    if other:
        first = other[0]
        wanted = " ".join(f"model.{name}={_written(getattr(theirs, name))}" for name in other)
        padded = "; tools/checkpoint.py import-hf --vocab-multiple pads a vocabulary"
        yield Problem(
            f"model.{first}",
            getattr(ours, first),
            f"the model of {KEY} has {_written(getattr(theirs, first))}",
            f"To start from its weights, set {wanted}{padded if first == 'vocab_size' and is_hugging_face else ''}",
        )


def _other_tokenizer(config: Config, folder: Path) -> Iterator[Problem]:
    """Ids must mean the same to the data and to the weights. Of a folder without a tokenizer the ranks warn."""
    tokenizer, path = config.tokenizer, config.tokenizer.path
    if not any((folder / name).is_file() for name in FILES):
        if will_copy_tokenizer(config):
            yield Problem("tokenizer.path", folder, "there is no tokenizer with the weights", "Name its file or folder")
        return
    if will_copy_tokenizer(config):
        Tokenizer.load(folder, first=HUGGING_FACE)
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
