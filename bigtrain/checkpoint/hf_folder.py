"""A Hugging Face folder (Llama or GPT-2, safetensors) as it lies there: what model it is, and its weights as ours.

Everything is checked before a number is read: settings by field, tensors by name, shape and dtype. `fill` then reads
for any rank's parts of our weights the rows of their tensors that these are made of, one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch

from bigtrain.checkpoint import hf_config
from bigtrain.checkpoint.folder import HF_SETTINGS
from bigtrain.checkpoint.hf_names import Part, parts
from bigtrain.checkpoint.safetensors_files import Entry, locate, read, read_json, unfit_dtype
from bigtrain.checkpoint.slices import Fragment
from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig
from bigtrain.distributed.sharding import Rectangle

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Masks and tables that older versions saved beside the weights; the model makes them anew.
_BUFFERS = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)


def load_settings(folder: Path) -> ModelConfig:
    """Our settings of the model in a Hugging Face folder. Raises UserError for one of another kind, by field."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    file = folder / HF_SETTINGS
    if not file.exists():
        raise UserError(f"{folder}: there is no {HF_SETTINGS} in it, so it is no Hugging Face folder")
    return dataclasses.replace(hf_config.from_theirs(read_json(file), str(file)), name=folder.resolve().name)


def check_tensors(folder: Path, theirs: ModelConfig) -> tuple[dict[str, Entry], list[str]]:
    """Where each tensor of the model is, and the names of those that are no weights. Raises UserError for one that is
    missing, unknown, of another shape or of a dtype for no weights."""
    there = locate(folder)
    if theirs.position == "learned" and "wte.weight" in there:  # OpenAI's own GPT-2
        there = {f"transformer.{name}" if name != "lm_head.weight" else name: entry for name, entry in there.items()}
    if theirs.num_layers > len(there):
        raise UserError(f"{folder}: config.json has {theirs.num_layers} layers, there are {len(there)} tensors")
    wanted = {part.name: part.shape for part in parts(theirs)}
    left_out = [name for name in there if name not in wanted and _BUFFERS.fullmatch(name)]
    if theirs.tie_embeddings and "lm_head.weight" in there:
        _check_tied(folder, there)
        left_out.append("lm_head.weight")
    for name in there:
        if name not in wanted and name not in left_out:
            raise UserError(
                f"{there[name].file}: tensor {name:.200} is none of this model: config.json has no such layer"
            )
    for name, shape in wanted.items():
        if name not in there:
            raise UserError(f"{folder}: tensor {name} is missing, which config.json asks for")
        if there[name].dtype is None:
            raise unfit_dtype(there[name])
        if there[name].shape != shape:
            raise UserError(
                f"{there[name].file}: tensor {name} has shape {there[name].shape}, config.json asks for {shape}"
            )
    return {name: there[name] for name in wanted}, left_out


def _check_tied(folder: Path, there: Mapping[str, Entry]) -> None:
    """An output layer that was saved although it is the embedding must be the embedding."""
    first = next(
        (there[name] for name in ("model.embed_tokens.weight", "transformer.wte.weight") if name in there), None
    )
    second = there["lm_head.weight"]
    if first is None or first.shape != second.shape or not torch.equal(read(first), read(second)):
        raise UserError(
            f"{folder}: tensor lm_head.weight is not the embedding, and config.json has tie_word_embeddings=true"
        )


def check_tokenizer(folder: Path, model: ModelConfig, num_ids: int) -> None:
    """Raise UserError where a tokenizer has ids that the model has no row for."""
    if num_ids > model.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {num_ids} ids, the model {model.vocab_size} rows")


def dtype_of(found: Mapping[str, Entry]) -> str:
    """fp32, bf16 or fp16: what the weights are in; where they differ fp32, which holds them all."""
    dtypes = {cast("torch.dtype", entry.dtype) for entry in found.values()}
    return _DTYPES[dtypes.pop()] if len(dtypes) == 1 else "fp32"


def fill(fragments: Iterable[Fragment], model: ModelConfig, found: Mapping[str, Entry]) -> None:
    """Fill `fragments` (kind "weight") of any layout of `model` from their tensors, in whatever dtype these are.

    Of a tensor of theirs only the rows are read that a fragment is made of; no more than one is held at a time. Raises
    UserError where a file is not what its header said."""
    pieces: dict[str, list[Part]] = {}
    for part in parts(model):
        pieces.setdefault(part.ours, []).append(part)
    for fragment in fragments:
        flat = fragment.tensors["weight"]
        for wanted in fragment.shard.rectangles(fragment.start, flat.numel()):
            view = flat[wanted.flat_start : wanted.flat_start + wanted.numel].view(wanted.sizes)
            for part in pieces[fragment.shard.name]:
                _fill_from(view, wanted, part, found[part.name])


def _fill_from(view: torch.Tensor, wanted: Rectangle, part: Part, entry: Entry) -> None:
    """What `part` has of the rectangle of our tensor that `view` is."""
    top, bottom = wanted.offsets[0], wanted.offsets[0] + wanted.sizes[0]
    runs: list[tuple[int, int, int]] = []
    """(row of ours, row of theirs, how many); of a transposed tensor their columns."""
    passed = 0
    for start, stop in part.rows:
        first, last = max(start, top), min(stop, bottom)
        if first < last:
            runs.append((first, passed + first - start, last - first))
        passed += stop - start
    if not runs:
        return
    columns = slice(wanted.offsets[1], wanted.offsets[1] + wanted.sizes[1]) if view.dim() == 2 else None
    begin, end = min(at for _, at, _ in runs), max(at + count for _, at, count in runs)
    if columns is None:
        rows = read(entry, (begin, end))
    elif part.transposed:
        rows = read(entry, (columns.start, columns.stop))[:, begin:end].t()
    else:
        rows = read(entry, (begin, end))[:, columns]
    for first, at, count in runs:
        view[first - top : first - top + count] = rows[at - begin : at - begin + count]
