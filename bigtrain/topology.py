"""Which rank does what: one frozen object, passed explicitly. Pure arithmetic, no torch, no processes.

Ranks are numbered as Megatron numbers them by default ("tp-cp-ep-dp-pp"): tensor ranks are neighbours, then data
ranks, then pipeline stages: ``rank = (stage * data + data_rank) * tensor + tensor_rank``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Sizes of the layout and the place of one rank in it."""

    world: int
    tensor: int
    pipeline: int
    data: int
    rank: int

    @staticmethod
    def of(*, world: int, tensor: int, pipeline: int, rank: int) -> Topology:
        """The data-parallel size is what is left. Raises ValueError where the layout does not divide the world."""
        if world < 1 or tensor < 1 or pipeline < 1 or world % (tensor * pipeline):
            raise ValueError(f"{world} ranks do not divide into tensor {tensor} x pipeline {pipeline}")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is outside a world of {world}")
        return Topology(world, tensor, pipeline, world // (tensor * pipeline), rank)

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor % self.data

    @property
    def stage(self) -> int:
        """Pipeline rank."""
        return self.rank // (self.tensor * self.data)

    def __str__(self) -> str:
        return f"{self.world} ranks = tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}"
