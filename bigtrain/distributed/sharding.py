"""Where one rank's piece of a weight lies in the whole weight: slice arithmetic, no processes.

A tensor-parallel rank holds a block of a global tensor along one dimension (a SwiGLU projection: two blocks, its
part of the gate and of the up matrix). ZeRO then holds a run of that local tensor's elements in row-major order. Both
together are a few rectangles of the global tensor; initial weights and checkpoints are written in those terms, so
neither knows the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod


@dataclass(frozen=True)
class Block:
    """`length` entries along the sharded dimension: from `local` on here, from `start` on in the whole."""

    local: int
    start: int
    length: int


@dataclass(frozen=True)
class Rectangle:
    """An axis-aligned piece of a global tensor, and where its elements lie in the flat run they came from.

    The elements are contiguous in the run, in row-major order of the rectangle."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    flat_start: int

    @property
    def numel(self) -> int:
        return prod(self.sizes)


@dataclass(frozen=True)
class Shard:
    """One rank's part of a global tensor.

    `name` is the weight's name in the whole model (layers numbered from the first stage on). `dim` is the dimension
    that tensor parallelism splits, None for a replicated weight."""

    name: str
    global_shape: tuple[int, ...]
    dim: int | None = None
    blocks: tuple[Block, ...] = ()

    @staticmethod
    def of(name: str, local_shape: tuple[int, ...], *, dim: int | None, rank: int, size: int, parts: int = 1) -> Shard:
        """The shard that tensor rank `rank` of `size` holds. `parts`: equal matrices stacked along dimension 0 and each
        split over the ranks (2 for a SwiGLU's gate and up). Raises ValueError for parts along another dimension."""
        if parts > 1 and dim != 0:
            raise ValueError(f"{name}: {parts} parts along dimension {dim}; only rows are stacked")
        if dim is None:
            return Shard(name, local_shape)
        length = local_shape[dim] // parts
        whole = length * size
        blocks = tuple(Block(part * length, part * whole + rank * length, length) for part in range(parts))
        if size == 1:  # the parts are one contiguous block
            blocks = (Block(0, 0, local_shape[dim]),)
        shape = tuple(n * size if i == dim else n for i, n in enumerate(local_shape))
        return Shard(name, shape, dim, blocks)

    def first_rows(self, count: int) -> Shard:
        """The same of a global tensor that ends after `count` rows: what is left of the local one is its first rows, or
        nothing. Raises ValueError for a shard that is not one block of rows."""
        if self.dim != 0 or len(self.blocks) != 1:
            raise ValueError(f"{self.name}: not one block of rows")
        (block,) = self.blocks
        kept = replace(block, length=max(0, min(block.length, count - block.start)))
        return replace(self, global_shape=(count, *self.global_shape[1:]), blocks=(kept,))

    @property
    def local_shape(self) -> tuple[int, ...]:
        if self.dim is None:
            return self.global_shape
        return tuple(
            sum(b.length for b in self.blocks) if i == self.dim else n for i, n in enumerate(self.global_shape)
        )

    @property
    def numel(self) -> int:
        """Elements of the local tensor."""
        return prod(self.local_shape)

    def rectangles(self, start: int = 0, numel: int | None = None) -> Iterator[Rectangle]:
        """Cut elements [start, start + numel) of the flattened local tensor into rectangles of the global tensor.

        Flat positions in the result count from `start`. At most three rectangles a block of a matrix: the rest of a
        row, whole rows, the start of a row. Weights have one or two dimensions; others raise ValueError."""
        end = self.numel if numel is None else start + numel
        if len(self.local_shape) > 2 or not 0 <= start <= end <= self.numel:
            raise ValueError(f"{self.name}: elements [{start}, {end}) of a local tensor of shape {self.local_shape}")
        blocks = self.blocks if self.dim == 0 else (Block(0, 0, next(iter(self.local_shape), 1)),)
        columns = prod(self.local_shape[1:])
        for block in blocks:
            low, high = block.local * columns, (block.local + block.length) * columns
            first, last = max(start, low), min(end, high)
            while first < last:
                row, column = divmod(first, columns)
                rows = (last - first) // columns if column == 0 else 0
                run = rows * columns if rows else min(columns - column, last - first)
                yield self._rectangle(block, row, column, max(rows, 1), run // max(rows, 1), first - start)
                first += run

    def _rectangle(self, block: Block, row: int, column: int, rows: int, width: int, flat_start: int) -> Rectangle:
        top = row - block.local + block.start
        if len(self.global_shape) == 1:
            return Rectangle((top,), (rows,), flat_start)
        left = column + self._left
        return Rectangle((top, left), (rows, width), flat_start)

    @property
    def _left(self) -> int:
        """Column of the global tensor where the local one begins."""
        return next((block.start for block in self.blocks), 0) if self.dim == 1 else 0
