"""A rank's pieces of one global tensor, as torch.distributed.checkpoint sees them.

DCP takes any tensor subclass that can list its chunks (`__create_write_items__`, `__create_chunk_list__`) and hand them
out (`__get_tensor_shard__`). `GlobalTensor` has the global shape, holds no data of its own, and maps each chunk to a
view of this rank's flat memory: what DCP writes or reads goes straight from or into the running optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from bigtrain.distributed.sharding import Shard


@dataclass(frozen=True)
class Fragment:
    """A run of elements of one weight that this rank holds, and what the optimizer keeps for it.

    `tensors`: by kind ("weight" and the Adam moments), flat, fp32, all of one length; writing to them changes the run.
    `start`: where the run begins in the flattened local tensor. `owned`: this rank writes it (others hold copies)."""

    shard: Shard
    start: int
    tensors: dict[str, torch.Tensor]
    owned: bool


class GlobalTensor(torch.Tensor):
    """The rectangles of one global tensor that lie in this rank's flat memory."""

    chunks: dict[tuple[int, ...], torch.Tensor]

    @staticmethod
    def of(shard: Shard, start: int, flat: torch.Tensor) -> GlobalTensor:
        """`flat`: elements [start, start + len) of the flattened local tensor of `shard`."""
        wrapper: Any = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
            GlobalTensor, shard.global_shape, dtype=flat.dtype, device=flat.device
        )
        tensor = cast(GlobalTensor, wrapper)
        tensor.chunks = {
            r.offsets: flat[r.flat_start : r.flat_start + r.numel].view(r.sizes)
            for r in shard.rectangles(start, flat.numel())
        }
        return tensor

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func}: a GlobalTensor has chunks, not elements")

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
        return [ChunkStorageMetadata(torch.Size(offsets), c.shape) for offsets, c in self.chunks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.chunks[tuple(index.offset or (0,) * self.dim())]


def state_dict_of(fragments: Iterable[Fragment], *, only_owned: bool) -> dict[str, Any]:
    """DCP's state dict: ``kind.name`` to the global tensor. `only_owned`: what this rank writes."""
    return {
        f"{kind}.{fragment.shard.name}": GlobalTensor.of(fragment.shard, fragment.start, flat)
        for fragment in fragments
        if (fragment.owned or not only_owned) and next(iter(fragment.tensors.values())).numel() > 0
        for kind, flat in fragment.tensors.items()
    }
