"""A tensor for torch.distributed.checkpoint to write whose chunks are made when they are written, and then let go."""

# pyright: reportUnknownMemberType=false, reportPrivateImportUsage=false
# (torch.distributed.checkpoint is only partly typed)

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from bigtrain.checkpoint.layout import Piece


class PieceTensor(torch.Tensor):
    """Has the shape of the whole, and no elements of its own (see `slices.GlobalTensor`)."""

    pieces: dict[tuple[int, ...], Piece]
    make: Callable[[Piece], torch.Tensor]

    @staticmethod
    def of(
        shape: tuple[int, ...], dtype: torch.dtype, pieces: Iterable[Piece], make: Callable[[Piece], torch.Tensor]
    ) -> PieceTensor:
        """`pieces` cover the tensor; `make` is called once for each."""
        wrapper: Any = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            PieceTensor, shape, dtype=dtype
        )
        tensor = cast(PieceTensor, wrapper)
        tensor.pieces, tensor.make = {piece.offsets: piece for piece in pieces}, make
        return tensor

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func}: its elements are not made yet")

    def __create_write_items__(self, fqn: str, obj: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in self.pieces.values()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.make(self.pieces[tuple(index.offset or (0,) * self.dim())])
