"""A Hugging Face folder (Llama or GPT-2, safetensors) as a checkpoint of ours: weights, no optimizer state, step 0.

Everything is checked before a number is read: settings by field, tensors by name, shape and dtype. Then the tensors
stream: torch.distributed.checkpoint asks for one after the other, and each is put together when it is asked for. A run
of any layout starts from the result (`store.load_weights`); `hf_export.export` of it gives the same bytes back.
"""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportPrivateImportUsage=false
# (torch.distributed.checkpoint is only partly typed)

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import store
from bigtrain.checkpoint.hf_folder import check_tensors, check_tokenizer, dtype_of, load_settings
from bigtrain.checkpoint.hf_names import Part, our_shapes, parts
from bigtrain.checkpoint.layout import Piece
from bigtrain.checkpoint.pieces import PieceTensor
from bigtrain.checkpoint.safetensors_files import Entry, read
from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig

PRESET = "model.yaml"
"""In the checkpoint: the model's settings, as a preset of conf/model/."""


@dataclass(frozen=True)
class Imported:
    """What was written."""

    folder: Path
    """The checkpoint, CKPT/step-00000000."""
    model: ModelConfig
    dtype: str
    """That the weights came in."""
    vocab_size: int
    """Rows that they came with."""
    num_tensors: int
    """Of theirs."""
    left_out: list[str]
    """Their tensors that are no weights."""


def import_folder(
    folder: Path,
    out: Path,
    *,
    files: Mapping[str, bytes],
    tokenizer_vocab_size: int = 0,
    vocab_multiple: int = 1,
    versions: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Imported:
    """Write ``out/step-00000000``, committed, from a Hugging Face folder. On one process, no ranks.

    `files`: the tokenizer's, by their proper names, kept in the checkpoint; `tokenizer_vocab_size`: ids that it needs.
    `vocab_multiple`: pad the vocabulary to a multiple of this, for tensor parallelism; the new rows are the mean of the
    others, so that they are as unlikely as any token. `progress` is told each tensor. Raises UserError for a folder
    that is no such model, naming the field or the tensor, and where there is a checkpoint already."""
    theirs = load_settings(folder)
    check_tokenizer(folder, theirs, tokenizer_vocab_size)
    if vocab_multiple < 1:
        raise UserError(f"a multiple of {vocab_multiple} rows: it takes 1 or more")
    padded = -(-theirs.vocab_size // vocab_multiple) * vocab_multiple
    model = dataclasses.replace(theirs, vocab_size=padded)
    final = folders.path_of(out, 0)
    for taken in (final, *folders.committed(out)):
        if taken.exists():
            raise UserError(f"{taken}: it is there already, and nothing is written over. Name another folder.")
    found, left_out = check_tensors(folder, theirs)
    dtype = dtype_of(found)
    preset = (
        f"# {folder.resolve().name}, from Hugging Face\n{yaml.safe_dump(dataclasses.asdict(model), sort_keys=False)}"
    )
    state = {
        "format": folders.FORMAT,
        "step": 0,
        "weights_only": True,
        "imported": {"from": "huggingface", "vocab_size": theirs.vocab_size},
        "config": {"model": dataclasses.asdict(model), "precision": {"dtype": dtype}},
        "versions": dict(versions or {}),
    }
    _save(out, model, theirs.vocab_size, found, state, {**files, PRESET: preset.encode()}, progress)
    return Imported(final, model, dtype, theirs.vocab_size, len(found), left_out)


def ours(shape: tuple[int, ...], pieces: list[Part], tensor_of: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Our tensor, fp32, put together from theirs. Rows that none of them has (of a padded vocabulary) are the mean of
    the others."""
    whole = torch.empty(shape)
    filled = 0
    for part in pieces:
        tensor = tensor_of(part.name)
        rows = tensor.t() if part.transposed else tensor
        taken = 0
        for start, stop in part.rows:
            whole[start:stop] = rows[taken : taken + stop - start]
            taken += stop - start
        filled += taken
    if filled < shape[0]:
        whole[filled:] = whole[:filled].mean(dim=0, dtype=torch.float64).float()
    return whole


def _save(
    out: Path,
    model: ModelConfig,
    vocab_size: int,
    found: Mapping[str, Entry],
    state: dict[str, Any],
    files: dict[str, bytes],
    progress: Callable[[str], None] | None,
) -> None:
    pieces: dict[str, list[Part]] = {}
    for part in parts(model, vocab_size):
        pieces.setdefault(part.ours, []).append(part)

    def make(piece: Piece) -> torch.Tensor:
        if progress:
            progress(piece.name)
        return ours(piece.sizes, pieces[piece.name], lambda theirs: read(found[theirs]))

    def whole(name: str, shape: tuple[int, ...]) -> PieceTensor:
        return PieceTensor.made(shape, torch.float32, [Piece(name, (0,) * len(shape), shape)], make)

    tensors = {f"weight.{name}": whole(name, shape) for name, shape in our_shapes(model).items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        store.save_tensors(out, 0, tensors, state, files=files)
    except OSError as error:
        raise UserError(f"{out}: it cannot be written: {error.strerror}") from error
    except store.SaveError as error:
        raise UserError(f"{out}: {error}") from error
