"""A model on a disk: where it is, what it is, and how its weights come into memory. No torch until they do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.checkpoint import folder as folders
from bigtrain.config.check import check
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config, ModelConfig, ParallelConfig
from bigtrain.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bigtrain.checkpoint.slices import Fragment


@dataclass(frozen=True)
class OpenModel:
    """What is known of a model before its weights are read."""

    folder: Path
    model: ModelConfig
    tokenizer: Tokenizer
    step: int
    config: dict[str, Any]
    """The settings of the run that made it, by group; what is not known is not there."""

    def read(self, fragments: Iterable[Fragment]) -> None:
        """Fill `fragments` (kind "weight") with their parts of the weights; no rank holds the whole. Collective."""
        from bigtrain.checkpoint import store

        store.load_weights(self.folder, fragments)

    def check_tensor(self, tensor: int) -> None:
        """Raise UserError where the model does not divide into `tensor` ranks."""
        wrong = _problems(self.model, tensor)
        if wrong:
            raise UserError(f"tensor={tensor}: the model does not divide into that many equal parts ({wrong})")


def open_model(path: str | Path) -> OpenModel:
    """The model at `path`: a checkpoint, or a run's folder (then its newest).

    Raises UserError where there is none, it was never committed, or this version does not know it."""
    path = Path(path)
    if (path / "config.json").is_file() and not (path / folders.STATE).is_file():
        # a reader of such folders belongs here: an OpenModel whose `read` maps its names to ours
        raise UserError(
            f"checkpoint {path}: this is a Hugging Face model (config.json). bigtrain does not read those yet. "
            "Name a checkpoint or the folder of a run."
        )
    folder = folders.resolve(path)
    state = folders.state_of(folder)
    try:
        config = dict(state["config"])
        model = ModelConfig(**config["model"])
        wrong = _mistyped(model) or _problems(model, 1)
    except (KeyError, TypeError, ValueError) as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        raise UserError(f"checkpoint {folder}: its model is not one that this version knows ({wrong})")
    return OpenModel(folder, model, Tokenizer.load(folder), int(state.get("step", 0)), config)


def _mistyped(model: ModelConfig) -> str:
    """Fields with a value of another type, in words; empty where there is none."""
    kinds = {"int": int, "float": (int, float), "bool": bool, "str": str}
    given = [(each.name, getattr(model, each.name), kinds[str(each.type)]) for each in fields(model)]
    wrong = [(name, value) for name, value, kind in given if not isinstance(value, kind)]
    return ", ".join(f"model.{name}={value!r:.40}" for name, value in wrong)


def _problems(model: ModelConfig, tensor: int) -> str:
    """Fields that are wrong on so many tensor ranks, in words; empty where there is none."""
    found = check(Config(model=model, parallel=ParallelConfig(tensor=tensor, zero_stage=0)), tensor)
    return ", ".join(f"{each.key}={each.value}" for each in found if each.key.startswith("model."))
