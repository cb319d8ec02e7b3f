"""A Hugging Face folder (Llama or GPT-2, safetensors) as a checkpoint of ours: weights, no optimizer state, step 0.

Everything is checked before a number is read: settings by field, tensors by name, shape and dtype. Then the tensors
stream: torch.distributed.checkpoint asks for one after the other, and each is put together when it is asked for. A run
of any layout starts from the result (`store.load_weights`); `hf_export.export` of it gives the same bytes back.
"""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportPrivateImportUsage=false
# (torch.distributed.checkpoint is only partly typed)

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import hf_config, store
from bigtrain.checkpoint.hf_names import Part, our_shapes, parts
from bigtrain.checkpoint.safetensors_files import Entry, locate, read, read_json, unfit_dtype
from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig

PRESET = "model.yaml"
"""In the checkpoint: the model's settings, as a preset of conf/model/."""
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Masks and tables that older versions saved beside the weights; the model makes them anew.
_BUFFERS = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)


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


def load_settings(folder: Path) -> ModelConfig:
    """Our settings of the model in a Hugging Face folder. Raises UserError for one of another kind, by field."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    file = folder / "config.json"
    return dataclasses.replace(hf_config.from_theirs(read_json(file), str(file)), name=folder.resolve().name)


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
    if tokenizer_vocab_size > theirs.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer_vocab_size} ids, the model {theirs.vocab_size} rows")
    if vocab_multiple < 1:
        raise UserError(f"a multiple of {vocab_multiple} rows: it takes 1 or more")
    padded = -(-theirs.vocab_size // vocab_multiple) * vocab_multiple
    model = dataclasses.replace(theirs, vocab_size=padded)
    final = folders.path_of(out, 0)
    if final.exists():
        raise UserError(f"{final}: it is there already, and nothing is written over. Name another folder.")
    found, left_out = check_tensors(folder, theirs)
    dtypes = {cast("torch.dtype", entry.dtype) for entry in found.values()}
    dtype = _DTYPES[dtypes.pop()] if len(dtypes) == 1 else "fp32"  # which holds them all
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


class LazyTensor(torch.Tensor):
    """A whole fp32 tensor that is made when torch.distributed.checkpoint writes it."""

    make: Callable[[], torch.Tensor]

    @staticmethod
    def of(shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> LazyTensor:
        wrapper: Any = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            LazyTensor, shape, dtype=torch.float32
        )
        tensor = cast(LazyTensor, wrapper)
        tensor.make = make
        return tensor

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func}: a LazyTensor has no elements yet")

    def __create_write_items__(self, fqn: str, obj: Any) -> list[WriteItem]:
        chunk = ChunkStorageMetadata(torch.Size([0] * self.dim()), self.shape)
        data = TensorWriteData(chunk, TensorProperties(dtype=self.dtype), self.shape)
        return [WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([0] * self.dim()), self.shape)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.make()


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

    def make(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if progress:
            progress(name)
        return ours(shape, pieces[name], lambda theirs: read(found[theirs]))

    def lazy(name: str, shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor.of(shape, lambda: make(name, shape))

    tensors = {f"weight.{name}": lazy(name, shape) for name, shape in our_shapes(model).items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        store.save_tensors(out, 0, tensors, state, files=files)
    except OSError as error:
        raise UserError(f"{out}: it cannot be written: {error.strerror}") from error
    except store.SaveError as error:
        raise UserError(f"{out}: {error}") from error
