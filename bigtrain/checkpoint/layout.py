"""Which rectangles of which tensors go into which file of a checkpoint: a pure function of shapes and a layout.

`of_layout` says what each rank of a layout would write, without ranks: the pipeline gives a stage its layers, tensor
parallelism cuts a weight along one dimension, ZeRO cuts the elements that are left. That repeats what Megatron-core and
DeepSpeed do to the model (`model/build.py`, `engine/state.py`); a test holds it against both. Should they ever differ,
the file of a rank would hold a little of another's elements, and every load would still be right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from bigtrain.config.derive import layers_of_chunks
from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig, ParallelConfig
from bigtrain.distributed.sharding import Shard

CHUNK_BYTES = 64 << 20
"""Most that a chunk of a rewritten checkpoint takes, and so what is in memory at a time."""
Shapes = Mapping[str, tuple[int, ...]]

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_FIRST = (_EMBEDDING, "embedding.position_embeddings.weight")
_LAYER = (
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_LAST = ("decoder.final_layernorm.weight", "decoder.final_layernorm.bias", _OUTPUT)
_COLUMN_PARALLEL = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias", _EMBEDDING, _OUTPUT)
_ROW_PARALLEL = ("linear_proj.weight", "linear_fc2.weight")


@dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.sizes)


@dataclass(frozen=True)
class Layout:
    """Sizes of a layout, as `ParallelConfig` has them, and the data ranks."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 3
    virtual_pipeline: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        chunks = f" x {self.virtual_pipeline} chunks" if self.virtual_pipeline > 1 else ""
        return f"tensor {self.tensor} x pipeline {self.pipeline}{chunks} x data {self.data}, ZeRO {self.zero}"


def of_layout(shapes: Shapes, model: ModelConfig, layout: Layout) -> list[list[Piece]]:
    """What each rank of `layout` writes of weights of these global shapes, rank by rank, in its order. A rank may write
    nothing (ZeRO 0 keeps copies).

    Raises UserError for a layout that this model cannot have, and for a tensor that it does not know."""
    _check(shapes, model, layout)
    parallel = ParallelConfig(
        tensor=layout.tensor, pipeline=layout.pipeline, virtual_pipeline=layout.virtual_pipeline, zero_stage=layout.zero
    )
    try:
        layers = layers_of_chunks(model, parallel)
    except ValueError as error:
        raise UserError(f"{error}: lower --pipeline or --virtual-pipeline") from error
    chunks = _chunks(shapes, model, layers)
    stages = [
        [name for chunk in chunks[stage :: layout.pipeline] for name in chunk] for stage in range(layout.pipeline)
    ]
    ranks = [
        list(_of_rank(stages[stage], shapes, model, layout, tensor_rank, data_rank))
        for stage in range(layout.pipeline)
        for data_rank in range(layout.data)
        for tensor_rank in range(layout.tensor)
    ]
    if layout.pipeline > 1 and model.tie_embeddings:  # the last stage's copy is nobody's
        for rank in range(layout.world - layout.data * layout.tensor, layout.world):
            ranks[rank] = [piece for piece in ranks[rank] if piece.name != _EMBEDDING]
    return ranks


