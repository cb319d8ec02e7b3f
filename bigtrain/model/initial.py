"""Initial weights as a function of (seed, name) alone, so that every layout starts from the same model.

The normal numbers of a weight are drawn in blocks of whole rows, each block from its own seed. A rank draws only the
blocks that its slice touches: no rank ever holds a full weight, and the work of starting a large model is shared. The
draws are always the CPU's, so a GPU starts from the same numbers.
"""

from __future__ import annotations

import math

import torch

from bigtrain.config.schema import ModelConfig
from bigtrain.distributed.rng import derive
from bigtrain.distributed.sharding import Rectangle, Shard
from bigtrain.model.build import Decoder, shards_of
from bigtrain.topology import Topology

BLOCK_ELEMENTS = 1 << 20
"""Elements a block, at least one row. Part of what fixes the numbers: changing it changes every initial model."""


@torch.no_grad()
def initialize(chunk: Decoder, model: ModelConfig, *, seed: int, topology: Topology) -> None:
    """Fill every parameter of the chunk: matrices N(0, init_std), the two residual output layers of a block divided by
    sqrt(2 num_layers) (GPT-2, section 2.3), norms 1, biases 0. Fills only this rank's part under ZeRO-3."""
    for shard, parameter in shards_of(chunk, topology):
        partition = getattr(parameter, "ds_tensor", None)  # ZeRO-3's flat, padded piece
        target = parameter.data.view(-1) if partition is None else partition.data
        start = 0 if partition is None else min(topology.data_rank * target.numel(), shard.numel)
        numel = min(target.numel(), shard.numel - start)
        target[:numel] = values(shard, start, numel, std=_std(shard.name, model), seed=seed).to(target.dtype)


def values(shard: Shard, start: int, numel: int, *, std: float | None, seed: int) -> torch.Tensor:
    """Elements [start, start + numel) of the flattened local tensor, fp32. `std` None: a norm's weight or a bias."""
    if std is None:
        return torch.full((numel,), 1.0 if shard.name.endswith("norm.weight") else 0.0)
    flat = torch.empty(numel)
    for rectangle in shard.rectangles(start, numel):
        piece = flat[rectangle.flat_start : rectangle.flat_start + rectangle.numel]
        _draw(piece.view(rectangle.sizes), rectangle, shard, std, seed)
    return flat


def _std(name: str, model: ModelConfig) -> float | None:
    if name.endswith("bias") or name.endswith("norm.weight"):
        return None
    if name.endswith(("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")):
        return model.init_std / math.sqrt(2 * model.num_layers)
    return model.init_std


def _draw(out: torch.Tensor, rectangle: Rectangle, shard: Shard, std: float, seed: int) -> None:
    rows, columns = shard.global_shape
    height = max(1, BLOCK_ELEMENTS // columns)
    (top, left), (num_rows, num_columns) = rectangle.offsets, rectangle.sizes
    for block in range(top // height, (top + num_rows - 1) // height + 1):
        first = block * height
        generator = torch.Generator().manual_seed(derive(seed, "weight", shard.name, block))
        drawn = torch.randn(min(height, rows - first), columns, generator=generator).mul_(std)
        low, high = max(top, first), min(top + num_rows, first + drawn.shape[0])
        out[low - top : high - top] = drawn[low - first : high - first, left : left + num_columns]
