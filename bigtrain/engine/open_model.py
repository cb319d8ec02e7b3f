"""A model on a disk: where it is, what it is, and how its weights come into memory. No torch until they do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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

        store.load(self.folder, fragments)

    def check_tensor(self, tensor: int) -> None:
        """Raise UserError where the model does not divide into `tensor` ranks."""
        config = Config(model=self.model, parallel=ParallelConfig(tensor=tensor, zero_stage=0))
        wrong = [found for found in check(config, tensor) if found.key.startswith("model.")]
        if wrong:
            named = ", ".join(f"{found.key}={found.value}" for found in wrong)
            raise UserError(f"tensor={tensor}: the model does not divide into that many equal parts ({named})")


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
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {folder}: its model is not one that this version knows ({error})") from error
    return OpenModel(folder, model, Tokenizer.load(folder), int(state.get("step", 0)), config)