def in_files(shapes: Shapes, number: int) -> list[list[Piece]]:
    """Tensors of any kind, in order, over `number` files with equally many elements, give or take a row."""
    total, done = sum(map(prod, shapes.values())), 0
    found: list[list[Piece]] = [[] for _ in range(number)]
    for name, shape in shapes.items():
        rows, row = (shape[0], prod(shape[1:])) if shape else (1, 1)
        first = 0
        if not prod(shape):
            found[-1].append(Piece(name, (0,) * len(shape), shape))
        while first < rows and prod(shape):
            file = min((done + row // 2) * number // max(total, 1), number - 1)
            room = -(-total * (file + 1) // number) - done
            fit = rows if file == number - 1 else max(1, round(room / max(row, 1)))
            take = min(rows - first, fit)
            offsets, sizes = (first, *(0,) * (len(shape) - 1)), (take, *shape[1:])
            found[file].append(Piece(name, offsets, sizes) if shape else Piece(name, (), ()))
            first, done = first + take, done + take * row
    return found


def cut(piece: Piece, element_bytes: int, most: int = CHUNK_BYTES) -> Iterator[Piece]:
    """A piece in chunks of whole rows of it, of `most` bytes or one row."""
    if not piece.sizes or not piece.numel:
        yield piece
        return
    rows = max(1, most // max(prod(piece.sizes[1:]) * element_bytes, 1))
    for first in range(0, piece.sizes[0], rows):
        sizes = (min(rows, piece.sizes[0] - first), *piece.sizes[1:])
        yield Piece(piece.name, (piece.offsets[0] + first, *piece.offsets[1:]), sizes)


def _check(shapes: Shapes, model: ModelConfig, layout: Layout) -> None:
    for name, value in vars(layout).items():
        if value < (0 if name == "zero" else 1):
            raise UserError(f"--{name.replace('_', '-')} {value}: it takes 1 or more")
    if layout.zero > 3:
        raise UserError(f"--zero {layout.zero}: it takes 0, 1, 2 or 3")
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        raise UserError("--virtual-pipeline: chunks are interleaved over stages; give --pipeline 2 or more")
    if model.num_query_groups % layout.tensor:
        raise UserError(
            f"--tensor {layout.tensor}: the model has {model.num_query_groups} key/value heads, and each rank has "
            "whole ones. Take a divisor of it."
        )
    known = set(_names(range(model.num_layers)))
    for name, shape in shapes.items():
        if name not in known:
            raise UserError(f"{name} is no tensor of this model, so no layout says who writes it; use --files N")
        dim, parts = _split(name, model)
        if dim is not None and shape[dim] % (parts * layout.tensor):
            raise UserError(
                f"--tensor {layout.tensor}: {name} has shape {shape}, and dimension {dim} of it is not {layout.tensor} "
                f"equal parts{' of gate and up' if parts > 1 else ''}"
            )


def _names(layers: Iterable[int]) -> Iterator[str]:
    """What these layers may have, in the order in which Megatron registers it, with what is before and behind."""
    yield from _FIRST
    for layer in layers:
        for module in _LAYER:
            yield f"decoder.layers.{layer}.{module}.weight"
            yield f"decoder.layers.{layer}.{module}.bias"
    yield from _LAST


def _chunks(shapes: Shapes, model: ModelConfig, layers: Sequence[int]) -> list[list[str]]:
    """Names of the tensors of each chunk of the model, in order. With tied embeddings the last has a copy."""
    chunks: list[list[str]] = []
    for place, count in enumerate(layers):
        first = sum(layers[:place])
        left_out = (*(_FIRST if place else ()), *(_LAST if place < len(layers) - 1 else ()))
        names = [name for name in _names(range(first, first + count)) if name in shapes and name not in left_out]
        chunks.append(names)
    if model.tie_embeddings and len(layers) > 1:
        chunks[-1].append(_EMBEDDING)
    return chunks


def _split(name: str, model: ModelConfig) -> tuple[int | None, int]:
    """Which dimension tensor parallelism cuts, and of how many stacked matrices."""
    if name.endswith(_COLUMN_PARALLEL):
        return 0, 2 if "linear_fc1" in name and model.activation == "swiglu" else 1
    return (1 if name.endswith(_ROW_PARALLEL) else None), 1


def _of_rank(
    names: Sequence[str], shapes: Shapes, model: ModelConfig, layout: Layout, tensor_rank: int, data_rank: int
) -> Iterator[Piece]:
    shards = [_shard(name, shapes[name], model, layout.tensor, tensor_rank) for name in names]
    runs = _runs(shards, layout, data_rank)
    for shard, (start, count) in zip(shards, runs, strict=True):
        is_copy = (shard.dim is None and tensor_rank > 0) or (layout.zero == 0 and data_rank > 0)
        for rectangle in () if is_copy or not count else shard.rectangles(start, count):
            yield Piece(shard.name, rectangle.offsets, rectangle.sizes)


def _shard(name: str, shape: tuple[int, ...], model: ModelConfig, size: int, rank: int) -> Shard:
    dim, parts = _split(name, model)
    local = tuple(n // size if i == dim else n for i, n in enumerate(shape))
    return Shard.of(name, local, dim=dim, rank=rank, size=size, parts=parts)


def _runs(shards: Sequence[Shard], layout: Layout, data_rank: int) -> list[tuple[int, int]]:
    """(start, elements) of each local tensor that ZeRO leaves to a data rank: of stages 1 and 2 an equal run of all
    that decay, end to end, and one of all others (`optim/optimizer.py`); of stage 3 an equal run of each."""
    if layout.zero in (0, 3):
        size = layout.data if layout.zero == 3 else 1
        whole = [(shard.numel, -(-shard.numel // size)) for shard in shards]
        starts = [min(data_rank * run, numel) if layout.zero else 0 for numel, run in whole]
        return [(start, min(run, numel - start)) for start, (numel, run) in zip(starts, whole, strict=True)]
    found: list[tuple[int, int]] = [(0, 0)] * len(shards)
    for decays in (True, False):
        group = [i for i, shard in enumerate(shards) if shard.name.endswith((".bias", "norm.weight")) != decays]
        padded = -(-sum(shards[i].numel for i in group) // (2 * layout.data)) * 2  # DeepSpeed aligns to two elements
        low, at = data_rank * padded, 0
        for i in group:
            numel = shards[i].numel
            start, end = max(low - at, 0), min(low + padded - at, numel)
            found[i] = (start, end - start) if start < end else (0, 0)
            at += numel
    return found
