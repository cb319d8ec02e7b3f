"""A model on a disk: where it is, what it is, and how its weights come into memory.

A checkpoint of ours, whose folder needs no torch to be known, or a Hugging Face folder, whose tensors are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint.saved_model import problems, saved_model
from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig
from bigtrain.data.tokenizer import FILES, HUGGING_FACE, Tokenizer

if TYPE_CHECKING:
    from bigtrain.checkpoint.slices import Fragment


@dataclass(frozen=True)
class OpenModel:
    """What is known of a model before its weights are read."""

    folder: Path
    model: ModelConfig
    num_tokens: int
    """Rows of its vocabulary that stand for tokens; the others are padding."""
    tokenizer: Tokenizer
    step: int
    config: dict[str, Any]
    """The settings of the run that made it, by group; what is not known is not there."""
    imported: dict[str, Any]
    """What an import wrote down of where it came from, with the rows of its vocabulary; empty where it is ours."""
    read: Callable[[Sequence[Fragment]], None]
    """Fill fragments (kind "weight") with their parts of the weights; no rank holds the whole. Collective. Raises
    UserError where they are damaged."""

    @property
    def origin(self) -> dict[str, Any]:
        """What a run that starts from these weights keeps in its checkpoints (JSON)."""
        began = {"init_from": {"from": str(self.folder), "from_step": self.step}}
        return {**began, "imported": self.imported} if self.imported else began

    def padded(self, tensor: int) -> ModelConfig:
        """The model with a vocabulary that divides into `tensor` equal parts."""
        return replace(self.model, vocab_size=-(-self.model.vocab_size // tensor) * tensor)

    def check_tensor(self, tensor: int) -> None:
        """Raise UserError where the model does not divide into `tensor` ranks."""
        wrong = problems(self.padded(tensor), tensor)
        if wrong:
            raise UserError(f"tensor={tensor}: the model does not divide into that many equal parts ({wrong})")


def open_model(path: str | Path, *, tokenizer: Tokenizer | None = None) -> OpenModel:
    """The model at `path`: a checkpoint, a run's folder (then its newest), or a Hugging Face folder. `tokenizer`: what
    it has where the folder has none.

    Raises UserError where there is none, it was never committed, or this version does not know it."""
    path = Path(path)
    return _hugging_face(path, tokenizer) if folders.is_hugging_face(path) else _checkpoint(path, tokenizer)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def _tokenizer(folder: Path, instead: Tokenizer | None) -> Tokenizer:
    if instead is not None and not has_tokenizer(folder):
        return instead
    return Tokenizer.load(folder, first=HUGGING_FACE)


def _checkpoint(path: Path, tokenizer: Tokenizer | None) -> OpenModel:
    folder = folders.resolve(path)
    state = folders.state_of(folder)
    saved = saved_model(folder, state)

    def read(fragments: Sequence[Fragment]) -> None:
        from bigtrain.checkpoint import store

        store.load_weights(folder, fragments)

    step, text = int(state.get("step", 0)), _tokenizer(folder, tokenizer)
    return OpenModel(folder, saved.model, saved.num_tokens, text, step, saved.config, saved.imported, read)


def _hugging_face(folder: Path, instead: Tokenizer | None) -> OpenModel:
    from bigtrain.checkpoint import hf_folder

    model = hf_folder.load_settings(folder)
    wrong = problems(model)
    if wrong:
        raise UserError(f"{folder / folders.HF_SETTINGS}: its model is not one that this version knows ({wrong})")
    found, _ = hf_folder.check_tensors(folder, model)
    tokenizer = _tokenizer(folder, instead)
    hf_folder.check_tokenizer(folder, model, tokenizer.vocab_size)
    config = {"model": asdict(model), "precision": {"dtype": hf_folder.dtype_of(found)}}
    imported = {"from": "huggingface", "vocab_size": model.vocab_size}
    return OpenModel(
        folder,
        model,
        model.vocab_size,
        tokenizer,
        0,
        config,
        imported,
        lambda parts: hf_folder.fill(parts, model, found),
    )
