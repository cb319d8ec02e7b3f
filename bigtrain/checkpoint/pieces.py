"""A tensor for torch.distributed.checkpoint to write whose chunks are made when they are written, and then let go."""

# pyright: reportUnknownMemberType=false, reportPrivateImportUsage=false
# (torch.distributed.checkpoint is only partly typed)

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from bigtrain.checkpoint.layout import Piece
from bigtrain.checkpoint.slices import GlobalTensor


class PieceTensor(GlobalTensor):
    """A `GlobalTensor` whose chunks do not exist yet."""

    pieces: dict[tuple[int, ...], Piece]
    make: Callable[[Piece], torch.Tensor]

    @staticmethod
    def made(
        shape: tuple[int, ...], dtype: torch.dtype, pieces: Iterable[Piece], make: Callable[[Piece], torch.Tensor]
    ) -> PieceTensor:
        """`pieces` cover the tensor; `make` is called once for each."""
        wrapper: Any = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            PieceTensor, shape, dtype=dtype
        )
        tensor = cast(PieceTensor, wrapper)
        tensor.pieces, tensor.make = {piece.offsets: piece for piece in pieces}, make
        return tensor

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in self.pieces.values()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.make(self.pieces[tuple(index.offset or (0,) * self.dim())])
