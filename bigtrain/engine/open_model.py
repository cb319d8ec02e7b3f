"""A model on a disk: where it is, what it is, and how its weights come into memory.

A checkpoint of ours, whose folder needs no torch to be known, or a Hugging Face folder, whose tensors are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.checkpoint import folder as folders
from bigtrain.config.check import check
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config, ModelConfig, ParallelConfig
from bigtrain.data.tokenizer import FILES, HUGGING_FACE, Tokenizer

if TYPE_CHECKING:
    from bigtrain.checkpoint.slices import Fragment

_SETTINGS = "config.json"
"""Of a Hugging Face folder."""


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
        wrong = _problems(self.padded(tensor), tensor)
        if wrong:
            raise UserError(f"tensor={tensor}: the model does not divide into that many equal parts ({wrong})")


def open_model(path: str | Path, *, tokenizer: Tokenizer | None = None) -> OpenModel:
    """The model at `path`: a checkpoint, a run's folder (then its newest), or a Hugging Face folder. `tokenizer`: what
    it has where the folder has none.

    Raises UserError where there is none, it was never committed, or this version does not know it."""
    path = Path(path)
    is_hugging_face = (path / _SETTINGS).is_file() and not (path / folders.STATE).is_file()
    return _hugging_face(path, tokenizer) if is_hugging_face else _checkpoint(path, tokenizer)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def _tokenizer(folder: Path, instead: Tokenizer | None) -> Tokenizer:
    if instead is not None and not has_tokenizer(folder):
        return instead
    return Tokenizer.load(folder, first=HUGGING_FACE)


def _checkpoint(path: Path, tokenizer: Tokenizer | None) -> OpenModel:
    folder = folders.resolve(path)
    state = folders.state_of(folder)
    num_tokens: Any = 0
    imported: dict[str, Any] = {}
    try:
        config = dict(state["config"])
        model = ModelConfig(**config["model"])
        imported = dict(state.get("imported", {}))
        num_tokens = imported.get("vocab_size", model.vocab_size)
        wrong = _mistyped(model) or _problems(model, 1)
        if not wrong and (type(num_tokens) is not int or not 0 < num_tokens <= model.vocab_size):
            wrong = f"imported.vocab_size={num_tokens!r:.40}"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        raise UserError(f"checkpoint {folder}: its model is not one that this version knows ({wrong})")

    def read(fragments: Sequence[Fragment]) -> None:
        from bigtrain.checkpoint import store

        store.load_weights(folder, fragments)

    step, text = int(state.get("step", 0)), _tokenizer(folder, tokenizer)
    return OpenModel(folder, model, num_tokens, text, step, config, imported, read)


def _hugging_face(folder: Path, instead: Tokenizer | None) -> OpenModel:
    from bigtrain.checkpoint import hf_folder

    model = hf_folder.load_settings(folder)
    wrong = _problems(model, 1)
    if wrong:
        raise UserError(f"{folder / _SETTINGS}: its model is not one that this version knows ({wrong})")
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
