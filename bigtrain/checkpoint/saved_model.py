"""Which model a checkpoint holds, as its state.json tells. It may be of another version, or written by anyone: whatever
is read of it is checked here. Knows no tensors, imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bigtrain.config.check import check
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config, ModelConfig, ParallelConfig

_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,), "str": (str,)}


@dataclass(frozen=True)
class SavedModel:
    """What is known of it."""

    model: ModelConfig
    num_tokens: int
    """Rows of its vocabulary that stand for tokens; the others are an import's padding."""
    dtype: str
    """That it was trained in."""
    config: dict[str, Any]
    """The settings of the run that made it, by group, as they stand there: only those of the model are checked."""
    imported: dict[str, Any]
    """What an import wrote down of where it came from; empty where it is ours."""


def saved_model(folder: Path, state: Mapping[str, Any]) -> SavedModel:
    """The model of the checkpoint in `folder`, from its `state`. Raises UserError for one that this version does not
    know, with what is wrong."""
    unknown = f"checkpoint {folder}: its model is not one that this version knows"
    try:
        config, imported = dict(state["config"]), dict(state.get("imported", {}))
        model = ModelConfig(**config["model"])
        num_tokens: Any = imported.get("vocab_size", model.vocab_size)
        dtype = str(dict(config.get("precision", {})).get("dtype", "fp32"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{unknown} ({type(error).__name__}: {error})") from error
    wrong = _mistyped(model) or problems(model)
    if not wrong and (type(num_tokens) is not int or not 0 < num_tokens <= model.vocab_size):
        wrong = f"imported.vocab_size={num_tokens!r:.40}"
    if wrong:
        raise UserError(f"{unknown} ({wrong})")
    return SavedModel(model, num_tokens, dtype, config, imported)


def problems(model: ModelConfig, tensor: int = 1) -> str:
    """Settings that are wrong on so many tensor ranks, in words; empty where there is none."""
    found = check(Config(model=model, parallel=ParallelConfig(tensor=tensor, zero_stage=0)), tensor)
    return ", ".join(f"{each.key}={each.value}" for each in found if each.key.startswith("model."))


def _mistyped(model: ModelConfig) -> str:
    """Settings with a value of another type, in words; empty where there is none."""
    given = [(each.name, getattr(model, each.name), _TYPES[str(each.type)]) for each in fields(model)]
    return ", ".join(f"model.{name}={value!r:.40}" for name, value, types in given if type(value) not in types)
